//! Open-loop load: calls begin at a constant rate whether or not earlier ones have ended, and every
//! latency counts from the moment at which the call was meant to begin.
//!
//! A caller that waits for an answer before it asks again hides the very delays that it should
//! measure (coordinated omission); here a late start is part of the latency.
//! Knows schedules and times; what a call is, the caller of `run` knows.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::seeded::Seeded;
use super::workload;
use crate::error::{Error, Result};

/// What load to make.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Calls per second; above 0.
    pub rate: f64,
    pub duration: Duration,
    pub seed: u64,
    /// Lengths of prompts, in words, each as likely.
    pub prompt_words: Vec<u16>,
    /// Longest answers, in tokens, each as likely.
    pub answer_tokens: Vec<u16>,
    /// Share of calls that hang up in the middle of the answer.
    pub cancel: f64,
    /// Share of calls that score a prompt instead of asking for an answer.
    pub score: f64,
    /// Share of calls whose answer is asked for with an intervention.
    pub steer: f64,
}

/// One call, and when it is meant to begin.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// From the start of the run.
    pub at: Duration,
    pub prompt: String,
    pub work: PlannedWork,
}

#[derive(Clone, Debug, PartialEq)]
pub enum PlannedWork {
    Answer {
        max_tokens: u32,
        /// Hangs up once this many tokens have come.
        hang_up_after: Option<u32>,
        /// Whether it brings an intervention.
        steered: bool,
    },
    Score,
}

impl Planned {
    /// Whether somebody wants the whole answer.
    fn asks(&self) -> bool {
        matches!(
            self.work,
            PlannedWork::Answer {
                hang_up_after: None,
                ..
            }
        )
    }
}

/// Calls of one run, and words of all their prompts: each is planned before the first begins.
pub const MOST_CALLS: f64 = 1e6;
pub const MOST_WORDS: f64 = 3e8;

impl LoadOptions {
    /// Every call of the run, in the order of their starts; equal seeds give equal plans.
    pub fn plan(&self) -> Vec<Planned> {
        let mut seeded = Seeded::new(self.seed);
        let calls = (self.rate * self.duration.as_secs_f64()).ceil().max(1.0) as usize;
        let call = |index| {
            let words = self.prompt_words[seeded.below(self.prompt_words.len())];
            let max_tokens = self.answer_tokens[seeded.below(self.answer_tokens.len())];
            let prompt = workload::question(&mut seeded, usize::from(words));
            let (kind, hang_up) = (share(&mut seeded), share(&mut seeded));
            let after = 1 + seeded.below(usize::from(max_tokens.max(1))) as u32;
            let work = match kind < self.score {
                true => PlannedWork::Score,
                false => PlannedWork::Answer {
                    max_tokens: max_tokens.into(),
                    hang_up_after: (hang_up < self.cancel).then_some(after),
                    steered: kind < self.score + self.steer,
                },
            };
            Planned {
                at: Duration::from_secs_f64(index as f64 / self.rate),
                prompt,
                work,
            }
        };
        (0..calls).map(call).collect()
    }
}

/// Evenly from `0..1`.
fn share(seeded: &mut Seeded) -> f64 {
    (f64::from(seeded.signed()) + 1.0) / 2.0
}

/// How a call went, in times from the start of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// When it was meant to begin, and when it did.
    pub intended: Duration,
    pub started: Duration,
    /// When each delivery of tokens came, and how many they were.
    pub deliveries: Vec<(Duration, u32)>,
    pub at: Duration,
    pub end: End,
    /// Neither a score nor to be hung up on: somebody wanted the whole answer.
    pub asked: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Answered,
    Scored,
    /// This side hung up, as planned.
    HungUp,
    /// The name of the status code, e.g. `RESOURCE_EXHAUSTED`.
    Failed(String),
}

/// Measures time from the start of a run.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    pub fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// What makes the calls.
pub trait Caller: Send + Sync + 'static {
    /// Makes one call and tells how it went: its deliveries and its end.
    fn call(
        &self,
        planned: &Planned,
        clock: Clock,
    ) -> impl Future<Output = (Vec<(Duration, u32)>, End)> + Send;
}

/// Makes every call of `plan` at its time, however the others go, and waits for all ends.
///
/// # Errors
/// `Internal` when a call panicked.
pub async fn run(
    plan: Vec<Planned>,
    caller: Arc<impl Caller>,
    mut tick: impl FnMut(usize, usize),
) -> Result<Vec<Ended>> {
    let total = plan.len();
    let clock = Clock(Instant::now());
    let mut calls = JoinSet::new();
    let mut ended = Vec::with_capacity(total);
    let mut take = |joined: std::result::Result<Ended, tokio::task::JoinError>| {
        ended.push(joined.map_err(|_| Error::internal("a call panicked"))?);
        tick(ended.len(), total);
        Ok::<_, Error>(())
    };
    for planned in plan {
        tokio::time::sleep_until(clock.0 + planned.at).await;
        let caller = Arc::clone(&caller);
        calls.spawn(async move {
            let started = clock.now();
            let (deliveries, end) = caller.call(&planned, clock).await;
            Ended {
                intended: planned.at,
                started,
                deliveries,
                at: clock.now(),
                end,
                asked: planned.asks(),
            }
        });
        while let Some(joined) = calls.try_join_next() {
            take(joined)?;
        }
    }
    while let Some(joined) = calls.join_next().await {
        take(joined)?;
    }
    ended.sort_by_key(|ended| ended.intended);
    Ok(ended)
}

impl Ended {
    /// From the intended start.
    pub fn to_first_token(&self) -> Option<Duration> {
        let (first, _) = self.deliveries.first()?;
        Some(first.saturating_sub(self.intended))
    }

    /// Between two deliveries.
    pub fn between(&self) -> impl Iterator<Item = Duration> {
        self.deliveries
            .windows(2)
            .map(|pair| pair[1].0.saturating_sub(pair[0].0))
    }

    /// From the intended start to the end.
    pub fn total(&self) -> Duration {
        self.at.saturating_sub(self.intended)
    }

    pub fn tokens(&self) -> u32 {
        self.deliveries.iter().map(|(_, tokens)| tokens).sum()
    }

    /// The mean time per token after the first delivery; zero with one delivery.
    fn per_token(&self) -> Duration {
        let (Some((first, _)), Some((last, _))) = (self.deliveries.first(), self.deliveries.last())
        else {
            return Duration::ZERO;
        };
        let later: u32 = self
            .deliveries
            .iter()
            .skip(1)
            .map(|(_, tokens)| tokens)
            .sum();
        last.saturating_sub(*first) / later.max(1)
    }
}

/// What a good answer takes at most.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Slo {
    pub first_token_ms: u64,
    /// The mean of an answer's tokens after the first.
    pub per_token_ms: u64,
}

impl Slo {
    fn holds(&self, ended: &Ended) -> bool {
        let first = ended.to_first_token();
        ended.end == End::Answered
            && first.is_some_and(|time| time <= Duration::from_millis(self.first_token_ms))
            && ended.per_token() <= Duration::from_millis(self.per_token_ms)
    }
}

/// Everything that one run of `inwit load` found, as its JSON file has it.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    pub machine: String,
    pub commit: String,
    pub url: String,
    pub settings: LoadSettings,
    pub calls: Calls,
    /// How many calls ended with which status code; `OK` are those that were answered or scored.
    pub codes: BTreeMap<String, u64>,
    pub rows: Vec<LatencyRow>,
    pub goodput: Goodput,
    /// Tokens that came, over the time from the first start to the last end.
    pub tokens_per_second: f64,
    pub elapsed_seconds: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct LoadSettings {
    pub rate: f64,
    pub duration_seconds: f64,
    pub seed: u64,
    pub connections: usize,
    pub prompt_words: Vec<u16>,
    pub answer_tokens: Vec<u16>,
    pub cancel: f64,
    pub score: f64,
    pub steer: f64,
    pub vector: Option<String>,
    pub deadline_seconds: f64,
    pub raw: bool,
    pub mode: Option<String>,
    pub policy: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    pub made: u64,
    pub answered: u64,
    pub scored: u64,
    /// By this side, as planned.
    pub hung_up: u64,
    /// RESOURCE_EXHAUSTED or UNAVAILABLE.
    pub rejected: u64,
    pub failed: u64,
}

/// Percentiles of one latency. `to_first_token`, `answer` and `score` count from the intended start;
/// `between_tokens` is from delivery to delivery; `late_start` is how late this program was itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LatencyRow {
    pub name: &'static str,
    pub count: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
}

/// Answers within the SLO, out of all that were asked for and not hung up on.
#[derive(Clone, Debug, Serialize)]
pub struct Goodput {
    pub slo: Slo,
    pub good: u64,
    pub asked: u64,
    /// Unset where no answer was asked for.
    pub share: Option<f64>,
    pub good_per_second: f64,
}

/// The latencies of a run.
pub struct Latencies {
    pub to_first_token: Histogram<u64>,
    pub between_tokens: Histogram<u64>,
    pub answer: Histogram<u64>,
    pub score: Histogram<u64>,
    pub late_start: Histogram<u64>,
}

impl Latencies {
    pub fn of(ended: &[Ended]) -> Self {
        let mut latencies = Self {
            to_first_token: histogram(),
            between_tokens: histogram(),
            answer: histogram(),
            score: histogram(),
            late_start: histogram(),
        };
        for call in ended {
            record(
                &mut latencies.late_start,
                call.started.saturating_sub(call.intended),
            );
            if let Some(time) = call.to_first_token() {
                record(&mut latencies.to_first_token, time);
            }
            for time in call.between() {
                record(&mut latencies.between_tokens, time);
            }
            match call.end {
                End::Answered => record(&mut latencies.answer, call.total()),
                End::Scored => record(&mut latencies.score, call.total()),
                End::HungUp | End::Failed(_) => {}
            }
        }
        latencies
    }

    pub fn named(&self) -> [(&'static str, &Histogram<u64>); 5] {
        [
            ("to_first_token", &self.to_first_token),
            ("between_tokens", &self.between_tokens),
            ("answer", &self.answer),
            ("score", &self.score),
            ("late_start", &self.late_start),
        ]
    }

    pub fn rows(&self) -> Vec<LatencyRow> {
        let rows = self.named().into_iter();
        rows.map(|(name, times)| LatencyRow {
            name,
            count: times.len(),
            mean_ms: times.mean() / 1e3,
            p50_ms: at(times, 0.5),
            p90_ms: at(times, 0.9),
            p99_ms: at(times, 0.99),
            p999_ms: at(times, 0.999),
            max_ms: times.max() as f64 / 1e3,
        })
        .collect()
    }
}

/// Milliseconds at a quantile from 0 to 1.
pub fn at(times: &Histogram<u64>, quantile: f64) -> f64 {
    times.value_at_quantile(quantile) as f64 / 1e3
}

/// Of microseconds, three digits, up to the longest that a call may take.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_US, 3).expect("constant bounds that are in order")
}

const LONGEST_US: u64 = 24 * 3600 * 1_000_000;

fn record(times: &mut Histogram<u64>, time: Duration) {
    times.saturating_record(u64::try_from(time.as_micros()).unwrap_or(LONGEST_US));
}

impl Calls {
    pub fn of(ended: &[Ended]) -> Self {
        let mut calls = Self::default();
        for call in ended {
            calls.made += 1;
            match &call.end {
                End::Answered => calls.answered += 1,
                End::Scored => calls.scored += 1,
                End::HungUp => calls.hung_up += 1,
                End::Failed(code) if REJECTED.contains(&code.as_str()) => calls.rejected += 1,
                End::Failed(_) => calls.failed += 1,
            }
        }
        calls
    }
}

/// What a server answers when it takes no more.
pub const REJECTED: [&str; 2] = ["RESOURCE_EXHAUSTED", "UNAVAILABLE"];

pub fn codes(ended: &[Ended]) -> BTreeMap<String, u64> {
    let mut codes = BTreeMap::new();
    for call in ended {
        let code = match &call.end {
            End::Answered | End::Scored => "OK",
            End::HungUp => "CANCELLED",
            End::Failed(code) => code,
        };
        *codes.entry(code.to_owned()).or_default() += 1;
    }
    codes
}

impl Goodput {
    pub fn of(ended: &[Ended], slo: Slo) -> Self {
        let asked = || ended.iter().filter(|call| call.asked);
        let good = asked().filter(|call| slo.holds(call)).count() as u64;
        let asked = asked().count() as u64;
        Self {
            slo,
            good,
            asked,
            share: (asked > 0).then(|| good as f64 / asked as f64),
            good_per_second: good as f64 / elapsed(ended).as_secs_f64().max(1e-3),
        }
    }
}

/// From the start of the run to the last end.
pub fn elapsed(ended: &[Ended]) -> Duration {
    ended.iter().map(|call| call.at).max().unwrap_or_default()
}

pub fn tokens_per_second(ended: &[Ended]) -> f64 {
    let tokens: u64 = ended.iter().map(|call| u64::from(call.tokens())).sum();
    tokens as f64 / elapsed(ended).as_secs_f64().max(1e-3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> LoadOptions {
        LoadOptions {
            rate: 100.0,
            duration: Duration::from_millis(200),
            seed: 7,
            prompt_words: vec![3, 30],
            answer_tokens: vec![4, 8],
            cancel: 0.25,
            score: 0.25,
            steer: 0.25,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn answered(intended: u64, deliveries: &[u64], at: u64) -> Ended {
        Ended {
            intended: ms(intended),
            started: ms(intended),
            deliveries: deliveries.iter().map(|time| (ms(*time), 1)).collect(),
            at: ms(at),
            end: End::Answered,
            asked: true,
        }
    }

    #[test]
    fn calls_are_planned_at_a_constant_rate_and_repeat_for_a_seed() {
        let plan = options().plan();
        assert_eq!(plan.len(), 20);
        for (index, call) in plan.iter().enumerate() {
            assert_eq!(call.at, ms(10) * index as u32);
        }
        assert_eq!(plan, options().plan());
        assert_ne!(
            plan,
            LoadOptions {
                seed: 8,
                ..options()
            }
            .plan()
        );
    }

    #[test]
    fn shares_of_nothing_and_of_all_are_kept() {
        let none = LoadOptions {
            cancel: 0.0,
            score: 0.0,
            steer: 0.0,
            ..options()
        };
        let plain = |call: &Planned| {
            matches!(
                call.work,
                PlannedWork::Answer {
                    hang_up_after: None,
                    steered: false,
                    ..
                }
            )
        };
        assert!(none.plan().iter().all(plain));
        let all = LoadOptions {
            cancel: 1.0,
            score: 0.0,
            ..options()
        };
        for call in all.plan() {
            let PlannedWork::Answer {
                max_tokens,
                hang_up_after: Some(after),
                ..
            } = call.work
            else {
                panic!("not hung up on");
            };
            assert!((1..=max_tokens).contains(&after));
        }
        let scored = LoadOptions {
            score: 1.0,
            ..options()
        };
        assert!(
            scored
                .plan()
                .iter()
                .all(|call| call.work == PlannedWork::Score)
        );
        let halves = LoadOptions {
            score: 0.5,
            steer: 0.5,
            ..options()
        };
        let plain =
            |call: &Planned| matches!(call.work, PlannedWork::Answer { steered: false, .. });
        let plan = halves.plan();
        assert!(!plan.iter().any(plain));
        assert!(plan.iter().any(|call| call.work != PlannedWork::Score));
    }

    /// Answers nobody before everybody has asked.
    struct Stalled(tokio::sync::Barrier);

    impl Caller for Stalled {
        async fn call(&self, _: &Planned, clock: Clock) -> (Vec<(Duration, u32)>, End) {
            self.0.wait().await;
            (vec![(clock.now(), 1)], End::Answered)
        }
    }

    #[tokio::test]
    async fn calls_begin_although_none_before_them_has_ended() {
        let plan = options().plan();
        let stalled = Arc::new(Stalled(tokio::sync::Barrier::new(plan.len())));
        let ended = run(plan.clone(), stalled, |_, _| {}).await.expect("runs");
        let intended: Vec<_> = ended.iter().map(|call| call.intended).collect();
        let planned: Vec<_> = plan.iter().map(|call| call.at).collect();
        assert_eq!(intended, planned);
        // Whoever asked first waited longest, and that is what counts.
        let last = ended.last().expect("a call").started;
        assert!(
            ended
                .iter()
                .all(|call| call.to_first_token() >= Some(last - call.intended))
        );
    }

    #[test]
    fn a_late_start_is_part_of_the_latency() {
        let late = Ended {
            started: ms(1_100),
            ..answered(100, &[1_150, 1_160], 1_160)
        };
        assert_eq!(late.to_first_token(), Some(ms(1_050)));
        assert_eq!(late.total(), ms(1_060));
        assert_eq!(late.between().collect::<Vec<_>>(), [ms(10)]);
        let rows = Latencies::of(&[late]).rows();
        assert!((rows[0].p50_ms - 1_050.0).abs() < 2.0, "{:?}", rows[0]);
        assert!((rows[4].max_ms - 1_000.0).abs() < 2.0, "{:?}", rows[4]);
    }

    #[test]
    fn goodput_counts_answers_within_the_slo_out_of_all_that_were_wanted() {
        let slo = Slo {
            first_token_ms: 100,
            per_token_ms: 20,
        };
        let end = |end: End, asked: bool| Ended {
            end,
            asked,
            ..answered(0, &[50, 60], 60)
        };
        let calls = [
            answered(0, &[50, 60], 60),
            answered(0, &[150, 160], 160),
            answered(0, &[50, 90], 90),
            end(End::HungUp, false),
            // Over before the hang-up that was planned.
            end(End::Answered, false),
            end(End::Scored, false),
            end(End::Failed("UNAVAILABLE".into()), true),
            end(End::Failed("INTERNAL".into()), false),
        ];
        let goodput = Goodput::of(&calls, slo);
        assert_eq!((goodput.good, goodput.asked), (1, 4));
        let counted = Calls::of(&calls);
        assert_eq!(
            (counted.answered, counted.rejected, counted.failed),
            (4, 1, 1)
        );
        let codes = codes(&calls);
        assert_eq!(
            (codes["OK"], codes["CANCELLED"], codes["UNAVAILABLE"]),
            (5, 1, 1)
        );
    }

    #[test]
    fn percentiles_are_written_in_milliseconds() {
        let calls: Vec<Ended> = (1..=1000).map(|time| answered(0, &[time], time)).collect();
        let rows = Latencies::of(&calls).rows();
        let value = serde_json::to_value(&rows[0]).expect("serialises");
        assert_eq!(
            (value["name"].as_str(), value["count"].as_u64()),
            (Some("to_first_token"), Some(1000))
        );
        for (key, expected) in [
            ("p50_ms", 500.0),
            ("p90_ms", 900.0),
            ("p99_ms", 990.0),
            ("max_ms", 1000.0),
        ] {
            let measured = value[key].as_f64().expect("a number");
            assert!((measured - expected).abs() < 1.0, "{key}: {measured}");
        }
        assert_eq!(rows[1].count, 0);
    }
}
