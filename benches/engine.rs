//! Whole requests through the engine on the tiny golden model, where the arithmetic is next to
//! nothing: what is left is scheduling, sequences, release and events. And the scheduler alone.

use std::path::Path;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use inwit::engine::{
    Defaults, Draft, Engine, EngineOptions, Events, Model, MonitorDraft, Pace, Pending,
    PromptDraft, prepare,
};
use inwit::journal::Discard;
use inwit::lab::monitoring::{Monitoring, POLICY};
use inwit::model::kernels::WeightFormat;
use inwit::model::{Placement, Source};
use inwit::policy::Mode;

const ANSWER: u32 = 32;

fn engine() -> Engine {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama/hf");
    let source = Source::open(&golden).expect("the golden model");
    let model = Model::load(&source, &Placement::cpu(WeightFormat::F32)).expect("loads");
    let options = EngineOptions {
        threads: 1,
        kv_bytes: 64 << 20,
        ..EngineOptions::default()
    };
    let (engine, _thread) = Engine::start(model, options, Arc::new(Discard)).expect("starts");
    engine
}

fn submit(engine: &Engine, monitoring: &Monitoring, stream: u32, mode: Mode) -> Events {
    let mut draft = Draft::of(PromptDraft::Tokens(vec![40 + stream % 200; 8]));
    draft.sampling.max_tokens = Some(ANSWER);
    draft.skip_prefix_cache = true;
    draft.monitor = MonitorDraft {
        mode: Some(mode),
        policy: (mode != Mode::Off).then(|| POLICY.into()),
        ..MonitorDraft::default()
    };
    let defaults = Defaults {
        mode: Mode::Off,
        policy: None,
        max_tokens: ANSWER,
        overrides: true,
    };
    let request = prepare(draft, engine, &monitoring.snapshot, &defaults).expect("a request");
    engine.submit(request).expect("is taken")
}

fn requests(c: &mut Criterion) {
    let engine = engine();
    let monitoring = Monitoring::new(&engine.info().ids(), 0).expect("makes probes");
    let mut group = c.benchmark_group("engine");
    for mode in [Mode::Off, Mode::Shadow] {
        for streams in [1, 16] {
            group.throughput(Throughput::Elements(u64::from(streams * ANSWER)));
            group.bench_function(BenchmarkId::new(mode.as_str(), streams), |b| {
                b.iter(|| {
                    let all: Vec<Events> = (0..streams)
                        .map(|stream| submit(&engine, &monitoring, stream, mode))
                        .collect();
                    for mut events in all {
                        while events.blocking_next().is_some() {}
                    }
                });
            });
        }
    }
    group.finish();
}

/// Choosing the rows of one step, and learning from how long it took; a quarter are prompts.
fn scheduler(c: &mut Criterion) {
    let mut group = c.benchmark_group("scheduler");
    for sequences in [1, 16, 256] {
        let pending: Vec<Pending> = (0..sequences)
            .map(|sequence| match sequence % 4 {
                3 => Pending {
                    tokens: 400,
                    computed: 64,
                    prefill: true,
                },
                _ => Pending {
                    tokens: 1,
                    computed: 100,
                    prefill: false,
                },
            })
            .collect();
        let mut pace = Pace::new(512, 60, 1000.0);
        group.throughput(Throughput::Elements(sequences));
        group.bench_function(BenchmarkId::new("step", sequences), |b| {
            b.iter(|| {
                let rows = pace.next_step(&pending);
                let work: usize = rows.iter().sum();
                pace.learn(&pending, &rows, 1e-3 + 1e-4 * work as f64);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, requests, scheduler);
criterion_main!(benches);
