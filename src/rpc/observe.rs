//! Counts every call once, by method and status, however it ends: answered, refused by the transport, dropped.
//! Knows headers and trailers, no message.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Code;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use crate::metrics;

/// The methods that are served; anything else is counted as `unknown`, since a caller chooses that name.
pub(super) const METHODS: [&str; 15] = [
    "/inwit.v1.GenerationService/Generate",
    "/inwit.v1.GenerationService/GenerateStream",
    "/inwit.v1.GenerationService/Score",
    "/inwit.v1.ActivationService/ListSites",
    "/inwit.v1.ActivationService/CaptureActivations",
    "/inwit.v1.ProbeService/GetProbe",
    "/inwit.v1.ProbeService/ListProbes",
    "/inwit.v1.ProbeService/CreateProbe",
    "/inwit.v1.ProbeService/UpdateProbe",
    "/inwit.v1.ProbeService/DeleteProbe",
    "/inwit.v1.ProbeService/EvaluateThreshold",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// A status as metrics and documents spell it.
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Observe;

impl<S> Layer<S> for Observe {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed(inner)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Observed<S>(S);

impl<S, B> Service<Request<B>> for Observed<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut tally = Tally::begin(request.uri().path());
        let answer = self.0.call(request);
        Box::pin(async move {
            let response = answer.await?;
            tally.read(response.headers());
            Ok(response.map(|body| Body::new(Observing { body, tally })))
        })
    }
}

/// Counts its call when it is dropped; a call whose status never came was cancelled.
struct Tally {
    method: &'static str,
    began: Instant,
    code: Code,
}

impl Tally {
    fn begin(path: &str) -> Self {
        let method = METHODS.into_iter().find(|method| *method == path);
        Self {
            method: method.unwrap_or("unknown"),
            began: Instant::now(),
            code: Code::Cancelled,
        }
    }

    fn read(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.code = status.code();
        }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        metrics::request_finished(self.method, code_name(self.code), self.began.elapsed());
    }
}

struct Observing {
    body: Body,
    tally: Tally,
}

impl HttpBody for Observing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(trailers) = frame
            .as_ref()
            .and_then(|frame| frame.as_ref().ok())
            .and_then(Frame::trailers_ref)
        {
            self.tally.read(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_up_method_is_not_a_label() {
        assert_eq!(
            Tally::begin("/inwit.v1.GenerationService/Score").method,
            METHODS[2]
        );
        assert_eq!(Tally::begin("/a/b").method, "unknown");
    }

    #[test]
    fn a_call_without_a_status_was_cancelled() {
        let mut tally = Tally::begin("/a/b");
        assert_eq!(tally.code, Code::Cancelled);
        tally.read(&HeaderMap::new());
        assert_eq!(tally.code, Code::Cancelled);
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().expect("a value"));
        tally.read(&trailers);
        assert_eq!(tally.code, Code::Ok);
    }

    #[test]
    fn every_method_that_is_served_is_known() {
        use prost::Message;
        let set = prost_types::FileDescriptorSet::decode(super::super::DESCRIPTORS)
            .expect("the build script wrote it");
        let served = ["GenerationService", "ActivationService", "ProbeService"];
        for file in set.file {
            for service in file.service.iter().filter(|s| served.contains(&s.name())) {
                for method in &service.method {
                    let path = format!("/inwit.v1.{}/{}", service.name(), method.name());
                    assert!(METHODS.contains(&path.as_str()), "{path}");
                }
            }
        }
    }
}
