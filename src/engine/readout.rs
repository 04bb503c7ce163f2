//! One gathered score per probe, whatever the policy asks: what operators watch and offline rows
//! hold. It is a policy without rules, so it gathers exactly as a detector does.

use std::sync::Arc;

use inwit_probes::{Calibration, CalibrationKind, Gather, Positions};

use super::event::Score;
use super::request::Request;
use crate::policy::{Detector, Policy, Reading};
use crate::registry::Snapshot;

/// A detector for each probe: its first calibration, or its first gather without one.
pub(super) fn readout_policy(snapshot: &Snapshot) -> Policy {
    let detectors = snapshot.probes.iter().enumerate().map(|(index, loaded)| {
        let manifest = loaded.probe.manifest();
        let calibration = manifest.calibrations.first().cloned();
        let gather = manifest.gathers.first().copied().unwrap_or(Gather::Last);
        let calibration = calibration.unwrap_or_else(|| uncalibrated(gather));
        Detector {
            name: Arc::clone(&loaded.name),
            probe: index,
            probe_name: Arc::clone(&loaded.name),
            gather: calibration.gather,
            positions: manifest.positions,
            calibration,
            threshold_logit: f32::MAX,
        }
    });
    Policy {
        detectors: detectors.collect(),
        ..Policy::empty()
    }
}

fn uncalibrated(gather: Gather) -> Calibration {
    Calibration {
        gather,
        kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
        prior: 0.5,
        thresholds: Vec::new(),
        n_benign: 0,
        n_harmful: 0,
    }
}

/// A detector's reading as a score.
pub(super) fn score(request: &Request, policy: &Policy, reading: &Reading, of_rule: bool) -> Score {
    let detector = &policy.detectors[reading.detector];
    let loaded = &request.monitor.snapshot.probes[detector.probe];
    let calibrated = !loaded.probe.manifest().calibrations.is_empty();
    Score {
        probe: Arc::clone(&loaded.name),
        probe_revision: loaded.revision,
        sites: sites(&loaded.probe),
        detector: Some(Arc::clone(&detector.name)),
        position: reading.position,
        logit: reading.logit,
        probability: calibrated.then_some(reading.probability),
        threshold: of_rule.then_some(reading.threshold),
        fired: of_rule && reading.fired,
        out_of_domain: loaded.out_of_domain(&request.prompt.form),
    }
}

/// One token's logit as a score.
pub(super) fn token_score(request: &Request, probe: usize, position: u32, logit: f32) -> Score {
    let loaded = &request.monitor.snapshot.probes[probe];
    Score {
        probe: Arc::clone(&loaded.name),
        probe_revision: loaded.revision,
        sites: sites(&loaded.probe),
        detector: None,
        position,
        logit,
        probability: None,
        threshold: None,
        fired: false,
        out_of_domain: loaded.out_of_domain(&request.prompt.form),
    }
}

/// Whether the probe has anything to say about this token.
pub(super) fn reads(positions: Positions, in_content: bool, is_last: bool, k: u32) -> bool {
    match positions {
        Positions::LastPromptToken => is_last,
        Positions::PromptContent => in_content,
        Positions::Generated(wanted) => k == wanted,
        Positions::FirstGenerated(last) => (1..=last).contains(&k),
        Positions::EveryGenerated => k > 0,
    }
}

fn sites(probe: &inwit_probes::Probe) -> Vec<inwit_probes::Site> {
    probe.heads().iter().map(|head| head.site).collect()
}
