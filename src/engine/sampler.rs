//! Chooses a sequence's next token from its logits.
//! Knows numbers only: no tensors, texts, channels or clocks, and keeps no running generator.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt::Display,
    ops::{Bound, RangeBounds},
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::error::{Error, Result};
use crate::model::kernels;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_STOP_TOKEN_IDS: usize = 64;
const MAX_LOGPROBS: u32 = 20;

/// How to sample, as a caller wrote it; unset means the default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDraft {
    pub max_tokens: Option<u32>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    /// Unset counts as 0: who wants another seed for each request draws it before the check.
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub logprobs: Option<u32>,
    /// Not supported: an error when set, even to 1.
    pub n: Option<u32>,
    /// Not supported: an error unless empty.
    pub logit_bias: Vec<(u32, f32)>,
}

/// How to sample, checked; only [`SamplingDraft::check`] makes one.
#[expect(
    clippy::manual_non_exhaustive,
    reason = "the attribute would let the rest of this crate make one unchecked"
)]
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// At least 1; `None` is as many as fit the context.
    pub max_tokens: Option<u32>,
    /// 0 to 5; 0 is greedy.
    pub temperature: f32,
    /// More than 0, at most 1; 1 keeps every token.
    pub top_p: f32,
    /// 1 to the vocabulary's size; `None` keeps every token.
    pub top_k: Option<u32>,
    /// 0 to 1, relative to the most likely token; 0 keeps every token.
    pub min_p: f32,
    /// More than 0, at most 10; 1 is neutral. Over prompt and answer.
    pub repetition_penalty: f32,
    /// -2 to 2; 0 is neutral. Over the answer.
    pub presence_penalty: f32,
    /// -2 to 2; 0 is neutral. Over the answer, once per occurrence.
    pub frequency_penalty: f32,
    pub seed: u64,
    /// At most 16, each of 1 to 256 bytes.
    pub stop: Vec<String>,
    /// At most 64, each below the vocabulary's size.
    pub stop_token_ids: Vec<u32>,
    /// How many alternatives to report beside the chosen token, at most 20; `None` reports nothing.
    pub logprobs: Option<u32>,
    _checked: (),
}

impl SamplingDraft {
    /// Checks every field; `field` is the draft's own place in the request, such as `input.sampling`.
    ///
    /// # Errors
    /// `InvalidRequest` names the field and its range, `Unsupported` what is not there.
    /// Neither repeats a stop string, since it is the caller's text.
    pub fn check(self, field: &str, vocab_size: usize) -> Result<Sampling> {
        self.refuse_what_is_not_there(field)?;
        let number = |name: &str, value: Option<f32>, default: f32, range: NumberRange| {
            range.check(format!("{field}.{name}"), value.unwrap_or(default))
        };
        let max_tokens = at_least_one(
            format!("{field}.max_tokens"),
            self.max_tokens,
            "leave it unset to get as many tokens as fit",
        )?;
        let top_k = at_least_one(
            format!("{field}.top_k"),
            self.top_k,
            "leave it unset to turn it off",
        )?;
        if let Some(k) = top_k.filter(|&k| k as usize > vocab_size) {
            return Err(Error::invalid(
                format!("{field}.top_k"),
                format!("must be at most {vocab_size}, the size of the vocabulary; got {k}"),
            ));
        }
        if let Some(count) = self.logprobs.filter(|&count| count > MAX_LOGPROBS) {
            return Err(Error::invalid(
                format!("{field}.logprobs"),
                format!("must be at most {MAX_LOGPROBS} alternatives per token; got {count}"),
            ));
        }
        check_stops(&format!("{field}.stop"), &self.stop)?;
        check_stop_token_ids(
            &format!("{field}.stop_token_ids"),
            &self.stop_token_ids,
            vocab_size,
        )?;
        Ok(Sampling {
            max_tokens,
            temperature: number("temperature", self.temperature, 0.0, TEMPERATURE)?,
            top_p: number("top_p", self.top_p, 1.0, TOP_P)?,
            top_k,
            min_p: number("min_p", self.min_p, 0.0, MIN_P)?,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                1.0,
                REPETITION_PENALTY,
            )?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, PENALTY)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, PENALTY)?,
            seed: self.seed.unwrap_or(0),
            stop: self.stop,
            stop_token_ids: self.stop_token_ids,
            logprobs: self.logprobs,
            _checked: (),
        })
    }

    fn refuse_what_is_not_there(&self, field: &str) -> Result<()> {
        if self.n.is_some() {
            return Err(Error::unsupported(
                format!("{field}.n"),
                "a request has one answer; leave it unset and send one request per answer, each with its own seed",
            ));
        }
        if !self.logit_bias.is_empty() {
            return Err(Error::unsupported(
                format!("{field}.logit_bias"),
                "single logits cannot be biased; leave it empty",
            ));
        }
        Ok(())
    }
}

/// Which tokens a sequence has seen, for the penalties.
#[derive(Clone, Debug, Default)]
pub struct TokenHistory {
    seen: HashMap<u32, Occurrence>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Occurrence {
    in_prompt: bool,
    in_answer: u32,
}

impl TokenHistory {
    pub fn new(prompt: &[u32]) -> Self {
        let occurrence = Occurrence {
            in_prompt: true,
            in_answer: 0,
        };
        let seen = prompt.iter().map(|&token| (token, occurrence)).collect();
        Self { seen }
    }

    /// Counts one more token of the answer.
    pub fn push(&mut self, token: u32) {
        let count = &mut self.seen.entry(token).or_default().in_answer;
        *count = count.saturating_add(1);
    }

    /// Forgets the answer; the prompt stays.
    pub fn rewind(&mut self) {
        self.seen.retain(|_, occurrence| {
            occurrence.in_answer = 0;
            occurrence.in_prompt
        });
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    pub token: u32,
    /// Set when the sampling asks for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// Natural logarithms of the model's own probabilities: before penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub chosen: (u32, f32),
    /// The most likely tokens, best first, ties by id; the chosen one is among them if it is that likely.
    /// Tokens that the model rules out (a logit of minus infinity) are left out.
    pub alternatives: Vec<(u32, f32)>,
}

/// Chooses token `output_index` (0-based) of the answer from its logits, one per token of the vocabulary.
///
/// In order: penalties, temperature, top-k, top-p (of what top-k left), min-p (relative to the best token).
/// Greedy choice, top-k and top-p rank tied tokens by their ids, lower first.
/// The same arguments give the same token on every machine: draws are counter-based, and probabilities are
/// summed as integers, so no order of summation can matter.
/// `attempt` counts the rewinds of the sequence and gives each its own draws.
///
/// # Errors
/// `Internal` if a logit is NaN, if the highest is not finite, or if there are more than 2^23 logits.
pub fn pick(
    sampling: &Sampling,
    history: &TokenHistory,
    attempt: u32,
    output_index: u32,
    logits: &[f32],
) -> Result<Pick> {
    let best = highest(logits)?;
    let penalised = penalise(sampling, history, logits);
    let best_penalised = match &penalised {
        Cow::Borrowed(_) => best,
        Cow::Owned(logits) => highest(logits)?,
    };
    let token = if sampling.temperature == 0.0 {
        best_penalised.0
    } else {
        let random = random(sampling.seed, attempt, output_index);
        let candidates = candidates(sampling, &penalised, best_penalised.1);
        draw(&candidates, random)
    };
    let logprobs = sampling
        .logprobs
        .map(|alternatives| logprobs(logits, best.1, token, alternatives as usize));
    Ok(Pick { token, logprobs })
}

// ---- checks ----

struct NumberRange {
    from: Bound<f32>,
    to: f32,
    words: &'static str,
}

const TEMPERATURE: NumberRange = NumberRange {
    from: Bound::Included(0.0),
    to: 5.0,
    words: "from 0 to 5 (0 picks the most likely token)",
};
const TOP_P: NumberRange = NumberRange {
    from: Bound::Excluded(0.0),
    to: 1.0,
    words: "above 0 and at most 1 (1 turns it off)",
};
const MIN_P: NumberRange = NumberRange {
    from: Bound::Included(0.0),
    to: 1.0,
    words: "from 0 to 1 (0 turns it off)",
};
const REPETITION_PENALTY: NumberRange = NumberRange {
    from: Bound::Excluded(0.0),
    to: 10.0,
    words: "above 0 and at most 10 (1 turns it off)",
};
const PENALTY: NumberRange = NumberRange {
    from: Bound::Included(-2.0),
    to: 2.0,
    words: "from -2 to 2 (0 turns it off)",
};

impl NumberRange {
    /// NaN lies in no range.
    fn check(&self, field: String, value: f32) -> Result<f32> {
        if (self.from, Bound::Included(self.to)).contains(&value) {
            return Ok(value);
        }
        Err(Error::invalid(
            field,
            format!("must be a number {}; got {value:?}", self.words),
        ))
    }
}

fn at_least_one(field: String, value: Option<u32>, remedy: impl Display) -> Result<Option<u32>> {
    match value {
        Some(0) => Err(Error::invalid(
            field,
            format!("must be at least 1; {remedy}; got 0"),
        )),
        _ => Ok(value),
    }
}

fn check_stops(field: &str, stops: &[String]) -> Result<()> {
    if stops.len() > MAX_STOPS {
        return Err(Error::invalid(
            field,
            format!(
                "must be at most {MAX_STOPS} stop strings; got {}",
                stops.len()
            ),
        ));
    }
    match stops
        .iter()
        .position(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len()))
    {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            format!("{field}[{index}]"),
            format!(
                "must be 1 to {MAX_STOP_BYTES} bytes of UTF-8; got {}",
                stops[index].len()
            ),
        )),
    }
}

fn check_stop_token_ids(field: &str, ids: &[u32], vocab_size: usize) -> Result<()> {
    if ids.len() > MAX_STOP_TOKEN_IDS {
        return Err(Error::invalid(
            field,
            format!(
                "must be at most {MAX_STOP_TOKEN_IDS} token ids; got {}",
                ids.len()
            ),
        ));
    }
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            format!("{field}[{index}]"),
            format!(
                "must be below {vocab_size}, the size of the vocabulary; got {}",
                ids[index]
            ),
        )),
    }
}

// ---- logits ----

/// The first of the highest logits, and its token.
fn highest(logits: &[f32]) -> Result<(u32, f32)> {
    let max = kernels::highest(logits);
    if max.is_nan() {
        return Err(Error::internal("a logit is NaN"));
    }
    if !max.is_finite() {
        return Err(Error::internal(format!("the highest logit is {max}")));
    }
    if logits.len() > MAX_VOCABULARY {
        return Err(Error::internal(format!(
            "{} logits are more than the {MAX_VOCABULARY} that can be sampled from",
            logits.len()
        )));
    }
    let token = logits
        .iter()
        .position(|&logit| logit == max)
        .expect("the maximum is one of the logits");
    Ok((token as u32, max))
}

/// The logits after the penalties.
///
/// Repetition (Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the sign handled as Hugging Face does) divides
/// a positive logit and multiplies a negative one, over prompt and answer.
/// Then `logit -= frequency * occurrences + presence`, over the answer only, as OpenAI defines it.
fn penalise<'a>(sampling: &Sampling, history: &TokenHistory, logits: &'a [f32]) -> Cow<'a, [f32]> {
    let repetition = f64::from(sampling.repetition_penalty);
    let presence = f64::from(sampling.presence_penalty);
    let frequency = f64::from(sampling.frequency_penalty);
    if (repetition, presence, frequency) == (1.0, 0.0, 0.0) || history.seen.is_empty() {
        return Cow::Borrowed(logits);
    }
    let mut penalised = logits.to_vec();
    for (&token, &Occurrence { in_answer, .. }) in &history.seen {
        let Some(logit) = penalised.get_mut(token as usize) else {
            continue;
        };
        if logit.is_infinite() {
            continue;
        }
        let mut value = f64::from(*logit);
        value = if value > 0.0 {
            value / repetition
        } else {
            value * repetition
        };
        if in_answer > 0 {
            value -= frequency * f64::from(in_answer) + presence;
        }
        // A tiny repetition penalty must not turn a sound logit into infinity.
        *logit = value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
    }
    Cow::Owned(penalised)
}

fn logprobs(logits: &[f32], max: f32, chosen: u32, alternatives: usize) -> TokenLogprobs {
    let max = f64::from(max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| libm::exp(f64::from(logit) - max))
        .sum();
    let log_sum = libm::log(sum);
    let logprob = |token: u32| {
        let logit = f64::from(logits[token as usize]);
        (token, (logit - max - log_sum) as f32)
    };
    let mut best = best_ranks(logits, alternatives);
    best.sort_unstable();
    TokenLogprobs {
        chosen: logprob(chosen),
        alternatives: best.into_iter().map(|rank| logprob(rank.token())).collect(),
    }
}

/// Orders tokens by logit, the highest first, and ties by id, the lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u64);

impl Rank {
    fn new(token: u32, logit: f32) -> Self {
        // Adding zero makes -0 and 0 the tie that they are; the flips make the bits rise as the logit falls.
        let bits = (logit + 0.0).to_bits();
        let falling = if bits >> 31 == 1 {
            bits
        } else {
            !bits & 0x7fff_ffff
        };
        Self(u64::from(falling) << 32 | u64::from(token))
    }

    fn token(self) -> u32 {
        self.0 as u32
    }
}

/// The best `count` ranks in no order: fewer if the logits are fewer, without those of minus infinity.
fn best_ranks(logits: &[f32], count: usize) -> Vec<Rank> {
    if count == 0 {
        return Vec::new();
    }
    // One pass: whatever beats the bar is kept, and a full buffer is cut to the best, which raises the bar.
    let room = count.saturating_mul(2).max(256).min(logits.len() + 1);
    let mut kept: Vec<Rank> = Vec::with_capacity(room);
    let mut bar = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        // A later token that only equals the bar has the higher id.
        if logit > bar {
            kept.push(Rank::new(token as u32, logit));
            if kept.len() == room {
                bar = logits[cut_to_best(&mut kept, count).token() as usize];
            }
        }
    }
    if kept.len() > count {
        cut_to_best(&mut kept, count);
    }
    kept
}

/// Keeps the best `count` (at least 1, at most all) and returns the last of them.
fn cut_to_best(ranks: &mut Vec<Rank>, count: usize) -> Rank {
    let last = *ranks.select_nth_unstable(count - 1).1;
    ranks.truncate(count);
    last
}

// ---- draws ----

/// Weights are whole numbers, the best token's is this: sums are exact, so their order cannot matter.
/// A token less than 2^-41 times as likely as the best has no weight: no sample is large enough to miss it.
const BEST_WEIGHT: u64 = 1 << 40;

/// The sum of so many weights fits 64 bits.
const MAX_VOCABULARY: usize = 1 << 23;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    rank: Rank,
    weight: u64,
}

/// What temperature, top-k, top-p and min-p leave, in the order of the ids.
fn candidates(sampling: &Sampling, logits: &[f32], max: f32) -> Vec<Candidate> {
    let per_temperature = 1.0 / f64::from(sampling.temperature);
    let max = f64::from(max);
    // Top-p needs the weights of all; without it, those that min-p is about to drop are not worth an exponential.
    let faintest = if sampling.top_p < 1.0 {
        FAINTEST
    } else {
        FAINTEST.max(libm::log(f64::from(sampling.min_p)) - 1e-6)
    };
    let candidate = |token: u32, logit: f32| {
        let below = (f64::from(logit) - max) * per_temperature;
        let weight = if below < faintest { 0 } else { weight(below) };
        (weight > 0).then(|| Candidate {
            rank: Rank::new(token, logit),
            weight,
        })
    };
    let mut kept = Vec::new();
    match sampling.top_k {
        Some(k) if (k as usize) < logits.len() => {
            let best = best_ranks(logits, k as usize).into_iter().map(Rank::token);
            kept.extend(best.filter_map(|token| candidate(token, logits[token as usize])));
        }
        _ => {
            kept.reserve_exact(logits.len());
            kept.extend(
                (0..)
                    .zip(logits)
                    .filter_map(|(token, &logit)| candidate(token, logit)),
            );
        }
    }
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut kept, f64::from(sampling.top_p));
    }
    if sampling.min_p > 0.0 {
        let bar = (f64::from(sampling.min_p) * BEST_WEIGHT as f64).ceil() as u64;
        kept.retain(|candidate| candidate.weight >= bar);
    }
    if !kept.is_sorted_by_key(|candidate| candidate.rank.token()) {
        kept.sort_unstable_by_key(|candidate| candidate.rank.token());
    }
    kept
}

/// exp of less than this is less than half of the smallest weight.
const FAINTEST: f64 = -28.5;

/// The weight of a token whose logit, over the temperature, is `below` (zero or negative) the best one's.
fn weight(below: f64) -> u64 {
    (libm::exp(below) * BEST_WEIGHT as f64 + 0.5) as u64
}

fn total(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// Keeps the fewest best candidates that hold `top_p` of the weight (Holtzman et al. 2020, arXiv:1904.09751).
fn keep_nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    let total = total(candidates);
    let mut needed = ((top_p * total as f64).ceil() as u64).clamp(1, total);
    // All those at or below this bar together weigh no more than what may be lost.
    let bar = (total - needed) / candidates.len() as u64;
    candidates.retain(|candidate| candidate.weight > bar);
    // `from` candidates are in; whether more of the `from..to` are needed, each half's weight tells.
    let (mut from, mut to) = (0, candidates.len());
    while to - from > 1 {
        let half = (to - from) / 2;
        candidates[from..to].select_nth_unstable_by_key(half, |candidate| candidate.rank);
        let better = self::total(&candidates[from..from + half]);
        if better >= needed {
            to = from + half;
        } else {
            needed -= better;
            from += half;
        }
    }
    candidates.truncate(to);
}

/// The first candidate at which the running sum of the weights exceeds `random / 2^64` of their total.
fn draw(candidates: &[Candidate], random: u64) -> u32 {
    let mut left = ((u128::from(random) * u128::from(total(candidates))) >> 64) as u64;
    for candidate in candidates {
        if left < candidate.weight {
            return candidate.rank.token();
        }
        left -= candidate.weight;
    }
    unreachable!("a draw is below the total of the weights")
}

/// ChaCha8 read at a position: the seed is the key, the attempt the stream, the output index the block.
fn random(seed: u64, attempt: u32, output_index: u32) -> u64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(u64::from(attempt));
    const WORDS_PER_BLOCK: u128 = 16;
    rng.set_word_pos(u128::from(output_index) * WORDS_PER_BLOCK);
    rng.next_u64()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    const FIELD: &str = "input.sampling";
    const VOCAB: usize = 1000;

    fn checked(draft: SamplingDraft) -> Sampling {
        draft.check(FIELD, VOCAB).unwrap()
    }

    fn warm(temperature: f32) -> SamplingDraft {
        SamplingDraft {
            temperature: Some(temperature),
            ..Default::default()
        }
    }

    fn token(sampling: &Sampling, output_index: u32, logits: &[f32]) -> u32 {
        pick(sampling, &TokenHistory::default(), 0, output_index, logits)
            .unwrap()
            .token
    }

    /// Pearson's statistic of `draws` tokens against the probabilities, one output index per draw.
    fn chi_square(sampling: &Sampling, logits: &[f32], probabilities: &[f64], draws: u32) -> f64 {
        let mut counts = vec![0u32; logits.len()];
        for output_index in 0..draws {
            counts[token(sampling, output_index, logits) as usize] += 1;
        }
        counts
            .iter()
            .zip(probabilities)
            .map(|(&count, &probability)| {
                let expected = probability * f64::from(draws);
                if expected == 0.0 {
                    assert_eq!(count, 0, "drew a token that has no probability");
                    return 0.0;
                }
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum()
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits
            .iter()
            .map(|&logit| (f64::from(logit) / temperature).exp())
            .collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / sum).collect()
    }

    // ---- checks ----

    #[test]
    fn an_empty_draft_is_greedy_and_neutral() {
        let sampling = checked(SamplingDraft::default());
        assert_eq!(sampling.max_tokens, None);
        assert_eq!(sampling.temperature, 0.0);
        assert_eq!((sampling.top_p, sampling.top_k), (1.0, None));
        assert_eq!(sampling.min_p, 0.0);
        assert_eq!(sampling.repetition_penalty, 1.0);
        assert_eq!(sampling.presence_penalty, 0.0);
        assert_eq!(sampling.frequency_penalty, 0.0);
        assert_eq!(sampling.seed, 0);
        assert!(sampling.stop.is_empty() && sampling.stop_token_ids.is_empty());
        assert_eq!(sampling.logprobs, None);
    }

    #[test]
    fn numbers_outside_their_range_are_refused_by_name() {
        type Set = fn(&mut SamplingDraft, f32);
        let fields: [(&str, Set, &[f32], &[f32]); 6] = [
            (
                "temperature",
                |draft, value| draft.temperature = Some(value),
                &[0.0, 1e-6, 5.0],
                &[-1.0, 5.1, 1e30],
            ),
            (
                "top_p",
                |draft, value| draft.top_p = Some(value),
                &[1e-6, 1.0],
                &[0.0, -0.1, 1.1],
            ),
            (
                "min_p",
                |draft, value| draft.min_p = Some(value),
                &[0.0, 1.0],
                &[-0.1, 1.1],
            ),
            (
                "repetition_penalty",
                |draft, value| draft.repetition_penalty = Some(value),
                &[1e-6, 10.0],
                &[0.0, -1.0, 10.1],
            ),
            (
                "presence_penalty",
                |draft, value| draft.presence_penalty = Some(value),
                &[-2.0, 2.0],
                &[-2.1, 2.1],
            ),
            (
                "frequency_penalty",
                |draft, value| draft.frequency_penalty = Some(value),
                &[-2.0, 2.0],
                &[-2.1, 2.1],
            ),
        ];
        for (name, set, good, bad) in fields {
            let check = |value: f32| {
                let mut draft = SamplingDraft::default();
                set(&mut draft, value);
                draft.check(FIELD, VOCAB)
            };
            for &value in good {
                assert!(check(value).is_ok(), "{name} = {value}");
            }
            let never = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
            for &value in bad.iter().chain(&never) {
                match check(value) {
                    Err(Error::InvalidRequest { field, message }) => {
                        assert_eq!(field, format!("{FIELD}.{name}"));
                        assert!(message.starts_with("must be a number "), "{message}");
                        assert!(message.ends_with(&format!("got {value:?}")), "{message}");
                    }
                    other => panic!("{name} = {value}: {other:?}"),
                }
            }
        }
    }

    fn check_refused(draft: SamplingDraft, wrong: &str, message_part: &str) {
        match draft.check(FIELD, VOCAB) {
            Err(Error::InvalidRequest { field, message }) => {
                assert_eq!(field, format!("{FIELD}.{wrong}"));
                assert!(message.contains(message_part), "{message}");
            }
            other => panic!("{wrong}: {other:?}"),
        }
    }

    #[test]
    fn counts_outside_their_range_are_refused_by_name() {
        let draft = SamplingDraft::default;
        check_refused(
            SamplingDraft {
                max_tokens: Some(0),
                ..draft()
            },
            "max_tokens",
            "at least 1",
        );
        check_refused(
            SamplingDraft {
                top_k: Some(0),
                ..draft()
            },
            "top_k",
            "leave it unset to turn it off",
        );
        check_refused(
            SamplingDraft {
                top_k: Some(1001),
                ..draft()
            },
            "top_k",
            "at most 1000",
        );
        check_refused(
            SamplingDraft {
                logprobs: Some(21),
                ..draft()
            },
            "logprobs",
            "at most 20",
        );
        check_refused(
            SamplingDraft {
                stop: vec!["x".to_owned(); 17],
                ..draft()
            },
            "stop",
            "got 17",
        );
        check_refused(
            SamplingDraft {
                stop: vec!["x".to_owned(), String::new()],
                ..draft()
            },
            "stop[1]",
            "got 0",
        );
        check_refused(
            SamplingDraft {
                stop: vec!["x".repeat(257)],
                ..draft()
            },
            "stop[0]",
            "got 257",
        );
        check_refused(
            SamplingDraft {
                stop_token_ids: vec![1; 65],
                ..draft()
            },
            "stop_token_ids",
            "got 65",
        );
        check_refused(
            SamplingDraft {
                stop_token_ids: vec![999, 1000],
                ..draft()
            },
            "stop_token_ids[1]",
            "below 1000",
        );
    }

    #[test]
    fn the_largest_values_are_accepted() {
        let sampling = checked(SamplingDraft {
            max_tokens: Some(u32::MAX),
            top_k: Some(VOCAB as u32),
            seed: Some(u64::MAX),
            stop: vec!["x".repeat(256); 16],
            stop_token_ids: vec![999; 64],
            logprobs: Some(20),
            ..Default::default()
        });
        assert_eq!(sampling.max_tokens, Some(u32::MAX));
        assert_eq!(sampling.seed, u64::MAX);
    }

    #[test]
    fn what_is_not_supported_is_refused_even_when_it_would_change_nothing() {
        let n = SamplingDraft {
            n: Some(1),
            ..Default::default()
        };
        let bias = SamplingDraft {
            logit_bias: vec![(1, 0.0)],
            ..Default::default()
        };
        for (draft, name) in [(n, "n"), (bias, "logit_bias")] {
            match draft.check(FIELD, VOCAB) {
                Err(Error::Unsupported { field, .. }) => {
                    assert_eq!(field, format!("{FIELD}.{name}"));
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_error_never_repeats_a_stop_string() {
        let secret = "sesame".repeat(60);
        let error = SamplingDraft {
            stop: vec![secret],
            ..Default::default()
        }
        .check(FIELD, VOCAB)
        .unwrap_err();
        assert!(!error.to_string().contains("sesame"));
    }

    // ---- greedy, ties, bad logits ----

    #[test]
    fn a_tie_goes_to_the_lower_id() {
        let mut logits = vec![0.0; 100];
        logits[40] = 3.0;
        logits[41] = 3.0;
        logits[7] = f32::NEG_INFINITY;
        assert_eq!(token(&checked(SamplingDraft::default()), 0, &logits), 40);
        for output_index in 0..50 {
            let one = SamplingDraft {
                top_k: Some(1),
                ..warm(1.0)
            };
            assert_eq!(token(&checked(one), output_index, &logits), 40);
            let nucleus = SamplingDraft {
                top_p: Some(0.01),
                ..warm(1.0)
            };
            assert_eq!(token(&checked(nucleus), output_index, &logits), 40);
        }
        assert_eq!(
            token(&checked(SamplingDraft::default()), 0, &[-0.0, 0.0]),
            0
        );
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error_and_ruled_out_tokens_are_not() {
        let nan = f32::NAN;
        let infinite = f32::INFINITY;
        for sampling in [checked(SamplingDraft::default()), checked(warm(1.0))] {
            let pick = |logits: &[f32]| pick(&sampling, &TokenHistory::default(), 0, 0, logits);
            for logits in [
                &[][..],
                &[nan],
                &[1.0, nan, 2.0],
                &[1.0, infinite],
                &[-infinite, -infinite],
            ] {
                assert!(matches!(pick(logits), Err(Error::Internal(_))));
            }
            assert_eq!(pick(&[-infinite, -5.0, -infinite]).unwrap().token, 1);
        }
    }

    // ---- log-probabilities ----

    #[test]
    fn logprobs_are_those_of_the_untouched_logits() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 2.0, 3.0];
        let expected = softmax(&logits, 1.0);
        let sampling = checked(SamplingDraft {
            logprobs: Some(4),
            repetition_penalty: Some(5.0),
            ..warm(0.5)
        });
        let picked = pick(&sampling, &TokenHistory::new(&[1, 4]), 0, 3, &logits).unwrap();
        let logprobs = picked.logprobs.unwrap();
        assert_eq!(logprobs.chosen.0, picked.token);
        let ids: Vec<u32> = logprobs.alternatives.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, [1, 4, 3, 0]);
        for (id, logprob) in logprobs.alternatives.into_iter().chain([logprobs.chosen]) {
            assert!((f64::from(logprob) - expected[id as usize].ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn no_alternatives_report_the_chosen_token_alone() {
        let sampling = checked(SamplingDraft {
            logprobs: Some(0),
            ..Default::default()
        });
        let picked = pick(&sampling, &TokenHistory::default(), 0, 0, &[0.0, 0.0]).unwrap();
        assert_eq!(
            picked.logprobs,
            Some(TokenLogprobs {
                chosen: (0, -std::f32::consts::LN_2),
                alternatives: vec![],
            })
        );
    }

    // ---- penalties ----

    #[test]
    fn repetition_covers_prompt_and_answer_and_the_others_the_answer_alone() {
        let mut history = TokenHistory::new(&[0, 1]);
        history.push(1);
        history.push(2);
        history.push(2);
        history.push(999);
        let sampling = checked(SamplingDraft {
            repetition_penalty: Some(2.0),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(0.25),
            ..Default::default()
        });
        let logits = [4.0, -4.0, 4.0, 4.0];
        let penalised = penalise(&sampling, &history, &logits);
        assert_eq!(*penalised, [2.0, -8.75, 1.0, 4.0]);
        history.rewind();
        let penalised = penalise(&sampling, &history, &logits);
        assert_eq!(*penalised, [2.0, -8.0, 4.0, 4.0]);
    }

    #[test]
    fn penalties_change_the_greedy_choice() {
        let mut history = TokenHistory::new(&[]);
        history.push(0);
        let sampling = checked(SamplingDraft {
            presence_penalty: Some(1.0),
            ..Default::default()
        });
        let picked = pick(&sampling, &history, 0, 1, &[2.0, 1.5]).unwrap();
        assert_eq!(picked.token, 1);
    }

    #[test]
    fn the_smallest_repetition_penalty_keeps_logits_finite_and_ruled_out_tokens_out() {
        let sampling = checked(SamplingDraft {
            repetition_penalty: Some(f32::MIN_POSITIVE),
            ..warm(1.0)
        });
        let history = TokenHistory::new(&[1, 2]);
        let logits = [0.0, 100.0, f32::NEG_INFINITY];
        assert_eq!(pick(&sampling, &history, 0, 0, &logits).unwrap().token, 1);
    }

    // ---- draws ----

    #[test]
    fn the_draws_are_the_published_chacha8_keystream() {
        // Key and nonce zero: 3e00ef2f895f40d6 7f5bb8e8... (draft-strombergson-chacha-test-vectors).
        assert_eq!(
            random(0, 0, 0),
            u64::from_le_bytes(*b"\x3e\x00\xef\x2f\x89\x5f\x40\xd6")
        );
    }

    #[test]
    fn seed_attempt_and_index_each_give_other_draws() {
        let mut seen = HashSet::new();
        for seed in [0, 1, u64::MAX] {
            for attempt in [0, 1, u32::MAX] {
                for output_index in [0, 1, 2, 3, u32::MAX] {
                    assert!(seen.insert(random(seed, attempt, output_index)));
                }
            }
        }
        let logits = vec![0.0; 1000];
        let sampling = checked(warm(1.0));
        let answer = |attempt| -> Vec<u32> {
            (0..20)
                .map(|index| {
                    pick(&sampling, &TokenHistory::default(), attempt, index, &logits)
                        .unwrap()
                        .token
                })
                .collect()
        };
        assert_eq!(answer(0), answer(0));
        assert_ne!(answer(0), answer(1));
    }

    /// Tokens 0, 1, 2 … of ever lower rank.
    fn weighted(weights: &[u64]) -> Vec<Candidate> {
        (0..)
            .zip(weights)
            .map(|(token, &weight)| Candidate {
                rank: Rank::new(token, 0.0),
                weight,
            })
            .collect()
    }

    #[test]
    fn each_candidate_owns_its_share_of_the_random_numbers() {
        let candidates = weighted(&[1, 2, 1]);
        let quarter = 1u64 << 62;
        for (number, token) in [(0, 0), (1, 1), (2, 1), (3, 2)] {
            assert_eq!(draw(&candidates, number * quarter), token);
            assert_eq!(draw(&candidates, number * quarter + (quarter - 1)), token);
        }
    }

    #[test]
    fn the_two_zeros_are_a_tie() {
        let mut ranks = best_ranks(&[-0.0, 0.0, -0.0], 2);
        ranks.sort_unstable();
        assert_eq!(
            ranks.into_iter().map(Rank::token).collect::<Vec<_>>(),
            [0, 1]
        );
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, f32::NEG_INFINITY, 1.5];
        // Six degrees of freedom: a sound sampler exceeds 27.9 once in ten thousand times.
        for seed in 0..5 {
            for temperature in [0.7, 1.0, 2.0] {
                let sampling = checked(SamplingDraft {
                    seed: Some(seed),
                    ..warm(temperature)
                });
                let probabilities = softmax(&logits, f64::from(temperature));
                let statistic = chi_square(&sampling, &logits, &probabilities, 20_000);
                assert!(statistic < 27.9, "seed {seed}: {statistic}");
            }
        }
    }

    #[test]
    fn restricted_draws_follow_the_renormalised_probabilities() {
        let logits = [0.4f32, 0.3, 0.2, 0.06, 0.04].map(f32::ln);
        let draft = || warm(1.0);
        let kept_by: [(SamplingDraft, usize); 4] = [
            (
                SamplingDraft {
                    top_k: Some(2),
                    ..draft()
                },
                2,
            ),
            (
                SamplingDraft {
                    top_p: Some(0.8),
                    ..draft()
                },
                3,
            ),
            (
                SamplingDraft {
                    min_p: Some(0.14),
                    ..draft()
                },
                4,
            ),
            // Of the three that top-k leaves, 0.4 and 0.3 hold 0.78 of the mass.
            (
                SamplingDraft {
                    top_k: Some(3),
                    top_p: Some(0.77),
                    ..draft()
                },
                2,
            ),
        ];
        for (draft, kept) in kept_by {
            let mut cut = logits;
            cut[kept..].fill(f32::NEG_INFINITY);
            let statistic = chi_square(&checked(draft), &logits, &softmax(&cut, 1.0), 20_000);
            // At most three degrees of freedom: once in ten thousand.
            assert!(statistic < 21.2, "{kept} tokens: {statistic}");
        }
    }

    fn any_logits() -> impl Strategy<Value = Vec<f32>> {
        // Quarters make ties.
        prop::collection::vec(
            prop_oneof![
                8 => (-80i32..80).prop_map(|quarters| quarters as f32 / 4.0),
                2 => -20f32..20.0,
                1 => Just(f32::NEG_INFINITY),
            ],
            1..700,
        )
        .prop_filter("some logit is finite", |logits| {
            logits.iter().any(|logit| logit.is_finite())
        })
    }

    fn ranked(logits: &[f32]) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..logits.len() as u32)
            .filter(|&id| logits[id as usize].is_finite())
            .collect();
        ids.sort_by(|&a, &b| {
            let (x, y) = (logits[a as usize], logits[b as usize]);
            y.partial_cmp(&x).unwrap().then(a.cmp(&b))
        });
        ids
    }

    /// What the candidates should be, the long way: rank everything, then cut.
    fn ranked_candidates(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let mut ids = ranked(logits);
        let max = f64::from(logits[ids[0] as usize]);
        let weight = |id: u32| {
            let below = f64::from(logits[id as usize]) - max;
            weight(below * (1.0 / f64::from(sampling.temperature)))
        };
        ids.truncate(sampling.top_k.map_or(usize::MAX, |k| k as usize));
        ids.retain(|&id| weight(id) > 0);
        if sampling.top_p < 1.0 {
            let total: u64 = ids.iter().map(|&id| weight(id)).sum();
            let mut sum = 0;
            let enough = ids
                .iter()
                .position(|&id| {
                    sum += weight(id);
                    sum as f64 >= f64::from(sampling.top_p) * total as f64
                })
                .unwrap();
            ids.truncate(enough + 1);
        }
        ids.retain(|&id| weight(id) as f64 >= f64::from(sampling.min_p) * BEST_WEIGHT as f64);
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn the_best_ranks_are_the_head_of_the_ranking(
            logits in any_logits(),
            count in 0usize..800,
        ) {
            let mut best = best_ranks(&logits, count);
            best.sort_unstable();
            let best: Vec<u32> = best.into_iter().map(Rank::token).collect();
            let mut expected = ranked(&logits);
            prop_assert_eq!(highest(&logits).unwrap().0, expected[0]);
            expected.truncate(count);
            prop_assert_eq!(best, expected);
        }

        #[test]
        fn the_candidates_are_those_of_a_full_ranking(
            logits in any_logits(),
            temperature in 0.05f32..5.0,
            top_k in prop::option::of(1u32..800),
            top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..=1.0],
        ) {
            let sampling = checked(SamplingDraft {
                top_k,
                top_p: Some(top_p),
                min_p: Some(min_p),
                ..warm(temperature)
            });
            let max = highest(&logits).unwrap().1;
            let kept: Vec<u32> = candidates(&sampling, &logits, max)
                .iter()
                .map(|candidate| candidate.rank.token())
                .collect();
            prop_assert_eq!(kept, ranked_candidates(&sampling, &logits));
        }

        #[test]
        fn the_nucleus_is_the_shortest_head_that_holds_enough(
            mut weights in prop::collection::vec(1u64..6, 1..40),
            sixteenths in 1u64..16,
        ) {
            weights.sort_unstable_by(|a, b| b.cmp(a));
            let total: u64 = weights.iter().sum();
            let mut sum = 0;
            let shortest = weights
                .iter()
                .position(|weight| {
                    sum += weight;
                    16 * sum >= sixteenths * total
                })
                .unwrap();
            let mut candidates = weighted(&weights);
            candidates.reverse();
            keep_nucleus(&mut candidates, sixteenths as f64 / 16.0);
            candidates.sort_unstable_by_key(|candidate| candidate.rank);
            prop_assert_eq!(candidates, weighted(&weights[..=shortest]));
        }

        #[test]
        fn bounds_that_keep_everything_equal_plain_sampling(
            logits in any_logits(),
            seed in any::<u64>(),
            output_index in any::<u32>(),
        ) {
            let plain = checked(SamplingDraft { seed: Some(seed), ..warm(1.0) });
            let all = SamplingDraft {
                top_k: Some(logits.len() as u32),
                top_p: Some(1.0),
                min_p: Some(0.0),
                seed: Some(seed),
                ..warm(1.0)
            };
            prop_assert_eq!(
                token(&plain, output_index, &logits),
                token(&checked(all), output_index, &logits)
            );
        }

        #[test]
        fn a_small_temperature_and_one_candidate_are_greedy(
            mut logits in any_logits(),
            seed in any::<u64>(),
            output_index in any::<u32>(),
        ) {
            let greedy = token(&checked(SamplingDraft::default()), 0, &logits);
            prop_assert_eq!(greedy, ranked(&logits)[0]);
            let one = SamplingDraft { top_k: Some(1), seed: Some(seed), ..warm(1.0) };
            prop_assert_eq!(greedy, token(&checked(one), output_index, &logits));
            // Only ties stay open as the temperature falls.
            logits[greedy as usize] += 0.125;
            let cold = SamplingDraft { seed: Some(seed), ..warm(f32::MIN_POSITIVE) };
            prop_assert_eq!(greedy, token(&checked(cold), output_index, &logits));
        }

        #[test]
        fn only_what_the_history_counts_matters(
            logits in any_logits(),
            prompt in prop::collection::vec(0u32..700, 0..30),
            answer in prop::collection::vec(0u32..700, 0..30),
            discarded in prop::collection::vec(0u32..700, 0..30),
            seed in any::<u64>(),
        ) {
            let history = |prompt: &[u32], discarded: &[u32], answer: &[u32]| {
                let mut history = TokenHistory::new(prompt);
                discarded.iter().for_each(|&token| history.push(token));
                history.rewind();
                answer.iter().for_each(|&token| history.push(token));
                history
            };
            let mut prompt_backwards = prompt.clone();
            prompt_backwards.reverse();
            let mut answer_backwards = answer.clone();
            answer_backwards.reverse();
            let penalties = checked(SamplingDraft {
                repetition_penalty: Some(1.3),
                presence_penalty: Some(0.4),
                frequency_penalty: Some(-0.3),
                seed: Some(seed),
                logprobs: Some(3),
                ..warm(0.8)
            });
            let one = history(&prompt, &[], &answer);
            let other = history(&prompt_backwards, &discarded, &answer_backwards);
            prop_assert_eq!(
                pick(&penalties, &one, 0, 9, &logits).unwrap(),
                pick(&penalties, &other, 0, 9, &logits).unwrap()
            );
            let neutral = checked(SamplingDraft { seed: Some(seed), ..warm(0.8) });
            prop_assert_eq!(
                pick(&neutral, &one, 0, 9, &logits).unwrap(),
                pick(&neutral, &TokenHistory::default(), 0, 9, &logits).unwrap()
            );
        }
    }
}
