//! How good scores are: ranking, detection at a stated false-positive rate, calibration, and
//! intervals for all of them. Knows only logits, labels and groups.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use statrs::function::beta::beta_reg;

use crate::error::{Error, Result};

/// The chance that a positive ranks above a negative; ties count half (Mann-Whitney).
pub fn auroc(logits: &[f32], y: &[bool]) -> Result<f64> {
    let (positives, negatives) = check_scores(logits, y)?;
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|i, j| logits[*i].total_cmp(&logits[*j]));
    let mut wins = 0.0;
    let mut negatives_below = 0.0;
    for tied in order.chunk_by(|i, j| logits[*i] == logits[*j]) {
        let positive = tied.iter().filter(|i| y[**i]).count() as f64;
        let negative = tied.len() as f64 - positive;
        wins += positive * (negatives_below + negative / 2.0);
        negatives_below += negative;
    }
    Ok(wins / (positives as f64 * negatives as f64))
}

/// The share of positives above the lowest threshold that at most `fpr` of the negatives exceed.
pub fn tpr_at_fpr(logits: &[f32], y: &[bool], fpr: f64) -> Result<f64> {
    let (positives, negatives) = check_scores(logits, y)?;
    if !(0.0..1.0).contains(&fpr) {
        return Err(Error::data("fpr", "must lie in [0, 1)"));
    }
    let mut falling: Vec<f32> = of_class(logits, y, false);
    falling.sort_by(|a, b| b.total_cmp(a));
    let allowed = ((fpr * negatives as f64).floor() as usize).min(negatives - 1);
    let threshold = falling[allowed];
    let caught = of_class(logits, y, true)
        .iter()
        .filter(|l| **l > threshold)
        .count();
    Ok(caught as f64 / positives as f64)
}

/// Expected calibration error over `bins` equally wide bins: the mean distance between the mean
/// probability and the share of positives, weighted by rows.
pub fn expected_calibration_error(probabilities: &[f32], y: &[bool], bins: usize) -> Result<f64> {
    check_scores(probabilities, y)?;
    if bins == 0 || probabilities.iter().any(|p| !(0.0..=1.0).contains(p)) {
        return Err(Error::data(
            "probabilities",
            "must lie in [0, 1], in at least one bin",
        ));
    }
    let mut gaps: BTreeMap<usize, f64> = BTreeMap::new();
    for (p, positive) in probabilities.iter().zip(y) {
        let bin = ((*p as f64 * bins as f64) as usize).min(bins - 1);
        *gaps.entry(bin).or_default() += f64::from(*p) - f64::from(u8::from(*positive));
    }
    Ok(gaps.values().map(|gap| gap.abs()).sum::<f64>() / y.len() as f64)
}

/// The exact (Clopper-Pearson 1934) interval of a rate seen as `k` of `n`, e.g. at 0.95.
pub fn clopper_pearson(k: u64, n: u64, confidence: f64) -> Result<[f64; 2]> {
    if n == 0 || k > n || !(confidence > 0.0 && confidence < 1.0) {
        return Err(Error::data(
            "clopper_pearson",
            "needs 0 <= k <= n, n > 0 and a confidence strictly between 0 and 1",
        ));
    }
    let tail = (1.0 - confidence) / 2.0;
    let (k_, n_) = (k as f64, n as f64);
    let low = if k == 0 {
        0.0
    } else {
        beta_quantile(k_, n_ - k_ + 1.0, tail)
    };
    let high = if k == n {
        1.0
    } else {
        beta_quantile(k_ + 1.0, n_ - k_, 1.0 - tail)
    };
    Ok([low, high])
}

/// A 95 % percentile interval of `statistic` over `resamples` draws of whole groups: rewrites of
/// one prompt are one piece of evidence. Draws for which the statistic is not defined are left
/// out; more than a tenth of them is an error.
pub fn bootstrap_by_group(
    group: &[String],
    resamples: usize,
    seed: u64,
    statistic: impl Fn(&[usize]) -> Result<f64>,
) -> Result<[f64; 2]> {
    let groups = rows_by_group(group);
    if groups.len() < 2 || resamples < 20 {
        return Err(Error::data(
            "bootstrap",
            "needs at least two groups and 20 resamples",
        ));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut rows = Vec::with_capacity(group.len());
    let mut values = Vec::with_capacity(resamples);
    for _ in 0..resamples {
        rows.clear();
        for _ in 0..groups.len() {
            rows.extend_from_slice(&groups[rng.gen_range(0..groups.len())]);
        }
        values.extend(statistic(&rows).ok().filter(|value| value.is_finite()));
    }
    if values.len() * 10 < resamples * 9 {
        return Err(Error::data(
            "bootstrap",
            "the statistic is undefined on more than a tenth of the draws; there are too few groups",
        ));
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[(share * (values.len() - 1) as f64).round() as usize];
    Ok([at(0.025), at(0.975)])
}

/// The rows of each group, in the order of the groups' names.
pub(crate) fn rows_by_group(group: &[String]) -> Vec<Vec<usize>> {
    let mut rows: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (row, group) in group.iter().enumerate() {
        rows.entry(group).or_default().push(row);
    }
    rows.into_values().collect()
}

/// The numbers of positives and negatives, once scores and labels make sense together.
pub(crate) fn check_scores(scores: &[f32], y: &[bool]) -> Result<(usize, usize)> {
    if scores.len() != y.len() {
        return Err(Error::data(
            "labels",
            format!("{} labels for {} scores", y.len(), scores.len()),
        ));
    }
    if let Some(row) = scores.iter().position(|score| !score.is_finite()) {
        return Err(Error::data("scores", format!("row {row} is not finite")));
    }
    let positives = y.iter().filter(|positive| **positive).count();
    let negatives = y.len() - positives;
    if positives == 0 || negatives == 0 {
        return Err(Error::data(
            "labels",
            format!("{positives} positives and {negatives} negatives; both are needed"),
        ));
    }
    Ok((positives, negatives))
}

pub(crate) fn of_class(scores: &[f32], y: &[bool], class: bool) -> Vec<f32> {
    let rows = scores.iter().zip(y);
    rows.filter(|(_, label)| **label == class)
        .map(|(score, _)| *score)
        .collect()
}

/// Where the regularised incomplete beta function reaches `p`, by bisection: sixty halvings are
/// exact to 1e-18 and cannot diverge.
fn beta_quantile(a: f64, b: f64, p: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if beta_reg(a, b, middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_perfect_ranking_scores_one_and_its_reverse_zero() {
        let y = [false, false, true, true];
        assert_eq!(auroc(&[0.0, 1.0, 2.0, 3.0], &y).unwrap(), 1.0);
        assert_eq!(auroc(&[3.0, 2.0, 1.0, 0.0], &y).unwrap(), 0.0);
    }

    #[test]
    fn ties_count_half() {
        assert_eq!(auroc(&[1.0; 4], &[false, true, false, true]).unwrap(), 0.5);
        assert_eq!(
            auroc(&[0.0, 1.0, 1.0], &[false, false, true]).unwrap(),
            0.75
        );
    }

    #[test]
    fn one_class_alone_cannot_be_ranked() {
        let message = auroc(&[1.0, 2.0], &[true, true]).unwrap_err().to_string();
        assert!(message.contains("0 negatives"), "{message}");
        assert!(auroc(&[f32::NAN, 2.0], &[true, false]).is_err());
        assert!(auroc(&[1.0], &[true, false]).is_err());
    }

    #[test]
    fn a_rate_of_zero_puts_the_threshold_at_the_highest_negative() {
        let logits = [0.0, 5.0, 4.0, 5.0, 6.0];
        let y = [false, false, true, true, true];
        assert_eq!(tpr_at_fpr(&logits, &y, 0.0).unwrap(), 1.0 / 3.0);
        assert_eq!(tpr_at_fpr(&logits, &y, 0.5).unwrap(), 1.0);
    }

    #[test]
    fn calibration_error_is_the_distance_between_word_and_deed() {
        let y = [true, false, true, false];
        assert!(expected_calibration_error(&[0.5; 4], &y, 10).unwrap() < 1e-9);
        let sure = [1.0, 1.0, 1.0, 1.0];
        assert!((expected_calibration_error(&sure, &y, 10).unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn clopper_pearson_agrees_with_published_tables() {
        let close = |k, n, low: f64, high: f64| {
            let [l, h] = clopper_pearson(k, n, 0.95).unwrap();
            assert!(
                (l - low).abs() < 5e-5 && (h - high).abs() < 5e-5,
                "{k}/{n}: {l} {h}"
            );
        };
        // The rule for none of ten: 1 - 0.025^(1/10).
        close(0, 10, 0.0, 0.30850);
        close(10, 10, 0.69150, 1.0);
        close(5, 10, 0.18709, 0.81291);
        close(1, 100, 0.00025, 0.05446);
        assert!(clopper_pearson(1, 0, 0.95).is_err());
    }

    #[test]
    fn the_bootstrap_is_seeded_and_draws_whole_groups() {
        let group: Vec<String> = (0..40).map(|row| format!("g{}", row / 4)).collect();
        let mean = |rows: &[usize]| {
            Ok(rows.iter().map(|r| (*r / 4) as f64).sum::<f64>() / rows.len() as f64)
        };
        let first = bootstrap_by_group(&group, 500, 7, mean).unwrap();
        assert_eq!(first, bootstrap_by_group(&group, 500, 7, mean).unwrap());
        assert!(first[0] < 4.5 && 4.5 < first[1]);
        // Ten groups with a spread of 2.9: about 4.5 +- 1.8; forty free rows would give half that.
        assert!(first[1] - first[0] > 2.5, "{first:?}");
        let one = vec!["g".to_owned(); 40];
        assert!(bootstrap_by_group(&one, 500, 7, mean).is_err());
    }

    proptest! {
        #[test]
        fn auroc_counts_the_pairs_in_order(rows in proptest::collection::vec((0_i8..6, any::<bool>()), 2..40)) {
            let logits: Vec<f32> = rows.iter().map(|(l, _)| f32::from(*l)).collect();
            let y: Vec<bool> = rows.iter().map(|(_, y)| *y).collect();
            let (positive, negative) = (of_class(&logits, &y, true), of_class(&logits, &y, false));
            prop_assume!(!positive.is_empty() && !negative.is_empty());
            let mut wins = 0.0;
            for p in &positive {
                for n in &negative {
                    wins += if p > n { 1.0 } else if p == n { 0.5 } else { 0.0 };
                }
            }
            let expected = wins / (positive.len() * negative.len()) as f64;
            prop_assert!((auroc(&logits, &y).unwrap() - expected).abs() < 1e-12);
        }

        #[test]
        fn an_interval_holds_its_rate_and_widens_with_confidence(n in 1_u64..500, share in 0.0_f64..=1.0) {
            let k = (share * n as f64) as u64;
            let rate = k as f64 / n as f64;
            let [low, high] = clopper_pearson(k, n, 0.95).unwrap();
            let [lower, higher] = clopper_pearson(k, n, 0.99).unwrap();
            prop_assert!(0.0 <= lower && lower <= low && low <= rate);
            prop_assert!(rate <= high && high <= higher && higher <= 1.0);
        }
    }
}
