//! What another weight format or KV type costs in quality: the same text through two decoders,
//! one of them with the file's weights dequantised to f32, f32 arithmetic and f32 keys and values.
//! Knows tokens and numbers; which formats may be chosen automatically is decided from this.

use serde::Serialize;

use super::bench::Tick;
use crate::error::{Error, Result};
use crate::hooks::{HookPlan, HookRun, Site};
use crate::model::kernels::{KV_BLOCK, KvType};
use crate::model::{Batch, Decoder, KvCache};

/// Tokens that see each other.
pub const SEGMENT: usize = 512;

/// A decoder and how it keeps keys and values.
pub struct Subject<'a> {
    pub decoder: &'a Decoder,
    pub kv: KvType,
}

/// How near the subject is to the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quality {
    pub tokens: usize,
    pub weights: String,
    pub kv: String,
    /// Of the next token.
    pub reference_perplexity: f64,
    pub perplexity: f64,
    /// `KL(reference || subject)` of the next token, in nats.
    pub mean_kl: f64,
    /// Share of positions at which both think the same token most likely.
    pub top1_agreement: f64,
    /// Per layer, the mean over positions of the cosine between the residual streams after it.
    pub cosines: Vec<f64>,
    pub least_cosine: f64,
}

impl Quality {
    /// Bounds that this does not keep; a format that keeps all may be chosen automatically.
    pub fn beyond(&self) -> Vec<&'static str> {
        let kept = [
            (
                self.perplexity <= 1.01 * self.reference_perplexity,
                "perplexity at most 1 % higher",
            ),
            (self.mean_kl <= 0.01, "KL at most 0.01 nats"),
            (
                self.top1_agreement >= 0.97,
                "the same token first at 97 % of positions",
            ),
            (
                self.least_cosine >= 0.999,
                "cosine at least 0.999 after every layer",
            ),
        ];
        let beyond = kept.into_iter().filter(|(kept, _)| !kept);
        beyond.map(|(_, bound)| bound).collect()
    }
}

/// Runs `tokens` through both, in segments of 512 that begin anew.
///
/// # Errors
/// With fewer than two tokens, or when a decoder fails.
pub fn compare(
    reference: &Subject<'_>,
    subject: &Subject<'_>,
    tokens: &[u32],
    tick: Tick<'_>,
) -> Result<Quality> {
    if tokens.len() < 2 {
        return Err(Error::invalid(
            "text",
            "has no two tokens; give a longer one",
        ));
    }
    let mut sums = Sums::default();
    for (index, segment) in tokens.chunks(SEGMENT).enumerate() {
        let (expected, got) = (run(reference, segment)?, run(subject, segment)?);
        sums.add(segment, &expected, &got);
        tick(tokens.len().min((index + 1) * SEGMENT), tokens.len());
    }
    Ok(sums.finish(subject))
}

/// What one decoder made of a segment.
struct Pass {
    width: usize,
    vocab: usize,
    /// Per layer, `[tokens, d_model]`.
    layers: Vec<Vec<f32>>,
    /// `[tokens, vocab]`
    logits: Vec<f32>,
}

fn run(subject: &Subject<'_>, tokens: &[u32]) -> Result<Pass> {
    let decoder = subject.decoder;
    let config = decoder.config();
    let blocks = tokens.len().div_ceil(KV_BLOCK);
    let mut kv = KvCache::new(config, subject.kv, blocks, decoder.placement())?;
    let mut batch = Batch::default();
    batch.push(tokens, 0, (0..blocks as u32).collect());
    let mut plan = HookPlan::new(config.n_layers);
    for layer in 0..config.n_layers {
        plan.capture(Site::ResidPost(layer as u16), layer, 0..tokens.len());
    }
    let mut hooks = HookRun::new(&plan, tokens.len());
    let hidden = decoder.forward(&batch, &mut kv, &mut hooks)?;
    let rows: Vec<usize> = (0..tokens.len()).collect();
    Ok(Pass {
        width: config.d_model,
        vocab: config.vocab_size,
        layers: hooks
            .finish()?
            .captured
            .into_iter()
            .map(|c| c.values)
            .collect(),
        logits: decoder.logits(&hidden, &rows, &[])?,
    })
}

#[derive(Default)]
struct Sums {
    tokens: usize,
    positions: usize,
    predicted: usize,
    reference_nats: f64,
    nats: f64,
    kl: f64,
    agreed: usize,
    cosines: Vec<f64>,
}

impl Sums {
    fn add(&mut self, tokens: &[u32], expected: &Pass, got: &Pass) {
        self.tokens += tokens.len();
        self.cosines.resize(expected.layers.len(), 0.0);
        for (sum, (a, b)) in self
            .cosines
            .iter_mut()
            .zip(expected.layers.iter().zip(&got.layers))
        {
            let rows = a
                .chunks_exact(expected.width)
                .zip(b.chunks_exact(got.width));
            *sum += rows.map(|(a, b)| cosine(a, b)).sum::<f64>();
        }
        let rows = expected.logits.chunks_exact(expected.vocab);
        let rows = rows.zip(got.logits.chunks_exact(got.vocab));
        for (position, (a, b)) in rows.enumerate() {
            let (a, b) = (log_softmax(a), log_softmax(b));
            self.positions += 1;
            self.agreed += usize::from(argmax(&a) == argmax(&b));
            self.kl += a
                .iter()
                .zip(&b)
                .map(|(a, b)| a.exp() * (a - b))
                .sum::<f64>();
            if let Some(next) = tokens.get(position + 1) {
                self.predicted += 1;
                self.reference_nats -= a[*next as usize];
                self.nats -= b[*next as usize];
            }
        }
    }

    fn finish(self, subject: &Subject<'_>) -> Quality {
        let positions = self.positions as f64;
        let cosines: Vec<f64> = self.cosines.iter().map(|sum| sum / positions).collect();
        let predicted = self.predicted.max(1) as f64;
        Quality {
            tokens: self.tokens,
            weights: subject.decoder.weights_held_as(),
            kv: subject.kv.to_string(),
            reference_perplexity: (self.reference_nats / predicted).exp(),
            perplexity: (self.nats / predicted).exp(),
            mean_kl: self.kl / positions,
            top1_agreement: self.agreed as f64 / positions,
            least_cosine: cosines.iter().fold(1.0, |least: f64, c| least.min(*c)),
            cosines,
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits
        .iter()
        .fold(f32::NEG_INFINITY, |most, l| most.max(*l));
    let shifted = logits.iter().map(|l| f64::from(l - most));
    let total = shifted.clone().map(f64::exp).sum::<f64>().ln();
    shifted.map(|l| l - total).collect()
}

fn argmax(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(logits: [[f32; 3]; 2], layer: [[f32; 2]; 2]) -> Pass {
        Pass {
            width: 2,
            vocab: 3,
            layers: vec![layer.concat()],
            logits: logits.concat(),
        }
    }

    #[test]
    fn equal_passes_differ_in_nothing() {
        let one = || pass([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]], [[1.0, 2.0], [3.0, 4.0]]);
        let mut sums = Sums::default();
        sums.add(&[0, 1], &one(), &one());
        assert_eq!((sums.positions, sums.predicted, sums.agreed), (2, 1, 2));
        assert_eq!(sums.kl, 0.0);
        assert_eq!(sums.nats, sums.reference_nats);
        assert!((sums.cosines[0] - 2.0).abs() < 1e-12);
        // The second token is predicted from the first row alone.
        let expected = (1f64.exp() + 1.0 + 2f64.exp()).ln() - 1.0;
        assert!((sums.nats - expected).abs() < 1e-9, "{}", sums.nats);
    }

    #[test]
    fn what_differs_is_seen() {
        let a = pass([[0.0, 0.0, 3.0], [0.0; 3]], [[1.0, 0.0], [1.0, 0.0]]);
        let b = pass([[3.0, 0.0, 0.0], [0.0; 3]], [[0.0, 1.0], [1.0, 0.0]]);
        let mut sums = Sums::default();
        sums.add(&[0, 2], &a, &b);
        assert_eq!(sums.agreed, 1);
        assert!(sums.kl > 1.0);
        assert!(sums.nats > sums.reference_nats);
        assert!((sums.cosines[0] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_bounds_hold_each_for_itself() {
        let good = Quality {
            tokens: 2,
            weights: "f32".into(),
            kv: "f32".into(),
            reference_perplexity: 10.0,
            perplexity: 10.05,
            mean_kl: 0.005,
            top1_agreement: 0.98,
            cosines: vec![0.9995],
            least_cosine: 0.9995,
        };
        assert!(good.beyond().is_empty());
        for change in [
            |q: &mut Quality| q.perplexity = 10.2,
            |q: &mut Quality| q.mean_kl = 0.02,
            |q: &mut Quality| q.top1_agreement = 0.96,
            |q: &mut Quality| q.least_cosine = 0.998,
            |q: &mut Quality| q.mean_kl = f64::NAN,
        ] {
            let mut changed = good.clone();
            change(&mut changed);
            assert_eq!(changed.beyond().len(), 1);
        }
    }
}
