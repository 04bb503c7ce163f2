//! Turns a probe's per-token logits into one number for the request so far.
//! Causal and streaming; knows no thresholds and no probabilities.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, ScoreFailure};

/// The longest window of `k_of_n`.
pub const MAX_WINDOW: u32 = 256;

/// The most attention heads of a probe.
pub const MAX_ATTENTION_HEADS: usize = 16;

/// What a probe says about one token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOutput {
    /// Of an attention-gathered probe the sum of its heads' values: its logit for a request of
    /// this token alone.
    pub logit: f32,
    /// Only of an attention-gathered probe.
    pub attention: AttentionHeads,
}

/// What each attention head says about one token: a value, and a key that says how much it weighs.
/// Small and cheap to clone, since one per probe goes through every pass for every token.
#[derive(Clone, Default, PartialEq)]
pub struct AttentionHeads {
    /// `(value, key)`; none rather than an empty slice.
    pairs: Option<Arc<[(f32, f32)]>>,
}

impl AttentionHeads {
    /// None for more than `MAX_ATTENTION_HEADS`.
    pub fn new(pairs: impl IntoIterator<Item = (f32, f32)>) -> Option<Self> {
        let mut held = [(0.0, 0.0); MAX_ATTENTION_HEADS];
        let mut count = 0;
        for pair in pairs {
            *held.get_mut(count)? = pair;
            count += 1;
        }
        let pairs = held.get(..count).filter(|pairs| !pairs.is_empty());
        Some(Self {
            pairs: pairs.map(Arc::from),
        })
    }

    /// `(value, key)` of each head.
    pub fn pairs(&self) -> &[(f32, f32)] {
        self.pairs.as_deref().unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_none()
    }
}

impl fmt::Debug for AttentionHeads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.pairs()).finish()
    }
}

impl TokenOutput {
    pub const fn logit(logit: f32) -> Self {
        Self {
            logit,
            attention: AttentionHeads { pairs: None },
        }
    }

    /// One attention head's value and key.
    pub fn keyed(value: f32, key: f32) -> Self {
        let pairs: Arc<[_]> = Arc::from([(value, key)]);
        Self {
            logit: value,
            attention: AttentionHeads { pairs: Some(pairs) },
        }
    }

    pub fn is_finite(&self) -> bool {
        let finite = |(value, key): &(f32, f32)| value.is_finite() && key.is_finite();
        self.logit.is_finite() && self.attention.pairs().iter().all(finite)
    }

    pub(crate) fn finite(self) -> Result<Self, ScoreFailure> {
        if self.is_finite() {
            Ok(self)
        } else {
            Err(ScoreFailure::NotFinite)
        }
    }
}

/// How per-token logits `l_1 … l_t` become one number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Gather {
    /// `l_t`
    Last,
    Max,
    Mean,
    /// `v_1 = l_1`, `v_t = (1 - a) v_{t-1} + a l_t`, with `0 < a <= 1`.
    Ema {
        a: f32,
    },
    /// The `k`-th largest of the last `n` logits; above a threshold exactly when at least `k` of
    /// the last `n` tokens are. Without a value until `k` tokens were seen.
    KOfN {
        k: u32,
        n: u32,
    },
    /// `l_1 + … + l_t`: the log-odds after `t` pieces of evidence taken as independent.
    CumulativeLogOdds,
    /// `sum_h sum_i softmax(key_h)_i value_{h,i}` over the tokens so far, for each head `h`.
    Attention,
}

impl Gather {
    /// Whether raising any one logit never lowers the value. Attention is so as well for fixed
    /// keys, but a token moves its key and its logit together, so it does not count.
    pub fn monotone(&self) -> bool {
        !matches!(self, Self::Attention)
    }

    /// Refuses parameters that define nothing.
    pub fn check(&self) -> Result<()> {
        match *self {
            Self::Ema { a } if !(a > 0.0 && a <= 1.0) => Err(Error::invalid(
                "gather",
                format!("ema{{{a}}}: the weight of the newest token must lie in (0, 1]"),
            )),
            Self::KOfN { k, n } if k == 0 || k > n || n > MAX_WINDOW => Err(Error::invalid(
                "gather",
                format!("k_of_n{{{k},{n}}}: needs 1 <= k <= n <= {MAX_WINDOW}"),
            )),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Gather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last => f.write_str("last"),
            Self::Max => f.write_str("max"),
            Self::Mean => f.write_str("mean"),
            Self::Ema { a } => write!(f, "ema{{{a}}}"),
            Self::KOfN { k, n } => write!(f, "k_of_n{{{k},{n}}}"),
            Self::CumulativeLogOdds => f.write_str("cumulative_log_odds"),
            Self::Attention => f.write_str("attention"),
        }
    }
}

impl FromStr for Gather {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.parse()? {
            GatherChoice::Exact(gather) => Ok(gather),
            GatherChoice::Ema | GatherChoice::KOfN => Err(Error::invalid(
                "gather",
                format!(
                    "`{text}` lacks its parameters; write e.g. `ema{{0.1}}` or `k_of_n{{3,8}}`"
                ),
            )),
        }
    }
}

impl TryFrom<String> for Gather {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Gather> for String {
    fn from(gather: Gather) -> Self {
        gather.to_string()
    }
}

/// What a policy may write: a gather, or `ema` / `k_of_n` alone for the one that the probe was
/// calibrated with (`Manifest::gather` resolves it).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum GatherChoice {
    Exact(Gather),
    Ema,
    KOfN,
}

impl GatherChoice {
    pub fn admits(&self, gather: &Gather) -> bool {
        match self {
            Self::Exact(exact) => exact == gather,
            Self::Ema => matches!(gather, Gather::Ema { .. }),
            Self::KOfN => matches!(gather, Gather::KOfN { .. }),
        }
    }
}

impl fmt::Display for GatherChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(gather) => gather.fmt(f),
            Self::Ema => f.write_str("ema"),
            Self::KOfN => f.write_str("k_of_n"),
        }
    }
}

impl FromStr for GatherChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let exact = match text {
            "last" => Gather::Last,
            "max" => Gather::Max,
            "mean" => Gather::Mean,
            "cumulative_log_odds" => Gather::CumulativeLogOdds,
            "attention" => Gather::Attention,
            "ema" => return Ok(Self::Ema),
            "k_of_n" => return Ok(Self::KOfN),
            _ => with_parameters(text).ok_or_else(|| unknown(text))?,
        };
        exact.check()?;
        Ok(Self::Exact(exact))
    }
}

impl TryFrom<String> for GatherChoice {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<GatherChoice> for String {
    fn from(choice: GatherChoice) -> Self {
        choice.to_string()
    }
}

fn with_parameters(text: &str) -> Option<Gather> {
    let (name, rest) = text.split_once('{')?;
    let inside = rest.strip_suffix('}')?;
    match name {
        "ema" => Some(Gather::Ema {
            a: inside.parse().ok()?,
        }),
        "k_of_n" => {
            let (k, n) = inside.split_once(',')?;
            Some(Gather::KOfN {
                k: k.trim().parse().ok()?,
                n: n.trim().parse().ok()?,
            })
        }
        _ => None,
    }
}

fn unknown(text: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    Error::invalid(
        "gather",
        format!(
            "unknown gather {shown:?}; expected last, max, mean, ema{{0.1}}, k_of_n{{3,8}}, \
             cumulative_log_odds or attention"
        ),
    )
}

/// A gather in the middle of a request: constant work and bounded memory per token.
#[derive(Debug, Clone)]
pub struct GatherState {
    kind: State,
}

#[derive(Debug, Clone)]
enum State {
    Last(Option<f32>),
    Max(Option<f32>),
    Mean {
        sum: f64,
        count: u64,
    },
    Ema {
        a: f64,
        value: Option<f64>,
    },
    KOfN {
        k: usize,
        n: usize,
        window: VecDeque<f32>,
    },
    Sum(Option<f64>),
    /// As many heads as the first token had. Apart from the rest, which most gathers are: what a
    /// step has to bring from memory is what monitoring costs.
    Attention {
        count: usize,
        heads: Box<[SoftMax; MAX_ATTENTION_HEADS]>,
    },
}

/// A soft-max average under way (Milakov and Gimelshein 2018). Sums are scaled by `exp(-highest)`,
/// so no key can overflow them.
#[derive(Debug, Clone, Copy)]
struct SoftMax {
    highest: f64,
    weights: f64,
    weighted: f64,
}

impl SoftMax {
    const EMPTY: Self = Self {
        highest: f64::NEG_INFINITY,
        weights: 0.0,
        weighted: 0.0,
    };

    fn push(&mut self, value: f32, key: f32) {
        let key = f64::from(key);
        let raised = self.highest.max(key);
        let fade = (self.highest - raised).exp();
        let weight = (key - raised).exp();
        self.weights = self.weights * fade + weight;
        self.weighted = self.weighted * fade + weight * f64::from(value);
        self.highest = raised;
    }
}

impl GatherState {
    pub fn new(gather: &Gather) -> Self {
        let kind = match *gather {
            Gather::Last => State::Last(None),
            Gather::Max => State::Max(None),
            Gather::Mean => State::Mean { sum: 0.0, count: 0 },
            Gather::Ema { a } => State::Ema {
                a: f64::from(a),
                value: None,
            },
            Gather::KOfN { k, n } => State::KOfN {
                k: k as usize,
                n: n.min(MAX_WINDOW) as usize,
                window: VecDeque::new(),
            },
            Gather::CumulativeLogOdds => State::Sum(None),
            Gather::Attention => State::Attention {
                count: 0,
                heads: Box::new([SoftMax::EMPTY; MAX_ATTENTION_HEADS]),
            },
        };
        Self { kind }
    }

    /// Takes the next token's output. On an error the state is as before.
    pub fn push(&mut self, output: &TokenOutput) -> Result<(), ScoreFailure> {
        if !output.is_finite() {
            return Err(ScoreFailure::NotFinite);
        }
        let TokenOutput { logit, attention } = output;
        let logit = *logit;
        match &mut self.kind {
            State::Last(last) => *last = Some(logit),
            State::Max(max) => *max = Some(max.map_or(logit, |max| max.max(logit))),
            State::Mean { sum, count } => {
                *sum += f64::from(logit);
                *count += 1;
            }
            State::Ema { a, value } => {
                let logit = f64::from(logit);
                *value = Some(value.map_or(logit, |old| (1.0 - *a) * old + *a * logit));
            }
            State::KOfN { n, window, .. } => {
                if window.len() >= *n {
                    window.pop_front();
                }
                window.push_back(logit);
            }
            State::Sum(sum) => *sum = Some(sum.unwrap_or(0.0) + f64::from(logit)),
            State::Attention { count, heads } => {
                let pairs = attention.pairs();
                if pairs.is_empty() {
                    return Err(ScoreFailure::MissingKey);
                }
                if *count != 0 && *count != pairs.len() {
                    return Err(ScoreFailure::Shape);
                }
                *count = pairs.len();
                for (head, (value, key)) in heads.iter_mut().zip(pairs) {
                    head.push(*value, *key);
                }
            }
        }
        Ok(())
    }

    /// The number for the request so far; none before the first token (`k_of_n`: before the k-th).
    pub fn value(&self) -> Option<f32> {
        match &self.kind {
            State::Last(value) | State::Max(value) => *value,
            State::Mean { count: 0, .. } => None,
            State::Mean { sum, count } => Some(finite_f32(sum / *count as f64)),
            State::Ema { value, .. } | State::Sum(value) => value.map(finite_f32),
            State::KOfN { k, window, .. } => kth_largest(window, *k),
            State::Attention { count: 0, .. } => None,
            State::Attention { count, heads } => {
                let heads = heads.iter().take(*count);
                let averages = heads.map(|head| head.weighted / head.weights);
                Some(finite_f32(averages.sum()))
            }
        }
    }
}

fn kth_largest(window: &VecDeque<f32>, k: usize) -> Option<f32> {
    let mut sorted = [0.0_f32; MAX_WINDOW as usize];
    let sorted = sorted.get_mut(..window.len())?;
    let place = k.checked_sub(1).filter(|place| *place < sorted.len())?;
    for (slot, logit) in sorted.iter_mut().zip(window) {
        *slot = *logit;
    }
    let (_, kth, _) = sorted.select_nth_unstable_by(place, |x, y| y.total_cmp(x));
    Some(*kth)
}

/// A sum of finite logits may leave f32's range; it stays the largest number, not infinity.
fn finite_f32(value: f64) -> f32 {
    value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Gather; 8] = [
        Gather::Last,
        Gather::Max,
        Gather::Mean,
        Gather::Ema { a: 0.1 },
        Gather::KOfN { k: 3, n: 8 },
        Gather::KOfN { k: 1, n: 1 },
        Gather::CumulativeLogOdds,
        Gather::Attention,
    ];

    fn stream(gather: Gather, outputs: &[TokenOutput]) -> Option<f32> {
        let mut state = GatherState::new(&gather);
        for output in outputs {
            state.push(output).unwrap();
        }
        state.value()
    }

    /// Each gather as its definition says, over the whole slice at once.
    fn defined(gather: Gather, outputs: &[TokenOutput]) -> Option<f64> {
        let logits: Vec<f64> = outputs.iter().map(|o| f64::from(o.logit)).collect();
        let last = *logits.last()?;
        Some(match gather {
            Gather::Last => last,
            Gather::Max => logits.iter().copied().fold(f64::MIN, f64::max),
            Gather::Mean => logits.iter().sum::<f64>() / logits.len() as f64,
            Gather::Ema { a } => {
                let a = f64::from(a);
                let t = logits.len();
                let weight = |i: usize| {
                    let faded = (1.0 - a).powi((t - 1 - i) as i32);
                    if i == 0 { faded } else { a * faded }
                };
                (0..t).map(|i| weight(i) * logits[i]).sum()
            }
            Gather::KOfN { k, n } => {
                let from = logits.len().saturating_sub(n as usize);
                let mut window = logits[from..].to_vec();
                window.sort_by(|x, y| y.total_cmp(x));
                *window.get(k as usize - 1)?
            }
            Gather::CumulativeLogOdds => logits.iter().sum(),
            Gather::Attention => {
                let head = |head: usize| -> f64 {
                    let pair = |o: &TokenOutput| {
                        let (value, key) = o.attention.pairs()[head];
                        (f64::from(value), f64::from(key))
                    };
                    let pairs: Vec<(f64, f64)> = outputs.iter().map(pair).collect();
                    let top = pairs.iter().map(|(_, key)| *key).fold(f64::MIN, f64::max);
                    let weight = |key: f64| (key - top).exp();
                    let total: f64 = pairs.iter().map(|(_, key)| weight(*key)).sum();
                    let weighted = pairs.iter().map(|(value, key)| weight(*key) * value);
                    weighted.sum::<f64>() / total
                };
                (0..outputs[0].attention.pairs().len()).map(head).sum()
            }
        })
    }

    /// Tokens of a probe with as many attention heads as there may be, or fewer.
    fn outputs(range: f32) -> impl Strategy<Value = Vec<TokenOutput>> {
        let pair = move || (-range..range, -range..range);
        let token = move |heads: usize| {
            proptest::collection::vec(pair(), heads).prop_map(|pairs| TokenOutput {
                logit: pairs[0].0,
                attention: AttentionHeads::new(pairs).unwrap(),
            })
        };
        (1..=MAX_ATTENTION_HEADS)
            .prop_flat_map(move |heads| proptest::collection::vec(token(heads), 0..40))
    }

    /// What the attention gather was before a probe could have several heads.
    fn gathered_by_one_head(tokens: &[(f32, f32)]) -> f32 {
        let (mut highest, mut weights, mut weighted) = (f64::NEG_INFINITY, 0.0, 0.0);
        for (value, key) in tokens {
            let key = f64::from(*key);
            let raised = highest.max(key);
            let fade = (highest - raised).exp();
            let weight = (key - raised).exp();
            weights = weights * fade + weight;
            weighted = weighted * fade + weight * f64::from(*value);
            highest = raised;
        }
        finite_f32(weighted / weights)
    }

    proptest! {
        #[test]
        fn one_head_has_the_bits_that_it_always_had(
            tokens in proptest::collection::vec((-1e4_f32..1e4, -1e3_f32..1e3), 1..40),
        ) {
            let outputs = tokens.iter().map(|(value, key)| TokenOutput::keyed(*value, *key));
            let streamed = stream(Gather::Attention, &outputs.collect::<Vec<_>>()).unwrap();
            prop_assert_eq!(streamed.to_bits(), gathered_by_one_head(&tokens).to_bits());
        }

        #[test]
        fn several_heads_are_the_sum_of_each_alone(outputs in outputs(50.0)) {
            prop_assume!(!outputs.is_empty());
            let alone = |head: usize| {
                let pair = |output: &TokenOutput| output.attention.pairs()[head];
                let pairs: Vec<(f32, f32)> = outputs.iter().map(pair).collect();
                f64::from(gathered_by_one_head(&pairs))
            };
            let sum: f64 = (0..outputs[0].attention.pairs().len()).map(alone).sum();
            let together = f64::from(stream(Gather::Attention, &outputs).unwrap());
            prop_assert!((together - sum).abs() <= 1e-4, "{} {}", together, sum);
        }

        #[test]
        fn streaming_equals_the_definition(outputs in outputs(50.0)) {
            for gather in ALL {
                let (streamed, defined) = (stream(gather, &outputs), defined(gather, &outputs));
                prop_assert_eq!(streamed.is_some(), defined.is_some(), "{}", gather);
                if let (Some(s), Some(d)) = (streamed, defined) {
                    prop_assert!((f64::from(s) - d).abs() <= 1e-5 * (1.0 + d.abs()), "{} {} {}", gather, s, d);
                }
            }
        }

        #[test]
        fn raising_one_logit_never_lowers_a_monotone_gather(
            outputs in outputs(50.0), place in 0_usize..40, raise in 0.0_f32..20.0,
        ) {
            prop_assume!(place < outputs.len());
            let mut raised = outputs.clone();
            raised[place].logit += raise;
            for gather in ALL.into_iter().filter(Gather::monotone) {
                let before = stream(gather, &outputs);
                let after = stream(gather, &raised);
                prop_assert!(after >= before, "{} {:?} {:?}", gather, before, after);
            }
        }

        #[test]
        fn finite_logits_of_any_size_gather_to_a_finite_number(outputs in outputs(f32::MAX / 2.0)) {
            for gather in ALL {
                prop_assert!(stream(gather, &outputs).is_none_or(f32::is_finite), "{}", gather);
            }
        }

        #[test]
        fn parsing_any_text_never_panics(text in ".{0,40}") {
            let _ = text.parse::<GatherChoice>();
        }

        #[test]
        fn every_ema_round_trips_through_its_name(a in 1e-6_f32..1.0) {
            let gather = Gather::Ema { a };
            prop_assert_eq!(gather.to_string().parse::<Gather>().unwrap(), gather);
        }
    }

    #[test]
    fn a_gather_of_nothing_has_no_value() {
        for gather in ALL {
            assert_eq!(stream(gather, &[]), None, "{gather}");
        }
    }

    #[test]
    fn a_score_that_is_not_finite_is_reported_and_leaves_the_state_alone() {
        for gather in ALL {
            let mut state = GatherState::new(&gather);
            for _ in 0..3 {
                state.push(&TokenOutput::keyed(1.0, 0.5)).unwrap();
            }
            let before = state.value();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let as_logit = TokenOutput::keyed(bad, 0.0);
                let as_key = TokenOutput::keyed(0.0, bad);
                let in_another_head = |pair| TokenOutput {
                    logit: 0.0,
                    attention: AttentionHeads::new([(0.0, 0.0), pair]).unwrap(),
                };
                for pair in [(bad, 0.0), (0.0, bad)] {
                    let pushed = state.push(&in_another_head(pair));
                    assert_eq!(pushed, Err(ScoreFailure::NotFinite));
                }
                assert_eq!(state.push(&as_logit), Err(ScoreFailure::NotFinite));
                assert_eq!(state.push(&as_key), Err(ScoreFailure::NotFinite));
            }
            assert_eq!(state.value(), before, "{gather}");
        }
    }

    #[test]
    fn attention_without_a_key_is_reported() {
        let mut state = GatherState::new(&Gather::Attention);
        assert_eq!(
            state.push(&TokenOutput::logit(1.0)),
            Err(ScoreFailure::MissingKey)
        );
    }

    #[test]
    fn the_number_of_heads_stays_the_same_within_a_request() {
        let mut state = GatherState::new(&Gather::Attention);
        state.push(&TokenOutput::keyed(1.0, 0.5)).unwrap();
        let two = AttentionHeads::new([(1.0, 0.0), (2.0, 0.0)]).unwrap();
        let other = TokenOutput {
            logit: 3.0,
            attention: two,
        };
        assert_eq!(state.push(&other), Err(ScoreFailure::Shape));
        assert_eq!(state.value(), Some(1.0));
        assert!(AttentionHeads::new([(0.0, 0.0); MAX_ATTENTION_HEADS]).is_some());
        assert!(AttentionHeads::new([(0.0, 0.0); MAX_ATTENTION_HEADS + 1]).is_none());
    }

    #[test]
    fn each_head_weighs_the_tokens_by_its_own_key() {
        let token = |pairs: [(f32, f32); 2]| TokenOutput {
            logit: pairs[0].0 + pairs[1].0,
            attention: AttentionHeads::new(pairs).unwrap(),
        };
        // The first head looks at the first token alone, the second at both alike.
        let outputs = [
            token([(1.0, 99.0), (2.0, 0.0)]),
            token([(7.0, -99.0), (4.0, 0.0)]),
        ];
        assert_eq!(stream(Gather::Attention, &outputs), Some(1.0 + 3.0));
    }

    #[test]
    fn k_of_n_waits_for_k_tokens_and_forgets_old_ones() {
        let gather = Gather::KOfN { k: 2, n: 3 };
        let logits = |all: &[f32]| {
            all.iter()
                .copied()
                .map(TokenOutput::logit)
                .collect::<Vec<_>>()
        };
        assert_eq!(stream(gather, &logits(&[9.0])), None);
        assert_eq!(stream(gather, &logits(&[9.0, 1.0])), Some(1.0));
        assert_eq!(stream(gather, &logits(&[9.0, 1.0, 8.0])), Some(8.0));
        assert_eq!(stream(gather, &logits(&[9.0, 1.0, 8.0, 0.0])), Some(1.0));
    }

    #[test]
    fn gathers_round_trip_through_their_names() {
        for gather in ALL {
            assert_eq!(gather.to_string().parse::<Gather>().unwrap(), gather);
        }
        assert_eq!(Gather::Ema { a: 0.1 }.to_string(), "ema{0.1}");
        assert_eq!(Gather::KOfN { k: 3, n: 8 }.to_string(), "k_of_n{3,8}");
    }

    #[test]
    fn a_bare_name_chooses_the_calibrated_parameters() {
        let choice: GatherChoice = "ema".parse().unwrap();
        assert!(choice.admits(&Gather::Ema { a: 0.3 }));
        assert!(!choice.admits(&Gather::Mean));
        assert!(
            "ema"
                .parse::<Gather>()
                .unwrap_err()
                .to_string()
                .contains("ema{0.1}")
        );
    }

    #[test]
    fn parameters_that_define_nothing_are_refused() {
        for text in [
            "ema{0}",
            "ema{1.5}",
            "ema{NaN}",
            "ema{inf}",
            "ema{-1}",
            "ema{}",
            "ema{0.1",
            "k_of_n{0,8}",
            "k_of_n{9,8}",
            "k_of_n{1,257}",
            "k_of_n{3}",
            "median",
            "",
        ] {
            assert!(text.parse::<GatherChoice>().is_err(), "{text}");
        }
    }
}
