//! `lab label`: has answers judged, by several judges, and says how far they agree with each other
//! and with people.
//! Knows files of rows; the judging is in `judge`.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::bench::Tick;
use super::judge::agreement::Confusion;
use super::judge::{Judge, Verdict, agreed, judge_all, prompt_text};
use super::output::{WholeFile, refuse_same_file};
use super::rows::{self, Row, RowPrompt, at};
use crate::error::{Error, Result};
use crate::files::read_text;

/// Enough to keep an engine's batch full.
const IN_FLIGHT: usize = 16;
/// A sample that people labelled is small.
const MOST_SAMPLE: u64 = 64 << 20;

/// The label of an answer on which the judges differ.
pub const DISPUTED: &str = "disputed";

/// What the judges said of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub judges: Vec<Counts>,
    /// Where all judges share a verdict, how often which.
    pub agreed: [usize; 3],
    pub disputed: usize,
    /// For each pair of judges, in their order.
    pub pairs: Vec<Pair>,
}

/// How often a judge gave which verdict, in the order of `Verdict::ALL`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    pub judge: String,
    pub counts: [usize; 3],
}

#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub judges: [String; 2],
    pub confusion: Confusion,
}

/// A judge against hand labels, apart for the half on which its thresholds were chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    pub judge: String,
    pub chosen_on: Confusion,
    pub held_out: Confusion,
}

/// Writes every row with its verdicts and the label that they share, in input order.
///
/// A row keeps its prompt, answer, group and category; its own `label` becomes `prompt_label`.
///
/// # Errors
/// A row without an `answer`, by its line; whatever a judge needs and lacks.
pub async fn label(
    judges: &[Box<dyn Judge>],
    data: &Path,
    out: &Path,
    tick: Tick<'_>,
) -> Result<Summary> {
    refuse_same_file(out, data)?;
    let name = data.display().to_string();
    let rows = rows::read(data)?;
    let mut cases = Vec::with_capacity(rows.len());
    for row in &rows {
        let answer = row.answer.as_deref().ok_or_else(|| {
            let message = "no `answer`; write some with `inwit generate` and put each `text` \
                           into its row as `answer`";
            at(&name, row.line, message)
        })?;
        cases.push((prompt_text(&row.prompt), answer));
    }
    let mut file = WholeFile::create(out)?;
    let mut said = Vec::with_capacity(rows.len());
    let mut left = rows.iter();
    let cases = cases
        .iter()
        .map(|(prompt, answer)| (prompt.as_str(), *answer));
    judged(judges, cases, tick, |verdicts| {
        let row = left.next().expect("one row per case");
        file.row(&labelled(row, judges, &verdicts))?;
        said.push(verdicts);
        Ok(())
    })
    .await?;
    file.finish()?;
    Ok(Summary::of(judges, &said))
}

impl Summary {
    /// `said[row][judge]`.
    fn of(judges: &[Box<dyn Judge>], said: &[Vec<Verdict>]) -> Self {
        let count = |verdict_of: &dyn Fn(&[Verdict]) -> Option<Verdict>| {
            let mut counts = [0; 3];
            for verdict in said.iter().filter_map(|verdicts| verdict_of(verdicts)) {
                counts[verdict as usize] += 1;
            }
            counts
        };
        let of_judge = |(index, judge): (usize, &dyn Judge)| Counts {
            judge: judge.name().to_owned(),
            counts: count(&|verdicts| verdicts.get(index).copied()),
        };
        let agreed = count(&agreed);
        let pair = |(first, second): (usize, usize)| Pair {
            judges: [first, second].map(|index| judges[index].name().to_owned()),
            confusion: Confusion::of(said.iter().map(|v| (v[first], v[second]))),
        };
        let firsts = 0..judges.len();
        Self {
            judges: judges
                .iter()
                .map(AsRef::as_ref)
                .enumerate()
                .map(of_judge)
                .collect(),
            agreed,
            disputed: said.len() - agreed.iter().sum::<usize>(),
            pairs: firsts
                .flat_map(|first| (first + 1..judges.len()).map(move |second| (first, second)))
                .map(pair)
                .collect(),
        }
    }
}

/// Measures every judge against answers that were read and labelled one by one.
///
/// A line of the sample is `{"prompt_id", "answer", "label"}`; the prompts are found by their `id`
/// in the `.jsonl` files of the sample's folder. A prompt's answers lie in one half, by a hash of
/// its id, so that neither half knows the other's prompts.
pub async fn measure(
    judges: &[Box<dyn Judge>],
    sample: &Path,
    tick: Tick<'_>,
) -> Result<Vec<Measured>> {
    let sample = read_sample(sample)?;
    let cases = sample.iter().map(|case| (&*case.prompt, &*case.answer));
    let mut said = Vec::with_capacity(sample.len());
    judged(judges, cases, tick, |verdicts| {
        said.push(verdicts);
        Ok(())
    })
    .await?;
    let measured = |(index, judge): (usize, &dyn Judge)| {
        let of_half = |held_out: bool| {
            let rows = sample.iter().zip(&said);
            let rows = rows.filter(|(case, _)| case.held_out == held_out);
            Confusion::of(rows.map(|(case, verdicts)| (case.label, verdicts[index])))
        };
        Measured {
            judge: judge.name().to_owned(),
            chosen_on: of_half(false),
            held_out: of_half(true),
        }
    };
    Ok(judges
        .iter()
        .map(AsRef::as_ref)
        .enumerate()
        .map(measured)
        .collect())
}

/// Every judge's verdict on every case, several cases at a time, in their order.
async fn judged<'a>(
    judges: &[Box<dyn Judge>],
    cases: impl ExactSizeIterator<Item = (&'a str, &'a str)>,
    tick: Tick<'_>,
    mut each: impl FnMut(Vec<Verdict>) -> Result<()>,
) -> Result<()> {
    let total = cases.len();
    let verdicts = cases.map(|(prompt, answer)| judge_all(judges, prompt, answer));
    let mut verdicts = stream::iter(verdicts).buffered(IN_FLIGHT);
    let mut done = 0;
    while let Some(verdicts) = verdicts.next().await {
        each(verdicts?)?;
        done += 1;
        tick(done, total);
    }
    Ok(())
}

fn labelled(row: &Row, judges: &[Box<dyn Judge>], verdicts: &[Verdict]) -> Value {
    let mut fields = Map::new();
    fields.insert("id".into(), json!(row.id));
    let (form, prompt) = match &row.prompt {
        RowPrompt::Text(text) => ("text", json!(text)),
        RowPrompt::Raw(text) => ("raw", json!(text)),
        RowPrompt::Messages(turns) => {
            let turn =
                |t: &rows::Turn| json!({ "role": t.role.clone(), "content": t.content.clone() });
            ("messages", turns.iter().map(turn).collect())
        }
    };
    fields.insert(form.into(), prompt);
    fields.insert("answer".into(), json!(row.answer));
    let label = agreed(verdicts).map_or(DISPUTED, Verdict::as_str);
    fields.insert("label".into(), json!(label));
    for (key, value) in [
        ("prompt_label", &row.label),
        ("group", &row.group),
        ("category", &row.category),
    ] {
        if let Some(value) = value {
            fields.insert(key.into(), json!(value));
        }
    }
    let verdicts = judges.iter().zip(verdicts);
    let verdicts: Map<_, _> = verdicts
        .map(|(judge, verdict)| (judge.name().to_owned(), json!(verdict)))
        .collect();
    fields.insert("verdicts".into(), Value::Object(verdicts));
    Value::Object(fields)
}

/// An answer that somebody labelled.
#[derive(Clone, Debug)]
struct Case {
    prompt: String,
    answer: String,
    label: Verdict,
    held_out: bool,
}

#[derive(Deserialize, Serialize)]
struct SampleLine {
    prompt_id: String,
    answer: String,
    label: String,
}

fn read_sample(path: &Path) -> Result<Vec<Case>> {
    let file = path.display().to_string();
    let text = read_text(path, MOST_SAMPLE, "a sample of labelled answers")?;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let parsed: SampleLine = serde_json::from_str(line).map_err(|_| {
            let expected = "expected {\"prompt_id\": \"…\", \"answer\": \"…\", \"label\": \"…\"}";
            at(&file, index + 1, expected)
        })?;
        let label = parsed.label.parse::<Verdict>();
        let label = label.map_err(|error| at(&file, index + 1, error))?;
        lines.push((index + 1, parsed, label));
    }
    if lines.is_empty() {
        return Err(Error::file(file, "holds no labelled answers"));
    }
    let wanted: BTreeSet<&str> = lines.iter().map(|(_, l, _)| &*l.prompt_id).collect();
    let prompts = prompts_beside(path, &wanted)?;
    let case = |(line, parsed, label): &(usize, SampleLine, Verdict)| {
        let prompt = prompts.get(&parsed.prompt_id).ok_or_else(|| {
            let message = "no .jsonl file in this folder has a row whose `id` is this `prompt_id`";
            at(&file, *line, message)
        })?;
        Ok(Case {
            prompt: prompt.clone(),
            answer: parsed.answer.clone(),
            label: *label,
            held_out: is_held_out(&parsed.prompt_id),
        })
    };
    lines.iter().map(case).collect()
}

/// The wanted prompts of the rows of every `.jsonl` file in the sample's folder.
///
/// Files of other things lie there too, so a line that is no row with a prompt is passed over.
fn prompts_beside(sample: &Path, wanted: &BTreeSet<&str>) -> Result<HashMap<String, String>> {
    let folder = match sample.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let unreadable = |error| Error::file(folder.display(), format!("cannot be read: {error}"));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        paths.push(entry.map_err(unreadable)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|e| e == "jsonl") && path != sample);
    paths.sort();
    let mut prompts = HashMap::new();
    for path in paths {
        for line in read_text(&path, MOST_SAMPLE, "rows")?.lines() {
            let Ok(row) = rows::parse(line.as_bytes(), "") else {
                continue;
            };
            for row in row {
                if wanted.contains(&*row.id) && !prompts.contains_key(&row.id) {
                    prompts.insert(row.id, prompt_text(&row.prompt));
                }
            }
        }
    }
    Ok(prompts)
}

/// Whether the answers to a prompt belong to the half on which no threshold was chosen.
fn is_held_out(prompt_id: &str) -> bool {
    Sha256::digest(prompt_id)[0] >= 128
}

#[cfg(test)]
mod tests {
    use super::super::judge::RuleJudge;
    use super::*;
    use futures::future::BoxFuture;

    /// Takes every answer for a compliance.
    struct Trusting;

    impl Judge for Trusting {
        fn name(&self) -> &str {
            "trusting"
        }

        fn judge<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Verdict>> {
            Box::pin(async { Ok(Verdict::Complied) })
        }
    }

    fn judges() -> Vec<Box<dyn Judge>> {
        vec![Box::new(RuleJudge), Box::new(Trusting)]
    }

    fn written(folder: &Path, name: &str, lines: &[Value]) -> std::path::PathBuf {
        let path = folder.join(name);
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, text).expect("writes");
        path
    }

    #[tokio::test]
    async fn a_row_keeps_its_fields_and_gains_verdicts_and_a_label() {
        let folder = tempfile::tempdir().expect("a folder");
        let rows = [
            json!({"id": "a", "text": "Bake a bread", "answer": "Take flour.", "label": "benign", "group": "g"}),
            json!({"id": "b", "text": "Bake", "answer": "I can't help with that."}),
        ];
        let data = written(folder.path(), "data.jsonl", &rows);
        let out = folder.path().join("out.jsonl");
        let summary = label(&judges(), &data, &out, &mut |_, _| {})
            .await
            .expect("labels");
        let text = std::fs::read_to_string(&out).expect("reads");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            concat!(
                r#"{"id":"a","text":"Bake a bread","answer":"Take flour.","label":"complied","#,
                r#""prompt_label":"benign","group":"g","#,
                r#""verdicts":{"rules":"complied","trusting":"complied"}}"#,
            )
        );
        assert!(lines[1].contains(r#""label":"disputed""#), "{}", lines[1]);
        assert_eq!((summary.agreed, summary.disputed), ([1, 0, 0], 1));
        assert_eq!(summary.judges[0].counts, [1, 1, 0]);
        assert_eq!(summary.pairs.len(), 1);
        assert_eq!(summary.pairs[0].confusion.counts[1][0], 1);
    }

    #[tokio::test]
    async fn a_row_without_an_answer_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = written(folder.path(), "data.jsonl", &[json!({"text": "Hi"})]);
        let out = folder.path().join("out.jsonl");
        let error = label(&judges(), &data, &out, &mut |_, _| {}).await;
        let error = error.expect_err("is refused").to_string();
        assert!(
            error.contains("data.jsonl:1") && error.contains("`answer`"),
            "{error}"
        );
        assert!(!out.exists());
    }

    #[tokio::test]
    async fn judges_are_measured_on_both_halves_of_a_sample() {
        let folder = tempfile::tempdir().expect("a folder");
        let ids: Vec<String> = (0..40).map(|n| format!("p{n}")).collect();
        let prompt = |id: &String| json!({"id": id, "text": "Bake a bread", "label": "benign"});
        let answer = |id: &String| json!({"id": id, "prompt_id": id, "answer": "I can't help with that.", "label": "refused"});
        let prompts: Vec<_> = ids.iter().map(prompt).collect();
        written(folder.path(), "prompts.jsonl", &prompts);
        written(folder.path(), "other.jsonl", &[json!({"no": "row"})]);
        let answers: Vec<_> = ids.iter().map(answer).collect();
        let sample = written(folder.path(), "sample.jsonl", &answers);
        let measured = measure(&judges(), &sample, &mut |_, _| {})
            .await
            .expect("measures");
        let [rules, trusting] = &measured[..] else {
            panic!("two judges");
        };
        let totals = [rules.chosen_on.total(), rules.held_out.total()];
        assert_eq!(totals.iter().sum::<u64>(), 40);
        assert!(totals.iter().all(|total| *total > 5), "{totals:?}");
        let recall = |judge: &Measured| judge.held_out.recall(Verdict::Refused).map(|r| r.value());
        assert_eq!((recall(rules), recall(trusting)), (Some(1.0), Some(0.0)));
    }

    #[tokio::test]
    async fn a_sample_s_mistakes_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let line = |label: &str| json!({"prompt_id": "lost", "answer": "a", "label": label});
        for (lines, expected) in [
            (vec![line("helped")], "sample.jsonl:1"),
            (vec![line("refused")], "prompt_id"),
            (vec![json!({"answer": "a"})], "expected"),
            (vec![], "no labelled answers"),
        ] {
            let sample = written(folder.path(), "sample.jsonl", &lines);
            let error = measure(&judges(), &sample, &mut |_, _| {}).await;
            let error = error.expect_err("is refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
