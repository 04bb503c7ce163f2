//! Fits SafeSwitch's prober, `logits = W2 relu(W1 x + b1) + b2` (arXiv 2502.01042), with candle.
//! Knows states and labels; knows no model and no files.
//!
//! The authors apply softmax before a cross-entropy that applies it again, which flattens the
//! scores; here it is applied once.

use candle_core::{Device, Tensor, Var};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use inwit_probes::fit::{ClassWeight, FitData};
use inwit_probes::{Head, InputNorm, NormKind, Site, TwoLayer};

use super::fit::unfit;
use super::seeded::Seeded;
use crate::error::{Error, Result};

/// Benign, then harmful; or refused, then complied.
const CLASSES: usize = 2;

#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Units between the layers; SafeSwitch has 64.
    pub hidden: usize,
    pub epochs: usize,
    /// Rows per step.
    pub batch: usize,
    pub learning_rate: f64,
    /// AdamW's: the share that each step takes away, times the learning rate.
    pub weight_decay: f64,
    pub class_weight: ClassWeight,
    pub seed: u64,
}

impl Default for Params {
    /// SafeSwitch's, but for the learning rate: theirs is 1e-5, on states that are not standardised
    /// and seven times as wide.
    fn default() -> Self {
        Self {
            hidden: 64,
            epochs: 20,
            batch: 8,
            learning_rate: 1e-4,
            weight_decay: 0.01,
            class_weight: ClassWeight::default(),
            seed: 0,
        }
    }
}

/// The first layer as a head of `hidden` outputs, and the second with two: the probe's logit is
/// that of class 1 minus that of class 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    pub head: Head,
    pub prober: TwoLayer,
    /// Mean cross-entropy of each epoch, as it was met during the epoch.
    pub losses: Vec<f32>,
}

/// Fits on standardised states. Deterministic given the seed.
pub fn fit(data: &FitData, site: Site, params: &Params) -> Result<Fitted> {
    params.check()?;
    let (norm, x) = data.normalised(NormKind::Standard).map_err(unfit)?;
    let rows = data.weighted_rows(params.class_weight, params.seed);
    let (count, width) = x.dim();
    let x = Tensor::from_vec(x.into_iter().collect(), (count, width), &Device::Cpu)?;
    let y: Vec<u32> = data.y.iter().map(|positive| u32::from(*positive)).collect();
    let y = Tensor::from_vec(y, count, &Device::Cpu)?;

    let mut random = Seeded::new(params.seed);
    let layers = Layers::new(width, params.hidden, &mut random)?;
    let mut optimiser = AdamW::new(
        layers.all(),
        ParamsAdamW {
            lr: params.learning_rate,
            weight_decay: params.weight_decay,
            ..ParamsAdamW::default()
        },
    )?;
    let mut order: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    let mut losses = Vec::new();
    for _ in 0..params.epochs {
        random.shuffle(&mut order);
        let mut total = 0.0;
        for batch in order.chunks(params.batch) {
            let chosen = Tensor::new(batch, &Device::Cpu)?;
            let logits = layers.logits(&x.index_select(&chosen, 0)?)?;
            let loss = cross_entropy(&logits, &y.index_select(&chosen, 0)?)?;
            optimiser.backward_step(&loss)?;
            total += loss.to_scalar::<f32>()? * batch.len() as f32;
        }
        losses.push(total / order.len() as f32);
    }
    if !losses.iter().all(|loss| loss.is_finite()) {
        return Err(Error::invalid(
            "learning_rate",
            "is too high: the fit diverged",
        ));
    }
    layers.fitted(site, norm, losses)
}

impl Params {
    /// What can be judged without a state.
    pub fn check(&self) -> Result<()> {
        if !(1..=inwit_probes::manifest::MAX_HEAD_OUTPUTS).contains(&self.hidden) {
            let most = inwit_probes::manifest::MAX_HEAD_OUTPUTS;
            return Err(Error::invalid("hidden", format!("must be 1 to {most}")));
        }
        for (name, count) in [("epochs", self.epochs), ("batch", self.batch)] {
            if count == 0 {
                return Err(Error::invalid(name, "must be above 0"));
            }
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return Err(Error::invalid("learning_rate", "must be above 0"));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(Error::invalid("weight_decay", "must not be below 0"));
        }
        Ok(())
    }
}

/// Inputs come first, so that gradients have the layout of what they change.
struct Layers {
    /// `[width, hidden]`
    w1: Var,
    b1: Var,
    /// `[hidden, CLASSES]`
    w2: Var,
    b2: Var,
}

impl Layers {
    /// Even draws within `1 / sqrt(inputs)`, as PyTorch's linear layers begin.
    fn new(width: usize, hidden: usize, random: &mut Seeded) -> Result<Self> {
        let mut drawn = |rows: usize, columns: usize, inputs: usize| -> Result<Var> {
            let bound = 1.0 / (inputs as f32).sqrt();
            let values: Vec<f32> = (0..rows * columns)
                .map(|_| random.signed() * bound)
                .collect();
            let values = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
            Ok(Var::from_tensor(&values)?)
        };
        Ok(Self {
            w1: drawn(width, hidden, width)?,
            b1: drawn(1, hidden, width)?,
            w2: drawn(hidden, CLASSES, hidden)?,
            b2: drawn(1, CLASSES, hidden)?,
        })
    }

    fn all(&self) -> Vec<Var> {
        [&self.w1, &self.b1, &self.w2, &self.b2]
            .map(Var::clone)
            .to_vec()
    }

    /// `[rows, width]` to `[rows, CLASSES]`
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = x.matmul(&self.w1)?.broadcast_add(&self.b1)?.relu()?;
        Ok(hidden.matmul(&self.w2)?.broadcast_add(&self.b2)?)
    }

    fn fitted(&self, site: Site, norm: InputNorm, losses: Vec<f32>) -> Result<Fitted> {
        // A file's rows are outputs.
        let values = |var: &Var| -> Result<Vec<f32>> { Ok(var.t()?.flatten_all()?.to_vec1()?) };
        let bias = values(&self.b1)?;
        Ok(Fitted {
            head: Head {
                site,
                weight: values(&self.w1)?,
                out: bias.len(),
                bias,
                norm,
            },
            prober: TwoLayer {
                w2: values(&self.w2)?,
                b2: values(&self.b2)?,
                out: CLASSES,
            },
            losses,
        })
    }
}

#[cfg(test)]
mod tests {
    use inwit_probes::metrics::auroc;
    use inwit_probes::{Kind, Manifest, ModelIdentity, Positions, Probe};
    use ndarray::Array2;

    use super::*;

    /// Positive where two coordinates have one sign: no plane separates that.
    fn quadrants(rows: usize, seed: u64) -> FitData {
        let mut seeded = Seeded::new(seed);
        let x = Array2::from_shape_fn((rows, 4), |(_, d)| {
            let wide = if d == 0 { 50.0 } else { 1.0 };
            wide * seeded.signed() + 7.0
        });
        let y = x
            .rows()
            .into_iter()
            .map(|h| (h[0] > 7.0) == (h[1] > 7.0))
            .collect();
        let group = (0..rows).map(|row| row.to_string()).collect();
        FitData { x, y, group }
    }

    fn params() -> Params {
        Params {
            hidden: 16,
            epochs: 40,
            learning_rate: 1e-2,
            seed: 3,
            ..Params::default()
        }
    }

    fn probe(fitted: Fitted) -> Probe {
        let identity = ModelIdentity {
            name: "m".into(),
            architecture_id: "a".into(),
            weights_id: "w".into(),
            weight_format: "f32".into(),
        };
        let manifest = Manifest::new("p", Kind::TwoLayer, 4, Positions::LastPromptToken, identity);
        Probe::new(manifest, vec![fitted.head], Some(fitted.prober)).expect("a probe")
    }

    #[test]
    fn a_prober_learns_what_no_plane_separates() {
        let probe = probe(fit(&quadrants(400, 1), Site::Embed, &params()).expect("fits"));
        let fresh = quadrants(200, 2);
        let logits: Vec<f32> = fresh
            .x
            .rows()
            .into_iter()
            .map(|h| {
                probe
                    .score_row(|_| h.to_slice().expect("a row"))
                    .expect("scores")
                    .logit
            })
            .collect();
        let found = auroc(&logits, &fresh.y).expect("ranks");
        assert!(found > 0.95, "{found}");
    }

    #[test]
    fn the_probes_logit_is_that_of_class_1_minus_that_of_class_0() {
        let data = quadrants(40, 4);
        let fitted = fit(&data, Site::Embed, &params()).expect("fits");
        let (norm, x) = data.normalised(NormKind::Standard).expect("normalises");
        assert_eq!(norm, fitted.head.norm);
        let hidden = |row: usize| -> Vec<f32> {
            let weights = fitted.head.weight.chunks(4).zip(&fitted.head.bias);
            weights
                .map(|(w, b)| {
                    (w.iter().zip(x.row(row)).map(|(w, x)| w * x).sum::<f32>() + b).max(0.0)
                })
                .collect()
        };
        let logit = |row: usize, class: usize| -> f32 {
            let units = hidden(row);
            let w2 = &fitted.prober.w2[class * 16..(class + 1) * 16];
            units.iter().zip(w2).map(|(h, w)| h * w).sum::<f32>() + fitted.prober.b2[class]
        };
        let expected: Vec<f32> = (0..40).map(|row| logit(row, 1) - logit(row, 0)).collect();
        let probe = probe(fitted);
        for (row, expected) in data.x.rows().into_iter().zip(expected) {
            let got = probe
                .score_row(|_| row.to_slice().expect("a row"))
                .expect("scores");
            assert!(
                (got.logit - expected).abs() < 1e-3,
                "{} {expected}",
                got.logit
            );
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits_and_another_seed_others() {
        let data = quadrants(60, 5);
        let short = Params {
            epochs: 3,
            ..params()
        };
        let first = fit(&data, Site::Embed, &short).expect("fits");
        assert_eq!(first, fit(&data, Site::Embed, &short).expect("fits"));
        let other = Params { seed: 4, ..short };
        assert_ne!(first, fit(&data, Site::Embed, &other).expect("fits"));
    }

    #[test]
    fn the_loss_falls() {
        let losses = fit(&quadrants(200, 6), Site::Embed, &params())
            .expect("fits")
            .losses;
        assert_eq!(losses.len(), 40);
        assert!(losses[39] < 0.5 * losses[0], "{losses:?}");
    }

    #[test]
    fn settings_that_mean_nothing_are_refused_by_name() {
        let check = |change: fn(&mut Params), field: &str| {
            let mut bad = params();
            change(&mut bad);
            let error = fit(&quadrants(20, 7), Site::Embed, &bad).expect_err("refused");
            assert!(error.to_string().contains(field), "{error}");
        };
        check(|p| p.hidden = 0, "hidden");
        check(|p| p.hidden = 100_000, "hidden");
        check(|p| p.epochs = 0, "epochs");
        check(|p| p.batch = 0, "batch");
        check(|p| p.learning_rate = f64::NAN, "learning_rate");
        check(|p| p.weight_decay = -1.0, "weight_decay");
        check(|p| p.learning_rate = 1e30, "learning_rate");
    }
}
