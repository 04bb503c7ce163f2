//! Fits an attention-gathered probe: for each head a value and a key vector over all tokens of a
//! request, `logit = b + sum_h sum_t softmax_t(key_h) value_{h,t}`, by AdamW on the logistic loss.
//! Several sites are fitted together when their states lie side by side.

use std::borrow::Cow;
use std::f32::consts::PI;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView1, Axis};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{ClassWeight, check_labels};
use crate::calibration::sigmoid;
use crate::error::{Error, Result};
use crate::gather::MAX_ATTENTION_HEADS;
use crate::probe::{Head, InputNorm};
use crate::site::Site;

/// The states of every scored token of each request.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionData {
    /// One `[tokens, d_model]` per request.
    pub x: Vec<Array2<f32>>,
    pub y: Vec<bool>,
    pub group: Vec<String>,
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
    /// Share of a request's tokens that a step does not see, drawn anew each time, never the first:
    /// the heads must not lean on one token.
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
/// Takes the data, since the states of all tokens are large and are standardised in place.
pub fn fit_attention(
    mut data: AttentionData,
    site: Site,
    params: &AttentionParams,
) -> Result<AttentionFit> {
    data.check()?;
    params.check()?;
    let (mean, scale) = data.standardise();
    let weights = params.class_weight.of_rows(&data.y);
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    let mut rows: Vec<usize> = (0..data.y.len()).collect();
    let mut pooling = Pooling::drawn(params.heads, mean.len(), &mut rng);
    let steps = params.epochs * rows.len().div_ceil(params.batch);
    let mut adam = AdamW::new(&pooling, params, steps);
    let mut losses = Vec::with_capacity(params.epochs);
    for _ in 0..params.epochs {
        rows.shuffle(&mut rng);
        let mut loss = 0.0;
        for batch in rows.chunks(params.batch) {
            let mut gradient = Pooling::zero(params.heads, mean.len());
            for row in batch {
                let x = seen(&data.x[*row], params.token_dropout, &mut rng);
                loss += pooling.add_gradient(&x, data.y[*row], weights[*row], &mut gradient);
            }
            gradient.scale(1.0 / batch.len() as f32);
            gradient.weight.scaled_add(params.alpha, &pooling.weight);
            adam.step(&mut pooling, &gradient);
        }
        losses.push(loss / rows.len() as f32);
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

/// The tokens of a request that one step sees.
fn seen<'a>(x: &'a Array2<f32>, dropout: f32, rng: &mut ChaCha8Rng) -> Cow<'a, Array2<f32>> {
    if dropout == 0.0 {
        return Cow::Borrowed(x);
    }
    let mut kept = |token: &usize| *token == 0 || rng.r#gen::<f32>() >= dropout;
    let tokens: Vec<usize> = (0..x.nrows()).filter(|token| kept(token)).collect();
    Cow::Owned(x.select(Axis(0), &tokens))
}

impl AttentionData {
    fn check(&self) -> Result<()> {
        if self.x.len() != self.y.len() {
            return Err(Error::data(
                "labels",
                format!("{} labels for {} requests", self.y.len(), self.x.len()),
            ));
        }
        check_labels(&self.y, &self.group)?;
        let d_model = self.x[0].ncols();
        for (row, x) in self.x.iter().enumerate() {
            if x.nrows() == 0 || x.ncols() == 0 || x.ncols() != d_model {
                return Err(Error::data(
                    "activations",
                    format!(
                        "request {row} has shape {:?}; [tokens, {d_model}] is needed",
                        x.dim()
                    ),
                ));
            }
            if x.iter().any(|value| !value.is_finite()) {
                return Err(Error::data(
                    "activations",
                    format!("request {row} is not finite"),
                ));
            }
        }
        Ok(())
    }

    /// Brings every dimension to mean 0 and scale 1, and gives what was taken away.
    fn standardise(&mut self) -> (Vec<f32>, Vec<f32>) {
        let (mean, scale) = self.standardisation();
        let (centre, width) = (ArrayView1::from(&mean), ArrayView1::from(&scale));
        for x in &mut self.x {
            *x -= &centre;
            *x /= &width;
        }
        (mean, scale)
    }

    /// Over the requests' mean states and their spread within, weighting requests alike.
    fn standardisation(&self) -> (Vec<f32>, Vec<f32>) {
        let d_model = self.x[0].ncols();
        let requests = self.x.len() as f64;
        let mut mean = Array1::<f64>::zeros(d_model);
        let mut square = Array1::<f64>::zeros(d_model);
        // Shifted by the first state, so that a large mean does not swallow a small spread.
        let origin: Array1<f64> = self.x[0].row(0).mapv(f64::from);
        for x in &self.x {
            let away = x.mapv(f64::from) - &origin;
            let tokens = x.nrows() as f64;
            mean += &(away.sum_axis(Axis(0)) / (tokens * requests));
            square += &(away.mapv(|v| v * v).sum_axis(Axis(0)) / (tokens * requests));
        }
        let deviation = (&square - &(&mean * &mean)).mapv(|v| v.max(0.0).sqrt());
        let mean = mean + origin;
        let varies = |(d, m): (&f64, &f64)| {
            if *d > 1e-6 * (1e-3 + m.abs()) {
                *d as f32
            } else {
                1.0
            }
        };
        let scale = deviation.iter().zip(&mean).map(varies).collect();
        (mean.iter().map(|m| *m as f32).collect(), scale)
    }
}

impl AttentionParams {
    fn check(&self) -> Result<()> {
        let positive = |x: f32| x.is_finite() && x > 0.0;
        if !(1..=MAX_ATTENTION_HEADS).contains(&self.heads) {
            return Err(Error::data(
                "attention_heads",
                format!("must be 1 to {MAX_ATTENTION_HEADS}"),
            ));
        }
        if self.epochs == 0 || self.batch == 0 || !positive(self.learning_rate) {
            return Err(Error::data(
                "epochs, batch, learning_rate",
                "must be above 0",
            ));
        }
        if !(0.0..1.0).contains(&self.token_dropout) {
            return Err(Error::data(
                "token_dropout",
                "must be at least 0 and below 1",
            ));
        }
        let not_below_0 = |x: f32| x.is_finite() && x >= 0.0;
        if !(not_below_0(self.alpha) && not_below_0(self.weight_decay)) {
            return Err(Error::data(
                "alpha, weight_decay",
                "must be finite and not below 0",
            ));
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

    /// One head begins at zero; several must begin apart, or they stay alike: evenly drawn with a
    /// standard deviation of 0.02.
    fn drawn(heads: usize, d_model: usize, rng: &mut ChaCha8Rng) -> Self {
        let mut pooling = Self::zero(heads, d_model);
        if heads > 1 {
            let most = 0.02 * 3f32.sqrt();
            pooling.weight.mapv_inplace(|_| rng.gen_range(-most..most));
        }
        pooling
    }

    fn scale(&mut self, by: f32) {
        self.weight *= by;
        self.bias *= by;
    }

    /// Adds one request's gradient and gives its loss, both times `row_weight`. With weights
    /// `p_t = softmax(x_t key)` and values `u_t = x_t value` of a head: `dlogit/dvalue = sum p_t x_t`,
    /// `dlogit/dkey = sum p_t (u_t - sum p u) x_t`.
    fn add_gradient(
        &self,
        x: &Array2<f32>,
        positive: bool,
        row_weight: f32,
        gradient: &mut Self,
    ) -> f32 {
        let heads = self.weight.nrows() / 2;
        // [tokens, 2 heads]: values and keys, which become the slopes of the logit in them.
        let mut slopes = x.dot(&self.weight.t());
        let mut logit = f64::from(self.bias);
        for head in 0..heads {
            let weights = softmax(slopes.column(heads + head));
            let pooled: f32 = slopes.column(head).dot(&ArrayView1::from(&weights));
            logit += f64::from(pooled);
            for (token, weight) in weights.into_iter().enumerate() {
                let value = slopes[[token, head]];
                slopes[[token, head]] = weight;
                slopes[[token, heads + head]] = weight * (value - pooled);
            }
        }
        let error = (sigmoid(logit) - f64::from(u8::from(positive))) as f32 * row_weight;
        general_mat_mul(error, &slopes.t(), x, 1.0, &mut gradient.weight);
        gradient.bias += error;
        let sign = if positive { -1.0 } else { 1.0 };
        super::logistic::softplus(sign * logit) as f32 * row_weight
    }

    fn entries(&mut self) -> impl Iterator<Item = &mut f32> {
        self.weight
            .iter_mut()
            .chain(std::iter::once(&mut self.bias))
    }
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

    /// A request is positive when one of its tokens, anywhere, is marked in dimension 2.
    fn needles(requests: usize, seed: u64) -> AttentionData {
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
        AttentionData { x, y, group }
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
            state.push(output).unwrap();
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
                token_dropout: 0.0,
                ..AttentionParams::default()
            };
            let fit = fit_attention(needles(400, 1), Site::Embed, &params).unwrap();
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
        let x = Array2::from_shape_fn((1000, 1), |(token, _)| token as f32);
        let kept = seen(&x, 0.3, &mut rng);
        assert!((650..750).contains(&kept.nrows()), "{}", kept.nrows());
        assert_eq!(kept[[0, 0]], 0.0);
        assert_eq!(*seen(&x, 0.0, &mut rng), x);
        let one = Array2::zeros((1, 1));
        assert!((0..50).all(|_| seen(&one, 0.9, &mut rng).nrows() == 1));
    }

    #[test]
    fn settings_that_mean_nothing_are_refused() {
        let check = |change: fn(&mut AttentionParams), field: &str| {
            let mut bad = AttentionParams::default();
            change(&mut bad);
            let error = fit_attention(needles(10, 1), Site::Embed, &bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        };
        check(|p| p.heads = 0, "attention_heads");
        check(|p| p.heads = 17, "attention_heads");
        check(|p| p.batch = 0, "batch");
        check(|p| p.learning_rate = f32::NAN, "learning_rate");
        check(|p| p.weight_decay = -1.0, "weight_decay");
        check(|p| p.token_dropout = 1.0, "token_dropout");
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        let data = needles(2, 3);
        let mut at = Pooling::zero(2, 8);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        at.entries()
            .for_each(|entry| *entry = rng.gen_range(-0.5..0.5));
        let mut gradient = Pooling::zero(2, 8);
        at.add_gradient(&data.x[0], true, 1.5, &mut gradient);
        let slopes: Vec<f32> = gradient.entries().map(|entry| *entry).collect();
        for (index, slope) in slopes.into_iter().enumerate() {
            let mut nudged = |by: f32| {
                *at.entries().nth(index).unwrap() += by;
                let loss = at.add_gradient(&data.x[0], true, 1.5, &mut Pooling::zero(2, 8));
                *at.entries().nth(index).unwrap() -= by;
                loss
            };
            let measured = (nudged(1e-2) - nudged(-1e-2)) / 2e-2;
            assert!(
                (measured - slope).abs() < 2e-3,
                "{index}: {measured} {slope}"
            );
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits() {
        let data = needles(40, 5);
        let params = AttentionParams {
            epochs: 3,
            ..AttentionParams::default()
        };
        let first = fit_attention(data.clone(), Site::Embed, &params).unwrap();
        assert_eq!(first, fit_attention(data, Site::Embed, &params).unwrap());
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
            let message = fit_attention(data, Site::Embed, &AttentionParams::default())
                .unwrap_err()
                .to_string();
            assert!(message.contains("request 4"), "{message}");
        }
    }
}
