//! `capture`: writes hidden states of a file of prompts, and of their answers, to a tensor file.

use std::path::Path;

use inwit_probes::Site;

use super::bench::{Bench, Tick, draft, reading};
use super::capture_file::{CaptureFile, Dtype};
use super::output::refuse_same_file;
use super::rows::{self, Row};
use super::states::RowStates;
use crate::engine::prepare::Draft;
use crate::engine::request::PositionSelection;
use crate::engine::sampler::SamplingDraft;
use crate::error::Result;

/// What to capture of every row.
#[derive(Clone, Debug)]
pub struct Options {
    pub sites: Vec<Site>,
    pub positions: PositionSelection,
    pub dtype: Dtype,
    /// How to answer rows without an `answer`, where generated tokens are wanted.
    pub sampling: SamplingDraft,
}

/// Captures the states of every row, in input order; returns the number of states per site.
///
/// An `answer` in the data is read as if it had been generated; a row without one is answered
/// where generated tokens are wanted, and only read otherwise. Nothing is monitored.
pub async fn capture(
    bench: &Bench,
    data: &Path,
    out: &Path,
    options: &Options,
    tick: Tick<'_>,
) -> Result<usize> {
    bench.check_sites(&options.sites)?;
    refuse_same_file(out, data)?;
    let name = data.display().to_string();
    let rows = rows::read(data)?;
    let d_model = bench.d_model();
    let mut file = CaptureFile::create(out, &options.sites, d_model, options.dtype)?;
    let requests = bench.prepare(&name, &rows, |row| wish(row, options))?;
    bench
        .run(&name, &rows, requests, tick, |done| {
            let states = RowStates::join(&done.outcome.captured, &options.sites, d_model)?;
            file.push(&done.row.id, &states)
        })
        .await?;
    let states = file.rows();
    file.finish()?;
    Ok(states)
}

fn wish(row: &Row, options: &Options) -> Draft {
    let reading = reading(row, &options.sites, options.positions);
    let of_answer = matches!(
        options.positions,
        PositionSelection::Generated
            | PositionSelection::All
            | PositionSelection::FromLastPromptToken
    );
    if !of_answer || row.answer.is_some() {
        return reading;
    }
    Draft {
        sampling: options.sampling.clone(),
        capture: reading.capture,
        ..draft(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::rows::RowPrompt;

    fn check_generates(positions: PositionSelection, answer: Option<&str>, expected: bool) {
        let row = Row {
            id: "a".into(),
            prompt: RowPrompt::Text("Hi".into()),
            answer: answer.map(Into::into),
            label: None,
            group: None,
            category: None,
            line: 1,
        };
        let options = Options {
            sites: vec!["blocks.0.hook_resid_post".parse().expect("a site")],
            positions,
            dtype: Dtype::F32,
            sampling: SamplingDraft::default(),
        };
        let draft = wish(&row, &options);
        assert_eq!(!draft.score_only, expected);
        assert_eq!(draft.answer.as_deref(), answer);
        assert!(draft.capture.is_some());
    }

    #[test]
    fn a_row_is_answered_only_where_generated_tokens_are_wanted_and_missing() {
        check_generates(PositionSelection::Generated, None, true);
        check_generates(PositionSelection::All, None, true);
        check_generates(PositionSelection::All, Some("Hey"), false);
        check_generates(PositionSelection::LastPromptToken, None, false);
        check_generates(PositionSelection::AllPrompt, None, false);
    }
}
