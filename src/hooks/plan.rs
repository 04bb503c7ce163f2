//! What one step reads and changes: compiled from the wishes of the running sequences.
//! Plain data; `run.rs` carries it out.

use std::ops::Range;
use std::sync::Arc;

use inwit_probes::Site;

use super::stack::ProbeStack;

/// How many interventions one request may ask for.
pub const INTERVENTION_LIMIT: usize = 64;

/// Rows, sites and actions of one step. An empty plan costs one comparison per site.
pub struct HookPlan {
    n_layers: usize,
    /// Where something is done, in the order of a pass.
    sites: Vec<SitePlan>,
    pub(super) groups: Vec<ScoreGroup>,
}

pub(super) struct SitePlan {
    /// `Site::index`
    pub(super) index: usize,
    pub(super) steers: Vec<RowSteer>,
    /// Whether a score group reads it.
    pub(super) scored: bool,
    pub(super) captures: Vec<CaptureRows>,
}

/// Rows that are scored by the same probes.
pub(super) struct ScoreGroup {
    pub(super) stack: Arc<ProbeStack>,
    /// Ascending.
    pub(super) rows: Vec<usize>,
}

pub(super) struct RowSteer {
    pub(super) row: usize,
    pub(super) kind: InterventionKind,
    pub(super) vector: Arc<[f32]>,
    pub(super) condition: Option<RowCondition>,
}

pub(super) struct CaptureRows {
    pub(super) key: usize,
    pub(super) rows: Range<usize>,
}

/// How a vector `v` changes a hidden state `h`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InterventionKind {
    /// `h += strength * v`
    Add { strength: f32 },
    /// `h -= (h.v) v`, with `v` of unit length.
    ProjectOut,
    /// `h += (bound - h.v) v` where `h.v > bound`, with `v` of unit length.
    ClampAbove { bound: f32 },
    /// `h += (bound - h.v) v` where `h.v < bound`, with `v` of unit length.
    ClampBelow { bound: f32 },
}

impl InterventionKind {
    /// The vector as `HookPlan::steer` takes it: of unit length where the formula asks for it,
    /// which a vector of zeros cannot have; then there is none.
    pub fn prepare(&self, vector: &[f32]) -> Option<Arc<[f32]>> {
        match self {
            Self::Add { .. } => Some(Arc::from(vector)),
            Self::ProjectOut | Self::ClampAbove { .. } | Self::ClampBelow { .. } => {
                // In f64 the squares of finite f32 neither overflow nor vanish.
                let square = |value: &f32| f64::from(*value).powi(2);
                let length = vector.iter().map(square).sum::<f64>().sqrt();
                let unit = |value: &f32| (f64::from(*value) / length) as f32;
                (length > 0.0).then(|| vector.iter().map(unit).collect())
            }
        }
    }
}

/// Steers only where this probe's logit for the same row is above the bound. The row must be
/// scored with `stack`, and the probe's sites must come before the steered one.
#[derive(Clone)]
pub struct RowCondition {
    pub stack: Arc<ProbeStack>,
    pub probe: usize,
    pub above: f32,
}

impl HookPlan {
    pub fn new(n_layers: usize) -> Self {
        Self {
            n_layers,
            sites: Vec::new(),
            groups: Vec::new(),
        }
    }

    pub(super) fn n_layers(&self) -> usize {
        self.n_layers
    }

    pub(super) fn sites(&self) -> &[SitePlan] {
        &self.sites
    }

    fn at_mut(&mut self, index: usize) -> &mut SitePlan {
        let place = self.sites.binary_search_by_key(&index, |site| site.index);
        let place = place.unwrap_or_else(|place| {
            let site = SitePlan {
                index,
                steers: Vec::new(),
                scored: false,
                captures: Vec::new(),
            };
            self.sites.insert(place, site);
            place
        });
        &mut self.sites[place]
    }

    /// Scores `rows` with every probe of `stack`. Rows come in the order of the batch.
    pub fn score(&mut self, stack: &Arc<ProbeStack>, rows: Range<usize>) {
        if stack.is_empty() || rows.is_empty() {
            return;
        }
        if let Some(group) = self
            .groups
            .iter_mut()
            .find(|group| Arc::ptr_eq(&group.stack, stack))
        {
            debug_assert!(group.rows.last() < Some(&rows.start), "rows in order");
            group.rows.extend(rows);
            return;
        }
        self.groups.push(ScoreGroup {
            stack: Arc::clone(stack),
            rows: rows.collect(),
        });
        self.sites.reserve(stack.sites().len());
        for index in stack.sites() {
            self.at_mut(index).scored = true;
        }
    }

    /// Changes one row at one site. Changes of a row apply in the order of these calls.
    pub fn steer(
        &mut self,
        site: Site,
        row: usize,
        kind: InterventionKind,
        vector: &Arc<[f32]>,
        condition: Option<RowCondition>,
    ) {
        // Adding nothing is doing nothing, to the sign of a zero.
        if kind == (InterventionKind::Add { strength: 0.0 }) {
            return;
        }
        let index = site.index(self.n_layers);
        self.at_mut(index).steers.push(RowSteer {
            row,
            kind,
            vector: Arc::clone(vector),
            condition,
        });
    }

    /// Copies `rows` at one site; `key` comes back with them.
    pub fn capture(&mut self, site: Site, key: usize, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
        let index = site.index(self.n_layers);
        self.at_mut(index).captures.push(CaptureRows { key, rows });
    }
}
