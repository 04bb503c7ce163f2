//! Runs the rows of a data file through the engine: many in flight, results in input order.
//! Knows requests and events; knows nothing of what is done with the results.

use std::sync::Arc;

use futures::{StreamExt, stream};
use inwit_probes::Site;

use super::fit::unfit;
use super::output::end_without_token;
use super::rows::{Row, RowPrompt, at};
use crate::engine::event::{Captured, Completed, Event, FinishReason, Score};
use crate::engine::fold::Folded;
use crate::engine::handle::Engine;
use crate::engine::prepare::{CaptureDraft, Defaults, Draft, MonitorDraft, PromptDraft, prepare};
use crate::engine::request::{PositionSelection, Request};
use crate::engine::sampler::TokenLogprobs;
use crate::error::{Error, Result};
use crate::model::Message;
use crate::policy::{Action, Mode};
use crate::registry::Snapshot;

/// Hears how many of how many rows are done.
pub type Tick<'a> = &'a mut (dyn FnMut(usize, usize) + Send);

/// An engine to work on, and what holds for every request of the run.
pub struct Bench {
    pub engine: Engine,
    pub snapshot: Arc<Snapshot>,
    pub defaults: Defaults,
    /// Enough to keep the engine's batch full.
    pub in_flight: usize,
}

/// A row that went through the engine.
pub struct Done<'a> {
    pub row: &'a Row,
    pub request: Request,
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub finish_reason: FinishReason,
    pub action: Action,
    /// One per detector, and per probe without one.
    pub scores: Vec<Score>,
    /// Per token; only where they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Per token; only with `return_scores`.
    pub token_scores: Vec<Score>,
    pub captured: Vec<Captured>,
}

impl Bench {
    pub fn d_model(&self) -> usize {
        self.engine.info().config.d_model
    }

    /// Refuses sites that the loaded model does not have.
    pub fn check_sites(&self, sites: &[Site]) -> Result<()> {
        for (index, site) in sites.iter().enumerate() {
            site.check(self.engine.info().config.n_layers)
                .map_err(unfit)?;
            if sites[..index].contains(site) {
                return Err(Error::invalid("site", format!("{site} is named twice")));
            }
        }
        Ok(())
    }

    /// Checks and tokenises every row before any is run: an error on the last line costs no work.
    pub fn prepare(
        &self,
        file: &str,
        rows: &[Row],
        draft: impl Fn(&Row) -> Draft,
    ) -> Result<Vec<Request>> {
        let request = |row: &Row| {
            prepare(draft(row), &self.engine, &self.snapshot, &self.defaults)
                .map_err(|error| at(file, row.line, error))
        };
        rows.iter().map(request).collect()
    }

    /// Runs the requests, one per row, and hands the results over in the order of the rows.
    ///
    /// A request that the policy or a monitor ended is a result; any other failure ends the run
    /// with an error that names the row's line.
    pub async fn run(
        &self,
        file: &str,
        rows: &[Row],
        requests: Vec<Request>,
        tick: Tick<'_>,
        mut each: impl FnMut(Done<'_>) -> Result<()>,
    ) -> Result<()> {
        let total = rows.len();
        let one = |(row, request): (_, Request)| async move {
            (row, self.answer(request.clone()).await, request)
        };
        let work = rows.iter().zip(requests);
        let mut outcomes = stream::iter(work).map(one).buffered(self.in_flight.max(1));
        let mut done = 0;
        while let Some((row, outcome, request)) = outcomes.next().await {
            let row: &Row = row;
            let outcome = outcome.map_err(|error| at(file, row.line, error))?;
            each(Done {
                row,
                request,
                outcome,
            })?;
            done += 1;
            tick(done, total);
        }
        Ok(())
    }

    /// Runs one request to its end, waiting for room in the queue.
    ///
    /// A request that the policy or a monitor ended is an outcome.
    pub async fn answer(&self, request: Request) -> Result<Outcome> {
        loop {
            match self.engine.submit(request.clone()) {
                Ok(mut events) => {
                    let mut gathered = Gathered::default();
                    while let Some(event) = events.next().await {
                        gathered.take(event)?;
                    }
                    return gathered.outcome();
                }
                // The queue is full of our own rows: wait for room.
                Err(Error::Overloaded { retry_after, .. }) => {
                    tokio::time::sleep(retry_after).await;
                }
                Err(error) => return Gathered::ended_by(error)?.outcome(),
            }
        }
    }
}

/// A draft of the row's prompt that is answered, unmonitored, with the model's defaults.
pub fn draft(row: &Row) -> Draft {
    Draft {
        monitor: MonitorDraft {
            mode: Some(Mode::Off),
            ..MonitorDraft::default()
        },
        ..Draft::of(prompt(&row.prompt))
    }
}

/// A draft that reads states of the row's prompt, and of its answer where it has one.
pub fn reading(row: &Row, sites: &[Site], positions: PositionSelection) -> Draft {
    Draft {
        answer: row.answer.clone(),
        score_only: true,
        capture: Some(CaptureDraft {
            sites: sites.iter().map(Site::to_string).collect(),
            positions,
        }),
        ..draft(row)
    }
}

fn prompt(prompt: &RowPrompt) -> PromptDraft {
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    match prompt {
        RowPrompt::Text(text) => PromptDraft::Chat(vec![message("user", text)]),
        RowPrompt::Messages(turns) => {
            let turns = turns.iter().map(|turn| message(&turn.role, &turn.content));
            PromptDraft::Chat(turns.collect())
        }
        RowPrompt::Raw(text) => PromptDraft::RawText(text.clone()),
    }
}

/// The events of one request so far.
#[derive(Default)]
struct Gathered {
    folded: Folded,
    token_scores: Vec<Score>,
    captured: Vec<Captured>,
    ended: Option<(FinishReason, Action)>,
}

impl Gathered {
    fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Captured(captured) => self.captured.push(captured),
            Event::Failed(error) => {
                self.ended = Some(end_without_token(&error).ok_or(error)?);
            }
            Event::Delta(mut delta) => {
                self.token_scores.append(&mut delta.scores);
                self.folded.take(Event::Delta(delta))?;
            }
            event => self.folded.take(event)?,
        }
        Ok(())
    }

    fn ended_by(error: Error) -> Result<Self> {
        let mut gathered = Self::default();
        gathered.take(Event::Failed(error))?;
        Ok(gathered)
    }

    fn outcome(self) -> Result<Outcome> {
        let (finish_reason, action, scores) = match (self.folded.completed, self.ended) {
            (
                Some(Completed {
                    finish_reason,
                    action,
                    scores,
                    ..
                }),
                _,
            ) => (finish_reason, action, scores),
            (None, Some((finish_reason, action))) => (finish_reason, action, Vec::new()),
            (None, None) => {
                return Err(Error::Unavailable(
                    "the engine stopped before the answer's end".into(),
                ));
            }
        };
        Ok(Outcome {
            text: self.folded.text,
            token_ids: self.folded.token_ids,
            finish_reason,
            action,
            scores,
            logprobs: self.folded.logprobs,
            token_scores: self.token_scores,
            captured: self.captured,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::event::{Delta, Retract, Timings, Usage};

    fn completed() -> Event {
        Event::Completed(Box::new(Completed {
            finish_reason: FinishReason::RefusedByPolicy,
            action: Action::Refuse,
            usage: Usage::default(),
            scores: Vec::new(),
            out_of_domain: false,
            partially_monitored: false,
            timings: Timings::default(),
        }))
    }

    fn outcome(events: impl IntoIterator<Item = Event>) -> Result<Outcome> {
        let mut gathered = Gathered::default();
        events
            .into_iter()
            .try_for_each(|event| gathered.take(event))?;
        gathered.outcome()
    }

    #[test]
    fn a_retracted_answer_is_the_replacement() {
        let delta = Delta {
            text: "Sure".into(),
            token_ids: vec![1],
            ..Delta::default()
        };
        let retract = Retract {
            keep_token_count: 0,
            keep_text_bytes: 0,
            replacement_text: "No.".into(),
            replacement_token_ids: vec![2],
        };
        let outcome = outcome([Event::Delta(delta), Event::Retract(retract), completed()]);
        let outcome = outcome.expect("folds");
        assert_eq!((outcome.text.as_str(), outcome.token_ids), ("No.", vec![2]));
        assert_eq!(outcome.action, Action::Refuse);
    }

    #[test]
    fn an_abort_before_the_first_token_is_an_outcome() {
        let outcome = outcome([Event::Failed(Error::AbortedByPolicy)]).expect("is an outcome");
        assert_eq!((outcome.action, outcome.text.as_str()), (Action::Abort, ""));
    }

    #[test]
    fn an_engine_that_stops_in_the_middle_is_an_error() {
        assert!(matches!(outcome([]), Err(Error::Unavailable(_))));
        let failed = Event::Failed(Error::internal("broken"));
        assert!(matches!(outcome([failed]), Err(Error::Internal(_))));
    }

    #[test]
    fn a_text_row_is_one_user_turn() {
        let PromptDraft::Chat(messages) = prompt(&RowPrompt::Text("Hi".into())) else {
            panic!("not a chat");
        };
        assert_eq!(
            (messages[0].role.as_str(), messages[0].content.as_str()),
            ("user", "Hi")
        );
    }
}
