//! `score`: reads every probe on a file of prompts, with their answers where given. Prefill only.

use std::path::Path;

use super::bench::{Bench, Tick, draft};
use super::output::{ScoreRow, WholeFile, refuse_same_file, scores, token_logits};
use super::rows;
use crate::engine::prepare::{Draft, MonitorDraft};
use crate::error::Result;
use crate::policy::Mode;

/// What holds for every row.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its detectors' gathers are the ones scored; unset is the library's default policy.
    pub policy: Option<String>,
    pub per_token: bool,
}

/// Writes one score row per prompt, in input order; returns how many.
pub async fn score(
    bench: &Bench,
    data: &Path,
    out: &Path,
    options: &Options,
    tick: Tick<'_>,
) -> Result<usize> {
    refuse_same_file(out, data)?;
    let name = data.display().to_string();
    let rows = rows::read(data)?;
    let mut file = WholeFile::create(out)?;
    let requests = bench.prepare(&name, &rows, |row| Draft {
        answer: row.answer.clone(),
        score_only: true,
        monitor: MonitorDraft {
            // A score is wanted whatever the policy would do about it.
            mode: Some(Mode::Shadow),
            policy: options.policy.clone(),
            return_scores: options.per_token,
            hold_back: None,
        },
        ..draft(row)
    })?;
    bench
        .run(&name, &rows, requests, tick, |done| {
            file.row(&ScoreRow {
                id: &done.row.id,
                scores: scores(&done.outcome.scores),
                token_logits: options
                    .per_token
                    .then(|| token_logits(&done.outcome.token_scores)),
            })
        })
        .await?;
    file.finish()?;
    Ok(rows.len())
}
