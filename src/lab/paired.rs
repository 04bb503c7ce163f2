//! What monitoring adds to a decode step, measured step by step: base, variant, variant, base, or
//! the other way round, on the same tokens and the same keys and values, in one process.
//! Works on the decoder itself, as the engine's thread does; knows no requests.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use inwit_probes::TokenOutput;
use serde::Serialize;

use super::monitoring::{Change, Monitor, Monitoring, POLICY};
use super::seeded::Seeded;
use super::statistics::{Added, Alternation, added};
use crate::engine::fetch_policy;
use crate::error::{Error, Result};
use crate::hooks::{HookPlan, HookRun, ProbeStack, Scores};
use crate::model::kernels::{ComputePool, KV_BLOCK, KvType, beside};
use crate::model::{Batch, Decoder, KvCache, host};
use crate::policy::{DecisionStep, Policy, PolicyState, StepLog};

#[derive(Clone, Debug)]
pub struct PairedOptions {
    /// Pairs of a base and a variant step, for each variant and number of streams.
    pub pairs: usize,
    /// Positions that are there before the first measured one.
    pub context: usize,
    /// Positions that are measured; then it starts again at the first.
    pub window: usize,
    pub kv_type: KvType,
    pub seed: u64,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct AddedRow {
    pub streams: usize,
    pub monitor: Monitor,
    #[serde(flatten)]
    pub added: Added,
}

/// Steps of some streams at once over prepared keys and values.
pub struct Steps<'a> {
    decoder: &'a Decoder,
    pool: &'a ComputePool,
    monitoring: &'a Monitoring,
    options: PairedOptions,
    kv: KvCache,
    /// Of each stream: its tokens, and the blocks that hold their keys and values.
    streams: Vec<Stream>,
    stack: Arc<ProbeStack>,
    policy: Arc<Policy>,
    /// Of each row.
    changes: Vec<Vec<&'a Change>>,
    watches: Vec<Watch>,
    /// Of the last step.
    logits: Vec<f32>,
}

struct Stream {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
}

/// What the engine keeps for a monitored sequence: the policy's state and the record.
struct Watch {
    policy: PolicyState,
    record: StepLog,
    generated: u32,
}

impl<'a> Steps<'a> {
    /// Reads the first `context` tokens of every stream; each must have `context + window`.
    pub fn new(
        decoder: &'a Decoder,
        pool: &'a ComputePool,
        monitoring: &'a Monitoring,
        tokens: Vec<Vec<u32>>,
        options: PairedOptions,
    ) -> Result<Self> {
        let positions = options.context + options.window;
        if options.window == 0 || tokens.iter().any(|tokens| tokens.len() < positions) {
            return Err(Error::internal("a stream is shorter than what is measured"));
        }
        let per_stream = positions.div_ceil(KV_BLOCK);
        let blocks = per_stream * tokens.len();
        let kv = KvCache::new(
            decoder.config(),
            options.kv_type,
            blocks,
            decoder.placement(),
        )?;
        let probes = monitoring.snapshot.probes.iter();
        let probes = probes.map(|loaded| Arc::new(loaded.probe.clone()));
        let stack = ProbeStack::new(probes.collect(), decoder.config().n_layers);
        let policy = Arc::clone(monitoring.snapshot.policy(Some(POLICY))?);
        let rows = tokens.len();
        let streams = tokens.into_iter().zip(0u32..).map(|(tokens, stream)| {
            let first = stream * per_stream as u32;
            Stream {
                tokens,
                blocks: (first..first + per_stream as u32).collect(),
            }
        });
        let mut steps = Self {
            decoder,
            pool,
            monitoring,
            options,
            kv,
            streams: streams.collect(),
            stack: Arc::new(stack),
            changes: (0..rows)
                .map(|row| monitoring.changes_of(row, rows))
                .collect(),
            watches: (0..rows).map(|_| Watch::new(&policy)).collect(),
            logits: Vec::new(),
            policy,
        };
        steps.prefill()?;
        Ok(steps)
    }

    /// What `variant` adds. `tick` hears of every alternation.
    pub fn added(&mut self, variant: Monitor, mut tick: impl FnMut()) -> Result<AddedRow> {
        let alternations = self.options.pairs.div_ceil(2).max(1);
        let mut measured = Vec::with_capacity(alternations);
        let mut chance = Seeded::new(self.options.seed);
        // The first steps fault pages in and train the branches.
        for _ in 0..WARM_UP.min(alternations) {
            self.alternate(variant, self.options.context, true)?;
        }
        for index in 0..alternations {
            let offset = index % self.options.window;
            if offset == 0 {
                // Other answers: the engine hands over what it kept of these.
                for watch in &mut self.watches {
                    let ended = std::mem::replace(watch, Watch::new(&self.policy));
                    black_box(ended.record.finish(&self.policy));
                }
            }
            let base_first = chance.below(2) == 0;
            let position = self.options.context + offset;
            measured.push(self.alternate(variant, position, base_first)?);
            tick();
        }
        let added = added(&measured, self.options.seed);
        Ok(AddedRow {
            streams: self.streams.len(),
            monitor: variant,
            added: added.ok_or_else(|| Error::internal("nothing was measured"))?,
        })
    }

    /// Base, variant, variant, base, or the other way round: chosen by chance, so that whatever
    /// beats in time with the steps (timers, the progress that is shown) falls on both alike.
    /// A step that is not measured comes first, since it sees the position for the first time, and
    /// a base last, so that its keys and values are what the next position sees.
    fn alternate(
        &mut self,
        variant: Monitor,
        position: usize,
        base_first: bool,
    ) -> Result<Alternation> {
        self.step(Monitor::Off, position)?;
        let (outer, inner) = match base_first {
            true => (Monitor::Off, variant),
            false => (variant, Monitor::Off),
        };
        let first = self.step(outer, position)?;
        let inside = [self.step(inner, position)?, self.step(inner, position)?];
        let outside = [first, self.step(outer, position)?];
        if base_first {
            return Ok(Alternation {
                base: outside,
                variant: inside,
            });
        }
        self.step(Monitor::Off, position)?;
        Ok(Alternation {
            base: inside,
            variant: outside,
        })
    }

    /// One decode step of every stream from its plan to its decision, in microseconds.
    fn step(&mut self, monitor: Monitor, position: usize) -> Result<f64> {
        let started = Instant::now();
        let mut batch = Batch::default();
        let mut plan = HookPlan::new(self.decoder.config().n_layers);
        for (row, stream) in self.streams.iter().enumerate() {
            let token = &stream.tokens[position..=position];
            batch.push(token, position, stream.blocks.clone());
            match monitor {
                Monitor::Off => {}
                Monitor::Probes => plan.score(&self.stack, row..row + 1),
                Monitor::Interventions => {
                    for change in &self.changes[row] {
                        plan.steer(change.site, row, change.kind, &change.vector, None);
                    }
                }
                Monitor::Capture => plan.capture(self.monitoring.captured, row, row..row + 1),
            }
        }
        let mut run = HookRun::new(&plan, batch.rows());
        let rows: Vec<usize> = (0..batch.rows()).collect();
        let (decoder, kv, logits) = (self.decoder, &mut self.kv, &mut self.logits);
        let read = self.pool.install(|| {
            let hidden = decoder.forward(&batch, kv, &mut run)?;
            // The engine looks at steered rows for overflows.
            if monitor == Monitor::Interventions {
                black_box(host::read(&hidden, |values| {
                    values.iter().all(|value| value.is_finite())
                })?);
            }
            // As the engine does: the policy judges beside the head's product.
            let (watches, policy) = (&mut self.watches, &self.policy);
            let mut scores = Ok(Vec::new());
            let observe = || {
                if monitor == Monitor::Probes {
                    for watch in watches.iter() {
                        fetch_policy(policy, &watch.policy);
                    }
                }
                scores = run.finish().map(|scores| {
                    if monitor == Monitor::Probes {
                        watch(watches, policy, &scores, position as u32);
                    }
                    scores.captured
                });
            };
            beside(observe, || decoder.logits_into(&hidden, &rows, &[], logits))?;
            scores
        })?;
        black_box((&read, &self.logits));
        Ok(started.elapsed().as_secs_f64() * 1e6)
    }

    fn prefill(&mut self) -> Result<()> {
        for stream in &self.streams {
            for start in (0..self.options.context).step_by(PREFILL_ROWS) {
                let end = (start + PREFILL_ROWS).min(self.options.context);
                let mut batch = Batch::default();
                batch.push(&stream.tokens[start..end], start, stream.blocks.clone());
                let plan = HookPlan::new(self.decoder.config().n_layers);
                let mut run = HookRun::new(&plan, batch.rows());
                let (decoder, kv) = (self.decoder, &mut self.kv);
                self.pool
                    .install(|| decoder.forward(&batch, kv, &mut run))?;
            }
        }
        Ok(())
    }
}

/// What the engine does with the scores of monitored rows.
fn watch(watches: &mut [Watch], policy: &Policy, scores: &Scores<'_>, position: u32) {
    for (row, watch) in watches.iter_mut().enumerate() {
        let outputs = scores.of_row(row);
        watch.observe(policy, position, outputs.map(Result::ok).collect());
    }
}

const WARM_UP: usize = 8;
const PREFILL_ROWS: usize = 256;

impl Watch {
    fn new(policy: &Policy) -> Self {
        Self {
            policy: PolicyState::new(policy),
            record: StepLog::default(),
            generated: 0,
        }
    }

    fn observe(&mut self, policy: &Policy, position: u32, outputs: Vec<Option<TokenOutput>>) {
        self.generated += 1;
        let k = self.generated;
        self.policy.observe_generated(policy, k, position, &outputs);
        self.record.push(DecisionStep::Generated {
            k,
            position,
            outputs,
        });
        let decision = self.policy.decide(policy);
        self.record.decided(decision, &self.policy);
    }
}
