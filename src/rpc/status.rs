//! The one table from [`Error`] to a gRPC status with rich details; `docs/errors.md` is its reader's copy.
//! Knows no request: what a status says comes from the error alone, shortened to what a trailer holds.

use std::collections::HashMap;
use std::time::Duration;

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::Error;

pub const DOMAIN: &str = "inwit";
pub const REQUEST_ID: &str = "x-request-id";
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// Peers cap trailers at 8 to 16 KiB in all.
const MAX_MESSAGE: usize = 256;
/// Of a field path, a name or a description in the details: at most a handful are in one status.
const MAX_DETAIL: usize = 256;
/// Another replica can be asked at once; this one needs a moment.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(1);

/// The status for `error`, which ended the request `request_id`.
pub(super) fn status(error: &Error, request_id: &str) -> Status {
    log(error, request_id);
    let Row {
        code,
        reason,
        message,
        mut details,
        facts,
    } = row(error);
    let facts: HashMap<String, String> = facts
        .into_iter()
        .map(|(key, value)| (key.to_owned(), shorten(&value, MAX_DETAIL)))
        .collect();
    details.set_error_info(reason, DOMAIN, facts);
    details.set_request_info(request_id, "");

    let mut metadata = MetadataMap::new();
    if let Ok(value) = AsciiMetadataValue::try_from(request_id) {
        metadata.insert(REQUEST_ID, value);
    }
    if let Error::Overloaded { retry_after, .. } = error {
        let pause = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX);
        metadata.insert(PUSHBACK, pause.into());
    }
    let message = shorten(&message, MAX_MESSAGE);
    Status::with_error_details_and_metadata(code, message, details, metadata)
}

/// The status for bytes that are not the message they should be. `reason` is prost's.
pub(super) fn unreadable(reason: &str) -> Status {
    let field = field_path(reason);
    let what = "the message cannot be read as protobuf of this type";
    let message = match &field {
        Some(field) => format!("{field}: {what}"),
        None => what.to_owned(),
    };
    let mut details = ErrorDetails::with_error_info("INVALID_MESSAGE", DOMAIN, HashMap::new());
    if let Some(field) = field {
        details.add_bad_request_violation(field, what);
    }
    Status::with_error_details(
        Code::InvalidArgument,
        shorten(&message, MAX_MESSAGE),
        details,
    )
}

struct Row {
    code: Code,
    reason: &'static str,
    message: String,
    details: ErrorDetails,
    facts: Vec<(&'static str, String)>,
}

fn row(error: &Error) -> Row {
    let row = |code, reason, details| Row {
        code,
        reason,
        message: error.to_string(),
        details,
        facts: Vec::new(),
    };
    let plain = |code, reason| row(code, reason, ErrorDetails::new());
    match error {
        Error::InvalidRequest { field, message } => row(
            Code::InvalidArgument,
            "INVALID_FIELD",
            bad_request(field, message),
        ),
        Error::ContextLength {
            field,
            got,
            limit,
            remedy,
        } => Row {
            facts: vec![("limit", limit.to_string()), ("got", got.to_string())],
            ..row(
                Code::InvalidArgument,
                "CONTEXT_LENGTH_EXCEEDED",
                bad_request(field, remedy),
            )
        },
        Error::NotFound {
            field,
            kind,
            name,
            remedy,
        } => Row {
            facts: vec![("field", field.clone())],
            ..row(Code::NotFound, "NOT_LOADED", resource(kind, name, remedy))
        },
        Error::Unsupported { field, message } => row(
            Code::Unimplemented,
            "UNSUPPORTED",
            bad_request(field, message),
        ),
        Error::AlreadyExists(id) => row(
            Code::AlreadyExists,
            "REQUEST_IN_FLIGHT",
            resource("request", id, "in flight"),
        ),
        Error::Overloaded {
            message,
            retry_after,
        } => {
            let mut details = retry(*retry_after);
            details.add_quota_failure_violation("server", shorten(message, MAX_DETAIL));
            row(Code::ResourceExhausted, "OVERLOADED", details)
        }
        Error::Unavailable(_) => row(Code::Unavailable, "UNAVAILABLE", retry(UNAVAILABLE_RETRY)),
        Error::DeadlineExceeded {
            queue_ms,
            tokens_done,
        } => Row {
            facts: vec![
                ("queue_ms", queue_ms.to_string()),
                ("tokens_done", tokens_done.to_string()),
            ],
            ..plain(Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
        },
        Error::Cancelled => plain(Code::Cancelled, "CANCELLED"),
        Error::AbortedByPolicy => plain(Code::PermissionDenied, "ABORTED_BY_POLICY"),
        // Which probe failed, and how, would help whoever attacks it.
        Error::MonitorFailed { .. } => Row {
            message: "a monitor failed, so the request was not answered".into(),
            ..plain(Code::Internal, "MONITOR_FAILED")
        },
        Error::FailedPrecondition { subject, message } => {
            let mut details = ErrorDetails::new();
            details.add_precondition_failure_violation(
                "LOADED",
                shorten(subject, MAX_DETAIL),
                shorten(message, MAX_DETAIL),
            );
            row(Code::FailedPrecondition, "FAILED_PRECONDITION", details)
        }
        Error::Config(_) | Error::File { .. } | Error::Internal(_) => Row {
            message: "internal error; the server's log has the cause under this request id".into(),
            ..plain(Code::Internal, "INTERNAL")
        },
    }
}

/// What the caller is not told.
fn log(error: &Error, request_id: &str) {
    match error {
        Error::MonitorFailed { .. }
        | Error::Config(_)
        | Error::File { .. }
        | Error::Internal(_) => {
            tracing::error!(request_id, %error, "a request failed");
        }
        _ => {}
    }
}

fn bad_request(field: &str, message: &str) -> ErrorDetails {
    ErrorDetails::with_bad_request_violation(
        shorten(field, MAX_DETAIL),
        shorten(message, MAX_DETAIL),
    )
}

fn resource(kind: &str, name: &str, description: &str) -> ErrorDetails {
    let [name, description] = [name, description].map(|text| shorten(text, MAX_DETAIL));
    ErrorDetails::with_resource_info(kind, name, "", description)
}

fn retry(after: Duration) -> ErrorDetails {
    ErrorDetails::with_retry_info(Some(after))
}

/// At most `limit` bytes, on one line.
fn shorten(text: &str, limit: usize) -> String {
    const CUT: &str = "…";
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    if text.len() <= limit {
        return text.chars().map(clean).collect();
    }
    let mut end = limit - CUT.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(clean).chain(CUT.chars()).collect()
}

/// The fields that prost names, innermost first: `… message: Inner.b: Outer.a: what is wrong` is `a.b`.
fn field_path(reason: &str) -> Option<String> {
    let mut path: Vec<&str> = reason
        .split(": ")
        .skip(1)
        .map_while(|part| part.split_once('.').map(|(_, field)| field))
        .take_while(|field| field.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .collect();
    path.reverse();
    (!path.is_empty()).then(|| path.join("."))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn one_of_each() -> Vec<(&'static str, Error)> {
        let text = || "what".to_owned();
        let errors = vec![
            (
                "InvalidRequest",
                Error::invalid("input.chat", "must be set"),
            ),
            (
                "ContextLength",
                Error::ContextLength {
                    field: text(),
                    got: 9,
                    limit: 8,
                    remedy: text(),
                },
            ),
            (
                "NotFound",
                Error::NotFound {
                    field: "input.model".into(),
                    kind: "model",
                    name: "other".into(),
                    remedy: text(),
                },
            ),
            ("Unsupported", Error::unsupported("input.sampling.n", "no")),
            ("AlreadyExists", Error::AlreadyExists("r1".into())),
            (
                "Overloaded",
                Error::Overloaded {
                    message: text(),
                    retry_after: Duration::from_millis(250),
                },
            ),
            ("Unavailable", Error::Unavailable(text())),
            (
                "DeadlineExceeded",
                Error::DeadlineExceeded {
                    queue_ms: 3,
                    tokens_done: 4,
                },
            ),
            ("Cancelled", Error::Cancelled),
            ("AbortedByPolicy", Error::AbortedByPolicy),
            (
                "MonitorFailed",
                Error::MonitorFailed {
                    probe: "secret".into(),
                    reason: "secret".into(),
                },
            ),
            (
                "FailedPrecondition",
                Error::FailedPrecondition {
                    subject: "probe".into(),
                    message: text(),
                },
            ),
            ("Config", Error::Config("secret".into())),
            ("File", Error::file("secret", "secret")),
            ("Internal", Error::internal("secret")),
        ];
        // A new variant must be added above and to the table.
        for (_, error) in &errors {
            match error {
                Error::InvalidRequest { .. }
                | Error::ContextLength { .. }
                | Error::NotFound { .. }
                | Error::Unsupported { .. }
                | Error::AlreadyExists(_)
                | Error::Overloaded { .. }
                | Error::Unavailable(_)
                | Error::DeadlineExceeded { .. }
                | Error::Cancelled
                | Error::AbortedByPolicy
                | Error::MonitorFailed { .. }
                | Error::FailedPrecondition { .. }
                | Error::Config(_)
                | Error::File { .. }
                | Error::Internal(_) => {}
            }
        }
        errors
    }

    /// Variant to (status, reason), as the page has it.
    fn documented() -> BTreeMap<&'static str, (&'static str, &'static str)> {
        include_str!("../../docs/errors.md")
            .split("## The wire")
            .next()
            .expect("the first part")
            .lines()
            .filter_map(|line| {
                let cells: Vec<_> = line.split('|').map(str::trim).collect();
                let &[_, variant, code, reason, ..] = cells.as_slice() else {
                    return None;
                };
                (!["Error", "---"].contains(&variant)).then_some((variant, (code, reason)))
            })
            .collect()
    }

    #[test]
    fn every_error_has_the_status_that_the_page_says() {
        let documented = documented();
        let errors = one_of_each();
        assert_eq!(documented.len(), errors.len());
        for (variant, error) in errors {
            let status = status(&error, "r1");
            let info = status.get_error_details();
            let info = info.error_info().expect("error info");
            assert_eq!(
                documented.get(variant),
                Some(&(code_name(status.code()), info.reason.as_str())),
                "{variant}"
            );
            assert_eq!(info.domain, DOMAIN);
        }
    }

    #[test]
    fn every_status_names_its_request() {
        for (variant, error) in one_of_each() {
            let status = status(&error, "r1");
            let details = status.get_error_details();
            assert_eq!(
                details.request_info().map(|info| info.request_id.as_str()),
                Some("r1"),
                "{variant}"
            );
            assert_eq!(
                status.metadata().get(REQUEST_ID).map(|id| id.as_bytes()),
                Some(b"r1".as_slice())
            );
        }
    }

    #[test]
    fn what_only_the_operator_may_know_stays_inside() {
        for (variant, error) in one_of_each() {
            let status = status(&error, "r1");
            let secret = b"secret";
            let told = status.message().contains("secret")
                || status.details().windows(secret.len()).any(|w| w == secret);
            assert!(!told, "{variant}");
        }
    }

    #[test]
    fn the_details_tell_the_caller_what_to_do() {
        let details = |error: &Error| status(error, "r1").get_error_details();
        let errors: BTreeMap<_, _> = one_of_each().into_iter().collect();

        let invalid = details(&errors["InvalidRequest"]);
        let violations = &invalid.bad_request().expect("bad request").field_violations;
        assert_eq!(violations[0].field, "input.chat");
        assert_eq!(violations[0].description, "must be set");

        let overloaded = details(&errors["Overloaded"]);
        let pause = overloaded.retry_info().and_then(|info| info.retry_delay);
        assert_eq!(pause, Some(Duration::from_millis(250)));
        assert!(overloaded.has_quota_failure_violations());
        let pushback = status(&errors["Overloaded"], "r1");
        assert_eq!(
            pushback.metadata().get(PUSHBACK).map(|p| p.as_bytes()),
            Some(b"250".as_slice())
        );

        let resource = details(&errors["NotFound"]);
        let resource = resource.resource_info().expect("resource").clone();
        assert_eq!(
            (&*resource.resource_type, &*resource.resource_name),
            ("model", "other")
        );

        let facts = details(&errors["DeadlineExceeded"]);
        let facts = &facts.error_info().expect("info").metadata;
        assert_eq!((&*facts["queue_ms"], &*facts["tokens_done"]), ("3", "4"));

        assert!(details(&errors["FailedPrecondition"]).has_precondition_failure_violations());
    }

    #[test]
    fn a_status_fits_in_a_trailer_whatever_the_error_holds() {
        let long = "é\n".repeat(100_000);
        let errors = [
            Error::invalid(long.clone(), long.clone()),
            Error::NotFound {
                field: long.clone(),
                kind: "probe",
                name: long.clone(),
                remedy: long.clone(),
            },
            Error::Overloaded {
                message: long.clone(),
                retry_after: Duration::MAX,
            },
            Error::FailedPrecondition {
                subject: long.clone(),
                message: long,
            },
        ];
        for error in errors {
            let status = status(&error, "r1");
            assert!(status.message().chars().count() <= 256);
            assert!(status.message().len() <= 256);
            assert!(!status.message().contains('\n'));
            assert!(status.details().len() <= 4096, "{}", status.details().len());
        }
    }

    #[test]
    fn a_message_that_cannot_be_read_names_its_field() {
        let reason = "failed to decode Protobuf message: GenerationInput.prompt: \
            GenerateRequest.input: invalid string value: data is not UTF-8 encoded";
        let status = unreadable(reason);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("input.prompt: "), "{status:?}");
        let garbage = unreadable("failed to decode Protobuf message: invalid tag value: 0");
        assert_eq!(garbage.code(), Code::InvalidArgument);
        assert!(garbage.get_error_details().bad_request().is_none());
    }

    fn code_name(code: Code) -> &'static str {
        super::super::observe::code_name(code)
    }
}
