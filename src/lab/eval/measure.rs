//! Numbers about scores and labels, each with its interval: what a report's tables and pictures
//! are made of. Knows logits, labels and groups; knows no probe and no file.

use inwit_probes::metrics::{bootstrap_by_group, clopper_pearson};
use serde::Serialize;

use crate::error::Result;
use crate::lab::fit::unfit;

/// Draws of a bootstrap.
pub const RESAMPLES: usize = 1000;
/// Bins of the calibration error.
pub const BINS: usize = 15;
/// False-positive rates at which detection is told.
pub const RATES: [f64; 3] = [0.001, 0.01, 0.05];

/// A number of a set, over the whole set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The mean over the seeds where there are several.
    pub value: f64,
    /// 95 %, bootstrap over groups, of that mean; none where there are too few groups.
    pub interval: Option<[f64; 2]>,
    /// The least and the greatest over the seeds, where there are several.
    pub seeds: Option<[f64; 2]>,
}

/// A share of rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    pub count: u64,
    pub of: u64,
    pub rate: f64,
    /// 95 %, Clopper-Pearson: exact for rows that stand for themselves.
    pub interval: [f64; 2],
    /// The least and the greatest rate over the seeds, where there are several; the rest is of the
    /// first seed.
    pub seeds: Option<[f64; 2]>,
}

/// A bin of a calibration plot.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bin {
    pub mean_probability: f64,
    /// Of positives among its rows.
    pub share: f64,
    pub rows: u64,
}

/// Scores by label, in equally wide bins from `low` to `high`; shares of each label's rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    pub low: f64,
    pub high: f64,
    pub positives: Vec<f64>,
    pub negatives: Vec<f64>,
}

/// A statistic of scores and labels.
pub type Statistic = fn(&[f32], &[bool]) -> inwit_probes::Result<f64>;

/// The rows of a set, and how its groups are drawn again.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    pub y: &'a [bool],
    pub groups: &'a [String],
    pub seed: u64,
}

impl Sample<'_> {
    /// The statistic over runs of one scorer, a run per seed; none where it is not defined, as
    /// AUROC is not for one label alone.
    pub fn measure(&self, runs: &[Vec<f32>], statistic: Statistic) -> Option<Measured> {
        let values: Option<Vec<f64>> = runs.iter().map(|run| statistic(run, self.y).ok()).collect();
        let values = values.filter(|values| !values.is_empty())?;
        let mean_over = |rows: &[usize]| {
            let y: Vec<bool> = rows.iter().map(|row| self.y[*row]).collect();
            let mut sum = 0.0;
            for run in runs {
                let scores: Vec<f32> = rows.iter().map(|row| run[*row]).collect();
                sum += statistic(&scores, &y)?;
            }
            Ok(sum / runs.len() as f64)
        };
        Some(Measured {
            value: values.iter().sum::<f64>() / values.len() as f64,
            interval: bootstrap_by_group(self.groups, RESAMPLES, self.seed, mean_over).ok(),
            seeds: range(&values),
        })
    }

    pub fn count(&self, class: bool) -> u64 {
        self.y.iter().filter(|label| **label == class).count() as u64
    }

    /// Whether the set has a row for one false positive at that rate: with fewer, one in a
    /// thousand is none.
    pub fn resolves(&self, fpr: f64) -> bool {
        self.count(false) as f64 * fpr >= 1.0 - 1e-9
    }

    /// The share of the rows of `class` that are above the threshold; none without such rows.
    pub fn above(&self, runs: &[Vec<f32>], threshold: f32, class: bool) -> Result<Option<Rate>> {
        let hits = |run: &Vec<f32>| {
            let rows = run.iter().zip(self.y).filter(|(_, label)| **label == class);
            rows.filter(|(score, _)| **score > threshold).count() as u64
        };
        let counts: Vec<u64> = runs.iter().map(hits).collect();
        Rate::over_seeds(&counts, self.count(class))
    }
}

impl Rate {
    /// None of nothing.
    pub fn new(count: u64, of: u64) -> Result<Option<Self>> {
        Self::over_seeds(&[count], of)
    }

    fn over_seeds(counts: &[u64], of: u64) -> Result<Option<Self>> {
        let Some(first) = counts.first().filter(|_| of > 0) else {
            return Ok(None);
        };
        let rates: Vec<f64> = counts.iter().map(|c| *c as f64 / of as f64).collect();
        Ok(Some(Self {
            count: *first,
            of,
            rate: rates[0],
            interval: clopper_pearson(*first, of, 0.95).map_err(unfit)?,
            seeds: range(&rates),
        }))
    }
}

fn range(values: &[f64]) -> Option<[f64; 2]> {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (values.len() > 1).then_some([least, greatest])
}

/// The corners of the ROC curve, `[false-positive rate, true-positive rate]` from (0, 0) to
/// (1, 1); empty where a label is missing.
pub fn roc(scores: &[f32], y: &[bool]) -> Vec<[f64; 2]> {
    let positives = y.iter().filter(|label| **label).count() as f64;
    let negatives = y.len() as f64 - positives;
    if positives == 0.0 || negatives == 0.0 {
        return Vec::new();
    }
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut curve = vec![[0.0, 0.0]];
    let (mut hits, mut alarms) = (0.0, 0.0);
    for tied in order.chunk_by(|a, b| scores[*a] == scores[*b]) {
        let positive = tied.iter().filter(|row| y[**row]).count() as f64;
        hits += positive;
        alarms += tied.len() as f64 - positive;
        let point = [alarms / negatives, hits / positives];
        // On the way up or along, only the corner counts.
        let straight = matches!(curve.as_slice(), [.., a, b]
            if (a[0] == b[0] && b[0] == point[0]) || (a[1] == b[1] && b[1] == point[1]));
        if straight {
            curve.pop();
        }
        curve.push(point);
    }
    curve
}

/// The bins of probabilities that have rows.
pub fn reliability(probabilities: &[f32], y: &[bool]) -> Vec<Bin> {
    let mut bins = vec![(0.0, 0u64, 0u64); BINS];
    for (p, positive) in probabilities.iter().zip(y) {
        let index = ((f64::from(*p) * BINS as f64) as usize).min(BINS - 1);
        let (sum, hits, rows) = &mut bins[index];
        *sum += f64::from(*p);
        *hits += u64::from(*positive);
        *rows += 1;
    }
    let bin = |(sum, hits, rows): &(f64, u64, u64)| Bin {
        mean_probability: sum / *rows as f64,
        share: *hits as f64 / *rows as f64,
        rows: *rows,
    };
    bins.iter()
        .filter(|(_, _, rows)| *rows > 0)
        .map(bin)
        .collect()
}

/// Scores by label in `bins` bins. What a gather left without a number is in the first one.
pub fn histogram(scores: &[f32], y: &[bool], bins: usize) -> Histogram {
    let numbers = || {
        scores
            .iter()
            .copied()
            .filter(|s| *s > f32::MIN)
            .map(f64::from)
    };
    let low = numbers().fold(f64::INFINITY, f64::min);
    let high = numbers().fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = match low < high {
        true => (low, high),
        false if low.is_finite() => (low - 0.5, low + 0.5),
        false => (-0.5, 0.5),
    };
    let mut shares = [vec![0.0; bins], vec![0.0; bins]];
    let mut rows = [0.0f64; 2];
    for (score, label) in scores.iter().zip(y) {
        let place = (f64::from(*score) - low) / (high - low) * bins as f64;
        let index = (place.max(0.0) as usize).min(bins - 1);
        shares[usize::from(*label)][index] += 1.0;
        rows[usize::from(*label)] += 1.0;
    }
    for (of_label, rows) in shares.iter_mut().zip(rows) {
        of_label
            .iter_mut()
            .for_each(|count| *count /= rows.max(1.0));
    }
    let [negatives, positives] = shares;
    Histogram {
        low,
        high,
        positives,
        negatives,
    }
}

#[cfg(test)]
mod tests {
    use inwit_probes::metrics::auroc;
    use proptest::prelude::*;

    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|row| format!("g{row}")).collect()
    }

    #[test]
    fn a_number_over_seeds_is_their_mean_with_their_range() {
        let y = [false, true, false, true];
        let groups = names(4);
        let sample = Sample {
            y: &y,
            groups: &groups,
            seed: 0,
        };
        let right = vec![0.0, 1.0, 0.0, 1.0];
        let even = vec![0.0; 4];
        let measured = sample.measure(&[right, even], auroc).expect("both labels");
        assert_eq!((measured.value, measured.seeds), (0.75, Some([0.5, 1.0])));
    }

    #[test]
    fn one_label_has_rates_and_no_ranking() {
        let (y, groups) = ([false; 3], names(3));
        let sample = Sample {
            y: &y,
            groups: &groups,
            seed: 0,
        };
        let runs = [vec![0.0, 1.0, 2.0]];
        assert_eq!(sample.measure(&runs, auroc), None);
        assert_eq!(sample.above(&runs, 1.0, true).expect("counts"), None);
        let alarms = sample.above(&runs, 1.0, false).expect("counts");
        let alarms = alarms.expect("rows");
        assert_eq!((alarms.count, alarms.of), (1, 3));
    }

    #[test]
    fn a_rate_has_the_published_interval() {
        let rate = Rate::new(5, 10).expect("counts").expect("rows");
        assert_eq!(rate.rate, 0.5);
        assert!((rate.interval[0] - 0.18709).abs() < 5e-5);
        assert!((rate.interval[1] - 0.81291).abs() < 5e-5);
        assert_eq!(Rate::new(0, 0).expect("counts"), None);
    }

    #[test]
    fn a_rate_of_one_in_a_hundred_needs_a_hundred() {
        let groups = names(100);
        let sample = |y: &'static [bool]| Sample {
            y,
            groups: &groups[..y.len()],
            seed: 0,
        };
        static MANY: [bool; 100] = [false; 100];
        assert!(sample(&MANY).resolves(0.01));
        assert!(!sample(&MANY[..99]).resolves(0.01));
        assert!(!sample(&MANY).resolves(0.001));
    }

    #[test]
    fn a_roc_curve_has_its_corners() {
        let curve = roc(&[4.0, 3.0, 2.0, 1.0], &[true, false, true, false]);
        assert_eq!(
            curve,
            [[0.0, 0.0], [0.0, 0.5], [0.5, 0.5], [0.5, 1.0], [1.0, 1.0]]
        );
        assert_eq!(roc(&[1.0, 1.0], &[true, false]), [[0.0, 0.0], [1.0, 1.0]]);
        assert_eq!(
            roc(&[3.0, 2.0, 1.0], &[true, true, false]),
            [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
        );
        assert!(roc(&[1.0], &[true]).is_empty());
    }

    #[test]
    fn a_calibration_plot_has_a_point_for_each_bin_with_rows() {
        let bins = reliability(&[0.1, 0.1, 1.0], &[true, false, true]);
        assert_eq!(bins.len(), 2);
        assert_eq!((bins[0].share, bins[0].rows), (0.5, 2));
        assert!((bins[0].mean_probability - 0.1).abs() < 1e-6);
        assert_eq!((bins[1].share, bins[1].mean_probability), (1.0, 1.0));
    }

    #[test]
    fn a_histogram_counts_each_label_by_itself() {
        let scores = [0.0, 1.0, 1.0, 2.0, f32::MIN];
        let histogram = histogram(&scores, &[false, false, true, true, false], 2);
        assert_eq!((histogram.low, histogram.high), (0.0, 2.0));
        assert_eq!(histogram.positives, [0.0, 1.0]);
        assert!((histogram.negatives[0] - 2.0 / 3.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn the_area_under_the_curve_is_auroc(
            rows in prop::collection::vec((0i8..5, any::<bool>()), 2..40)
        ) {
            let scores: Vec<f32> = rows.iter().map(|row| f32::from(row.0)).collect();
            let y: Vec<bool> = rows.iter().map(|row| row.1).collect();
            prop_assume!(y.contains(&true) && y.contains(&false));
            let curve = roc(&scores, &y);
            let area: f64 = curve
                .windows(2)
                .map(|pair| (pair[1][0] - pair[0][0]) * (pair[0][1] + pair[1][1]) / 2.0)
                .sum();
            prop_assert!((area - auroc(&scores, &y).unwrap()).abs() < 1e-9);
        }

        #[test]
        fn a_histogram_loses_no_row(
            rows in prop::collection::vec((-9.0f32..9.0, any::<bool>()), 1..40)
        ) {
            let scores: Vec<f32> = rows.iter().map(|row| row.0).collect();
            let y: Vec<bool> = rows.iter().map(|row| row.1).collect();
            let histogram = histogram(&scores, &y, 7);
            for (shares, label) in [(&histogram.positives, true), (&histogram.negatives, false)] {
                let sum: f64 = shares.iter().sum();
                let expected = f64::from(u8::from(y.contains(&label)));
                prop_assert!((sum - expected).abs() < 1e-9);
            }
        }
    }
}
