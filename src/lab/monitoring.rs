//! What a benchmark asks the hooks to do: probes, interventions and a capture made from a seed.
//! Their numbers mean nothing; what they cost is that of real ones of the same shape.

use std::fmt;
use std::sync::Arc;

use inwit_probes::{
    Calibration, CalibrationKind, Gather, Head, InputNorm, Kind, Manifest, ModelIdentity,
    Positions, Probe, Site,
};
use serde::Serialize;

use super::fit::unfit;
use super::seeded::Seeded;
use crate::engine::prepare::{InterventionDraft, InterventionKindDraft, VectorDraft};
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};
use crate::hooks::InterventionKind;
use crate::registry::{LibraryFile, ModelIds, Snapshot};

pub const PROBES: usize = 8;
pub const PROBE_SITES: usize = 4;
pub const INTERVENTIONS: usize = 16;
/// The policy that reads every probe and whose rules never fire.
pub const POLICY: &str = "watch";

/// What is asked of every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Monitor {
    Off,
    /// 8 probes on 4 sites, and a policy that decides on them after every pass.
    Probes,
    /// 16 different interventions over the rows of a batch.
    Interventions,
    /// The states of one site.
    Capture,
}

impl Monitor {
    pub const ALL: [Self; 4] = [Self::Off, Self::Probes, Self::Interventions, Self::Capture];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Probes => "probes",
            Self::Interventions => "interventions",
            Self::Capture => "capture",
        }
    }
}

impl fmt::Display for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One change to a row's states.
#[derive(Clone, Debug)]
pub struct Change {
    pub site: Site,
    pub kind: InterventionKind,
    /// `[d_model]`, of unit length.
    pub vector: Arc<[f32]>,
}

impl Change {
    /// The same as a caller would write it, for every token.
    pub fn draft(&self) -> InterventionDraft {
        let (kind, strength) = match self.kind {
            InterventionKind::Add { strength } => (InterventionKindDraft::Add, Some(strength)),
            InterventionKind::ProjectOut => (InterventionKindDraft::ProjectOut, None),
            InterventionKind::ClampAbove { bound } => {
                (InterventionKindDraft::ClampAbove, Some(bound))
            }
            InterventionKind::ClampBelow { bound } => {
                (InterventionKindDraft::ClampBelow, Some(bound))
            }
        };
        InterventionDraft {
            vector: VectorDraft::Value(self.vector.to_vec()),
            site: Some(self.site.to_string()),
            kind,
            strength,
            positions: PositionSelection::All,
            condition: None,
        }
    }
}

/// Everything that the variants of one benchmark use.
pub struct Monitoring {
    /// The probes, and `POLICY` over them.
    pub snapshot: Arc<Snapshot>,
    pub changes: Vec<Change>,
    pub captured: Site,
}

impl Monitoring {
    /// For a model with these identities; equal seeds give equal numbers.
    pub fn new(ids: &ModelIds, seed: u64) -> Result<Self> {
        let mut seeded = Seeded::new(seed);
        let sites = sites(ids.n_layers)?;
        let mut files = Vec::new();
        for index in 0..PROBES {
            let probe = probe(index, sites[index % PROBE_SITES], ids, &mut seeded)?;
            let inside = format!("probes/{}.safetensors", probe_name(index));
            files.extend(LibraryFile::new(inside.clone(), &inside, || {
                probe.to_bytes().map_err(unfit)
            })?);
        }
        let inside = format!("policies/{POLICY}.toml");
        files.extend(LibraryFile::new(inside.clone(), &inside, || {
            Ok(policy().into_bytes())
        })?);
        let change = |index| change(index, sites[index % PROBE_SITES], ids.d_model, &mut seeded);
        Ok(Self {
            changes: (0..INTERVENTIONS).map(change).collect(),
            captured: sites[PROBE_SITES / 2],
            snapshot: Arc::new(Snapshot::from_files(&files, ids, Some(POLICY))?),
        })
    }

    /// The changes of one row among `rows`: all sixteen are in a batch, however many rows it has,
    /// and no row is without one.
    pub fn changes_of(&self, row: usize, rows: usize) -> Vec<&Change> {
        let mine = |index: &usize| match rows < INTERVENTIONS {
            true => index % rows == row,
            false => *index == row % INTERVENTIONS,
        };
        let indices = (0..self.changes.len()).filter(mine);
        indices.map(|index| &self.changes[index]).collect()
    }
}

/// The residual stream after each quarter of the layers.
fn sites(n_layers: usize) -> Result<[Site; PROBE_SITES]> {
    let layer = |quarter: usize| (quarter * n_layers / PROBE_SITES).saturating_sub(1);
    if layer(PROBE_SITES) > usize::from(u16::MAX) {
        return Err(Error::internal("a model of more than 65,536 layers"));
    }
    Ok(std::array::from_fn(|index| {
        Site::ResidPost(layer(index + 1) as u16)
    }))
}

fn probe_name(index: usize) -> String {
    format!("bench_{index}")
}

fn probe(index: usize, site: Site, ids: &ModelIds, seeded: &mut Seeded) -> Result<Probe> {
    let identity = ModelIdentity {
        name: "benchmark".into(),
        architecture_id: ids.architecture_id.clone(),
        weights_id: ids.weights_id.clone(),
        weight_format: "f32".into(),
    };
    let gather = match index % 2 {
        0 => Gather::Ema { a: 0.25 },
        _ => Gather::Max,
    };
    let mut manifest = Manifest::new(
        &probe_name(index),
        Kind::Logistic,
        ids.d_model,
        Positions::EveryGenerated,
        identity,
    );
    manifest.gathers = vec![gather];
    manifest.calibrations = vec![Calibration {
        gather,
        kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
        prior: 0.5,
        thresholds: Vec::new(),
        n_benign: 100,
        n_harmful: 100,
    }];
    let head = Head {
        site,
        weight: unit_vector(ids.d_model, seeded),
        bias: vec![0.0],
        out: 1,
        norm: match index / PROBE_SITES {
            0 => InputNorm::None,
            _ => InputNorm::Unit,
        },
    };
    Probe::new(manifest, vec![head], None).map_err(unfit)
}

/// A detector and a rule for each probe; no logit is above the threshold.
fn policy() -> String {
    let rule = |index: usize| {
        let probe = probe_name(index);
        format!(
            "[[detector]]\nname = \"{probe}\"\nprobe = \"{probe}\"\nthreshold_logit = 1e30\n\
             [[rule]]\nname = \"{probe}\"\nwhen = {{ detector = \"{probe}\" }}\n\
             action = \"flag\"\n"
        )
    };
    (0..PROBES).map(rule).collect()
}

/// Small enough that the answer stays an answer.
fn change(index: usize, site: Site, d_model: usize, seeded: &mut Seeded) -> Change {
    // Each kind once at each site.
    let kind = match (index + index / PROBE_SITES) % 4 {
        0 => InterventionKind::Add { strength: 0.125 },
        1 => InterventionKind::ProjectOut,
        2 => InterventionKind::ClampAbove { bound: 0.25 },
        _ => InterventionKind::ClampBelow { bound: -0.25 },
    };
    Change {
        site,
        kind,
        vector: unit_vector(d_model, seeded).into(),
    }
}

fn unit_vector(length: usize, seeded: &mut Seeded) -> Vec<f32> {
    let values: Vec<f32> = (0..length).map(|_| seeded.signed()).collect();
    let norm = values.iter().map(|value| value * value).sum::<f32>().sqrt();
    values
        .into_iter()
        .map(|value| value / norm.max(f32::MIN_POSITIVE))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn monitoring(n_layers: usize) -> Monitoring {
        let ids = ModelIds {
            architecture_id: "a".into(),
            weights_id: "w".into(),
            d_model: 8,
            n_layers,
            vocab: 16,
        };
        Monitoring::new(&ids, 1).expect("makes")
    }

    #[test]
    fn eight_probes_lie_on_four_sites_and_none_fires() {
        let monitoring = monitoring(30);
        assert_eq!(monitoring.snapshot.probes.len(), PROBES);
        let probes = monitoring.snapshot.probes.iter();
        let sites: BTreeSet<_> = probes
            .map(|loaded| loaded.probe.heads()[0].site.to_string())
            .collect();
        assert_eq!(sites.len(), PROBE_SITES);
        let policy = monitoring.snapshot.policy(Some(POLICY)).expect("is there");
        assert_eq!(
            (policy.detectors.len(), policy.rules.len()),
            (PROBES, PROBES)
        );
        assert!(policy.detectors.iter().all(|d| d.threshold_logit > 1e29));
    }

    #[test]
    fn every_row_is_changed_and_all_changes_are_in_a_batch() {
        let monitoring = monitoring(2);
        for rows in [1, 3, 4, 16, 32] {
            let of_rows: Vec<_> = (0..rows)
                .map(|row| monitoring.changes_of(row, rows))
                .collect();
            assert!(of_rows.iter().all(|changes| !changes.is_empty()), "{rows}");
            let total: usize = of_rows.iter().map(Vec::len).sum();
            assert_eq!(total, rows.max(INTERVENTIONS), "{rows}");
        }
    }
}
