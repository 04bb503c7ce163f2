//! `inwit demo`: the default model behind the shipped probes, and a client that holds some chats.
//! Everything goes through the server that users run.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use serde::Deserialize;

use super::Exit;
use super::server::start;
use super::terminal::{bar, colours, note, print, risk, shaded, shortened};
use crate::config::{Config, Flags};
use crate::engine::event::{Delta, Event, FinishReason, Score};
use crate::engine::fold::Folded;
use crate::engine::prepare::{Draft, MonitorDraft, PromptDraft};
use crate::engine::sampler::SamplingDraft;
use crate::error::{Error, Result};
use crate::lab::output::finish_reason;
use crate::model::Message;
use crate::policy::{Action, Mode};
use crate::rpc::client::{Client, ClientError};

const CHATS: &str = include_str!("../../probes/data/demo.jsonl");
const MOST_TOKENS: u32 = 96;
/// The shipped policies whose action the harmful chats show, in turn.
const ACTING_POLICIES: [(&str, Action); 3] = [
    ("strict", Action::Refuse),
    ("safeswitch", Action::RefusalHead),
    ("steer", Action::Steer),
];
const HARMLESS_POLICY: &str = "default";
/// The probe whose scores colour an answer. Others of the library are high on harmless answers too:
/// `compliance` wherever the model does not decline.
const SHOWN_PROBE: &str = "response_harm";
/// Over how many tokens a colour is averaged: single ones jump.
const SHOWN_TOKENS: usize = 8;

/// Starts a server on free loopback ports and chats with it: harmless prompts, some that only sound
/// dangerous, harmful ones, and one wrapped in a jailbreak. Each token is shown in the colour of what
/// the probe `response_harm` read of the last eight, from green to red. Exits with 0 only if
/// everything went as it should.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A GGUF file, a Hugging Face folder, or a known name [default: smollm2-135m-instruct]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
}

/// A row of the demo's data.
#[derive(Clone, Debug, Deserialize)]
struct Chat {
    text: String,
    /// What is shown in its place: harmful prompts are put on no screen.
    shown: Option<String>,
    category: String,
    expect: Expect,
    /// The policy to chat under; chosen by turns when unset.
    policy: Option<String>,
}

impl Chat {
    fn shown(&self) -> &str {
        self.shown.as_ref().unwrap_or(&self.text)
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Expect {
    Answered,
    Refused,
}

/// A chat, the policy it goes through, and what that should do.
#[derive(Clone, Debug)]
struct Planned {
    chat: Chat,
    policy: String,
    /// Unset: nothing may be done, a flag at most.
    action: Option<Action>,
}

/// How a chat went.
struct Held {
    action: Action,
    finish: FinishReason,
    rule: String,
    scores: Vec<Score>,
    tokens: u32,
    took: Duration,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    let config = Config::load(&Flags {
        model: args.model,
        listen: Some("127.0.0.1:0".into()),
        http_listen: Some("off".into()),
        mode: Some("enforce".into()),
        // Its chats go through several policies.
        overrides: Some("allow".into()),
        ..Flags::default()
    })?;
    let plan = plan(CHATS)?;
    note("loading the model and its probes …");
    let running = start(&config).await?;
    let result = hold_all(&running.address.to_string(), &plan).await;
    running.stop().await?;
    let held = result?;
    print(&format!("\n{}\n", table(&plan, &held)))?;
    let wrong = plan
        .iter()
        .zip(&held)
        .filter(|(chat, held)| !as_expected(chat, held))
        .count();
    if wrong > 0 {
        note(&format!(
            "{wrong} of {} chats did not go as they should",
            plan.len()
        ));
        return Ok(Exit::Failed);
    }
    note("everything went as it should");
    Ok(Exit::Done)
}

fn plan(chats: &str) -> Result<Vec<Planned>> {
    let mut turns = ACTING_POLICIES.iter().cycle();
    let planned = |line: &str| {
        let chat: Chat = serde_json::from_str(line)
            .map_err(|error| Error::internal(format!("the demo's chats: {error}")))?;
        let (policy, action) = match (&chat.policy, chat.expect) {
            (_, Expect::Answered) => (HARMLESS_POLICY, None),
            (Some(policy), Expect::Refused) => {
                let known = ACTING_POLICIES.iter().find(|(name, _)| name == policy);
                let known = known.ok_or_else(|| {
                    Error::internal(format!("the demo's chats name the policy `{policy}`"))
                })?;
                (known.0, Some(known.1))
            }
            (None, Expect::Refused) => {
                let turn = turns.next().expect("a cycle does not end");
                (turn.0, Some(turn.1))
            }
        };
        Ok(Planned {
            policy: policy.to_owned(),
            action,
            chat,
        })
    };
    chats
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(planned)
        .collect()
}

async fn hold_all(address: &str, plan: &[Planned]) -> Result<Vec<Held>> {
    let mut client = Client::connect(address).await.map_err(unexpected)?;
    let mut held = Vec::new();
    for (index, planned) in plan.iter().enumerate() {
        let head = format!(
            "\n── {} of {}, {}, policy {} ──\n> {}\n",
            index + 1,
            plan.len(),
            planned.chat.category.replace('_', " "),
            planned.policy,
            shortened(planned.chat.shown(), 100),
        );
        print(&head)?;
        held.push(hold(&mut client, planned).await?);
    }
    Ok(held)
}

/// Holds one chat and shows it as it comes.
async fn hold(client: &mut Client, planned: &Planned) -> Result<Held> {
    let started = Instant::now();
    let mut folded = Folded::default();
    let mut aborted = false;
    let mut recent = Recent::default();
    match client.stream(&draft(planned)).await {
        Err(ClientError::AbortedByPolicy) => aborted = true,
        Err(error) => return Err(unexpected(error)),
        Ok(mut answer) => {
            while let Some(event) = answer.next().await.map_err(unexpected)? {
                show(&event, &mut recent)?;
                folded.take(event)?;
            }
        }
    }
    let rule = folded.verdicts.iter().max_by_key(|verdict| verdict.action);
    let rule = rule.map(|verdict| verdict.rule.clone()).unwrap_or_default();
    let completed = folded.completed.as_ref();
    let held = Held {
        action: match (aborted, completed) {
            (true, _) => Action::Abort,
            (_, completed) => completed.map_or(Action::Allow, |completed| completed.action),
        },
        finish: completed.map_or(FinishReason::RefusedByPolicy, |c| c.finish_reason),
        rule,
        scores: completed
            .map(|completed| completed.scores.clone())
            .unwrap_or_default(),
        tokens: completed.map_or(0, |completed| completed.usage.completion_tokens),
        took: started.elapsed(),
    };
    print(&format!("\n  → {}\n", done(&held)))?;
    Ok(held)
}

fn draft(planned: &Planned) -> Draft {
    let message = Message {
        role: "user".into(),
        content: planned.chat.text.clone(),
    };
    Draft {
        sampling: SamplingDraft {
            max_tokens: Some(MOST_TOKENS),
            temperature: Some(0.0),
            ..SamplingDraft::default()
        },
        monitor: MonitorDraft {
            mode: Some(Mode::Enforce),
            policy: Some(planned.policy.clone()),
            return_scores: true,
            hold_back: None,
        },
        ..Draft::of(PromptDraft::Chat(vec![message]))
    }
}

/// What the shown probe read of the newest tokens.
#[derive(Default)]
struct Recent(VecDeque<f32>);

impl Recent {
    /// The mean logit, with that of a delta's token.
    fn with(&mut self, delta: &Delta) -> Option<f32> {
        let shown = |score: &&Score| score.detector.is_none() && *score.probe == *SHOWN_PROBE;
        let logits = delta.scores.iter().filter(shown).map(|score| score.logit);
        self.0.extend(logits.filter(|logit| logit.is_finite()));
        while self.0.len() > SHOWN_TOKENS {
            self.0.pop_front();
        }
        let mean = self.0.iter().sum::<f32>() / self.0.len() as f32;
        (!self.0.is_empty()).then_some(mean)
    }
}

fn show(event: &Event, recent: &mut Recent) -> Result<()> {
    match event {
        Event::Delta(delta) => print(&with_risk(&delta.text, recent.with(delta), colours())),
        Event::Verdict(verdict) => print(&format!(
            "\n  ! {} (rule {})\n",
            verdict.action, verdict.rule
        )),
        Event::Retract(retract) => print(&format!(
            "\n  ! withdrawn; instead:\n{}",
            retract.replacement_text
        )),
        _ => Ok(()),
    }
}

/// Text in the colour of its risk, or with a small bar behind it.
fn with_risk(text: &str, logit: Option<f32>, colours: bool) -> String {
    match (colours, logit.map(risk)) {
        (true, risk) => shaded(text, risk),
        (false, Some(risk)) if !text.is_empty() => format!("{text}{}", bar(risk)),
        (false, _) => text.to_owned(),
    }
}

fn as_expected(planned: &Planned, held: &Held) -> bool {
    match planned.action {
        None => {
            held.action <= Action::Flag
                && !matches!(
                    held.finish,
                    FinishReason::RefusedByPolicy | FinishReason::MonitorFailed
                )
        }
        Some(action) => held.action == action,
    }
}

fn done(held: &Held) -> String {
    let done = match held.action {
        Action::Allow => "answered",
        Action::Flag => "answered, flagged",
        Action::Steer => "steered",
        Action::RefusalHead => "refusal head",
        Action::Refuse => "refused",
        Action::Abort => "aborted",
    };
    match held.finish {
        FinishReason::MonitorFailed => format!("{done} ({})", finish_reason(held.finish)),
        _ => done.to_owned(),
    }
}

fn table(plan: &[Planned], held: &[Held]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header([
        "prompt", "expected", "done", "rule", "scores", "tokens", "ms", "",
    ]);
    for (planned, held) in plan.iter().zip(held) {
        let expected = match planned.action {
            None => "answered".to_owned(),
            Some(Action::RefusalHead) => "refusal head".to_owned(),
            Some(Action::Steer) => "steered".to_owned(),
            Some(_) => "refused".to_owned(),
        };
        let score = |score: &Score| {
            let name = score.detector.as_deref().unwrap_or(&score.probe);
            let value = score.probability.unwrap_or(score.logit);
            format!("{name} {value:.2}")
        };
        table.add_row([
            shortened(planned.chat.shown(), 36),
            expected,
            done(held),
            held.rule.clone(),
            held.scores.iter().map(score).collect::<Vec<_>>().join("\n"),
            held.tokens.to_string(),
            held.took.as_millis().to_string(),
            if as_expected(planned, held) {
                "✓"
            } else {
                "✗"
            }
            .to_owned(),
        ]);
    }
    table
}

fn unexpected(error: ClientError) -> Error {
    Error::internal(format!("the demo's chat failed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(action: Action, finish: FinishReason) -> Held {
        Held {
            action,
            finish,
            rule: "harm".into(),
            scores: Vec::new(),
            tokens: 3,
            took: Duration::from_millis(5),
        }
    }

    #[test]
    fn the_demo_shows_every_kind_of_action() {
        let plan = plan(CHATS).expect("plans");
        assert!(plan.iter().any(|planned| planned.action.is_none()));
        for (policy, action) in ACTING_POLICIES {
            let shows = |p: &Planned| p.policy == policy && p.action == Some(action);
            assert!(plan.iter().any(shows), "{policy}");
        }
    }

    #[test]
    fn no_harmful_prompt_is_shown() {
        for planned in plan(CHATS).expect("plans") {
            let hidden = !planned.chat.shown().contains(&planned.chat.text);
            assert_eq!(hidden, planned.chat.expect == Expect::Refused);
        }
    }

    #[test]
    fn a_harmless_chat_may_be_flagged_and_nothing_more() {
        let planned = plan(r#"{"text":"Hi","category":"harmless","expect":"answered"}"#);
        let planned = planned.expect("plans").remove(0);
        assert!(as_expected(
            &planned,
            &held(Action::Flag, FinishReason::Stop)
        ));
        assert!(!as_expected(
            &planned,
            &held(Action::Steer, FinishReason::Stop)
        ));
        assert!(!as_expected(
            &planned,
            &held(Action::Allow, FinishReason::MonitorFailed)
        ));
    }

    #[test]
    fn a_harmful_chat_must_meet_its_own_action() {
        let line = r#"{"text":"x","category":"harmful","expect":"refused","policy":"steer"}"#;
        let planned = plan(line).expect("plans").remove(0);
        assert!(as_expected(
            &planned,
            &held(Action::Steer, FinishReason::Stop)
        ));
        assert!(!as_expected(
            &planned,
            &held(Action::Allow, FinishReason::Stop)
        ));
    }

    #[test]
    fn an_unknown_expectation_or_policy_is_an_error() {
        assert!(plan(r#"{"text":"x","category":"c","expect":"ignored"}"#).is_err());
        let line = r#"{"text":"x","category":"c","expect":"refused","policy":"other"}"#;
        assert!(plan(line).is_err());
    }

    fn read_by(probe: &str, logit: f32) -> Delta {
        let score = Score {
            probe: probe.into(),
            probe_revision: 1,
            sites: Vec::new(),
            detector: None,
            position: 0,
            logit,
            probability: None,
            threshold: None,
            fired: false,
            out_of_domain: false,
        };
        Delta {
            scores: vec![score],
            ..Delta::default()
        }
    }

    #[test]
    fn the_risk_shown_is_the_mean_of_the_last_tokens_of_one_probe() {
        let mut recent = Recent::default();
        assert_eq!(recent.with(&Delta::default()), None);
        assert_eq!(recent.with(&read_by("compliance", 9.0)), None);
        assert_eq!(recent.with(&read_by(SHOWN_PROBE, 4.0)), Some(4.0));
        assert_eq!(recent.with(&read_by(SHOWN_PROBE, f32::NAN)), Some(4.0));
        assert_eq!(recent.with(&read_by(SHOWN_PROBE, -2.0)), Some(1.0));
        for _ in 0..SHOWN_TOKENS {
            recent.with(&read_by(SHOWN_PROBE, -2.0));
        }
        assert_eq!(recent.with(&Delta::default()), Some(-2.0));
    }

    #[test]
    fn without_colours_a_bar_shows_the_risk() {
        assert_eq!(with_risk("Hi", Some(9.0), false), "Hi█");
        assert_eq!(with_risk("", Some(9.0), false), "");
        assert_eq!(with_risk("Hi", None, false), "Hi");
    }
}
