//! One call: its id and its deadline, from the message and the metadata.
//! Knows nothing of what is asked.

use std::time::{Duration, Instant};

use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Response, Status};
use uuid::Uuid;

use super::status::{self, REQUEST_ID};
use crate::error::{Error, Result};

const TIMEOUT: &str = "grpc-timeout";
const MAX_ID_BYTES: usize = 128;
/// Our answer leaves this much before the deadline, so that the caller still hears why.
const MAX_HEADSTART: Duration = Duration::from_millis(20);

/// What counts for a call that brings no deadline, and the longest that one may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    pub default: Duration,
    pub max: Duration,
}

#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

impl Call {
    /// `asked_id` is the request's own field, empty when it has none.
    pub(super) fn begin(
        metadata: &MetadataMap,
        asked_id: &str,
        deadlines: Deadlines,
    ) -> Result<Self, Status> {
        let arrived = Instant::now();
        let id = match chosen_id(metadata, asked_id) {
            Ok(id) => id.unwrap_or_else(fresh_id),
            Err(error) => return Err(status::status(&error, &fresh_id())),
        };
        let timeout = timeout(metadata).map_err(|error| status::status(&error, &id))?;
        let timeout = timeout.unwrap_or(deadlines.default).min(deadlines.max);
        Ok(Self {
            id,
            arrived,
            deadline: arrived + timeout - (timeout / 20).min(MAX_HEADSTART),
        })
    }

    /// Sends the id along with whatever the call came to.
    pub(super) fn answer<T>(&self, result: Result<T>) -> Result<Response<T>, Status> {
        let mut response = Response::new(result.map_err(|error| self.status(&error))?);
        if let Ok(id) = AsciiMetadataValue::try_from(&self.id) {
            response.metadata_mut().insert(REQUEST_ID, id);
        }
        Ok(response)
    }

    pub(super) fn status(&self, error: &Error) -> Status {
        status::status(error, &self.id)
    }
}

fn chosen_id(metadata: &MetadataMap, asked: &str) -> Result<Option<String>> {
    if !asked.is_empty() {
        return checked_id("input.request_id", asked.as_bytes()).map(Some);
    }
    metadata
        .get(REQUEST_ID)
        .map(|value| checked_id(REQUEST_ID, value.as_bytes()))
        .transpose()
}

fn checked_id(field: &str, id: &[u8]) -> Result<String> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._:-".contains(byte);
    match std::str::from_utf8(id) {
        Ok(text) if (1..=MAX_ID_BYTES).contains(&id.len()) && id.iter().all(allowed) => {
            Ok(text.to_owned())
        }
        _ => Err(Error::invalid(
            field,
            format!("must be 1 to {MAX_ID_BYTES} of A-Z a-z 0-9 . _ : -"),
        )),
    }
}

fn fresh_id() -> String {
    Uuid::new_v4().to_string()
}

/// At most eight digits and a unit, as the gRPC protocol has it.
fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>> {
    let Some(value) = metadata.get(TIMEOUT) else {
        return Ok(None);
    };
    value
        .to_str()
        .ok()
        .and_then(parse_timeout)
        .map(Some)
        .ok_or_else(|| Error::invalid(TIMEOUT, "must be 1 to 8 digits and one of H M S m u n"))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.len().checked_sub(1)?;
    let (digits, unit) = text.split_at_checked(unit)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const DEADLINES: Deadlines = Deadlines {
        default: Duration::from_secs(120),
        max: Duration::from_secs(600),
    };

    fn metadata(key: &'static str, value: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert(key, value.parse().expect("ascii"));
        metadata
    }

    fn budget(call: &Call) -> Duration {
        call.deadline - call.arrived
    }

    #[test]
    fn the_field_beats_the_header_and_both_beat_a_made_up_id() {
        let header = metadata(REQUEST_ID, "from-header");
        let id = |metadata: &MetadataMap, asked| {
            Call::begin(metadata, asked, DEADLINES).expect("begins").id
        };
        assert_eq!(id(&header, "from:field_1.a"), "from:field_1.a");
        assert_eq!(id(&header, ""), "from-header");
        let made_up = id(&MetadataMap::new(), "");
        assert_eq!(made_up.len(), 36);
        assert_ne!(made_up, id(&MetadataMap::new(), ""));
    }

    #[test]
    fn an_id_that_could_break_a_log_or_a_header_is_refused() {
        let long = "x".repeat(129);
        let huge = "x".repeat(64 << 10);
        for id in [
            "a\r\nb",
            "a b",
            "é",
            "a\0",
            "../x",
            "a/b",
            long.as_str(),
            huge.as_str(),
        ] {
            let status = Call::begin(&MetadataMap::new(), id, DEADLINES).expect_err("refused");
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().starts_with("input.request_id: "));
        }
        let longest = "x".repeat(128);
        assert!(Call::begin(&MetadataMap::new(), &longest, DEADLINES).is_ok());
        let status = Call::begin(&metadata(REQUEST_ID, "a b"), "", DEADLINES).expect_err("refused");
        assert!(status.message().starts_with("x-request-id: "));
    }

    #[test]
    fn a_deadline_is_the_callers_up_to_the_cap() {
        let begin = |value: &str| Call::begin(&metadata(TIMEOUT, value), "", DEADLINES);
        let default = Call::begin(&MetadataMap::new(), "", DEADLINES).expect("begins");
        assert_eq!(budget(&default), DEADLINES.default - MAX_HEADSTART);
        assert_eq!(
            budget(&begin("5S").expect("begins")),
            Duration::from_millis(4980)
        );
        assert_eq!(
            budget(&begin("100m").expect("begins")),
            Duration::from_millis(95)
        );
        assert_eq!(
            budget(&begin("99999999H").expect("begins")),
            DEADLINES.max - MAX_HEADSTART
        );
        assert_eq!(budget(&begin("0n").expect("begins")), Duration::ZERO);
    }

    #[test]
    fn a_deadline_that_cannot_be_read_is_refused() {
        for value in [
            "",
            "S",
            "5",
            "5s",
            "-5S",
            "1.5S",
            "+5S",
            "123456789S",
            "5 S",
            " ",
        ] {
            let status =
                Call::begin(&metadata(TIMEOUT, value), "", DEADLINES).expect_err("refused");
            assert_eq!(status.code(), Code::InvalidArgument, "{value:?}");
        }
    }
}
