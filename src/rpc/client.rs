//! A client of the public contract: drafts out, events in, so that callers share the server's words.
//! Knows the wire; knows no terminal.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use super::proto;
use super::proto::generate_stream_response::Event as WireEvent;
use super::proto::generation_service_client::GenerationServiceClient;
use crate::engine::event::{
    Completed, Delta, Event, FinishReason, Retract, Score, Started, Timings, Usage, Verdict,
};
use crate::engine::prepare::{
    Draft, InterventionDraft, InterventionKindDraft, MonitorDraft, PromptDraft, VectorDraft,
};
use crate::engine::request::PositionSelection;
use crate::engine::sampler::{SamplingDraft, TokenLogprobs};
use crate::policy::{Action, Mode};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ClientError {
    #[error("no server at {address}: {reason}; start one with `inwit serve`")]
    NoConnection { address: String, reason: String },
    #[error("the server is not available: {0}")]
    Unavailable(String),
    #[error("the policy aborted the request")]
    AbortedByPolicy,
    /// The name of the status code, and its message.
    #[error("{code}: {message}")]
    Status { code: String, message: String },
    #[error("the server sent {0}, which this client does not know")]
    NotUnderstood(String),
}

/// `host:port` as a URI. Another scheme is an error: this client speaks no TLS.
pub(super) fn uri_of(address: &str) -> Result<String, ClientError> {
    match address.split_once("://") {
        None => Ok(format!("http://{address}")),
        Some(("http", _)) => Ok(address.to_owned()),
        Some(_) => Err(ClientError::NoConnection {
            address: address.to_owned(),
            reason: "the scheme must be http: this client speaks no TLS".into(),
        }),
    }
}

pub struct Client(GenerationServiceClient<Channel>);

impl Client {
    /// `address` is `host:port`, or a URI with `http://`.
    pub async fn connect(address: &str) -> Result<Self, ClientError> {
        let uri = uri_of(address)?;
        let failed = |error: &dyn std::error::Error| ClientError::NoConnection {
            address: address.to_owned(),
            // The outer error only says that there was one.
            reason: innermost(error),
        };
        let endpoint = Endpoint::from_shared(uri).map_err(|error| failed(&error))?;
        let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await;
        Ok(Self(GenerationServiceClient::new(
            channel.map_err(|error| failed(&error))?,
        )))
    }

    /// Asks for an answer as it is released. Dropping the answer cancels the request.
    pub async fn stream(&mut self, draft: &Draft) -> Result<Answer, ClientError> {
        let request = proto::GenerateStreamRequest {
            input: Some(input(draft)?),
        };
        let answer = self
            .0
            .generate_stream(request)
            .await
            .map_err(|status| error(&status))?;
        Ok(Answer {
            events: answer.into_inner(),
            completed: false,
        })
    }
}

/// The events of one answer.
pub struct Answer {
    events: Streaming<proto::GenerateStreamResponse>,
    completed: bool,
}

impl Answer {
    /// The next event; `None` after `Completed`.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        if self.completed {
            return Ok(None);
        }
        let message = self
            .events
            .message()
            .await
            .map_err(|status| error(&status))?;
        let Some(message) = message else {
            return Err(ClientError::Unavailable(
                "the stream ended before the answer".into(),
            ));
        };
        let event = event(message)?;
        self.completed = matches!(event, Event::Completed(_));
        Ok(Some(event))
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

fn error(status: &Status) -> ClientError {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.as_str());
    let message = status.message().to_owned();
    // Only what befell the connection has a cause; the server's own statuses bring none along.
    if std::error::Error::source(status).is_some() {
        return ClientError::Unavailable(innermost(status));
    }
    match (status.code(), reason) {
        (Code::PermissionDenied, Some("ABORTED_BY_POLICY")) => ClientError::AbortedByPolicy,
        (Code::Unavailable | Code::ResourceExhausted, _) => ClientError::Unavailable(message),
        (code, _) => ClientError::Status {
            code: format!("{code:?}"),
            message,
        },
    }
}

fn unsupported(what: &str) -> ClientError {
    ClientError::Status {
        code: "Unimplemented".into(),
        message: format!("{what} is not supported by this client"),
    }
}

fn input(draft: &Draft) -> Result<proto::GenerationInput, ClientError> {
    use proto::generation_input::Prompt;
    if draft.score_only || draft.answer.is_some() || draft.capture.is_some() {
        return Err(unsupported("scoring and capture"));
    }
    let prompt = match &draft.prompt {
        PromptDraft::Chat(messages) => Prompt::Chat(proto::ChatPrompt {
            messages: messages
                .iter()
                .map(|message| proto::ChatMessage {
                    role: message.role.clone(),
                    content: message.content.clone(),
                })
                .collect(),
        }),
        PromptDraft::RawText(text) => Prompt::RawText(text.clone()),
        PromptDraft::Tokens(tokens) => Prompt::Tokens(proto::TokenPrompt {
            token_ids: tokens.clone(),
        }),
    };
    Ok(proto::GenerationInput {
        model: draft.model.clone().unwrap_or_default(),
        prompt: Some(prompt),
        sampling: Some(sampling(&draft.sampling)),
        monitor: Some(monitor(&draft.monitor)),
        interventions: draft
            .interventions
            .iter()
            .map(intervention)
            .collect::<Result<_, _>>()?,
        skip_prefix_cache: draft.skip_prefix_cache,
        request_id: draft.id.clone().unwrap_or_default(),
        refusal_head: draft.refusal_head.clone().unwrap_or_default(),
    })
}

fn sampling(draft: &SamplingDraft) -> proto::SamplingOptions {
    proto::SamplingOptions {
        max_tokens: draft.max_tokens,
        temperature: draft.temperature,
        top_p: draft.top_p,
        top_k: draft.top_k,
        min_p: draft.min_p,
        repetition_penalty: draft.repetition_penalty,
        presence_penalty: draft.presence_penalty,
        frequency_penalty: draft.frequency_penalty,
        seed: draft.seed,
        stop: draft.stop.clone(),
        stop_token_ids: draft.stop_token_ids.clone(),
        logprobs: draft.logprobs,
        n: draft.n,
        logit_bias: draft.logit_bias.iter().copied().collect(),
    }
}

fn monitor(draft: &MonitorDraft) -> proto::MonitorOptions {
    let mode = match draft.mode {
        None => proto::MonitorMode::Unspecified,
        Some(Mode::Off) => proto::MonitorMode::Off,
        Some(Mode::Shadow) => proto::MonitorMode::Shadow,
        Some(Mode::Enforce) => proto::MonitorMode::Enforce,
    };
    proto::MonitorOptions {
        mode: mode.into(),
        policy: draft.policy.clone().unwrap_or_default(),
        return_scores: draft.return_scores,
        hold_back: draft.hold_back,
    }
}

fn intervention(draft: &InterventionDraft) -> Result<proto::Intervention, ClientError> {
    let VectorDraft::Named(name) = &draft.vector else {
        return Err(unsupported("a vector by value"));
    };
    let kind = match draft.kind {
        InterventionKindDraft::Add => proto::InterventionKind::Add,
        InterventionKindDraft::ProjectOut => proto::InterventionKind::ProjectOut,
        InterventionKindDraft::ClampAbove => proto::InterventionKind::ClampAbove,
        InterventionKindDraft::ClampBelow => proto::InterventionKind::ClampBelow,
    };
    let positions = match draft.positions {
        PositionSelection::LastPromptToken => proto::PositionSelection::LastPromptToken,
        PositionSelection::AllPrompt => proto::PositionSelection::AllPrompt,
        PositionSelection::Generated => proto::PositionSelection::Generated,
        PositionSelection::All => proto::PositionSelection::All,
        PositionSelection::FromLastPromptToken => proto::PositionSelection::FromLastPromptToken,
    };
    Ok(proto::Intervention {
        vector: Some(proto::intervention::Vector::Name(name.clone())),
        site: draft.site.clone().unwrap_or_default(),
        kind: kind.into(),
        strength: draft.strength,
        positions: positions.into(),
        condition: draft.condition.as_ref().map(|condition| proto::Condition {
            detector: condition.detector.clone(),
            above: condition.above,
        }),
    })
}

fn event(message: proto::GenerateStreamResponse) -> Result<Event, ClientError> {
    // An event without a known kind may withdraw text, so it must not be passed over.
    let event = message
        .event
        .ok_or_else(|| ClientError::NotUnderstood("an event".into()))?;
    Ok(match event {
        WireEvent::Started(started) => Event::Started(Started {
            policy_revision: started.policy_revision,
            cached_tokens: started.cached_tokens,
        }),
        WireEvent::Delta(delta) => Event::Delta(Delta {
            text: delta.text,
            token_ids: delta.token_ids,
            scores: delta
                .scores
                .into_iter()
                .map(score)
                .collect::<Result<_, _>>()?,
            logprobs: delta.logprobs.into_iter().map(logprobs).collect(),
        }),
        WireEvent::Verdict(verdict) => Event::Verdict(Verdict {
            action: action(verdict.action)?,
            rule: verdict.rule,
            shadow: verdict.shadow,
            evidence: verdict
                .evidence
                .into_iter()
                .map(score)
                .collect::<Result<_, _>>()?,
        }),
        WireEvent::Retract(retract) => Event::Retract(Retract {
            keep_token_count: retract.keep_token_count,
            keep_text_bytes: retract.keep_text_bytes,
            replacement_text: retract.replacement_text,
            replacement_token_ids: retract.replacement_token_ids,
        }),
        WireEvent::Completed(completed) => Event::Completed(Box::new(self::completed(completed)?)),
    })
}

fn completed(completed: proto::Completed) -> Result<Completed, ClientError> {
    let usage = completed.usage.unwrap_or_default();
    let timings = completed.timings.unwrap_or_default();
    let time = |duration: Option<prost_types::Duration>| {
        duration.and_then(|duration| Duration::try_from(duration).ok())
    };
    Ok(Completed {
        finish_reason: finish_reason(completed.finish_reason)?,
        action: action(completed.action)?,
        usage: Usage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
            withheld_tokens: usage.withheld_tokens,
        },
        scores: completed
            .scores
            .into_iter()
            .map(score)
            .collect::<Result<_, _>>()?,
        out_of_domain: completed.out_of_domain,
        partially_monitored: completed.partially_monitored,
        timings: Timings {
            queued: time(timings.queued).unwrap_or_default(),
            to_first_token: time(timings.to_first_token),
            total: time(timings.total).unwrap_or_default(),
        },
    })
}

fn score(score: proto::ProbeScore) -> Result<Score, ClientError> {
    let site = |site: String| {
        let unknown = |_| ClientError::NotUnderstood(format!("the site `{site}`"));
        site.parse().map_err(unknown)
    };
    Ok(Score {
        probe: score.probe.into(),
        probe_revision: score.probe_revision,
        sites: score
            .sites
            .into_iter()
            .map(site)
            .collect::<Result<_, _>>()?,
        detector: (!score.detector.is_empty()).then(|| score.detector.into()),
        position: u32::try_from(score.position).unwrap_or_default(),
        logit: score.logit,
        probability: score.probability,
        threshold: score.threshold,
        fired: score.fired,
        out_of_domain: score.out_of_domain,
    })
}

fn logprobs(logprobs: proto::TokenLogprobs) -> TokenLogprobs {
    let pair = |logprob: proto::Logprob| (logprob.token_id, logprob.logprob);
    TokenLogprobs {
        chosen: logprobs.chosen.map(pair).unwrap_or_default(),
        alternatives: logprobs.alternatives.into_iter().map(pair).collect(),
    }
}

fn action(number: i32) -> Result<Action, ClientError> {
    match proto::PolicyAction::try_from(number) {
        Ok(proto::PolicyAction::Allow) => Ok(Action::Allow),
        Ok(proto::PolicyAction::Flag) => Ok(Action::Flag),
        Ok(proto::PolicyAction::Steer) => Ok(Action::Steer),
        Ok(proto::PolicyAction::RefusalHead) => Ok(Action::RefusalHead),
        Ok(proto::PolicyAction::Refuse) => Ok(Action::Refuse),
        Ok(proto::PolicyAction::Abort) => Ok(Action::Abort),
        Ok(proto::PolicyAction::Unspecified) | Err(_) => {
            Err(ClientError::NotUnderstood(format!("the action {number}")))
        }
    }
}

fn finish_reason(number: i32) -> Result<FinishReason, ClientError> {
    match proto::FinishReason::try_from(number) {
        Ok(proto::FinishReason::Stop) => Ok(FinishReason::Stop),
        Ok(proto::FinishReason::StopSequence) => Ok(FinishReason::StopSequence),
        Ok(proto::FinishReason::Length) => Ok(FinishReason::Length),
        Ok(proto::FinishReason::RefusedByPolicy) => Ok(FinishReason::RefusedByPolicy),
        Ok(proto::FinishReason::MonitorFailed) => Ok(FinishReason::MonitorFailed),
        Ok(proto::FinishReason::Unspecified) | Err(_) => Err(ClientError::NotUnderstood(format!(
            "the finish reason {number}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_is_not_known_is_an_error() {
        let unknown = proto::GenerateStreamResponse {
            event_number: 1,
            event: None,
        };
        assert!(matches!(event(unknown), Err(ClientError::NotUnderstood(_))));
    }

    #[test]
    fn a_retract_arrives_as_it_was_sent() {
        let retract = proto::Retract {
            keep_token_count: 1,
            keep_text_bytes: 4,
            replacement_text: "No.".into(),
            replacement_token_ids: vec![7],
        };
        let message = proto::GenerateStreamResponse {
            event_number: 3,
            event: Some(WireEvent::Retract(retract)),
        };
        let Ok(Event::Retract(retract)) = event(message) else {
            panic!("not a retract");
        };
        assert_eq!(
            (retract.keep_text_bytes, retract.replacement_text.as_str()),
            (4, "No.")
        );
    }

    #[test]
    fn statuses_are_told_apart() {
        assert_eq!(
            error(&Status::unavailable("draining")),
            ClientError::Unavailable("draining".into())
        );
        let ClientError::Status { code, .. } = error(&Status::invalid_argument("x")) else {
            panic!("not a status");
        };
        assert_eq!(code, "InvalidArgument");
    }

    #[tokio::test]
    async fn a_server_that_dies_in_the_middle_of_an_answer_is_not_available() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("binds");
        let address = listener.local_addr().expect("an address").to_string();
        let server = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.expect("a caller");
            let mut connection = h2::server::handshake(socket).await.expect("h2");
            let (_, mut reply) = connection.accept().await.expect("a call").expect("whole");
            let headers = http::Response::builder().header("content-type", "application/grpc");
            let mut body = reply
                .send_response(headers.body(()).expect("headers"), false)
                .expect("sends");
            let half = bytes::Bytes::from_static(&[0, 0, 0, 0, 9, 1]);
            body.send_data(half, false).expect("sends");
            let flushed = tokio::time::timeout(Duration::from_millis(50), connection.accept());
            assert!(flushed.await.is_err(), "another call");
        });
        let mut client = Client::connect(&address).await.expect("connects");
        let draft = Draft::of(PromptDraft::RawText("Hi".into()));
        let mut answer = client.stream(&draft).await.expect("an answer begins");
        server.await.expect("no panic");
        let error = answer.next().await.expect_err("no end");
        assert!(matches!(error, ClientError::Unavailable(_)), "{error:?}");
    }

    #[tokio::test]
    async fn nobody_listening_is_said_with_what_helps() {
        let Err(error) = Client::connect("127.0.0.1:1").await else {
            panic!("connected");
        };
        assert!(error.to_string().contains("inwit serve"), "{error}");
    }
}
