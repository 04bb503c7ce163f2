//! What a probe must beat: the length of the text, its words, and SafeSwitch's own recipe, all
//! fitted on one training set.

use inwit_probes::Positions;

use super::logistic::{Plane, SparseRow, Training};
use super::recipe::Recipe;
use super::set::EvalSet;
use super::words::{BagOfWords, word_count};
use crate::error::{Error, Result};
use crate::lab::bench::{Bench, Tick};
use crate::lab::fit::off_thread;

/// One scorer's logits on a set, a run per seed.
#[derive(Clone, Debug, PartialEq)]
pub struct BaselineScores {
    pub name: &'static str,
    pub runs: Vec<Vec<f32>>,
}

/// The baselines of one training set.
#[derive(Clone, Debug)]
pub struct Baselines {
    pub length: Length,
    pub bag: BagOfWords,
    pub recipe: Recipe,
    positions: Positions,
}

/// Logistic regression on how long a text is, and nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Length {
    plane: Plane,
    /// Mean and scale of each number.
    scaling: Vec<[f64; 2]>,
}

pub const LENGTH: &str = "length only";
pub const BAG_OF_WORDS: &str = "bag of words";
pub const SAFESWITCH: &str = "SafeSwitch's recipe";

const LENGTH_PENALTY: f64 = 1e-3;

impl Baselines {
    /// Fits all three on the rows of `train`. `seeds` are the recipe's; the first one also shuffles
    /// the folds of the bag of words.
    pub async fn fit(
        bench: &Bench,
        train: &EvalSet,
        positions: Positions,
        seeds: &[u64],
        tick: Tick<'_>,
    ) -> Result<Self> {
        let y = train.positives();
        if !(y.contains(&true) && y.contains(&false)) {
            return Err(Error::file(
                &train.labelled.file,
                format!(
                    "has only one label; baselines learn from {} and {} rows",
                    train.labels.positive(),
                    train.labels.negative()
                ),
            ));
        }
        let (texts, y, groups) = (train.texts(positions), y.to_vec(), train.groups.clone());
        let seed = seeds.first().copied().unwrap_or(0);
        let words = move || {
            let bag = BagOfWords::fit(&texts, &y, &groups, seed);
            Ok((Length::fit(&texts, &y), bag))
        };
        let (length, bag) = off_thread(words).await?;
        Ok(Self {
            length,
            bag,
            recipe: Recipe::fit(bench, train, positions, seeds, tick).await?,
            positions,
        })
    }

    /// The logits of each on every row of the set.
    pub async fn score(
        &self,
        bench: &Bench,
        set: &EvalSet,
        tick: Tick<'_>,
    ) -> Result<Vec<BaselineScores>> {
        let texts = set.texts(self.positions);
        let each = |logit: &dyn Fn(&String) -> f32| vec![texts.iter().map(logit).collect()];
        Ok(vec![
            BaselineScores {
                name: LENGTH,
                runs: each(&|text| self.length.logit(text)),
            },
            BaselineScores {
                name: BAG_OF_WORDS,
                runs: each(&|text| self.bag.logit(text)),
            },
            BaselineScores {
                name: SAFESWITCH,
                runs: self.recipe.score(bench, set, tick).await?,
            },
        ])
    }
}

impl Length {
    pub fn fit(texts: &[String], y: &[bool]) -> Self {
        let numbers: Vec<[f64; 2]> = texts.iter().map(|text| lengths(text)).collect();
        let scaling = (0..2).map(|index| {
            let values = || numbers.iter().map(|row| row[index]);
            let mean = values().sum::<f64>() / texts.len().max(1) as f64;
            let squares: f64 = values().map(|v| (v - mean).powi(2)).sum();
            let deviation = (squares / texts.len().max(1) as f64).sqrt();
            [mean, if deviation > 1e-9 { deviation } else { 1.0 }]
        });
        let mut length = Self {
            scaling: scaling.collect(),
            plane: Plane::zero(2),
        };
        let rows: Vec<SparseRow> = texts.iter().map(|text| length.row(text)).collect();
        let rows: Vec<&SparseRow> = rows.iter().collect();
        let training = Training {
            rows: &rows,
            y,
            features: 2,
        };
        length.plane = Plane::fit(&training, LENGTH_PENALTY, Plane::zero(2));
        length
    }

    pub fn logit(&self, text: &str) -> f32 {
        self.plane.logit(&self.row(text)) as f32
    }

    fn row(&self, text: &str) -> SparseRow {
        let scaled = |(value, [mean, scale]): (f64, &[f64; 2])| ((value - mean) / scale) as f32;
        let values = lengths(text).into_iter().zip(&self.scaling).map(scaled);
        (0..).zip(values).collect()
    }
}

/// Words and characters; their logarithms, so that one long prompt does not set the scale.
fn lengths(text: &str) -> [f64; 2] {
    [word_count(text), text.chars().count()].map(|count| (count as f64).ln_1p())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_knows_length_and_nothing_else() {
        let texts: Vec<String> = (1..=20).map(|words| "word ".repeat(words)).collect();
        let y: Vec<bool> = (1..=20).map(|words| words > 10).collect();
        let length = Length::fit(&texts, &y);
        assert!(length.logit(&"other ".repeat(20)) > 1.0);
        assert!(length.logit("brief") < -1.0);
        assert_eq!(length.logit("abcd efgh"), length.logit("ijkl mnop"));
    }

    #[test]
    fn texts_of_one_length_tell_nothing() {
        let texts = vec!["one two".to_owned(); 4];
        let length = Length::fit(&texts, &[true, false, true, false]);
        assert!(length.logit("one two").abs() < 1e-6);
    }
}
