//! A labelled file as an evaluation sees it: labels, groups, categories, and texts for baselines.
//! Knows no model.

use std::path::Path;

use inwit_probes::Positions;

use crate::error::{Error, Result};
use crate::lab::examples::{Labelled, Labels};
use crate::lab::rows::{Row, RowPrompt};

/// A labelled file. Rows without a `group` are groups of their own.
#[derive(Clone, Debug)]
pub struct EvalSet {
    pub labelled: Labelled,
    pub labels: Labels,
    /// One per row.
    pub groups: Vec<String>,
}

impl EvalSet {
    /// Reads a file for a probe at `positions`; one that reads answers needs them in every row.
    pub fn read(path: &Path, positions: Positions) -> Result<Self> {
        let labelled = Labelled::read(path, positions)?;
        let first = labelled.rows[0].label.as_deref().and_then(Labels::of);
        let (labels, _) =
            first.ok_or_else(|| Error::internal("a labelled file without a label"))?;
        let group = |row: &Row| row.group.clone().unwrap_or_else(|| row.id.clone());
        Ok(Self {
            groups: labelled.rows.iter().map(group).collect(),
            labelled,
            labels,
        })
    }

    pub fn positives(&self) -> &[bool] {
        &self.labelled.positives
    }

    /// The text that a baseline reads: the prompt's turns, and the answer where the probe reads it.
    pub fn texts(&self, positions: Positions) -> Vec<String> {
        let text = |row: &Row| {
            let answer = row.answer.as_deref().filter(|_| positions.of_answer());
            match answer {
                Some(answer) => format!("{}\n{answer}", prompt_text(&row.prompt)),
                None => prompt_text(&row.prompt),
            }
        };
        self.labelled.rows.iter().map(text).collect()
    }

    /// Refuses to learn from labels of one kind and to be measured on another.
    pub fn check_same_labels(&self, other: &Self) -> Result<()> {
        if self.labels == other.labels {
            return Ok(());
        }
        Err(Error::file(
            &self.labelled.file,
            format!(
                "is labelled {} or {}, but {} is labelled {} or {}; evaluate each kind by itself",
                self.labels.positive(),
                self.labels.negative(),
                other.labelled.file,
                other.labels.positive(),
                other.labels.negative(),
            ),
        ))
    }
}

fn prompt_text(prompt: &RowPrompt) -> String {
    match prompt {
        RowPrompt::Text(text) | RowPrompt::Raw(text) => text.clone(),
        RowPrompt::Messages(turns) => {
            let contents: Vec<&str> = turns.iter().map(|turn| turn.content.as_str()).collect();
            contents.join("\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str, positions: Positions) -> EvalSet {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("set.jsonl");
        std::fs::write(&path, lines).expect("written");
        EvalSet::read(&path, positions).expect("reads")
    }

    #[test]
    fn a_row_without_a_group_is_one() {
        let set = read(
            "{\"text\":\"a\",\"label\":\"harmful\",\"group\":\"g\"}\n{\"text\":\"b\",\"label\":\"benign\"}\n",
            Positions::LastPromptToken,
        );
        assert_eq!(set.groups, ["g", "2"]);
        assert_eq!(
            (set.labels, set.positives()),
            (Labels::Prompts, &[true, false][..])
        );
    }

    #[test]
    fn a_baseline_reads_the_answer_only_where_the_probe_does() {
        let line = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"answer\":\"b\",\"label\":\"complied\"}\n";
        let texts = |positions| read(line, positions).texts(positions);
        assert_eq!(texts(Positions::LastPromptToken), ["a"]);
        assert_eq!(texts(Positions::EveryGenerated), ["a\nb"]);
    }

    #[test]
    fn labels_of_two_kinds_do_not_meet() {
        let prompts = read(
            "{\"text\":\"a\",\"label\":\"harmful\"}\n",
            Positions::LastPromptToken,
        );
        let answers = read(
            "{\"text\":\"a\",\"label\":\"refused\"}\n",
            Positions::LastPromptToken,
        );
        assert!(prompts.check_same_labels(&prompts).is_ok());
        let told = prompts.check_same_labels(&answers).expect_err("refused");
        assert!(told.to_string().contains("complied"), "{told}");
    }
}
