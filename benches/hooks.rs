//! What a pass does at its sites, without the pass: 8 probes on 4 sites, 16 interventions, a capture.

use std::hint::black_box;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use inwit::hooks::{HookPlan, HookRun, ProbeStack, Site};
use inwit::lab::monitoring::{Monitor, Monitoring, POLICY, PROBES};
use inwit::policy::{PolicyState, StepLog};
use inwit::registry::ModelIds;
use inwit_probes::TokenOutput;

const LAYERS: usize = 30;
const WIDTH: usize = 576;

fn ids() -> ModelIds {
    ModelIds {
        architecture_id: "bench".into(),
        weights_id: "bench".into(),
        d_model: WIDTH,
        n_layers: LAYERS,
        vocab: 49_152,
    }
}

fn plan(
    monitor: Monitor,
    rows: usize,
    monitoring: &Monitoring,
    stack: &Arc<ProbeStack>,
) -> HookPlan {
    let mut plan = HookPlan::new(LAYERS);
    for row in 0..rows {
        match monitor {
            Monitor::Off => {}
            Monitor::Probes => plan.score(stack, row..row + 1),
            Monitor::Interventions => {
                for change in monitoring.changes_of(row, rows) {
                    plan.steer(change.site, row, change.kind, &change.vector, None);
                }
            }
            Monitor::Capture => plan.capture(monitoring.captured, row, row..row + 1),
        }
    }
    plan
}

/// One pass's visits to every site after a block, what follows each of them, and the scores.
fn pass(plan: &HookPlan, hidden: &Tensor, rows: usize) {
    let mut run = HookRun::new(plan, rows);
    for layer in 0..LAYERS as u16 {
        let visited = run.visit(Site::ResidPost(layer), hidden.clone());
        let visited = visited.expect("visits");
        black_box(run.beside(|| Ok(visited)).expect("scores"));
    }
    let scores = run.finish().expect("scores");
    for row in 0..rows {
        scores
            .of_row(row)
            .for_each(|output| drop(black_box(output)));
    }
}

fn hooks(c: &mut Criterion) {
    let monitoring = Monitoring::new(&ids(), 0).expect("makes probes");
    let probes = monitoring.snapshot.probes.iter();
    let probes = probes
        .map(|loaded| Arc::new(loaded.probe.clone()))
        .collect();
    let stack = Arc::new(ProbeStack::new(probes, LAYERS));
    let mut group = c.benchmark_group("hooks");
    for monitor in Monitor::ALL {
        for rows in [1, 16] {
            let values: Vec<f32> = (0..rows * WIDTH).map(|i| (i % 17) as f32 * 0.1).collect();
            let hidden = Tensor::from_vec(values, (rows, WIDTH), &Device::Cpu).expect("a tensor");
            group.bench_function(BenchmarkId::new(monitor.as_str(), rows), |b| {
                b.iter(|| pass(&plan(monitor, rows, &monitoring, &stack), &hidden, rows));
            });
        }
    }
    group.finish();
    record(c, &monitoring);
}

/// What is left for the end of an answer: the probabilities of its record.
fn record(c: &mut Criterion, monitoring: &Monitoring) {
    let policy = monitoring.snapshot.policy(Some(POLICY)).expect("is there");
    let outputs: Vec<_> = (0..PROBES)
        .map(|probe| Some(TokenOutput::logit(probe as f32 * 0.3 - 1.0)))
        .collect();
    let log = || {
        let (mut log, mut state) = (StepLog::default(), PolicyState::new(policy));
        for k in 1..=128 {
            state.observe_generated(policy, k, k, &outputs);
            let decision = state.decide(policy);
            log.decided(decision, &state);
        }
        log
    };
    c.bench_function("record of 128 tokens", |b| {
        b.iter_batched(log, |log| log.finish(policy), BatchSize::SmallInput);
    });
}

criterion_group!(benches, hooks);
criterion_main!(benches);
