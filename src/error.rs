//! What can go wrong, one variant per party who must act.
//! Knows nothing of gRPC; `rpc/status.rs` holds the one table from here to status codes.

use std::time::Duration;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The caller must change the named field. Never echoes prompt text.
    #[error("{field}: {message}")]
    InvalidRequest { field: String, message: String },

    /// The prompt and the answer asked for do not fit the context.
    #[error("{field}: {got} tokens, but the context holds {limit}; {remedy}")]
    ContextLength {
        field: String,
        got: usize,
        limit: usize,
        remedy: String,
    },

    /// The caller named something that is not loaded.
    #[error("{field}: no {kind} is named `{name}`; {remedy}")]
    NotFound {
        field: String,
        kind: &'static str,
        name: String,
        remedy: String,
    },

    /// The caller asked for a feature that is not there.
    #[error("{field}: {message}")]
    Unsupported { field: String, message: String },

    /// The request id is in flight.
    #[error("request_id: `{0}` is in flight; wait for it or choose another")]
    AlreadyExists(String),

    /// The caller may try again after a pause.
    #[error("{message}; try again in {} ms", retry_after.as_millis())]
    Overloaded {
        message: String,
        retry_after: Duration,
    },

    /// The server is going away or not yet there: another replica may answer.
    #[error("{0}")]
    Unavailable(String),

    #[error("the deadline passed after {queue_ms} ms in the queue and {tokens_done} tokens")]
    DeadlineExceeded { queue_ms: u64, tokens_done: u32 },

    /// Nobody is listening any more.
    #[error("the request was cancelled")]
    Cancelled,

    /// The policy aborted the request before its first token.
    #[error("aborted by the policy")]
    AbortedByPolicy,

    /// A probe failed while its rule was enforcing, before the first token.
    #[error("monitor failed: probe `{probe}`: {reason}")]
    MonitorFailed { probe: String, reason: String },

    /// The loaded model, probe or policy does not allow it.
    #[error("{subject}: {message}")]
    FailedPrecondition { subject: String, message: String },

    /// The operator must change a flag, an environment variable or the configuration file.
    #[error("{0}")]
    Config(String),

    /// The operator must change a file. `file` names it, `message` says what is wrong and what helps.
    #[error("{file}: {message}")]
    File { file: String, message: String },

    /// A bug in Inwit, or a machine at its end.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidRequest {
            field: field.into(),
            message: message.into(),
        }
    }

    pub fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            message: message.into(),
        }
    }

    pub fn file(file: impl std::fmt::Display, message: impl std::fmt::Display) -> Self {
        Self::File {
            file: file.to_string(),
            message: message.to_string(),
        }
    }

    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::Internal(message.to_string())
    }
}

impl Error {
    /// A word for records and metrics; no details.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InvalidRequest { .. } => "invalid_request",
            Self::ContextLength { .. } => "context_length",
            Self::NotFound { .. } => "not_found",
            Self::Unsupported { .. } => "unsupported",
            Self::AlreadyExists(_) => "already_exists",
            Self::Overloaded { .. } => "overloaded",
            Self::Unavailable(_) => "unavailable",
            Self::DeadlineExceeded { .. } => "deadline_exceeded",
            Self::Cancelled => "cancelled",
            Self::AbortedByPolicy => "aborted_by_policy",
            Self::MonitorFailed { .. } => "monitor_failed",
            Self::FailedPrecondition { .. } => "failed_precondition",
            Self::Config(_) => "config",
            Self::File { .. } => "file",
            Self::Internal(_) => "internal",
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(error.to_string())
    }
}
