//! Fits probes and their calibrations to activations.
//! Deterministic given a seed; knows nothing of where activations come from.

mod attention;
mod calibrate;
mod lda;
mod logistic;
mod means;
mod null_space;

use std::fmt;
use std::str::FromStr;

use ndarray::{Array1, Array2, Axis};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::manifest::NormKind;
use crate::metrics::rows_by_group;
use crate::probe::InputNorm;

pub use attention::{AttentionData, AttentionFit, AttentionParams, TokenStates, fit_attention};
pub use calibrate::{isotonic, operating_point, platt};
pub use lda::{check_shrinkage, fit_lda};
pub use logistic::{CrossValidation, LogisticFit, LogisticParams, fit_logistic};
pub use means::{difference_of_means, fit_difference_of_means};
pub use null_space::{Avoid, OffSubspace, off_subspace};

/// Hidden states at one site with their labels. Rows of one group (rewrites of one prompt) are
/// one piece of evidence: splits, folds and resampling never tear a group apart.
#[derive(Debug, Clone, PartialEq)]
pub struct FitData {
    /// `[rows, d_model]`
    pub x: Array2<f32>,
    /// `[rows]`
    pub y: Vec<bool>,
    /// `[rows]`
    pub group: Vec<String>,
}

impl FitData {
    pub fn rows(&self) -> usize {
        self.y.len()
    }

    /// Refuses rows without labels or groups, values that are not finite, and a missing class.
    pub fn check(&self) -> Result<()> {
        if self.x.nrows() != self.y.len() {
            return Err(Error::data(
                "labels",
                format!("{} labels for {} rows", self.y.len(), self.x.nrows()),
            ));
        }
        check_labels(&self.y, &self.group)?;
        if self.x.ncols() == 0 {
            return Err(Error::data("activations", "have no dimensions"));
        }
        match self.x.indexed_iter().find(|(_, value)| !value.is_finite()) {
            Some(((row, _), _)) => Err(Error::data(
                "activations",
                format!("row {row} is not finite"),
            )),
            None => Ok(()),
        }
    }

    /// The rows in that order; a row may come more than once.
    pub fn select(&self, rows: &[usize]) -> Self {
        Self {
            x: self.x.select(Axis(0), rows),
            y: rows.iter().map(|row| self.y[*row]).collect(),
            group: rows.iter().map(|row| self.group[*row].clone()).collect(),
        }
    }

    /// Sets about `fraction` of the rows aside, whole groups at a time and alike in both classes:
    /// `(the rest, set aside)`. Does not depend on the order of the rows' groups.
    pub fn split_by_group(&self, seed: u64, fraction: f64) -> Result<(Self, Self)> {
        self.check()?;
        let (rest, aside) = split_rows(&self.y, &self.group, seed, fraction)?;
        Ok((self.select(&rest), self.select(&aside)))
    }

    /// The rows as `weight` wants them: all rows, and further draws of the class that is too rare,
    /// group by group, so that no group is preferred.
    pub fn weighted(&self, weight: ClassWeight, seed: u64) -> Self {
        self.select(&self.weighted_rows(weight, seed))
    }

    /// The indices of `weighted`, for fits that do not want the states twice.
    pub fn weighted_rows(&self, weight: ClassWeight, seed: u64) -> Vec<usize> {
        weighted_rows(&self.y, &self.group, weight, seed)
    }

    /// The states as a head of that norm sees them, and the norm. Checks the data first.
    pub fn normalised(&self, norm: NormKind) -> Result<(InputNorm, Array2<f32>)> {
        self.check()?;
        means::normalised(&self.x, norm)
    }
}

/// What the positive rows together weigh against the negative ones, reached by drawing rows of the
/// class that is too rare again.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ClassWeight {
    /// As much.
    #[default]
    Balanced,
    /// As their numbers are.
    None,
    /// So many times as much, between 1/100 and 100.
    Ratio(f64),
}

impl ClassWeight {
    const MOST: f64 = 100.0;

    /// What each row weighs in a loss, with a mean of 1. Both classes must be there.
    pub fn of_rows(self, y: &[bool]) -> Vec<f32> {
        let ratio = match self {
            Self::None => return vec![1.0; y.len()],
            Self::Balanced => 1.0,
            Self::Ratio(ratio) => ratio,
        };
        let positives = y.iter().filter(|y| **y).count() as f64;
        let rows = y.len() as f64;
        let positive = rows * ratio / (ratio + 1.0) / positives;
        let negative = rows / (ratio + 1.0) / (rows - positives);
        let weight = |y: &bool| if *y { positive } else { negative };
        y.iter().map(|y| weight(y) as f32).collect()
    }
}

impl fmt::Display for ClassWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Balanced => f.write_str("balanced"),
            Self::None => f.write_str("none"),
            Self::Ratio(ratio) => write!(f, "{ratio}:1"),
        }
    }
}

impl FromStr for ClassWeight {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ratio = |text: &str| {
            let (positive, negative) = text.split_once(':')?;
            let ratio = positive.parse::<f64>().ok()? / negative.parse::<f64>().ok()?;
            (1.0 / Self::MOST..=Self::MOST)
                .contains(&ratio)
                .then_some(Self::Ratio(ratio))
        };
        match text {
            "balanced" => Ok(Self::Balanced),
            "none" => Ok(Self::None),
            _ => ratio(text).ok_or_else(|| {
                Error::invalid(
                    "class_weight",
                    "expected balanced, none, or what the positive rows together weigh against \
                     the negative ones, such as 2:1 (between 1:100 and 100:1)",
                )
            }),
        }
    }
}

pub(crate) fn check_labels(y: &[bool], group: &[String]) -> Result<()> {
    if group.len() != y.len() {
        return Err(Error::data(
            "groups",
            format!("{} groups for {} labels", group.len(), y.len()),
        ));
    }
    let positives = y.iter().filter(|y| **y).count();
    if positives == 0 || positives == y.len() {
        return Err(Error::data(
            "labels",
            format!(
                "{positives} positives and {} negatives; both are needed",
                y.len() - positives
            ),
        ));
    }
    Ok(())
}

/// `(the rest, set aside)`, each in rising order.
pub(crate) fn split_rows(
    y: &[bool],
    group: &[String],
    seed: u64,
    fraction: f64,
) -> Result<(Vec<usize>, Vec<usize>)> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::data("fraction", "must lie strictly between 0 and 1"));
    }
    let (mut rest, mut aside) = (Vec::new(), Vec::new());
    for groups in shuffled_strata(y, group, seed) {
        let rows: usize = groups.iter().map(Vec::len).sum();
        let wanted = (fraction * rows as f64).round() as usize;
        let mut taken = 0;
        for group in groups {
            let side = if taken < wanted {
                &mut aside
            } else {
                &mut rest
            };
            taken += group.len();
            side.extend(group);
        }
    }
    for side in [&mut rest, &mut aside] {
        side.sort_unstable();
        let positives = side.iter().filter(|row| y[**row]).count();
        if positives == 0 || positives == side.len() {
            return Err(Error::data(
                "groups",
                "are too few to have both classes on both sides of a split",
            ));
        }
    }
    Ok((rest, aside))
}

/// The rows held out in each fold.
pub(crate) fn folds(y: &[bool], group: &[String], seed: u64, count: usize) -> Vec<Vec<usize>> {
    let mut folds = vec![Vec::new(); count];
    let mut turn = 0;
    for groups in shuffled_strata(y, group, seed) {
        for group in groups {
            folds[turn % count].extend(group);
            turn += 1;
        }
    }
    folds
}

/// Groups in a seeded order, kept apart by the classes that they hold.
fn shuffled_strata(y: &[bool], group: &[String], seed: u64) -> [Vec<Vec<usize>>; 3] {
    let mut strata = [const { Vec::new() }; 3];
    for rows in rows_by_group(group) {
        let positives = rows.iter().filter(|row| y[**row]).count();
        let stratum = match positives {
            0 => 0,
            all if all == rows.len() => 1,
            _ => 2,
        };
        strata[stratum].push(rows);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for groups in &mut strata {
        groups.shuffle(&mut rng);
    }
    strata
}

pub(crate) fn weighted_rows(
    y: &[bool],
    group: &[String],
    weight: ClassWeight,
    seed: u64,
) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..y.len()).collect();
    let ratio = match weight {
        ClassWeight::None => return rows,
        ClassWeight::Balanced => 1.0,
        ClassWeight::Ratio(ratio) => ratio,
    };
    let positives = y.iter().filter(|y| **y).count();
    let negatives = y.len() - positives;
    let wanted_positives = (negatives as f64 * ratio).round() as usize;
    let wanted_negatives = (positives as f64 / ratio).round() as usize;
    let rarer = wanted_positives > positives;
    let missing = match rarer {
        true => wanted_positives - positives,
        false => wanted_negatives.saturating_sub(negatives),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut donors: Vec<Vec<usize>> = rows_by_group(group)
        .into_iter()
        .map(|rows| {
            rows.into_iter()
                .filter(|row| y[*row] == rarer)
                .collect::<Vec<_>>()
        })
        .filter(|rows| !rows.is_empty())
        .collect();
    donors.shuffle(&mut rng);
    let drawn = donors.iter().cycle().take(missing);
    rows.extend(drawn.map(|donor| donor[rng.gen_range(0..donor.len())]));
    rows
}

/// Mean and scale of each dimension; a dimension that never varies keeps its own scale.
pub(crate) fn standardisation(x: &Array2<f32>) -> (Vec<f32>, Vec<f32>) {
    let rows = x.nrows() as f64;
    let wide = x.mapv(f64::from);
    let mean = wide.sum_axis(Axis(0)) / rows;
    let mut squares = Array1::<f64>::zeros(x.ncols());
    for row in wide.rows() {
        let away = &row - &mean;
        squares += &(&away * &away);
    }
    let scale = squares.iter().zip(&mean).map(|(sum, mean)| {
        let deviation = (sum / rows).sqrt();
        let varies = deviation > 1e-6 * (1e-3 + mean.abs());
        if varies { deviation as f32 } else { 1.0 }
    });
    let scale = scale.collect();
    (mean.iter().map(|mean| *mean as f32).collect(), scale)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::metrics::auroc;
    use crate::probe::Head;
    use ndarray::ArrayView1;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, prop_assume, proptest};

    /// Two clouds that a plane separates with some overlap: positives are shifted along a few
    /// dimensions; dimension 0 is large, far from zero and says nothing, dimension 1 is constant.
    pub(crate) fn two_clouds(rows: usize, d_model: usize, seed: u64) -> FitData {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut x = Array2::zeros((rows, d_model));
        let y: Vec<bool> = (0..rows).map(|row| row % 3 == 0).collect();
        for (mut row, positive) in x.rows_mut().into_iter().zip(&y) {
            for (d, value) in row.iter_mut().enumerate() {
                let noise: f32 = (0..4).map(|_| rng.gen_range(-1.0_f32..1.0)).sum();
                let shift = if *positive && d % 5 == 2 { 1.0 } else { 0.0 };
                *value = match d {
                    0 => 1000.0 + 50.0 * noise,
                    1 => 7.0,
                    _ => noise + shift,
                };
            }
        }
        let group = (0..rows).map(|row| format!("g{}", row / 6)).collect();
        FitData { x, y, group }
    }

    pub(crate) fn logits(head: &Head, x: &Array2<f32>) -> Vec<f32> {
        let logit = |row: ArrayView1<'_, f32>| {
            let row = row.to_vec();
            head.apply(&row).unwrap()[0]
        };
        x.rows().into_iter().map(logit).collect()
    }

    /// In 24 dimensions five carry the shift, so no plane does better than
    /// `Phi(sqrt(5) / 1.155 / sqrt(2))`, an AUROC of 0.914.
    pub(crate) fn check_separates(head: &Head) {
        let fresh = two_clouds(600, head.weight.len(), 99);
        let found = auroc(&logits(head, &fresh.x), &fresh.y).unwrap();
        assert!(found > 0.89, "AUROC {found}");
        assert!(!matches!(&head.norm, InputNorm::Standard { scale, .. } if scale.contains(&0.0)));
    }

    #[test]
    fn a_split_keeps_groups_whole_and_both_classes_on_both_sides() {
        let data = two_clouds(300, 4, 1);
        let (rest, aside) = data.split_by_group(5, 0.2).unwrap();
        assert!(rest.group.iter().all(|group| !aside.group.contains(group)));
        assert_eq!(rest.rows() + aside.rows(), 300);
        assert!((50..=70).contains(&aside.rows()), "{}", aside.rows());
        assert_eq!((rest, aside), data.split_by_group(5, 0.2).unwrap());
        assert_ne!(
            data.split_by_group(6, 0.2).unwrap().1,
            data.split_by_group(5, 0.2).unwrap().1
        );
    }

    #[test]
    fn one_group_cannot_be_split() {
        let mut data = two_clouds(30, 3, 1);
        data.group = vec!["same".to_owned(); 30];
        assert!(data.split_by_group(5, 0.5).is_err());
    }

    #[test]
    fn bad_rows_are_refused_by_name() {
        let check = |change: fn(&mut FitData), expected: &str| {
            let mut data = two_clouds(30, 3, 1);
            change(&mut data);
            let message = data.check().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(|data| data.x[[7, 2]] = f32::NAN, "row 7");
        check(|data| data.y.truncate(3), "3 labels for 30 rows");
        check(|data| data.group.truncate(3), "3 groups");
        check(|data| data.y.fill(true), "0 negatives");
        check(|data| data.x = Array2::zeros((30, 0)), "no dimensions");
    }

    #[test]
    fn a_class_weight_is_a_word_or_a_ratio() {
        let check = |text: &str, expected| assert_eq!(text.parse::<ClassWeight>().ok(), expected);
        check("balanced", Some(ClassWeight::Balanced));
        check("none", Some(ClassWeight::None));
        check("3:2", Some(ClassWeight::Ratio(1.5)));
        for bad in ["", "even", "1:0", "0:1", "1:1000", "-1:2", "nan:1", "1:2:3"] {
            check(bad, None);
        }
    }

    #[test]
    fn weights_in_a_loss_have_the_ratio_and_a_mean_of_one() {
        let y: Vec<bool> = (0..300).map(|row| row % 3 == 0).collect();
        for (weight, ratio) in [
            (ClassWeight::Balanced, 1.0),
            (ClassWeight::None, 0.5),
            (ClassWeight::Ratio(4.0), 4.0),
        ] {
            let weights = weight.of_rows(&y);
            let of = |class: bool| -> f32 {
                let rows = weights.iter().zip(&y).filter(|(_, y)| **y == class);
                rows.map(|(weight, _)| weight).sum()
            };
            assert!((of(true) / of(false) - ratio).abs() < 1e-4, "{weight}");
            assert!(
                (weights.iter().sum::<f32>() - 300.0).abs() < 1e-2,
                "{weight}"
            );
        }
    }

    #[test]
    fn a_ratio_is_reached_by_drawing_the_rarer_class_again() {
        let data = two_clouds(300, 3, 1); // 100 positives
        let positives = |weight| {
            let rows = data.weighted(weight, 4).y;
            (rows.iter().filter(|y| **y).count(), rows.len())
        };
        assert_eq!(positives(ClassWeight::None), (100, 300));
        assert_eq!(positives(ClassWeight::Balanced), (200, 400));
        assert_eq!(positives(ClassWeight::Ratio(2.0)), (400, 600));
        assert_eq!(positives(ClassWeight::Ratio(0.25)), (100, 500));
    }

    proptest! {
        #[test]
        fn balancing_evens_the_classes_and_keeps_every_row(
            labels in proptest::collection::vec((any::<bool>(), 0_u8..6), 2..60), seed in any::<u64>(),
        ) {
            let y: Vec<bool> = labels.iter().map(|(y, _)| *y).collect();
            let group: Vec<String> = labels.iter().map(|(_, g)| g.to_string()).collect();
            prop_assume!(y.contains(&true) && y.contains(&false));
            let rows = weighted_rows(&y, &group, ClassWeight::Balanced, seed);
            let positives = rows.iter().filter(|row| y[**row]).count();
            prop_assert_eq!(positives * 2, rows.len());
            prop_assert!((0..y.len()).all(|row| rows.contains(&row)));
        }

        #[test]
        fn folds_hold_every_row_once_and_no_group_twice(
            labels in proptest::collection::vec((any::<bool>(), 0_u8..9), 1..60), count in 2_usize..6,
        ) {
            let y: Vec<bool> = labels.iter().map(|(y, _)| *y).collect();
            let group: Vec<String> = labels.iter().map(|(_, g)| g.to_string()).collect();
            let folds = folds(&y, &group, 3, count);
            let mut all: Vec<usize> = folds.iter().flatten().copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..y.len()).collect::<Vec<_>>());
            for name in &group {
                let holding = folds.iter().filter(|fold| fold.iter().any(|row| &group[*row] == name));
                prop_assert_eq!(holding.count(), 1);
            }
        }
    }
}
