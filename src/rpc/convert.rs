//! What callers send, as the engine's drafts: parsed once, every error with its path in the request.
//! Knows the wire, not the model: names, ranges and lengths are `prepare`'s to check.

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
    refuse_for_answers(&input)?;
    let mode = input.monitor.as_ref().map(|monitor| monitor.mode);
    if mode == Some(proto::MonitorMode::Off.into()) {
        return Err(Error::invalid(
            "input.monitor.mode",
            "must not be OFF: nothing would be scored",
        ));
    }
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
    let score_only = answer.is_some() || (of_prompt && !asks_for_tokens);
    if score_only {
        refuse_sampling(
            &input,
            "only the prompt is read, unless it sets max_tokens as well",
        )?;
        refuse_for_answers(&input)?;
    }
    let sampling = sampling(input.sampling.clone().unwrap_or_default());
    let draft = Draft {
        score_only,
        answer,
        capture: Some(CaptureDraft {
            sites: request.sites,
            positions,
        }),
        ..draft(input, sampling)?
    };
    Ok((draft, shipping))
}

fn set(input: Option<proto::GenerationInput>) -> Result<proto::GenerationInput> {
    input.ok_or_else(|| Error::invalid("input", "must be set"))
}

fn draft(input: proto::GenerationInput, sampling: SamplingDraft) -> Result<Draft> {
    let interventions = input
        .interventions
        .into_iter()
        .enumerate()
        .map(|(i, one)| intervention(&format!("input.interventions[{i}]"), one))
        .collect::<Result<_>>()?;
    Ok(Draft {
        sampling,
        monitor: monitor(input.monitor.unwrap_or_default())?,
        interventions,
        refusal_head: unless_empty(input.refusal_head),
        skip_prefix_cache: input.skip_prefix_cache,
        model: unless_empty(input.model),
        ..Draft::of(prompt(input.prompt)?)
    })
}

fn prompt(prompt: Option<generation_input::Prompt>) -> Result<PromptDraft> {
    use generation_input::Prompt;
    match prompt {
        None => Err(Error::invalid(
            "input.prompt",
            "one of `chat`, `raw_text` and `tokens` must be set",
        )),
        Some(Prompt::Chat(chat)) => {
            refuse_silence(&chat.messages)?;
            let message = |proto::ChatMessage { role, content }| Message { role, content };
            Ok(PromptDraft::Chat(
                chat.messages.into_iter().map(message).collect(),
            ))
        }
        Some(Prompt::RawText(text)) => Ok(PromptDraft::RawText(text)),
        Some(Prompt::Tokens(tokens)) => Ok(PromptDraft::Tokens(tokens.token_ids)),
    }
}

/// A user who says nothing, in the turn to be answered or in an earlier one, is a caller's mistake.
fn refuse_silence(messages: &[proto::ChatMessage]) -> Result<()> {
    for (index, message) in messages.iter().enumerate() {
        let is_last = index + 1 == messages.len();
        let silent = match is_last {
            true => message.content.trim().is_empty(),
            false => message.content.is_empty(),
        };
        if silent && message.role == "user" {
            return Err(Error::invalid(
                format!("input.chat.messages[{index}].content"),
                "is empty; give the user's words",
            ));
        }
    }
    Ok(())
}

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
        seed: options.seed,
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
        Some(intervention::Vector::Name(name)) => VectorDraft::Named(name),
        Some(intervention::Vector::Value(value)) => {
            VectorDraft::Value(tensor::vector(&format!("{field}.value"), &value)?)
        }
    };
    Ok(InterventionDraft {
        vector,
        site: unless_empty(wire.site),
        kind: kind(&format!("{field}.kind"), wire.kind)?,
        strength: wire.strength,
        positions: positions(&format!("{field}.positions"), wire.positions)?
            .unwrap_or(PositionSelection::All),
        condition: wire
            .condition
            .map(|proto::Condition { detector, above }| ConditionDraft { detector, above }),
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

/// What has a meaning only where an answer is generated.
fn refuse_for_answers(input: &proto::GenerationInput) -> Result<()> {
    const WHY: &str = "must not be set: nothing is generated";
    let hold_back = input.monitor.as_ref().and_then(|m| m.hold_back);
    if hold_back.is_some() {
        return Err(Error::invalid("input.monitor.hold_back", WHY));
    }
    if !input.refusal_head.is_empty() {
        return Err(Error::invalid("input.refusal_head", WHY));
    }
    Ok(())
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
    fn text_of_any_characters_passes_unchanged() {
        for text in [
            "\0",
            "\u{202e}abc",
            "<|im_end|>",
            "e\u{301}\u{301}",
            "\u{e000}",
            "🦀",
        ] {
            let mut input = input();
            input.prompt = Some(chat(&[("user", text)]));
            let draft = generation(Some(input)).expect("accepted");
            assert!(matches!(draft.prompt, PromptDraft::Chat(m) if m[0].content == text));
        }
    }

    #[test]
    fn a_user_who_says_nothing_is_refused() {
        let hi = ("user", "Hi");
        for (index, turns) in [
            (0, vec![("user", "")]),
            (0, vec![("user", " \n")]),
            (0, vec![("user", ""), ("assistant", "Yes?"), hi]),
            (2, vec![hi, ("assistant", ""), ("user", "\u{a0}")]),
        ] {
            let field = format!("input.chat.messages[{index}].content");
            check_input(&field, |input| input.prompt = Some(chat(&turns)));
        }
        let mut input = input();
        let turns = [("system", ""), ("user", " "), ("assistant", ""), hi];
        input.prompt = Some(chat(&turns));
        assert!(generation(Some(input)).is_ok());
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
        assert_eq!(unset, SamplingDraft::default());
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
    fn an_intervention_without_a_vector_or_a_kind_is_refused() {
        check_intervention(".vector", |one| one.vector = None);
        check_intervention(".kind", |one| one.kind = 0);
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
        wire.condition = Some(proto::Condition {
            detector: "prompt_harm".into(),
            above: -0.5,
        });
        let draft = intervention("i", wire).expect("accepted");
        assert!(matches!(draft.vector, VectorDraft::Value(v) if v == [1.0, -2.0]));
        assert_eq!(draft.site.as_deref(), Some("blocks.3.hook_resid_post"));
        assert_eq!(draft.strength, Some(0.0));
        assert_eq!(draft.positions, PositionSelection::Generated);
        assert_eq!(draft.kind, InterventionKindDraft::ClampBelow);
        let condition = draft.condition.expect("a condition");
        assert_eq!(
            (&*condition.detector, condition.above),
            ("prompt_harm", -0.5)
        );
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
        let prompt_only = |positions: proto::PositionSelection, max_tokens: Option<u32>| {
            let mut request = capture_request();
            request.positions = positions.into();
            if let Some(input) = &mut request.input {
                input.sampling = max_tokens.map(|max_tokens| proto::SamplingOptions {
                    max_tokens: Some(max_tokens),
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
        check("max_bytes", &|request| request.max_bytes = u64::MAX);
        check("answer", &|request| request.answer = Some(String::new()));
        check("input", &|request| request.input = None);
        check("input.sampling", &|request| {
            request.answer = Some("Sure".into());
            if let Some(input) = &mut request.input {
                input.sampling = Some(proto::SamplingOptions::default());
            }
        });
        check("input.sampling", &|request| {
            if let Some(input) = &mut request.input {
                input.sampling = Some(proto::SamplingOptions {
                    temperature: Some(1.0),
                    ..Default::default()
                });
            }
        });
        check("input.refusal_head", &|request| {
            if let Some(input) = &mut request.input {
                input.refusal_head = "head".into();
            }
        });
        let int8 = proto::CaptureActivationsRequest {
            dtype: proto::DataType::Int8.into(),
            ..capture_request()
        };
        assert_eq!(refused(capture(int8)), ("dtype".into(), true));
    }
}
