//! The file that remembers every run on a set: a Markdown table, one line per run and set.
//! A set that was looked at often is no longer one that nobody has tuned on.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::read_text;

const MOST_BYTES: u64 = 64 << 20;
const HEAD: &str = "\
# Evaluations

Each run of `inwit eval` with `--log` on a set, in the order of the runs.
A number that was looked at and then tuned on proves nothing, so the runs are counted by the set's hash.

| date (UTC) | commit | set | SHA-256 of the set | what | its hash | result |
|---|---|---|---|---|---|---|
";

/// The log, as it was found.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
    text: String,
}

/// The head of the log's table.
fn columns() -> &'static str {
    let mut lines = HEAD.lines();
    lines.find(|line| line.starts_with('|')).unwrap_or_default()
}

/// A run on one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub commit: String,
    /// The file's name without its folder.
    pub set: String,
    pub set_sha256: String,
    /// `probe NAME` or `policy NAME`.
    pub what: String,
    pub hash: String,
    pub result: String,
}

impl Ledger {
    /// Reads the log, or begins one. Says at once if it cannot be written.
    pub fn open(path: &Path) -> Result<Self> {
        let text = match path.exists() {
            true => read_text(path, MOST_BYTES, "a log of evaluations")?,
            false => String::new(),
        };
        if !text.is_empty() && !text.lines().any(|line| line == columns()) {
            let message = "is no log of evaluations: it lacks the table's head; name another file";
            return Err(Error::file(path.display(), message));
        }
        appending(path)?;
        Ok(Self {
            path: path.to_owned(),
            text,
        })
    }

    /// Runs on the set that the log holds.
    pub fn runs_on(&self, set_sha256: &str) -> usize {
        let is_run = |line: &&str| {
            let mut cells = line.split('|').map(str::trim);
            cells.nth(4) == Some(set_sha256)
        };
        self.text.lines().filter(is_run).count()
    }

    /// Appends the entries. What is in the file stays as it is.
    pub fn append(&mut self, entries: &[Entry]) -> Result<()> {
        let mut added = String::new();
        if self.text.is_empty() {
            added.push_str(HEAD);
        } else if !self.text.ends_with('\n') {
            added.push('\n');
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let date = date(now.map_or(0, |since| since.as_secs() / 86_400));
        for entry in entries {
            let cells = [
                &date,
                &entry.commit,
                &entry.set,
                &entry.set_sha256,
                &entry.what,
                &entry.hash,
                &entry.result,
            ];
            for cell in cells {
                let _ = write!(added, "| {} ", cell.replace(['|', '\n', '\r'], " "));
            }
            added.push_str("|\n");
        }
        appending(&self.path)?
            .write_all(added.as_bytes())
            .map_err(|error| unwritten(&self.path, &error))?;
        self.text.push_str(&added);
        Ok(())
    }
}

fn appending(path: &Path) -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| unwritten(path, &error))
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    Error::file(path.display(), format!("cannot be written: {error}"))
}

/// `2026-11-22` of days since 1970-01-01 (Hinnant, "chrono-compatible low-level date algorithms").
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months counted from March.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", year_of_era + 400 * era + later)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sha: &str) -> Entry {
        Entry {
            commit: "abc".into(),
            set: "dev.jsonl".into(),
            set_sha256: sha.into(),
            what: "probe p".into(),
            hash: "12".into(),
            result: "AUROC 0.9 | and\nmore".into(),
        }
    }

    #[test]
    fn days_have_their_dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(20_779), "2026-11-22");
        assert_eq!(date(47_541), "2100-03-01");
    }

    #[test]
    fn runs_are_counted_by_the_hash_of_their_set() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log.md");
        let mut ledger = Ledger::open(&path).expect("begins");
        assert_eq!(ledger.runs_on("aa"), 0);
        ledger.append(&[entry("aa"), entry("bb")]).expect("appends");
        ledger.append(&[entry("aa")]).expect("appends");
        let again = Ledger::open(&path).expect("opens");
        for ledger in [&ledger, &again] {
            assert_eq!((ledger.runs_on("aa"), ledger.runs_on("bb")), (2, 1));
        }
        // The hash of a probe is no run on a set.
        assert_eq!(again.runs_on("12"), 0);
    }

    #[test]
    fn what_was_written_stays_and_a_cell_cannot_break_the_table() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log.md");
        std::fs::write(&path, "# Mine\nno table").expect("written");
        assert!(Ledger::open(&path).is_err());
        let mine = format!("# Mine\n{}\nwithout an end", columns());
        std::fs::write(&path, &mine).expect("written");
        let mut ledger = Ledger::open(&path).expect("opens");
        ledger.append(&[entry("aa")]).expect("appends");
        let text = std::fs::read_to_string(&path).expect("reads");
        assert!(text.starts_with(&format!("{mine}\n| ")), "{text}");
        let line = text.lines().last().expect("a line");
        assert_eq!(line.matches('|').count(), 8, "{line}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_told_before_any_work() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Ledger::open(folder.path()).is_err());
        assert!(Ledger::open(&folder.path().join("no/log.md")).is_err());
    }
}
