//! Carries a plan out while a forward pass goes by.

use std::ops::Range;

use candle_core::Tensor;
use inwit_probes::{ScoreFailure, Site, TokenOutput};

use super::plan::{CaptureRows, HookPlan, InterventionKind, RowSteer};
use crate::error::{Error, Result};
use crate::model::host;
use crate::model::kernels::{axpy, beside, dot};

/// One pass under one plan. Made for the pass, gone with it.
pub struct HookRun<'a> {
    plan: &'a HookPlan,
    /// For each score group `[rows of the group, width of its stack]`.
    scores: Vec<Vec<f32>>,
    captured: Vec<Captured>,
    failures: Vec<(usize, ScoreFailure)>,
    /// Of the batch.
    rows: usize,
    n_layers: usize,
    /// Where something is to be done next, by `Site::index`; beyond every site once all is done.
    /// A pass visits some 150 sites after streaming weights through the caches, so those where
    /// nothing is done look at nothing but this run.
    next_stop: usize,
    /// How many of the plan's sites are behind.
    passed: usize,
    /// Sites whose states are still to be scored, by `Site::index`, in the order of a pass.
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
        Self {
            plan,
            scores,
            captured: Vec::new(),
            failures: Vec::new(),
            rows,
            n_layers: plan.n_layers(),
            next_stop: plan.sites().first().map_or(usize::MAX, |site| site.index),
            passed: 0,
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
        let plan = self.plan;
        let [actions, ahead @ ..] = &plan.sites()[self.passed..] else {
            return Err(Error::internal("a pass went on beyond its plan"));
        };
        if actions.index != index {
            return Err(Error::internal("a pass left out a site of its plan"));
        }
        self.passed += 1;
        self.next_stop = ahead.first().map_or(usize::MAX, |site| site.index);
        let hidden = if actions.steers.is_empty() {
            hidden
        } else {
            self.steer(&actions.steers, &hidden)?
        };
        if actions.scored {
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

    /// Runs what comes after a site, and scores that site beside its first product: on a CPU, where
    /// states are near only for so long. Another device would have to be waited for.
    #[inline]
    pub fn beside<T>(&mut self, main: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.unscored.first() {
            Some((_, hidden)) if hidden.device().is_cpu() => self.score_beside(main),
            _ => main(),
        }
    }

    fn score_beside<T>(&mut self, main: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut scored = Ok(());
        let result = beside(|| scored = self.score(), main);
        // Here, so that the memory goes back to the thread that it came from.
        self.unscored.clear();
        scored.and(result)
    }

    /// Scores what has not been. Whoever calls it forgets what was.
    fn score(&mut self) -> Result<()> {
        for (index, hidden) in &self.unscored {
            host::read(hidden, |values| {
                let width = values.len() / self.rows;
                for (plan, scores) in self.plan.groups.iter().zip(&mut self.scores) {
                    let rows = plan.rows.iter();
                    let rows = rows.map(|row| &values[row * width..(row + 1) * width]);
                    let scores = scores.chunks_exact_mut(plan.stack.width());
                    plan.stack.score(*index, rows.zip(scores));
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
        self.unscored.clear();
        let is_stack = |group: &super::plan::ScoreGroup| {
            std::sync::Arc::ptr_eq(&group.stack, &condition.stack)
        };
        let group = self.plan.groups.iter().position(is_stack);
        let scores = group.and_then(|group| row_of(self.plan, &self.scores, group, steer.row));
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
        if self.next_stop != usize::MAX {
            return Err(Error::internal(
                "a pass ended before the last site of its plan",
            ));
        }
        for group in &self.plan.groups {
            group.stack.fetch();
        }
        self.score()?;
        Ok(Scores {
            plan: self.plan,
            scores: self.scores,
            captured: self.captured,
            failures: self.failures,
        })
    }
}

fn row_of<'a>(
    plan: &HookPlan,
    scores: &'a [Vec<f32>],
    group: usize,
    row: usize,
) -> Option<&'a [f32]> {
    let place = plan.groups[group].rows.binary_search(&row).ok()?;
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
    /// What every probe of the row's stack says of that row; nothing for a row that is not scored.
    pub fn of_row(
        &self,
        row: usize,
    ) -> impl ExactSizeIterator<Item = Result<TokenOutput, ScoreFailure>> {
        let groups = 0..self.plan.groups.len();
        let mut scored =
            groups.filter_map(|group| Some((group, row_of(self.plan, &self.scores, group, row)?)));
        let scored = scored.next();
        let probes = scored.map_or(0, |(group, _)| self.plan.groups[group].stack.probes().len());
        (0..probes).map(move |probe| match scored {
            Some((group, scores)) => self.plan.groups[group].stack.finish(probe, scores),
            None => Err(ScoreFailure::Shape),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use inwit_probes::{Head, InputNorm, Kind, Manifest, ModelIdentity, Positions, Probe};
    use std::sync::Arc;

    use crate::hooks::ProbeStack;

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
        assert!(plan.sites().is_empty());
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

    /// Two heads at one site and one at another.
    fn stack() -> Arc<ProbeStack> {
        let probe = |name: &str, site: Site, norm: InputNorm| {
            let model = ModelIdentity {
                name: "tiny".into(),
                architecture_id: "a".into(),
                weights_id: "w".into(),
                weight_format: "f32".into(),
            };
            let positions = Positions::EveryGenerated;
            let manifest = Manifest::new(name, Kind::Logistic, 4, positions, model);
            let head = Head {
                site,
                weight: vec![0.5, -1.0, 0.25, name.len() as f32],
                bias: vec![0.125],
                out: 1,
                norm,
            };
            Arc::new(Probe::new(manifest, vec![head], None).expect("a probe"))
        };
        let probes = vec![
            probe("late", Site::ResidPost(1), InputNorm::None),
            probe("early", Site::ResidPost(0), InputNorm::Unit),
            probe("lately", Site::ResidPost(1), InputNorm::Unit),
        ];
        Arc::new(ProbeStack::new(probes, 2))
    }

    /// With something to run beside after each site, or with nothing, so that all waits for the end.
    fn scored(
        stack: &Arc<ProbeStack>,
        states: &[Tensor; 2],
        rows: Range<usize>,
        goes_on: bool,
    ) -> Vec<Vec<f32>> {
        let mut plan = HookPlan::new(2);
        plan.score(stack, rows.clone());
        let mut run = HookRun::new(&plan, states[0].dim(0).expect("rows"));
        for (layer, state) in states.iter().enumerate() {
            let site = Site::ResidPost(layer as u16);
            run.visit(site, state.clone()).expect("visits");
            assert_eq!(run.unscored.len(), if goes_on { 1 } else { layer + 1 });
            if goes_on {
                run.beside(|| Ok(())).expect("scores");
                assert!(run.unscored.is_empty(), "what is scored is not kept");
            }
        }
        let scores = run.finish().expect("scores");
        let of_row = |row| {
            let outputs = scores.of_row(row);
            outputs
                .map(|output| output.expect("finite").logit)
                .collect()
        };
        assert_eq!(scores.of_row(rows.end).len(), 0);
        rows.map(of_row).collect()
    }

    #[test]
    fn a_site_of_the_plan_that_does_not_come_by_fails_the_pass() {
        let mut plan = HookPlan::new(2);
        plan.capture(Site::MlpOut(0), 7, 0..1);
        let mut run = HookRun::new(&plan, 3);
        assert!(run.visit(Site::ResidPost(0), hidden()).is_err());
        assert!(HookRun::new(&plan, 3).finish().is_err());
    }

    #[test]
    fn beside_what_follows_and_at_the_end_and_among_others_rows_are_scored_alike() {
        let rows = 5;
        let states = [0, 1].map(|layer| {
            let value = |i: usize| ((i * 7 + layer * 3) % 23) as f32 * 0.17 - 1.5;
            let values: Vec<f32> = (0..rows * 4).map(value).collect();
            Tensor::from_vec(values, (rows, 4), &Device::Cpu).expect("makes a tensor")
        });
        let stack = stack();
        let beside = scored(&stack, &states, 1..rows, true);
        assert_eq!(beside, scored(&stack, &states, 1..rows, false));
        assert_eq!(beside.len(), rows - 1);
        // Nor do neighbours change what a row is given.
        let few = states
            .each_ref()
            .map(|state| state.narrow(0, 1, 3).expect("three rows"));
        assert_eq!(beside[..2], scored(&stack, &few, 0..2, true));
        // Each probe from its own site, in its own column.
        let row = |layer: usize| states[layer].to_vec2::<f32>().expect("reads")[1].clone();
        for (probe, score) in stack.probes().iter().zip(&beside[0]) {
            let at = |site| if site == Site::ResidPost(0) { 0 } else { 1 };
            let states = [row(0), row(1)];
            let plain = probe.score_row(|site| &states[at(site)]).expect("scores");
            assert!((plain.logit - score).abs() < 1e-5, "{}", probe.name());
        }
    }

    #[test]
    fn what_fails_while_a_site_is_scored_beside_it_is_told() {
        let stack = stack();
        let mut plan = HookPlan::new(2);
        plan.score(&stack, 0..3);
        let mut run = HookRun::new(&plan, 3);
        run.visit(Site::ResidPost(0), hidden()).expect("visits");
        let failed: Result<()> = run.beside(|| Err(Error::internal("on purpose")));
        assert!(failed.is_err());
    }
}
