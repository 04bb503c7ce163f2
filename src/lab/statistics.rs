//! Numbers from measured times: percentiles, and what a variant adds to a step with its interval.
//! Knows no clock and no engine.

use serde::Serialize;

use super::seeded::Seeded;

/// Resamples of a bootstrap: enough for the second digit of a 95 % interval.
pub const RESAMPLES: usize = 2000;

/// The same step four times, in microseconds: one kind outside, the other inside.
///
/// A drift that is linear over the four steps cancels out of the difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternation {
    pub base: [f64; 2],
    pub variant: [f64; 2],
}

impl Alternation {
    /// The paired difference: what the variant adds to one step.
    pub fn added(&self) -> f64 {
        (self.variant[0] + self.variant[1] - self.base[0] - self.base[1]) / 2.0
    }

    fn base(&self) -> f64 {
        (self.base[0] + self.base[1]) / 2.0
    }
}

/// What a variant adds to a step. A claim is the interval's upper end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Added {
    /// Pairs of a base and a variant step; an alternation holds two.
    pub pairs: usize,
    /// Median step without the variant.
    pub base_us: f64,
    /// Median paired difference.
    pub added_us: f64,
    /// Its bootstrap 95 % interval (percentile method, whole alternations resampled).
    pub interval_us: [f64; 2],
    /// The same in percent of the median base step of each resample.
    pub added_percent: f64,
    pub interval_percent: [f64; 2],
}

/// The median paired difference and its interval; `None` without an alternation.
pub fn added(alternations: &[Alternation], seed: u64) -> Option<Added> {
    if alternations.is_empty() {
        return None;
    }
    let whole = medians(alternations.iter());
    let mut seeded = Seeded::new(seed);
    let mut microseconds = Vec::with_capacity(RESAMPLES);
    let mut percents = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        let draws =
            (0..alternations.len()).map(|_| &alternations[seeded.below(alternations.len())]);
        let (base, added) = medians(draws);
        microseconds.push(added);
        percents.push(percent(added, base));
    }
    Some(Added {
        pairs: alternations.len() * 2,
        base_us: whole.0,
        added_us: whole.1,
        interval_us: middle_95(&mut microseconds),
        added_percent: percent(whole.1, whole.0),
        interval_percent: middle_95(&mut percents),
    })
}

/// The median base step and the median difference.
fn medians<'a>(alternations: impl Iterator<Item = &'a Alternation>) -> (f64, f64) {
    let (mut bases, mut differences): (Vec<f64>, Vec<f64>) =
        alternations.map(|one| (one.base(), one.added())).unzip();
    (median(&mut bases), median(&mut differences))
}

fn percent(part: f64, whole: f64) -> f64 {
    match whole > 0.0 {
        true => part / whole * 100.0,
        false => 0.0,
    }
}

fn middle_95(values: &mut [f64]) -> [f64; 2] {
    values.sort_unstable_by(f64::total_cmp);
    [percentile(values, 2.5), percentile(values, 97.5)]
}

/// The middle value, or the mean of the middle two; 0 of nothing.
pub fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    let odd = values.len() % 2 == 1;
    let (below, upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    if odd {
        return *upper;
    }
    let lower = below.iter().copied().fold(f64::MIN, f64::max);
    (lower + *upper) / 2.0
}

/// The nearest-rank percentile of sorted values, `percent` from 0 to 100; 0 of nothing.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    let last = sorted.len().checked_sub(1);
    last.map_or(0.0, |last| sorted[rank.saturating_sub(1).min(last)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn steady(base: f64, variant: f64, drift: f64) -> Alternation {
        Alternation {
            base: [base, base + 3.0 * drift],
            variant: [variant + drift, variant + 2.0 * drift],
        }
    }

    #[test]
    fn a_drift_over_the_four_steps_adds_nothing() {
        assert!((steady(100.0, 101.0, 7.0).added() - 1.0).abs() < 1e-9);
        assert!(steady(100.0, 100.0, -5.0).added().abs() < 1e-9);
    }

    #[test]
    fn what_is_added_lies_in_its_interval_and_repeats_for_a_seed() {
        let mut seeded = Seeded::new(3);
        let mut noisy = || {
            let mut noise = || f64::from(seeded.signed()) * 20.0;
            Alternation {
                base: [1000.0 + noise(), 1000.0 + noise()],
                variant: [1005.0 + noise(), 1005.0 + noise()],
            }
        };
        let alternations: Vec<_> = (0..2000).map(|_| noisy()).collect();
        let once = added(&alternations, 1).expect("measured");
        assert_eq!(once.pairs, 4000);
        let [low, high] = once.interval_us;
        assert!(low <= once.added_us && once.added_us <= high, "{once:?}");
        assert!(low > 4.0 && high < 6.0, "{once:?}");
        assert!((once.added_percent - 0.5).abs() < 0.1, "{once:?}");
        assert_eq!(added(&alternations, 1), Some(once));
    }

    #[test]
    fn a_single_outlier_does_not_move_the_median() {
        let mut alternations = vec![steady(100.0, 102.0, 0.0); 99];
        alternations.push(steady(100.0, 9000.0, 0.0));
        let added = added(&alternations, 5).expect("measured");
        assert_eq!((added.added_us, added.interval_us), (2.0, [2.0, 2.0]));
    }

    #[test]
    fn nothing_measured_is_no_number() {
        assert_eq!(added(&[], 0), None);
        assert_eq!((median(&mut []), percentile(&[], 50.0)), (0.0, 0.0));
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 50.0), 50.0);
        assert_eq!(percentile(&values, 99.0), 99.0);
        assert_eq!(percentile(&values, 100.0), 100.0);
        assert_eq!(percentile(&values, 0.0), 1.0);
    }

    proptest! {
        #[test]
        fn the_median_is_that_of_the_sorted_values(
            values in prop::collection::vec(-1e6f64..1e6, 1..40)
        ) {
            let mut sorted = values.clone();
            sorted.sort_unstable_by(f64::total_cmp);
            let middle = sorted.len() / 2;
            let expected = match sorted.len() % 2 {
                1 => sorted[middle],
                _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
            };
            prop_assert_eq!(median(&mut values.clone()), expected);
        }
    }
}
