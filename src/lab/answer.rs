//! `generate`: answers a file of prompts offline, by the engine and the policy that serve.

use std::path::Path;

use super::bench::{Bench, Tick, draft};
use super::output::{AnswerRow, WholeFile, finish_reason, refuse_same_file, scores};
use super::rows;
use crate::engine::prepare::{Draft, MonitorDraft};
use crate::engine::sampler::SamplingDraft;
use crate::error::Result;
use crate::policy::{Action, Mode};

/// What holds for every row.
#[derive(Clone, Debug)]
pub struct Options {
    pub mode: Mode,
    pub policy: Option<String>,
    pub sampling: SamplingDraft,
}

/// How many answers ended under each action, in order of severity; actions nobody met are left out.
pub type Counts = Vec<(Action, usize)>;

/// Writes one answer row per prompt, in input order.
///
/// An `answer` in the data is no part of the prompt and is left aside.
pub async fn generate(
    bench: &Bench,
    data: &Path,
    out: &Path,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Counts> {
    refuse_same_file(out, data)?;
    let name = data.display().to_string();
    let rows = rows::read(data)?;
    let mut file = WholeFile::create(out)?;
    let requests = bench.prepare(&name, &rows, |row| Draft {
        sampling: options.sampling.clone(),
        monitor: MonitorDraft {
            mode: Some(options.mode),
            policy: options.policy.clone(),
            // The last token is read too, though no rule waits for it.
            return_scores: options.mode != Mode::Off,
            hold_back: None,
        },
        ..draft(row)
    })?;
    let mut counts = Counts::new();
    bench
        .run(&name, &rows, requests, tick, |done| {
            count(&mut counts, done.outcome.action);
            file.row(&AnswerRow {
                id: &done.row.id,
                text: &done.outcome.text,
                token_ids: &done.outcome.token_ids,
                finish_reason: finish_reason(done.outcome.finish_reason),
                action: done.outcome.action.to_string(),
                scores: scores(&done.outcome.scores),
            })
        })
        .await?;
    file.finish()?;
    Ok(counts)
}

fn count(counts: &mut Counts, action: Action) {
    match counts.binary_search_by_key(&action, |(action, _)| *action) {
        Ok(index) => counts[index].1 += 1,
        Err(index) => counts.insert(index, (action, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_counted_in_order_of_severity() {
        let mut counts = Counts::new();
        for action in [Action::Refuse, Action::Allow, Action::Refuse] {
            count(&mut counts, action);
        }
        assert_eq!(counts, [(Action::Allow, 1), (Action::Refuse, 2)]);
    }
}
