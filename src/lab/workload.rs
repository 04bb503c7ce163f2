//! Harmless prompts of any length for measuring, the same for the same seed.

use super::seeded::Seeded;
use crate::error::Result;
use crate::model::{SpecialText, Tokenizer};

/// Plain prose, long enough that a token's neighbours differ.
const PROSE: &str = "The ferry leaves the small harbour at seven, and by half past the island is a \
grey line behind it. Gulls follow as far as the lighthouse, then turn back one by one. On deck a \
carpenter explains to his apprentice how a boat is planked: the wood is steamed until it bends, \
clamped to the ribs, and left overnight. Farther out the water changes colour twice, first where \
the river meets the sea and again above the sandbank, where the captain slows down and reads the \
depth aloud. The market on the mainland sells cheese, rope, seed potatoes and second-hand maps. \
Most of the maps are wrong about the footpaths but right about the wells, which is why walkers \
still buy them. In the afternoon the wind goes round to the west, the flags on the quay begin to \
snap, and whoever has business on the island hurries to finish it before the last boat. ";

/// `count` tokens of prose; another `start` begins elsewhere in it, so that no prefix is shared.
pub fn tokens(tokenizer: &Tokenizer, start: usize, count: usize) -> Result<Vec<u32>> {
    let prose = tokenizer.encode(PROSE, SpecialText::AsText)?;
    let words = prose.len().max(1);
    // A stride that is no divisor of most lengths visits every place before it repeats one.
    let first = start * 37 % words;
    Ok(prose.into_iter().cycle().skip(first).take(count).collect())
}

/// So many different texts of so many words each, which break off: a model that goes on with one
/// does not come to an end soon.
pub fn beginnings(seed: u64, count: usize, words: usize) -> Vec<String> {
    let mut seeded = Seeded::new(seed);
    let numbered = |number: usize| {
        format!(
            "Chapter {number}. {} and then",
            shuffled(&mut seeded, words)
        )
    };
    (1..=count).map(numbered).collect()
}

/// A question about `words` words of shuffled prose.
pub(crate) fn question(seeded: &mut Seeded, words: usize) -> String {
    const TASKS: [&str; 4] = [
        "Continue the story.",
        "Say in one sentence what this is about.",
        "Name three things that are mentioned.",
        "Rewrite this for a child.",
    ];
    let text = shuffled(seeded, words);
    let task = TASKS[seeded.below(TASKS.len())];
    format!("{text}\n\n{task}")
}

/// `words` words of the prose, its sentences in another order.
fn shuffled(seeded: &mut Seeded, words: usize) -> String {
    let mut sentences: Vec<&str> = PROSE.split_inclusive(". ").collect();
    seeded.shuffle(&mut sentences);
    let text = sentences.into_iter().flat_map(str::split_whitespace);
    let text: Vec<&str> = text.cycle().take(words).collect();
    text.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_beginnings_are_alike() {
        let asked = beginnings(7, 40, 12);
        let different: std::collections::HashSet<&String> = asked.iter().collect();
        assert_eq!(different.len(), 40);
    }

    #[test]
    fn a_question_has_its_length_and_repeats_for_a_seed() {
        let asked = question(&mut Seeded::new(4), 300);
        let (text, task) = asked.split_once("\n\n").expect("two parts");
        assert_eq!(text.split_whitespace().count(), 300);
        assert!(task.ends_with('.'));
        assert_eq!(asked, question(&mut Seeded::new(4), 300));
        assert_ne!(asked, question(&mut Seeded::new(5), 300));
    }
}
