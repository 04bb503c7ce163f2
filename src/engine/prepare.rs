//! From what a caller wrote to a checked request: tokenised, in range, every name resolved.
//! Used by the wire and by the command line alike; errors name the field as the contract spells it.

use std::sync::Arc;
use std::time::Instant;

use inwit_probes::Site;
use sha2::{Digest, Sha256};

use super::handle::Engine;
use super::request::{
    CaptureWish, Condition, Intervention, InterventionKind, Monitor, PositionSelection, Prompt,
    PromptForm, Request, Work,
};
use super::sampler::SamplingDraft;
use crate::error::{Error, Result};
use crate::hooks::INTERVENTION_LIMIT;
use crate::model::{Message, SpecialText};
use crate::policy::{MAX_HOLD_BACK, MAX_STRENGTH, Mode, Policy};
use crate::registry::Snapshot;

/// The name that turns every rule off.
pub const POLICY_OFF: &str = "off";

/// A request as its caller wrote it; unset means the default.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Unset draws one.
    pub id: Option<String>,
    /// Must name the loaded model where set.
    pub model: Option<String>,
    pub prompt: PromptDraft,
    /// A finished answer to score; only with `score_only`.
    pub answer: Option<String>,
    /// Prefill only.
    pub score_only: bool,
    pub sampling: SamplingDraft,
    pub monitor: MonitorDraft,
    pub interventions: Vec<InterventionDraft>,
    pub refusal_head: Option<String>,
    pub capture: Option<CaptureDraft>,
    pub skip_prefix_cache: bool,
    pub deadline: Option<Instant>,
}

impl Draft {
    /// A request with nothing set but its prompt.
    pub fn of(prompt: PromptDraft) -> Self {
        Self {
            id: None,
            model: None,
            prompt,
            answer: None,
            score_only: false,
            sampling: SamplingDraft::default(),
            monitor: MonitorDraft::default(),
            interventions: Vec::new(),
            refusal_head: None,
            capture: None,
            skip_prefix_cache: false,
            deadline: None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum PromptDraft {
    Chat(Vec<Message>),
    RawText(String),
    Tokens(Vec<u32>),
}

#[derive(Clone, Debug, Default)]
pub struct MonitorDraft {
    pub mode: Option<Mode>,
    pub policy: Option<String>,
    pub return_scores: bool,
    pub hold_back: Option<u32>,
}

#[derive(Clone, Debug)]
pub struct InterventionDraft {
    pub vector: VectorDraft,
    /// Unset: the named vector's own.
    pub site: Option<String>,
    pub kind: InterventionKindDraft,
    /// Coefficient of an add, bound of a clamp; must be unset for `ProjectOut`.
    pub strength: Option<f32>,
    pub positions: PositionSelection,
    pub condition: Option<ConditionDraft>,
}

#[derive(Clone, Debug)]
pub enum VectorDraft {
    Named(String),
    /// `[d_model]`
    Value(Vec<f32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterventionKindDraft {
    Add,
    ProjectOut,
    ClampAbove,
    ClampBelow,
}

#[derive(Clone, Debug)]
pub struct ConditionDraft {
    /// A probe, or a detector of the request's policy.
    pub detector: String,
    pub above: f32,
}

#[derive(Clone, Debug)]
pub struct CaptureDraft {
    pub sites: Vec<String>,
    pub positions: PositionSelection,
}

/// What holds for a request that says nothing.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub mode: Mode,
    /// Unset: the snapshot's default policy; `off`: none.
    pub policy: Option<String>,
    /// Answer tokens where the caller sets no limit.
    pub max_tokens: u32,
    /// Whether a caller may leave an enforced policy: choose another, a weaker mode, or none.
    pub overrides: bool,
}

impl Defaults {
    /// Whether no caller may leave the policy.
    fn binds(&self) -> bool {
        self.mode == Mode::Enforce && !self.overrides
    }
}

/// # Errors
/// Whatever the caller must change, under the field's name in the contract (`input.…`).
pub fn prepare(
    draft: Draft,
    engine: &Engine,
    snapshot: &Arc<Snapshot>,
    defaults: &Defaults,
) -> Result<Request> {
    check_model(draft.model.as_deref(), engine)?;
    let prompt = prompt(draft.prompt, engine)?;
    let work = work(draft.score_only, draft.answer, engine)?;
    let mut sampling_draft = draft.sampling;
    // A seed is drawn here, once, so that the record of the request can repeat it.
    sampling_draft.seed = sampling_draft.seed.or_else(|| Some(fresh_seed()));
    let mut sampling = sampling_draft.check("input.sampling", engine.info().config.vocab_size)?;
    sampling.max_tokens = Some(fit(&prompt, &work, sampling.max_tokens, engine, defaults)?);
    let monitor = monitor(draft.monitor, snapshot, defaults)?;
    if defaults.binds() && !draft.interventions.is_empty() {
        return Err(Error::FailedPrecondition {
            subject: "input.interventions".into(),
            message: "the server enforces its policy, and a steered state could hide from it; \
                      leave this unset, or have the server run with --overrides allow"
                .into(),
        });
    }
    if draft.interventions.len() > INTERVENTION_LIMIT {
        return Err(Error::invalid(
            "input.interventions",
            format!(
                "at most {INTERVENTION_LIMIT} per request; got {}",
                draft.interventions.len()
            ),
        ));
    }
    let interventions = draft
        .interventions
        .into_iter()
        .enumerate()
        .map(|(index, draft)| intervention(draft, index, engine, &monitor))
        .collect::<Result<_>>()?;
    let refusal_head = draft
        .refusal_head
        .map(|name| named(&snapshot.heads, "refusal head", "input.refusal_head", &name))
        .transpose()?;
    let capture = draft
        .capture
        .map(|draft| capture(draft, engine, &work))
        .transpose()?;
    Ok(Request {
        id: draft.id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        prompt,
        work,
        sampling,
        monitor,
        interventions,
        capture,
        refusal_head,
        use_prefix_cache: !draft.skip_prefix_cache,
        deadline: draft.deadline,
    })
}

fn check_model(name: Option<&str>, engine: &Engine) -> Result<()> {
    let loaded = &engine.info().name;
    match name {
        Some(name) if !name.is_empty() && !name.eq_ignore_ascii_case(loaded) => {
            Err(Error::NotFound {
                field: "input.model".into(),
                kind: "model",
                name: clipped(name),
                remedy: format!("this server holds `{loaded}`"),
            })
        }
        _ => Ok(()),
    }
}

fn prompt(draft: PromptDraft, engine: &Engine) -> Result<Prompt> {
    match draft {
        PromptDraft::Chat(messages) => chat(&messages, engine),
        PromptDraft::RawText(text) => {
            if text.is_empty() {
                return Err(Error::invalid("input.raw_text", "is empty; write a prompt"));
            }
            let tokenizer = engine.tokenizer();
            let mut tokens = Vec::new();
            if tokenizer.add_bos() {
                tokens.extend(tokenizer.bos());
            }
            tokens.extend(at(
                "input.raw_text",
                tokenizer.encode(&text, SpecialText::AsText),
            )?);
            plain(tokens, PromptForm::RawText, "input.raw_text")
        }
        PromptDraft::Tokens(tokens) => {
            let vocab = engine.info().config.vocab_size;
            if let Some(index) = tokens.iter().position(|token| *token as usize >= vocab) {
                return Err(Error::invalid(
                    format!("input.tokens.token_ids[{index}]"),
                    format!("must be below {vocab}; got {}", tokens[index]),
                ));
            }
            plain(tokens, PromptForm::Tokens, "input.tokens.token_ids")
        }
    }
}

fn plain(tokens: Vec<u32>, form: PromptForm, field: &str) -> Result<Prompt> {
    if tokens.is_empty() {
        return Err(Error::invalid(field, "is empty; give at least one token"));
    }
    Ok(Prompt {
        content: 0..tokens.len(),
        tokens,
        form,
    })
}

fn chat(messages: &[Message], engine: &Engine) -> Result<Prompt> {
    let template = engine.template().ok_or_else(|| Error::FailedPrecondition {
        subject: "input.chat".into(),
        message: "the model has no chat template; send raw_text or tokens".into(),
    })?;
    let rendered = template.render(messages, engine.tokenizer())?;
    let mut of_system = messages.iter().filter(|m| m.role == "system").peekable();
    let system_prompt = of_system.peek().is_some().then(|| {
        // Of one message, its text's hash; a second one makes it another's.
        let all: Vec<&str> = of_system.map(|message| message.content.as_str()).collect();
        hex::encode(Sha256::digest(all.join("\0")))
    });
    let user_turns = messages.iter().filter(|m| m.role == "user").count();
    Ok(Prompt {
        form: PromptForm::Chat {
            template_hash: template.hash(),
            system_prompt,
            user_turns: user_turns as u32,
            prefilled_answer: messages.last().is_some_and(|m| m.role == "assistant"),
        },
        content: rendered.content,
        tokens: rendered.tokens,
    })
}

fn work(score_only: bool, answer: Option<String>, engine: &Engine) -> Result<Work> {
    match (score_only, answer) {
        (false, None) => Ok(Work::Generate),
        (false, Some(_)) => Err(Error::invalid("answer", "only a Score takes one")),
        (true, None) => Ok(Work::Score { answer: Vec::new() }),
        (true, Some(text)) => {
            let encoded = engine.tokenizer().encode(&text, SpecialText::AsText);
            let answer = at("answer", encoded)?;
            if answer.is_empty() {
                return Err(Error::invalid("answer", "is empty; leave it unset"));
            }
            Ok(Work::Score { answer })
        }
    }
}

/// The answer's limit: what the caller set, if it fits, else the default shrunk to what fits.
fn fit(
    prompt: &Prompt,
    work: &Work,
    asked: Option<u32>,
    engine: &Engine,
    defaults: &Defaults,
) -> Result<u32> {
    let limit = engine.info().context_length;
    let length = prompt.tokens.len();
    let too_long = |field: &str, got: usize, remedy: &str| Error::ContextLength {
        field: field.into(),
        got,
        limit,
        remedy: remedy.into(),
    };
    if let Work::Score { answer } = work {
        if length + answer.len() > limit {
            let remedy = "shorten the prompt or the answer";
            return Err(too_long("input", length + answer.len(), remedy));
        }
        return Ok(1);
    }
    if length + 1 > limit {
        return Err(too_long("input", length + 1, "shorten the prompt"));
    }
    match asked {
        Some(tokens) if length + tokens as usize > limit => Err(too_long(
            "input.sampling.max_tokens",
            length + tokens as usize,
            "shorten the prompt, or lower max_tokens or leave it unset",
        )),
        Some(tokens) => Ok(tokens),
        None => Ok(defaults.max_tokens.min((limit - length) as u32)),
    }
}

fn monitor(draft: MonitorDraft, snapshot: &Arc<Snapshot>, defaults: &Defaults) -> Result<Monitor> {
    let mode = draft.mode.unwrap_or(defaults.mode);
    if defaults.binds() && (mode != Mode::Enforce || draft.policy.is_some()) {
        let field = if mode == Mode::Enforce {
            "policy"
        } else {
            "mode"
        };
        return Err(Error::FailedPrecondition {
            subject: format!("input.monitor.{field}"),
            message: "the server enforces its policy and lets no caller leave it; leave this unset"
                .into(),
        });
    }
    if mode == Mode::Off && (draft.return_scores || draft.policy.is_some()) {
        let field = if draft.return_scores {
            "return_scores"
        } else {
            "policy"
        };
        return Err(Error::invalid(
            format!("input.monitor.{field}"),
            "has no effect with mode OFF; leave it unset or choose another mode",
        ));
    }
    let hold_back = draft.hold_back.unwrap_or(0);
    if hold_back > MAX_HOLD_BACK {
        return Err(Error::invalid(
            "input.monitor.hold_back",
            format!("must be at most {MAX_HOLD_BACK}; got {hold_back}"),
        ));
    }
    let policy = match draft.policy.as_deref().or(defaults.policy.as_deref()) {
        Some(POLICY_OFF) => Arc::new(Policy::empty()),
        name => Arc::clone(snapshot.policy(name).map_err(under_input)?),
    };
    if mode == Mode::Enforce {
        snapshot.may_enforce(&policy)?;
    }
    Ok(Monitor {
        mode,
        snapshot: Arc::clone(snapshot),
        policy,
        return_scores: draft.return_scores,
        hold_back,
    })
}

fn under_input(error: Error) -> Error {
    match error {
        Error::NotFound {
            kind, name, remedy, ..
        } => Error::NotFound {
            field: "input.monitor.policy".into(),
            kind,
            name,
            remedy,
        },
        error => error,
    }
}

fn intervention(
    draft: InterventionDraft,
    index: usize,
    engine: &Engine,
    monitor: &Monitor,
) -> Result<Intervention> {
    let field = |part: &str| format!("input.interventions[{index}].{part}");
    let (name, values, own_site) = match draft.vector {
        VectorDraft::Named(name) => {
            let vectors = &monitor.snapshot.vectors;
            let vector = named(vectors, "vector", &field("name"), &name)?;
            (name, vector.values.to_vec(), Some(vector.site))
        }
        VectorDraft::Value(values) => ("inline".to_owned(), values, None),
    };
    check_vector(&values, &field("value"), engine.info().config.d_model)?;
    let site = match (&draft.site, own_site) {
        (Some(site), _) => parse_site(site, &field("site"), engine)?,
        (None, Some(site)) => site,
        (None, None) => {
            let message = "is needed with a vector given by value; e.g. blocks.7.hook_resid_post";
            return Err(Error::invalid(field("site"), message));
        }
    };
    let kind = intervention_kind(draft.kind, draft.strength, &field("strength"))?;
    let Some(vector) = kind.prepare(&values) else {
        let message = "is all zero, so it has no direction; only an ADD can take it";
        return Err(Error::invalid(field("value"), message));
    };
    let condition = draft
        .condition
        .map(|condition| resolve_condition(&condition, site, &field("condition"), engine, monitor))
        .transpose()?;
    Ok(Intervention {
        name,
        site,
        kind,
        vector,
        positions: draft.positions,
        condition,
    })
}

fn check_vector(values: &[f32], field: &str, d_model: usize) -> Result<()> {
    if values.len() != d_model {
        return Err(Error::invalid(
            field,
            format!(
                "must have the model's {d_model} values; got {}",
                values.len()
            ),
        ));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(Error::invalid(field, format!("value {at} is not finite"))),
        None => Ok(()),
    }
}

fn intervention_kind(
    kind: InterventionKindDraft,
    strength: Option<f32>,
    field: &str,
) -> Result<InterventionKind> {
    let number = |what: &str| match strength {
        Some(strength) if strength.is_finite() && strength.abs() <= MAX_STRENGTH => Ok(strength),
        Some(_) => Err(Error::invalid(
            field,
            format!("must be a number from -{MAX_STRENGTH} to {MAX_STRENGTH}"),
        )),
        None => Err(Error::invalid(field, format!("is needed: {what}"))),
    };
    match kind {
        InterventionKindDraft::Add => Ok(InterventionKind::Add {
            strength: number("the coefficient of the vector")?,
        }),
        InterventionKindDraft::ClampAbove => Ok(InterventionKind::ClampAbove {
            bound: number("the bound of the clamp")?,
        }),
        InterventionKindDraft::ClampBelow => Ok(InterventionKind::ClampBelow {
            bound: number("the bound of the clamp")?,
        }),
        InterventionKindDraft::ProjectOut if strength.is_some() => Err(Error::invalid(
            field,
            "has no meaning for PROJECT_OUT; leave it unset",
        )),
        InterventionKindDraft::ProjectOut => Ok(InterventionKind::ProjectOut),
    }
}

fn resolve_condition(
    draft: &ConditionDraft,
    site: Site,
    field: &str,
    engine: &Engine,
    monitor: &Monitor,
) -> Result<Condition> {
    if !draft.above.is_finite() {
        return Err(Error::invalid(format!("{field}.above"), "must be finite"));
    }
    let probes = &monitor.snapshot.probes;
    let detectors = &monitor.policy.detectors;
    let by_detector = detectors.iter().find(|d| *d.name == *draft.detector);
    let probe = by_detector
        .map(|detector| detector.probe)
        .or_else(|| probes.iter().position(|p| *p.name == *draft.detector))
        .ok_or_else(|| Error::NotFound {
            field: format!("{field}.detector"),
            kind: "detector or probe",
            name: clipped(&draft.detector),
            remedy: "ListProbes names those that are loaded".into(),
        })?;
    let layers = engine.info().config.n_layers;
    let heads = probes[probe].probe.heads();
    if let Some(late) = heads
        .iter()
        .find(|head| head.site.index(layers) >= site.index(layers))
    {
        return Err(Error::invalid(
            format!("{field}.detector"),
            format!(
                "reads `{}`, which the pass reaches no earlier than `{site}`; steer at a later site",
                late.site
            ),
        ));
    }
    Ok(Condition {
        probe,
        above: draft.above,
    })
}

fn capture(draft: CaptureDraft, engine: &Engine, work: &Work) -> Result<CaptureWish> {
    if draft.sites.is_empty() {
        let message = "is empty; name at least one, e.g. blocks.7.hook_resid_post";
        return Err(Error::invalid("sites", message));
    }
    let nothing_generated = *work == Work::Score { answer: Vec::new() };
    if nothing_generated && draft.positions == PositionSelection::Generated {
        let message = "GENERATED selects nothing where nothing is generated";
        return Err(Error::invalid("positions", message));
    }
    let mut sites: Vec<Site> = Vec::new();
    for (index, name) in draft.sites.iter().enumerate() {
        let field = format!("sites[{index}]");
        let site = parse_site(name, &field, engine)?;
        if sites.contains(&site) {
            return Err(Error::invalid(field, "is named twice"));
        }
        sites.push(site);
    }
    Ok(CaptureWish {
        sites,
        positions: draft.positions,
    })
}

fn parse_site(name: &str, field: &str, engine: &Engine) -> Result<Site> {
    let site: Site = name
        .parse()
        .map_err(|error: inwit_probes::Error| Error::invalid(field, error.to_string()))?;
    site.check(engine.info().config.n_layers)
        .map_err(|error| Error::invalid(field, error.to_string()))?;
    Ok(site)
}

fn named<T>(
    all: &std::collections::BTreeMap<String, Arc<T>>,
    kind: &'static str,
    field: &str,
    name: &str,
) -> Result<Arc<T>> {
    all.get(name).cloned().ok_or_else(|| Error::NotFound {
        field: field.to_owned(),
        kind,
        name: clipped(name),
        remedy: match all.is_empty() {
            true => "none is loaded".into(),
            false => format!(
                "there is {}",
                all.keys().cloned().collect::<Vec<_>>().join(", ")
            ),
        },
    })
}

fn at<T>(field: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| match error {
        Error::InvalidRequest { message, .. } => Error::invalid(field, message),
        error => error,
    })
}

/// Names come from outside: never long, and never prompt text.
fn clipped(name: &str) -> String {
    name.chars().take(64).collect()
}

fn fresh_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(result: Result<InterventionKind>) -> String {
        result.expect_err("is refused").to_string()
    }

    #[test]
    fn a_strength_that_would_be_ignored_is_refused() {
        let kind = intervention_kind(InterventionKindDraft::ProjectOut, Some(1.0), "s");
        assert_eq!(
            message(kind),
            "s: has no meaning for PROJECT_OUT; leave it unset"
        );
        assert!(intervention_kind(InterventionKindDraft::ProjectOut, None, "s").is_ok());
    }

    #[test]
    fn a_strength_must_be_given_finite_and_sane() {
        for strength in [None, Some(f32::NAN), Some(f32::INFINITY), Some(1e30)] {
            assert!(intervention_kind(InterventionKindDraft::Add, strength, "s").is_err());
        }
    }

    #[test]
    fn a_vector_of_another_width_or_with_holes_is_refused() {
        assert!(check_vector(&[1.0, 2.0], "v", 3).is_err());
        assert!(check_vector(&[1.0, f32::NAN, 2.0], "v", 3).is_err());
        assert!(check_vector(&[1.0, 0.0, 2.0], "v", 3).is_ok());
    }
}
