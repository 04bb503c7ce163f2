//! What callers send, as the engine's drafts: parsed once, every error with its path in the request.
//! Knows the wire, not the model: names, ranges and lengths are `prepare`'s to check.

use uuid::Uuid;

use super::proto::{self, generation_input, intervention};
use super::tensor::{self, Dtype, unknown_number};
use crate::engine::prepare::{
    CaptureDraft, ConditionDraft, Draft, InterventionDraft, InterventionKindDraft, MonitorDraft,
    PromptDraft, VectorDraft,
};
use crate::engine::request::PositionSelection;
use crate::engine::sampler::SamplingDraft;
use crate::error::{Error, Result};
use crate::model::Message;
use crate::policy::Mode;

const MAX_MESSAGES: usize = 1024;
const MAX_INTERVENTIONS: usize = 64;
const MAX_SITES: usize = 256;
const DEFAULT_CAPTURE_BYTES: u64 = 64 << 20;
const MAX_CAPTURE_BYTES: u64 = 1 << 30;

/// The id that a request asks for; empty when it asks for none.
pub(super) fn request_id(input: &Option<proto::GenerationInput>) -> &str {
    input.as_ref().map_or("", |input| &input.request_id)
}

/// A request for an answer.
pub(super) fn generation(input: Option<proto::GenerationInput>) -> Result<Draft> {
    let input = set(input)?;
    let sampling = sampling(input.sampling.clone().unwrap_or_default());
    draft(input, sampling)
}

/// A request for the scores of a prompt, or of a prompt with its answer.
pub(super) fn score(request: proto::ScoreRequest) -> Result<Draft> {
    let input = set(request.input)?;
    refuse_sampling(&input, "nothing is sampled")?;
    Ok(Draft {
        answer: answer(request.answer)?,
        score_only: true,
        ..draft(input, SamplingDraft::default())?
    })
}

/// How a capture is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shipping {
    pub(super) dtype: Dtype,
    pub(super) max_bytes: u64,
}

/// A request for hidden states.
pub(super) fn capture(request: proto::CaptureActivationsRequest) -> Result<(Draft, Shipping)> {
    let shipping = Shipping {
        dtype: Dtype::parse("dtype", request.dtype)?.unwrap_or(Dtype::Bf16),
        max_bytes: max_bytes(request.max_bytes)?,
    };
    let positions =
        positions("positions", request.positions)?.unwrap_or(PositionSelection::LastPromptToken);
    let sites = sites(request.sites)?;
    let input = set(request.input)?;
    let answer = answer(request.answer)?;
    if answer.is_some() {
        refuse_sampling(&input, "`answer` stands in place of a generated one")?;
    }
    let of_prompt = matches!(
        positions,
        PositionSelection::LastPromptToken | PositionSelection::AllPrompt
    );
    let asks_for_tokens = input
        .sampling
        .as_ref()
        .is_some_and(|sampling| sampling.max_tokens.is_some());
    let sampling = sampling(input.sampling.clone().unwrap_or_default());
    let draft = Draft {
        score_only: answer.is_some() || (of_prompt && !asks_for_tokens),
        answer,
        capture: Some(CaptureDraft { sites, positions }),
        ..draft(input, sampling)?
    };
    Ok((draft, shipping))
}

fn set(input: Option<proto::GenerationInput>) -> Result<proto::GenerationInput> {
    input.ok_or_else(|| Error::invalid("input", "must be set"))
}

fn draft(input: proto::GenerationInput, sampling: SamplingDraft) -> Result<Draft> {
    if input.interventions.len() > MAX_INTERVENTIONS {
        return Err(too_many(
            "input.interventions",
            MAX_INTERVENTIONS,
            input.interventions.len(),
        ));
    }
    let interventions = input
        .interventions
        .into_iter()
        .enumerate()
        .map(|(i, one)| intervention(&format!("input.interventions[{i}]"), one))
        .collect::<Result<_>>()?;
    Ok(Draft {
        id: None,
        prompt: prompt(input.prompt)?,
        answer: None,
        score_only: false,
        sampling,
        monitor: monitor(input.monitor.unwrap_or_default())?,
        interventions,
        refusal_head: unless_empty(input.refusal_head),
        capture: None,
        skip_prefix_cache: input.skip_prefix_cache,
        deadline: None,
        model: unless_empty(input.model),
    })
}

fn prompt(prompt: Option<generation_input::Prompt>) -> Result<PromptDraft> {
    use generation_input::Prompt;
    match prompt {
        None => Err(Error::invalid(
            "input.prompt",
            "one of `chat`, `raw_text` and `tokens` must be set",
        )),
        Some(Prompt::Chat(chat)) => messages(chat.messages).map(PromptDraft::Chat),
        Some(Prompt::RawText(text)) => {
            refuse_empty("input.raw_text", text.is_empty())?;
            Ok(PromptDraft::RawText(text))
        }
        Some(Prompt::Tokens(tokens)) => {
            refuse_empty("input.tokens.token_ids", tokens.token_ids.is_empty())?;
            Ok(PromptDraft::Tokens(tokens.token_ids))
        }
    }
}

fn messages(messages: Vec<proto::ChatMessage>) -> Result<Vec<Message>> {
    const FIELD: &str = "input.chat.messages";
    refuse_empty(FIELD, messages.is_empty())?;
    if messages.len() > MAX_MESSAGES {
        return Err(too_many(FIELD, MAX_MESSAGES, messages.len()));
    }
    for (i, message) in messages.iter().enumerate() {
        // Not repeated in the error: a caller may have put text here.
        if !["system", "user", "assistant"].contains(&message.role.as_str()) {
            return Err(Error::invalid(
                format!("{FIELD}[{i}].role"),
                "must be `system`, `user` or `assistant`",
            ));
        }
    }
    let message = |proto::ChatMessage { role, content }| Message { role, content };
    Ok(messages.into_iter().map(message).collect())
}

/// An unset seed is drawn here, so that what is recorded can be repeated.
fn sampling(options: proto::SamplingOptions) -> SamplingDraft {
    SamplingDraft {
        max_tokens: options.max_tokens,
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        seed: options
            .seed
            .or_else(|| Some(Uuid::new_v4().as_u64_pair().1)),
        stop: options.stop,
        stop_token_ids: options.stop_token_ids,
        logprobs: options.logprobs,
        n: options.n,
        logit_bias: options.logit_bias.into_iter().collect(),
    }
}

fn monitor(options: proto::MonitorOptions) -> Result<MonitorDraft> {
    const FIELD: &str = "input.monitor.mode";
    let mode = match proto::MonitorMode::try_from(options.mode) {
        Ok(proto::MonitorMode::Unspecified) => None,
        Ok(proto::MonitorMode::Enforce) => Some(Mode::Enforce),
        Ok(proto::MonitorMode::Shadow) => Some(Mode::Shadow),
        Ok(proto::MonitorMode::Off) => Some(Mode::Off),
        Err(_) => return Err(unknown_number(FIELD, options.mode)),
    };
    Ok(MonitorDraft {
        mode,
        policy: unless_empty(options.policy),
        return_scores: options.return_scores,
        hold_back: options.hold_back,
    })
}

fn intervention(field: &str, wire: proto::Intervention) -> Result<InterventionDraft> {
    let vector = match wire.vector {
        None => {
            return Err(Error::invalid(
                format!("{field}.vector"),
                "one of `name` and `value` must be set",
            ));
        }
        Some(intervention::Vector::Name(name)) => {
            refuse_empty(&format!("{field}.name"), name.is_empty())?;
            VectorDraft::Named(name)
        }
        Some(intervention::Vector::Value(value)) => {
            VectorDraft::Value(tensor::vector(&format!("{field}.value"), &value)?)
        }
    };
    let site = unless_empty(wire.site);
    if site.is_none() && matches!(vector, VectorDraft::Value(_)) {
        return Err(Error::invalid(
            format!("{field}.site"),
            "must be set with `value`; only a loaded vector has a site of its own",
        ));
    }
    let kind = kind(&format!("{field}.kind"), wire.kind)?;
    check_strength(&format!("{field}.strength"), kind, wire.strength)?;
    Ok(InterventionDraft {
        vector,
        site,
        kind,
        strength: wire.strength,
        positions: positions(&format!("{field}.positions"), wire.positions)?
            .unwrap_or(PositionSelection::All),
        condition: wire
            .condition
            .map(|one| condition(&format!("{field}.condition"), one))
            .transpose()?,
    })
}

fn kind(field: &str, number: i32) -> Result<InterventionKindDraft> {
    match proto::InterventionKind::try_from(number) {
        Ok(proto::InterventionKind::Add) => Ok(InterventionKindDraft::Add),
        Ok(proto::InterventionKind::ProjectOut) => Ok(InterventionKindDraft::ProjectOut),
        Ok(proto::InterventionKind::ClampAbove) => Ok(InterventionKindDraft::ClampAbove),
        Ok(proto::InterventionKind::ClampBelow) => Ok(InterventionKindDraft::ClampBelow),
        Ok(proto::InterventionKind::Unspecified) => Err(Error::invalid(field, "must be set")),
        Err(_) => Err(unknown_number(field, number)),
    }
}

fn check_strength(field: &str, kind: InterventionKindDraft, strength: Option<f32>) -> Result<()> {
    use InterventionKindDraft as Kind;
    match (kind, strength) {
        (_, Some(strength)) if !strength.is_finite() => {
            Err(Error::invalid(field, "must be a finite number"))
        }
        (Kind::ProjectOut, Some(_)) => Err(Error::invalid(
            field,
            "must not be set with PROJECT_OUT, which has none",
        )),
        (Kind::ClampAbove | Kind::ClampBelow, None) => Err(Error::invalid(
            field,
            "must be set: it is the clamp's bound",
        )),
        _ => Ok(()),
    }
}

fn condition(field: &str, wire: proto::Condition) -> Result<ConditionDraft> {
    refuse_empty(&format!("{field}.detector"), wire.detector.is_empty())?;
    if !wire.above.is_finite() {
        return Err(Error::invalid(
            format!("{field}.above"),
            "must be a finite number",
        ));
    }
    Ok(ConditionDraft {
        detector: wire.detector,
        above: wire.above,
    })
}

fn positions(field: &str, number: i32) -> Result<Option<PositionSelection>> {
    match proto::PositionSelection::try_from(number) {
        Ok(proto::PositionSelection::Unspecified) => Ok(None),
        Ok(proto::PositionSelection::LastPromptToken) => {
            Ok(Some(PositionSelection::LastPromptToken))
        }
        Ok(proto::PositionSelection::AllPrompt) => Ok(Some(PositionSelection::AllPrompt)),
        Ok(proto::PositionSelection::Generated) => Ok(Some(PositionSelection::Generated)),
        Ok(proto::PositionSelection::All) => Ok(Some(PositionSelection::All)),
        Ok(proto::PositionSelection::FromLastPromptToken) => {
            Ok(Some(PositionSelection::FromLastPromptToken))
        }
        Err(_) => Err(unknown_number(field, number)),
    }
}

fn sites(sites: Vec<String>) -> Result<Vec<String>> {
    refuse_empty("sites", sites.is_empty())?;
    if sites.len() > MAX_SITES {
        return Err(too_many("sites", MAX_SITES, sites.len()));
    }
    for (i, site) in sites.iter().enumerate() {
        if sites[..i].contains(site) {
            return Err(Error::invalid(format!("sites[{i}]"), "is named twice"));
        }
    }
    Ok(sites)
}

fn max_bytes(asked: u64) -> Result<u64> {
    match asked {
        0 => Ok(DEFAULT_CAPTURE_BYTES),
        asked if asked > MAX_CAPTURE_BYTES => Err(Error::invalid(
            "max_bytes",
            format!("must be at most {MAX_CAPTURE_BYTES}; ask in several calls"),
        )),
        asked => Ok(asked),
    }
}

fn answer(answer: Option<String>) -> Result<Option<String>> {
    if answer.as_ref().is_some_and(String::is_empty) {
        return Err(Error::invalid(
            "answer",
            "must not be empty; leave it unset to read the prompt alone",
        ));
    }
    Ok(answer)
}

fn refuse_sampling(input: &proto::GenerationInput, why: &str) -> Result<()> {
    match input.sampling {
        Some(_) => Err(Error::invalid(
            "input.sampling",
            format!("must not be set: {why}"),
        )),
        None => Ok(()),
    }
}

fn refuse_empty(field: &str, empty: bool) -> Result<()> {
    match empty {
        true => Err(Error::invalid(field, "must not be empty")),
        false => Ok(()),
    }
}

fn too_many(field: &str, limit: usize, got: usize) -> Error {
    Error::invalid(field, format!("must be at most {limit}; got {got}"))
}

fn unless_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message as _;

    use super::*;
    use proto::generation_input::Prompt;
    use proto::intervention::Vector;

    fn input() -> proto::GenerationInput {
        proto::GenerationInput {
            prompt: Some(Prompt::RawText("Once".into())),
            ..Default::default()
        }
    }

    fn chat(turns: &[(&str, &str)]) -> Prompt {
        let messages = turns
            .iter()
            .map(|&(role, content)| proto::ChatMessage {
                role: role.into(),
                content: content.into(),
            })
            .collect();
        Prompt::Chat(proto::ChatPrompt { messages })
    }

    fn steering() -> proto::Intervention {
        proto::Intervention {
            vector: Some(Vector::Name("refusal".into())),
            kind: proto::InterventionKind::Add.into(),
            ..Default::default()
        }
    }

    fn value(values: &[f32]) -> proto::Tensor {
        proto::Tensor {
            shape: vec![values.len() as i64],
            ..tensor::rows(values, values.len(), Dtype::F32)
        }
    }

    /// The field that the error names, and whether it is one of support.
    fn refused<T>(result: Result<T>) -> (String, bool) {
        match result.err().expect("refused") {
            Error::InvalidRequest { field, message } => {
                assert!(!message.is_empty());
                (field, false)
            }
            Error::Unsupported { field, .. } => (field, true),
            other => panic!("{other:?}"),
        }
    }

    fn check_input(field: &str, change: impl FnOnce(&mut proto::GenerationInput)) {
        let mut input = input();
        change(&mut input);
        assert_eq!(refused(generation(Some(input))), (field.into(), false));
    }

    fn check_intervention(field: &str, change: impl FnOnce(&mut proto::Intervention)) {
        let mut second = steering();
        change(&mut second);
        check_input(&format!("input.interventions[1]{field}"), |input| {
            input.interventions = vec![steering(), second];
        });
    }

    #[test]
    fn an_input_or_prompt_that_is_not_there_is_refused() {
        assert_eq!(refused(generation(None)), ("input".into(), false));
        check_input("input.prompt", |input| input.prompt = None);
        check_input("input.raw_text", |input| {
            input.prompt = Some(Prompt::RawText(String::new()));
        });
        check_input("input.tokens.token_ids", |input| {
            input.prompt = Some(Prompt::Tokens(proto::TokenPrompt::default()));
        });
        check_input("input.chat.messages", |input| {
            input.prompt = Some(chat(&[]));
        });
    }

    #[test]
    fn of_several_prompts_on_the_wire_the_last_counts() {
        let mut bytes = proto::GenerationInput {
            prompt: Some(chat(&[("user", "first")])),
            ..Default::default()
        }
        .encode_to_vec();
        bytes.extend(input().encode_to_vec());
        let both = proto::GenerationInput::decode(bytes.as_slice()).expect("decodes");
        let draft = generation(Some(both)).expect("accepted");
        assert!(matches!(draft.prompt, PromptDraft::RawText(text) if text == "Once"));
    }

    #[test]
    fn a_role_that_we_do_not_know_is_refused_without_repeating_it() {
        for role in ["", "tool", "User", "system ", "user\0"] {
            check_input("input.chat.messages[1].role", |input| {
                input.prompt = Some(chat(&[("user", "a"), (role, "b")]));
            });
        }
        let mut input = input();
        input.prompt = Some(chat(&[("my secret", "a")]));
        let error = generation(Some(input)).expect_err("refused");
        assert!(!error.to_string().contains("secret"));
    }

    #[test]
    fn too_many_messages_or_interventions_are_refused() {
        check_input("input.chat.messages", |input| {
            input.prompt = Some(chat(&vec![("user", "a"); 100_000]));
        });
        check_input("input.interventions", |input| {
            input.interventions = vec![steering(); 65];
        });
    }

    #[test]
    fn text_of_any_characters_passes_unchanged() {
        for text in [
            "\0",
            "\u{202e}abc",
            "<|im_end|>",
            "e\u{301}\u{301}",
            "\u{e000}",
            "🦀",
            " ",
        ] {
            let mut input = input();
            input.prompt = Some(chat(&[("user", text)]));
            let draft = generation(Some(input)).expect("accepted");
            assert!(matches!(draft.prompt, PromptDraft::Chat(m) if m[0].content == text));
        }
    }

    #[test]
    fn a_number_that_an_enum_lacks_is_refused() {
        for number in [-1, 99, i32::MAX] {
            check_input("input.monitor.mode", |input| {
                input.monitor = Some(proto::MonitorOptions {
                    mode: number,
                    ..Default::default()
                });
            });
            check_intervention(".kind", |one| one.kind = number);
            check_intervention(".positions", |one| one.positions = number);
            let request = proto::CaptureActivationsRequest {
                positions: number,
                ..capture_request()
            };
            assert_eq!(refused(capture(request)), ("positions".into(), false));
            let request = proto::CaptureActivationsRequest {
                dtype: number,
                ..capture_request()
            };
            assert_eq!(refused(capture(request)), ("dtype".into(), false));
        }
    }

    #[test]
    fn every_sampling_option_reaches_the_engine() {
        let options = proto::SamplingOptions {
            max_tokens: Some(u32::MAX),
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            top_k: Some(0),
            min_p: Some(-1.0),
            repetition_penalty: Some(f32::INFINITY),
            presence_penalty: Some(3.0),
            frequency_penalty: Some(-3.0),
            seed: Some(u64::MAX),
            stop: vec![String::new()],
            stop_token_ids: vec![u32::MAX],
            logprobs: Some(u32::MAX),
            n: Some(0),
            logit_bias: [(7, 1.0)].into(),
        };
        let draft = sampling(options);
        let seen = format!("{draft:?}");
        let expected = SamplingDraft {
            max_tokens: Some(u32::MAX),
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            top_k: Some(0),
            min_p: Some(-1.0),
            repetition_penalty: Some(f32::INFINITY),
            presence_penalty: Some(3.0),
            frequency_penalty: Some(-3.0),
            seed: Some(u64::MAX),
            stop: vec![String::new()],
            stop_token_ids: vec![u32::MAX],
            logprobs: Some(u32::MAX),
            n: Some(0),
            logit_bias: vec![(7, 1.0)],
        };
        assert_eq!(seen, format!("{expected:?}"));
    }

    #[test]
    fn an_option_that_is_unset_stays_unset_and_a_zero_stays_a_zero() {
        let unset = sampling(proto::SamplingOptions::default());
        assert!(unset.seed.is_some());
        assert_eq!(
            SamplingDraft {
                seed: None,
                ..unset
            },
            SamplingDraft::default()
        );
        let zero = sampling(proto::SamplingOptions {
            temperature: Some(0.0),
            seed: Some(0),
            logprobs: Some(0),
            ..Default::default()
        });
        assert_eq!(
            (zero.temperature, zero.seed, zero.logprobs),
            (Some(0.0), Some(0), Some(0))
        );
    }

    #[test]
    fn an_intervention_that_could_be_skipped_is_refused() {
        check_intervention(".vector", |one| one.vector = None);
        check_intervention(".name", |one| {
            one.vector = Some(Vector::Name(String::new()))
        });
        check_intervention(".kind", |one| one.kind = 0);
        check_intervention(".site", |one| {
            one.vector = Some(Vector::Value(value(&[1.0])))
        });
        check_intervention(".strength", |one| {
            one.kind = proto::InterventionKind::ProjectOut.into();
            one.strength = Some(1.0);
        });
        for kind in [
            proto::InterventionKind::ClampAbove,
            proto::InterventionKind::ClampBelow,
        ] {
            check_intervention(".strength", |one| one.kind = kind.into());
        }
        for strength in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            check_intervention(".strength", |one| one.strength = Some(strength));
        }
        let condition = |detector: &str, above| {
            Some(proto::Condition {
                detector: detector.into(),
                above,
            })
        };
        check_intervention(".condition.detector", |one| {
            one.condition = condition("", 0.0)
        });
        check_intervention(".condition.above", |one| {
            one.condition = condition("prompt_harm", f32::NAN);
        });
    }

    #[test]
    fn a_vector_by_value_is_checked_as_a_tensor() {
        check_intervention(".value.data", |one| {
            one.vector = Some(Vector::Value(value(&[f32::NAN])));
        });
        check_intervention(".value.data", |one| {
            let mut value = value(&[1.0, 2.0]);
            value.data = Bytes::from_static(&[0; 7]);
            value.crc32c = None;
            one.vector = Some(Vector::Value(value));
        });
        check_intervention(".value.crc32c", |one| {
            let mut value = value(&[1.0]);
            value.crc32c = Some(0);
            one.vector = Some(Vector::Value(value));
        });
    }

    #[test]
    fn an_intervention_keeps_what_it_says() {
        let mut wire = steering();
        wire.vector = Some(Vector::Value(value(&[1.0, -2.0])));
        wire.site = "blocks.3.hook_resid_post".into();
        wire.kind = proto::InterventionKind::ClampBelow.into();
        wire.strength = Some(0.0);
        wire.positions = proto::PositionSelection::Generated.into();
        let draft = intervention("i", wire).expect("accepted");
        assert!(matches!(draft.vector, VectorDraft::Value(v) if v == [1.0, -2.0]));
        assert_eq!(draft.site.as_deref(), Some("blocks.3.hook_resid_post"));
        assert_eq!(draft.strength, Some(0.0));
        assert_eq!(draft.positions, PositionSelection::Generated);
        let plain = intervention("i", steering()).expect("accepted");
        assert_eq!(plain.positions, PositionSelection::All);
        assert_eq!(plain.strength, None);
    }

    #[test]
    fn a_score_samples_nothing() {
        let mut with_sampling = input();
        with_sampling.sampling = Some(proto::SamplingOptions::default());
        let request = proto::ScoreRequest {
            input: Some(with_sampling),
            answer: None,
        };
        assert_eq!(refused(score(request)), ("input.sampling".into(), false));
        let request = proto::ScoreRequest {
            input: Some(input()),
            answer: Some(String::new()),
        };
        assert_eq!(refused(score(request)), ("answer".into(), false));
        let request = proto::ScoreRequest {
            input: Some(input()),
            answer: Some("Sure".into()),
        };
        let draft = score(request).expect("accepted");
        assert!(draft.score_only);
        assert_eq!(draft.answer.as_deref(), Some("Sure"));
    }

    fn capture_request() -> proto::CaptureActivationsRequest {
        proto::CaptureActivationsRequest {
            input: Some(input()),
            sites: vec!["hook_embed".into()],
            ..Default::default()
        }
    }

    #[test]
    fn a_capture_of_the_prompt_generates_only_when_asked() {
        let prompt_only = |positions: proto::PositionSelection, max_tokens| {
            let mut request = capture_request();
            request.positions = positions.into();
            if let Some(input) = &mut request.input {
                input.sampling = Some(proto::SamplingOptions {
                    max_tokens,
                    ..Default::default()
                });
            }
            capture(request).expect("accepted").0.score_only
        };
        use proto::PositionSelection as P;
        assert!(prompt_only(P::Unspecified, None));
        assert!(prompt_only(P::AllPrompt, None));
        assert!(!prompt_only(P::AllPrompt, Some(2)));
        assert!(!prompt_only(P::Generated, None));
        assert!(!prompt_only(P::All, None));
    }

    #[test]
    fn a_capture_says_how_it_is_to_be_sent() {
        let (draft, shipping) = capture(capture_request()).expect("accepted");
        assert_eq!(shipping.dtype, Dtype::Bf16);
        assert_eq!(shipping.max_bytes, 64 << 20);
        let wish = draft.capture.expect("a wish");
        assert_eq!(wish.positions, PositionSelection::LastPromptToken);
    }

    #[test]
    fn a_capture_that_cannot_be_is_refused() {
        let check = |field: &str, change: &dyn Fn(&mut proto::CaptureActivationsRequest)| {
            let mut request = capture_request();
            change(&mut request);
            assert_eq!(refused(capture(request)), (field.into(), false));
        };
        check("sites", &|request| request.sites.clear());
        check("sites", &|request| request.sites = vec!["x".into(); 257]);
        check("sites[1]", &|request| request.sites = vec!["x".into(); 2]);
        check("max_bytes", &|request| request.max_bytes = u64::MAX);
        check("answer", &|request| request.answer = Some(String::new()));
        check("input", &|request| request.input = None);
        check("input.sampling", &|request| {
            request.answer = Some("Sure".into());
            if let Some(input) = &mut request.input {
                input.sampling = Some(proto::SamplingOptions::default());
            }
        });
        let int8 = proto::CaptureActivationsRequest {
            dtype: proto::DataType::Int8.into(),
            ..capture_request()
        };
        assert_eq!(refused(capture(int8)), ("dtype".into(), true));
    }
}
