//! Sample artefacts for tests, and ways to damage their files.

use serde_json::Value;

use crate::calibration::{Calibration, CalibrationKind, OperatingPoint};
use crate::gather::Gather;
use crate::manifest::{Canary, Kind, Manifest, Metric, ModelIdentity, Positions};
use crate::probe::{Head, InputNorm, Probe, TwoLayer};
use crate::site::Site;

pub(crate) fn model() -> ModelIdentity {
    ModelIdentity {
        name: "tiny".to_owned(),
        architecture_id: "arch-1".to_owned(),
        weights_id: "weights-1".to_owned(),
        weight_format: "f32".to_owned(),
    }
}

pub(crate) fn calibration(gather: Gather) -> Calibration {
    Calibration {
        gather,
        kind: CalibrationKind::Platt { a: 1.5, b: -0.25 },
        prior: 0.5,
        thresholds: vec![OperatingPoint {
            fpr: 0.01,
            answer_tokens: None,
            threshold_logit: 2.5,
            interval: [0.004, 0.02],
            n: 1000,
        }],
        n_benign: 1000,
        n_harmful: 1000,
    }
}

pub(crate) fn canaries() -> Vec<Canary> {
    let canary = |i: u32| Canary {
        tokens: vec![1, 2, 3 + i],
        position: 2,
        logit: i as f32 - 3.5,
        positive: i >= 4,
    };
    (0..8).map(canary).collect()
}

/// A complete manifest of width 3.
pub(crate) fn manifest(kind: Kind) -> Manifest {
    let mut manifest = Manifest::new("sample", kind, 3, Positions::PromptContent, model());
    manifest.calibrations = vec![calibration(manifest.gathers[0])];
    manifest.canaries = canaries();
    manifest.calibration_logit_std = 2.0;
    let metric = Metric {
        value: 0.97,
        interval: Some([0.95, 0.98]),
    };
    manifest.record.metrics.insert("auroc".to_owned(), metric);
    manifest
}

pub(crate) fn head(site: Site, out: usize, norm: InputNorm) -> Head {
    let wave = |i: usize, by: f32| ((i as f32 + 1.0) * by).sin();
    Head {
        site,
        weight: (0..out * 3).map(|i| wave(i, 1.7)).collect(),
        bias: (0..out).map(|i| wave(i, 0.3)).collect(),
        out,
        norm,
    }
}

pub(crate) fn standard() -> InputNorm {
    InputNorm::Standard {
        mean: vec![0.5, -2.0, 100.0],
        scale: vec![2.0, 0.1, 30.0],
    }
}

pub(crate) fn logistic() -> Probe {
    let heads = vec![
        head(Site::ResidPost(1), 1, standard()),
        head(Site::MlpOut(2), 1, InputNorm::Unit),
    ];
    Probe::new(manifest(Kind::Logistic), heads, None).unwrap()
}

pub(crate) fn attention() -> Probe {
    let heads = vec![head(Site::ResidPost(1), 2, standard())];
    Probe::new(manifest(Kind::Attention), heads, None).unwrap()
}

/// Two attention heads.
pub(crate) fn several_heads() -> Probe {
    let heads = vec![head(Site::ResidPost(1), 4, standard())];
    Probe::new(manifest(Kind::Attention), heads, None).unwrap()
}

pub(crate) fn two_layer() -> Probe {
    let heads = vec![head(Site::ResidPost(1), 4, InputNorm::None)];
    let prober = TwoLayer {
        w2: vec![0.5, -1.0, 0.25, 0.0, -0.5, 1.0, 2.0, 0.125],
        b2: vec![0.1, -0.2],
        out: 2,
    };
    Probe::new(manifest(Kind::TwoLayer), heads, Some(prober)).unwrap()
}

/// The JSON header and the tensors' bytes.
pub(crate) fn split(file: &[u8]) -> (Value, Vec<u8>) {
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

pub(crate) fn join(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// The file with its header changed.
pub(crate) fn with_header(file: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (mut header, data) = split(file);
    change(&mut header);
    join(&header.to_string(), &data)
}

/// The file with its manifest changed.
pub(crate) fn with_manifest(file: &[u8], key: &str, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    with_header(file, |header| {
        let text = header["__metadata__"][key].as_str().unwrap();
        let mut manifest = serde_json::from_str(text).unwrap();
        change(&mut manifest);
        header["__metadata__"][key] = Value::String(manifest.to_string());
    })
}

/// The file with one value of a tensor changed.
pub(crate) fn with_value(file: &[u8], tensor: &str, index: usize, value: f32) -> Vec<u8> {
    let (header, mut data) = split(file);
    let at = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * index;
    data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    join(&header.to_string(), &data)
}
