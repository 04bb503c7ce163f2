//! Labelled rows with the hidden states that a probe would read of them.
//! Knows which positions a probe reads; knows no fitting.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use inwit_probes::manifest::{Positions, SystemPromptRule, TrainedOn};
use inwit_probes::{Site, manifest::DataRecord};
use sha2::{Digest, Sha256};

use super::bench::{Bench, Tick, reading};
use super::collected::Collected;
use super::rows::{self, Row, at};
use super::seeded::Seeded;
use super::states::{RowStates, visit};
use crate::engine::request::{PositionSelection, PromptForm, Request, Work};
use crate::error::{Error, Result};

/// A row as a probe sees it.
#[derive(Clone, Debug)]
pub struct Example {
    /// Harmful, complied, or incoherent.
    pub positive: bool,
    pub group: String,
    /// At the positions that the probe reads.
    pub states: RowStates,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
}

/// What the labels of a file are about; the first word of each pair is the positive one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// `harmful` or `benign`
    Prompts,
    /// `complied` or `refused`
    Answers,
    /// `incoherent` or `coherent`
    Coherence,
}

impl Labels {
    const ALL: [Self; 3] = [Self::Prompts, Self::Answers, Self::Coherence];

    pub fn positive(self) -> &'static str {
        match self {
            Self::Prompts => "harmful",
            Self::Answers => "complied",
            Self::Coherence => "incoherent",
        }
    }

    pub fn negative(self) -> &'static str {
        match self {
            Self::Prompts => "benign",
            Self::Answers => "refused",
            Self::Coherence => "coherent",
        }
    }

    /// What a label is about, and whether it is the positive one.
    pub fn of(label: &str) -> Option<(Self, bool)> {
        Self::ALL.into_iter().find_map(|kind| match label {
            _ if label == kind.positive() => Some((kind, true)),
            _ if label == kind.negative() => Some((kind, false)),
            _ => None,
        })
    }
}

/// The rows of a labelled file, and what they have in common.
#[derive(Clone, Debug)]
pub struct Labelled {
    pub file: String,
    pub rows: Vec<Row>,
    /// One per row: harmful, complied, or incoherent.
    pub positives: Vec<bool>,
    /// What the labels are about; unset for benign rows that set thresholds.
    pub labels: Option<Labels>,
    pub record: DataRecord,
}

impl Labelled {
    /// Reads a file whose rows are labelled by one pair of `Labels`.
    ///
    /// A probe that reads answers needs an `answer` in every row.
    pub fn read(path: &Path, positions: Positions) -> Result<Self> {
        let file = path.display().to_string();
        let rows = rows::read(path)?;
        let (kind, positives) = labels(&file, &rows)?;
        let read = Self::checked(path, rows, positives, positions)?;
        Ok(Self {
            labels: kind,
            ..read
        })
    }

    /// Reads files on which what is fitted on these rows is measured. They must be others than
    /// these and each other, with labels about the same.
    pub fn read_dev(&self, files: &[PathBuf], positions: Positions) -> Result<Vec<Self>> {
        let mut dev: Vec<Self> = Vec::with_capacity(files.len());
        for path in files {
            let rows = Self::read(path, positions)?;
            let same = |other: &Self| other.record.sha256 == rows.record.sha256;
            let message = if same(self) {
                "is the very file that is fitted on, so it measures nothing"
            } else if dev.iter().any(same) {
                "is given twice"
            } else if rows.labels != self.labels {
                "has labels of another kind than the file that is fitted on"
            } else {
                dev.push(rows);
                continue;
            };
            return Err(Error::file(&rows.file, message));
        }
        Ok(dev)
    }

    /// Reads a file of benign rows: what sets a threshold. They may go without a label; one that is
    /// harmful or complied is an error.
    pub fn read_benign(path: &Path, positions: Positions) -> Result<Self> {
        let rows = rows::read(path)?;
        let benign = |row: &&Row| match row.label.as_deref() {
            None => true,
            Some(label) => matches!(Labels::of(label), Some((_, false))),
        };
        if let Some(row) = rows.iter().find(|row| !benign(row)) {
            let message = "must be benign: it sets thresholds";
            return Err(at(&path.display().to_string(), row.line, message));
        }
        let positives = vec![false; rows.len()];
        Self::checked(path, rows, positives, positions)
    }

    fn checked(
        path: &Path,
        rows: Vec<Row>,
        positives: Vec<bool>,
        positions: Positions,
    ) -> Result<Self> {
        let file = path.display().to_string();
        let missing = |row: &&Row| row.answer.as_deref().is_none_or(str::is_empty);
        if let (true, Some(row)) = (positions.of_answer(), rows.iter().find(missing)) {
            let message = format!(
                "no `answer`, but the positions {positions} are of answers; \
                 write some with `inwit generate` and put each `text` into its row as `answer`"
            );
            return Err(at(&file, row.line, message));
        }
        let record = record(path, rows.len())?;
        Ok(Self {
            file,
            rows,
            positives,
            labels: None,
            record,
        })
    }

    /// Reads the states of every row and hands the examples over in the order of the file; states
    /// that the bench has collected are not computed again.
    pub async fn visit(
        &self,
        bench: &Bench,
        sites: &[Site],
        positions: Positions,
        tick: Tick<'_>,
        mut each: impl FnMut(Example, &Request) -> Result<()>,
    ) -> Result<()> {
        if let Some(collected) = bench.states_of(&self.record) {
            return self.visit_collected(bench, collected, (sites, positions), tick, each);
        }
        let mut labels = self.positives.iter().zip(&self.rows);
        let selection = selection(positions);
        visit(
            bench,
            &self.file,
            &self.rows,
            sites,
            selection,
            tick,
            |request, states| {
                let (positive, row) = labels.next().expect("one label per row");
                let states =
                    states.filter(|position| reads(positions, &request, position as usize));
                if states.positions.is_empty() {
                    return Err(at(
                        &self.file,
                        row.line,
                        "has no token that the probe reads",
                    ));
                }
                let example = Example {
                    positive: *positive,
                    group: row.group.clone().unwrap_or_else(|| row.id.clone()),
                    states,
                    tokens: tokens(&request),
                };
                each(example, &request)
            },
        )
        .await
    }

    fn visit_collected(
        &self,
        bench: &Bench,
        collected: &Collected,
        (sites, positions): (&[Site], Positions),
        tick: Tick<'_>,
        mut each: impl FnMut(Example, &Request) -> Result<()>,
    ) -> Result<()> {
        let draft = |row: &Row| reading(row, sites, selection(positions));
        let requests = bench.prepare(&self.file, &self.rows, draft)?;
        let total = self.rows.len();
        for (done, (request, states)) in requests.iter().zip(collected.rows()).enumerate() {
            let line = self.rows[done].line;
            let example = states.example(sites, positions, self.positives[done])?;
            if example.tokens != tokens(request) {
                let message = "has other tokens than when its states were collected; collect again";
                return Err(at(&self.file, line, message));
            }
            if example.states.positions.is_empty() {
                return Err(at(&self.file, line, "has no token that the probe reads"));
            }
            each(example, request)?;
            tick(done + 1, total);
        }
        Ok(())
    }

    /// How many states of all rows a probe reads at each of its sites; runs no model.
    pub fn tokens_read(&self, bench: &Bench, positions: Positions) -> Result<usize> {
        let draft = |row: &Row| reading(row, &[Site::Embed], selection(positions));
        let requests = bench.prepare(&self.file, &self.rows, draft)?;
        let read = |request: &Request| {
            let tokens = request.prompt.tokens.len() + answer(request).len();
            (0..tokens)
                .filter(|position| reads(positions, request, *position))
                .count()
        };
        Ok(requests.iter().map(read).sum())
    }

    /// What requests the probe is trained on; rows that differ in form are an error.
    pub fn form(&self, requests: &[PromptForm]) -> Result<TrainedOn> {
        let mut common: Option<TrainedOn> = None;
        for (row, form) in self.rows.iter().zip(requests) {
            let trained_on =
                trained_on(form).map_err(|message| at(&self.file, row.line, message))?;
            match &common {
                None => common = Some(trained_on),
                Some(first) if *first == trained_on => {}
                Some(_) => {
                    let message = "another system prompt or number of turns than the rows before; \
                                   fit one probe per form";
                    return Err(at(&self.file, row.line, message));
                }
            }
        }
        common.ok_or_else(|| Error::file(&self.file, "holds no rows"))
    }
}

/// `(the rest, set aside)`: about `fraction` of the examples, whole groups at a time, alike in both
/// classes, whatever the order of the rows.
pub fn split(examples: Vec<Example>, seed: u64, fraction: f64) -> (Vec<Example>, Vec<Example>) {
    let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for example in &examples {
        let (rows, positives) = groups.entry(example.group.clone()).or_default();
        *rows += 1;
        *positives += usize::from(example.positive);
    }
    let mut aside = std::collections::HashSet::new();
    let mut seeded = Seeded::new(seed);
    for positive in [true, false] {
        // A group of both classes counts for the one it has more of.
        let of_class = |(_, (rows, positives)): &(&String, &(usize, usize))| {
            (positives * 2 > *rows) == positive
        };
        let mut names: Vec<_> = groups.iter().filter(of_class).collect();
        seeded.shuffle(&mut names);
        let rows: usize = names.iter().map(|(_, (rows, _))| rows).sum();
        let wanted = (rows as f64 * fraction).round() as usize;
        let mut taken = 0;
        for (name, (rows, _)) in names {
            if taken >= wanted {
                break;
            }
            taken += rows;
            aside.insert(name.clone());
        }
    }
    examples
        .into_iter()
        .partition(|example| !aside.contains(&example.group))
}

/// Name, hash and size of a data file, for an artefact's record.
pub fn record(path: &Path, rows: usize) -> Result<DataRecord> {
    let bytes = std::fs::read(path)
        .map_err(|error| Error::file(path.display(), format!("cannot be read: {error}")))?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok(DataRecord {
        name: name.to_string_lossy().into_owned(),
        sha256: hex::encode(Sha256::digest(&bytes)),
        rows: rows as u64,
    })
}

/// The states of an answer's end lie among the generated ones, so capture those.
pub(super) fn selection(positions: Positions) -> PositionSelection {
    match positions {
        Positions::LastPromptToken => PositionSelection::LastPromptToken,
        Positions::PromptContent => PositionSelection::AllPrompt,
        Positions::Generated(_) | Positions::FirstGenerated(_) | Positions::EveryGenerated => {
            PositionSelection::Generated
        }
    }
}

/// Whether a probe at `positions` reads this position of the request.
fn reads(positions: Positions, request: &Request, position: usize) -> bool {
    let answer = answer(request).len();
    read_at(positions, &request.prompt.content, answer, position)
}

/// Whether a probe at `positions` reads this position of a request whose prompt ends where its
/// content does and whose answer has so many tokens.
/// An answer that ends before token k is read at its end.
pub(super) fn read_at(
    positions: Positions,
    content: &Range<usize>,
    answer: usize,
    position: usize,
) -> bool {
    let prompt = content.end;
    match positions {
        Positions::LastPromptToken => position + 1 == prompt,
        Positions::PromptContent => content.contains(&position),
        Positions::EveryGenerated => position >= prompt,
        Positions::FirstGenerated(k) => (prompt..prompt + k as usize).contains(&position),
        Positions::Generated(k) => position + 1 == prompt + answer.min(k as usize),
    }
}

/// The tokens of a finished answer.
pub(super) fn answer(request: &Request) -> &[u32] {
    match &request.work {
        Work::Score { answer } => answer,
        Work::Generate => &[],
    }
}

fn tokens(request: &Request) -> Vec<u32> {
    [&request.prompt.tokens, answer(request)].concat()
}

/// Refuses rows labelled harmful in a file of benign ones, and the other way round.
pub(super) fn check_harm(file: &Path, rows: &[Row], harmful: bool) -> Result<()> {
    let other = match harmful {
        true => Labels::Prompts.negative(),
        false => Labels::Prompts.positive(),
    };
    match rows.iter().find(|row| row.label.as_deref() == Some(other)) {
        None => Ok(()),
        Some(row) => {
            let message = format!("the label {other} belongs into the other of the two files");
            Err(at(&file.display().to_string(), row.line, message))
        }
    }
}

fn labels(file: &str, rows: &[Row]) -> Result<(Option<Labels>, Vec<bool>)> {
    let mut first = None;
    let mut label = |row: &Row| {
        let Some((kind, positive)) = row.label.as_deref().and_then(Labels::of) else {
            let pairs =
                Labels::ALL.map(|kind| format!("{} or {}", kind.positive(), kind.negative()));
            let message = format!("needs a `label`: {}", pairs.join(", or "));
            return Err(at(file, row.line, message));
        };
        let first = *first.get_or_insert(kind);
        if first != kind {
            let message = format!(
                "mixes {}/{} with {}/{}; fit one probe for each",
                first.positive(),
                first.negative(),
                kind.positive(),
                kind.negative()
            );
            return Err(at(file, row.line, message));
        }
        Ok(positive)
    };
    let positives = rows.iter().map(&mut label).collect::<Result<_>>()?;
    Ok((first, positives))
}

fn trained_on(form: &PromptForm) -> Result<TrainedOn, &'static str> {
    match form {
        PromptForm::Chat {
            prefilled_answer: true,
            ..
        } => Err("ends with a turn of the assistant; move it to `answer`"),
        PromptForm::Chat {
            template_hash,
            system_prompt,
            user_turns,
            ..
        } => Ok(TrainedOn {
            template_hash: template_hash.clone(),
            system_prompt_rule: match system_prompt {
                None => SystemPromptRule::Default,
                Some(hash) => SystemPromptRule::TextHash(hash.clone()),
            },
            turns: *user_turns,
        }),
        PromptForm::RawText | PromptForm::Tokens => {
            Err("is no chat; a probe is trained on `text` or `messages`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(group: &str, positive: bool) -> Example {
        Example {
            positive,
            group: group.into(),
            states: RowStates {
                positions: vec![0],
                tokens: vec![0],
                values: vec![vec![0.0]],
            },
            tokens: vec![0],
        }
    }

    fn rows(text: &str) -> Vec<Row> {
        rows::parse(text.as_bytes(), "train.jsonl").expect("rows")
    }

    #[test]
    fn a_split_tears_no_group_apart_and_keeps_both_classes() {
        let examples: Vec<_> = (0..100)
            .map(|i| example(&format!("g{}", i / 2), (i / 2) % 2 == 0))
            .collect();
        let (rest, aside) = split(examples, 3, 0.2);
        assert_eq!((rest.len(), aside.len()), (80, 20));
        assert_eq!(aside.iter().filter(|example| example.positive).count(), 10);
        assert!(
            aside
                .iter()
                .all(|a| rest.iter().all(|b| a.group != b.group))
        );
    }

    #[test]
    fn a_split_does_not_depend_on_the_order_of_the_rows() {
        let examples: Vec<_> = (0..40)
            .map(|i| example(&format!("g{i}"), i % 2 == 0))
            .collect();
        let names = |examples: Vec<Example>| {
            let (_, aside) = split(examples, 3, 0.25);
            aside
                .into_iter()
                .map(|e| e.group)
                .collect::<std::collections::BTreeSet<_>>()
        };
        let reversed = examples.iter().rev().cloned().collect();
        assert_eq!(names(examples), names(reversed));
    }

    #[test]
    fn labels_are_of_one_kind() {
        let good =
            rows("{\"text\":\"a\",\"label\":\"complied\"}\n{\"text\":\"b\",\"label\":\"refused\"}");
        let (kind, positives) = labels("f", &good).expect("labels");
        assert_eq!(
            (kind, positives),
            (Some(Labels::Answers), vec![true, false])
        );
        let mixed =
            rows("{\"text\":\"a\",\"label\":\"complied\"}\n{\"text\":\"b\",\"label\":\"benign\"}");
        let error = labels("f", &mixed).expect_err("is rejected").to_string();
        assert!(
            error.starts_with("f:2:") && error.contains("mixes"),
            "{error}"
        );
        let missing = rows("{\"text\":\"a\"}");
        assert!(
            labels("f", &missing)
                .expect_err("is rejected")
                .to_string()
                .contains("`label`")
        );
    }

    #[test]
    fn a_probe_of_answers_asks_for_answers() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, r#"{"text": "a", "label": "benign"}"#).expect("writes");
        let error = Labelled::read(&path, Positions::EveryGenerated).expect_err("is rejected");
        assert!(error.to_string().contains("`answer`"), "{error}");
        assert!(Labelled::read(&path, Positions::LastPromptToken).is_ok());
    }

    #[test]
    fn rows_that_set_thresholds_need_no_label_and_must_not_be_harmful() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("benign.jsonl");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("writes");
            Labelled::read_benign(&path, Positions::PromptContent)
        };
        let good = read("{\"text\":\"a\"}\n{\"text\":\"b\",\"label\":\"benign\"}");
        assert_eq!(good.expect("reads").positives, [false, false]);
        let bad = read("{\"text\":\"a\"}\n{\"text\":\"b\",\"label\":\"harmful\"}");
        let message = bad.expect_err("is rejected").to_string();
        assert!(message.contains("benign.jsonl:2"), "{message}");
    }

    #[test]
    fn only_plain_chats_train_a_probe() {
        let chat = PromptForm::Chat {
            template_hash: "t".into(),
            system_prompt: Some("s".into()),
            user_turns: 2,
            prefilled_answer: false,
        };
        let trained = trained_on(&chat).expect("is plain");
        assert_eq!(
            trained.system_prompt_rule,
            SystemPromptRule::TextHash("s".into())
        );
        assert_eq!(trained.turns, 2);
        assert!(trained_on(&PromptForm::RawText).is_err());
    }
}
