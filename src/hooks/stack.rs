//! All probes of one snapshot, stacked by site: at each site one pass over a row's hidden state
//! gives the outputs of every head that reads it.

use std::ops::Range;
use std::sync::Arc;

use inwit_probes::{Finisher, Probe, ScoreFailure, TokenOutput};

use crate::model::kernels::{dot, l2_norm, prefetch};

/// What a step reads of it lies in few places side by side: every pass streams weights through the
/// caches, so each place has to be brought from memory again.
pub struct ProbeStack {
    probes: Vec<Arc<Probe>>,
    /// The sites that are read, by `Site::index`, in the order of a pass, and which `heads` do.
    sites: Vec<(usize, Range<usize>)>,
    /// By site.
    heads: Vec<StackedHead>,
    /// Of each probe, and which `columns` are its heads'.
    finishers: Vec<(Finisher, Range<usize>)>,
    /// Where a head's outputs lie in a row of scores: probe by probe, head by head.
    columns: Vec<Range<usize>>,
    width: usize,
}

/// One head at its site.
struct StackedHead {
    /// `[out, d_model]` and then `[out]` of bias, row-major, input normalisation folded in.
    weight: Vec<f32>,
    out: usize,
    unit: bool,
    first_column: usize,
}

impl ProbeStack {
    /// Every site of every probe must exist in a model of `n_layers` (`Probe::check_model`).
    pub fn new(probes: Vec<Arc<Probe>>, n_layers: usize) -> Self {
        let (mut placed, mut columns, mut finishers) = (Vec::new(), Vec::new(), Vec::new());
        let mut width = 0;
        for probe in &probes {
            let first = columns.len();
            for head in probe.folded_heads() {
                let mut weight = head.weight;
                weight.extend(head.bias);
                let stacked = StackedHead {
                    weight,
                    out: head.out,
                    unit: head.unit,
                    first_column: width,
                };
                placed.push((head.site.index(n_layers), stacked));
                columns.push(width..width + head.out);
                width += head.out;
            }
            finishers.push((probe.finisher().clone(), first..columns.len()));
        }
        placed.sort_by_key(|(site, _)| *site);
        let mut sites: Vec<(usize, Range<usize>)> = Vec::new();
        for (place, (site, _)) in placed.iter().enumerate() {
            match sites.last_mut() {
                Some((last, heads)) if last == site => heads.end = place + 1,
                _ => sites.push((*site, place..place + 1)),
            }
        }
        Self {
            probes,
            sites,
            heads: placed.into_iter().map(|(_, head)| head).collect(),
            finishers,
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
    pub(super) fn sites(&self) -> impl ExactSizeIterator<Item = usize> {
        self.sites.iter().map(|(site, _)| *site)
    }

    fn heads_at(&self, site_index: usize) -> &[StackedHead] {
        let place = self.sites.iter().find(|(site, _)| *site == site_index);
        place.map_or(&[], |(_, heads)| &self.heads[heads.clone()])
    }

    /// Asks for what `finish` reads before it is needed.
    pub(super) fn fetch(&self) {
        prefetch(&self.finishers);
        prefetch(&self.columns);
    }

    /// Scores rows' hidden states `[d_model]` at a site into their rows of scores `[width]`.
    pub(super) fn score<'a>(
        &self,
        site_index: usize,
        rows: impl Iterator<Item = (&'a [f32], &'a mut [f32])>,
    ) {
        let heads = self.heads_at(site_index);
        for head in heads {
            prefetch(&head.weight);
        }
        for (hidden, scores) in rows {
            for head in heads {
                let scale = if head.unit { l2_norm(hidden) } else { 1.0 };
                let (weight, bias) = head.weight.split_at(head.out * hidden.len());
                let outputs = weight.chunks_exact(hidden.len()).zip(bias);
                for (j, (weight, bias)) in outputs.enumerate() {
                    scores[head.first_column + j] = dot(hidden, weight) / scale + bias;
                }
            }
        }
    }

    /// What probe `probe` says of a row of scores. Every site of the probe must have been scored.
    pub fn finish(&self, probe: usize, scores: &[f32]) -> Result<TokenOutput, ScoreFailure> {
        let (finisher, columns) = &self.finishers[probe];
        let columns = self.columns[columns.clone()].iter();
        finisher.finish(columns.map(|columns| &scores[columns.clone()]))
    }
}
