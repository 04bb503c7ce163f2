//! Answers every row of a set with the policy off and enforced, with the same seeds, and has them
//! judged. Knows the engine and the judges; knows no statistics.

use futures::{StreamExt, stream};

use super::effect::Outcome;
use super::set::EvalSet;
use crate::engine::prepare::{Draft, MonitorDraft};
use crate::engine::sampler::SamplingDraft;
use crate::error::Result;
use crate::lab::bench::{Bench, Tick, draft};
use crate::lab::judge::{Judge, agreed, judge_all, prompt_text};
use crate::policy::{Action, Mode};

/// How answers are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    pub name: String,
    /// None is greedy.
    pub temperature: Option<f32>,
    pub seeds: Vec<u64>,
}

/// One row's two answers under one seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    pub off: Outcome,
    pub enforced: Outcome,
    /// The most severe that the policy did or would have told.
    pub action: Action,
    /// Token for token.
    pub same: bool,
}

/// The pairs of a set under a setting: `[seed][row]`.
pub type Trial = Vec<Vec<Pair>>;

/// Judgements under way at once: enough to keep an engine's batch full.
const IN_FLIGHT: usize = 16;

/// What was said to a row.
struct Answer {
    text: String,
    tokens: Vec<u32>,
    action: Action,
}

/// Runs the trial. An answer that is the same in both modes is judged once.
pub async fn run(
    bench: &Bench,
    judges: &[Box<dyn Judge>],
    set: &EvalSet,
    setting: &Setting,
    max_tokens: Option<u32>,
    tick: Tick<'_>,
) -> Result<Trial> {
    let mut trial = Vec::with_capacity(setting.seeds.len());
    for seed in &setting.seeds {
        let sampling = SamplingDraft {
            max_tokens,
            temperature: setting.temperature,
            seed: Some(*seed),
            ..SamplingDraft::default()
        };
        let off = answers(bench, set, Mode::Off, &sampling, &mut *tick).await?;
        let enforced = answers(bench, set, Mode::Enforce, &sampling, &mut *tick).await?;
        let rows = set.labelled.rows.iter().zip(off.iter().zip(&enforced));
        let pairs = rows.map(|(row, (off, enforced))| {
            let prompt = prompt_text(&row.prompt);
            async move { pair(judges, &prompt, off, enforced).await }
        });
        let pairs: Vec<Result<Pair>> = stream::iter(pairs).buffered(IN_FLIGHT).collect().await;
        trial.push(pairs.into_iter().collect::<Result<_>>()?);
    }
    Ok(trial)
}

async fn answers(
    bench: &Bench,
    set: &EvalSet,
    mode: Mode,
    sampling: &SamplingDraft,
    tick: Tick<'_>,
) -> Result<Vec<Answer>> {
    let (file, rows) = (&set.labelled.file, &set.labelled.rows);
    let requests = bench.prepare(file, rows, |row| Draft {
        sampling: sampling.clone(),
        monitor: MonitorDraft {
            mode: Some(mode),
            ..MonitorDraft::default()
        },
        ..draft(row)
    })?;
    let mut answers = Vec::with_capacity(rows.len());
    bench
        .run(file, rows, requests, tick, |done| {
            answers.push(Answer {
                text: done.outcome.text,
                tokens: done.outcome.token_ids,
                action: done.outcome.action,
            });
            Ok(())
        })
        .await?;
    Ok(answers)
}

async fn pair(
    judges: &[Box<dyn Judge>],
    prompt: &str,
    off: &Answer,
    enforced: &Answer,
) -> Result<Pair> {
    let judged = async |answer: &Answer| {
        let verdicts = judge_all(judges, prompt, &answer.text).await?;
        Ok::<_, crate::error::Error>(Outcome::of(agreed(&verdicts)))
    };
    let same = off.tokens == enforced.tokens && off.text == enforced.text;
    let without = judged(off).await?;
    Ok(Pair {
        off: without,
        enforced: match enforced.action {
            // The policy's own words, or none at all: nobody has to judge those.
            Action::Refuse | Action::Abort => Outcome::Refused,
            _ if same => without,
            _ => judged(enforced).await?,
        },
        action: enforced.action,
        same,
    })
}

#[cfg(test)]
mod tests {
    use futures::future::BoxFuture;

    use super::*;
    use crate::lab::judge::{RuleJudge, Verdict};

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

    fn answer(text: &str, tokens: &[u32], action: Action) -> Answer {
        Answer {
            text: text.into(),
            tokens: tokens.to_vec(),
            action,
        }
    }

    async fn paired(off: Answer, enforced: Answer) -> Pair {
        let judges: Vec<Box<dyn Judge>> = vec![Box::new(RuleJudge), Box::new(Trusting)];
        pair(&judges, "Bake", &off, &enforced)
            .await
            .expect("judges")
    }

    #[tokio::test]
    async fn an_answer_counts_as_complied_where_every_judge_says_so() {
        let helped = "Take flour, water, salt and yeast, and knead them well.";
        let declined = "I'm sorry, but I can't help with that.";
        let pair = paired(
            answer(helped, &[1], Action::Allow),
            answer(declined, &[2], Action::RefusalHead),
        )
        .await;
        assert_eq!(pair.off, Outcome::Complied);
        // One judge takes it for a compliance.
        assert_eq!(pair.enforced, Outcome::Disputed);
        assert!(!pair.same);
    }

    #[tokio::test]
    async fn what_the_policy_refused_is_refused_whatever_judges_say() {
        for action in [Action::Refuse, Action::Abort] {
            let pair = paired(
                answer("Take flour.", &[1], Action::Allow),
                answer("", &[], action),
            )
            .await;
            assert_eq!(pair.enforced, Outcome::Refused);
        }
    }

    #[tokio::test]
    async fn the_same_answer_has_the_same_outcome() {
        let said = || answer("Take flour.", &[1, 2], Action::Allow);
        let pair = paired(said(), said()).await;
        assert!(pair.same && pair.off == pair.enforced);
    }
}
