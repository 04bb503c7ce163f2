//! Gives the names of a policy document their meaning: indices, thresholds on logits, checked numbers.
//! Knows what is loaded by name only; nothing that compiles can fail for its names or numbers later.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use inwit_probes::manifest::check_name;
use inwit_probes::{Calibration, GatherChoice, Manifest, Positions, Site};
use sha2::{Digest, Sha256};

use super::document::{
    ActionText, DEFAULT_THRESHOLD, DetectorText, Document, OutOfDomainText, ProductThreshold,
    RuleText, SteerKindText, SteerText, WhenText,
};
use super::{Detector, OutOfDomain, Policy, Rule, RuleAction, SteerKind, When};
use crate::error::{Error, Result};

/// The most tokens that a rule may hold back.
pub const MAX_HOLD_BACK: u32 = 64;
/// The largest strength of a vector or a head; a larger one only breaks the model.
pub const MAX_STRENGTH: f32 = 1000.0;

const MAX_DETECTORS: usize = 256;
const MAX_RULES: usize = 256;
const MAX_CONJUNCTS: usize = 16;
const MAX_REFUSAL_BYTES: usize = 16 * 1024;
const REFUSED_OUT_OF_DOMAIN: &str = "I can't answer this request in the form it was sent.";

/// What a policy may name.
#[derive(Clone, Debug, Default)]
pub struct Catalog<'a> {
    /// In the order of the snapshot's probes.
    pub probes: Vec<&'a Manifest>,
    /// With the site that each was made for.
    pub vectors: BTreeMap<&'a str, Site>,
    pub heads: BTreeSet<&'a str>,
    pub n_layers: usize,
}

impl Policy {
    /// `name` is used where the document gives none. Errors are `InvalidRequest` whose field names
    /// the policy and the detector or rule.
    pub fn parse_and_compile(
        name: &str,
        revision: u64,
        document: &str,
        catalog: &Catalog<'_>,
    ) -> Result<Self> {
        let parsed = Document::parse(name, document)?;
        let name = parsed.name.as_deref().unwrap_or(name).to_owned();
        check_name("policy", &name).map_err(|e| Error::invalid("policy", last_part(&e)))?;
        let compiler = Compiler {
            policy: &name,
            catalog,
            document: &parsed,
        };
        compiler.check_counts()?;
        let detectors = compiler.detectors()?;
        compiler.check_product_thresholds()?;
        let rules = compiler.rules()?;
        let out_of_domain = compiler.out_of_domain()?;
        Ok(Self {
            hash: hash_of(document),
            document: document.to_owned(),
            name,
            revision,
            detectors,
            rules,
            out_of_domain,
        })
    }
}

pub(super) fn hash_of(document: &str) -> String {
    hex::encode(Sha256::digest(document))
}

struct Compiler<'a> {
    policy: &'a str,
    catalog: &'a Catalog<'a>,
    document: &'a Document,
}

impl Compiler<'_> {
    fn check_counts(&self) -> Result<()> {
        let too_many = |what: &str, most: usize| {
            let message = format!("has more than {most} {what}s; split it into several");
            Err(Error::invalid(format!("policy `{}`", self.policy), message))
        };
        if self.document.detector.len() > MAX_DETECTORS {
            return too_many("detector", MAX_DETECTORS);
        }
        if self.document.rule.len() > MAX_RULES {
            return too_many("rule", MAX_RULES);
        }
        Ok(())
    }

    fn error(&self, kind: &str, name: &str, message: impl std::fmt::Display) -> Error {
        // A name that is none is shown escaped and cut.
        let name: String = name.chars().take(64).collect();
        let field = format!("policy `{}`, {kind} `{}`", self.policy, name.escape_debug());
        Error::invalid(field, message.to_string())
    }

    fn detectors(&self) -> Result<Vec<Detector>> {
        let mut seen = BTreeSet::new();
        let texts = self.document.detector.iter();
        texts
            .map(|text| {
                let error = |message: String| self.error("detector", &text.name, message);
                check_name("name", &text.name).map_err(|e| error(last_part(&e)))?;
                if !seen.insert(&text.name) {
                    return Err(error("is defined twice; rename one of them".into()));
                }
                self.detector(text).map_err(error)
            })
            .collect()
    }

    fn detector(&self, text: &DetectorText) -> Result<Detector, String> {
        let probe = self
            .catalog
            .probes
            .iter()
            .position(|m| m.name == text.probe);
        let probe = probe.ok_or_else(|| {
            let known = self.catalog.probes.iter().map(|m| m.name.as_str());
            unknown("probe", &text.probe, known)
        })?;
        let manifest = self.catalog.probes[probe];
        let calibration = calibration(manifest, text.gather.as_deref())?;
        Ok(Detector {
            name: Arc::from(text.name.as_str()),
            probe,
            probe_name: Arc::from(manifest.name.as_str()),
            gather: calibration.gather,
            positions: manifest.positions,
            threshold_logit: threshold_logit(text, calibration, manifest.positions)?,
            calibration: calibration.clone(),
        })
    }

    fn detector_index(&self, name: &str) -> Result<usize, String> {
        let detectors = &self.document.detector;
        detectors
            .iter()
            .position(|detector| detector.name == name)
            .ok_or_else(|| unknown("detector", name, detectors.iter().map(|d| d.name.as_str())))
    }

    /// Every entry, also one that no rule refers to: a typing error there would stay unseen.
    fn check_product_thresholds(&self) -> Result<()> {
        for entry in &self.document.product_threshold {
            let shown = entry.detectors.join(" x ");
            let error = |message: String| self.error("product_threshold", &shown, message);
            self.conjuncts(&entry.detectors).map_err(error)?;
            check_fpr("fpr", entry.fpr).map_err(error)?;
            check_probability("threshold", entry.threshold).map_err(error)?;
            if let Some([low, high]) = entry.interval
                && !(0.0 <= low && low <= high && high <= 1.0)
            {
                return Err(error("interval must be [low, high] within [0, 1]".into()));
            }
            if entry.n == Some(0) {
                return Err(error("n is 0; a threshold needs benign requests".into()));
            }
        }
        let entries = &self.document.product_threshold;
        for (index, entry) in entries.iter().enumerate() {
            if entries[..index]
                .iter()
                .any(|e| same_point(e, &entry.detectors, entry.fpr))
            {
                let shown = entry.detectors.join(" x ");
                let message = format!("is given twice for fpr {}; keep one", entry.fpr);
                return Err(self.error("product_threshold", &shown, message));
            }
        }
        Ok(())
    }

    fn rules(&self) -> Result<Vec<Rule>> {
        let mut seen = BTreeSet::new();
        let texts = self.document.rule.iter();
        texts
            .map(|text| {
                let error = |message: String| self.error("rule", &text.name, message);
                check_name("name", &text.name).map_err(|e| error(last_part(&e)))?;
                if !seen.insert(&text.name) {
                    return Err(error("is defined twice; rename one of them".into()));
                }
                self.rule(text).map_err(error)
            })
            .collect()
    }

    fn rule(&self, text: &RuleText) -> Result<Rule, String> {
        if text.hold_back > MAX_HOLD_BACK {
            return Err(format!(
                "hold_back is {}, but at most {MAX_HOLD_BACK} tokens can be held back",
                text.hold_back
            ));
        }
        Ok(Rule {
            name: Arc::from(text.name.as_str()),
            when: self.when(&text.when)?,
            action: self.action(&text.action)?,
            hold_back: text.hold_back,
            on_failure: text.on_failure,
        })
    }

    fn when(&self, when: &WhenText) -> Result<When, String> {
        let has_threshold = when.at_fpr.is_some() || when.threshold.is_some();
        match (&when.detector, &when.product, &when.all) {
            (Some(_), None, None) | (None, None, Some(_)) if has_threshold => {
                Err("only a product has a threshold of its own; write it at the detectors".into())
            }
            (Some(name), None, None) => Ok(When::Detector(self.detector_index(name)?)),
            (None, None, Some(names)) => Ok(When::All(self.conjuncts(names)?)),
            (None, Some(names), None) => Ok(When::Product {
                detectors: self.conjuncts(names)?,
                threshold: self.product_threshold(names, when)?,
            }),
            _ => Err("`when` needs exactly one of `detector`, `product` and `all`".into()),
        }
    }

    fn conjuncts(&self, names: &[String]) -> Result<Vec<usize>, String> {
        if names.is_empty() {
            return Err("names no detector; name at least one".into());
        }
        if names.len() > MAX_CONJUNCTS {
            return Err(format!("names more than {MAX_CONJUNCTS} detectors"));
        }
        let mut indices = Vec::with_capacity(names.len());
        for name in names {
            let index = self.detector_index(name)?;
            if indices.contains(&index) {
                return Err(format!("names detector `{name}` twice; keep one"));
            }
            indices.push(index);
        }
        Ok(indices)
    }

    fn product_threshold(&self, names: &[String], when: &WhenText) -> Result<f32, String> {
        match (when.at_fpr, when.threshold) {
            (None, None) => Ok(DEFAULT_THRESHOLD),
            (None, Some(threshold)) => check_probability("threshold", threshold),
            (Some(_), Some(_)) => Err("has both at_fpr and threshold; keep one".into()),
            (Some(fpr), None) => {
                check_fpr("at_fpr", fpr)?;
                let mut entries = self.document.product_threshold.iter();
                let entry = entries.find(|entry| same_point(entry, names, fpr));
                entry.map(|entry| entry.threshold).ok_or_else(|| {
                    format!(
                        "no threshold of this product is calibrated for at_fpr {fpr}; add a \
                         [[product_threshold]] with these detectors and fpr = {fpr}, or write \
                         `threshold` (the stages depend on each other, so it cannot be derived \
                         from theirs)"
                    )
                })
            }
        }
    }

    fn action(&self, action: &ActionText) -> Result<RuleAction, String> {
        match action {
            ActionText::Flag => Ok(RuleAction::Flag),
            ActionText::Abort => Ok(RuleAction::Abort),
            ActionText::Refuse(text) => Ok(RuleAction::Refuse {
                text: refusal_text(text)?,
            }),
            ActionText::RefusalHead { head, strength } => Ok(RuleAction::RefusalHead {
                head: self.head(head.as_deref())?,
                strength: check_strength(strength.unwrap_or(1.0))?,
            }),
            ActionText::Steer(steer) => self.steer(steer),
        }
    }

    fn head(&self, name: Option<&str>) -> Result<String, String> {
        let heads = &self.catalog.heads;
        match name {
            Some(name) if heads.contains(name) => Ok(name.to_owned()),
            Some(name) => Err(unknown("refusal head", name, heads.iter().copied())),
            None => match (heads.first(), heads.len()) {
                (Some(only), 1) => Ok((*only).to_owned()),
                (None, _) => Err(
                    "no refusal head is loaded; load one or choose another action, \
                                  e.g. { refuse = \"text\" }"
                        .into(),
                ),
                _ => Err(format!(
                    "several refusal heads are loaded; write {{ refusal_head = \"name\" }} with \
                     one of {}",
                    heads.iter().copied().collect::<Vec<_>>().join(", ")
                )),
            },
        }
    }

    fn steer(&self, steer: &SteerText) -> Result<RuleAction, String> {
        let vectors = &self.catalog.vectors;
        let own = vectors
            .get(steer.vector.as_str())
            .copied()
            .ok_or_else(|| unknown("vector", &steer.vector, vectors.keys().copied()))?;
        let site = match &steer.site {
            Some(site) => site.parse::<Site>().map_err(|e| e.to_string())?,
            None => own,
        };
        site.check(self.catalog.n_layers)
            .map_err(|e| e.to_string())?;
        Ok(RuleAction::Steer {
            vector: steer.vector.clone(),
            site,
            kind: steer_kind(steer)?,
            positions: steer.positions,
        })
    }

    fn out_of_domain(&self) -> Result<OutOfDomain> {
        match &self.document.out_of_domain {
            OutOfDomainText::Serve => Ok(OutOfDomain::Serve),
            OutOfDomainText::Refuse(text) => {
                let text = refusal_text(text.as_deref().unwrap_or(REFUSED_OUT_OF_DOMAIN));
                let field = || format!("policy `{}`, out_of_domain", self.policy);
                let text = text.map_err(|message| Error::invalid(field(), message))?;
                Ok(OutOfDomain::Refuse { text })
            }
        }
    }
}

fn steer_kind(steer: &SteerText) -> Result<SteerKind, String> {
    let strength = || {
        let missing = "steer needs its strength; write e.g. strength = 4.0";
        steer
            .strength
            .ok_or(missing.to_owned())
            .and_then(check_strength)
    };
    match steer.kind {
        SteerKindText::Add => Ok(SteerKind::Add {
            strength: strength()?,
        }),
        SteerKindText::ClampAbove => Ok(SteerKind::ClampAbove { bound: strength()? }),
        SteerKindText::ClampBelow => Ok(SteerKind::ClampBelow { bound: strength()? }),
        SteerKindText::ProjectOut if steer.strength.is_some() => {
            Err("project_out has no strength; leave it away".into())
        }
        SteerKindText::ProjectOut => Ok(SteerKind::ProjectOut),
    }
}

/// A detector always has a calibration: an uncalibrated score fools its reader.
fn calibration<'m>(
    manifest: &'m Manifest,
    gather: Option<&str>,
) -> Result<&'m Calibration, String> {
    let Some(gather) = gather else {
        return manifest.calibrations.first().ok_or_else(|| {
            format!(
                "probe `{}` is not calibrated for any gather; calibrate it first",
                manifest.name
            )
        });
    };
    let choice: GatherChoice = gather.parse().map_err(last_part_of)?;
    manifest
        .gather(&choice)
        .and_then(|gather| manifest.calibration(&gather))
        .map_err(|e| format!("{e}; calibrate the probe for it, or choose another gather"))
}

fn threshold_logit(
    text: &DetectorText,
    calibration: &Calibration,
    positions: Positions,
) -> Result<f32, String> {
    if text.answer_tokens.is_some() && text.at_fpr.is_none() {
        return Err("answer_tokens goes with at_fpr; leave it away".into());
    }
    match (text.at_fpr, text.threshold, text.threshold_logit) {
        (None, None, None) => logit_at(calibration, DEFAULT_THRESHOLD),
        (None, Some(threshold), None) => {
            logit_at(calibration, check_probability("threshold", threshold)?)
        }
        (None, None, Some(logit)) if logit.is_finite() => Ok(logit),
        (None, None, Some(_)) => Err("threshold_logit must be finite".into()),
        (Some(fpr), None, None) => {
            check_fpr("at_fpr", fpr)?;
            at_fpr(calibration, fpr, text.answer_tokens, positions)
        }
        _ => Err("has several of at_fpr, threshold and threshold_logit; keep one".into()),
    }
}

/// Without `answer_tokens`, a probe of every generated token takes the highest threshold of all
/// lengths that the rate is known for, so the rate holds at each of them.
fn at_fpr(
    calibration: &Calibration,
    fpr: f64,
    answer_tokens: Option<u32>,
    positions: Positions,
) -> Result<f32, String> {
    if answer_tokens.is_some() && positions != Positions::EveryGenerated {
        return Err(format!(
            "answer_tokens is for probes of every generated token, and this one reads \
             {positions}; leave it away"
        ));
    }
    let points = calibration.thresholds.iter();
    let of_rate = points.filter(|p| (p.fpr - fpr).abs() <= 1e-9 && p.answer_tokens.is_some());
    let highest = of_rate.map(|p| p.threshold_logit).reduce(f32::max);
    if let (None, Positions::EveryGenerated, Some(highest)) = (answer_tokens, positions, highest) {
        return Ok(highest);
    }
    calibration
        .threshold_at(fpr, answer_tokens)
        .map_err(|e| format!("{e}; choose one of these, or calibrate the probe for it"))
}

/// The largest logit whose probability is not above `threshold`, so that a logit is above it
/// exactly when its probability is above `threshold`: the calibration never falls.
fn logit_at(calibration: &Calibration, threshold: f32) -> Result<f32, String> {
    let above = |logit: f32| calibration.probability(logit) > threshold;
    if !above(f32::MAX) {
        return Err(format!(
            "its probability never exceeds {threshold} (at most {}); choose a lower threshold",
            calibration.probability(f32::MAX)
        ));
    }
    if above(f32::MIN) {
        return Err(format!(
            "its probability always exceeds {threshold} (at least {}); choose a higher threshold",
            calibration.probability(f32::MIN)
        ));
    }
    let (mut not_above, mut is_above) = (ordered(f32::MIN), ordered(f32::MAX));
    while is_above - not_above > 1 {
        let middle = not_above + (is_above - not_above) / 2;
        if above(from_ordered(middle)) {
            is_above = middle;
        } else {
            not_above = middle;
        }
    }
    Ok(from_ordered(not_above))
}

/// Finite floats in their order as integers; bisecting these takes 32 steps at any scale.
fn ordered(x: f32) -> i64 {
    let bits = x.to_bits();
    let magnitude = i64::from(bits & 0x7fff_ffff);
    if bits >> 31 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

fn from_ordered(i: i64) -> f32 {
    // The magnitude of an ordered float fits its 31 bits.
    let magnitude = f32::from_bits(i.unsigned_abs() as u32);
    if i < 0 { -magnitude } else { magnitude }
}

fn same_point(entry: &ProductThreshold, detectors: &[String], fpr: f64) -> bool {
    let set = |names: &[String]| names.iter().cloned().collect::<BTreeSet<_>>();
    (entry.fpr - fpr).abs() <= 1e-9 && set(&entry.detectors) == set(detectors)
}

fn check_fpr(field: &str, fpr: f64) -> Result<(), String> {
    if fpr > 0.0 && fpr < 1.0 {
        Ok(())
    } else {
        Err(format!("{field} must lie strictly between 0 and 1"))
    }
}

/// 1 is no threshold: nothing is above it.
fn check_probability(field: &str, threshold: f32) -> Result<f32, String> {
    if (0.0..1.0).contains(&threshold) {
        Ok(threshold)
    } else {
        Err(format!(
            "{field} must be at least 0 and below 1; for a threshold on the logit write \
             threshold_logit at the detector"
        ))
    }
}

fn check_strength(strength: f32) -> Result<f32, String> {
    if strength.abs() <= MAX_STRENGTH {
        Ok(strength)
    } else {
        Err(format!(
            "strength must lie between -{MAX_STRENGTH} and {MAX_STRENGTH}"
        ))
    }
}

fn refusal_text(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("the refusal is empty; write what the caller shall read".into());
    }
    if text.len() > MAX_REFUSAL_BYTES {
        return Err(format!(
            "the refusal is longer than {MAX_REFUSAL_BYTES} bytes"
        ));
    }
    Ok(text.to_owned())
}

fn unknown<'n>(kind: &str, name: &str, known: impl Iterator<Item = &'n str>) -> String {
    let name: String = name.chars().take(64).collect();
    let known: Vec<_> = known.take(16).collect();
    let remedy = if known.is_empty() {
        "there is none".to_owned()
    } else {
        format!("there is {}", known.join(", "))
    };
    format!("no {kind} is named `{}`; {remedy}", name.escape_debug())
}

/// The message of an error whose field is said elsewhere.
fn last_part(error: &inwit_probes::Error) -> String {
    match error {
        inwit_probes::Error::Invalid { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

fn last_part_of(error: inwit_probes::Error) -> String {
    last_part(&error)
}

#[cfg(test)]
mod tests {
    use inwit_probes::{CalibrationKind, Gather};
    use proptest::prelude::*;

    use super::super::testing::{calibration, catalog, manifests, point, policy};
    use super::super::{OnFailure, SteerPositions};
    use super::*;

    const HARM: &str = "[[detector]]\nname = \"harm\"\nprobe = \"prompt_harm\"\n";

    fn compile(document: &str) -> Result<Policy> {
        Policy::parse_and_compile("test", 1, document, &catalog(&manifests()))
    }

    /// The document is refused, and the message says all of this.
    fn check_refused(document: &str, says: &[&str]) {
        let message = compile(document).expect_err(document).to_string();
        for part in says {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    fn check_detector(lines: &str, says: &[&str]) {
        let document = format!("[[detector]]\nname = \"d\"\n{lines}\n");
        check_refused(&document, &[&["`test`", "detector `d`"], says].concat());
    }

    fn check_rule(lines: &str, says: &[&str]) {
        let document = format!("{HARM}[[rule]]\nname = \"r\"\n{lines}\n");
        check_refused(&document, &[&["`test`", "rule `r`"], says].concat());
    }

    fn detector(lines: &str) -> Detector {
        let document = format!("[[detector]]\nname = \"d\"\n{lines}\n");
        compile(&document).expect("compiles").detectors.remove(0)
    }

    fn action(text: &str) -> RuleAction {
        let rules =
            format!("[[rule]]\nname = \"r\"\nwhen = {{ detector = \"harm\" }}\naction = {text}\n");
        policy(&rules).rules.remove(0).action
    }

    #[test]
    fn the_two_stage_policy_compiles() {
        let document = r#"
            [[detector]]
            name = "harmful-prompt"
            probe = "prompt_harm"
            [[detector]]
            name = "complies"
            probe = "compliance"
            [[detector]]
            name = "harm-while-writing"
            probe = "response_harm"
            gather = "ema"
            at_fpr = 0.001

            [[product_threshold]]
            detectors = ["complies", "harmful-prompt"]
            fpr = 0.01
            threshold = 0.31
            interval = [0.004, 0.02]
            n = 2000

            [[rule]]
            name = "harmful-compliance"
            when = { product = ["harmful-prompt", "complies"], at_fpr = 0.01 }
            action = "refusal_head"
            hold_back = 3
            [[rule]]
            name = "harm-while-writing"
            when = { detector = "harm-while-writing" }
            action = { refuse = "I can't help with that." }
            hold_back = 4
            on_failure = "open"
        "#;
        let policy = compile(document).expect("compiles");
        assert_eq!(policy.hash.len(), 64);
        assert_eq!(policy.document, document);
        let [first, second] = &policy.rules[..] else {
            panic!("two rules");
        };
        let product = When::Product {
            detectors: vec![0, 1],
            threshold: 0.31,
        };
        assert_eq!(first.when, product);
        let soft = RuleAction::RefusalHead {
            head: "soft".into(),
            strength: 1.0,
        };
        assert_eq!(first.action, soft);
        assert_eq!((first.hold_back, first.on_failure), (3, OnFailure::Closed));
        assert_eq!((second.hold_back, second.on_failure), (4, OnFailure::Open));
        assert_eq!(policy.detectors[2].gather, Gather::Ema { a: 0.1 });
    }

    #[test]
    fn an_unset_threshold_is_a_probability_of_a_half() {
        let logit = detector("probe = \"prompt_harm\"").threshold_logit;
        // The largest logit whose probability rounds to a half.
        assert!((0.0..1e-6).contains(&logit), "{logit}");
        let rules = "[[rule]]\nname = \"r\"\naction = \"flag\"\n\
                     when = { product = [\"harm\", \"complies\"] }";
        let When::Product { threshold, .. } = policy(rules).rules[0].when else {
            panic!("a product");
        };
        assert_eq!(threshold, DEFAULT_THRESHOLD);
    }

    #[test]
    fn a_rate_of_a_per_token_probe_holds_at_every_length_unless_one_is_named() {
        let probe = "probe = \"response_harm\"\nat_fpr = 0.001";
        assert_eq!(detector(probe).threshold_logit, 5.0);
        let named = detector(&format!("{probe}\nanswer_tokens = 256"));
        assert_eq!(named.threshold_logit, 4.0);
        let prompt = detector("probe = \"prompt_harm\"\nat_fpr = 0.01");
        assert_eq!(prompt.threshold_logit, 2.0);
    }

    #[test]
    fn names_that_are_not_loaded_are_refused() {
        check_detector(
            "probe = \"nobody\"",
            &["no probe is named `nobody`", "prompt_harm"],
        );
        check_detector(
            "probe = \"prompt_harm\"\ngather = \"max\"",
            &["gather `max`", "calibrate"],
        );
        check_detector(
            "probe = \"prompt_harm\"\ngather = \"sum\"",
            &["unknown gather"],
        );
        let when = "when = { detector = \"harm\" }\n";
        check_rule(
            "when = { detector = \"nobody\" }\naction = \"flag\"",
            &["no detector is named `nobody`", "harm"],
        );
        check_rule(
            &format!("{when}action = {{ refusal_head = \"hard\" }}"),
            &["no refusal head is named `hard`", "soft"],
        );
        check_rule(
            &format!("{when}action = {{ steer = {{ vector = \"x\", strength = 1.0 }} }}"),
            &["no vector is named `x`", "refusal"],
        );
    }

    #[test]
    fn an_uncalibrated_probe_is_refused_in_whatever_it_is_used() {
        let mut manifests = manifests();
        manifests[0].calibrations.clear();
        for threshold in ["", "threshold_logit = 1.0", "gather = \"last\""] {
            let document = format!("{HARM}{threshold}");
            let error =
                Policy::parse_and_compile("test", 1, &document, &catalog(&manifests)).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains("`harm`") && message.contains("calibrate"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_head_must_be_named_when_there_is_not_exactly_one() {
        let manifests = manifests();
        let document = format!(
            "{HARM}[[rule]]\nname = \"r\"\nwhen = {{ detector = \"harm\" }}\n\
             action = \"refusal_head\""
        );
        for (heads, says) in [
            (vec![], "no refusal head is loaded"),
            (vec!["hard", "soft"], "several refusal heads"),
        ] {
            let mut catalog = catalog(&manifests);
            catalog.heads = heads.into_iter().collect();
            let error = Policy::parse_and_compile("test", 1, &document, &catalog).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_name_is_defined_once_and_is_a_name() {
        check_refused(
            &format!("{HARM}{HARM}"),
            &["detector `harm`", "defined twice"],
        );
        let rule = "[[rule]]\nname = \"r\"\nwhen = { detector = \"harm\" }\naction = \"flag\"\n";
        check_refused(
            &format!("{HARM}{rule}{rule}"),
            &["rule `r`", "defined twice"],
        );
        for name in ["", "../x", "a b", "A", "a\\u0000b"] {
            let document = format!("[[detector]]\nname = \"{name}\"\nprobe = \"prompt_harm\"");
            check_refused(&document, &["detector", "not a name"]);
        }
        check_refused("name = \"../../x\"", &["policy", "not a name"]);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let probe = "probe = \"prompt_harm\"\n";
        for (line, says) in [
            ("threshold = 1.0", "threshold"),
            ("threshold = -0.1", "threshold"),
            ("threshold = nan", "threshold"),
            ("threshold_logit = inf", "threshold_logit"),
            ("threshold_logit = nan", "threshold_logit"),
            ("at_fpr = 0.0", "at_fpr"),
            ("at_fpr = nan", "at_fpr"),
            ("at_fpr = 0.02", "0.01"),
            ("at_fpr = 0.01\nthreshold = 0.5", "keep one"),
            ("at_fpr = 0.01\nanswer_tokens = 64", "answer_tokens"),
            ("answer_tokens = 64", "at_fpr"),
        ] {
            check_detector(&format!("{probe}{line}"), &[says]);
        }
        let flag = "action = \"flag\"\n";
        for (lines, says) in [
            (
                "when = { detector = \"harm\" }\nhold_back = 65",
                "at most 64",
            ),
            ("when = { detector = \"harm\", threshold = 0.5 }", "product"),
            (
                "when = { product = [\"harm\"], threshold = 1.5 }",
                "threshold",
            ),
            (
                "when = { product = [\"harm\"], at_fpr = 0.01 }",
                "product_threshold",
            ),
            (
                "when = { product = [\"harm\"], at_fpr = 0.01, threshold = 0.1 }",
                "keep one",
            ),
            ("when = { product = [] }", "at least one"),
            ("when = { all = [] }", "at least one"),
            ("when = { all = [\"harm\", \"harm\"] }", "twice"),
            ("when = { }", "exactly one"),
            (
                "when = { detector = \"harm\", all = [\"harm\"] }",
                "exactly one",
            ),
        ] {
            check_rule(&format!("{flag}{lines}"), &[says]);
        }
        let steer = |inside: &str| {
            format!(
                "when = {{ detector = \"harm\" }}\n\
                 action = {{ steer = {{ vector = \"refusal\", {inside} }} }}"
            )
        };
        for (inside, says) in [
            ("strength = inf", "strength"),
            ("strength = nan", "strength"),
            ("strength = 1e30", "1000"),
            ("kind = \"add\"", "needs its strength"),
            ("kind = \"project_out\", strength = 1.0", "no strength"),
            ("strength = 1.0, site = \"layers.7\"", "unknown site"),
            (
                "strength = 1.0, site = \"blocks.6.hook_resid_post\"",
                "beyond",
            ),
        ] {
            check_rule(&steer(inside), &[says]);
        }
        let refuse = "when = { detector = \"harm\" }\naction = { refuse = \" \" }";
        check_rule(refuse, &["empty"]);
    }

    #[test]
    fn what_nobody_would_read_is_refused() {
        check_refused("detectors = []", &["`test`", "detectors"]);
        check_refused(&format!("{HARM}at_frp = 0.1"), &["at_frp"]);
        let rule = |action: &str| {
            format!(
                "{HARM}[[rule]]\nname = \"r\"\nwhen = {{ detector = \"harm\" }}\n\
                 action = {action}"
            )
        };
        for (action, says) in [
            ("\"block\"", "refusal_head"),
            ("\"refuse\"", "needs its text"),
            ("\"steer\"", "needs its vector"),
            ("3", "flag"),
            ("{ }", "exactly one"),
            ("{ refuse = \"a\", refusal_head = \"soft\" }", "exactly one"),
            ("{ refuse = \"a\", strength = 1.0 }", "no strength"),
            ("{ refusal_head = \"soft\", gain = 1.0 }", "gain"),
            (
                "{ steer = { vector = \"refusal\", strength = 1.0, at = 3 } }",
                "at",
            ),
        ] {
            check_refused(&rule(action), &["`test`", says]);
        }
        check_refused("out_of_domain = \"drop\"", &["serve"]);
        let long = "#".repeat(MAX_DOCUMENT + 1);
        check_refused(&long, &["longer than"]);
    }

    const MAX_DOCUMENT: usize = super::super::MAX_DOCUMENT_BYTES;

    #[test]
    fn a_product_threshold_is_checked_even_where_no_rule_uses_it() {
        let entry = |lines: &str| format!("{HARM}[[product_threshold]]\n{lines}");
        let point = "detectors = [\"harm\"]\nfpr = 0.01\nthreshold = 0.3\n";
        assert!(compile(&entry(point)).is_ok());
        check_refused(&format!("{}{}", entry(point), entry(point)), &["twice"]);
        for (lines, says) in [
            (
                "detectors = [\"x\"]\nfpr = 0.01\nthreshold = 0.3",
                "no detector is named `x`",
            ),
            ("detectors = [\"harm\"]\nfpr = 1.0\nthreshold = 0.3", "fpr"),
            (
                "detectors = [\"harm\"]\nfpr = 0.1\nthreshold = nan",
                "threshold",
            ),
        ] {
            check_refused(&entry(lines), &["product_threshold", says]);
        }
        check_refused(
            &entry(&format!("{point}interval = [0.9, 0.1]")),
            &["interval"],
        );
        check_refused(&entry(&format!("{point}n = 0")), &["benign"]);
    }

    #[test]
    fn actions_take_their_defaults() {
        let steer = action("{ steer = { vector = \"refusal\", strength = 4.0 } }");
        let expected = RuleAction::Steer {
            vector: "refusal".into(),
            site: Site::ResidPost(3),
            kind: SteerKind::Add { strength: 4.0 },
            positions: SteerPositions::LastPromptTokenAndGenerated,
        };
        assert_eq!(steer, expected);
        let clamp = action(
            "{ steer = { vector = \"refusal\", kind = \"clamp_above\", strength = -1.0, \
             site = \"blocks.1.hook_mlp_out\", positions = \"generated\" } }",
        );
        let expected = RuleAction::Steer {
            vector: "refusal".into(),
            site: Site::MlpOut(1),
            kind: SteerKind::ClampAbove { bound: -1.0 },
            positions: SteerPositions::Generated,
        };
        assert_eq!(clamp, expected);
        let head = action("{ refusal_head = \"soft\", strength = 0.5 }");
        let expected = RuleAction::RefusalHead {
            head: "soft".into(),
            strength: 0.5,
        };
        assert_eq!(head, expected);
        assert_eq!(action("\"abort\""), RuleAction::Abort);
    }

    #[test]
    fn what_happens_out_of_domain_is_written_or_serve() {
        let of = |document: &str| compile(document).expect("compiles").out_of_domain;
        assert_eq!(of(""), OutOfDomain::Serve);
        assert_eq!(of("out_of_domain = \"serve\""), OutOfDomain::Serve);
        let text = "no".to_owned();
        assert_eq!(
            of("out_of_domain = { refuse = \"no\" }"),
            OutOfDomain::Refuse { text }
        );
        assert!(matches!(
            of("out_of_domain = \"refuse\""),
            OutOfDomain::Refuse { .. }
        ));
    }

    #[test]
    fn the_document_may_name_itself() {
        assert_eq!(compile("").expect("compiles").name, "test");
        assert_eq!(
            compile("name = \"careful\"").expect("compiles").name,
            "careful"
        );
    }

    #[test]
    fn a_threshold_beyond_the_calibration_is_refused() {
        let mut calibration = calibration(Gather::Last, vec![point(0.1, None, 0.0)]);
        calibration.kind = CalibrationKind::Isotonic {
            x: vec![-1.0, 1.0],
            y: vec![0.2, 0.8],
        };
        assert!(
            logit_at(&calibration, 0.8)
                .unwrap_err()
                .contains("never exceeds")
        );
        assert!(
            logit_at(&calibration, 0.1)
                .unwrap_err()
                .contains("always exceeds")
        );
        let half = logit_at(&calibration, 0.5).unwrap();
        assert!(half.abs() < 1e-5, "{half}");
    }

    proptest! {
        #[test]
        fn a_logit_is_above_the_threshold_exactly_when_its_probability_is(
            a in 0.01f64..20.0, b in -5.0f64..5.0, p in 0.02f32..0.98, logit in -50.0f32..50.0,
        ) {
            let mut calibration = calibration(Gather::Last, vec![]);
            calibration.kind = CalibrationKind::Platt { a, b };
            let threshold = logit_at(&calibration, p).unwrap();
            for logit in [logit, threshold, threshold.next_up(), threshold.next_down()] {
                prop_assert_eq!(logit > threshold, calibration.probability(logit) > p);
            }
        }

        #[test]
        fn no_document_makes_the_compiler_panic(text in "[\\[\\]a-z =\"{}.\\n0-9]{0,200}") {
            let _ = compile(&text);
        }
    }
}
