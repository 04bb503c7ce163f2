//! What callers get: the engine's events as messages, scores and names only for who asked for them.
//! Knows no connection.

use std::time::Duration;

use super::call::Call;
use super::proto::{self, FinishReason as WireReason, PolicyAction};
use crate::engine::event::{
    Completed, Delta, FinishReason, Retract, Score, Timings, Usage, Verdict,
};
use crate::engine::fold::Folded;
use crate::engine::request::Monitor;
use crate::engine::sampler::TokenLogprobs;
use crate::error::{Error, Result};
use crate::policy::{Action, Mode};

/// What of a request its replies repeat.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    request_id: String,
    policy_revision: u64,
    mode: Mode,
    return_scores: bool,
}

impl Terms {
    pub(super) fn new(call: &Call, monitor: &Monitor) -> Self {
        Self {
            request_id: call.id.clone(),
            policy_revision: monitor.policy.revision,
            mode: monitor.mode,
            return_scores: monitor.return_scores,
        }
    }

    pub(super) fn started(&self, cached_tokens: u32) -> proto::Started {
        proto::Started {
            request_id: self.request_id.clone(),
            policy_revision: self.policy_revision,
            cached_tokens,
            mode: mode(self.mode).into(),
        }
    }

    pub(super) fn delta(&self, delta: Delta) -> proto::Delta {
        proto::Delta {
            text: delta.text,
            token_ids: delta.token_ids,
            scores: self.scores(&delta.scores),
            logprobs: delta.logprobs.iter().map(logprobs).collect(),
        }
    }

    pub(super) fn verdict(&self, verdict: Verdict) -> proto::Verdict {
        proto::Verdict {
            action: action(verdict.action).into(),
            evidence: self.scores(&verdict.evidence),
            shadow: verdict.shadow,
            rule: if self.return_scores {
                verdict.rule
            } else {
                String::new()
            },
        }
    }

    pub(super) fn completed(&self, completed: &Completed) -> proto::Completed {
        proto::Completed {
            finish_reason: finish_reason(completed.finish_reason).into(),
            usage: Some(usage(completed.usage)),
            action: action(completed.action).into(),
            scores: self.scores(&completed.scores),
            partially_monitored: completed.partially_monitored,
            out_of_domain: completed.out_of_domain,
            timings: Some(timings(completed.timings)),
        }
    }

    /// A whole answer. Folding has ended, so `folded` is completed.
    pub(super) fn generated(&self, folded: Folded) -> Result<proto::GenerateResponse> {
        let end = self.completed(&end(&folded)?);
        Ok(proto::GenerateResponse {
            request_id: self.request_id.clone(),
            text: folded.text,
            token_ids: folded.token_ids,
            finish_reason: end.finish_reason,
            usage: end.usage,
            scores: end.scores,
            action: end.action,
            policy_revision: self.policy_revision,
            verdicts: self.verdicts(folded.verdicts),
            logprobs: folded.logprobs.iter().map(logprobs).collect(),
            partially_monitored: end.partially_monitored,
            out_of_domain: end.out_of_domain,
            timings: end.timings,
            mode: mode(self.mode).into(),
        })
    }

    /// The scores of a prompt, or of a prompt with its answer.
    pub(super) fn scored(
        &self,
        folded: Folded,
        token_scores: &[Score],
    ) -> Result<proto::ScoreResponse> {
        let end = end(&folded)?;
        Ok(proto::ScoreResponse {
            // What the call is for, so asked for by being called.
            scores: end.scores.iter().map(score).collect(),
            usage: Some(usage(end.usage)),
            token_scores: self.scores(token_scores),
            request_id: self.request_id.clone(),
            action: action(end.action).into(),
            verdicts: self.verdicts(folded.verdicts),
            policy_revision: self.policy_revision,
            partially_monitored: end.partially_monitored,
            out_of_domain: end.out_of_domain,
        })
    }

    fn verdicts(&self, verdicts: Vec<Verdict>) -> Vec<proto::Verdict> {
        verdicts.into_iter().map(|one| self.verdict(one)).collect()
    }

    fn scores(&self, scores: &[Score]) -> Vec<proto::ProbeScore> {
        match self.return_scores {
            true => scores.iter().map(score).collect(),
            false => Vec::new(),
        }
    }
}

pub(super) fn retract(retract: Retract) -> proto::Retract {
    proto::Retract {
        keep_token_count: retract.keep_token_count,
        keep_text_bytes: retract.keep_text_bytes,
        replacement_text: retract.replacement_text,
        replacement_token_ids: retract.replacement_token_ids,
    }
}

pub(super) fn mode(mode: Mode) -> proto::MonitorMode {
    match mode {
        Mode::Off => proto::MonitorMode::Off,
        Mode::Shadow => proto::MonitorMode::Shadow,
        Mode::Enforce => proto::MonitorMode::Enforce,
    }
}

fn end(folded: &Folded) -> Result<Completed> {
    folded
        .completed
        .clone()
        .ok_or_else(|| Error::internal("the events ended without an end"))
}

fn action(action: Action) -> PolicyAction {
    match action {
        Action::Allow => PolicyAction::Allow,
        Action::Flag => PolicyAction::Flag,
        Action::Steer => PolicyAction::Steer,
        Action::RefusalHead => PolicyAction::RefusalHead,
        Action::Refuse => PolicyAction::Refuse,
        Action::Abort => PolicyAction::Abort,
    }
}

fn finish_reason(reason: FinishReason) -> WireReason {
    match reason {
        FinishReason::Stop => WireReason::Stop,
        FinishReason::StopSequence => WireReason::StopSequence,
        FinishReason::Length => WireReason::Length,
        FinishReason::RefusedByPolicy => WireReason::RefusedByPolicy,
        FinishReason::MonitorFailed => WireReason::MonitorFailed,
    }
}

fn score(score: &Score) -> proto::ProbeScore {
    proto::ProbeScore {
        probe: score.probe.to_string(),
        probe_revision: score.probe_revision,
        sites: score.sites.iter().map(ToString::to_string).collect(),
        detector: score.detector.as_deref().unwrap_or_default().to_owned(),
        position: score.position.into(),
        logit: score.logit,
        probability: score.probability,
        threshold: score.threshold,
        fired: score.fired,
        out_of_domain: score.out_of_domain,
    }
}

fn logprobs(logprobs: &TokenLogprobs) -> proto::TokenLogprobs {
    let logprob = |&(token_id, logprob): &(u32, f32)| proto::Logprob { token_id, logprob };
    proto::TokenLogprobs {
        chosen: Some(logprob(&logprobs.chosen)),
        alternatives: logprobs.alternatives.iter().map(logprob).collect(),
    }
}

fn usage(usage: Usage) -> proto::Usage {
    proto::Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
        withheld_tokens: usage.withheld_tokens,
    }
}

fn timings(timings: Timings) -> proto::Timings {
    proto::Timings {
        queued: Some(duration(timings.queued)),
        to_first_token: timings.to_first_token.map(duration),
        total: Some(duration(timings.total)),
    }
}

fn duration(time: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        // Below a milliard, so it fits.
        nanos: time.subsec_nanos() as i32,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::engine::event::Event;

    pub(in crate::rpc) fn terms(return_scores: bool) -> Terms {
        Terms {
            request_id: "r1".into(),
            policy_revision: 7,
            mode: Mode::Enforce,
            return_scores,
        }
    }

    fn a_score() -> Score {
        Score {
            probe: "prompt_harm".into(),
            probe_revision: 2,
            sites: vec!["blocks.3.hook_resid_post".parse().expect("a site")],
            detector: Some("harmful-prompt".into()),
            position: 11,
            logit: 1.5,
            probability: Some(0.75),
            threshold: Some(0.5),
            fired: true,
            out_of_domain: false,
        }
    }

    pub(in crate::rpc) fn completed() -> Completed {
        Completed {
            finish_reason: FinishReason::Stop,
            action: Action::Flag,
            usage: Usage {
                prompt_tokens: 4,
                completion_tokens: 3,
                cached_tokens: 2,
                withheld_tokens: 1,
            },
            scores: vec![a_score()],
            out_of_domain: true,
            partially_monitored: true,
            timings: Timings {
                queued: Duration::from_millis(1500),
                to_first_token: None,
                total: Duration::from_secs(2),
            },
        }
    }

    fn folded() -> Folded {
        let mut folded = Folded::default();
        let delta = Delta {
            text: "Yes".into(),
            token_ids: vec![5],
            scores: vec![a_score()],
            logprobs: vec![TokenLogprobs {
                chosen: (5, -0.5),
                alternatives: vec![(6, -1.0)],
            }],
        };
        let verdict = Verdict {
            action: Action::Flag,
            rule: "watch".into(),
            shadow: true,
            evidence: vec![a_score()],
        };
        for event in [
            Event::Delta(delta),
            Event::Verdict(verdict),
            Event::Completed(Box::new(completed())),
        ] {
            folded.take(event).expect("folds");
        }
        folded
    }

    #[test]
    fn without_return_scores_a_verdict_is_an_action_and_nothing_more() {
        let reply = terms(false).generated(folded()).expect("a reply");
        assert_eq!(reply.action, PolicyAction::Flag as i32);
        assert!(reply.scores.is_empty());
        let verdict = &reply.verdicts[0];
        assert_eq!(verdict.action, PolicyAction::Flag as i32);
        assert!(verdict.shadow);
        assert!(verdict.rule.is_empty() && verdict.evidence.is_empty());
        let delta = terms(false).delta(Delta {
            scores: vec![a_score()],
            ..Delta::default()
        });
        assert!(delta.scores.is_empty());
    }

    #[test]
    fn with_return_scores_everything_is_told() {
        let reply = terms(true).generated(folded()).expect("a reply");
        assert_eq!(reply.verdicts[0].rule, "watch");
        let told = &reply.scores[0];
        assert_eq!(told, &reply.verdicts[0].evidence[0]);
        assert_eq!(told.probe, "prompt_harm");
        assert_eq!(told.sites, ["blocks.3.hook_resid_post"]);
        assert_eq!((told.position, told.probability), (11, Some(0.75)));
    }

    #[test]
    fn a_reply_carries_all_of_the_end() {
        let reply = terms(false).generated(folded()).expect("a reply");
        assert_eq!(
            (reply.text.as_str(), reply.token_ids.as_slice()),
            ("Yes", [5].as_slice())
        );
        assert_eq!(reply.policy_revision, 7);
        assert_eq!(reply.mode, proto::MonitorMode::Enforce as i32);
        assert_eq!(reply.finish_reason, WireReason::Stop as i32);
        assert!(reply.partially_monitored && reply.out_of_domain);
        assert_eq!(reply.usage.expect("usage").withheld_tokens, 1);
        assert_eq!(reply.logprobs[0].alternatives[0].token_id, 6);
        let queued = reply.timings.expect("timings").queued.expect("queued");
        assert_eq!((queued.seconds, queued.nanos), (1, 500_000_000));
    }

    #[test]
    fn a_score_reply_always_has_gathered_scores() {
        let reply = terms(false)
            .scored(folded(), &[a_score()])
            .expect("a reply");
        assert_eq!(reply.scores.len(), 1);
        assert!(reply.token_scores.is_empty());
        let reply = terms(true).scored(folded(), &[a_score()]).expect("a reply");
        assert_eq!(reply.token_scores.len(), 1);
    }

    #[test]
    fn an_answer_without_an_end_is_a_bug() {
        assert!(matches!(
            terms(false).generated(Folded::default()),
            Err(Error::Internal(_))
        ));
    }
}
