//! `lab refusal-head`: refusals written after harmful prompts, read by the engine, and the head
//! that learns them.
//! Knows which states predict which tokens; the fitting is in `refusal_head.rs`.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::Tensor;
use inwit_probes::refusal_head::{RefusalHead, RefusalHeadManifest};
use inwit_probes::{Metric, Site};

use super::bench::{Bench, Tick};
use super::examples::{check_harm, record};
use super::fit::{identity, unfit};
use super::refusal_head::{Disturbance, Examples, Fit, Options, disturbance, evaluate, fit};
use super::rows::{self, Row, RowPrompt, at};
use super::seeded::Seeded;
use super::states::{RowStates, visit};
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};

/// One group of prompts, of refusals and of benign answers in this many is kept for measuring.
const HELD_OUT: usize = 10;

/// A fit whose loss is this many times that of no fit has diverged.
const DIVERGED: f32 = 1.5;

/// What to fit a head on.
#[derive(Clone, Debug)]
pub struct HeadData {
    pub name: String,
    pub harmful: PathBuf,
    /// Rows with a refusal as `text`.
    pub refusals: PathBuf,
    /// Harmless prompts with an `answer`.
    pub benign: Option<PathBuf>,
    /// For the record.
    pub command: String,
}

/// A fitted head and how it does on refusals after prompts that it was not fitted on.
#[derive(Debug)]
pub struct Made {
    pub head: RefusalHead,
    /// Without the head and with it, on prompts and refusals that it was not fitted on; none without
    /// ten of both.
    pub refusals: Option<[Fit; 2]>,
    /// On benign answers that it was not fitted on; none without ten of them.
    pub benign: Option<Disturbance>,
}

/// Pairs every harmful prompt with a refusal, reads the states that predict its tokens, and fits.
/// `output_head` is the model's own, `[vocab, d_model]` f32. Deterministic given the seed.
pub async fn make(
    bench: &Bench,
    output_head: &Tensor,
    data: &HeadData,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Made> {
    options.check(bench.d_model())?;
    let mut harmful = rows::read(&data.harmful)?;
    check_harm(&data.harmful, &harmful, true)?;
    let refusals = rows::read(&data.refusals)?;
    let kept = pair(&mut harmful, &refusals, options.seed)
        .map_err(|message| Error::file(data.refusals.display(), message))?;
    let file = data.harmful.display().to_string();
    let all = teacher_forced(bench, &file, &harmful, &mut *tick).await?;
    let (mut learn, mut held_out) = (Examples::default(), Examples::default());
    for (examples, kept) in all.into_iter().zip(kept) {
        let to = match kept {
            true => &mut held_out,
            false => &mut learn,
        };
        to.states.extend(examples.states);
        to.targets.extend(examples.targets);
    }
    let mut records = vec![
        record(&data.harmful, harmful.len())?,
        record(&data.refusals, refusals.len())?,
    ];
    let (mut benign, mut benign_held_out) = (Vec::new(), Vec::new());
    if let Some(path) = &data.benign {
        let rows = rows::read(path)?;
        let file = path.display().to_string();
        if let Some(row) = rows.iter().find(|row| row.answer.is_none()) {
            return Err(at(
                &file,
                row.line,
                "no `answer`; the head is kept as it is on answers",
            ));
        }
        check_harm(path, &rows, false)?;
        let all = teacher_forced(bench, &file, &rows, &mut *tick).await?;
        for (examples, kept) in all.into_iter().zip(held_out_groups(&rows)) {
            match kept {
                true => benign_held_out.extend(examples.states),
                false => benign.extend(examples.states),
            }
        }
        records.push(record(path, rows.len())?);
    }

    let epoch = |epoch: usize, loss: f32| tracing::info!(epoch, loss, "refusal head");
    let low_rank = fit(output_head, &learn, &benign, options, epoch)?;
    // Of an untouched head the loss on benign positions is 0.
    let positions = learn.targets.len() + benign.len() / bench.d_model();
    let share = learn.targets.len() as f32 / positions.max(1) as f32;
    let untouched = evaluate(output_head, None, &learn)?.loss * share;
    let reached = low_rank.losses.last().copied().unwrap_or(untouched);
    if reached > DIVERGED * untouched {
        let message = format!(
            "is too high: the loss became {reached:.3}, and {untouched:.3} is that of a head left as it is"
        );
        return Err(Error::invalid("learning_rate", message));
    }
    let refusals = match held_out.targets.is_empty() {
        true => None,
        false => Some([
            evaluate(output_head, None, &held_out)?,
            evaluate(output_head, Some(&low_rank), &held_out)?,
        ]),
    };
    let disturbed = disturbance(output_head, &low_rank, &benign_held_out)?;

    let (vocab, d_model) = output_head.dims2()?;
    let mut manifest =
        RefusalHeadManifest::new(&data.name, options.rank, d_model, vocab, identity(bench));
    let mut metrics = vec![("fitted_tokens", learn.targets.len() as f32)];
    if let Some([before, after]) = refusals {
        metrics.extend([
            ("held_out_loss_before", before.loss),
            ("held_out_loss_after", after.loss),
            ("held_out_accuracy_before", before.accuracy),
            ("held_out_accuracy_after", after.accuracy),
            ("held_out_tokens", held_out.targets.len() as f32),
        ]);
    }
    if let Some(benign) = disturbed {
        metrics.extend([
            ("held_out_benign_mean_kl", benign.mean_kl),
            ("held_out_benign_top1_changed", benign.top1_changed),
            ("held_out_benign_tokens", benign.tokens as f32),
        ]);
    }
    for (name, value) in metrics {
        let metric = Metric {
            value: f64::from(value),
            interval: None,
        };
        manifest.record.metrics.insert(name.into(), metric);
    }
    manifest.record.data = records;
    manifest.record.seed = options.seed;
    manifest.record.command = data.command.clone();
    let head = RefusalHead::new(manifest, low_rank.a, low_rank.b).map_err(unfit)?;
    Ok(Made {
        head,
        refusals,
        benign: disturbed,
    })
}

/// Which rows are kept for measuring: those of every tenth group, in the order of the file.
fn held_out_groups(rows: &[Row]) -> Vec<bool> {
    let mut groups = HashMap::new();
    let kept = rows.iter().map(|row| {
        let next = groups.len();
        let group = row.group.as_deref().unwrap_or(&row.id);
        *groups.entry(group).or_insert(next) % HELD_OUT == HELD_OUT - 1
    });
    kept.collect()
}

/// Gives every prompt a refusal: one of its category where there is any, else one of any category.
/// Tells which prompts are kept for measuring; those alone get the refusals that are kept too.
fn pair(harmful: &mut [Row], refusals: &[Row], seed: u64) -> Result<Vec<bool>, String> {
    let texts: Vec<(&str, Option<&str>)> = refusals
        .iter()
        .map(|row| match &row.prompt {
            RowPrompt::Text(text) => Ok((text.as_str(), row.category.as_deref())),
            _ => Err(format!("line {}: a refusal is given as `text`", row.line)),
        })
        .collect::<Result<_, _>>()?;
    let kept_texts = held_out_groups(refusals);
    let mut kept = held_out_groups(harmful);
    if !kept_texts.contains(&true) {
        kept.fill(false);
    }
    let mut seeded = Seeded::new(seed);
    for (row, kept) in harmful.iter_mut().zip(&kept) {
        let texts = || texts.iter().zip(&kept_texts);
        let texts = || {
            texts()
                .filter(|(_, text)| *text == kept)
                .map(|(text, _)| text)
        };
        let same = |(_, category): &&(&str, Option<&str>)| {
            category.is_some() && *category == row.category.as_deref()
        };
        let mut choice: Vec<_> = texts().filter(same).collect();
        if choice.is_empty() {
            choice = texts().collect();
        }
        row.answer = Some(choice[seeded.below(choice.len())].0.to_owned());
    }
    Ok(kept)
}

/// Per row, the states that predict the answer's tokens, and the tokens, the end of turn included.
async fn teacher_forced(
    bench: &Bench,
    file: &str,
    rows: &[Row],
    tick: Tick<'_>,
) -> Result<Vec<Examples>> {
    let end = bench.engine.tokenizer().stop_ids().first().copied();
    let mut all = Vec::with_capacity(rows.len());
    let sites = [Site::FinalNorm];
    visit(
        bench,
        file,
        rows,
        &sites,
        PositionSelection::FromLastPromptToken,
        tick,
        |request, states| {
            all.push(predictions(&states, request.prompt.tokens.len(), end));
            Ok(())
        },
    )
    .await?;
    Ok(all)
}

/// The state at position p predicts the token at p + 1; the last one predicts the end.
fn predictions(states: &RowStates, prompt: usize, end: Option<u32>) -> Examples {
    let first = prompt.saturating_sub(1) as u32;
    let d_model = states.values[0].len() / states.positions.len().max(1);
    let mut examples = Examples::default();
    for (index, position) in states.positions.iter().enumerate() {
        let target = states.tokens.get(index + 1).copied().or(end);
        if let (true, Some(target)) = (*position >= first, target) {
            let state = &states.values[0][index * d_model..(index + 1) * d_model];
            examples.states.extend_from_slice(state);
            examples.targets.push(target);
        }
    }
    examples
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<Row> {
        rows::parse(text.as_bytes(), "f").expect("rows")
    }

    #[test]
    fn a_prompt_gets_a_refusal_of_its_category() {
        let mut harmful = parsed(concat!(
            "{\"text\":\"a\",\"category\":\"fraud\"}\n",
            "{\"text\":\"b\",\"category\":\"unheard\"}",
        ));
        let refusals = parsed(concat!(
            "{\"text\":\"no fraud\",\"category\":\"fraud\"}\n",
            "{\"text\":\"no\",\"category\":\"generic\"}",
        ));
        let kept = pair(&mut harmful, &refusals, 1).expect("pairs");
        assert_eq!(harmful[0].answer.as_deref(), Some("no fraud"));
        assert!(harmful[1].answer.is_some());
        assert_eq!(kept, [false, false]);
    }

    #[test]
    fn prompts_that_are_kept_get_refusals_that_no_other_prompt_has() {
        let lines = |what: &str, count: usize| {
            let line = |i| {
                format!(
                    "{{\"text\":\"{what} {i}\",\"group\":\"{what}{}\"}}\n",
                    i / 2
                )
            };
            parsed(&(0..count).map(line).collect::<String>())
        };
        let (mut harmful, refusals) = (lines("h", 60), lines("no", 40));
        let kept = pair(&mut harmful, &refusals, 1).expect("pairs");
        assert_eq!(kept.iter().filter(|kept| **kept).count(), 6);
        for (row, kept) in harmful.iter().zip(&kept) {
            let answer = row.answer.as_deref().expect("an answer");
            let number: usize = answer[3..].parse().expect("a number");
            assert_eq!((number / 2) % 10 == 9, *kept, "{answer}");
        }
        // Rows of a group stay together.
        assert!(kept.chunks(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn each_state_predicts_the_next_token_and_the_last_the_end() {
        let states = RowStates {
            positions: vec![0, 1, 2, 3],
            tokens: vec![10, 11, 12, 13],
            values: vec![vec![0.0, 1.0, 2.0, 3.0]],
        };
        let examples = predictions(&states, 2, Some(99));
        assert_eq!(examples.targets, [12, 13, 99]);
        assert_eq!(examples.states, [1.0, 2.0, 3.0]);
    }
}
