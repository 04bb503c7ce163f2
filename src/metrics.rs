//! Every metric: its name, its help, one function per event.
//! Knows no other module; times are seconds, sizes are tokens or rows.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::error::{Error, Result};

const REQUESTS: &str = "inwit_requests_total";
const REQUEST_DURATION: &str = "inwit_request_duration_seconds";
const RUNNING: &str = "inwit_requests_running";
const WAITING: &str = "inwit_requests_waiting";
const QUEUE_REJECTS: &str = "inwit_queue_rejects_total";
const PROMPT_TOKENS: &str = "inwit_prompt_tokens_total";
const GENERATED_TOKENS: &str = "inwit_generated_tokens_total";
const CACHED_TOKENS: &str = "inwit_cached_tokens_total";
const WITHHELD_TOKENS: &str = "inwit_withheld_tokens_total";
const TIME_TO_FIRST_TOKEN: &str = "inwit_time_to_first_token_seconds";
const INTER_TOKEN_LATENCY: &str = "inwit_inter_token_latency_seconds";
const STEP_DURATION: &str = "inwit_step_duration_seconds";
const STEP_ROWS: &str = "inwit_step_rows";
const VERDICTS: &str = "inwit_verdicts_total";
const RETRACTS: &str = "inwit_retracts_total";
const OUT_OF_DOMAIN: &str = "inwit_out_of_domain_total";
const MONITOR_FAILED: &str = "inwit_monitor_failed_total";
const MONITOR_SKIPPED: &str = "inwit_monitor_skipped_total";
const CACHE_HITS: &str = "inwit_prefix_cache_hit_tokens_total";
const CACHE_MISSES: &str = "inwit_prefix_cache_miss_tokens_total";
const CACHE_UNSCORED: &str = "inwit_prefix_cache_unscored_tokens_total";
const KV_USED: &str = "inwit_kv_blocks_used";
const KV_TOTAL: &str = "inwit_kv_blocks_total";
const KV_USAGE: &str = "inwit_kv_cache_usage_ratio";
const POLICY_REVISION: &str = "inwit_policy_revision_info";
const POLICY_EMPTY: &str = "inwit_monitor_policy_empty";
const BUILD: &str = "inwit_build_info";

const REQUEST_BUCKETS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0,
];
const ROW_BUCKETS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0,
];

/// What most rows of a step were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Prefill,
    Decode,
    Mixed,
}

impl Phase {
    fn label(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        }
    }
}

/// Makes this process's recorder, once; every later call gets the same handle.
///
/// # Errors
/// When the process already has a recorder that is not ours.
pub fn install() -> Result<PrometheusHandle> {
    static HANDLE: OnceLock<std::result::Result<PrometheusHandle, String>> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let handle = recorder()
                .and_then(|builder| Ok(builder.install_recorder()?))
                .map_err(|error| error.to_string())?;
            describe();
            gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            Ok(handle)
        })
        .clone()
        .map_err(|reason| Error::internal(format!("metrics cannot be recorded: {reason}")))
}

/// A call ended, however it ended. `rpc` is the method's path, `code` the status in UPPER_SNAKE.
pub fn request_finished(rpc: &'static str, code: &'static str, elapsed: Duration) {
    counter!(REQUESTS, "rpc" => rpc, "code" => code).increment(1);
    histogram!(REQUEST_DURATION, "rpc" => rpc).record(elapsed);
}

pub fn load_changed(running: usize, waiting: usize) {
    gauge!(RUNNING).set(running as f64);
    gauge!(WAITING).set(waiting as f64);
}

/// A request was refused before it was queued, for `reason`.
pub fn queue_rejected(reason: &'static str) {
    counter!(QUEUE_REJECTS, "reason" => reason).increment(1);
}

/// A prompt was taken in; `cached` of its tokens came from the prefix cache.
pub fn prompt_consumed(tokens: u32, cached: u32) {
    counter!(PROMPT_TOKENS).increment(tokens.into());
    counter!(CACHED_TOKENS).increment(cached.into());
}

pub fn tokens_generated(tokens: u32) {
    counter!(GENERATED_TOKENS).increment(tokens.into());
}

/// Tokens were decoded and are not part of an answer.
pub fn tokens_withheld(tokens: u32) {
    counter!(WITHHELD_TOKENS).increment(tokens.into());
}

/// The first token left, `elapsed` after the request arrived.
pub fn first_token_released(elapsed: Duration) {
    histogram!(TIME_TO_FIRST_TOKEN).record(elapsed);
}

/// A further token was decoded, `elapsed` after the one before.
pub fn token_decoded(elapsed: Duration) {
    histogram!(INTER_TOKEN_LATENCY).record(elapsed);
}

/// The engine made one pass over `rows` tokens.
pub fn step_finished(phase: Phase, rows: usize, elapsed: Duration) {
    histogram!(STEP_DURATION, "phase" => phase.label()).record(elapsed);
    histogram!(STEP_ROWS, "phase" => phase.label()).record(rows as f64);
}

/// A rule fired. `action` and `mode` in snake_case.
pub fn verdict_made(action: &'static str, mode: &'static str) {
    counter!(VERDICTS, "action" => action, "mode" => mode).increment(1);
}

/// Released text was withdrawn.
pub fn retracted() {
    counter!(RETRACTS).increment(1);
}

/// A request was of a form that a probe was not trained on.
pub fn out_of_domain_served() {
    counter!(OUT_OF_DOMAIN).increment(1);
}

/// A probe failed under an enforcing rule.
pub fn monitor_failed(probe: &str) {
    counter!(MONITOR_FAILED, "probe" => probe.to_owned()).increment(1);
}

/// A probe failed under a rule that does not enforce: the request went on without it.
pub fn monitor_skipped(probe: &str, reason: &'static str) {
    counter!(MONITOR_SKIPPED, "probe" => probe.to_owned(), "reason" => reason).increment(1);
}

/// A prompt was looked up: `unscored` tokens had blocks that lack a probe's scores, and count as missed too.
pub fn prefix_cache_looked_up(hit: u32, missed: u32, unscored: u32) {
    counter!(CACHE_HITS).increment(hit.into());
    counter!(CACHE_MISSES).increment(missed.into());
    counter!(CACHE_UNSCORED).increment(unscored.into());
}

pub fn kv_changed(used: usize, total: usize) {
    gauge!(KV_USED).set(used as f64);
    gauge!(KV_TOTAL).set(total as f64);
    let usage = if total == 0 {
        0.0
    } else {
        used as f64 / total as f64
    };
    gauge!(KV_USAGE).set(usage);
}

/// A policy judges from now on, over a library of this hash. The one before reads 0.
pub fn policy_loaded(name: &str, sha256: &str, empty: bool) {
    static CURRENT: Mutex<Option<[String; 2]>> = Mutex::new(None);
    let info =
        |[name, sha256]: [String; 2]| gauge!(POLICY_REVISION, "policy" => name, "sha256" => sha256);
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let now = [name, sha256].map(str::to_owned);
    if let Some(before) = current.replace(now.clone()) {
        info(before).set(0.0);
    }
    info(now).set(1.0);
    gauge!(POLICY_EMPTY).set(if empty { 1.0 } else { 0.0 });
}

fn recorder() -> std::result::Result<PrometheusBuilder, Box<dyn std::error::Error>> {
    let bucketed = [
        (REQUEST_DURATION, REQUEST_BUCKETS),
        (TIME_TO_FIRST_TOKEN, REQUEST_BUCKETS),
        (INTER_TOKEN_LATENCY, TOKEN_BUCKETS),
        (STEP_DURATION, TOKEN_BUCKETS),
        (STEP_ROWS, ROW_BUCKETS),
    ];
    let mut builder = PrometheusBuilder::new();
    for (name, buckets) in bucketed {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)?;
    }
    Ok(builder)
}

fn describe() {
    describe_counter!(REQUESTS, "Calls that ended, by method and status.");
    describe_histogram!(REQUEST_DURATION, "From a call's arrival to its end.");
    describe_gauge!(RUNNING, "Requests in prefill or decoding.");
    describe_gauge!(WAITING, "Requests in the queue.");
    describe_counter!(QUEUE_REJECTS, "Requests refused before the queue.");
    describe_counter!(PROMPT_TOKENS, "Prompt tokens taken in.");
    describe_counter!(GENERATED_TOKENS, "Tokens decoded, withheld ones included.");
    describe_counter!(CACHED_TOKENS, "Prompt tokens from the prefix cache.");
    describe_counter!(WITHHELD_TOKENS, "Decoded, and not part of an answer.");
    describe_histogram!(TIME_TO_FIRST_TOKEN, "From arrival to the first token out.");
    describe_histogram!(INTER_TOKEN_LATENCY, "Between two tokens of one answer.");
    describe_histogram!(STEP_DURATION, "One pass of the engine, by phase.");
    describe_histogram!(STEP_ROWS, "Tokens in one pass, by phase.");
    describe_counter!(VERDICTS, "Rules that fired, by action and mode.");
    describe_counter!(RETRACTS, "Withdrawals of released text.");
    describe_counter!(OUT_OF_DOMAIN, "Requests that no probe was trained on.");
    describe_counter!(
        MONITOR_FAILED,
        "Probes that failed under an enforcing rule."
    );
    describe_counter!(
        MONITOR_SKIPPED,
        "Probes that failed and let the request go on."
    );
    describe_counter!(CACHE_HITS, "Prompt tokens found in the prefix cache.");
    describe_counter!(CACHE_MISSES, "Prompt tokens not found in the prefix cache.");
    describe_counter!(
        CACHE_UNSCORED,
        "Missed because a probe's scores were not there."
    );
    describe_gauge!(KV_USED, "KV blocks in use, cached prefixes included.");
    describe_gauge!(KV_TOTAL, "KV blocks there are.");
    describe_gauge!(KV_USAGE, "Share of KV blocks in use.");
    describe_gauge!(
        POLICY_REVISION,
        "1 for the policy that judges, by name and the hash of its library."
    );
    describe_gauge!(
        POLICY_EMPTY,
        "1 when the policy has no rule: nothing is monitored."
    );
    describe_gauge!(BUILD, "1, by version.");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_in_the_text_that_prometheus_reads() {
        let handle = install().expect("installs");
        request_finished(
            "/inwit.v1.GenerationService/Score",
            "OK",
            Duration::from_millis(20),
        );
        step_finished(Phase::Decode, 16, Duration::from_millis(3));
        prefix_cache_looked_up(64, 7, 0);
        monitor_skipped("prompt_harm", "nan");
        let text = handle.render();
        for line in [
            "inwit_requests_total{rpc=\"/inwit.v1.GenerationService/Score\",code=\"OK\"} 1",
            "inwit_request_duration_seconds_bucket{rpc=\"/inwit.v1.GenerationService/Score\",le=\"0.025\"} 1",
            "inwit_step_rows_bucket{phase=\"decode\",le=\"16\"} 1",
            "inwit_prefix_cache_hit_tokens_total 64",
            "inwit_monitor_skipped_total{probe=\"prompt_harm\",reason=\"nan\"} 1",
            "# HELP inwit_requests_total Calls that ended, by method and status.",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn installing_twice_gives_the_same_recorder() {
        let (first, second) = (install().expect("installs"), install().expect("installs"));
        retracted();
        assert!(first.render().contains("inwit_retracts_total"));
        assert!(second.render().contains("inwit_retracts_total"));
    }

    #[test]
    fn only_the_newest_policy_reads_one() {
        let handle = install().expect("installs");
        policy_loaded("empty", "aaaa", true);
        policy_loaded("default", "bbbb", false);
        let text = handle.render();
        assert!(text.contains("inwit_policy_revision_info{policy=\"empty\",sha256=\"aaaa\"} 0"));
        assert!(text.contains("inwit_policy_revision_info{policy=\"default\",sha256=\"bbbb\"} 1"));
        assert!(text.contains("inwit_monitor_policy_empty 0"));
    }
}
