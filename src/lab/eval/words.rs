//! The bag of words: how far the words alone tell the labels apart.
//! Lower-case words, alone or with pairs of neighbours, weighed by how rare they are. Vocabulary,
//! weights and penalty come from the training set alone, by cross-validation over its groups.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;

use super::logistic::{Plane, SparseRow, Training};
use crate::lab::seeded::Seeded;

/// The terms of a training set, by their column.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    terms: Terms,
    columns: HashMap<String, u32>,
    /// `ln((1 + rows) / (1 + rows with the term)) + 1`, by column.
    rarity: Vec<f32>,
}

/// What counts as a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terms {
    /// Every word.
    Words,
    /// Words and pairs of neighbours, each in at least two texts: of pairs, most come once.
    WordsAndPairs,
}

/// A fitted bag of words.
#[derive(Clone, Debug)]
pub struct BagOfWords {
    vocabulary: Vocabulary,
    plane: Plane,
    /// The L2 penalty that cross-validation chose.
    pub penalty: f64,
}

/// Tried from the strongest on, each from where the one before ended.
const PENALTIES: [f64; 4] = [1e-2, 1e-3, 1e-4, 1e-5];
const FOLDS: usize = 5;
/// More terms than any prompt set needs; the most frequent are kept.
const MOST_TERMS: usize = 200_000;

impl Vocabulary {
    /// Learns terms and rarities.
    pub fn of(texts: &[String], terms: Terms) -> Self {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for text in texts {
            let distinct: BTreeSet<String> = terms.of(text).collect();
            for term in distinct {
                *counts.entry(term).or_default() += 1;
            }
        }
        let least = match terms {
            Terms::Words => 1,
            Terms::WordsAndPairs => 2,
        };
        let frequent = counts.into_iter().filter(|(_, rows)| *rows >= least);
        let mut kept: Vec<(String, usize)> = frequent.collect();
        // Stable: terms that are equally frequent stay in the order of the alphabet.
        kept.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
        kept.truncate(MOST_TERMS);
        let rarity = |rows: usize| ((1 + texts.len()) as f32 / (1 + rows) as f32).ln() + 1.0;
        Self {
            terms,
            rarity: kept.iter().map(|(_, rows)| rarity(*rows)).collect(),
            columns: (0..)
                .zip(kept)
                .map(|(column, (term, _))| (term, column))
                .collect(),
        }
    }

    pub fn len(&self) -> usize {
        self.rarity.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rarity.is_empty()
    }

    /// `(1 + ln count) * rarity` of each known term, scaled to length 1, so that long prompts do
    /// not outweigh short ones.
    pub fn row(&self, text: &str) -> SparseRow {
        let mut counts: BTreeMap<u32, f32> = BTreeMap::new();
        for term in self.terms.of(text) {
            if let Some(column) = self.columns.get(&term) {
                *counts.entry(*column).or_default() += 1.0;
            }
        }
        let weigh = |(column, count): (u32, f32)| {
            (column, (1.0 + count.ln()) * self.rarity[column as usize])
        };
        let mut row: SparseRow = counts.into_iter().map(weigh).collect();
        let length = row.iter().map(|(_, v)| v * v).sum::<f32>().sqrt();
        for (_, value) in &mut row {
            *value /= length;
        }
        row
    }
}

impl BagOfWords {
    /// Fits on texts with labels; terms and penalty are those of the least held-out loss, held out
    /// by whole groups.
    pub fn fit(texts: &[String], y: &[bool], groups: &[String], seed: u64) -> Self {
        let folds = folds(groups, FOLDS, seed);
        let losses_of = |terms: Terms| -> Vec<f64> {
            let losses: Vec<Vec<f64>> = folds
                .par_iter()
                .map(|held_out| held_out_losses(texts, y, held_out, terms))
                .collect();
            let total = |index: usize| losses.iter().map(|of_fold| of_fold[index]).sum();
            (0..PENALTIES.len()).map(total).collect()
        };
        let mut best = (f64::INFINITY, Terms::Words, 0);
        for terms in [Terms::Words, Terms::WordsAndPairs] {
            for (index, loss) in losses_of(terms).into_iter().enumerate() {
                if loss < best.0 {
                    best = (loss, terms, index);
                }
            }
        }
        let (_, terms, index) = best;
        let vocabulary = Vocabulary::of(texts, terms);
        let plane = path(&vocabulary, texts, y).swap_remove(index);
        Self {
            vocabulary,
            plane,
            penalty: PENALTIES[index],
        }
    }

    pub fn has_pairs(&self) -> bool {
        self.vocabulary.terms == Terms::WordsAndPairs
    }

    pub fn terms(&self) -> usize {
        self.vocabulary.len()
    }

    pub fn logit(&self, text: &str) -> f32 {
        self.plane.logit(&self.vocabulary.row(text)) as f32
    }
}

/// The loss on the rows held out, for each penalty.
fn held_out_losses(texts: &[String], y: &[bool], held_out: &[usize], terms: Terms) -> Vec<f64> {
    let mut kept = vec![true; y.len()];
    held_out.iter().for_each(|row| kept[*row] = false);
    let rest: Vec<usize> = (0..y.len()).filter(|row| kept[*row]).collect();
    let some = |rows: &[usize]| -> (Vec<String>, Vec<bool>) {
        let rows = rows.iter();
        rows.map(|row| (texts[*row].clone(), y[*row])).unzip()
    };
    let ((texts, y), (held_texts, held_y)) = (some(&rest), some(held_out));
    let vocabulary = Vocabulary::of(&texts, terms);
    let held: Vec<SparseRow> = held_texts.iter().map(|t| vocabulary.row(t)).collect();
    let held: Vec<&SparseRow> = held.iter().collect();
    path(&vocabulary, &texts, &y)
        .iter()
        .map(|plane| plane.log_loss(&held, &held_y))
        .collect()
}

/// A plane for each penalty.
fn path(vocabulary: &Vocabulary, texts: &[String], y: &[bool]) -> Vec<Plane> {
    let rows: Vec<SparseRow> = texts.iter().map(|text| vocabulary.row(text)).collect();
    let rows: Vec<&SparseRow> = rows.iter().collect();
    let training = Training {
        rows: &rows,
        y,
        features: vocabulary.len(),
    };
    let mut plane = Plane::zero(vocabulary.len());
    let mut planes = Vec::with_capacity(PENALTIES.len());
    for penalty in PENALTIES {
        plane = Plane::fit(&training, penalty, plane);
        planes.push(plane.clone());
    }
    planes
}

/// The rows of each fold, whole groups at a time.
fn folds(groups: &[String], count: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut rows_of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (row, group) in groups.iter().enumerate() {
        rows_of.entry(group).or_default().push(row);
    }
    let mut all: Vec<Vec<usize>> = rows_of.into_values().collect();
    Seeded::new(seed).shuffle(&mut all);
    let mut folds = vec![Vec::new(); count.min(all.len())];
    let count = folds.len().max(1);
    for (index, rows) in all.into_iter().enumerate() {
        folds[index % count].extend(rows);
    }
    folds
}

impl Terms {
    /// Lower-case words, then pairs of neighbours if they count.
    fn of(self, text: &str) -> impl Iterator<Item = String> {
        let lower = text.to_lowercase();
        let words: Vec<String> = lower
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect();
        let pairs: Vec<String> = match self {
            Self::Words => Vec::new(),
            Self::WordsAndPairs => words.windows(2).map(|pair| pair.join(" ")).collect(),
        };
        words.into_iter().chain(pairs)
    }
}

/// How many words a text has, as the bag of words counts them.
pub fn word_count(text: &str) -> usize {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn terms_are_lower_case_words_and_neighbours() {
        let terms = |terms: Terms| terms.of("Don't PANIC, Zoë!").collect::<Vec<_>>();
        let expected = ["don", "t", "panic", "zoë", "don t", "t panic", "panic zoë"];
        assert_eq!(terms(Terms::WordsAndPairs), expected);
        assert_eq!(terms(Terms::Words), expected[..4]);
        assert_eq!(word_count("Don't PANIC, Zoë!"), 4);
    }

    #[test]
    fn what_the_training_set_has_once_is_a_term_only_as_a_word_alone() {
        let texts = owned(&["a b", "a c", "a b"]);
        assert_eq!(Vocabulary::of(&texts, Terms::Words).len(), 3);
        let vocabulary = Vocabulary::of(&texts, Terms::WordsAndPairs);
        // a, b and "a b"; c and "a c" come once.
        assert_eq!(vocabulary.len(), 3);
        assert!(vocabulary.row("c d").is_empty());
        assert_eq!(vocabulary.row("a"), [(0, 1.0)]);
    }

    #[test]
    fn rarer_terms_weigh_more() {
        let vocabulary = Vocabulary::of(&owned(&["a b", "b a", "a", "a"]), Terms::Words);
        let row = vocabulary.row("a b");
        // a is in 4 of 4 rows: ln(5/5) + 1; b in 2: ln(5/3) + 1.
        let (a, b) = (1.0, (5.0f32 / 3.0).ln() + 1.0);
        let length = (a * a + b * b).sqrt();
        assert!((row[0].1 - a / length).abs() < 1e-6);
        assert!((row[1].1 - b / length).abs() < 1e-6);
    }

    #[test]
    fn words_that_tell_the_labels_apart_are_learnt() {
        let mut texts = Vec::new();
        let (mut y, mut groups) = (Vec::new(), Vec::new());
        for row in 0..40 {
            let positive = row % 2 == 0;
            let word = if positive { "picks" } else { "opens" };
            texts.push(format!("who {word} lock {}", row % 5));
            y.push(positive);
            groups.push(format!("g{row}"));
        }
        let bag = BagOfWords::fit(&texts, &y, &groups, 0);
        assert!(bag.logit("she picks it") > 0.5);
        assert!(bag.logit("she opens it") < -0.5);
        assert!(bag.logit("entirely other words").abs() < 0.5);
    }

    proptest! {
        #[test]
        fn a_row_has_length_one_or_no_terms(texts in prop::collection::vec("[a-d ]{0,12}", 1..8)) {
            let vocabulary = Vocabulary::of(&texts, Terms::WordsAndPairs);
            for text in &texts {
                let row = vocabulary.row(text);
                let length: f32 = row.iter().map(|(_, v)| v * v).sum();
                prop_assert!(row.is_empty() || (length - 1.0).abs() < 1e-5);
            }
        }

        #[test]
        fn folds_hold_every_row_once_and_tear_no_group(
            names in prop::collection::vec(0u8..6, 1..30), seed in any::<u64>(),
        ) {
            let groups: Vec<String> = names.iter().map(u8::to_string).collect();
            let folds = folds(&groups, 5, seed);
            let mut rows: Vec<usize> = folds.iter().flatten().copied().collect();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..groups.len()).collect::<Vec<_>>());
            for group in &groups {
                let holds = |fold: &&Vec<usize>| fold.iter().any(|row| &groups[*row] == group);
                prop_assert_eq!(folds.iter().filter(holds).count(), 1);
            }
        }
    }
}
