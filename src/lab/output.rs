//! Writes result files: whole or not at all, and one JSON row per request.
//! Knows what an outcome looks like on a line; knows no engine thread.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::engine::event::{FinishReason, Score};
use crate::error::{Error, Result};
use crate::policy::Action;

/// Refuses an output that the command reads, which would be lost.
pub fn refuse_same_file(out: &Path, data: &Path) -> Result<()> {
    match (out.canonicalize(), data.canonicalize()) {
        (Ok(written), Ok(read)) if written == read => Err(Error::file(
            out.display(),
            "is read here and would be lost; name another file to write",
        )),
        _ => Ok(()),
    }
}

/// A file that appears under its name only once it is complete.
pub struct WholeFile {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl WholeFile {
    /// Opens a temporary file beside `path`; an existing file stays as it is until `finish`.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if path.is_dir() {
            return Err(Error::file(
                path.display(),
                "is a folder; name a file in it",
            ));
        }
        let file = tempfile::Builder::new()
            .prefix(".inwit-")
            .permissions(readable_by_all())
            .tempfile_in(folder)
            .map_err(|error| Error::file(path.display(), format!("cannot be written: {error}")))?;
        Ok(Self {
            path: path.to_owned(),
            writer: BufWriter::new(file),
        })
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        let path = self.path;
        let failed = |error: &dyn std::fmt::Display| {
            Error::file(path.display(), format!("cannot be written: {error}"))
        };
        let file = self
            .writer
            .into_inner()
            .map_err(|error| failed(&error.error()))?;
        file.as_file().sync_all().map_err(|error| failed(&error))?;
        file.persist(&path).map_err(|error| failed(&error.error))?;
        Ok(())
    }

    /// Appends one row.
    pub fn row(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row).map_err(Error::internal)?;
        line.push(b'\n');
        self.bytes(&line)
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|error| {
            Error::file(
                self.path.display(),
                format!("cannot be written: {error}; free some space"),
            )
        })
    }
}

#[cfg(unix)]
fn readable_by_all() -> std::fs::Permissions {
    // A temporary file is private by default, a result is not; the umask still applies.
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

/// One row of `generate`.
#[derive(Clone, Debug, Serialize)]
pub struct AnswerRow<'a> {
    pub id: &'a str,
    pub text: &'a str,
    pub token_ids: &'a [u32],
    pub finish_reason: &'static str,
    pub action: String,
    pub scores: Map<String, Value>,
}

/// One row of `score`.
#[derive(Clone, Debug, Serialize)]
pub struct ScoreRow<'a> {
    pub id: &'a str,
    pub scores: Map<String, Value>,
    /// Per probe, `[position, logit]` in order of position; only with `--per-token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_logits: Option<Map<String, Value>>,
}

/// The request's final scores as `{probe: {"logit", "probability"}}`.
///
/// Where several detectors read one probe, each has its own entry, `probe/detector`.
/// A score that is no finite number is null, which JSON can say.
pub fn scores(scores: &[Score]) -> Map<String, Value> {
    let key = |score: &Score| {
        let alone = scores
            .iter()
            .filter(|other| other.probe == score.probe)
            .count()
            == 1;
        match &score.detector {
            Some(detector) if !alone => format!("{}/{detector}", score.probe),
            _ => score.probe.to_string(),
        }
    };
    let entry = |score: &Score| {
        (
            key(score),
            json!({ "logit": score.logit, "probability": score.probability }),
        )
    };
    scores.iter().map(entry).collect()
}

/// Per-token logits as `{probe: [[position, logit], …]}`, in order of position.
pub fn token_logits(scores: &[Score]) -> Map<String, Value> {
    let mut by_probe: Vec<(&str, Vec<(u32, f32)>)> = Vec::new();
    for score in scores.iter().filter(|score| score.detector.is_none()) {
        let entry = (score.position, score.logit);
        match by_probe
            .iter_mut()
            .find(|(probe, _)| *probe == &*score.probe)
        {
            Some((_, entries)) => entries.push(entry),
            None => by_probe.push((&score.probe, vec![entry])),
        }
    }
    for (_, entries) in &mut by_probe {
        entries.sort_by_key(|(position, _)| *position);
    }
    by_probe
        .into_iter()
        .map(|(probe, entries)| (probe.to_owned(), json!(entries)))
        .collect()
}

/// The word for a finish reason in result rows, tables and on the terminal.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::StopSequence => "stop_sequence",
        FinishReason::Length => "length",
        FinishReason::RefusedByPolicy => "refused_by_policy",
        FinishReason::MonitorFailed => "monitor_failed",
    }
}

/// How a request ended that the policy or a monitor ended before its first token.
/// Such an end is an error to a caller and a row like any other in a result file.
pub fn end_without_token(error: &Error) -> Option<(FinishReason, Action)> {
    match error {
        Error::AbortedByPolicy => Some((FinishReason::RefusedByPolicy, Action::Abort)),
        Error::MonitorFailed { .. } => Some((FinishReason::MonitorFailed, Action::Allow)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(probe: &str, detector: Option<&str>, position: u32, logit: f32) -> Score {
        Score {
            probe: probe.into(),
            probe_revision: 1,
            sites: Vec::new(),
            detector: detector.map(Into::into),
            position,
            logit,
            probability: detector.map(|_| 0.25),
            threshold: None,
            fired: false,
            out_of_domain: false,
        }
    }

    #[test]
    fn an_answer_row_has_the_promised_fields_in_order() {
        let row = AnswerRow {
            id: "a",
            text: "Hi",
            token_ids: &[1, 2],
            finish_reason: finish_reason(FinishReason::Stop),
            action: Action::Allow.to_string(),
            scores: scores(&[score("prompt_harm", Some("harmful-prompt"), 4, 0.5)]),
        };
        assert_eq!(
            serde_json::to_string(&row).expect("serialises"),
            concat!(
                r#"{"id":"a","text":"Hi","token_ids":[1,2],"finish_reason":"stop","#,
                r#""action":"allow","#,
                r#""scores":{"prompt_harm":{"logit":0.5,"probability":0.25}}}"#,
            )
        );
    }

    #[test]
    fn a_score_row_has_token_logits_only_when_asked() {
        let finals = [score("p", None, 2, 1.5)];
        let row = ScoreRow {
            id: "a",
            scores: scores(&finals),
            token_logits: None,
        };
        let plain = serde_json::to_string(&row).expect("serialises");
        assert_eq!(
            plain,
            r#"{"id":"a","scores":{"p":{"logit":1.5,"probability":null}}}"#
        );
        let tokens = [score("p", None, 1, 0.5), score("p", None, 0, -0.5)];
        let row = ScoreRow {
            token_logits: Some(token_logits(&tokens)),
            ..row
        };
        let with = serde_json::to_string(&row).expect("serialises");
        assert!(
            with.ends_with(r#""token_logits":{"p":[[0,-0.5],[1,0.5]]}}"#),
            "{with}"
        );
    }

    #[test]
    fn detectors_that_share_a_probe_have_an_entry_each() {
        let scores = scores(&[score("p", Some("a"), 0, 1.0), score("p", Some("b"), 0, 2.0)]);
        let keys: Vec<_> = scores.keys().collect();
        assert_eq!(keys, ["p/a", "p/b"]);
    }

    #[test]
    fn a_score_that_is_no_number_is_null() {
        let scores = scores(&[score("p", None, 0, f32::NAN)]);
        assert_eq!(scores["p"]["logit"], Value::Null);
    }

    #[test]
    fn an_abort_before_the_first_token_is_a_row_and_a_long_prompt_is_not() {
        let (reason, action) = end_without_token(&Error::AbortedByPolicy).expect("is a row");
        assert_eq!(
            (finish_reason(reason), action),
            ("refused_by_policy", Action::Abort)
        );
        assert_eq!(end_without_token(&Error::Cancelled), None);
    }

    #[test]
    fn a_file_appears_only_once_it_is_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out.jsonl");
        let mut file = WholeFile::create(&path).expect("creates");
        file.row(&json!({"id": "a"})).expect("writes");
        assert!(!path.exists());
        file.finish().expect("finishes");
        assert_eq!(
            std::fs::read_to_string(&path).expect("reads"),
            "{\"id\":\"a\"}\n"
        );
    }

    #[test]
    fn an_unfinished_file_leaves_nothing_behind() {
        let folder = tempfile::tempdir().expect("a folder");
        drop(WholeFile::create(&folder.path().join("out.jsonl")).expect("creates"));
        assert_eq!(std::fs::read_dir(folder.path()).expect("lists").count(), 0);
    }

    #[test]
    fn a_folder_as_the_output_is_an_error_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(WholeFile::create(folder.path()).is_err());
    }
}
