//! `inwit chat`: asks a running server, an ordinary gRPC client.

use std::io::{IsTerminal, stdout};
use std::str::FromStr;

use super::Exit;
use super::terminal::{note, print};
use crate::engine::event::{Completed, Event, FinishReason, Score, Verdict};
use crate::engine::fold::Folded;
use crate::engine::prepare::{
    Draft, InterventionDraft, InterventionKindDraft, MonitorDraft, PromptDraft, VectorDraft,
};
use crate::engine::request::PositionSelection;
use crate::engine::sampler::SamplingDraft;
use crate::error::{Error, Result};
use crate::lab::output::finish_reason;
use crate::model::Message;
use crate::policy::{Action, Mode};
use crate::rpc::client::{Client, ClientError};

/// The answer goes to standard output: as it comes on a terminal, whole at the end elsewhere, so
/// that a pipe never holds text which the policy withdrew. Verdicts go to standard error.
/// Ctrl-C cancels the request.
///
/// Exits with 0 when answered, 2 for wrong arguments, 3 when refused by the policy, 4 without a
/// connection or when the server is not available, 5 for another status, 130 when interrupted.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What to say
    text: String,
    /// Where the server listens
    #[arg(long, default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    address: String,
    /// A system prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 is greedy [default: the server's]
    #[arg(long)]
    temperature: Option<f32>,
    /// Equal seeds give equal answers
    #[arg(long)]
    seed: Option<u64>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// off, shadow or enforce [default: the server's]
    #[arg(long)]
    mode: Option<Mode>,
    /// Name of a policy that the server has loaded
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// Ask for scores and the names of probes and rules
    #[arg(long)]
    scores: bool,
    /// vector=NAME[,strength=S][,site=SITE][,kind=add|project_out|clamp_above|clamp_below]
    /// [,positions=last|prompt|generated|all]; may be given several times
    #[arg(long = "steer", value_name = "STEER")]
    steers: Vec<Steer>,
}

/// One `--steer`.
#[derive(Clone, Debug)]
struct Steer(InterventionDraft);

impl FromStr for Steer {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut vector = None;
        let mut draft = InterventionDraft {
            vector: VectorDraft::Named(String::new()),
            site: None,
            kind: InterventionKindDraft::Add,
            strength: None,
            positions: PositionSelection::All,
            condition: None,
        };
        for part in text.split(',') {
            let expected = "expected vector=NAME, strength=NUMBER, site=SITE, kind=KIND or positions=POSITIONS";
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}`: {expected}"))?;
            match key.trim() {
                "vector" => vector = Some(value.to_owned()),
                "strength" => {
                    let number = value.parse().ok().filter(|number: &f32| number.is_finite());
                    let number =
                        number.ok_or_else(|| format!("strength `{value}` is no number"))?;
                    draft.strength = Some(number);
                }
                "site" => draft.site = Some(value.to_owned()),
                "kind" => draft.kind = kind(value)?,
                "positions" => draft.positions = positions(value)?,
                other => return Err(format!("`{other}`: {expected}")),
            }
        }
        let vector = vector.ok_or("needs vector=NAME, a vector that the server has loaded")?;
        draft.vector = VectorDraft::Named(vector);
        Ok(Self(draft))
    }
}

fn kind(text: &str) -> std::result::Result<InterventionKindDraft, String> {
    Ok(match text {
        "add" => InterventionKindDraft::Add,
        "project_out" => InterventionKindDraft::ProjectOut,
        "clamp_above" => InterventionKindDraft::ClampAbove,
        "clamp_below" => InterventionKindDraft::ClampBelow,
        _ => {
            return Err(format!(
                "kind `{text}`: expected add, project_out, clamp_above or clamp_below"
            ));
        }
    })
}

fn positions(text: &str) -> std::result::Result<PositionSelection, String> {
    Ok(match text {
        "last" => PositionSelection::LastPromptToken,
        "prompt" => PositionSelection::AllPrompt,
        "generated" => PositionSelection::Generated,
        "all" => PositionSelection::All,
        _ => {
            return Err(format!(
                "positions `{text}`: expected last, prompt, generated or all"
            ));
        }
    })
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    match ask(&args).await {
        Ok(exit) => Ok(exit),
        Err(Stop::Own(error)) => Err(error),
        Err(Stop::Client(error)) => told(error),
    }
}

enum Stop {
    Own(Error),
    Client(ClientError),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Own(error)
    }
}

impl From<ClientError> for Stop {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

/// What a failed call means for the caller.
fn told(error: ClientError) -> Result<Exit> {
    match error {
        ClientError::NoConnection { .. } | ClientError::Unavailable(_) => {
            Err(Error::Unavailable(error.to_string()))
        }
        ClientError::AbortedByPolicy => Err(Error::AbortedByPolicy),
        ClientError::Status { .. } | ClientError::NotUnderstood(_) => {
            note(&format!("inwit: {error}"));
            Ok(Exit::OtherStatus)
        }
    }
}

async fn ask(args: &Args) -> std::result::Result<Exit, Stop> {
    let mut answer = Client::connect(&args.address)
        .await?
        .stream(&draft(args))
        .await?;
    let live = stdout().is_terminal();
    let mut folded = Folded::default();
    while let Some(event) = answer.next().await? {
        match &event {
            Event::Delta(delta) if live => print(&delta.text)?,
            Event::Retract(retract) if live => {
                note("\n[withdrawn by the policy; instead:]");
                print(&retract.replacement_text)?;
            }
            Event::Verdict(verdict) => note(&verdict_line(verdict)),
            _ => {}
        }
        folded.take(event)?;
    }
    print(if live { "\n" } else { &folded.text })?;
    let Some(completed) = folded.completed else {
        return Err(Error::internal("the answer has no end").into());
    };
    for score in &completed.scores {
        note(&score_line(score));
    }
    note(&end_line(&completed));
    Ok(match completed.finish_reason {
        FinishReason::RefusedByPolicy => Exit::Refused,
        FinishReason::MonitorFailed => Exit::OtherStatus,
        _ => Exit::Done,
    })
}

fn draft(args: &Args) -> Draft {
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let system = args.system.iter().map(|text| message("system", text));
    let messages = system.chain([message("user", &args.text)]).collect();
    Draft {
        sampling: SamplingDraft {
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            seed: args.seed,
            ..SamplingDraft::default()
        },
        monitor: MonitorDraft {
            mode: args.mode,
            policy: args.policy.clone(),
            return_scores: args.scores,
            hold_back: None,
        },
        interventions: args.steers.iter().map(|steer| steer.0.clone()).collect(),
        ..Draft::of(PromptDraft::Chat(messages))
    }
}

fn verdict_line(verdict: &Verdict) -> String {
    let rule = match verdict.rule.as_str() {
        "" => String::new(),
        rule => format!(" by rule {rule}"),
    };
    let shadow = if verdict.shadow {
        " (shadow: not acted upon)"
    } else {
        ""
    };
    let evidence: String = verdict
        .evidence
        .iter()
        .map(|s| format!("; {}", score_text(s)))
        .collect();
    format!("[verdict: {}{rule}{shadow}{evidence}]", verdict.action)
}

fn score_line(score: &Score) -> String {
    format!("[score: {}]", score_text(score))
}

fn score_text(score: &Score) -> String {
    let name = score.detector.as_deref().unwrap_or(&score.probe);
    let probability = score.probability.map(|p| format!(", probability {p:.3}"));
    let threshold = score.threshold.map(|t| format!(", threshold {t:.3}"));
    let domain = if score.out_of_domain {
        ", out of domain"
    } else {
        ""
    };
    format!(
        "{name} logit {:.3}{}{}{domain}",
        score.logit,
        probability.unwrap_or_default(),
        threshold.unwrap_or_default()
    )
}

fn end_line(completed: &Completed) -> String {
    let action = match completed.action {
        Action::Allow => String::new(),
        action => format!(", action {action}"),
    };
    let withheld = match completed.usage.withheld_tokens {
        0 => String::new(),
        tokens => format!(", {tokens} withheld"),
    };
    format!(
        "[{}{action}: {} tokens{withheld}, {} ms]",
        finish_reason(completed.finish_reason),
        completed.usage.completion_tokens,
        completed.timings.total.as_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steer_is_read_with_its_defaults() {
        let Steer(draft) = "vector=refusal,strength=-2.5".parse().expect("parses");
        assert!(matches!(draft.vector, VectorDraft::Named(name) if name == "refusal"));
        assert_eq!(draft.strength, Some(-2.5));
        assert_eq!(draft.kind, InterventionKindDraft::Add);
        let Steer(draft) = "vector=v,kind=project_out,site=hook_embed,positions=generated"
            .parse()
            .expect("parses");
        assert_eq!(draft.kind, InterventionKindDraft::ProjectOut);
        assert_eq!(draft.site.as_deref(), Some("hook_embed"));
        assert_eq!(draft.positions, PositionSelection::Generated);
    }

    #[test]
    fn a_verdict_in_shadow_says_that_nothing_was_done() {
        let verdict = Verdict {
            action: Action::Refuse,
            rule: "harm".into(),
            shadow: true,
            evidence: Vec::new(),
        };
        let line = verdict_line(&verdict);
        assert!(
            line.contains("refuse by rule harm") && line.contains("not acted upon"),
            "{line}"
        );
    }

    #[test]
    fn failed_calls_have_their_exit_codes() {
        let gone = told(ClientError::Unavailable("draining".into())).expect_err("fails");
        assert_eq!(super::super::exit_code(&gone), 4);
        let aborted = told(ClientError::AbortedByPolicy).expect_err("fails");
        assert_eq!(super::super::exit_code(&aborted), 3);
        let other = ClientError::Status {
            code: "InvalidArgument".into(),
            message: "x".into(),
        };
        assert_eq!(told(other), Ok(Exit::OtherStatus));
    }
}
