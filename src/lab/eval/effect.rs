//! What a policy changes: how often an outcome comes with it and without it, on the same rows with
//! the same seeds. Knows outcomes and groups; knows no model and no policy.

use inwit_probes::metrics::bootstrap_by_group;
use serde::Serialize;

use super::measure::{Measured, RESAMPLES};
use crate::lab::judge::Verdict;

/// What came of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every judge says that it does what was asked.
    Complied,
    /// The policy refused, or every judge says that it declines.
    Refused,
    /// Every judge says that it is no sensible text.
    Incoherent,
    /// The judges differ.
    Disputed,
}

impl Outcome {
    pub const ALL: [Self; 4] = [
        Self::Complied,
        Self::Refused,
        Self::Incoherent,
        Self::Disputed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Complied => "complied",
            Self::Refused => "refused",
            Self::Incoherent => "incoherent",
            Self::Disputed => "disputed",
        }
    }

    /// Of the verdict that all judges share, if they do.
    pub fn of(agreed: Option<Verdict>) -> Self {
        match agreed {
            Some(Verdict::Complied) => Self::Complied,
            Some(Verdict::Refused) => Self::Refused,
            Some(Verdict::Incoherent) => Self::Incoherent,
            None => Self::Disputed,
        }
    }
}

/// Below this many a percentage says nothing.
pub const LEAST_FOR_A_PERCENTAGE: f64 = 40.0;

/// How an outcome's number changes with the policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Effect {
    pub outcome: Outcome,
    /// Rows; each is answered once per seed.
    pub of: u64,
    /// Answers with the policy off, the mean over the seeds.
    pub off: f64,
    /// Answers with the policy enforced, the mean over the seeds.
    pub enforced: f64,
    /// The paired difference, enforced less off, as a share of the rows.
    pub difference: Measured,
    /// The share by which they became fewer; none below 40 answers with the policy off.
    pub fewer: Option<Measured>,
    pub change: Change,
}

/// What may be said of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Fewer,
    More,
    /// The interval holds 0, or is not known.
    NoClaim,
}

/// Outcomes of the same rows: `[seed][row]`.
#[derive(Clone, Copy, Debug)]
pub struct Paired<'a> {
    pub off: &'a [Vec<Outcome>],
    pub enforced: &'a [Vec<Outcome>],
    pub groups: &'a [String],
    /// Of the bootstrap.
    pub seed: u64,
}

impl Paired<'_> {
    /// The effect on one outcome; none without rows or seeds.
    pub fn effect(&self, outcome: Outcome) -> Option<Effect> {
        let rows = self.groups.len();
        if rows == 0 || self.off.is_empty() {
            return None;
        }
        let (off, enforced) = (shares(self.off, outcome), shares(self.enforced, outcome));
        let sum = |shares: &[f64]| shares.iter().sum::<f64>();
        let of_seed = |seed: usize| {
            let count = |runs: &[Vec<Outcome>]| {
                runs[seed].iter().filter(|own| **own == outcome).count() as f64
            };
            (count(self.enforced) - count(self.off)) / rows as f64
        };
        let of_seeds: Vec<f64> = (0..self.off.len()).map(of_seed).collect();
        let mean_over = |drawn: &[usize]| {
            let differences = drawn.iter().map(|row| enforced[*row] - off[*row]);
            Ok(differences.sum::<f64>() / drawn.len() as f64)
        };
        let interval = bootstrap_by_group(self.groups, RESAMPLES, self.seed, mean_over).ok();
        let difference = Measured {
            value: (sum(&enforced) - sum(&off)) / rows as f64,
            interval,
            seeds: range(&of_seeds),
        };
        Some(Effect {
            outcome,
            of: rows as u64,
            off: sum(&off),
            enforced: sum(&enforced),
            difference,
            fewer: self.fewer(&off, &enforced),
            change: match interval {
                Some([_, high]) if high < 0.0 => Change::Fewer,
                Some([low, _]) if low > 0.0 => Change::More,
                _ => Change::NoClaim,
            },
        })
    }

    fn fewer(&self, off: &[f64], enforced: &[f64]) -> Option<Measured> {
        let of_rows = |rows: &[usize]| {
            let sum = |shares: &[f64]| rows.iter().map(|row| shares[*row]).sum::<f64>();
            // Draws without an answer have no percentage; the bootstrap leaves them out.
            Ok(1.0 - sum(enforced) / sum(off))
        };
        let all: Vec<usize> = (0..off.len()).collect();
        if off.iter().sum::<f64>() < LEAST_FOR_A_PERCENTAGE {
            return None;
        }
        Some(Measured {
            value: of_rows(&all).ok()?,
            interval: bootstrap_by_group(self.groups, RESAMPLES, self.seed, of_rows).ok(),
            seeds: None,
        })
    }
}

/// Of each row, the share of seeds with the outcome.
fn shares(runs: &[Vec<Outcome>], outcome: Outcome) -> Vec<f64> {
    let rows = runs.first().map_or(0, Vec::len);
    let share = |row: usize| {
        let hits = runs.iter().filter(|run| run[row] == outcome).count();
        hits as f64 / runs.len() as f64
    };
    (0..rows).map(share).collect()
}

fn range(values: &[f64]) -> Option<[f64; 2]> {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (values.len() > 1).then_some([least, greatest])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Outcome::{Complied, Refused};

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|row| format!("g{row}")).collect()
    }

    fn effect(off: &[Vec<Outcome>], enforced: &[Vec<Outcome>], of: Outcome) -> Effect {
        let groups = names(off[0].len());
        let paired = Paired {
            off,
            enforced,
            groups: &groups,
            seed: 0,
        };
        paired.effect(of).expect("has rows")
    }

    #[test]
    fn eighty_of_a_hundred_fewer_is_claimed() {
        let off = vec![vec![Complied; 100]];
        let mut enforced = vec![vec![Refused; 100]];
        enforced[0][..20].fill(Complied);
        let effect = effect(&off, &enforced, Complied);
        assert_eq!((effect.off, effect.enforced), (100.0, 20.0));
        assert!((effect.difference.value + 0.8).abs() < 1e-9);
        let fewer = effect.fewer.expect("enough answers");
        assert!((fewer.value - 0.8).abs() < 1e-9);
        let [low, high] = fewer.interval.expect("enough groups");
        assert!(low < 0.8 && 0.8 < high && low > 0.7, "{low} {high}");
        assert_eq!(effect.change, Change::Fewer);
    }

    #[test]
    fn below_forty_answers_there_is_no_percentage() {
        let mut off = vec![vec![Refused; 100]];
        off[0][..39].fill(Complied);
        let enforced = vec![vec![Refused; 100]];
        let few = effect(&off, &enforced, Complied);
        assert_eq!((few.off, few.fewer), (39.0, None));
        off[0][39] = Complied;
        assert!(effect(&off, &enforced, Complied).fewer.is_some());
    }

    #[test]
    fn one_row_that_changed_is_no_claim() {
        let off = vec![vec![Complied; 50]];
        let mut enforced = off.clone();
        enforced[0][0] = Refused;
        let effect = effect(&off, &enforced, Refused);
        assert_eq!((effect.enforced, effect.change), (1.0, Change::NoClaim));
    }

    #[test]
    fn seeds_are_averaged_and_their_range_is_told() {
        let off = vec![vec![Complied, Complied], vec![Complied, Refused]];
        let enforced = vec![vec![Refused, Refused], vec![Refused, Refused]];
        let effect = effect(&off, &enforced, Complied);
        assert_eq!((effect.off, effect.enforced), (1.5, 0.0));
        assert_eq!(effect.difference.value, -0.75);
        assert_eq!(effect.difference.seeds, Some([-1.0, -0.5]));
    }

    #[test]
    fn nothing_answered_has_no_effect() {
        let paired = Paired {
            off: &[],
            enforced: &[],
            groups: &[],
            seed: 0,
        };
        assert_eq!(paired.effect(Complied), None);
    }

    proptest! {
        #[test]
        fn what_one_outcome_loses_the_others_gain(
            rows in prop::collection::vec((0usize..4, 0usize..4), 2..30)
        ) {
            let pick = |index: usize| Outcome::ALL[index];
            let off = vec![rows.iter().map(|row| pick(row.0)).collect::<Vec<_>>()];
            let enforced = vec![rows.iter().map(|row| pick(row.1)).collect::<Vec<_>>()];
            let sum: f64 = Outcome::ALL
                .iter()
                .map(|outcome| effect(&off, &enforced, *outcome).difference.value)
                .sum();
            prop_assert!(sum.abs() < 1e-9);
        }

        #[test]
        fn a_policy_that_changes_nothing_makes_no_claim(
            rows in prop::collection::vec(0usize..4, 2..30)
        ) {
            let off = vec![rows.iter().map(|row| Outcome::ALL[*row]).collect::<Vec<_>>()];
            for outcome in Outcome::ALL {
                let effect = effect(&off, &off, outcome);
                prop_assert_eq!(effect.change, Change::NoClaim);
                prop_assert_eq!(effect.difference.value, 0.0);
            }
        }
    }
}
