//! Measures a running engine through its handle, scheduling included: prefill, time to first token,
//! decode, a repeated prefix, a long prompt among others, memory.
//! Knows requests and the times of their events; what monitoring adds to one step is in `paired.rs`.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde::Serialize;

use super::machine::peak_rss;
use super::monitoring::{Monitor, Monitoring, POLICY};
use super::paired::AddedRow;
use super::statistics::{Alternation, added, median, percentile};
use super::workload;
use crate::engine::event::Event;
use crate::engine::handle::{Engine, Events};
use crate::engine::prepare::{CaptureDraft, Defaults, Draft, MonitorDraft, PromptDraft, prepare};
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};
use crate::policy::Mode;

/// Everything that one run of `inwit bench` found, as its JSON file has it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: String,
    pub commit: String,
    pub settings: Settings,
    pub rows: Vec<Row>,
    /// What monitoring adds to one decode step.
    pub added: Vec<AddedRow>,
    pub prefix: Option<Prefix>,
    pub long_prompt: Option<LongPrompt>,
    pub grpc: Option<Grpc>,
    pub memory: Option<Memory>,
    /// Of the whole run, in bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// What the numbers depend on.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    #[serde(flatten)]
    pub loaded: Loaded,
    pub threads: usize,
    pub step_token_budget: usize,
    pub prefill_share: u8,
    pub seed: u64,
    #[serde(flatten)]
    pub sizes: Sizes,
}

/// The model as it was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Loaded {
    pub model: String,
    pub weight_format: String,
    pub kv_type: String,
    pub weight_bytes: usize,
}

/// How much is asked of the engine, in tokens and requests.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Sizes {
    /// Prompt of a prefill row.
    pub prompt_tokens: usize,
    /// Prompt of each stream of a decode row.
    pub context_tokens: usize,
    pub answer_tokens: usize,
    /// How often each row is measured.
    pub rounds: usize,
    pub prefix_tokens: usize,
    pub long_prompt_tokens: usize,
    /// Streams that the long prompt arrives among.
    pub long_prompt_streams: usize,
    pub memory_streams: usize,
    /// Prompt and answer of each stream of the memory row.
    pub memory_tokens: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            prompt_tokens: 512,
            context_tokens: 64,
            answer_tokens: 128,
            rounds: 3,
            prefix_tokens: 1000,
            long_prompt_tokens: 4000,
            long_prompt_streams: 8,
            memory_streams: 16,
            memory_tokens: 1000,
        }
    }
}

impl Sizes {
    /// Shows that all works, and measures nothing worth keeping.
    pub fn quick() -> Self {
        Self {
            prompt_tokens: 48,
            context_tokens: 16,
            answer_tokens: 8,
            rounds: 1,
            prefix_tokens: 64,
            long_prompt_tokens: 128,
            long_prompt_streams: 2,
            memory_streams: 2,
            memory_tokens: 48,
        }
    }
}

/// One measured line.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `prefill`: one long prompt at a time; `ttft`: until the first token of `streams` prompts
    /// that come at once; `decode`: while all of them are writing.
    pub name: &'static str,
    pub streams: usize,
    pub monitor: Monitor,
    /// Prompt tokens for `prefill` and `ttft`, generated ones for `decode`. This and the times are
    /// null where nothing was measured: answers that ended before all of them were writing.
    pub tokens_per_second: Option<f64>,
    /// Of the time to the first token, or between two deliveries to one stream for `decode`.
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

/// The same prefix twice.
#[derive(Clone, Debug, Serialize)]
pub struct Prefix {
    pub tokens: usize,
    /// Median time to the first token, at first and again.
    pub cold_ms: f64,
    pub repeated_ms: f64,
    pub percent_of_cold: f64,
}

/// A long prompt that arrives among streams that are writing.
#[derive(Clone, Debug, Serialize)]
pub struct LongPrompt {
    pub tokens: usize,
    pub streams: usize,
    /// How many of them still wrote when its own first token came.
    pub streams_to_the_end: usize,
    /// Median between two tokens of a stream before it arrives.
    pub before_p50_ms: f64,
    /// Median between the tokens that were written while it is in prefill, when it does not come.
    pub without_p50_ms: Option<f64>,
    /// Between two tokens of a stream while it is in prefill.
    pub during_p99_ms: Option<f64>,
    pub during_over_before: Option<f64>,
    pub during_over_without: Option<f64>,
    /// Its time to first token, with nobody else there and among the streams.
    pub alone_ms: f64,
    pub among_ms: f64,
    pub among_over_alone: f64,
}

/// The same answers read through the engine's handle and as gRPC streams of the same process, over a
/// socket of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Grpc {
    pub streams: usize,
    /// Of all answers of one run.
    pub tokens: usize,
    pub in_process_tokens_per_second: f64,
    pub grpc_tokens_per_second: f64,
    pub percent_of_in_process: f64,
    /// Bootstrap 95 % over alternations of in process, gRPC, gRPC, in process.
    pub interval_percent: [f64; 2],
}

impl Grpc {
    /// From the whole runs' times; none without an alternation.
    pub fn of(
        streams: usize,
        tokens: usize,
        alternations: &[Alternation],
        seed: u64,
    ) -> Option<Self> {
        let added = added(alternations, seed)?;
        let share = |added: f64| 100.0 / (1.0 + added / 100.0);
        let in_process = tokens as f64 / added.base_us * 1e6;
        let [low, high] = added.interval_percent;
        Some(Self {
            streams,
            tokens,
            in_process_tokens_per_second: in_process,
            grpc_tokens_per_second: in_process * share(added.added_percent) / 100.0,
            percent_of_in_process: share(added.added_percent),
            interval_percent: [share(high), share(low)],
        })
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    pub streams: usize,
    /// Of each stream.
    pub tokens: usize,
    /// Loading and mapped pages included; `None` where the system does not say.
    pub peak_rss_bytes: Option<u64>,
}

/// An engine under measurement.
pub struct Benchmark<'a> {
    pub engine: &'a Engine,
    pub monitoring: &'a Monitoring,
    pub sizes: Sizes,
}

impl Benchmark<'_> {
    /// Prompt tokens per second of one long prompt at a time.
    pub async fn prefill(&self, monitor: Monitor) -> Result<Row> {
        let tokens = self.sizes.prompt_tokens;
        let mut times = Vec::new();
        for round in 0..self.sizes.rounds {
            let timelines = self.run_all(1, monitor, tokens, 1, round).await?;
            times.extend(timelines.iter().filter_map(Timeline::first));
        }
        let total: f64 = times.iter().map(Duration::as_secs_f64).sum();
        Ok(row(
            "prefill",
            1,
            monitor,
            (times.len() * tokens) as f64 / total,
            times,
        ))
    }

    /// The rows `ttft` and `decode`: `streams` prompts at once, all answered to the same length.
    pub async fn decode(&self, streams: usize, monitor: Monitor) -> Result<[Row; 2]> {
        let Sizes {
            context_tokens,
            answer_tokens,
            ..
        } = self.sizes;
        let (mut first, mut until_first) = (Vec::new(), Duration::ZERO);
        let mut together = Together::default();
        for round in 0..self.sizes.rounds {
            let timelines = self
                .run_all(streams, monitor, context_tokens, answer_tokens, round)
                .await?;
            let times: Vec<Duration> = timelines.iter().filter_map(Timeline::first).collect();
            until_first += times.iter().max().copied().unwrap_or_default();
            first.extend(times);
            together.take(&timelines);
        }
        let read = (first.len() * context_tokens) as f64;
        let read = row(
            "ttft",
            streams,
            monitor,
            read / until_first.as_secs_f64(),
            first,
        );
        let written = together.tokens as f64 / together.time.as_secs_f64();
        Ok([
            read,
            row("decode", streams, monitor, written, together.gaps),
        ])
    }

    /// How much sooner a prefix is read that was read before; other tokens follow it.
    pub async fn prefix(&self) -> Result<Prefix> {
        let tokens = self.sizes.prefix_tokens;
        let (mut cold, mut repeated) = (Vec::new(), Vec::new());
        for round in 0..self.sizes.rounds {
            for (tail, times) in [(1, &mut cold), (2, &mut repeated)] {
                let mut prompt = self.tokens(round, tokens)?;
                prompt.extend(self.tokens(round + tail, TAIL)?);
                let draft = Draft {
                    skip_prefix_cache: false,
                    ..self.draft(prompt, 1, 0, 1, Monitor::Off)
                };
                let timeline = watch(self.submit(draft)?, Instant::now()).await?;
                times.extend(timeline.first().map(milliseconds));
            }
        }
        let (cold_ms, repeated_ms) = (median(&mut cold), median(&mut repeated));
        Ok(Prefix {
            tokens,
            cold_ms,
            repeated_ms,
            percent_of_cold: repeated_ms / cold_ms * 100.0,
        })
    }

    /// What a long prompt does to those who are writing, and they to it.
    pub async fn long_prompt(&self) -> Result<LongPrompt> {
        let Sizes {
            long_prompt_tokens: tokens,
            long_prompt_streams: streams,
            ..
        } = self.sizes;
        let alone = watch(self.submit(self.long_draft(0)?)?, Instant::now()).await?;
        let mut writers = self.writers(streams)?;
        writers
            .until(&vec![self.sizes.answer_tokens; streams])
            .await;
        let arrived = writers.origin.elapsed();
        let among = watch(self.submit(self.long_draft(1)?)?, Instant::now()).await?;
        let first = |timeline: &Timeline| {
            let missing = || Error::internal("the long prompt was answered with nothing");
            timeline.first().ok_or_else(missing)
        };
        let until = arrived + first(&among)?;
        let (streams_to_the_end, times) = writers.stop();
        let (mut before, mut during) = (Vec::new(), Vec::new());
        // Of each stream, the gaps while the prompt is in prefill.
        let mut meanwhile = vec![0..0; streams];
        for (times, meanwhile) in times.iter().zip(&mut meanwhile) {
            for (gap, pair) in times.windows(2).enumerate() {
                if pair[1] <= arrived {
                    before.push(milliseconds(pair[1] - pair[0]));
                    *meanwhile = gap + 1..gap + 1;
                } else if pair[0] < until {
                    during.push(milliseconds(pair[1] - pair[0]));
                    meanwhile.end = gap + 1;
                }
            }
        }
        // The same answers when nobody comes.
        let mut writers = self.writers(streams)?;
        let tokens_of = |gaps: &Range<usize>| gaps.end + 1;
        let wanted: Vec<usize> = meanwhile.iter().map(tokens_of).collect();
        writers.until(&wanted).await;
        let (_, times) = writers.stop();
        let mut without = Vec::new();
        for (times, meanwhile) in times.iter().zip(meanwhile) {
            let gaps = times.windows(2).map(|pair| milliseconds(pair[1] - pair[0]));
            without.extend(gaps.skip(meanwhile.start).take(meanwhile.len()));
        }
        during.sort_unstable_by(f64::total_cmp);
        let before_p50_ms = median(&mut before);
        let without_p50_ms = (!without.is_empty()).then(|| median(&mut without));
        let during_p99_ms = (!during.is_empty()).then(|| percentile(&during, 99.0));
        let (alone_ms, among_ms) = (milliseconds(first(&alone)?), milliseconds(first(&among)?));
        Ok(LongPrompt {
            tokens,
            streams,
            streams_to_the_end,
            before_p50_ms,
            without_p50_ms,
            during_p99_ms,
            during_over_before: during_p99_ms.map(|during| during / before_p50_ms),
            during_over_without: during_p99_ms
                .zip(without_p50_ms)
                .map(|(during, without)| during / without),
            alone_ms,
            among_ms,
            among_over_alone: among_ms / alone_ms,
        })
    }

    /// Streams that write long answers from now on.
    fn writers(&self, streams: usize) -> Result<Writers> {
        let context = self.engine.info().context_length;
        let most = MOST_BESIDE.min(context.saturating_sub(self.sizes.context_tokens));
        let mut writers = Writers {
            origin: Instant::now(),
            arrivals: Vec::new(),
            readers: tokio::task::JoinSet::new(),
        };
        for stream in 0..streams {
            let prompt = self.tokens(stream, self.sizes.context_tokens)?;
            let events = self.submit(self.draft(prompt, most, stream, streams, Monitor::Off))?;
            let (origin, arrivals) = (writers.origin, Arrivals::default());
            writers.arrivals.push(Arc::clone(&arrivals));
            let note = async move { note(events, origin, &arrivals).await };
            writers.readers.spawn(note);
        }
        Ok(writers)
    }

    /// Fills the keys and values of many streams; what the process held at most is then known.
    pub async fn memory(&self) -> Result<Memory> {
        let Sizes {
            memory_streams: streams,
            memory_tokens: tokens,
            ..
        } = self.sizes;
        let answer = (tokens / 10).max(1);
        self.run_all(streams, Monitor::Off, tokens - answer, answer, 0)
            .await?;
        Ok(Memory {
            streams,
            tokens,
            peak_rss_bytes: peak_rss(),
        })
    }

    /// `streams` prompts at once; times count from just before the first is submitted.
    async fn run_all(
        &self,
        streams: usize,
        monitor: Monitor,
        prompt: usize,
        answer: usize,
        round: usize,
    ) -> Result<Vec<Timeline>> {
        let drafts = (0..streams).map(|stream| {
            let tokens = self.tokens(round * streams + stream, prompt)?;
            Ok(self.draft(tokens, answer, stream, streams, monitor))
        });
        let drafts: Vec<Draft> = drafts.collect::<Result<_>>()?;
        let origin = Instant::now();
        let events = drafts.into_iter().map(|draft| self.submit(draft));
        let events: Vec<Events> = events.collect::<Result<_>>()?;
        try_join_all(events.into_iter().map(|events| watch(events, origin))).await
    }

    /// How long it takes to answer all of these prompts at once, in microseconds, and the tokens of
    /// all answers.
    pub async fn answer_all(&self, prompts: &[String]) -> Result<(f64, usize)> {
        let draft = |prompt: &String| Draft {
            skip_prefix_cache: false,
            ..self.drafted(
                PromptDraft::RawText(prompt.clone()),
                self.sizes.answer_tokens,
            )
        };
        let origin = Instant::now();
        let events = prompts.iter().map(|prompt| self.submit(draft(prompt)));
        let events: Vec<Events> = events.collect::<Result<_>>()?;
        let answers = try_join_all(events.into_iter().map(|events| watch(events, origin))).await?;
        let taken = milliseconds(origin.elapsed()) * 1e3;
        let tokens = answers.iter().flat_map(|answer| &answer.0);
        Ok((taken, tokens.map(|(_, tokens)| tokens).sum()))
    }

    fn tokens(&self, start: usize, count: usize) -> Result<Vec<u32>> {
        workload::tokens(self.engine.tokenizer(), start, count)
    }

    fn long_draft(&self, start: usize) -> Result<Draft> {
        let prompt = self.tokens(start + LONG_START, self.sizes.long_prompt_tokens)?;
        Ok(self.draft(prompt, 1, 0, 1, Monitor::Off))
    }

    fn draft(
        &self,
        prompt: Vec<u32>,
        answer: usize,
        row: usize,
        rows: usize,
        monitor: Monitor,
    ) -> Draft {
        let mut draft = self.drafted(PromptDraft::Tokens(prompt), answer);
        match monitor {
            Monitor::Off => {}
            Monitor::Probes => {
                draft.monitor = MonitorDraft {
                    mode: Some(Mode::Shadow),
                    policy: Some(POLICY.into()),
                    ..MonitorDraft::default()
                };
            }
            Monitor::Interventions => {
                let changes = self.monitoring.changes_of(row, rows);
                draft.interventions = changes.into_iter().map(|change| change.draft()).collect();
            }
            Monitor::Capture => {
                draft.capture = Some(CaptureDraft {
                    sites: vec![self.monitoring.captured.to_string()],
                    positions: PositionSelection::All,
                });
            }
        }
        draft
    }

    /// Nothing is monitored.
    fn drafted(&self, prompt: PromptDraft, answer: usize) -> Draft {
        let mut draft = Draft::of(prompt);
        draft.skip_prefix_cache = true;
        draft.sampling.max_tokens = u32::try_from(answer).ok();
        draft.monitor.mode = Some(Mode::Off);
        draft
    }

    fn submit(&self, draft: Draft) -> Result<Events> {
        let defaults = Defaults {
            mode: Mode::Off,
            policy: None,
            max_tokens: 1,
            overrides: true,
        };
        let snapshot = &self.monitoring.snapshot;
        self.engine
            .submit(prepare(draft, self.engine, snapshot, &defaults)?)
    }
}

/// Tokens that differ after a shared prefix.
const TAIL: usize = 8;
/// Where long prompts begin, so that they share nothing with the streams.
const LONG_START: usize = 11;
/// Longest answer of the streams beside a long prompt; they are cut off once it has been read.
const MOST_BESIDE: usize = 1024;

/// When the tokens of one request came, from a common origin.
#[derive(Clone, Debug, Default)]
struct Timeline(Vec<(Duration, usize)>);

impl Timeline {
    fn first(&self) -> Option<Duration> {
        self.0.first().map(|(time, _)| *time)
    }

    fn last(&self) -> Option<Duration> {
        self.0.last().map(|(time, _)| *time)
    }
}

async fn watch(mut events: Events, origin: Instant) -> Result<Timeline> {
    let mut timeline = Timeline::default();
    while let Some(event) = events.next().await {
        match event {
            Event::Delta(delta) if !delta.token_ids.is_empty() => {
                timeline.0.push((origin.elapsed(), delta.token_ids.len()));
            }
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    Ok(timeline)
}

/// Streams whose tokens are noted as they come.
struct Writers {
    origin: Instant,
    arrivals: Vec<Arrivals>,
    readers: tokio::task::JoinSet<()>,
}

impl Writers {
    /// Until each has so many tokens, or one has ended: that says enough.
    async fn until(&mut self, tokens: &[usize]) {
        let waits = |arrivals: &[Arrivals]| {
            let mut streams = arrivals.iter().zip(tokens);
            streams.any(|(arrivals, tokens)| times(arrivals).len() < *tokens)
        };
        while waits(&self.arrivals) && self.readers.try_join_next().is_none() {
            if self.readers.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Cuts them off: how many were still writing, and when the tokens of each came.
    fn stop(mut self) -> (usize, Vec<Vec<Duration>>) {
        while self.readers.try_join_next().is_some() {}
        let writing = self.readers.len();
        self.readers.abort_all();
        (writing, self.arrivals.iter().map(times).collect())
    }
}

/// When the tokens of a stream came, for another task to read meanwhile.
type Arrivals = Arc<Mutex<Vec<Duration>>>;

async fn note(mut events: Events, origin: Instant, arrivals: &Arrivals) {
    while let Some(event) = events.next().await {
        if matches!(&event, Event::Delta(delta) if !delta.token_ids.is_empty()) {
            let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            arrivals.push(origin.elapsed());
        }
    }
}

fn times(arrivals: &Arrivals) -> Vec<Duration> {
    let arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
    arrivals.clone()
}

/// What came while every stream was writing: after the last one's first token, and until the
/// first one's last.
#[derive(Default)]
struct Together {
    time: Duration,
    tokens: usize,
    gaps: Vec<Duration>,
}

impl Together {
    fn take(&mut self, timelines: &[Timeline]) {
        if timelines.iter().any(|timeline| timeline.0.is_empty()) {
            return;
        }
        let from = timelines.iter().filter_map(Timeline::first).max();
        let to = timelines.iter().filter_map(Timeline::last).min();
        let (Some(from), Some(to)) = (from, to) else {
            return;
        };
        if to <= from {
            return;
        }
        self.time += to - from;
        for Timeline(arrivals) in timelines {
            for pair in arrivals.windows(2) {
                let ((before, _), (time, tokens)) = (pair[0], pair[1]);
                if time > from && time <= to {
                    self.tokens += tokens;
                    if before >= from {
                        self.gaps.push(time - before);
                    }
                }
            }
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn row(
    name: &'static str,
    streams: usize,
    monitor: Monitor,
    tokens_per_second: f64,
    times: Vec<Duration>,
) -> Row {
    let mut times: Vec<f64> = times.into_iter().map(milliseconds).collect();
    times.sort_unstable_by(f64::total_cmp);
    let measured = tokens_per_second.is_finite() && !times.is_empty();
    let at = |percent: f64| measured.then(|| percentile(&times, percent));
    Row {
        name,
        streams,
        monitor,
        tokens_per_second: measured.then_some(tokens_per_second),
        p50_ms: at(50.0),
        p99_ms: at(99.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(times: &[u64]) -> Timeline {
        Timeline(
            times
                .iter()
                .map(|ms| (Duration::from_millis(*ms), 1))
                .collect(),
        )
    }

    #[test]
    fn decode_counts_only_while_every_stream_is_writing() {
        let mut together = Together::default();
        together.take(&[timeline(&[10, 20, 30, 40, 50]), timeline(&[20, 30, 40])]);
        assert_eq!(together.time, Duration::from_millis(20));
        // 30 and 40 of both.
        assert_eq!((together.tokens, together.gaps.len()), (4, 4));
    }

    #[test]
    fn streams_that_were_never_together_count_nothing() {
        let mut together = Together::default();
        together.take(&[timeline(&[10, 20]), timeline(&[30, 40])]);
        together.take(&[timeline(&[10, 20]), timeline(&[])]);
        assert_eq!((together.tokens, together.time), (0, Duration::ZERO));
        let row = row("decode", 2, Monitor::Off, f64::NAN, together.gaps);
        assert_eq!((row.tokens_per_second, row.p99_ms), (None, None));
    }

    #[test]
    fn a_row_is_measured_whole_or_not_at_all() {
        let mut together = Together::default();
        // One token while both were writing, and no two.
        together.take(&[timeline(&[10, 30]), timeline(&[20, 50])]);
        assert_eq!((together.tokens, together.gaps.len()), (1, 0));
        let row = row("decode", 2, Monitor::Off, 100.0, together.gaps);
        assert_eq!((row.tokens_per_second, row.p50_ms), (None, None));
    }

    #[test]
    fn a_stream_s_share_of_the_throughput_is_that_of_the_times() {
        let steady = Alternation {
            base: [1e6; 2],
            variant: [1.25e6; 2],
        };
        let grpc = Grpc::of(16, 2000, &[steady; 3], 0).expect("alternated");
        assert!((grpc.in_process_tokens_per_second - 2000.0).abs() < 1e-6);
        assert!((grpc.grpc_tokens_per_second - 1600.0).abs() < 1e-6);
        assert!((grpc.percent_of_in_process - 80.0).abs() < 1e-9);
        assert!(
            grpc.interval_percent
                .iter()
                .all(|end| (end - 80.0).abs() < 1e-9)
        );
        assert!(Grpc::of(16, 2000, &[], 0).is_none());
    }

    #[test]
    fn a_row_is_written_as_the_file_has_it() {
        let times = [1, 2, 3].map(Duration::from_millis).to_vec();
        let row = row("decode", 4, Monitor::Probes, 100.0, times);
        let expected = serde_json::json!({
            "name": "decode", "streams": 4, "monitor": "probes",
            "tokens_per_second": 100.0, "p50_ms": 2.0, "p99_ms": 3.0,
        });
        assert_eq!(serde_json::to_value(&row).expect("serialises"), expected);
    }
}
