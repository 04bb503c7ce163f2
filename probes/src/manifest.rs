//! What a probe file says about itself: what it reads, what it was fitted on, how it did.
//! Plain data and its checks; knows no tensors and no files.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::gather::{Gather, GatherChoice, MAX_ATTENTION_HEADS};
use crate::site::Site;

/// The version of the manifest that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;
pub const MAX_D_MODEL: usize = 65_536;
pub const MAX_HEAD_OUTPUTS: usize = 1_024;
const MAX_HEADS: usize = 64;
const MAX_GATHERS: usize = 16;
const MAX_CANARIES: usize = 256;
const MAX_CANARY_TOKENS: usize = 8_192;
/// Fewer canaries than this prove nothing about a weight format.
pub const MIN_CANARIES: usize = 8;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    /// `[a-z0-9][a-z0-9_.-]{0,63}`
    pub name: String,
    pub kind: Kind,
    pub d_model: usize,
    /// In the order in which head outputs are handed to `Finisher::finish`.
    pub heads: Vec<HeadSpec>,
    pub combine: Combine,
    pub positions: Positions,
    /// The gathers that make sense for this probe; each may have a calibration.
    pub gathers: Vec<Gather>,
    pub calibrations: Vec<Calibration>,
    pub model: ModelIdentity,
    pub trained_on: TrainedOn,
    pub canaries: Vec<Canary>,
    /// The standard deviation of the logits over the calibration rows. Canaries are judged in it.
    pub calibration_logit_std: f32,
    pub record: Record,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Logistic,
    DifferenceOfMeans,
    Lda,
    TwoLayer,
    /// With `h` attention heads the outputs are `h` values, then their `h` keys.
    Attention,
}

/// How the outputs of several heads become one token's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Output by output.
    Sum,
    /// The sum is a hidden layer: ReLU, then a second linear layer (SafeSwitch's prober).
    TwoLayer,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadSpec {
    pub site: Site,
    pub out: usize,
    pub norm: NormKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    None,
    Standard,
    Unit,
}

/// Which tokens a probe reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Positions {
    LastPromptToken,
    /// The content tokens of the last user turn and the template's tail.
    PromptContent,
    /// The pass that consumes generated token `k`, counted from 1.
    Generated(u32),
    /// Generated tokens 1 to `k` together, known once `k` is: the first words of an answer.
    FirstGenerated(u32),
    EveryGenerated,
}

impl Positions {
    /// Whether the probe scores many tokens of a request, so that gathering matters.
    pub fn per_token(&self) -> bool {
        match self {
            Self::PromptContent | Self::FirstGenerated(_) | Self::EveryGenerated => true,
            Self::LastPromptToken | Self::Generated(_) => false,
        }
    }

    /// Whether these are tokens of an answer.
    pub fn of_answer(&self) -> bool {
        match self {
            Self::LastPromptToken | Self::PromptContent => false,
            Self::Generated(_) | Self::FirstGenerated(_) | Self::EveryGenerated => true,
        }
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastPromptToken => f.write_str("last_prompt_token"),
            Self::PromptContent => f.write_str("prompt_content"),
            Self::Generated(k) => write!(f, "generated{{{k}}}"),
            Self::FirstGenerated(k) => write!(f, "generated{{1..{k}}}"),
            Self::EveryGenerated => f.write_str("every_generated"),
        }
    }
}

impl FromStr for Positions {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let generated = |text: &str| {
            let inner = text.strip_prefix("generated{")?.strip_suffix('}')?;
            let (first, k) = match inner.strip_prefix("1..") {
                Some(k) => (true, k),
                None => (false, inner),
            };
            let k = k.parse().ok().filter(|k| *k >= 1)?;
            Some(if first {
                Self::FirstGenerated(k)
            } else {
                Self::Generated(k)
            })
        };
        match text {
            "last_prompt_token" => Ok(Self::LastPromptToken),
            "prompt_content" => Ok(Self::PromptContent),
            "every_generated" => Ok(Self::EveryGenerated),
            _ => generated(text).ok_or_else(|| {
                Error::invalid(
                    "positions",
                    format!(
                        "unknown positions {:?}; expected last_prompt_token, prompt_content, \
                         generated{{3}} (counted from 1), generated{{1..3}} or every_generated",
                        text.chars().take(80).collect::<String>()
                    ),
                )
            }),
        }
    }
}

impl TryFrom<String> for Positions {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Positions> for String {
    fn from(positions: Positions) -> Self {
        positions.to_string()
    }
}

/// The model that an artefact was made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    pub name: String,
    /// Hash of config, tokenizer and template: another architecture is refused.
    pub architecture_id: String,
    /// SHA-256 of the source weights: others make the artefact unverified.
    pub weights_id: String,
    /// The format in which the weights ran when the artefact was made, e.g. `f32` or `q8_0`.
    pub weight_format: String,
}

/// How an artefact stands to the loaded model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    /// Made on exactly these weights.
    Native,
    /// Same architecture, other weights or another format: may enforce only after its canaries
    /// pass.
    Unverified,
}

impl ModelIdentity {
    /// Refuses another architecture, and tells the same weights from others.
    pub fn against(&self, architecture_id: &str, weights_id: &str) -> Result<Verification> {
        if self.architecture_id != architecture_id {
            return Err(Error::ModelMismatch {
                field: "model.architecture_id".to_owned(),
                made_for: self.architecture_id.clone(),
                loaded: architecture_id.to_owned(),
            });
        }
        Ok(if self.weights_id == weights_id {
            Verification::Native
        } else {
            Verification::Unverified
        })
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_title("model.name", &self.name)?;
        check_id("model.architecture_id", &self.architecture_id)?;
        check_id("model.weights_id", &self.weights_id)?;
        check_id("model.weight_format", &self.weight_format)
    }
}

/// The requests that the probe saw in training; others are out of its domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainedOn {
    pub template_hash: String,
    pub system_prompt_rule: SystemPromptRule,
    /// How many turns the chats had.
    pub turns: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SystemPromptRule {
    /// No system prompt at all.
    None,
    /// Whatever the template puts there when the request has none.
    Default,
    /// One text, by its SHA-256.
    TextHash(String),
}

/// A token sequence whose logit is known: the probe's check in another weight format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    pub tokens: Vec<u32>,
    /// Where in `tokens` the probe is read, counted from 0.
    pub position: usize,
    /// The token's logit there, before any gather.
    pub logit: f32,
    pub positive: bool,
}

/// How the artefact came to be, and how well it did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub data: Vec<DataRecord>,
    pub seed: u64,
    pub metrics: BTreeMap<String, Metric>,
    pub command: String,
    pub note: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    pub name: String,
    pub sha256: String,
    pub rows: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    pub value: f64,
    /// 95 %.
    pub interval: Option<[f64; 2]>,
}

/// Why a probe may not enforce on these weights.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CanaryFailure {
    #[error(
        "canaries: {positive} positive and {negative} negative; at least {MIN_CANARIES} of both \
         signs are needed; fit the probe again with canaries"
    )]
    TooFew { positive: usize, negative: usize },
    #[error("canaries: {got} logits for {expected} canaries")]
    Count { expected: usize, got: usize },
    #[error(
        "canary {index}: logit {got} instead of {expected} (at most {tolerance} apart); \
         the probe does not hold in this weight format: fit it again there"
    )]
    Off {
        index: usize,
        expected: f32,
        got: f32,
        tolerance: f32,
    },
}

impl Manifest {
    /// A manifest that says what is read and leaves the rest to be filled in.
    pub fn new(
        name: &str,
        kind: Kind,
        d_model: usize,
        positions: Positions,
        model: ModelIdentity,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            name: name.to_owned(),
            kind,
            d_model,
            heads: Vec::new(),
            combine: match kind {
                Kind::TwoLayer => Combine::TwoLayer,
                _ => Combine::Sum,
            },
            positions,
            gathers: vec![match kind {
                Kind::Attention => Gather::Attention,
                _ => Gather::Last,
            }],
            calibrations: Vec::new(),
            model,
            trained_on: TrainedOn {
                template_hash: String::new(),
                system_prompt_rule: SystemPromptRule::Default,
                turns: 1,
            },
            canaries: Vec::new(),
            calibration_logit_std: 1.0,
            record: Record::default(),
        }
    }

    /// How many attention heads are gathered side by side; 0 for other kinds.
    pub fn attention_heads(&self) -> usize {
        match self.kind {
            Kind::Attention => self.heads.first().map_or(0, |head| head.out / 2),
            _ => 0,
        }
    }

    /// The gather that a policy's choice means for this probe.
    pub fn gather(&self, choice: &GatherChoice) -> Result<Gather> {
        let calibrated = self.calibrations.iter().map(|c| &c.gather);
        calibrated
            .chain(&self.gathers)
            .find(|gather| choice.admits(gather))
            .copied()
            .ok_or_else(|| Error::NotCalibrated {
                field: format!("probe `{}`", self.name),
                wanted: format!("gather `{choice}`"),
                available: listed(&self.gathers),
            })
    }

    /// The calibration of the pair (this probe, `gather`).
    pub fn calibration(&self, gather: &Gather) -> Result<&Calibration> {
        self.calibrations
            .iter()
            .find(|calibration| calibration.gather == *gather)
            .ok_or_else(|| Error::NotCalibrated {
                field: format!("probe `{}`", self.name),
                wanted: format!("gather `{gather}`"),
                available: listed(self.calibrations.iter().map(|c| &c.gather)),
            })
    }

    /// Whether these weights reproduce the canaries: at least 8, of both signs, each logit within
    /// 0.1 standard deviations of the calibration logits. `logits` in the order of `canaries`.
    pub fn canaries_pass(&self, logits: &[f32]) -> Result<(), CanaryFailure> {
        let positive = self.canaries.iter().filter(|c| c.positive).count();
        let negative = self.canaries.len() - positive;
        if self.canaries.len() < MIN_CANARIES || positive == 0 || negative == 0 {
            return Err(CanaryFailure::TooFew { positive, negative });
        }
        if logits.len() != self.canaries.len() {
            return Err(CanaryFailure::Count {
                expected: self.canaries.len(),
                got: logits.len(),
            });
        }
        let tolerance = 0.1 * self.calibration_logit_std;
        for (index, (canary, got)) in self.canaries.iter().zip(logits).enumerate() {
            // Written so that a NaN does not pass.
            let close = (got - canary.logit).abs() <= tolerance;
            if !close {
                return Err(CanaryFailure::Off {
                    index,
                    expected: canary.logit,
                    got: *got,
                    tolerance,
                });
            }
        }
        Ok(())
    }

    /// Everything that can be said without the tensors.
    pub fn check(&self) -> Result<()> {
        check_version(self.format_version)?;
        check_name("name", &self.name)?;
        check_between("d_model", self.d_model, 1, MAX_D_MODEL)?;
        check_between("heads", self.heads.len(), 1, MAX_HEADS)?;
        check_between("gathers", self.gathers.len(), 1, MAX_GATHERS)?;
        self.check_outputs()?;
        self.check_gathers()?;
        self.model.check()?;
        for (index, canary) in self.canaries.iter().take(MAX_CANARIES + 1).enumerate() {
            canary.check(index)?;
        }
        check_between("canaries", self.canaries.len(), 0, MAX_CANARIES)?;
        if !(self.calibration_logit_std.is_finite() && self.calibration_logit_std > 0.0) {
            return Err(Error::invalid(
                "calibration_logit_std",
                "must be finite and above 0; a probe whose logits do not vary tells nothing",
            ));
        }
        self.record.check()
    }

    fn check_outputs(&self) -> Result<()> {
        let two_layer = self.combine == Combine::TwoLayer;
        if two_layer != (self.kind == Kind::TwoLayer) {
            return Err(Error::invalid(
                "combine",
                "two_layer goes with the kind two_layer, sum with every other kind",
            ));
        }
        let out = self.heads.first().map_or(0, |head| head.out);
        check_between("heads[0].out", out, 1, MAX_HEAD_OUTPUTS)?;
        if self.kind == Kind::Attention
            && !(out.is_multiple_of(2) && (1..=MAX_ATTENTION_HEADS).contains(&(out / 2)))
        {
            return Err(Error::invalid(
                "heads[0].out",
                format!(
                    "is {out}, but attention needs a value and a key for each of 1 to \
                     {MAX_ATTENTION_HEADS} attention heads"
                ),
            ));
        }
        let expected = match self.kind {
            Kind::TwoLayer | Kind::Attention => out,
            Kind::Logistic | Kind::DifferenceOfMeans | Kind::Lda => 1,
        };
        for (index, head) in self.heads.iter().enumerate() {
            if head.out != expected {
                return Err(Error::invalid(
                    format!("heads[{index}].out"),
                    format!(
                        "is {}, but this kind of probe needs {expected} in every head",
                        head.out
                    ),
                ));
            }
        }
        Ok(())
    }

    fn check_gathers(&self) -> Result<()> {
        for (index, gather) in self.gathers.iter().enumerate() {
            gather.check()?;
            let field = || format!("gathers[{index}]");
            if *gather == Gather::Attention && self.kind != Kind::Attention {
                return Err(Error::invalid(
                    field(),
                    "attention needs a probe of kind attention, which has a key",
                ));
            }
            if self.gathers[..index].contains(gather) {
                return Err(Error::invalid(field(), format!("`{gather}` appears twice")));
            }
        }
        check_between("calibrations", self.calibrations.len(), 0, MAX_GATHERS)?;
        for (index, calibration) in self.calibrations.iter().enumerate() {
            let field = format!("calibrations[{index}]");
            calibration.check(&field)?;
            if !self.gathers.contains(&calibration.gather) {
                return Err(Error::invalid(
                    format!("{field}.gather"),
                    format!("`{}` is not among the probe's gathers", calibration.gather),
                ));
            }
            let earlier = &self.calibrations[..index];
            if earlier.iter().any(|c| c.gather == calibration.gather) {
                return Err(Error::invalid(
                    format!("{field}.gather"),
                    format!("`{}` is calibrated twice", calibration.gather),
                ));
            }
        }
        Ok(())
    }
}

fn listed<'a>(gathers: impl IntoIterator<Item = &'a Gather>) -> String {
    let names: Vec<_> = gathers.into_iter().map(|g| format!("`{g}`")).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl Canary {
    fn check(&self, index: usize) -> Result<()> {
        let field = format!("canaries[{index}]");
        check_between(
            &format!("{field}.tokens"),
            self.tokens.len(),
            1,
            MAX_CANARY_TOKENS,
        )?;
        if self.position >= self.tokens.len() {
            return Err(Error::invalid(
                format!("{field}.position"),
                format!(
                    "{} is beyond its {} tokens",
                    self.position,
                    self.tokens.len()
                ),
            ));
        }
        if !self.logit.is_finite() {
            return Err(Error::invalid(format!("{field}.logit"), "must be finite"));
        }
        Ok(())
    }
}

impl Record {
    pub(crate) fn check(&self) -> Result<()> {
        for (name, metric) in &self.metrics {
            let interval = metric.interval.unwrap_or([0.0, 0.0]);
            if !(metric.value.is_finite() && interval.iter().all(|x| x.is_finite())) {
                return Err(Error::invalid(
                    format!("record.metrics.{}", name.escape_default()),
                    "must be finite",
                ));
            }
        }
        Ok(())
    }
}

pub(crate) fn check_version(version: u32) -> Result<()> {
    if version == FORMAT_VERSION {
        return Ok(());
    }
    Err(Error::invalid(
        "format_version",
        format!(
            "is {version}, but this build reads version {FORMAT_VERSION}; \
             save the file again with a matching build"
        ),
    ))
}

/// Refuses every name that could mean a path or hide in a log: `[a-z0-9][a-z0-9_.-]{0,63}`.
pub fn check_name(field: &str, name: &str) -> Result<()> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    let fits = bytes.len() <= 64
        && bytes.first().is_some_and(|c| plain(*c))
        && bytes.iter().all(|c| plain(*c) || b"_.-".contains(c));
    if fits {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(Error::invalid(
        field,
        format!(
            "{shown:?} is not a name; use 1 to 64 of a-z, 0-9, `_`, `.`, `-`, \
             beginning with a letter or a digit"
        ),
    ))
}

/// Identifiers are shown in logs and compared, so they are short and printable.
fn check_id(field: &str, id: &str) -> Result<()> {
    if (1..=256).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        "must be 1 to 256 printable ASCII characters without spaces",
    ))
}

/// A model file names itself as it likes, spaces included.
fn check_title(field: &str, title: &str) -> Result<()> {
    let shown = |c: char| !c.is_control();
    if (1..=256).contains(&title.len()) && title.chars().all(shown) {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        "must be 1 to 256 bytes without control characters",
    ))
}

pub(crate) fn check_between(field: &str, got: usize, low: usize, high: usize) -> Result<()> {
    if (low..=high).contains(&got) {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!("is {got}, but must lie between {low} and {high}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::manifest;

    #[test]
    fn canaries_pass_within_a_tenth_of_a_standard_deviation() {
        let manifest = manifest(Kind::Logistic);
        let exact: Vec<f32> = manifest.canaries.iter().map(|c| c.logit).collect();
        assert_eq!(manifest.canaries_pass(&exact), Ok(()));
        let near: Vec<f32> = exact.iter().map(|l| l + 0.19).collect();
        assert_eq!(manifest.canaries_pass(&near), Ok(()));
        for bad in [exact[3] + 0.21, f32::NAN, f32::INFINITY] {
            let mut logits = exact.clone();
            logits[3] = bad;
            assert!(matches!(
                manifest.canaries_pass(&logits),
                Err(CanaryFailure::Off { index: 3, .. })
            ));
        }
        assert_eq!(
            manifest.canaries_pass(&exact[..7]),
            Err(CanaryFailure::Count {
                expected: 8,
                got: 7
            })
        );
    }

    #[test]
    fn too_few_canaries_or_one_sign_prove_nothing() {
        let mut manifest = manifest(Kind::Logistic);
        let logits: Vec<f32> = manifest.canaries.iter().map(|c| c.logit).collect();
        manifest.canaries.iter_mut().for_each(|c| c.positive = true);
        let one_sign = CanaryFailure::TooFew {
            positive: 8,
            negative: 0,
        };
        assert_eq!(manifest.canaries_pass(&logits), Err(one_sign));
        manifest.canaries.clear();
        let none = CanaryFailure::TooFew {
            positive: 0,
            negative: 0,
        };
        assert_eq!(manifest.canaries_pass(&[]), Err(none));
    }

    #[test]
    fn a_bare_gather_means_the_calibrated_one() {
        let mut manifest = manifest(Kind::Logistic);
        let (slow, fast) = (Gather::Ema { a: 0.1 }, Gather::Ema { a: 0.5 });
        manifest.gathers = vec![Gather::Last, slow, fast];
        manifest.calibrations[0].gather = fast;
        assert_eq!(manifest.gather(&GatherChoice::Ema), Ok(fast));
        assert_eq!(manifest.gather(&GatherChoice::Exact(slow)), Ok(slow));
        let message = manifest
            .gather(&GatherChoice::KOfN)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("`last`, `ema{0.1}`, `ema{0.5}`"),
            "{message}"
        );
        assert!(manifest.calibration(&fast).is_ok());
        let message = manifest.calibration(&slow).unwrap_err().to_string();
        assert!(message.contains("the probe has `ema{0.5}`"), "{message}");
    }

    #[test]
    fn positions_round_trip_through_their_names() {
        for positions in [
            Positions::LastPromptToken,
            Positions::PromptContent,
            Positions::Generated(3),
            Positions::FirstGenerated(3),
            Positions::EveryGenerated,
        ] {
            assert_eq!(positions.to_string().parse::<Positions>(), Ok(positions));
        }
        for text in [
            "generated{0}",
            "generated{-1}",
            "generated{}",
            "generated{1..}",
            "generated{1..0}",
            "generated{2..3}",
            "generated",
            "all",
            "",
        ] {
            assert!(text.parse::<Positions>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_manifest_round_trips_through_json() {
        for kind in [Kind::Logistic, Kind::Attention, Kind::TwoLayer] {
            let manifest = manifest(kind);
            let json = serde_json::to_string(&manifest).unwrap();
            assert_eq!(serde_json::from_str::<Manifest>(&json).unwrap(), manifest);
        }
    }

    #[test]
    fn attention_has_a_value_and_a_key_for_each_head() {
        let manifest = |outs: &[usize]| {
            let mut manifest = crate::testing::attention().manifest().clone();
            let head = manifest.heads[0].clone();
            let of = |out: &usize| HeadSpec {
                out: *out,
                ..head.clone()
            };
            manifest.heads = outs.iter().map(of).collect();
            manifest
        };
        for heads in 1..=MAX_ATTENTION_HEADS {
            let manifest = manifest(&[2 * heads, 2 * heads]);
            assert_eq!(manifest.check(), Ok(()));
            assert_eq!(manifest.attention_heads(), heads);
        }
        for (outs, field, reason) in [
            (&[5][..], "heads[0].out", "is 5"),
            (&[34], "heads[0].out", "1 to 16 attention heads"),
            (&[4, 2], "heads[1].out", "needs 4 in every head"),
        ] {
            let message = manifest(outs).check().unwrap_err().to_string();
            assert!(
                message.contains(field) && message.contains(reason),
                "{message}"
            );
        }
    }

    #[test]
    fn identities_are_short_and_printable() {
        let mut manifest = crate::testing::logistic().manifest().clone();
        assert!(manifest.check().is_ok());
        for id in ["", "a b", "a\nb", &"x".repeat(257)] {
            manifest.model.weights_id = id.to_owned();
            assert!(
                manifest
                    .check()
                    .unwrap_err()
                    .to_string()
                    .contains("model.weights_id")
            );
        }
    }

    #[test]
    fn a_models_name_may_have_spaces_but_no_control_characters() {
        let mut manifest = crate::testing::logistic().manifest().clone();
        manifest.model.name = "Gemma 3 270m It".into();
        assert!(manifest.check().is_ok());
        for name in ["", "a\nb", &"x".repeat(257)] {
            manifest.model.name = name.to_owned();
            assert!(manifest.check().is_err());
        }
    }
}
