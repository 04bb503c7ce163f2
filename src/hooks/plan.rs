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
    /// By `Site::index`: one more than the place in `sites`, or 0 where nothing is done.
    places: Vec<u32>,
    sites: Vec<SitePlan>,
    pub(super) groups: Vec<ScoreGroup>,
}

#[derive(Default)]
pub(super) struct SitePlan {
    pub(super) steers: Vec<RowSteer>,
    /// Indices into the plan's score groups.
    pub(super) scores: Vec<usize>,
    pub(super) captures: Vec<CaptureRows>,
}

/// Rows that are scored by the same probes.
pub(super) struct ScoreGroup {
    pub(super) stack: Arc<ProbeStack>,
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
            places: vec![0; Site::count(n_layers)],
            sites: Vec::new(),
            groups: Vec::new(),
        }
    }

    pub(super) fn n_layers(&self) -> usize {
        self.n_layers
    }

    /// The first site from `index` on where something is done, by `Site::index`; beyond every site
    /// where there is none.
    pub(super) fn next_stop(&self, index: usize) -> usize {
        let rest = self.places.get(index..).unwrap_or_default();
        let next = rest.iter().position(|place| *place != 0);
        next.map_or(usize::MAX, |ahead| index + ahead)
    }

    /// What is done at a site, by `Site::index`; none where nothing is.
    pub(super) fn at(&self, index: usize) -> Option<&SitePlan> {
        let place = *self.places.get(index)? as usize;
        self.sites.get(place.checked_sub(1)?)
    }

    fn at_mut(&mut self, index: usize) -> &mut SitePlan {
        if self.places[index] == 0 {
            self.sites.push(SitePlan::default());
            self.places[index] = self.sites.len() as u32;
        }
        let place = self.places[index] as usize - 1;
        &mut self.sites[place]
    }

    /// Scores `rows` with every probe of `stack`.
    pub fn score(&mut self, stack: &Arc<ProbeStack>, rows: Range<usize>) {
        if stack.is_empty() || rows.is_empty() {
            return;
        }
        if let Some(group) = self
            .groups
            .iter_mut()
            .find(|group| Arc::ptr_eq(&group.stack, stack))
        {
            group.rows.extend(rows);
            return;
        }
        let group = self.groups.len();
        self.groups.push(ScoreGroup {
            stack: Arc::clone(stack),
            rows: rows.collect(),
        });
        for index in stack.sites() {
            self.at_mut(index).scores.push(group);
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
