//! Carries a plan out while a forward pass goes by.

use std::ops::Range;

use candle_core::Tensor;
use inwit_probes::{ScoreFailure, Site, TokenOutput};

use super::plan::{CaptureRows, HookPlan, InterventionKind, RowSteer};
use crate::error::{Error, Result};
use crate::model::host;
use crate::model::kernels::{axpy, dot};

/// One pass under one plan. Made for the pass, gone with it.
pub struct HookRun<'a> {
    plan: &'a HookPlan,
    /// For each score group `[rows of the group, width of its stack]`.
    scores: Vec<Vec<f32>>,
    /// For each score group, row of the batch -> row of the group plus one; 0 is absent.
    group_rows: Vec<Vec<usize>>,
    captured: Vec<Captured>,
    failures: Vec<(usize, ScoreFailure)>,
    n_layers: usize,
    /// Where something is to be done next, by `Site::index`; beyond every site once all is done.
    /// A pass visits some 150 sites after streaming weights through the caches, so those where
    /// nothing is done look at nothing but this run.
    next_stop: usize,
    /// States that are still to be scored, by `Site::index`. They are scored together, when the
    /// pass is over or a condition asks: weights and code have to be brought in from memory once
    /// instead of at every site.
    unscored: Vec<(usize, Tensor)>,
}

/// Hidden states of some rows at one site.
#[derive(Debug, Clone, PartialEq)]
pub struct Captured {
    pub key: usize,
    pub site: Site,
    pub rows: Range<usize>,
    /// `[rows, d_model]`, row-major.
    pub values: Vec<f32>,
}

/// What a pass read, once it is over.
pub struct Scores<'a> {
    plan: &'a HookPlan,
    scores: Vec<Vec<f32>>,
    group_rows: Vec<Vec<usize>>,
    pub captured: Vec<Captured>,
    /// Rows whose condition could not be decided, because its probe gave no number.
    pub failures: Vec<(usize, ScoreFailure)>,
}

impl<'a> HookRun<'a> {
    /// `rows`: how many rows the batch has.
    pub fn new(plan: &'a HookPlan, rows: usize) -> Self {
        let scores = plan
            .groups
            .iter()
            .map(|group| vec![0f32; group.rows.len() * group.stack.width()])
            .collect();
        let group_rows = plan
            .groups
            .iter()
            .map(|group| {
                let mut places = vec![0; rows];
                for (place, row) in group.rows.iter().enumerate() {
                    places[*row] = place + 1;
                }
                places
            })
            .collect();
        Self {
            plan,
            scores,
            group_rows,
            captured: Vec::new(),
            failures: Vec::new(),
            n_layers: plan.n_layers(),
            next_stop: plan.next_stop(0),
            unscored: Vec::new(),
        }
    }

    /// The pass is at `site` with `hidden` `[rows, d_model]`; what it returns flows on. Sites come
    /// in the order of a pass.
    #[inline]
    pub fn visit(&mut self, site: Site, hidden: Tensor) -> Result<Tensor> {
        let index = site.index(self.n_layers);
        if index < self.next_stop {
            return Ok(hidden);
        }
        self.stop(site, index, hidden)
    }

    #[inline(never)]
    fn stop(&mut self, site: Site, index: usize, hidden: Tensor) -> Result<Tensor> {
        self.next_stop = self.plan.next_stop(index + 1);
        let Some(actions) = self.plan.at(index) else {
            return Ok(hidden);
        };
        let hidden = if actions.steers.is_empty() {
            hidden
        } else {
            self.steer(&actions.steers, &hidden)?
        };
        if !actions.scores.is_empty() {
            self.unscored.push((index, hidden.clone()));
        }
        if !actions.captures.is_empty() {
            let width = hidden.dim(1)?;
            host::read(&hidden, |values| {
                self.capture(site, &actions.captures, values, width);
            })?;
        }
        Ok(hidden)
    }

    /// Scores what was kept for it.
    fn score(&mut self) -> Result<()> {
        let unscored = std::mem::take(&mut self.unscored);
        for (index, _) in &unscored {
            let groups = self.plan.at(*index).into_iter().flat_map(|at| &at.scores);
            groups.for_each(|group| self.plan.groups[*group].stack.fetch(*index));
        }
        for (index, hidden) in unscored {
            let Some(actions) = self.plan.at(index) else {
                continue;
            };
            let width = hidden.dim(1)?;
            host::read(&hidden, |values| {
                for group in &actions.scores {
                    let (plan, scores) = (&self.plan.groups[*group], &mut self.scores[*group]);
                    let rows = plan.rows.iter();
                    let rows = rows.map(|row| &values[row * width..(row + 1) * width]);
                    let scores = scores.chunks_exact_mut(plan.stack.width());
                    plan.stack.score(index, rows.zip(scores));
                }
            })?;
        }
        Ok(())
    }

    fn capture(&mut self, site: Site, captures: &[CaptureRows], values: &[f32], width: usize) {
        for capture in captures {
            self.captured.push(Captured {
                key: capture.key,
                site,
                rows: capture.rows.clone(),
                values: values[capture.rows.start * width..capture.rows.end * width].to_vec(),
            });
        }
    }

    fn steer(&mut self, steers: &[RowSteer], hidden: &Tensor) -> Result<Tensor> {
        let width = hidden.dim(1)?;
        let mut values = host::read(hidden, <[f32]>::to_vec)?;
        for steer in steers {
            if self.holds(steer)? {
                let row = &mut values[steer.row * width..(steer.row + 1) * width];
                apply(steer.kind, &steer.vector, row);
            }
        }
        host::tensor_like(values, hidden)
    }

    fn holds(&mut self, steer: &RowSteer) -> Result<bool> {
        let Some(condition) = &steer.condition else {
            return Ok(true);
        };
        self.score()?;
        let is_stack = |group: &super::plan::ScoreGroup| {
            std::sync::Arc::ptr_eq(&group.stack, &condition.stack)
        };
        let group = self.plan.groups.iter().position(is_stack);
        let scores = group
            .and_then(|group| row_of(self.plan, &self.scores, &self.group_rows, group, steer.row));
        let scores = scores.ok_or_else(|| {
            Error::internal("a conditional intervention on a row that is not scored")
        })?;
        match condition.stack.finish(condition.probe, scores) {
            Ok(output) => Ok(output.logit > condition.above),
            Err(failure) => {
                self.failures.push((steer.row, failure));
                Ok(false)
            }
        }
    }

    /// The pass is over.
    pub fn finish(mut self) -> Result<Scores<'a>> {
        self.score()?;
        Ok(Scores {
            plan: self.plan,
            scores: self.scores,
            group_rows: self.group_rows,
            captured: self.captured,
            failures: self.failures,
        })
    }
}

fn row_of<'a>(
    plan: &HookPlan,
    scores: &'a [Vec<f32>],
    group_rows: &[Vec<usize>],
    group: usize,
    row: usize,
) -> Option<&'a [f32]> {
    let place = group_rows[group].get(row)?.checked_sub(1)?;
    let width = plan.groups[group].stack.width();
    Some(&scores[group][place * width..(place + 1) * width])
}

fn apply(kind: InterventionKind, vector: &[f32], hidden: &mut [f32]) {
    match kind {
        InterventionKind::Add { strength } => axpy(strength, vector, hidden),
        InterventionKind::ProjectOut => {
            let along = dot(hidden, vector);
            axpy(-along, vector, hidden);
        }
        InterventionKind::ClampAbove { bound } => {
            let along = dot(hidden, vector);
            if along > bound {
                axpy(bound - along, vector, hidden);
            }
        }
        InterventionKind::ClampBelow { bound } => {
            let along = dot(hidden, vector);
            if along < bound {
                axpy(bound - along, vector, hidden);
            }
        }
    }
}

impl Scores<'_> {
    /// What every probe of the row's stack says of that row; none for a row that is not scored.
    pub fn of_row(&self, row: usize) -> Option<Vec<Result<TokenOutput, ScoreFailure>>> {
        (0..self.plan.groups.len()).find_map(|group| {
            let scores = row_of(self.plan, &self.scores, &self.group_rows, group, row)?;
            let stack = &self.plan.groups[group].stack;
            Some(
                (0..stack.probes().len())
                    .map(|probe| stack.finish(probe, scores))
                    .collect(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use std::sync::Arc;

    const SITE: Site = Site::ResidPost(0);

    fn hidden() -> Tensor {
        let values: Vec<f32> = (0..12).map(|i| i as f32 * 0.25 - 1.0).collect();
        Tensor::from_vec(values, (3, 4), &Device::Cpu).expect("makes a tensor")
    }

    fn visit(plan: &HookPlan) -> Vec<Vec<f32>> {
        let out = HookRun::new(plan, 3).visit(SITE, hidden()).expect("visits");
        out.to_vec2().expect("reads")
    }

    fn vector() -> Arc<[f32]> {
        Arc::from([0.5f32, 0.5, -0.5, 0.5])
    }

    fn along(row: &[f32]) -> f32 {
        dot(row, &vector())
    }

    #[test]
    fn an_empty_plan_returns_the_very_state() {
        assert_eq!(
            visit(&HookPlan::new(1)),
            hidden().to_vec2::<f32>().expect("reads")
        );
    }

    #[test]
    fn a_pass_stops_where_something_is_done_and_nowhere_else() {
        let mut plan = HookPlan::new(3);
        plan.capture(Site::MlpOut(0), 7, 0..1);
        plan.capture(Site::MlpOut(2), 7, 2..3);
        let mut run = HookRun::new(&plan, 3);
        let mut stops = Vec::new();
        for site in Site::all(3) {
            let before = run.captured.len();
            run.visit(site, hidden()).expect("visits");
            stops.extend((run.captured.len() > before).then_some(site));
        }
        assert_eq!(stops, [Site::MlpOut(0), Site::MlpOut(2)]);
        assert_eq!(run.next_stop, usize::MAX);
    }

    #[test]
    fn steering_one_row_leaves_its_neighbours_alone() {
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            1,
            InterventionKind::Add { strength: 2.0 },
            &vector(),
            None,
        );
        let (before, after) = (hidden().to_vec2::<f32>().expect("reads"), visit(&plan));
        assert_eq!((&before[0], &before[2]), (&after[0], &after[2]));
        let expected: Vec<f32> = before[1]
            .iter()
            .zip(vector().iter())
            .map(|(h, v)| h + 2.0 * v)
            .collect();
        assert_eq!(after[1], expected);
    }

    #[test]
    fn steering_by_zero_plans_nothing() {
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            1,
            InterventionKind::Add { strength: 0.0 },
            &vector(),
            None,
        );
        assert_eq!(plan.next_stop(0), usize::MAX);
    }

    #[test]
    fn projecting_out_leaves_nothing_along_the_vector() {
        let mut plan = HookPlan::new(1);
        plan.steer(SITE, 2, InterventionKind::ProjectOut, &vector(), None);
        assert!(along(&visit(&plan)[2]).abs() < 1e-6);
    }

    #[test]
    fn a_clamp_moves_only_what_is_beyond_its_bound() {
        let before = along(&hidden().to_vec2::<f32>().expect("reads")[2]);
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            2,
            InterventionKind::ClampAbove {
                bound: before + 1.0,
            },
            &vector(),
            None,
        );
        assert_eq!(visit(&plan), hidden().to_vec2::<f32>().expect("reads"));
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            2,
            InterventionKind::ClampAbove {
                bound: before - 1.0,
            },
            &vector(),
            None,
        );
        assert!((along(&visit(&plan)[2]) - (before - 1.0)).abs() < 1e-6);
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            2,
            InterventionKind::ClampBelow {
                bound: before + 1.0,
            },
            &vector(),
            None,
        );
        assert!((along(&visit(&plan)[2]) - (before + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn a_capture_sees_what_flows_on() {
        let mut plan = HookPlan::new(1);
        plan.steer(
            SITE,
            1,
            InterventionKind::Add { strength: 1.0 },
            &vector(),
            None,
        );
        plan.capture(SITE, 7, 1..3);
        let mut run = HookRun::new(&plan, 3);
        let out = run
            .visit(SITE, hidden())
            .expect("visits")
            .to_vec2::<f32>()
            .expect("reads");
        let captured = run.finish().expect("scores").captured;
        assert_eq!(captured[0].key, 7);
        assert_eq!(captured[0].values, out[1..].concat());
    }
}
