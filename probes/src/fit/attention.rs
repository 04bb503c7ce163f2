//! Fits an attention-gathered probe: for each head a value and a key vector over all tokens of a
//! request, `logit = b + sum_h sum_t softmax_t(key_h) value_{h,t}`, by AdamW on the logistic loss.
//! Several sites are fitted together when their states lie side by side. Knows states through
//! `TokenStates` alone, one batch at a time.

use std::f32::consts::PI;

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, s};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{ClassWeight, check_labels};
use crate::calibration::sigmoid;
use crate::error::{Error, Result};
use crate::gather::MAX_ATTENTION_HEADS;
use crate::probe::{Head, InputNorm};
use crate::site::Site;

/// The states of every scored token of each request, read again in every epoch: they may lie in a
/// file or in a narrower type.
pub trait TokenStates {
    fn requests(&self) -> usize;
    /// Numbers per token: `d_model` of each site.
    fn width(&self) -> usize;
    fn tokens(&self, request: usize) -> usize;
    /// Appends a request's states, `[tokens, width]`, row-major.
    fn read(&self, request: usize, into: &mut Vec<f32>);
}

/// One `[tokens, width]` per request.
impl TokenStates for Vec<Array2<f32>> {
    fn requests(&self) -> usize {
        self.len()
    }

    fn width(&self) -> usize {
        self.first().map_or(0, Array2::ncols)
    }

    fn tokens(&self, request: usize) -> usize {
        self[request].nrows()
    }

    fn read(&self, request: usize, into: &mut Vec<f32>) {
        into.extend(&self[request]);
    }
}

/// Requests with their labels.
#[derive(Clone, Copy)]
pub struct AttentionData<'a> {
    pub states: &'a dyn TokenStates,
    pub y: &'a [bool],
    pub group: &'a [String],
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttentionParams {
    /// Attention heads, each with a value and a key over the same tokens.
    pub heads: usize,
    pub epochs: usize,
    /// Requests per step.
    pub batch: usize,
    /// After the warm-up, from where it falls to 0 along half a cosine.
    pub learning_rate: f32,
    /// Steps in which the learning rate rises, but no more than a tenth of all.
    pub warm_up: usize,
    /// L2 penalty on values and keys, per row: a part of the gradient.
    pub alpha: f32,
    /// Share of values and keys that each step takes away, times the learning rate: beside the
    /// gradient (Loshchilov and Hutter 2019).
    pub weight_decay: f32,
    /// Share of a request's tokens that a step does not see, never the first: heads must not lean
    /// on one token.
    pub token_dropout: f32,
    /// Here the classes are weighted in the loss, so that no row is seen twice an epoch.
    pub class_weight: ClassWeight,
    pub seed: u64,
}

impl Default for AttentionParams {
    fn default() -> Self {
        Self {
            heads: 8,
            epochs: 6,
            batch: 64,
            learning_rate: 1e-3,
            warm_up: 50,
            alpha: 0.0,
            weight_decay: 1.0,
            token_dropout: 0.3,
            class_weight: ClassWeight::default(),
            seed: 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttentionFit {
    /// `out` is `2 heads`: first the values, then their keys.
    pub head: Head,
    /// Mean weighted logistic loss of each epoch, as it was met during the epoch.
    pub losses: Vec<f32>,
}

/// Fits a head for `Kind::Attention` and `Gather::Attention`. Deterministic given the seed.
/// Holds the states of one batch at a time.
pub fn fit_attention(
    data: AttentionData<'_>,
    site: Site,
    params: &AttentionParams,
) -> Result<AttentionFit> {
    params.check()?;
    let (mean, scale) = data.standardisation()?;
    let weights = params.class_weight.of_rows(data.y);
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    let mut rows: Vec<usize> = (0..data.y.len()).collect();
    let mut pooling = Pooling::drawn(params.heads, mean.len(), &mut rng);
    let steps = params.epochs * rows.len().div_ceil(params.batch);
    let mut adam = AdamW::new(&pooling, params, steps);
    let mut batch = Batch::new(&mean, &scale);
    let mut losses = Vec::new();
    for _ in 0..params.epochs {
        rows.shuffle(&mut rng);
        let mut loss = 0.0;
        for chunk in rows.chunks(params.batch) {
            batch.clear();
            for row in chunk {
                batch.push(data.states, *row, params.token_dropout, &mut rng);
                batch.labels.push((data.y[*row], weights[*row]));
            }
            let mut gradient = pooling.gradient(&batch);
            loss += gradient.loss;
            gradient.slope.scale(1.0 / chunk.len() as f32);
            gradient
                .slope
                .weight
                .scaled_add(params.alpha, &pooling.weight);
            adam.step(&mut pooling, &gradient.slope);
        }
        losses.push((loss / rows.len() as f64) as f32);
    }
    if !losses.iter().all(|loss| loss.is_finite()) {
        return Err(Error::data(
            "learning_rate",
            "is too high: the fit diverged",
        ));
    }
    let mut bias = vec![0.0; 2 * params.heads];
    // Soft-max weights sum to 1, so a value's bias is the request's.
    bias[0] = pooling.bias;
    let head = Head {
        site,
        weight: pooling.weight.into_iter().collect(),
        bias,
        out: 2 * params.heads,
        norm: InputNorm::Standard { mean, scale },
    };
    Ok(AttentionFit { head, losses })
}

impl AttentionData<'_> {
    /// Mean and spread of every dimension, each request weighing alike. Checks the data on the way.
    fn standardisation(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let requests = self.states.requests();
        if requests != self.y.len() {
            return Err(Error::data(
                "labels",
                format!("{} labels for {requests} requests", self.y.len()),
            ));
        }
        check_labels(self.y, self.group)?;
        let mut spread = Spread::default();
        let mut states = Vec::new();
        for request in 0..requests {
            self.read_checked(request, &mut states)?;
            spread.add(&states, self.states.width(), requests);
        }
        Ok(spread.finish())
    }

    fn read_checked(&self, request: usize, states: &mut Vec<f32>) -> Result<()> {
        let (tokens, width) = (self.states.tokens(request), self.states.width());
        states.clear();
        self.states.read(request, states);
        if states.is_empty() || Some(states.len()) != tokens.checked_mul(width) {
            return Err(Error::data(
                "activations",
                format!(
                    "request {request} has {} numbers for {tokens} tokens; [tokens, {width}] is \
                     needed, and at least one token",
                    states.len()
                ),
            ));
        }
        if states.iter().any(|value| !value.is_finite()) {
            return Err(Error::data(
                "activations",
                format!("request {request} is not finite"),
            ));
        }
        Ok(())
    }
}

/// Sums over requests, shifted by the first state, so that a large mean does not swallow a small
/// spread.
#[derive(Default)]
struct Spread {
    origin: Vec<f64>,
    mean: Vec<f64>,
    square: Vec<f64>,
}

impl Spread {
    fn add(&mut self, states: &[f32], width: usize, requests: usize) {
        if self.origin.is_empty() {
            self.origin = states[..width].iter().map(|v| f64::from(*v)).collect();
            self.mean = vec![0.0; width];
            self.square = vec![0.0; width];
        }
        let share = width as f64 / (states.len() as f64 * requests as f64);
        for token in states.chunks_exact(width) {
            let sums = self.mean.iter_mut().zip(&mut self.square);
            for ((value, origin), (mean, square)) in token.iter().zip(&self.origin).zip(sums) {
                let away = f64::from(*value) - origin;
                *mean += share * away;
                *square += share * away * away;
            }
        }
    }

    fn finish(self) -> (Vec<f32>, Vec<f32>) {
        let (mut centre, mut scale) = (Vec::new(), Vec::new());
        for ((origin, mean), square) in self.origin.iter().zip(&self.mean).zip(&self.square) {
            let deviation = (square - mean * mean).max(0.0).sqrt();
            let mean = origin + mean;
            centre.push(mean as f32);
            scale.push(match deviation > 1e-6 * (1e-3 + mean.abs()) {
                true => deviation as f32,
                false => 1.0,
            });
        }
        (centre, scale)
    }
}

/// The requests of one step, their standardised tokens one below the other.
struct Batch<'a> {
    mean: &'a [f32],
    scale: &'a [f32],
    /// `[tokens, width]`
    states: Vec<f32>,
    /// Per request, where its tokens end.
    ends: Vec<usize>,
    /// Per request, whether it is positive and what it weighs.
    labels: Vec<(bool, f32)>,
    /// One request as it was read.
    raw: Vec<f32>,
}

impl<'a> Batch<'a> {
    fn new(mean: &'a [f32], scale: &'a [f32]) -> Self {
        Self {
            mean,
            scale,
            states: Vec::new(),
            ends: Vec::new(),
            labels: Vec::new(),
            raw: Vec::new(),
        }
    }

    fn clear(&mut self) {
        self.states.clear();
        self.ends.clear();
        self.labels.clear();
    }

    fn push(
        &mut self,
        states: &dyn TokenStates,
        request: usize,
        dropout: f32,
        rng: &mut ChaCha8Rng,
    ) {
        self.raw.clear();
        states.read(request, &mut self.raw);
        for (index, token) in self.raw.chunks_exact(self.mean.len()).enumerate() {
            if index > 0 && dropout > 0.0 && rng.r#gen::<f32>() < dropout {
                continue;
            }
            let norm = self.mean.iter().zip(self.scale);
            let standardised = token
                .iter()
                .zip(norm)
                .map(|(v, (mean, scale))| (v - mean) / scale);
            self.states.extend(standardised);
        }
        self.ends.push(self.states.len() / self.mean.len());
    }

    fn x(&self) -> ArrayView2<'_, f32> {
        let shape = (self.ends.last().copied().unwrap_or(0), self.mean.len());
        ArrayView2::from_shape(shape, &self.states).expect("a batch holds whole tokens")
    }
}

impl AttentionParams {
    /// What can be judged without data.
    pub fn check(&self) -> Result<()> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        if !(1..=MAX_ATTENTION_HEADS).contains(&self.heads) {
            return Err(Error::invalid(
                "attention_heads",
                format!("must be 1 to {MAX_ATTENTION_HEADS}"),
            ));
        }
        let not_below_0 = |x: f32| x.is_finite() && x >= 0.0;
        for (name, sound, must) in [
            ("epochs", self.epochs > 0, "be above 0"),
            ("batch", self.batch > 0, "be above 0"),
            ("learning_rate", positive(self.learning_rate), "be above 0"),
            (
                "token_dropout",
                (0.0..1.0).contains(&self.token_dropout),
                "be at least 0 and below 1",
            ),
            (
                "alpha",
                not_below_0(self.alpha),
                "be finite and not below 0",
            ),
            (
                "weight_decay",
                not_below_0(self.weight_decay),
                "be finite and not below 0",
            ),
        ] {
            if !sound {
                return Err(Error::invalid(name, format!("must {must}")));
            }
        }
        Ok(())
    }
}

/// The parameters, or a gradient of the same shape.
struct Pooling {
    /// `[2 heads, d_model]`: the values' rows, then the keys'.
    weight: Array2<f32>,
    bias: f32,
}

impl Pooling {
    fn zero(heads: usize, d_model: usize) -> Self {
        Self {
            weight: Array2::zeros((2 * heads, d_model)),
            bias: 0.0,
        }
    }

    /// One head begins at zero; several must begin apart, or they stay alike: drawn from
    /// N(0, 0.02).
    fn drawn(heads: usize, d_model: usize, rng: &mut ChaCha8Rng) -> Self {
        let mut pooling = Self::zero(heads, d_model);
        if heads > 1 {
            pooling.weight.mapv_inplace(|_| 0.02 * normal(rng));
        }
        pooling
    }

    fn scale(&mut self, by: f32) {
        self.weight *= by;
        self.bias *= by;
    }

    /// The sums over a batch, each request times its weight. With weights `p_t = softmax(x_t key)`
    /// and values `u_t = x_t value` of a head: `dlogit/dvalue = sum p_t x_t`,
    /// `dlogit/dkey = sum p_t (u_t - sum p u) x_t`.
    fn gradient(&self, batch: &Batch<'_>) -> Gradient {
        let heads = self.weight.nrows() / 2;
        let x = batch.x();
        // [tokens, 2 heads]: values and keys, which become the slopes of the loss in them.
        let mut slopes = x.dot(&self.weight.t());
        let (mut loss, mut bias, mut start) = (0.0, 0.0, 0);
        for (end, (positive, weight)) in batch.ends.iter().zip(&batch.labels) {
            let mut request = slopes.slice_mut(s![start..*end, ..]);
            let logit = f64::from(self.bias) + pool(request.view_mut(), heads);
            let target = f64::from(u8::from(*positive));
            let error = (sigmoid(logit) - target) as f32 * weight;
            request *= error;
            bias += error;
            let sign = if *positive { -1.0 } else { 1.0 };
            loss += super::logistic::softplus(sign * logit) * f64::from(*weight);
            start = *end;
        }
        let weight = slopes.t().dot(&x);
        Gradient {
            slope: Self { weight, bias },
            loss,
        }
    }

    fn entries(&mut self) -> impl Iterator<Item = &mut f32> {
        self.weight
            .iter_mut()
            .chain(std::iter::once(&mut self.bias))
    }
}

struct Gradient {
    slope: Pooling,
    loss: f64,
}

/// One request's pooled values, whose slopes in values and keys take the place of these.
fn pool(mut outputs: ArrayViewMut2<'_, f32>, heads: usize) -> f64 {
    let mut logit = 0.0;
    for head in 0..heads {
        let weights = softmax(outputs.column(heads + head));
        let pooled: f32 = outputs.column(head).dot(&ArrayView1::from(&weights));
        logit += f64::from(pooled);
        for (mut token, weight) in outputs.rows_mut().into_iter().zip(weights) {
            let value = token[head];
            token[head] = weight;
            token[heads + head] = weight * (value - pooled);
        }
    }
    logit
}

/// Box and Muller 1958.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (radius, angle): (f64, f64) = (1.0 - rng.r#gen::<f64>(), rng.r#gen());
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

fn softmax(keys: ArrayView1<'_, f32>) -> Vec<f32> {
    let highest = keys.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut raised: Vec<f32> = keys.iter().map(|key| (key - highest).exp()).collect();
    let sum: f32 = raised.iter().sum();
    raised.iter_mut().for_each(|weight| *weight /= sum);
    raised
}

/// AdamW (Loshchilov and Hutter 2019), whose rate rises and then falls to 0; the bias does not
/// decay.
struct AdamW {
    first: Vec<f32>,
    second: Vec<f32>,
    rate: f32,
    decay: f32,
    done: usize,
    warm_up: usize,
    steps: usize,
}

impl AdamW {
    fn new(like: &Pooling, params: &AttentionParams, steps: usize) -> Self {
        let entries = like.weight.len() + 1;
        Self {
            first: vec![0.0; entries],
            second: vec![0.0; entries],
            rate: params.learning_rate,
            decay: params.weight_decay,
            done: 0,
            warm_up: params.warm_up.min(steps / 10),
            steps,
        }
    }

    fn rate_now(&self) -> f32 {
        let along = self.done as f32 / self.steps as f32;
        let risen = (self.done + 1) as f32 / self.warm_up.max(1) as f32;
        self.rate * risen.min(1.0) * 0.5 * (1.0 + (PI * along).cos())
    }

    fn step(&mut self, at: &mut Pooling, gradient: &Pooling) {
        // The squares fade faster than usual: there are a thousand steps, not a million.
        const FADE: (f32, f32) = (0.9, 0.99);
        let rate = self.rate_now();
        self.done += 1;
        at.weight *= 1.0 - rate * self.decay;
        let steps = i32::try_from(self.done).unwrap_or(i32::MAX);
        let rate = rate * (1.0 - FADE.1.powi(steps)).sqrt() / (1.0 - FADE.0.powi(steps));
        let slopes = gradient.weight.iter().chain([&gradient.bias]);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((entry, slope), (first, second)) in at.entries().zip(slopes).zip(moments) {
            *first = FADE.0 * *first + (1.0 - FADE.0) * slope;
            *second = FADE.1 * *second + (1.0 - FADE.1) * slope * slope;
            *entry -= rate * *first / (second.sqrt() + 1e-8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gather::{AttentionHeads, Gather, GatherState, TokenOutput};

    struct Requests {
        x: Vec<Array2<f32>>,
        y: Vec<bool>,
        group: Vec<String>,
    }

    impl Requests {
        fn fit(&self, params: &AttentionParams) -> Result<AttentionFit> {
            let data = AttentionData {
                states: &self.x,
                y: &self.y,
                group: &self.group,
            };
            fit_attention(data, Site::Embed, params)
        }
    }

    /// A request is positive when one of its tokens, anywhere, is marked in dimension 2.
    fn needles(requests: usize, seed: u64) -> Requests {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let y: Vec<bool> = (0..requests).map(|row| row % 2 == 0).collect();
        let x = y.iter().map(|positive| {
            let tokens = rng.gen_range(6..14);
            let mut x = Array2::from_shape_fn((tokens, 8), |_| rng.gen_range(-1.0_f32..1.0));
            let place = rng.gen_range(0..tokens);
            if *positive {
                x[[place, 2]] = 3.0;
            }
            x
        });
        let x = x.collect();
        let group = (0..requests).map(|row| row.to_string()).collect();
        Requests { x, y, group }
    }

    fn gathered(head: &Head, x: &Array2<f32>) -> f32 {
        let mut state = GatherState::new(&Gather::Attention);
        for token in x.rows() {
            let out = head.apply(&token.to_vec()).unwrap();
            let (values, keys) = out.split_at(out.len() / 2);
            let pairs = values.iter().copied().zip(keys.iter().copied());
            let output = TokenOutput {
                logit: values.iter().sum(),
                attention: AttentionHeads::new(pairs).unwrap(),
            };
            state.push(&output).unwrap();
        }
        state.value().unwrap()
    }

    #[test]
    fn attention_finds_the_token_that_matters() {
        for heads in [1, 4] {
            let params = AttentionParams {
                heads,
                epochs: 40,
                batch: 32,
                learning_rate: 2e-2,
                weight_decay: 0.01,
                // A request without its needle cannot be told from others.
                token_dropout: 0.0,
                ..AttentionParams::default()
            };
            let fit = needles(400, 1).fit(&params).unwrap();
            let fresh = needles(200, 2);
            let logits: Vec<f32> = fresh.x.iter().map(|x| gathered(&fit.head, x)).collect();
            let auroc = crate::metrics::auroc(&logits, &fresh.y).unwrap();
            assert!(auroc > 0.98, "{heads}: {auroc} {:?}", fit.losses);
            assert!(fit.losses[39] < 0.5 * fit.losses[0]);
        }
    }

    #[test]
    fn the_rate_rises_falls_and_ends_near_zero() {
        let params = AttentionParams::default();
        let mut adam = AdamW::new(&Pooling::zero(1, 3), &params, 1000);
        let mut at = |done: usize| {
            adam.done = done;
            adam.rate_now() / params.learning_rate
        };
        assert!((at(0) - 0.02).abs() < 1e-6 && at(24) < at(49));
        assert!(at(60) > 0.98 && (at(500) - 0.5).abs() < 1e-3 && at(999) < 1e-4);
    }

    #[test]
    fn dropped_tokens_are_about_that_share_and_never_the_first() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let request = |tokens: usize| {
            vec![Array2::from_shape_fn((tokens, 1), |(token, _)| {
                token as f32
            })]
        };
        let mut seen = |states: &dyn TokenStates, dropout: f32| {
            let mut batch = Batch::new(&[0.0], &[1.0]);
            batch.push(states, 0, dropout, &mut rng);
            batch.states.clone()
        };
        let kept = seen(&request(1000), 0.3);
        assert!((650..750).contains(&kept.len()), "{}", kept.len());
        assert_eq!(kept[0], 0.0);
        assert_eq!(seen(&request(1000), 0.0).len(), 1000);
        assert!((0..50).all(|_| seen(&request(1), 0.9).len() == 1));
    }

    #[test]
    fn settings_that_mean_nothing_are_refused() {
        let check = |change: fn(&mut AttentionParams), field: &str| {
            let mut bad = AttentionParams::default();
            change(&mut bad);
            let error = needles(10, 1).fit(&bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        };
        check(|p| p.heads = 0, "attention_heads");
        check(|p| p.heads = MAX_ATTENTION_HEADS + 1, "attention_heads");
        check(|p| p.token_dropout = 1.0, "token_dropout");
        check(|p| p.token_dropout = f32::NAN, "token_dropout");
        check(|p| p.batch = 0, "batch");
        check(|p| p.learning_rate = f32::NAN, "learning_rate");
        check(|p| p.weight_decay = -1.0, "weight_decay");
        check(|p| p.token_dropout = 1.0, "token_dropout");
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        let data = needles(3, 3);
        let (mean, scale) = (vec![0.1; 8], vec![0.9; 8]);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut batch = Batch::new(&mean, &scale);
        for row in 0..3 {
            batch.push(&data.x, row, 0.0, &mut rng);
            batch.labels.push((data.y[row], 0.5 + row as f32));
        }
        let mut at = Pooling::zero(2, 8);
        at.entries()
            .for_each(|entry| *entry = rng.gen_range(-0.5..0.5));
        let mut gradient = at.gradient(&batch).slope;
        let slopes: Vec<f32> = gradient.entries().map(|entry| *entry).collect();
        for (index, slope) in slopes.into_iter().enumerate() {
            let mut nudged = |by: f32| {
                *at.entries().nth(index).unwrap() += by;
                let loss = at.gradient(&batch).loss;
                *at.entries().nth(index).unwrap() -= by;
                loss
            };
            let measured = (nudged(1e-2) - nudged(-1e-2)) / 2e-2;
            assert!(
                (measured - f64::from(slope)).abs() < 5e-3,
                "{index}: {measured} {slope}"
            );
        }
    }

    #[test]
    fn dropped_tokens_are_a_share_and_never_the_first() {
        let x = vec![Array2::from_shape_fn((1000, 2), |(token, _)| token as f32)];
        let (mean, scale) = (vec![0.0; 2], vec![1.0; 2]);
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for dropout in [0.0, 0.3, 0.99] {
            let mut batch = Batch::new(&mean, &scale);
            batch.push(&x, 0, dropout, &mut rng);
            let kept = batch.x().nrows() as f32 / 1000.0;
            assert_eq!(batch.x()[[0, 0]], 0.0);
            assert!((kept + dropout - 1.0).abs() < 0.05, "{dropout}: {kept}");
        }
    }

    #[test]
    fn what_is_drawn_has_the_spread_that_it_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let drawn = Pooling::drawn(8, 500, &mut rng).weight;
        let count = drawn.len() as f32;
        let mean = drawn.sum() / count;
        let deviation = (drawn.mapv(|w| (w - mean) * (w - mean)).sum() / count).sqrt();
        assert!(
            mean.abs() < 1e-3 && (deviation - 0.02).abs() < 1e-3,
            "{mean} {deviation}"
        );
        let one = Pooling::drawn(1, 5, &mut rng).weight;
        assert_eq!(one, Array2::<f32>::zeros((2, 5)));
    }

    #[test]
    fn the_same_seed_gives_the_same_bits() {
        let data = needles(40, 5);
        let params = AttentionParams {
            epochs: 3,
            ..AttentionParams::default()
        };
        assert_eq!(data.fit(&params).unwrap(), data.fit(&params).unwrap());
    }

    #[test]
    fn requests_without_tokens_or_of_another_width_are_refused() {
        for bad in [
            Array2::zeros((0, 8)),
            Array2::zeros((3, 7)),
            Array2::from_elem((3, 8), f32::NAN),
        ] {
            let mut data = needles(10, 6);
            data.x[4] = bad;
            let message = data
                .fit(&AttentionParams::default())
                .unwrap_err()
                .to_string();
            assert!(message.contains("request 4"), "{message}");
        }
    }
}
