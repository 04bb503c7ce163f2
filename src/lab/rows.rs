//! Reads prompts from JSON-lines files: one request per line.
//! Knows the fields that a row may have and that known data sets carry more; knows no engine.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A line longer than this is a mistake (a file without line breaks, a binary file), not a prompt.
const LONGEST_LINE: usize = 8 * 1024 * 1024;
/// More rows than this do not fit the index of one run.
const MOST_ROWS: usize = 10_000_000;

/// One line of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// As the file gives it, else the line's number.
    pub id: String,
    pub prompt: RowPrompt,
    /// A finished answer, for `score`, `capture` and `probe fit`.
    pub answer: Option<String>,
    pub label: Option<String>,
    /// Rewrites of one base prompt share it.
    pub group: Option<String>,
    /// What a prompt or a refusal is about.
    pub category: Option<String>,
    /// Counts from 1.
    pub line: usize,
}

/// The three ways to write a prompt; a row has exactly one.
#[derive(Clone, Debug, PartialEq)]
pub enum RowPrompt {
    /// One user turn under the model's chat template.
    Text(String),
    /// A chat under the template.
    Messages(Vec<Turn>),
    /// As it is, without the template.
    Raw(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

/// Reads every row of `path`.
///
/// A line that is not a row is an error that names the file and the line, and so are two rows with
/// one id, since the output could not be joined with the input.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let file = std::fs::File::open(path)
        .map_err(|error| Error::file(path.display(), format!("cannot be read: {error}")))?;
    parse(BufReader::new(file), &path.display().to_string())
}

/// Reads rows from anything; `name` stands for the file in errors.
pub fn parse(mut input: impl BufRead, name: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut lines_by_id = HashMap::new();
    let mut line = 0;
    while let Some(text) = next_line(&mut input, name, line + 1)? {
        line += 1;
        if text.trim().is_empty() {
            continue;
        }
        let row = row(&text, line).map_err(|message| at(name, line, &message))?;
        if let Some(first) = lines_by_id.insert(row.id.clone(), line) {
            let message = format!("the id is already on line {first}; give every row its own `id`");
            return Err(at(name, line, &message));
        }
        if rows.len() == MOST_ROWS {
            let message = format!("more than {MOST_ROWS} rows; split the file");
            return Err(at(name, line, &message));
        }
        rows.push(row);
    }
    if rows.is_empty() {
        return Err(Error::file(
            name,
            "holds no rows; expected one JSON object per line",
        ));
    }
    Ok(rows)
}

/// An error about one line of a file.
pub fn at(file: &str, line: usize, message: impl std::fmt::Display) -> Error {
    Error::file(format!("{file}:{line}"), message)
}

fn next_line(input: &mut impl BufRead, name: &str, line: usize) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let read = input
        .take(LONGEST_LINE as u64 + 1)
        .read_until(b'\n', &mut bytes)
        .map_err(|error| at(name, line, format!("cannot be read: {error}")))?;
    if read == 0 {
        return Ok(None);
    }
    if read > LONGEST_LINE {
        let message =
            format!("longer than {LONGEST_LINE} bytes; expected one JSON object per line");
        return Err(at(name, line, message));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| at(name, line, "not UTF-8; save the file as UTF-8"))?;
    Ok(Some(match text.strip_prefix('\u{feff}') {
        Some(rest) if line == 1 => rest.to_owned(),
        _ => text,
    }))
}

fn row(text: &str, line: usize) -> Result<Row, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| {
        format!(
            "not JSON (column {}); expected one object per line",
            error.column()
        )
    })?;
    let Value::Object(fields) = value else {
        return Err("not an object; expected e.g. {\"id\": \"a\", \"text\": \"…\"}".into());
    };
    Ok(Row {
        id: name(&fields, "id")?.unwrap_or_else(|| line.to_string()),
        prompt: prompt(&fields)?,
        answer: string(&fields, "answer")?,
        label: string(&fields, "label")?,
        group: name(&fields, "group")?,
        category: string(&fields, "category")?,
        line,
    })
}

fn prompt(fields: &Map<String, Value>) -> Result<RowPrompt, String> {
    let text = string(fields, "text")?.map(RowPrompt::Text);
    let raw = string(fields, "raw")?.map(RowPrompt::Raw);
    let messages = messages(fields)?.map(RowPrompt::Messages);
    let mut given = [text, raw, messages].into_iter().flatten();
    match (given.next(), given.next()) {
        (Some(prompt), None) => Ok(prompt),
        (None, _) => Err(
            "no prompt; give one of `text` (a user turn), `messages` (a chat), `raw` (no template)"
                .into(),
        ),
        (Some(_), Some(_)) => {
            Err("more than one prompt; keep one of `text`, `messages`, `raw`".into())
        }
    }
}

fn messages(fields: &Map<String, Value>) -> Result<Option<Vec<Turn>>, String> {
    let turns = match fields.get("messages") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(turns)) if !turns.is_empty() => turns,
        Some(_) => return Err("`messages` must be a list of at least one message".into()),
    };
    let turn = |(index, value): (usize, &Value)| {
        let expected = |what: &str| format!("`messages[{index}]` {what}");
        let Value::Object(turn) = value else {
            return Err(expected("must be an object with `role` and `content`"));
        };
        if let Some(other) = turn
            .keys()
            .find(|key| !matches!(key.as_str(), "role" | "content"))
        {
            return Err(expected(&format!(
                "has `{other}`; only `role` and `content` are supported"
            )));
        }
        let part = |key: &str| {
            let text = turn.get(key).and_then(Value::as_str).map(str::to_owned);
            text.ok_or_else(|| expected(&format!("needs `{key}`, a string")))
        };
        Ok(Turn {
            role: part("role")?,
            content: part("content")?,
        })
    };
    turns
        .iter()
        .enumerate()
        .map(turn)
        .collect::<Result<_, _>>()
        .map(Some)
}

fn string(fields: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("`{key}` must be a string")),
    }
}

/// Ids and groups may be numbers in the file.
fn name(fields: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match fields.get(key) {
        Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
            Ok(Some(number.to_string()))
        }
        Some(Value::Number(_)) => Err(format!("`{key}` must be a string or a whole number")),
        _ => string(fields, key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Result<Vec<Row>> {
        parse(text.as_bytes(), "data.jsonl")
    }

    fn check_rejected(text: &str, expected: &[&str]) {
        let message = rows(text).expect_err("is rejected").to_string();
        for part in expected {
            assert!(message.contains(part), "`{message}` lacks `{part}`");
        }
    }

    #[test]
    fn each_form_of_prompt_is_read() {
        let text = concat!(
            r#"{"id": "a", "text": "Hello", "label": "benign", "category": "x", "group": 7}"#,
            "\n\n",
            r#"{"id": 12, "messages": [{"role": "user", "content": "Hi"}], "answer": "Hey"}"#,
            "\r\n",
            r#"{"raw": "Once upon", "text": null}"#,
        );
        let rows = rows(text).expect("reads");
        assert_eq!(rows[0].prompt, RowPrompt::Text("Hello".into()));
        assert_eq!(rows[0].group.as_deref(), Some("7"));
        assert_eq!(rows[1].id, "12");
        assert_eq!(rows[1].answer.as_deref(), Some("Hey"));
        assert_eq!(rows[2].prompt, RowPrompt::Raw("Once upon".into()));
        assert_eq!((rows[2].id.as_str(), rows[2].line), ("4", 4));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_row() {
        assert_eq!(rows("\u{feff}{\"text\": \"a\"}").expect("reads").len(), 1);
    }

    #[test]
    fn a_bad_line_names_file_line_and_remedy() {
        check_rejected("{\"text\": \"a\"}\n{oops", &["data.jsonl:2", "not JSON"]);
        check_rejected("[1]", &["data.jsonl:1", "expected e.g."]);
        check_rejected("{\"id\": \"a\"}", &["no prompt", "`text`"]);
        check_rejected(r#"{"text": "a", "raw": "b"}"#, &["more than one prompt"]);
        check_rejected(r#"{"text": 3}"#, &["`text` must be a string"]);
        check_rejected(r#"{"id": 1.5, "text": "a"}"#, &["`id`", "whole number"]);
        check_rejected(r#"{"messages": []}"#, &["`messages`", "at least one"]);
        check_rejected(
            r#"{"messages": [{"role": "user"}]}"#,
            &["messages[0]", "`content`"],
        );
        check_rejected(
            r#"{"messages": [{"role": "user", "content": "a", "image": "b"}]}"#,
            &["messages[0]", "`image`"],
        );
    }

    #[test]
    fn an_error_never_echoes_the_prompt() {
        let message = rows("{\"text\": \"secret words\", ]")
            .expect_err("is rejected")
            .to_string();
        assert!(!message.contains("secret"));
    }

    #[test]
    fn two_rows_with_one_id_are_rejected() {
        let text = "{\"id\": \"a\", \"text\": \"x\"}\n{\"id\": \"a\", \"text\": \"y\"}";
        check_rejected(text, &["data.jsonl:2", "already on line 1"]);
    }

    #[test]
    fn a_default_id_that_collides_is_rejected_too() {
        check_rejected(
            "{\"id\": 2, \"text\": \"x\"}\n{\"text\": \"y\"}",
            &["data.jsonl:2"],
        );
    }

    #[test]
    fn an_empty_file_is_rejected() {
        check_rejected("\n \n", &["data.jsonl", "no rows"]);
    }

    #[test]
    fn bytes_that_are_not_text_are_rejected() {
        let error = parse(&b"\xff\xfe"[..], "data.jsonl").expect_err("is rejected");
        assert!(error.to_string().contains("UTF-8"));
    }
}
