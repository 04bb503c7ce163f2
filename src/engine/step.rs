//! The engine's thread: admit, run one pass over all rows, hand the results out, again.
//! Owns model, KV cache and scheduler; knows nothing of the wire.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc as commands;
use std::time::Instant;

use candle_core::Tensor;
use inwit_probes::TokenOutput;

use super::blocks::{BlockKey, BlockPool, BlockScores, Found, block_key};
use super::event::Captured;
use super::handle::{Admission, Command, EngineOptions, ModelInfo, Shared};
use super::readout::readout_policy;
use super::request::{Intervention, Work};
use super::scheduler::{Pace, Pending};
use super::sequence::{Scored, Sequence, Surroundings};
use crate::error::{Error, Result};
use crate::hooks::{HookPlan, HookRun, ProbeStack, RowCondition};
use crate::metrics;
use crate::model::kernels::{ComputePool, KV_BLOCK, beside};
use crate::model::{Batch, Decoder, KvCache, ModelConfig, RefusalRow, Span, Tokenizer, host};
use crate::policy::{DecisionSink, Mode, Policy};
use crate::registry::Snapshot;

pub(super) struct StepLoop {
    decoder: Decoder,
    kv: KvCache,
    info: ModelInfo,
    options: EngineOptions,
    shared: Arc<Shared>,
    receiver: commands::Receiver<Command>,
    pool: ComputePool,
    /// Of the last step: its memory serves the next.
    logits: Vec<f32>,
    blocks: BlockPool,
    around: Surroundings,
    waiting: VecDeque<Admission>,
    running: Vec<Sequence>,
    /// What was made from the snapshots in use, newest last.
    prepared: Vec<Prepared>,
    pace: Pace,
    /// Whether a handle is left that could still submit.
    open: bool,
}

/// What every request under one snapshot shares.
struct Prepared {
    snapshot_hash: String,
    stack: Arc<ProbeStack>,
    readout: Arc<Policy>,
    /// The content hash of each probe.
    probes: Arc<Vec<String>>,
}

/// The position at which a row multiplies as much with keys and values as with weights.
fn even_position(model: &ModelConfig) -> f64 {
    let attention = model.n_heads * model.head_dim;
    let projections = 2 * (attention + model.n_kv_heads * model.head_dim) * model.d_model;
    let weights = projections + 3 * model.d_mlp * model.d_model;
    weights as f64 / (2 * attention) as f64
}

/// Snapshots whose stacks are kept; a request in flight keeps its own alive besides.
const PREPARED_SNAPSHOTS: usize = 4;

impl StepLoop {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        decoder: Decoder,
        kv: KvCache,
        tokenizer: Tokenizer,
        info: ModelInfo,
        options: EngineOptions,
        sink: Arc<dyn DecisionSink>,
        shared: Arc<Shared>,
        receiver: commands::Receiver<Command>,
        pool: ComputePool,
    ) -> Self {
        let pace = Pace::new(
            options.step_token_budget,
            options.prefill_share,
            even_position(&info.config),
        );
        Self {
            blocks: BlockPool::new(kv.blocks()),
            around: Surroundings {
                tokenizer,
                sink,
                journal_key: options.journal_key,
                kernel_identity: info.kernel_identity.clone(),
            },
            decoder,
            kv,
            info,
            options,
            shared,
            receiver,
            pool,
            waiting: VecDeque::new(),
            running: Vec::new(),
            prepared: Vec::new(),
            pace,
            logits: Vec::new(),
            open: true,
        }
    }

    /// Runs until no handle is left and every sequence has ended.
    pub(super) fn run(&mut self) {
        while self.listen() {
            let round = catch_unwind(AssertUnwindSafe(|| self.round()));
            let failure = match round {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error),
                Err(_) => Some(Error::internal("the step panicked")),
            };
            if let Some(error) = failure {
                self.fail_all(&error);
            }
            self.running.retain(|sequence| !sequence.finished);
            self.tell_load();
        }
    }

    fn round(&mut self) -> Result<()> {
        self.drop_the_gone();
        self.admit();
        match self.running.is_empty() {
            true => Ok(()),
            false => self.step(),
        }
    }

    /// Takes in commands; waits for one when there is nothing to do. False when all is over.
    fn listen(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            if !self.open {
                return false;
            }
            match self.receiver.recv() {
                Ok(command) => self.obey(command),
                Err(commands::RecvError) => return false,
            }
        }
        loop {
            match self.receiver.try_recv() {
                Ok(command) => self.obey(command),
                Err(commands::TryRecvError::Empty) => return true,
                Err(commands::TryRecvError::Disconnected) => {
                    self.open = false;
                    return true;
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(admission) => self.waiting.push_back(*admission),
            Command::Wake => {}
        }
    }

    /// Ends sequences whose client left or whose time is up, running or waiting.
    fn drop_the_gone(&mut self) {
        let now = Instant::now();
        for sequence in &mut self.running {
            if sequence.is_abandoned() {
                sequence.finish_failed(Error::Cancelled, &self.around);
            } else if sequence.is_late(now) {
                sequence.finish_late(&self.around);
            }
        }
        self.running.retain(|sequence| !sequence.finished);
        let late = |admission: &Admission| {
            admission.events.is_closed()
                || admission.place.aborted.load(Ordering::Acquire)
                || admission.request.deadline.is_some_and(|d| now >= d)
        };
        for index in (0..self.waiting.len()).rev() {
            if late(&self.waiting[index])
                && let Some(admission) = self.waiting.remove(index)
            {
                let (sequence, _, around) = self.take_in(admission);
                if sequence.is_abandoned() {
                    sequence.finish_failed(Error::Cancelled, around);
                } else {
                    sequence.finish_late(around);
                }
            }
        }
        self.running.retain(|sequence| !sequence.finished);
    }

    /// Starts waiting requests, first come first served, while there is room for all they may need.
    fn admit(&mut self) {
        while self.running.len() < self.options.max_running {
            let Some(next) = self.waiting.front() else {
                return;
            };
            let (_, blocks) = self.needs(next);
            let promised: usize = self
                .running
                .iter()
                .map(|sequence| sequence.most_blocks.saturating_sub(sequence.blocks.len()))
                .sum();
            if self.blocks.available() < promised + blocks {
                return;
            }
            if let Some(admission) = self.waiting.pop_front() {
                let (sequence, blocks, around) = self.take_in(admission);
                use_cache(sequence, blocks);
                sequence.start(around);
            }
            self.running.retain(|sequence| !sequence.finished);
        }
    }

    /// Answer tokens and blocks that a request may need.
    fn needs(&self, admission: &Admission) -> (usize, usize) {
        let prompt = admission.request.prompt.tokens.len();
        let fits = self.info.context_length.saturating_sub(prompt);
        let answer = match &admission.request.work {
            Work::Score { answer } => answer.len(),
            Work::Generate => admission
                .request
                .sampling
                .max_tokens
                .map_or(fits, |tokens| tokens as usize),
        };
        let answer = answer.min(fits);
        (answer, (prompt + answer).div_ceil(KV_BLOCK))
    }

    /// Puts a request among the running: whatever fails from here on is told to it.
    fn take_in(&mut self, admission: Admission) -> (&mut Sequence, &BlockPool, &Surroundings) {
        let sequence = self.sequence(admission);
        self.running.push(sequence);
        let sequence = self.running.last_mut().expect("pushed right here");
        (sequence, &self.blocks, &self.around)
    }

    fn sequence(&mut self, admission: Admission) -> Sequence {
        // Counted as running before it stops waiting, so that no reader sees neither.
        self.shared.running.fetch_add(1, Ordering::AcqRel);
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        let queued = admission.request.prompt.tokens.len();
        self.shared
            .queued_tokens
            .fetch_sub(queued, Ordering::AcqRel);
        let (max_tokens, most_blocks) = self.needs(&admission);
        let request = &admission.request;
        let prepared = self.prepared(&Arc::clone(&request.monitor.snapshot));
        let stack = Arc::clone(&prepared.stack);
        let readout = Arc::clone(&prepared.readout);
        let probe_hashes = Arc::clone(&prepared.probes);
        let request = &admission.request;
        let scored = request.monitor.mode != Mode::Off
            || request.interventions.iter().any(|i| i.condition.is_some());
        let stack = (scored && !stack.is_empty()).then_some(stack);
        let probe_hashes = if stack.is_some() {
            probe_hashes
        } else {
            Arc::default()
        };
        let scored = Scored {
            stack,
            probe_hashes,
            readout,
        };
        Sequence::new(admission, scored, max_tokens, most_blocks)
    }

    fn prepared(&mut self, snapshot: &Arc<Snapshot>) -> &Prepared {
        let known = self
            .prepared
            .iter()
            .position(|prepared| prepared.snapshot_hash == snapshot.hash);
        let index = known.unwrap_or_else(|| {
            if self.prepared.len() == PREPARED_SNAPSHOTS {
                self.prepared.remove(0);
            }
            let probes = snapshot.probes.iter();
            let probes = probes
                .map(|loaded| Arc::new(loaded.probe.clone()))
                .collect();
            self.prepared.push(Prepared {
                snapshot_hash: snapshot.hash.clone(),
                stack: Arc::new(ProbeStack::new(probes, self.info.config.n_layers)),
                readout: Arc::new(readout_policy(snapshot)),
                probes: Arc::new(content_hashes(snapshot)),
            });
            self.prepared.len() - 1
        });
        &self.prepared[index]
    }

    /// One pass over the rows that the scheduler picks.
    fn step(&mut self) -> Result<()> {
        let started = Instant::now();
        let pending: Vec<Pending> = self
            .running
            .iter()
            .map(|sequence| Pending {
                tokens: sequence.pending(),
                computed: sequence.computed,
                prefill: sequence.in_prefill(),
            })
            .collect();
        let rows = self.pace.next_step(&pending);
        let picked: Vec<(usize, usize)> = rows
            .iter()
            .copied()
            .enumerate()
            .filter(|(_, rows)| *rows > 0)
            .collect();
        let prefill = picked
            .iter()
            .filter(|(index, _)| pending[*index].prefill)
            .count();
        let phase = match prefill {
            0 => metrics::Phase::Decode,
            n if n == picked.len() => metrics::Phase::Prefill,
            _ => metrics::Phase::Mixed,
        };
        let (batch, plan) = self.compile(&picked)?;
        self.pass(&picked, &batch, &plan)?;
        let took = started.elapsed();
        self.pace.learn(&pending, &rows, took.as_secs_f64());
        metrics::step_finished(phase, batch.rows(), took);
        self.shared.steps.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Packs the rows of `(sequence, rows)` and what the hooks do with them.
    fn compile(&mut self, picked: &[(usize, usize)]) -> Result<(Batch, HookPlan)> {
        let mut batch = Batch::default();
        let mut plan = HookPlan::new(self.info.config.n_layers);
        for (index, rows) in picked {
            let sequence = &mut self.running[*index];
            let (start, end) = (sequence.computed, sequence.computed + rows);
            while sequence.blocks.len() * KV_BLOCK < end {
                let block = self
                    .blocks
                    .take()
                    .ok_or_else(|| Error::internal("admission promised more blocks than exist"))?;
                sequence.blocks.push(block);
            }
            let blocks = sequence.blocks.iter().map(|block| block.number()).collect();
            let first_row = batch.rows();
            batch.push(&sequence.tokens[start..end], start, blocks);
            plan_sequence(&mut plan, *index, sequence, first_row, start..end);
        }
        Ok((batch, plan))
    }

    fn pass(&mut self, picked: &[(usize, usize)], batch: &Batch, plan: &HookPlan) -> Result<()> {
        let mut run = HookRun::new(plan, batch.rows());
        let (decoder, kv, running) = (&self.decoder, &mut self.kv, &mut self.running);
        let spans = || picked.iter().zip(&batch.spans);
        let chosen: Vec<usize> = picked
            .iter()
            .filter(|(index, rows)| {
                let sequence = &running[*index];
                sequence.wants_logits() && sequence.pending() == *rows
            })
            .map(|(index, _)| *index)
            .collect();
        let last_rows: Vec<usize> = spans()
            .filter(|((index, _), _)| chosen.contains(index))
            .map(|(_, span)| span.first_row + span.rows - 1)
            .collect();
        let heads = chosen.iter().enumerate();
        let heads =
            heads.filter_map(|(row, index)| Some((row, running[*index].effect.head.clone()?)));
        let heads: Vec<_> = heads.collect();
        let refusals: Vec<RefusalRow<'_>> = heads
            .iter()
            .map(|(row, (head, gain))| RefusalRow {
                row: *row,
                a: &head.a,
                b: &head.b,
                gain: *gain,
            })
            .collect();
        let steered = spans().filter(|((index, _), _)| running[*index].is_steered_by_caller());
        let steered: Vec<_> = steered.map(|((index, _), span)| (*index, span)).collect();
        let mut logits = std::mem::take(&mut self.logits);
        let (broken, undecided) = self.pool.install(|| {
            let hidden = decoder.forward(batch, kv, &mut run)?;
            let broken = match steered.is_empty() {
                true => Vec::new(),
                false => not_finite(&hidden, &steered)?,
            };
            // The head's weights are the largest that a pass streams by, and no score waits for
            // them: the policy judges the pass beside their product.
            let mut undecided = Ok(Vec::new());
            let observe = || undecided = observe(run, picked, batch, running, &broken);
            beside(observe, || {
                decoder.logits_into(&hidden, &last_rows, &refusals, &mut logits)
            })?;
            Ok::<_, Error>((broken, undecided?))
        })?;
        let vocab = self.info.config.vocab_size;
        for (index, _) in picked {
            let sequence = &mut self.running[*index];
            if undecided.contains(index) {
                let message = "its condition's probe gave no finite score";
                let error = Error::invalid("input.interventions", message);
                sequence.finish_failed(error, &self.around);
                continue;
            }
            if broken.contains(index) {
                let message = "left no finite hidden state; use a smaller strength";
                let error = Error::invalid("input.interventions", message);
                sequence.finish_failed(error, &self.around);
                continue;
            }
            let place = chosen.iter().position(|chosen| chosen == index);
            let logits = place.map(|place| &logits[place * vocab..(place + 1) * vocab]);
            sequence.after_pass(logits, &self.around);
        }
        self.logits = logits;
        for (index, _) in picked {
            self.publish(*index);
        }
        Ok(())
    }

    /// Makes the full blocks of a sequence findable: those of its prompt but the last token's, and
    /// at a plain end those of its answer.
    fn publish(&mut self, index: usize) {
        let sequence = &mut self.running[index];
        let probes = Arc::clone(&sequence.probe_hashes);
        if !sequence.request.use_prefix_cache {
            return;
        }
        let until = if sequence.finished && sequence.answer_is_plain() {
            sequence.computed
        } else {
            sequence.computed.min(sequence.prompt_len() - 1)
        };
        let full = (until / KV_BLOCK).min(sequence.blocks.len());
        for block in sequence.published..full {
            let parent = block.checked_sub(1).map(|parent| sequence.keys[parent]);
            let key = key_of(sequence, block, parent.as_ref());
            sequence.keys.push(key);
            let scores = scores_of_block(&sequence.outputs, block, &probes);
            self.blocks.publish(&sequence.blocks[block], key, scores);
        }
        sequence.published = full.max(sequence.published);
    }

    fn fail_all(&mut self, error: &Error) {
        tracing::error!(%error, "a step failed; its requests are told");
        for sequence in self.running.iter_mut().filter(|s| !s.finished) {
            let end = || sequence.finish_failed(error.clone(), &self.around);
            // A sink that panics must not keep the others from hearing.
            let _ = catch_unwind(AssertUnwindSafe(end));
        }
    }

    fn tell_load(&self) {
        let (running, used) = (
            self.running.len(),
            self.kv.blocks() - self.blocks.available(),
        );
        self.shared.running.store(running, Ordering::Release);
        self.shared.kv_blocks_used.store(used, Ordering::Release);
        metrics::load_changed(running, self.shared.waiting.load(Ordering::Acquire));
        metrics::kv_changed(used, self.kv.blocks());
    }
}

/// Shows the policies what a pass read, save those of `broken` sequences. Returns the sequences with a
/// condition that could not be decided.
fn observe(
    run: HookRun<'_>,
    picked: &[(usize, usize)],
    batch: &Batch,
    running: &mut [Sequence],
    broken: &[usize],
) -> Result<Vec<usize>> {
    for (index, _) in picked {
        running[*index].fetch();
    }
    let mut scores = run.finish()?;
    let mut captured = std::mem::take(&mut scores.captured);
    let mut undecided = Vec::new();
    for ((index, rows), span) in picked.iter().zip(&batch.spans) {
        let of_span = span.first_row..span.first_row + span.rows;
        if scores.failures.iter().any(|(row, _)| of_span.contains(row)) {
            undecided.push(*index);
            continue;
        }
        // Of a request that fails nothing is told, remembered or published.
        if broken.contains(index) {
            continue;
        }
        let sequence = &mut running[*index];
        for captured in captured.extract_if(.., |c| c.key == *index) {
            sequence.take_captured(captured, span.first_row, span.start);
        }
        let outputs = of_span.map(|row| {
            let outputs = scores.of_row(row);
            outputs.map(|output| output.unwrap_or(FAILED)).collect()
        });
        sequence.observe_pass(*rows, outputs.collect());
    }
    Ok(undecided)
}

/// Stands for a probe that gave no number; the policy takes it as the failure it is.
const FAILED: TokenOutput = TokenOutput::logit(f32::NAN);

/// Takes the longest cached prefix, without the last prompt token: that one runs again.
fn use_cache(sequence: &mut Sequence, blocks: &BlockPool) {
    if !sequence.request.use_prefix_cache || sequence.request.capture.is_some() {
        return;
    }
    let probes = Arc::clone(&sequence.probe_hashes);
    let full = (sequence.prompt_len() - 1) / KV_BLOCK;
    let mut unscored = false;
    let mut parent = None;
    for index in 0..full {
        let key = key_of(sequence, index, parent.as_ref());
        match blocks.find(&key, &probes) {
            Found::Block(block, scores) => {
                sequence.blocks.push(block);
                for slot in 0..KV_BLOCK {
                    sequence
                        .outputs
                        .push(scores.iter().map(|probe| probe[slot].clone()).collect());
                }
            }
            Found::Unscored => {
                unscored = true;
                break;
            }
            Found::Nothing => break,
        }
        parent = Some(key);
    }
    sequence.cached = sequence.blocks.len() * KV_BLOCK;
    sequence.computed = sequence.cached;
    let missed = (sequence.prompt_len() - sequence.cached) as u32;
    let unscored = if unscored { missed } else { 0 };
    metrics::prefix_cache_looked_up(sequence.cached as u32, missed, unscored);
}

/// Sequences with a row that is not finite after the last layer: an overflow anywhere ends there.
fn not_finite(hidden: &Tensor, sequences: &[(usize, &Span)]) -> Result<Vec<usize>> {
    let width = hidden.dim(1)?;
    host::read(hidden, |hidden| {
        let rows = |span: &Span| span.first_row * width..(span.first_row + span.rows) * width;
        let broken = sequences
            .iter()
            .filter(|(_, span)| !hidden[rows(span)].iter().all(|value| value.is_finite()));
        broken.map(|(index, _)| *index).collect()
    })
}

fn content_hashes(snapshot: &Snapshot) -> Vec<String> {
    let probes = snapshot.probes.iter();
    probes.map(|probe| probe.content_hash.clone()).collect()
}

/// What the hooks do with rows `positions` of a sequence, which start at `first_row`.
fn plan_sequence(
    plan: &mut HookPlan,
    index: usize,
    sequence: &Sequence,
    first_row: usize,
    positions: std::ops::Range<usize>,
) {
    let prompt_len = sequence.prompt_len();
    let start = positions.start;
    if let Some(stack) = &sequence.stack {
        plan.score(stack, first_row..first_row + positions.len());
    }
    let policy_steers = &sequence.effect.steer;
    for intervention in sequence.request.interventions.iter().chain(policy_steers) {
        for position in positions.clone() {
            if intervention.positions.contains(position, prompt_len) {
                plan.steer(
                    intervention.site,
                    first_row + position - start,
                    intervention.kind,
                    &intervention.vector,
                    row_condition(sequence, intervention),
                );
            }
        }
    }
    if let Some(wish) = &sequence.request.capture {
        let mut wanted = positions
            .clone()
            .filter(|position| wish.positions.contains(*position, prompt_len));
        if let Some(first) = wanted.next() {
            let last = wanted.next_back().unwrap_or(first);
            for site in &wish.sites {
                let rows = first_row + first - start..first_row + last - start + 1;
                plan.capture(*site, index, rows);
            }
        }
    }
}

fn row_condition(sequence: &Sequence, intervention: &Intervention) -> Option<RowCondition> {
    let condition = intervention.condition.as_ref()?;
    Some(RowCondition {
        stack: Arc::clone(sequence.stack.as_ref()?),
        probe: condition.probe,
        above: condition.above,
    })
}

/// The key of a sequence's block: its tokens, and what its interventions do to them.
fn key_of(sequence: &Sequence, block: usize, parent: Option<&BlockKey>) -> BlockKey {
    let positions = block * KV_BLOCK..(block + 1) * KV_BLOCK;
    let mut touched = Vec::new();
    for intervention in &sequence.request.interventions {
        let slots: Vec<u8> = positions
            .clone()
            .enumerate()
            .filter(|(_, position)| {
                intervention
                    .positions
                    .contains(*position, sequence.prompt_len())
            })
            .map(|(slot, _)| slot as u8)
            .collect();
        if !slots.is_empty() {
            touched.push(slots.len() as u8);
            touched.extend(slots);
            touched.extend(intervention.content_hash(&sequence.request.monitor.snapshot));
        }
    }
    block_key(parent, &sequence.tokens[positions], &touched)
}

/// What each probe said of a block's tokens; a probe that failed on one of them is left out.
fn scores_of_block(outputs: &[Vec<TokenOutput>], block: usize, probes: &[String]) -> BlockScores {
    let rows = &outputs[block * KV_BLOCK..(block + 1) * KV_BLOCK];
    let scored = |probe: usize| {
        let values: Vec<TokenOutput> = rows
            .iter()
            .filter_map(|row| row.get(probe).cloned())
            .filter(TokenOutput::is_finite)
            .collect();
        <[TokenOutput; KV_BLOCK]>::try_from(values).ok()
    };
    probes
        .iter()
        .enumerate()
        .filter_map(|(index, hash)| Some((hash.clone(), scored(index)?)))
        .collect()
}

impl Sequence {
    fn take_captured(&mut self, captured: crate::hooks::Captured, first_row: usize, start: usize) {
        let from = start + captured.rows.start - first_row;
        self.captured(Captured {
            site: captured.site,
            first_position: from as u32,
            tokens: self.tokens[from..from + captured.rows.len()].to_vec(),
            values: captured.values,
        });
    }
}
