//! What can go wrong with a probe: which file or field, and what helps.
//! Knows nothing of transports; whoever serves the probe maps these to its own codes.

use std::path::Path;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A value is wrong: `field` says which, `message` says why and what helps.
    #[error("{field}: {message}")]
    Invalid { field: String, message: String },

    /// Anything that is wrong inside the named file.
    #[error("{file}: {source}")]
    InFile {
        file: String,
        #[source]
        source: Box<Error>,
    },

    /// The operating system refused the file.
    #[error("{file}: {message}")]
    Io { file: String, message: String },

    /// The artefact was made for another model.
    #[error(
        "{field}: made for `{made_for}`, but the loaded model is `{loaded}`; \
         fit it again on the loaded model, or load the model it was made for"
    )]
    ModelMismatch {
        field: String,
        made_for: String,
        loaded: String,
    },

    /// The probe has no calibration, or no operating point, of that kind.
    #[error("{field}: not calibrated for {wanted}; the probe has {available}")]
    NotCalibrated {
        field: String,
        wanted: String,
        available: String,
    },

    /// The data cannot be fitted, calibrated or evaluated.
    #[error("{field}: {message}")]
    Data { field: String, message: String },
}

impl Error {
    pub(crate) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            message: message.into(),
        }
    }

    pub(crate) fn data(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Data {
            field: field.into(),
            message: message.into(),
        }
    }

    pub(crate) fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::Io {
            file: path.display().to_string(),
            message: error.to_string(),
        }
    }

    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::InFile { .. } => self,
            source => Self::InFile {
                file: path.display().to_string(),
                source: Box::new(source),
            },
        }
    }
}

/// Why a row could not be scored. A failed score is never a low score:
/// the rule that needs it fails closed or open, as its mode says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ScoreFailure {
    #[error("a hidden state or a score is not finite")]
    NotFinite,
    #[error("the number of head outputs or hidden values does not fit the probe")]
    Shape,
    #[error("an attention gather needs a probe with a value and a key")]
    MissingKey,
}
