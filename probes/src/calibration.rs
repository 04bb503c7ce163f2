//! What a gathered logit means: a probability, and thresholds for stated false-positive rates.
//! Belongs to one pair of probe and gather; fitting lives in `fit/calibrate.rs`.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gather::Gather;

const MAX_POINTS: usize = 256;
const MAX_STEPS: usize = 16_384;

/// Fitted on the gathered logits of whole requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub gather: Gather,
    pub kind: CalibrationKind,
    /// The share of positives in the rows it was fitted on, to which its probabilities refer.
    pub prior: f64,
    pub thresholds: Vec<OperatingPoint>,
    pub n_benign: u64,
    pub n_harmful: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CalibrationKind {
    /// `P = sigmoid(a * logit + b)`, `a > 0`.
    Platt { a: f64, b: f64 },
    /// Linear between the points, constant beyond them; `x` rises, `y` does not fall.
    Isotonic { x: Vec<f32>, y: Vec<f32> },
}

/// A threshold for a stated false-positive rate per request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatingPoint {
    /// The rate that was asked for.
    pub fpr: f64,
    /// The answer length at which the rate holds; none for a probe that does not read answers.
    pub answer_tokens: Option<u32>,
    /// A detector is positive when its gathered logit is **above** this.
    pub threshold_logit: f32,
    /// 95 % Clopper-Pearson interval of the rate on the `n` benign rows.
    pub interval: [f64; 2],
    pub n: u64,
}

impl Calibration {
    /// `P(positive | request so far)`, at the calibration's prior. Never falls as the logit rises.
    pub fn probability(&self, logit: f32) -> f32 {
        match &self.kind {
            CalibrationKind::Platt { a, b } => sigmoid(a * f64::from(logit) + b) as f32,
            CalibrationKind::Isotonic { x, y } => interpolate(x, y, logit),
        }
    }

    /// The threshold fitted for exactly this rate and answer length.
    pub fn threshold_at(&self, fpr: f64, answer_tokens: Option<u32>) -> Result<f32> {
        let close = |point: &&OperatingPoint| {
            (point.fpr - fpr).abs() <= 1e-9 && point.answer_tokens == answer_tokens
        };
        let point = self.thresholds.iter().find(close);
        point.map(|point| point.threshold_logit).ok_or_else(|| {
            let all: Vec<_> = self
                .thresholds
                .iter()
                .map(|p| named(p.fpr, p.answer_tokens))
                .collect();
            Error::NotCalibrated {
                field: "at_fpr".to_owned(),
                wanted: named(fpr, answer_tokens),
                available: if all.is_empty() {
                    "no thresholds".to_owned()
                } else {
                    all.join(", ")
                },
            }
        })
    }

    pub(crate) fn check(&self, field: &str) -> Result<()> {
        self.gather.check()?;
        self.kind.check(&format!("{field}.kind"))?;
        if !(self.prior > 0.0 && self.prior < 1.0) {
            return Err(Error::invalid(
                format!("{field}.prior"),
                "must lie strictly between 0 and 1",
            ));
        }
        if self.thresholds.len() > MAX_POINTS {
            return Err(Error::invalid(
                format!("{field}.thresholds"),
                format!("has more than {MAX_POINTS} entries"),
            ));
        }
        for (index, point) in self.thresholds.iter().enumerate() {
            let field = format!("{field}.thresholds[{index}]");
            point.check(&field)?;
            let same = |other: &OperatingPoint| {
                other.fpr == point.fpr && other.answer_tokens == point.answer_tokens
            };
            if self.thresholds[..index].iter().any(same) {
                return Err(Error::invalid(
                    field,
                    "states the same operating point twice",
                ));
            }
        }
        Ok(())
    }
}

fn named(fpr: f64, answer_tokens: Option<u32>) -> String {
    match answer_tokens {
        Some(tokens) => format!("a false-positive rate of {fpr} at {tokens} answer tokens"),
        None => format!("a false-positive rate of {fpr}"),
    }
}

impl CalibrationKind {
    fn check(&self, field: &str) -> Result<()> {
        match self {
            Self::Platt { a, b } => {
                if a.is_finite() && *a > 0.0 && b.is_finite() {
                    return Ok(());
                }
                Err(Error::invalid(
                    format!("{field}.platt"),
                    "needs finite a and b with a above 0",
                ))
            }
            Self::Isotonic { x, y } => {
                let rises = x.windows(2).all(|pair| pair[0] < pair[1]);
                let does_not_fall = y.windows(2).all(|pair| pair[0] <= pair[1]);
                let sized = (1..=MAX_STEPS).contains(&x.len()) && x.len() == y.len();
                let ranged =
                    x.iter().all(|x| x.is_finite()) && y.iter().all(|y| (0.0..=1.0).contains(y));
                if sized && ranged && rises && does_not_fall {
                    return Ok(());
                }
                Err(Error::invalid(
                    format!("{field}.isotonic"),
                    format!(
                        "needs 1 to {MAX_STEPS} finite x that rise and as many y in [0, 1] \
                         that do not fall"
                    ),
                ))
            }
        }
    }
}

impl OperatingPoint {
    fn check(&self, field: &str) -> Result<()> {
        if !self.threshold_logit.is_finite() {
            return Err(Error::invalid(
                format!("{field}.threshold_logit"),
                "must be finite; calibrate the probe again",
            ));
        }
        if !(self.fpr > 0.0 && self.fpr < 1.0) {
            return Err(Error::invalid(
                format!("{field}.fpr"),
                "must lie strictly between 0 and 1",
            ));
        }
        let [low, high] = self.interval;
        if !(0.0 <= low && low <= high && high <= 1.0) {
            return Err(Error::invalid(
                format!("{field}.interval"),
                "must be [low, high] within [0, 1]",
            ));
        }
        Ok(())
    }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn interpolate(x: &[f32], y: &[f32], logit: f32) -> f32 {
    // NaN has no place on the axis and no probability.
    if logit.is_nan() {
        return f32::NAN;
    }
    let above = x.partition_point(|x| *x <= logit);
    match (above.checked_sub(1), y.get(above)) {
        (None, first) => first.copied().unwrap_or(f32::NAN),
        (Some(below), None) => y.get(below).copied().unwrap_or(f32::NAN),
        (Some(below), Some(high)) => {
            let low = y[below];
            let width = f64::from(x[above]) - f64::from(x[below]);
            let share = (f64::from(logit) - f64::from(x[below])) / width;
            let between = f64::from(low) + share * (f64::from(*high) - f64::from(low));
            (between as f32).clamp(low, *high)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::calibration;
    use proptest::prelude::*;

    fn isotonic() -> Calibration {
        Calibration {
            kind: CalibrationKind::Isotonic {
                x: vec![-1.0, 0.0, 2.0],
                y: vec![0.1, 0.5, 0.9],
            },
            ..calibration(Gather::Last)
        }
    }

    #[test]
    fn isotonic_probabilities_are_linear_between_points_and_constant_beyond() {
        let calibration = isotonic();
        for (logit, expected) in [
            (-9.0, 0.1),
            (-1.0, 0.1),
            (-0.5, 0.3),
            (0.0, 0.5),
            (1.0, 0.7),
            (2.0, 0.9),
            (9.0, 0.9),
        ] {
            assert!(
                (calibration.probability(logit) - expected).abs() < 1e-6,
                "{logit}"
            );
        }
    }

    #[test]
    fn a_logit_that_is_nan_has_no_probability() {
        assert!(isotonic().probability(f32::NAN).is_nan());
        assert!(calibration(Gather::Last).probability(f32::NAN).is_nan());
    }

    #[test]
    fn a_threshold_that_was_not_fitted_is_an_error_that_lists_the_others() {
        let mut calibration = calibration(Gather::Mean);
        assert_eq!(calibration.threshold_at(0.01, None), Ok(2.5));
        let message = calibration
            .threshold_at(0.001, Some(64))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("rate of 0.001 at 64 answer tokens"),
            "{message}"
        );
        assert!(
            message.contains("the probe has a false-positive rate of 0.01"),
            "{message}"
        );
        calibration.thresholds.clear();
        assert!(
            calibration
                .threshold_at(0.01, None)
                .unwrap_err()
                .to_string()
                .contains("no thresholds")
        );
    }

    #[test]
    fn the_same_operating_point_twice_is_refused() {
        let mut calibration = calibration(Gather::Mean);
        calibration.thresholds.push(calibration.thresholds[0]);
        assert!(
            calibration
                .check("c")
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
        calibration.thresholds[1].answer_tokens = Some(64);
        assert!(calibration.check("c").is_ok());
    }

    proptest! {
        #[test]
        fn probability_never_falls_as_the_logit_rises(logit in -1e4_f32..1e4, by in 0.0_f32..10.0) {
            for calibration in [calibration(Gather::Last), isotonic()] {
                let (low, high) = (calibration.probability(logit), calibration.probability(logit + by));
                prop_assert!((0.0..=1.0).contains(&low) && low <= high);
            }
        }
    }
}
