//! Fits a low-rank refusal head: `logits = T h + A (B h)`, with T the model's own head, fixed.
//! Knows hidden states and target tokens; knows no model and no files.
//!
//! SafeSwitch (arXiv 2502.01042) trains a full copy of the head on refusals after unsafe prompts;
//! this is the low-rank form, which can be gated row by row in a batch.
//! The loss is the cross-entropy of the refusals' tokens, plus, on harmless answers, the
//! Kullback-Leibler divergence of the new head from the model's own.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::seeded::Seeded;
use crate::error::{Error, Result};

/// Last-layer states after the final norm, with the token that should follow each.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// `[targets.len(), d_model]`, row-major.
    pub states: Vec<f32>,
    pub targets: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    pub rank: usize,
    pub epochs: usize,
    pub learning_rate: f32,
    /// What a harmless position weighs against a refusing one.
    pub benign_weight: f32,
    pub seed: u64,
}

impl Options {
    /// What can be judged without a state.
    pub fn check(&self, d_model: usize) -> Result<()> {
        if self.rank == 0 || self.rank > d_model {
            let message = format!("must be 1 to {d_model}, the model's d_model");
            return Err(Error::invalid("rank", message));
        }
        if self.epochs == 0 {
            return Err(Error::invalid("epochs", "must be above 0"));
        }
        let above_0 = |field: &str, value: f32| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(Error::invalid(field, "must be above 0")),
        };
        above_0("learning_rate", self.learning_rate)?;
        above_0("benign_weight", self.benign_weight)
    }
}

/// The fitted difference to the head.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    pub rank: usize,
    /// `[vocab, rank]`
    pub a: Vec<f32>,
    /// `[rank, d_model]`
    pub b: Vec<f32>,
    /// Mean loss of each epoch, the regulariser included.
    pub losses: Vec<f32>,
}

/// What a head makes of held-out refusals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Mean cross-entropy per token, in nats.
    pub loss: f32,
    /// Share of tokens that are the most likely ones.
    pub accuracy: f32,
}

/// What a head makes of text that it should leave alone, switched on as if it were needed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disturbance {
    /// Mean divergence of the new distribution from the model's own, `KL(own || new)`, in nats.
    pub mean_kl: f32,
    /// Share of tokens whose likeliest token is another.
    pub top1_changed: f32,
    pub tokens: usize,
}

/// Positions per optimiser step: `batch x vocab` logits must stay small.
const BATCH: usize = 64;

/// Fits `A` and `B` on the refusals, kept close to the model's own head on the benign states.
///
/// `head` is T, `[vocab, d_model]` f32; `benign` is `[n, d_model]`, row-major, and may be empty.
/// `progress` hears of every finished epoch and its mean loss.
pub fn fit(
    head: &Tensor,
    refusals: &Examples,
    benign: &[f32],
    options: &Options,
    mut progress: impl FnMut(usize, f32),
) -> Result<LowRank> {
    let (vocab, d_model) = head.dims2()?;
    check(refusals, benign, (vocab, d_model), options)?;
    let mut random = Seeded::new(options.seed);
    let mut fitted = LowRank {
        rank: options.rank,
        a: vec![0.0; vocab * options.rank],
        b: principal_directions(&refusals.states, d_model, options.rank, &mut random)?,
        losses: Vec::new(),
    };
    let mut adam_a = Adam::new(fitted.a.len(), options.learning_rate);
    let mut adam_b = Adam::new(fitted.b.len(), options.learning_rate);
    let count = refusals.targets.len();
    let mut order: Vec<usize> = (0..count + benign.len() / d_model).collect();
    for epoch in 0..options.epochs {
        random.shuffle(&mut order);
        let mut total = 0.0;
        for batch in order.chunks(BATCH) {
            let batch = Batch::of(batch, refusals, benign, d_model, options.benign_weight)?;
            let gradient = gradient(head, &fitted, &batch)?;
            total += gradient.loss;
            adam_a.step(&mut fitted.a, &gradient.a);
            adam_b.step(&mut fitted.b, &gradient.b);
        }
        let mean = (total / order.len() as f64) as f32;
        if !mean.is_finite() {
            return Err(Error::invalid(
                "learning_rate",
                "is too high: the fit diverged",
            ));
        }
        fitted.losses.push(mean);
        progress(epoch + 1, mean);
    }
    Ok(fitted)
}

/// Measures the head, with `low_rank` or without, on examples it was not fitted on.
pub fn evaluate(head: &Tensor, low_rank: Option<&LowRank>, examples: &Examples) -> Result<Fit> {
    let (_, d_model) = head.dims2()?;
    let order: Vec<usize> = (0..examples.targets.len()).collect();
    let (mut loss, mut right) = (0.0, 0usize);
    for batch in order.chunks(BATCH) {
        let batch = Batch::of(batch, examples, &[], d_model, 0.0)?;
        let logits = match low_rank {
            Some(low_rank) => batch.logits(head, low_rank)?.1,
            None => batch.states.matmul(&head.t()?)?,
        };
        for (row, target) in logits.to_vec2::<f32>()?.iter().zip(&batch.targets) {
            let target = target.expect("an example without a target") as usize;
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|logit| f64::from(logit - best).exp()).sum();
            loss += sum.ln() - f64::from(row[target] - best);
            right += usize::from(row[target] >= best);
        }
    }
    let count = examples.targets.len().max(1) as f64;
    Ok(Fit {
        loss: (loss / count) as f32,
        accuracy: (right as f64 / count) as f32,
    })
}

/// Measures the head on benign states, `[n, d_model]`, that it was not fitted on; none of none.
pub fn disturbance(
    head: &Tensor,
    low_rank: &LowRank,
    benign: &[f32],
) -> Result<Option<Disturbance>> {
    let (_, d_model) = head.dims2()?;
    let tokens = benign.len() / d_model;
    if tokens == 0 {
        return Ok(None);
    }
    let order: Vec<usize> = (0..tokens).collect();
    let (mut divergence, mut changed) = (0.0, 0usize);
    for batch in order.chunks(BATCH) {
        let batch = Batch::of(batch, &Examples::default(), benign, d_model, 1.0)?;
        let (own, new) = batch.logits(head, low_rank)?;
        let rows = own.to_vec2::<f32>()?.into_iter().zip(new.to_vec2::<f32>()?);
        for (own, mut new) in rows {
            changed += usize::from(likeliest(&own) != likeliest(&new));
            divergence += towards_own(&mut new, &own, 1.0, 1);
        }
    }
    Ok(Some(Disturbance {
        mean_kl: (divergence / tokens as f64) as f32,
        top1_changed: changed as f32 / tokens as f32,
        tokens,
    }))
}

/// The lower of equals, as sampling takes it.
fn likeliest(logits: &[f32]) -> Option<usize> {
    let ids = (0..logits.len()).rev();
    ids.max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

fn check(
    refusals: &Examples,
    benign: &[f32],
    (vocab, d_model): (usize, usize),
    options: &Options,
) -> Result<()> {
    options.check(d_model)?;
    let count = refusals.targets.len();
    if count == 0
        || refusals.states.len() != count * d_model
        || !benign.len().is_multiple_of(d_model)
    {
        return Err(Error::internal("states do not match their targets"));
    }
    if refusals
        .targets
        .iter()
        .any(|target| *target as usize >= vocab)
    {
        return Err(Error::internal("a target token is outside the vocabulary"));
    }
    if refusals
        .states
        .iter()
        .chain(benign)
        .any(|value| !value.is_finite())
    {
        return Err(Error::internal("a hidden state is not finite"));
    }
    Ok(())
}

/// Some positions with what is wanted of them.
struct Batch {
    /// `[n, d_model]`
    states: Tensor,
    /// A token to learn, or none where the model's own distribution should stay.
    targets: Vec<Option<u32>>,
    benign_weight: f32,
}

impl Batch {
    /// Indices past the refusals count the benign states.
    fn of(
        indices: &[usize],
        refusals: &Examples,
        benign: &[f32],
        d_model: usize,
        benign_weight: f32,
    ) -> Result<Self> {
        let count = refusals.targets.len();
        let mut states = Vec::with_capacity(indices.len() * d_model);
        for &index in indices {
            let (from, row) = match index.checked_sub(count) {
                None => (&refusals.states[..], index),
                Some(row) => (benign, row),
            };
            states.extend_from_slice(&from[row * d_model..(row + 1) * d_model]);
        }
        Ok(Self {
            states: Tensor::from_vec(states, (indices.len(), d_model), &Device::Cpu)?,
            targets: indices
                .iter()
                .map(|&i| refusals.targets.get(i).copied())
                .collect(),
            benign_weight,
        })
    }

    /// The model's own logits and the new ones, `[n, vocab]`.
    fn logits(&self, head: &Tensor, low_rank: &LowRank) -> Result<(Tensor, Tensor)> {
        let (vocab, d_model) = head.dims2()?;
        let a = Tensor::from_slice(&low_rank.a, (vocab, low_rank.rank), &Device::Cpu)?;
        let b = Tensor::from_slice(&low_rank.b, (low_rank.rank, d_model), &Device::Cpu)?;
        let own = self.states.matmul(&head.t()?)?;
        let change = self.states.matmul(&b.t()?)?.matmul(&a.t()?)?;
        let new = (&own + change)?;
        Ok((own, new))
    }
}

struct Gradient {
    a: Vec<f32>,
    b: Vec<f32>,
    /// Summed over the batch.
    loss: f64,
}

/// With `z = T h + A B h` and `p = softmax(z)`, both losses have the gradient `p - wanted` in z,
/// where `wanted` is the target's indicator or the model's own distribution.
fn gradient(head: &Tensor, low_rank: &LowRank, batch: &Batch) -> Result<Gradient> {
    let (vocab, d_model) = head.dims2()?;
    let (own, new) = batch.logits(head, low_rank)?;
    let own = own.flatten_all()?.to_vec1::<f32>()?;
    let mut wrong = new.flatten_all()?.to_vec1::<f32>()?;
    let size = batch.targets.len();
    let losses: Vec<f64> = wrong
        .par_chunks_mut(vocab)
        .zip(own.par_chunks(vocab))
        .zip(&batch.targets)
        .map(|((row, own), target)| match target {
            Some(target) => towards_token(row, *target as usize, size),
            None => towards_own(row, own, batch.benign_weight, size),
        })
        .collect();
    // wrong: [n, vocab]
    let wrong = Tensor::from_vec(wrong, (size, vocab), &Device::Cpu)?;
    let a = Tensor::from_slice(&low_rank.a, (vocab, low_rank.rank), &Device::Cpu)?;
    let b = Tensor::from_slice(&low_rank.b, (low_rank.rank, d_model), &Device::Cpu)?;
    let inner = batch.states.matmul(&b.t()?)?;
    Ok(Gradient {
        a: wrong.t()?.matmul(&inner)?.flatten_all()?.to_vec1()?,
        b: wrong
            .matmul(&a)?
            .t()?
            .matmul(&batch.states)?
            .flatten_all()?
            .to_vec1()?,
        loss: losses.iter().sum(),
    })
}

/// Replaces logits by their share of the gradient; returns the cross-entropy.
fn towards_token(row: &mut [f32], target: usize, size: usize) -> f64 {
    let loss = -f64::from(log_softmax(row)[target]);
    row[target] -= 1.0;
    scale(row, 1.0 / size as f32);
    loss
}

/// Replaces logits by their share of the gradient; returns the weighted divergence.
fn towards_own(row: &mut [f32], own: &[f32], weight: f32, size: usize) -> f64 {
    let new_log = log_softmax(row);
    let mut own_p = own.to_vec();
    let own_log = log_softmax(&mut own_p);
    let divergence: f64 = own_p
        .iter()
        .zip(own_log.iter().zip(&new_log))
        .map(|(p, (own, new))| f64::from(p * (own - new)))
        .sum();
    row.iter_mut().zip(&own_p).for_each(|(p, own)| *p -= own);
    scale(row, weight / size as f32);
    f64::from(weight) * divergence
}

fn scale(row: &mut [f32], by: f32) {
    row.iter_mut().for_each(|value| *value *= by);
}

/// Turns a row of logits into probabilities in place; returns their logarithms.
fn log_softmax(row: &mut [f32]) -> Vec<f32> {
    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row
        .iter()
        .map(|logit| f64::from((logit - best).exp()))
        .sum();
    let log_total = total.ln() as f32;
    let logs: Vec<f32> = row.iter().map(|logit| logit - best - log_total).collect();
    row.iter_mut()
        .zip(&logs)
        .for_each(|(p, log)| *p = log.exp());
    logs
}

/// Adam (Kingma and Ba, 2015) with the usual constants.
struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
    learning_rate: f32,
    step: i32,
}

impl Adam {
    fn new(count: usize, learning_rate: f32) -> Self {
        Self {
            mean: vec![0.0; count],
            square: vec![0.0; count],
            learning_rate,
            step: 0,
        }
    }

    fn step(&mut self, weights: &mut [f32], gradient: &[f32]) {
        const KEEP_MEAN: f32 = 0.9;
        const KEEP_SQUARE: f32 = 0.999;
        self.step += 1;
        let mean_scale = 1.0 / (1.0 - KEEP_MEAN.powi(self.step));
        let square_scale = 1.0 / (1.0 - KEEP_SQUARE.powi(self.step));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((weight, g), (mean, square)) in weights.iter_mut().zip(gradient).zip(moments) {
            *mean = KEEP_MEAN * *mean + (1.0 - KEEP_MEAN) * g;
            *square = KEEP_SQUARE * *square + (1.0 - KEEP_SQUARE) * g * g;
            let root = (*square * square_scale).sqrt() + 1e-8;
            *weight -= self.learning_rate * *mean * mean_scale / root;
        }
    }
}

/// `[rank, d_model]`: the mean direction, then the leading principal directions of the states,
/// each scaled so that its coordinate has unit size over the states: equal steps for Adam.
fn principal_directions(
    states: &[f32],
    d_model: usize,
    rank: usize,
    random: &mut Seeded,
) -> Result<Vec<f32>> {
    let count = states.len() / d_model;
    let states = Tensor::from_slice(states, (count, d_model), &Device::Cpu)?;
    let mean = states.mean_keepdim(0)?;
    let centred = states.broadcast_sub(&mean)?;
    let covariance = (centred.t()?.matmul(&centred)? / count as f64)?.to_vec2::<f32>()?;
    let mean = mean.flatten_all()?.to_vec1::<f32>()?;
    let mean_square = dot(&mean, &mean).max(f32::MIN_POSITIVE);
    let mut rows = vec![
        mean.iter()
            .map(|value| value / mean_square)
            .collect::<Vec<_>>(),
    ];
    let found = leading_directions(&covariance, rank - 1, random);
    for (direction, variance) in found {
        let along = dot(&direction, &mean) / mean_square;
        let size = variance.max(1e-12).sqrt();
        rows.push(
            direction
                .iter()
                .zip(&mean)
                .map(|(u, m)| (u - along * m) / size)
                .collect(),
        );
    }
    Ok(rows.concat())
}

/// Orthogonal iteration: unit vectors of the largest variances of a symmetric matrix.
fn leading_directions(
    matrix: &[Vec<f32>],
    count: usize,
    random: &mut Seeded,
) -> Vec<(Vec<f32>, f32)> {
    const ROUNDS: usize = 50;
    let width = matrix.len();
    let start = |_| (0..width).map(|_| random.signed()).collect::<Vec<_>>();
    let mut basis: Vec<Vec<f32>> = (0..count).map(start).collect();
    orthonormalise(&mut basis);
    for _ in 0..ROUNDS {
        basis.par_iter_mut().for_each(|v| *v = times(matrix, v));
        orthonormalise(&mut basis);
    }
    let variance = |v: &Vec<f32>| dot(v, &times(matrix, v)).max(0.0);
    basis
        .into_iter()
        .map(|v| (variance(&v), v))
        .map(|(size, v)| (v, size))
        .collect()
}

/// Gram-Schmidt; a vector that depends on the earlier ones becomes zero.
fn orthonormalise(basis: &mut [Vec<f32>]) {
    for index in 0..basis.len() {
        let (before, rest) = basis.split_at_mut(index);
        let vector = &mut rest[0];
        let length_before = dot(vector, vector).sqrt();
        for other in before.iter() {
            let along = dot(vector, other);
            vector
                .iter_mut()
                .zip(other)
                .for_each(|(v, o)| *v -= along * o);
        }
        let length = dot(vector, vector).sqrt();
        let dependent = length <= 1e-6 * length_before || length == 0.0;
        scale(vector, if dependent { 0.0 } else { 1.0 / length });
    }
}

fn times(matrix: &[Vec<f32>], vector: &[f32]) -> Vec<f32> {
    matrix.iter().map(|row| dot(row, vector)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 11;
    const D_MODEL: usize = 6;

    fn random_states(count: usize, seed: u64) -> Vec<f32> {
        let mut random = Seeded::new(seed);
        (0..count * D_MODEL).map(|_| random.signed()).collect()
    }

    fn head() -> Tensor {
        Tensor::from_vec(random_states(VOCAB, 1), (VOCAB, D_MODEL), &Device::Cpu).expect("a head")
    }

    /// Which of three tokens follows depends on the state.
    fn refusals(count: usize, seed: u64) -> Examples {
        let states = random_states(count, seed);
        let targets = states
            .chunks(D_MODEL)
            .map(|h| {
                if h[0] > 0.3 {
                    7
                } else if h[1] > 0.0 {
                    3
                } else {
                    5
                }
            })
            .collect();
        Examples { states, targets }
    }

    fn options() -> Options {
        Options {
            rank: 4,
            epochs: 60,
            learning_rate: 0.05,
            benign_weight: 1.0,
            seed: 3,
        }
    }

    fn fitted(benign: &[f32]) -> LowRank {
        fit(&head(), &refusals(256, 2), benign, &options(), |_, _| {}).expect("fits")
    }

    #[test]
    fn a_fitted_head_gives_the_tokens_of_held_out_refusals() {
        let held_out = refusals(128, 9);
        let before = evaluate(&head(), None, &held_out).expect("evaluates");
        let after = evaluate(&head(), Some(&fitted(&[])), &held_out).expect("evaluates");
        assert!(after.loss < before.loss / 3.0, "{before:?} {after:?}");
        assert!(after.accuracy > 0.85, "{after:?}");
    }

    #[test]
    fn the_loss_falls() {
        let losses = fitted(&[]).losses;
        assert_eq!(losses.len(), 60);
        assert!(losses[59] < losses[0] / 2.0, "{losses:?}");
    }

    #[test]
    fn the_same_seed_gives_the_same_head() {
        assert_eq!(fitted(&[]), fitted(&[]));
    }

    #[test]
    fn a_gradient_is_the_slope_of_the_loss() {
        let refusals = refusals(5, 4);
        let benign = random_states(3, 6);
        let indices: Vec<usize> = (0..8).collect();
        let batch = Batch::of(&indices, &refusals, &benign, D_MODEL, 0.7).expect("a batch");
        let low_rank = LowRank {
            rank: 2,
            a: random_states(4, 7)[..VOCAB * 2].to_vec(),
            b: random_states(2, 8),
            losses: Vec::new(),
        };
        let exact = gradient(&head(), &low_rank, &batch).expect("a gradient");
        let loss = |low_rank: &LowRank| {
            gradient(&head(), low_rank, &batch)
                .expect("a gradient")
                .loss
                / 8.0
        };
        for index in 0..6 {
            let mut moved = low_rank.clone();
            moved.a[index] += 1e-2;
            let up = loss(&moved);
            moved.a[index] -= 2e-2;
            let slope = (up - loss(&moved)) / 2e-2;
            assert!(
                (slope - f64::from(exact.a[index])).abs() < 1e-3,
                "a[{index}]"
            );
            let mut moved = low_rank.clone();
            moved.b[index] += 1e-2;
            let up = loss(&moved);
            moved.b[index] -= 2e-2;
            let slope = (up - loss(&moved)) / 2e-2;
            assert!(
                (slope - f64::from(exact.b[index])).abs() < 1e-3,
                "b[{index}]"
            );
        }
    }

    #[test]
    fn harmless_states_keep_the_model_near_its_own_head() {
        let mut benign = random_states(256, 12);
        // Harmless answers live elsewhere than refusals.
        benign.chunks_mut(D_MODEL).for_each(|h| h[5] += 4.0);
        let held_back = |low_rank: &LowRank| {
            let indices: Vec<usize> = (0..256).collect();
            let batch =
                Batch::of(&indices, &Examples::default(), &benign, D_MODEL, 1.0).expect("a batch");
            gradient(&head(), low_rank, &batch)
                .expect("a gradient")
                .loss
        };
        let (free, kept) = (held_back(&fitted(&[])), held_back(&fitted(&benign)));
        assert!(kept < free / 2.0, "{free} {kept}");
    }

    #[test]
    fn a_head_disturbs_benign_text_less_when_it_was_fitted_to_leave_it_alone() {
        let elsewhere = |seed| {
            let mut benign = random_states(128, seed);
            benign.chunks_mut(D_MODEL).for_each(|h| h[5] += 4.0);
            benign
        };
        let measured = |low_rank: &LowRank| {
            disturbance(&head(), low_rank, &elsewhere(13))
                .expect("measures")
                .expect("there are tokens")
        };
        let (free, kept) = (measured(&fitted(&[])), measured(&fitted(&elsewhere(12))));
        assert!(kept.mean_kl < free.mean_kl, "{free:?} {kept:?}");
        assert!(kept.top1_changed <= free.top1_changed, "{free:?} {kept:?}");
        assert_eq!(kept.tokens, 128);
    }

    #[test]
    fn a_head_that_changes_nothing_disturbs_nothing() {
        let mut nothing = fitted(&[]);
        nothing.a.fill(0.0);
        let measured = disturbance(&head(), &nothing, &random_states(9, 3)).expect("measures");
        let measured = measured.expect("there are tokens");
        assert_eq!((measured.mean_kl, measured.top1_changed), (0.0, 0.0));
        assert_eq!(disturbance(&head(), &nothing, &[]), Ok(None));
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), Some(1));
    }

    #[test]
    fn leading_directions_are_those_of_the_largest_variance() {
        let matrix = vec![
            vec![1.0, 0.0, 0.0],
            vec![0.0, 9.0, 0.0],
            vec![0.0, 0.0, 4.0],
        ];
        let found = leading_directions(&matrix, 2, &mut Seeded::new(1));
        assert!((found[0].1 - 9.0).abs() < 1e-3 && found[0].0[1].abs() > 0.999);
        assert!((found[1].1 - 4.0).abs() < 1e-3 && found[1].0[2].abs() > 0.999);
    }

    #[test]
    fn a_rank_beyond_the_model_is_rejected() {
        let options = Options {
            rank: D_MODEL + 1,
            ..options()
        };
        let error = fit(&head(), &refusals(8, 2), &[], &options, |_, _| {}).expect_err("rejected");
        assert!(error.to_string().starts_with("rank:"), "{error}");
    }
}
