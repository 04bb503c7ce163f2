//! What every command checks before it loads a model for minutes: that its data can be read and
//! its output written, and that neither is the other.

use std::path::Path;

use crate::error::{Error, Result};
use crate::lab::output::{WholeFile, refuse_same_file};
use crate::lab::rows;

/// Reads the data for its mistakes, and opens the output.
///
/// Data that comes through a pipe can be read only once, so it is left for the work itself.
pub(super) fn open(out: &Path, data: &[&Path]) -> Result<WholeFile> {
    for path in data {
        refuse_same_file(out, path)?;
        let comes_once = std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir());
        if !comes_once {
            rows::read(path)?;
        }
    }
    WholeFile::create(out)
}

/// Refuses two outputs, each with its flag, that are one file.
pub(super) fn each_once(outputs: &[(&str, Option<&Path>)]) -> Result<()> {
    for (index, (flag, out)) in outputs.iter().enumerate() {
        let same = |(_, other): &&(&str, Option<&Path>)| out.is_some() && other == out;
        if let Some((other, _)) = outputs[..index].iter().find(same) {
            return Err(Error::Config(format!(
                "{other} and {flag}: the same file; name two"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_in_data_and_output_are_told_before_any_work() {
        let folder = tempfile::tempdir().expect("a folder");
        let [data, out, missing] = ["a.jsonl", "b.jsonl", "c.jsonl"].map(|n| folder.path().join(n));
        let told = |out: &Path, data: &Path| open(out, &[data]).map(|_| ()).expect_err("refused");
        std::fs::write(&data, "{\"text\": \"Hi\"}\n").expect("written");
        assert!(open(&out, &[&data]).is_ok());
        assert!(!out.exists(), "an output without work");
        assert!(told(&out, &missing).to_string().contains("c.jsonl"));
        let nowhere = folder.path().join("nowhere/b.jsonl");
        assert!(
            told(&nowhere, &data)
                .to_string()
                .contains("cannot be written")
        );
        assert!(told(&data, &data).to_string().contains("another"));
        std::fs::write(&data, "{\"text\": \"Hi\"}\n{\"txet\"").expect("written");
        assert!(told(&out, &data).to_string().contains("a.jsonl:2"));
    }
}
