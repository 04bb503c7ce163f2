//! `GenerationService`: answers and scores.
//! Knows how a request becomes a reply, not what the model does in between.

use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

use super::call::Call;
use super::convert;
use super::proto::generate_stream_response::Event as Item;
use super::proto::generation_service_server::GenerationService;
use super::proto::{
    GenerateRequest, GenerateResponse, GenerateStreamRequest, GenerateStreamResponse, ScoreRequest,
    ScoreResponse,
};
use super::reply::{self, Terms};
use super::running::Running;
use super::server::Served;
use crate::engine::event::{Event, Score};
use crate::engine::fold::Folded;
use crate::error::Result;

#[derive(Clone)]
pub(super) struct Generation(pub(super) Served);

#[tonic::async_trait]
impl GenerationService for Generation {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let (metadata, _, GenerateRequest { input }) = request.into_parts();
        let call = Call::begin(&metadata, convert::request_id(&input), self.0.deadlines)?;
        let reply = async {
            let (running, terms) = self.0.start(&call, convert::generation(input)?).await?;
            let (folded, _) = fold(running).await?;
            terms.generated(folded)
        };
        call.answer(reply.await)
    }

    type GenerateStreamStream = BoxStream<'static, Result<GenerateStreamResponse, Status>>;

    async fn generate_stream(
        &self,
        request: Request<GenerateStreamRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let (metadata, _, GenerateStreamRequest { input }) = request.into_parts();
        let call = Call::begin(&metadata, convert::request_id(&input), self.0.deadlines)?;
        let stream = async {
            let (running, terms) = self.0.start(&call, convert::generation(input)?).await?;
            let items = move |event| Ok(item(&terms, event).into_iter().collect());
            Ok(
                running.into_stream(items, |event_number, event| GenerateStreamResponse {
                    event_number,
                    event: Some(event),
                }),
            )
        };
        call.answer(stream.await)
    }

    async fn score(
        &self,
        request: Request<ScoreRequest>,
    ) -> Result<Response<ScoreResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let call = Call::begin(
            &metadata,
            convert::request_id(&request.input),
            self.0.deadlines,
        )?;
        let reply = async {
            let (running, terms) = self.0.start(&call, convert::score(request)?).await?;
            let (folded, token_scores) = fold(running).await?;
            terms.scored(folded, &token_scores)
        };
        call.answer(reply.await)
    }
}

/// What the events leave, and the per-token scores on the way.
async fn fold(mut running: Running) -> Result<(Folded, Vec<Score>)> {
    let mut folded = Folded::default();
    let mut scores = Vec::new();
    while let Some(event) = running.next().await {
        let mut event = event?;
        if let Event::Delta(delta) = &mut event {
            scores.append(&mut delta.scores);
        }
        folded.take(event)?;
    }
    Ok((folded, scores))
}

fn item(terms: &Terms, event: Event) -> Option<Item> {
    match event {
        Event::Started(started) => Some(Item::Started(terms.started(started.cached_tokens))),
        Event::Delta(delta) => Some(Item::Delta(terms.delta(delta))),
        Event::Verdict(verdict) => Some(Item::Verdict(terms.verdict(verdict))),
        Event::Retract(retract) => Some(Item::Retract(reply::retract(retract))),
        Event::Completed(completed) => Some(Item::Completed(terms.completed(&completed))),
        // Captures are not asked for here, and a failure is a status.
        Event::Captured(_) | Event::Failed(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::event::{Delta, Retract, Started};
    use crate::rpc::reply::tests::{completed, terms};

    #[test]
    fn every_event_of_an_answer_becomes_its_message() {
        let started = Started {
            policy_revision: 7,
            cached_tokens: 3,
        };
        let retract = Retract {
            keep_token_count: 1,
            keep_text_bytes: 2,
            replacement_text: "No.".into(),
            replacement_token_ids: vec![4],
        };
        let item = |event| item(&terms(false), event);
        let Some(Item::Started(started)) = item(Event::Started(started)) else {
            panic!("no started");
        };
        assert_eq!((started.policy_revision, started.cached_tokens), (7, 3));
        assert!(matches!(
            item(Event::Delta(Delta::default())),
            Some(Item::Delta(_))
        ));
        let Some(Item::Retract(retract)) = item(Event::Retract(retract)) else {
            panic!("no retract");
        };
        assert_eq!(retract.replacement_token_ids, [4]);
        let end = Event::Completed(Box::new(completed()));
        assert!(matches!(item(end), Some(Item::Completed(_))));
    }
}
