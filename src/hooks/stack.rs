//! All probes of one snapshot, stacked by site: at each site one pass over a row's hidden state
//! gives the outputs of every head that reads it.

use std::collections::BTreeMap;
use std::sync::Arc;

use inwit_probes::{Probe, ScoreFailure, TokenOutput};

use crate::model::kernels::{dot, l2_norm, prefetch};

pub struct ProbeStack {
    probes: Vec<Arc<Probe>>,
    /// The sites that are read, by `Site::index`, in the order of a pass.
    sites: BTreeMap<usize, Vec<StackedHead>>,
    /// For each probe, where each head's outputs lie in a row of scores.
    columns: Vec<Vec<std::ops::Range<usize>>>,
    width: usize,
}

/// One head at its site.
struct StackedHead {
    /// `[out, d_model]`, row-major, input normalisation folded in.
    weight: Vec<f32>,
    /// `[out]`
    bias: Vec<f32>,
    unit: bool,
    first_column: usize,
}

impl ProbeStack {
    /// Every site of every probe must exist in a model of `n_layers` (`Probe::check_model`).
    pub fn new(probes: Vec<Arc<Probe>>, n_layers: usize) -> Self {
        let mut sites: BTreeMap<usize, Vec<StackedHead>> = BTreeMap::new();
        let mut width = 0;
        let columns = probes
            .iter()
            .map(|probe| {
                let heads = probe.folded_heads().into_iter();
                heads
                    .map(|head| {
                        let columns = width..width + head.out;
                        width = columns.end;
                        let of_site = sites.entry(head.site.index(n_layers)).or_default();
                        of_site.push(StackedHead {
                            weight: head.weight,
                            bias: head.bias,
                            unit: head.unit,
                            first_column: columns.start,
                        });
                        columns
                    })
                    .collect()
            })
            .collect();
        Self {
            probes,
            sites,
            columns,
            width,
        }
    }

    pub fn probes(&self) -> &[Arc<Probe>] {
        &self.probes
    }

    pub fn is_empty(&self) -> bool {
        self.probes.is_empty()
    }

    /// Numbers per row of scores.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The sites that are read, by `Site::index`.
    pub(super) fn sites(&self) -> impl Iterator<Item = usize> {
        self.sites.keys().copied()
    }

    /// Asks for the weights of a site before they are needed: they were last used a whole pass of
    /// other weights ago.
    pub(super) fn fetch(&self, site_index: usize) {
        for head in self.sites.get(&site_index).into_iter().flatten() {
            prefetch(&head.weight);
        }
    }

    /// Scores rows' hidden states `[d_model]` at a site into their rows of scores `[width]`.
    pub(super) fn score<'a>(
        &self,
        site_index: usize,
        rows: impl Iterator<Item = (&'a [f32], &'a mut [f32])>,
    ) {
        let Some(heads) = self.sites.get(&site_index) else {
            return;
        };
        for (hidden, scores) in rows {
            for head in heads {
                let scale = if head.unit { l2_norm(hidden) } else { 1.0 };
                let outputs = head.weight.chunks_exact(hidden.len());
                for (j, (weight, bias)) in outputs.zip(&head.bias).enumerate() {
                    scores[head.first_column + j] = dot(hidden, weight) / scale + bias;
                }
            }
        }
    }

    /// What probe `probe` says of a row of scores. Every site of the probe must have been scored.
    pub fn finish(&self, probe: usize, scores: &[f32]) -> Result<TokenOutput, ScoreFailure> {
        let columns = self.columns[probe].iter();
        self.probes[probe].finish(columns.map(|columns| &scores[columns.clone()]))
    }
}
