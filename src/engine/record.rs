//! Fills the parts of a decision record from what the engine knows.

use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::event::{Timings, Usage};
use super::request::{Intervention, Prompt, Request};
use super::sampler::Sampling;
use crate::policy::{
    InterventionRecord, Policy, PolicyIdentity, ProbeIdentity, PromptRecord, SamplingRecord,
    TimingsRecord, TokenCounts,
};
use crate::registry::Snapshot;

pub(super) fn policy_identity(policy: &Policy) -> PolicyIdentity {
    PolicyIdentity {
        name: policy.name.clone(),
        revision: policy.revision,
        hash: policy.hash.clone(),
    }
}

pub(super) fn probe_identities(snapshot: &Snapshot) -> Vec<ProbeIdentity> {
    let identity = |probe: &std::sync::Arc<crate::registry::LoadedProbe>| ProbeIdentity {
        name: probe.name.to_string(),
        revision: probe.revision,
        content_hash: probe.content_hash.clone(),
    };
    snapshot.probes.iter().map(identity).collect()
}

pub(super) fn interventions(request: &Request) -> Vec<InterventionRecord> {
    let of = |intervention: &Intervention| InterventionRecord {
        name: intervention.name.clone(),
        site: intervention.site.to_string(),
        content_hash: hex::encode(intervention.content_hash(&request.monitor.snapshot)),
    };
    let head = request.refusal_head.iter().map(|head| InterventionRecord {
        name: head.name.clone(),
        site: String::new(),
        content_hash: head.content_hash.clone(),
    });
    request.interventions.iter().map(of).chain(head).collect()
}

/// The key comes first and the digest is hashed again under it, so that neither a guess nor an
/// extension can be tested without the key.
pub(super) fn prompt(prompt: &Prompt, key: &[u8; 32]) -> PromptRecord {
    let mut inner = Sha256::new();
    inner.update(key);
    for token in &prompt.tokens {
        inner.update(token.to_le_bytes());
    }
    let mut outer = Sha256::new();
    outer.update(key);
    outer.update(inner.finalize());
    PromptRecord {
        keyed_hash: hex::encode(outer.finalize()),
        content_start: prompt.content.start as u32,
    }
}

pub(super) fn timings(timings: &Timings, now: SystemTime) -> TimingsRecord {
    let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
    TimingsRecord {
        finished_at_ms: now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64),
        queued_ms: ms(timings.queued),
        to_first_token_ms: timings.to_first_token.map(ms),
        total_ms: ms(timings.total),
    }
}

pub(super) fn token_counts(usage: &Usage) -> TokenCounts {
    TokenCounts {
        prompt: usage.prompt_tokens,
        completion: usage.completion_tokens,
        cached: usage.cached_tokens,
        withheld: usage.withheld_tokens,
    }
}

pub(super) fn sampling(sampling: &Sampling, max_tokens: usize) -> SamplingRecord {
    SamplingRecord {
        seed: sampling.seed,
        max_tokens: max_tokens as u32,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: Some(sampling.top_p),
        min_p: Some(sampling.min_p),
        repetition_penalty: Some(sampling.repetition_penalty),
        presence_penalty: Some(sampling.presence_penalty),
        frequency_penalty: Some(sampling.frequency_penalty),
        stop_strings: sampling.stop.len() as u32,
        stop_tokens: sampling.stop_token_ids.clone(),
    }
}
