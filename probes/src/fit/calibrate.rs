//! Fits what a gathered logit means: Platt scaling, isotonic regression, and thresholds.
//! Works on one number per request; rows used here must not have been used to fit the probe.

use crate::calibration::{Calibration, CalibrationKind, OperatingPoint};
use crate::error::{Error, Result};
use crate::gather::Gather;
use crate::metrics::{check_scores, clopper_pearson};

impl Calibration {
    /// A calibration without thresholds yet; `kind` as fitted by `platt` or `isotonic` on the
    /// same rows. Its probabilities refer to these rows' share of positives.
    pub fn new(gather: Gather, kind: CalibrationKind, logits: &[f32], y: &[bool]) -> Result<Self> {
        let (positives, negatives) = check_scores(logits, y)?;
        let calibration = Self {
            gather,
            kind,
            prior: positives as f64 / y.len() as f64,
            thresholds: Vec::new(),
            n_benign: negatives as u64,
            n_harmful: positives as u64,
        };
        calibration.check("calibration")?;
        Ok(calibration)
    }

    /// Sets an operating point, in place of one of the same rate and answer length.
    /// They stay in order of length, then of rate.
    pub fn set_threshold(&mut self, point: OperatingPoint) {
        let place = |p: &OperatingPoint| (p.answer_tokens, p.fpr);
        self.thresholds.retain(|old| {
            old.answer_tokens != point.answer_tokens || (old.fpr - point.fpr).abs() > 1e-9
        });
        let after = self
            .thresholds
            .iter()
            .position(|old| place(old) > place(&point));
        self.thresholds
            .insert(after.unwrap_or(self.thresholds.len()), point);
    }
}

/// Platt scaling (Platt 1999) with smoothed targets, by Newton's method with a line search
/// (Lin, Lin and Weng 2007): `P = sigmoid(a * logit + b)` at the rows' share of positives.
pub fn platt(logits: &[f32], y: &[bool]) -> Result<CalibrationKind> {
    let (positives, negatives) = check_scores(logits, y)?;
    // A separable set would otherwise push the slope to infinity.
    let high = (positives as f64 + 1.0) / (positives as f64 + 2.0);
    let low = 1.0 / (negatives as f64 + 2.0);
    // Newton's steps are well scaled on logits around 0 of size 1.
    let (centre, spread) = centre_and_spread(logits)?;
    let rows: Vec<(f64, f64)> = logits
        .iter()
        .zip(y)
        .map(|(l, y)| {
            (
                (f64::from(*l) - centre) / spread,
                if *y { high } else { low },
            )
        })
        .collect();
    let prior = ((positives as f64 + 1.0) / (negatives as f64 + 1.0)).ln();
    let [a, b] = newton(&rows, [0.0, prior]);
    let (a, b) = (a / spread, b - a * centre / spread);
    if a.is_finite() && b.is_finite() && a > 0.0 {
        return Ok(CalibrationKind::Platt { a, b });
    }
    Err(Error::data(
        "logits",
        "do not rise with the labels; the probe ranks no better than chance on these rows",
    ))
}

fn centre_and_spread(logits: &[f32]) -> Result<(f64, f64)> {
    let n = logits.len() as f64;
    let centre = logits.iter().map(|l| f64::from(*l)).sum::<f64>() / n;
    let spread = (logits
        .iter()
        .map(|l| (f64::from(*l) - centre).powi(2))
        .sum::<f64>()
        / n)
        .sqrt();
    if spread > 0.0 {
        Ok((centre, spread))
    } else {
        Err(Error::data(
            "logits",
            "are all the same; the score is constant",
        ))
    }
}

/// Minimises the cross-entropy of `(x, target)` rows over `sigmoid(a x + b)`.
fn newton(rows: &[(f64, f64)], start: [f64; 2]) -> [f64; 2] {
    let loss = |[a, b]: [f64; 2]| -> f64 {
        let row = |(x, t): &(f64, f64)| {
            let z = a * x + b;
            super::logistic::softplus(z) - t * z
        };
        rows.iter().map(row).sum()
    };
    let mut at = start;
    let mut value = loss(at);
    for _ in 0..100 {
        let (mut ga, mut gb) = (0.0, 0.0);
        // The ridge keeps the matrix invertible where every p is 0 or 1.
        let (mut haa, mut hab, mut hbb) = (1e-12, 0.0, 1e-12);
        for (x, t) in rows {
            let p = crate::calibration::sigmoid(at[0] * x + at[1]);
            let (error, weight) = (p - t, p * (1.0 - p));
            ga += error * x;
            gb += error;
            haa += weight * x * x;
            hab += weight * x;
            hbb += weight;
        }
        if ga.abs().max(gb.abs()) < 1e-9 * rows.len() as f64 {
            break;
        }
        let determinant = haa * hbb - hab * hab;
        let step = [
            (hbb * ga - hab * gb) / determinant,
            (haa * gb - hab * ga) / determinant,
        ];
        let slope = step[0] * ga + step[1] * gb;
        let mut length = 1.0;
        let next = loop {
            let candidate = [at[0] - length * step[0], at[1] - length * step[1]];
            let reached = loss(candidate);
            if reached < value - 1e-4 * length * slope {
                break Some((candidate, reached));
            }
            length /= 2.0;
            if length < 1e-10 {
                break None;
            }
        };
        match next {
            Some((candidate, reached)) => (at, value) = (candidate, reached),
            None => break,
        }
    }
    at
}

/// Isotonic regression by pooling adjacent violators, at the rows' share of positives.
pub fn isotonic(logits: &[f32], y: &[bool]) -> Result<CalibrationKind> {
    check_scores(logits, y)?;
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|i, j| logits[*i].total_cmp(&logits[*j]));
    let mut blocks: Vec<Block> = Vec::new();
    // Equal logits are one point: no function can tell them apart.
    for tied in order.chunk_by(|i, j| logits[*i] == logits[*j]) {
        let mut block = Block {
            low: logits[tied[0]],
            high: logits[tied[0]],
            positives: tied.iter().filter(|row| y[**row]).count(),
            rows: tied.len(),
        };
        while let Some(before) = blocks.pop_if(|before| before.share() >= block.share()) {
            block = before.joined(block);
        }
        blocks.push(block);
    }
    let (mut x, mut share) = (Vec::new(), Vec::new());
    for block in blocks {
        for end in [block.low, block.high] {
            if x.last() != Some(&end) {
                x.push(end);
                share.push(block.share() as f32);
            }
        }
    }
    Ok(CalibrationKind::Isotonic { x, y: share })
}

struct Block {
    low: f32,
    high: f32,
    positives: usize,
    rows: usize,
}

impl Block {
    fn share(&self) -> f64 {
        self.positives as f64 / self.rows as f64
    }

    fn joined(self, after: Self) -> Self {
        Self {
            low: self.low,
            high: after.high,
            positives: self.positives + after.positives,
            rows: self.rows + after.rows,
        }
    }
}

/// The threshold that a fresh benign request exceeds with a chance of at most `fpr`: the
/// `ceil((n + 1)(1 - fpr))`-th smallest benign logit (split conformal prediction, Vovk et al.).
/// A request whose gather has no value counts as `f32::MIN`.
pub fn operating_point(
    benign: &[f32],
    fpr: f64,
    answer_tokens: Option<u32>,
) -> Result<OperatingPoint> {
    if !(fpr > 0.0 && fpr < 1.0) {
        return Err(Error::data("fpr", "must lie strictly between 0 and 1"));
    }
    if benign.iter().any(|logit| !logit.is_finite()) {
        return Err(Error::data("benign logits", "must be finite"));
    }
    let n = benign.len();
    // A hair less, so that 1,000 x 0.99 is not rounded up to 991 by the last bit.
    let rank = ((n as f64 + 1.0) * (1.0 - fpr) - 1e-9).ceil() as usize;
    if rank == 0 || rank > n {
        let needed = ((1.0 - fpr) / fpr - 1e-9).ceil();
        return Err(Error::data(
            "benign logits",
            format!(
                "{n} rows cannot bound a false-positive rate of {fpr}; at least {needed} are needed"
            ),
        ));
    }
    let mut rising = benign.to_vec();
    rising.sort_by(f32::total_cmp);
    let threshold_logit = rising[rank - 1];
    let above = rising
        .iter()
        .filter(|logit| **logit > threshold_logit)
        .count();
    Ok(OperatingPoint {
        fpr,
        answer_tokens,
        threshold_logit,
        interval: clopper_pearson(above as u64, n as u64, 0.95)?,
        n: n as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn drawn(n: usize, seed: u64, probability: impl Fn(f32) -> f64) -> (Vec<f32>, Vec<bool>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let logits: Vec<f32> = (0..n).map(|_| rng.gen_range(-4.0..4.0)).collect();
        let y = logits
            .iter()
            .map(|l| rng.gen_bool(probability(*l)))
            .collect();
        (logits, y)
    }

    #[test]
    fn platt_recovers_the_curve_that_made_the_labels() {
        let curve = |l: f32| 1.0 / (1.0 + (-(1.5 * f64::from(l) - 0.7)).exp());
        let (logits, y) = drawn(20_000, 1, curve);
        let CalibrationKind::Platt { a, b } = platt(&logits, &y).unwrap() else {
            panic!()
        };
        assert!((a - 1.5).abs() < 0.08 && (b + 0.7).abs() < 0.08, "{a} {b}");
    }

    #[test]
    fn platt_stays_finite_on_separable_and_on_huge_logits() {
        let logits = [-3e6, -2e6, -1e6, 1e6, 2e6, 3e6];
        let y = [false, false, false, true, true, true];
        let kind = platt(&logits, &y).unwrap();
        let calibration = Calibration::new(Gather::Last, kind, &logits, &y).unwrap();
        assert!((0.5..1.0).contains(&calibration.probability(2e6)));
        assert_eq!(calibration.prior, 0.5);
    }

    #[test]
    fn platt_is_stationary() {
        let (logits, y) = drawn(500, 4, |l| if l > 0.0 { 0.8 } else { 0.3 });
        let CalibrationKind::Platt { a, b } = platt(&logits, &y).unwrap() else {
            panic!()
        };
        let (p, n) = check_scores(&logits, &y).unwrap();
        let (high, low) = ((p as f64 + 1.0) / (p as f64 + 2.0), 1.0 / (n as f64 + 2.0));
        let rows = logits.iter().zip(&y);
        let pull: f64 = rows
            .map(|(l, y)| {
                crate::calibration::sigmoid(a * f64::from(*l) + b) - if *y { high } else { low }
            })
            .sum();
        assert!(pull.abs() < 1e-5, "{pull}");
    }

    #[test]
    fn a_probe_that_ranks_backwards_is_not_calibrated() {
        let message = platt(&[3.0, 2.0, 1.0, 0.0], &[false, false, true, true])
            .unwrap_err()
            .to_string();
        assert!(message.contains("do not rise"), "{message}");
        assert!(platt(&[1.0; 4], &[false, false, true, true]).is_err());
    }

    #[test]
    fn isotonic_pools_what_is_out_of_order() {
        let kind = isotonic(&[0.0, 1.0, 2.0, 3.0], &[false, true, false, true]).unwrap();
        let expected = CalibrationKind::Isotonic {
            x: vec![0.0, 1.0, 2.0, 3.0],
            y: vec![0.0, 0.5, 0.5, 1.0],
        };
        assert_eq!(kind, expected);
    }

    #[test]
    fn a_threshold_is_the_conformal_order_statistic() {
        let benign: Vec<f32> = (1_u16..=999).map(f32::from).collect();
        let point = operating_point(&benign, 0.01, Some(64)).unwrap();
        // ceil(1000 * 0.99) = 990: nine of 999 lie above.
        assert_eq!(point.threshold_logit, 990.0);
        assert!(point.interval[0] < 9.0 / 999.0 && 9.0 / 999.0 < point.interval[1]);
        assert_eq!((point.n, point.answer_tokens), (999, Some(64)));
    }

    #[test]
    fn a_threshold_replaces_the_one_of_its_rate_and_keeps_the_others() {
        let mut calibration = crate::testing::calibration(Gather::Last);
        let point = |fpr, threshold_logit, answer_tokens| OperatingPoint {
            fpr,
            threshold_logit,
            answer_tokens,
            ..calibration_point()
        };
        for (fpr, threshold, tokens) in [(0.05, 1.0, None), (0.001, 4.0, None), (0.01, 3.0, None)] {
            calibration.set_threshold(point(fpr, threshold, tokens));
        }
        calibration.set_threshold(point(0.01, 9.0, Some(64)));
        let all: Vec<f32> = calibration
            .thresholds
            .iter()
            .map(|point| point.threshold_logit)
            .collect();
        assert_eq!(all, [4.0, 3.0, 1.0, 9.0]);
        assert!(calibration.check("calibration").is_ok());
    }

    fn calibration_point() -> OperatingPoint {
        operating_point(&[0.0; 200], 0.01, None).unwrap()
    }

    #[test]
    fn too_few_benign_rows_cannot_bound_a_small_rate() {
        let benign = vec![0.0; 98];
        let message = operating_point(&benign, 0.01, None)
            .unwrap_err()
            .to_string();
        assert!(message.contains("at least 99 are needed"), "{message}");
        assert!(operating_point(&[0.0; 99], 0.01, None).is_ok());
        assert!(operating_point(&[f32::NAN; 99], 0.01, None).is_err());
        assert!(operating_point(&benign, 0.0, None).is_err());
    }

    #[test]
    fn fresh_benign_requests_exceed_the_threshold_no_more_often_than_stated() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut rates = 0.0;
        for _ in 0..200 {
            let mut logits =
                |n: usize| -> Vec<f32> { (0..n).map(|_| rng.gen_range(0.0..1.0)).collect() };
            let threshold = operating_point(&logits(150), 0.05, None)
                .unwrap()
                .threshold_logit;
            let fresh = logits(500);
            rates += fresh.iter().filter(|l| **l > threshold).count() as f64 / 500.0;
        }
        assert!(rates / 200.0 <= 0.053, "{}", rates / 200.0);
    }

    proptest! {
        #[test]
        fn every_isotonic_fit_is_a_sound_calibration(
            rows in proptest::collection::vec((-9_i8..9, any::<bool>()), 2..60), at in -12.0_f32..12.0, by in 0.0_f32..3.0,
        ) {
            let logits: Vec<f32> = rows.iter().map(|(l, _)| f32::from(*l) / 2.0).collect();
            let y: Vec<bool> = rows.iter().map(|(_, y)| *y).collect();
            prop_assume!(y.contains(&true) && y.contains(&false));
            let kind = isotonic(&logits, &y).unwrap();
            let calibration = Calibration::new(Gather::Max, kind, &logits, &y).unwrap();
            prop_assert!(calibration.probability(at) <= calibration.probability(at + by));
            let mean: f64 = logits.iter().map(|l| f64::from(calibration.probability(*l))).sum::<f64>() / y.len() as f64;
            prop_assert!((mean - calibration.prior).abs() < 1e-5);
        }

        #[test]
        fn at_most_the_stated_share_of_calibration_rows_lies_above(
            benign in proptest::collection::vec(-5.0_f32..5.0, 20..200), fpr in 0.05_f64..0.5,
        ) {
            let point = operating_point(&benign, fpr, None).unwrap();
            let above = benign.iter().filter(|l| **l > point.threshold_logit).count();
            prop_assert!(above as f64 / benign.len() as f64 <= fpr + 1e-9);
        }
    }
}
