//! Logistic regression through linfa: standardised inputs, classes weighted by resampling,
//! the penalty chosen by cross-validation over groups.

use linfa::Dataset;
use linfa::traits::Fit;
use linfa_logistic::LogisticRegression;
use ndarray::{Array1, Array2, Axis};

use super::means::normalised;
use super::{ClassWeight, FitData, folds, weighted_rows};
use crate::calibration::sigmoid;
use crate::error::{Error, Result};
use crate::manifest::NormKind;
use crate::probe::{Head, InputNorm};
use crate::site::Site;

#[derive(Debug, Clone, PartialEq)]
pub struct LogisticParams {
    /// L2 penalties per row, `mean loss + alpha / 2 |w|^2`, so that one value means the same for
    /// any number of rows. With several, cross-validation chooses. Below about 1e-3 linfa's solver
    /// needs many hundreds of steps on hidden states; see `LogisticFit::converged`.
    pub alphas: Vec<f64>,
    /// Folds of the cross-validation; groups are never torn apart.
    pub folds: usize,
    pub max_iterations: u64,
    pub class_weight: ClassWeight,
    pub seed: u64,
}

impl Default for LogisticParams {
    fn default() -> Self {
        Self {
            alphas: vec![1e-3, 1e-2, 1e-1, 1.0],
            folds: 5,
            max_iterations: 300,
            class_weight: ClassWeight::default(),
            seed: 0,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct LogisticFit {
    pub head: Head,
    /// The penalty that was used.
    pub alpha: f64,
    /// Held-out losses, the strongest penalty first; empty when only one was given.
    pub cross_validation: Vec<CrossValidation>,
    /// Length of the mean loss's gradient where the solver stopped.
    pub gradient: f64,
    pub converged: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossValidation {
    pub alpha: f64,
    /// Mean over both classes of the held-out log loss.
    pub log_loss: f64,
}

/// The solver stops when the mean loss's gradient is shorter. The loss is then within
/// `tolerance^2 / (2 alpha)` of its minimum, as the penalty makes it strongly convex.
const GRADIENT_TOLERANCE: f64 = 5e-4;

/// Fits `[rows, d_model]` to one output with `InputNorm::Standard`.
pub fn fit_logistic(data: &FitData, site: Site, params: &LogisticParams) -> Result<LogisticFit> {
    data.check()?;
    params.check()?;
    let (norm, x) = normalised(&data.x, NormKind::Standard)?;
    let x = x.mapv(f64::from);
    let mut alphas = params.alphas.clone();
    alphas.sort_by(|a, b| b.total_cmp(a));
    let cross_validation = match alphas.len() {
        1 => Vec::new(),
        _ => cross_validate(&x, data, &alphas, params)?,
    };
    let alpha = chosen(&cross_validation).unwrap_or(alphas[0]);
    alphas.retain(|stronger| *stronger >= alpha);
    let rows = weighted_rows(&data.y, &data.group, params.class_weight, params.seed);
    let plane = Plane::path(&x, &data.y, &rows, &alphas, params.max_iterations)?
        .pop()
        .expect("a path has a plane for each penalty");
    let gradient = plane.gradient(&x, &data.y, &rows, alpha);
    Ok(LogisticFit {
        head: plane.head(site, norm),
        alpha,
        cross_validation,
        gradient,
        converged: gradient <= 2.0 * GRADIENT_TOLERANCE,
    })
}

impl LogisticParams {
    /// What can be judged without data.
    pub fn check(&self) -> Result<()> {
        let sound = |alpha: &f64| alpha.is_finite() && *alpha > 0.0;
        if self.alphas.is_empty() || !self.alphas.iter().all(sound) {
            return Err(Error::invalid(
                "alpha",
                "must be finite and above 0, and at least one",
            ));
        }
        if self.alphas.len() > 1 && !(2..=100).contains(&self.folds) {
            return Err(Error::invalid("folds", "must lie between 2 and 100"));
        }
        if self.max_iterations == 0 {
            return Err(Error::invalid("max_iterations", "must be above 0"));
        }
        Ok(())
    }
}

/// The best penalty; among equals the strongest.
fn chosen(cross_validation: &[CrossValidation]) -> Option<f64> {
    let best = |a: &&CrossValidation, b: &&CrossValidation| {
        a.log_loss
            .total_cmp(&b.log_loss)
            .then(b.alpha.total_cmp(&a.alpha))
    };
    cross_validation
        .iter()
        .min_by(best)
        .map(|entry| entry.alpha)
}

fn cross_validate(
    x: &Array2<f64>,
    data: &FitData,
    alphas: &[f64],
    params: &LogisticParams,
) -> Result<Vec<CrossValidation>> {
    let folds = folds(&data.y, &data.group, params.seed, params.folds);
    let mut losses = vec![0.0; alphas.len()];
    for held_out in &folds {
        let mut kept = vec![true; data.rows()];
        held_out.iter().for_each(|row| kept[*row] = false);
        let rest: Vec<usize> = (0..data.rows()).filter(|row| kept[*row]).collect();
        let rest = weighted_subset(data, &rest, params);
        let planes = Plane::path(x, &data.y, &rest, alphas, params.max_iterations)?;
        for (loss, plane) in losses.iter_mut().zip(planes) {
            *loss += plane.log_loss(x, &data.y, held_out)?;
        }
    }
    let entry = |(alpha, loss): (&f64, f64)| CrossValidation {
        alpha: *alpha,
        log_loss: loss / folds.len() as f64,
    };
    Ok(alphas.iter().zip(losses).map(entry).collect())
}

fn weighted_subset(data: &FitData, rows: &[usize], params: &LogisticParams) -> Vec<usize> {
    let y: Vec<bool> = rows.iter().map(|row| data.y[*row]).collect();
    let group: Vec<String> = rows.iter().map(|row| data.group[*row].clone()).collect();
    weighted_rows(&y, &group, params.class_weight, params.seed)
        .into_iter()
        .map(|at| rows[at])
        .collect()
}

/// `logit = weight x + bias` in standardised coordinates.
struct Plane {
    weight: Array1<f64>,
    bias: f64,
}

impl Plane {
    /// One plane per penalty. Each starts from the one before, so begin with the strongest:
    /// a weak penalty alone takes linfa's solver many times as long.
    fn path(
        x: &Array2<f64>,
        y: &[bool],
        rows: &[usize],
        alphas: &[f64],
        max_iterations: u64,
    ) -> Result<Vec<Self>> {
        let failed = |message: String| Error::data("logistic regression", message);
        let targets: Array1<bool> = rows.iter().map(|row| y[*row]).collect();
        let dataset = Dataset::new(x.select(Axis(0), rows), targets);
        // linfa minimises the summed loss.
        let scale = rows.len() as f64;
        let mut start = Array1::zeros(x.ncols() + 1);
        let mut planes = Vec::with_capacity(alphas.len());
        for alpha in alphas {
            let model = LogisticRegression::default()
                .alpha(alpha * scale)
                .max_iterations(max_iterations)
                .gradient_tolerance(GRADIENT_TOLERANCE * scale)
                .initial_params(start)
                .fit(&dataset)
                .map_err(|e| {
                    failed(format!(
                        "{e}; there may be too few groups, or try a larger alpha"
                    ))
                })?;
            start = model
                .params()
                .iter()
                .copied()
                .chain([model.intercept()])
                .collect();
            if !start.iter().all(|w| w.is_finite()) {
                return Err(failed("the solver diverged; try a larger alpha".to_owned()));
            }
            // linfa's positive class is the more frequent one, whichever that is.
            let sign = if model.labels().pos.class { 1.0 } else { -1.0 };
            planes.push(Self {
                weight: model.params() * sign,
                bias: model.intercept() * sign,
            });
        }
        Ok(planes)
    }

    fn logit(&self, x: &Array2<f64>, row: usize) -> f64 {
        x.row(row).dot(&self.weight) + self.bias
    }

    /// The length of the gradient of `mean loss + alpha / 2 |w|^2`.
    fn gradient(&self, x: &Array2<f64>, y: &[bool], rows: &[usize], alpha: f64) -> f64 {
        let mut weight = Array1::<f64>::zeros(self.weight.len());
        let mut bias = 0.0;
        for row in rows {
            let error = sigmoid(self.logit(x, *row)) - f64::from(u8::from(y[*row]));
            weight.scaled_add(error, &x.row(*row));
            bias += error;
        }
        let count = rows.len() as f64;
        let weight = weight / count + &self.weight * alpha;
        (weight.dot(&weight) + (bias / count).powi(2)).sqrt()
    }

    /// Mean over the classes that are there, so that their shares do not matter.
    fn log_loss(&self, x: &Array2<f64>, y: &[bool], rows: &[usize]) -> Result<f64> {
        let mut classes = Vec::new();
        for class in [false, true] {
            let of_class = rows.iter().filter(|row| y[**row] == class);
            let sign = if class { -1.0 } else { 1.0 };
            let losses: Vec<f64> = of_class
                .map(|row| softplus(sign * self.logit(x, *row)))
                .collect();
            if !losses.is_empty() {
                classes.push(losses.iter().sum::<f64>() / losses.len() as f64);
            }
        }
        if classes.is_empty() {
            return Err(Error::data(
                "groups",
                "are fewer than the folds; use fewer folds",
            ));
        }
        Ok(classes.iter().sum::<f64>() / classes.len() as f64)
    }

    fn head(&self, site: Site, norm: InputNorm) -> Head {
        Head {
            site,
            weight: self.weight.iter().map(|w| *w as f32).collect(),
            bias: vec![self.bias as f32],
            out: 1,
            norm,
        }
    }
}

/// `ln(1 + e^x)` without overflow.
pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_separates, logits, two_clouds};
    use super::*;

    fn one(alpha: f64) -> LogisticParams {
        LogisticParams {
            alphas: vec![alpha],
            ..LogisticParams::default()
        }
    }

    #[test]
    fn a_fit_separates_two_clouds_and_has_converged() {
        let fit = fit_logistic(&two_clouds(600, 24, 1), Site::ResidPost(3), &one(1e-2)).unwrap();
        assert!(fit.converged, "gradient {}", fit.gradient);
        check_separates(&fit.head);
    }

    #[test]
    fn positives_have_high_logits_whichever_class_is_the_larger() {
        for flip in [false, true] {
            let mut data = two_clouds(300, 12, 4);
            data.y.iter_mut().for_each(|y| *y ^= flip);
            let fit = fit_logistic(&data, Site::Embed, &one(1e-2)).unwrap();
            let auroc = crate::metrics::auroc(&logits(&fit.head, &data.x), &data.y).unwrap();
            assert!(auroc > 0.8, "flipped {flip}: {auroc}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits() {
        let data = two_clouds(120, 8, 5);
        let params = LogisticParams::default();
        let first = fit_logistic(&data, Site::Embed, &params).unwrap();
        assert_eq!(first, fit_logistic(&data, Site::Embed, &params).unwrap());
        assert_eq!(first.cross_validation.len(), params.alphas.len());
    }

    #[test]
    fn cross_validation_takes_the_strongest_penalty_when_labels_say_nothing() {
        let mut data = two_clouds(90, 120, 6);
        // Unrelated to the rows' clouds, which follow the row's remainder by three.
        data.y = (0..90).map(|row| (row / 2) % 2 == 0).collect();
        let fit = fit_logistic(&data, Site::Embed, &LogisticParams::default()).unwrap();
        assert_eq!(fit.alpha, 1.0, "{:?}", fit.cross_validation);
        let weakest = fit.cross_validation.last().unwrap();
        assert!(weakest.log_loss > std::f64::consts::LN_2);
    }

    #[test]
    fn fewer_groups_than_folds_is_an_error() {
        let mut data = two_clouds(30, 4, 7);
        data.group = (0..30).map(|row| format!("g{}", row % 2)).collect();
        assert!(fit_logistic(&data, Site::Embed, &LogisticParams::default()).is_err());
    }

    #[test]
    fn penalties_that_mean_nothing_are_refused() {
        let data = two_clouds(30, 4, 8);
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(
                fit_logistic(&data, Site::Embed, &one(alpha)).is_err(),
                "{alpha}"
            );
        }
        let none = LogisticParams {
            alphas: vec![],
            ..LogisticParams::default()
        };
        assert!(fit_logistic(&data, Site::Embed, &none).is_err());
    }
}
