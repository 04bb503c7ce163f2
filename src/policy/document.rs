//! The policy document: TOML as people write it. Knows no probes; `compile` gives the names a meaning.
//!
//! ```toml
//! name = "careful"               # optional
//! out_of_domain = "serve"        # or "refuse", or { refuse = "text" }
//!
//! [[detector]]
//! name = "harmful-prompt"
//! probe = "prompt_harm"
//! gather = "attention"           # unset: the first that the probe is calibrated for
//! at_fpr = 0.01                  # or threshold (a probability), or threshold_logit; unset: 0.5
//! answer_tokens = 256            # with at_fpr, where the probe reads every generated token
//!
//! [[rule]]
//! name = "harmful-compliance"
//! when = { product = ["harmful-prompt", "complies"], at_fpr = 0.01 }
//! action = "refusal_head"
//! hold_back = 3
//! on_failure = "closed"
//!
//! [[product_threshold]]          # what `at_fpr` of a product refers to
//! detectors = ["harmful-prompt", "complies"]
//! fpr = 0.01
//! threshold = 0.31
//! interval = [0.004, 0.02]
//! n = 2000
//! ```
//!
//! A detector or a product without a threshold has 0.5, SafeSwitch's tau (arXiv 2502.01042), on the
//! calibrated probability or on the product of them.

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{OnFailure, SteerPositions};
use crate::error::{Error, Result};

/// SafeSwitch's tau.
pub const DEFAULT_THRESHOLD: f32 = 0.5;
/// No policy document is longer.
pub const MAX_DOCUMENT_BYTES: usize = 1 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) out_of_domain: OutOfDomainText,
    #[serde(default)]
    pub(super) detector: Vec<DetectorText>,
    #[serde(default)]
    pub(super) rule: Vec<RuleText>,
    #[serde(default)]
    pub(super) product_threshold: Vec<ProductThreshold>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DetectorText {
    pub(super) name: String,
    pub(super) probe: String,
    pub(super) gather: Option<String>,
    pub(super) at_fpr: Option<f64>,
    pub(super) threshold: Option<f32>,
    pub(super) threshold_logit: Option<f32>,
    pub(super) answer_tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleText {
    pub(super) name: String,
    pub(super) when: WhenText,
    pub(super) action: ActionText,
    #[serde(default)]
    pub(super) hold_back: u32,
    #[serde(default)]
    pub(super) on_failure: OnFailure,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WhenText {
    pub(super) detector: Option<String>,
    pub(super) product: Option<Vec<String>>,
    pub(super) all: Option<Vec<String>>,
    pub(super) at_fpr: Option<f64>,
    pub(super) threshold: Option<f32>,
}

/// A threshold calibrated on the product itself, since the stages depend on each other.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProductThreshold {
    pub(super) detectors: Vec<String>,
    pub(super) fpr: f64,
    pub(super) threshold: f32,
    /// 95 % interval of the rate on the `n` benign requests.
    pub(super) interval: Option<[f64; 2]>,
    pub(super) n: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) enum OutOfDomainText {
    #[default]
    Serve,
    /// With the server's own words where none are given.
    Refuse(Option<String>),
}

#[derive(Debug)]
pub(super) enum ActionText {
    Flag,
    Abort,
    Refuse(String),
    RefusalHead {
        /// Unset: the only one there is.
        head: Option<String>,
        strength: Option<f32>,
    },
    Steer(SteerText),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SteerText {
    pub(super) vector: String,
    #[serde(default)]
    pub(super) kind: SteerKindText,
    pub(super) strength: Option<f32>,
    pub(super) site: Option<String>,
    #[serde(default)]
    pub(super) positions: SteerPositions,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SteerKindText {
    #[default]
    Add,
    ProjectOut,
    ClampAbove,
    ClampBelow,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionTable {
    refuse: Option<String>,
    refusal_head: Option<String>,
    strength: Option<f32>,
    steer: Option<SteerText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OutOfDomainTable {
    refuse: String,
}

impl Document {
    /// Errors name the policy, and the line that is wrong.
    pub(super) fn parse(policy: &str, text: &str) -> Result<Self> {
        let subject = || format!("policy `{policy}`");
        if text.len() > MAX_DOCUMENT_BYTES {
            return Err(Error::invalid(
                subject(),
                format!("is longer than {MAX_DOCUMENT_BYTES} bytes; split it into several"),
            ));
        }
        toml::from_str(text).map_err(|e| Error::invalid(subject(), e.to_string().trim_end()))
    }
}

impl ActionTable {
    fn action(self) -> Result<ActionText, &'static str> {
        match (self.refuse, self.refusal_head, self.steer, self.strength) {
            (Some(text), None, None, None) => Ok(ActionText::Refuse(text)),
            (None, Some(head), None, strength) => Ok(ActionText::RefusalHead {
                head: Some(head),
                strength,
            }),
            (None, None, Some(steer), None) => Ok(ActionText::Steer(steer)),
            (None, None, Some(_), Some(_)) => {
                Err("write the strength of a steer action inside `steer = { … }`")
            }
            (Some(_), None, None, Some(_)) => Err("`refuse` has no strength; leave it away"),
            _ => Err("name exactly one of `refuse`, `refusal_head` and `steer`"),
        }
    }
}

impl<'de> Deserialize<'de> for ActionText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ActionVisitor;

        impl<'de> Visitor<'de> for ActionVisitor {
            type Value = ActionText;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(
                    "\"flag\", \"refusal_head\", \"abort\", { refuse = \"text\" }, \
                     { refusal_head = \"name\" } or { steer = { vector = \"name\", … } }",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ActionText, E> {
                match text {
                    "flag" => Ok(ActionText::Flag),
                    "abort" => Ok(ActionText::Abort),
                    "refusal_head" => Ok(ActionText::RefusalHead {
                        head: None,
                        strength: None,
                    }),
                    "refuse" => Err(E::custom(
                        "`refuse` needs its text; write action = { refuse = \"text\" }",
                    )),
                    "steer" => Err(E::custom(
                        "`steer` needs its vector; write action = { steer = { vector = \"name\", \
                         strength = 1.0 } }",
                    )),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ActionText, A::Error> {
                let table = ActionTable::deserialize(MapAccessDeserializer::new(map))?;
                table.action().map_err(A::Error::custom)
            }
        }

        deserializer.deserialize_any(ActionVisitor)
    }
}

impl<'de> Deserialize<'de> for OutOfDomainText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OutOfDomainVisitor;

        impl<'de> Visitor<'de> for OutOfDomainVisitor {
            type Value = OutOfDomainText;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"serve\", \"refuse\" or { refuse = \"text\" }")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<OutOfDomainText, E> {
                match text {
                    "serve" => Ok(OutOfDomainText::Serve),
                    "refuse" => Ok(OutOfDomainText::Refuse(None)),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OutOfDomainText, A::Error> {
                let table = OutOfDomainTable::deserialize(MapAccessDeserializer::new(map))?;
                Ok(OutOfDomainText::Refuse(Some(table.refuse)))
            }
        }

        deserializer.deserialize_any(OutOfDomainVisitor)
    }
}
