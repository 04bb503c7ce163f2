//! A client for measuring: many calls over a few connections, each status code kept apart.
//! Knows the wire; what is measured, its caller knows.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::client::{ClientError, uri_of};
use super::observe::code_name;
use super::proto;
use super::proto::generate_stream_response::Event;
use super::proto::generation_input::Prompt;
use super::proto::generation_service_client::GenerationServiceClient;
use super::proto::intervention::Vector;
use crate::policy::Mode;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The name of the status code that a call ended with, e.g. `RESOURCE_EXHAUSTED`.
pub type CodeName = &'static str;

/// Connections to one server, used in turn.
pub struct LoadClient {
    connections: Vec<GenerationServiceClient<Channel>>,
    next: AtomicUsize,
    monitor: proto::MonitorOptions,
    raw: bool,
    steer: Option<proto::Intervention>,
}

impl LoadClient {
    /// `url` is a URI with `http://`, or `host:port`. What is unset is the server's choice.
    pub async fn connect(
        url: &str,
        connections: usize,
        mode: Option<Mode>,
        policy: Option<&str>,
    ) -> Result<Self, ClientError> {
        let uri = uri_of(url)?;
        let failed = |error: tonic::transport::Error| ClientError::NoConnection {
            address: url.to_owned(),
            reason: innermost(&error),
        };
        let endpoint = Endpoint::from_shared(uri).map_err(failed)?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
        let mut clients = Vec::with_capacity(connections);
        for _ in 0..connections.max(1) {
            let channel = endpoint.connect().await.map_err(failed)?;
            clients.push(GenerationServiceClient::new(channel));
        }
        Ok(Self {
            connections: clients,
            next: AtomicUsize::new(0),
            raw: false,
            steer: None,
            monitor: proto::MonitorOptions {
                mode: match mode {
                    None => proto::MonitorMode::Unspecified,
                    Some(Mode::Off) => proto::MonitorMode::Off,
                    Some(Mode::Shadow) => proto::MonitorMode::Shadow,
                    Some(Mode::Enforce) => proto::MonitorMode::Enforce,
                }
                .into(),
                policy: policy.unwrap_or_default().to_owned(),
                ..proto::MonitorOptions::default()
            },
        })
    }

    /// Sends prompts as they are instead of as a chat's user turn: not every model has a template.
    pub fn without_template(self, raw: bool) -> Self {
        Self { raw, ..self }
    }

    /// What steered answers are asked for with: a loaded vector, added once where it was fitted.
    pub fn with_vector(self, vector: Option<&str>) -> Self {
        let steer = vector.map(|name| proto::Intervention {
            vector: Some(Vector::Name(name.to_owned())),
            kind: proto::InterventionKind::Add.into(),
            strength: Some(1.0),
            ..proto::Intervention::default()
        });
        Self { steer, ..self }
    }

    /// Asks for an answer as it is released. Dropping what comes back hangs up.
    pub async fn answer(
        &self,
        prompt: &str,
        max_tokens: u32,
        steered: bool,
    ) -> Result<Deliveries, CodeName> {
        let sampling = proto::SamplingOptions {
            max_tokens: Some(max_tokens),
            ..proto::SamplingOptions::default()
        };
        let input = proto::GenerationInput {
            sampling: Some(sampling),
            interventions: self.steer.iter().filter(|_| steered).cloned().collect(),
            ..self.input(prompt)
        };
        let request = proto::GenerateStreamRequest { input: Some(input) };
        let answer = self.connection().generate_stream(request).await;
        let answer = answer.map_err(|status| code_name(status.code()))?;
        Ok(Deliveries(answer.into_inner()))
    }

    /// Scores a prompt.
    pub async fn score(&self, prompt: &str) -> Result<(), CodeName> {
        let request = proto::ScoreRequest {
            input: Some(self.input(prompt)),
            answer: None,
        };
        let scored = self.connection().score(request).await;
        scored
            .map(|_| ())
            .map_err(|status| code_name(status.code()))
    }

    fn connection(&self) -> GenerationServiceClient<Channel> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.connections[turn % self.connections.len()].clone()
    }

    fn input(&self, prompt: &str) -> proto::GenerationInput {
        let prompt = match self.raw {
            true => Prompt::RawText(prompt.to_owned()),
            false => Prompt::Chat(proto::ChatPrompt {
                messages: vec![proto::ChatMessage {
                    role: "user".into(),
                    content: prompt.to_owned(),
                }],
            }),
        };
        proto::GenerationInput {
            prompt: Some(prompt),
            monitor: Some(self.monitor.clone()),
            ..proto::GenerationInput::default()
        }
    }
}

/// The tokens of one answer as they come.
pub struct Deliveries(Streaming<proto::GenerateStreamResponse>);

impl Deliveries {
    /// How many tokens came next; `None` once the answer is complete.
    pub async fn next(&mut self) -> Result<Option<u32>, CodeName> {
        loop {
            let message = self.0.message().await;
            let message = message.map_err(|status| code_name(status.code()))?;
            // A stream that ends without its end was cut off.
            let Some(message) = message else {
                return Err(code_name(tonic::Code::Unavailable));
            };
            match message.event {
                Some(Event::Delta(delta)) if !delta.token_ids.is_empty() => {
                    return Ok(Some(delta.token_ids.len() as u32));
                }
                Some(Event::Retract(retract)) if !retract.replacement_token_ids.is_empty() => {
                    return Ok(Some(retract.replacement_token_ids.len() as u32));
                }
                Some(Event::Completed(_)) => return Ok(None),
                _ => {}
            }
        }
    }
}

/// The outer error only says that there was one.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}
