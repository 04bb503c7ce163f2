//! Fits an attention-gathered probe: a value and a key vector over all tokens of a request,
//! `logit = sum_t softmax(key)_t value_t`, by AdamW on the logistic loss.
//! Several sites are fitted together when their states lie side by side.

use ndarray::{Array1, Array2, ArrayView1, Axis};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{ClassWeight, check_labels, weighted_rows};
use crate::calibration::sigmoid;
use crate::error::{Error, Result};
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
    pub epochs: usize,
    /// Requests per step.
    pub batch: usize,
    pub learning_rate: f32,
    /// L2 penalty on value and key, per row: a part of the gradient.
    pub alpha: f32,
    /// Share of value and key that each step takes away, times the learning rate: beside the
    /// gradient (Loshchilov and Hutter 2019).
    pub weight_decay: f32,
    pub class_weight: ClassWeight,
    pub seed: u64,
}

impl Default for AttentionParams {
    fn default() -> Self {
        Self {
            epochs: 20,
            batch: 32,
            learning_rate: 3e-3,
            alpha: 1e-3,
            weight_decay: 0.0,
            class_weight: ClassWeight::default(),
            seed: 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttentionFit {
    /// `out` is 2: row 0 the value, row 1 the key.
    pub head: Head,
    /// Mean logistic loss of each epoch, as it was met during the epoch.
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
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    let mut rows = weighted_rows(&data.y, &data.group, params.class_weight, params.seed);
    let mut pooling = Pooling::zero(mean.len());
    let mut adam = AdamW::new(2 * mean.len() + 1, params);
    let mut losses = Vec::with_capacity(params.epochs);
    for _ in 0..params.epochs {
        rows.shuffle(&mut rng);
        let mut loss = 0.0;
        for batch in rows.chunks(params.batch) {
            let mut gradient = Pooling::zero(mean.len());
            for row in batch {
                loss += pooling.add_gradient(&data.x[*row], data.y[*row], &mut gradient);
            }
            gradient.scale(1.0 / batch.len() as f32);
            gradient.value.scaled_add(params.alpha, &pooling.value);
            gradient.key.scaled_add(params.alpha, &pooling.key);
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
    let mut weight = pooling.value.to_vec();
    weight.extend(pooling.key.iter());
    let head = Head {
        site,
        weight,
        bias: vec![pooling.bias, 0.0],
        out: 2,
        norm: InputNorm::Standard { mean, scale },
    };
    Ok(AttentionFit { head, losses })
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
        if self.epochs == 0 || self.batch == 0 || !positive(self.learning_rate) {
            return Err(Error::data(
                "epochs, batch, learning_rate",
                "must be above 0",
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
    value: Array1<f32>,
    key: Array1<f32>,
    bias: f32,
}

impl Pooling {
    fn zero(d_model: usize) -> Self {
        Self {
            value: Array1::zeros(d_model),
            key: Array1::zeros(d_model),
            bias: 0.0,
        }
    }

    fn scale(&mut self, by: f32) {
        self.value *= by;
        self.key *= by;
        self.bias *= by;
    }

    /// Adds one request's gradient and gives its loss. With weights `p_t = softmax(x_t key)` and
    /// values `u_t = x_t value`: `dlogit/dvalue = sum p_t x_t`,
    /// `dlogit/dkey = sum p_t (u_t - sum p u) x_t`.
    fn add_gradient(&self, x: &Array2<f32>, positive: bool, gradient: &mut Self) -> f32 {
        let weights = softmax(x.dot(&self.key).view());
        let values = x.dot(&self.value);
        let pooled = weights.dot(&values);
        let logit = f64::from(pooled + self.bias);
        let error = (sigmoid(logit) - f64::from(u8::from(positive))) as f32;
        // Token by token: a product with the transposed states would read them column by column.
        for ((token, weight), value) in x.rows().into_iter().zip(&weights).zip(&values) {
            gradient.value.scaled_add(error * weight, &token);
            let pull = error * weight * (value - pooled);
            gradient.key.scaled_add(pull, &token);
        }
        gradient.bias += error;
        let sign = if positive { -1.0 } else { 1.0 };
        super::logistic::softplus(sign * logit) as f32
    }

    fn entries(&mut self) -> impl Iterator<Item = &mut f32> {
        let vectors = self.value.iter_mut().chain(self.key.iter_mut());
        vectors.chain(std::iter::once(&mut self.bias))
    }
}

fn softmax(keys: ArrayView1<'_, f32>) -> Array1<f32> {
    let highest = keys.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let raised = keys.mapv(|key| (key - highest).exp());
    let sum = raised.sum();
    raised / sum
}

/// AdamW (Loshchilov and Hutter 2019) with its usual constants; the bias does not decay.
struct AdamW {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
    rate: f32,
    decay: f32,
}

impl AdamW {
    fn new(len: usize, params: &AttentionParams) -> Self {
        Self {
            first: vec![0.0; len],
            second: vec![0.0; len],
            steps: 0,
            rate: params.learning_rate,
            decay: params.weight_decay,
        }
    }

    fn step(&mut self, at: &mut Pooling, gradient: &Pooling) {
        const FADE: (f32, f32) = (0.9, 0.999);
        self.steps = self.steps.saturating_add(1);
        let kept = 1.0 - self.rate * self.decay;
        at.value *= kept;
        at.key *= kept;
        let rate =
            self.rate * (1.0 - FADE.1.powi(self.steps)).sqrt() / (1.0 - FADE.0.powi(self.steps));
        let slopes = gradient
            .value
            .iter()
            .chain(&gradient.key)
            .chain([&gradient.bias]);
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
    use crate::gather::{Gather, GatherState, TokenOutput};
    use rand::Rng;

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
            state
                .push(TokenOutput {
                    logit: out[0],
                    key: Some(out[1]),
                })
                .unwrap();
        }
        state.value().unwrap()
    }

    #[test]
    fn attention_finds_the_token_that_matters() {
        let params = AttentionParams {
            epochs: 40,
            learning_rate: 2e-2,
            ..AttentionParams::default()
        };
        let fit = fit_attention(needles(400, 1), Site::Embed, &params).unwrap();
        let fresh = needles(200, 2);
        let logits: Vec<f32> = fresh.x.iter().map(|x| gathered(&fit.head, x)).collect();
        let auroc = crate::metrics::auroc(&logits, &fresh.y).unwrap();
        assert!(auroc > 0.98, "{auroc} {:?}", fit.losses);
        assert!(fit.losses[39] < 0.5 * fit.losses[0]);
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        let data = needles(2, 3);
        let mut at = Pooling::zero(8);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        at.entries()
            .for_each(|entry| *entry = rng.gen_range(-0.5..0.5));
        let mut gradient = Pooling::zero(8);
        at.add_gradient(&data.x[0], true, &mut gradient);
        let slopes: Vec<f32> = gradient.entries().map(|entry| *entry).collect();
        for (index, slope) in slopes.into_iter().enumerate() {
            let mut nudged = |by: f32| {
                *at.entries().nth(index).unwrap() += by;
                let loss = at.add_gradient(&data.x[0], true, &mut Pooling::zero(8));
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
