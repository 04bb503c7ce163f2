//! A probe: the heads that read sites, and how their outputs become one token's output.
//! Knows vectors, not tensors: the engine computes the products, `score_row` is the plain form
//! that it must agree with.

use crate::error::{Error, Result, ScoreFailure};
use crate::gather::{AttentionHeads, TokenOutput};
use crate::manifest::{CanaryFailure, Combine, Kind, Manifest, NormKind, Verification};
use crate::site::Site;

/// A probe whose manifest and tensors were checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    manifest: Manifest,
    heads: Vec<Head>,
    finisher: Finisher,
    content_hash: String,
}

/// How head outputs become one token's output: all that a step asks of a probe besides its heads'
/// weights, apart from the rest of it, which a pass would have to bring from memory as well.
#[derive(Debug, Clone, PartialEq)]
pub struct Finisher {
    heads: usize,
    /// Of each head.
    out: usize,
    combined: Combined,
}

#[derive(Debug, Clone, PartialEq)]
enum Combined {
    Sum,
    /// Sums of values and of keys.
    Attention,
    TwoLayer(Box<TwoLayer>),
}

/// A linear readout of one site: `W norm(h) + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    pub site: Site,
    /// `[out, d_model]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`
    pub bias: Vec<f32>,
    pub out: usize,
    pub norm: InputNorm,
}

/// What is done to a hidden state before it meets the weights.
#[derive(Debug, Clone, PartialEq)]
pub enum InputNorm {
    None,
    /// `(h - mean) / scale`, both `[d_model]`.
    Standard {
        mean: Vec<f32>,
        scale: Vec<f32>,
    },
    /// `h / |h|`
    Unit,
}

/// SafeSwitch's second layer: `logits = w2 relu(hidden) + b2`.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoLayer {
    /// `[out, hidden]`, row-major.
    pub w2: Vec<f32>,
    /// `[out]`
    pub b2: Vec<f32>,
    /// 2: the token's logit is `logits[1] - logits[0]`, so that its sigmoid is the softmax.
    /// 1: it is the logit itself.
    pub out: usize,
}

/// A head as it runs in the forward pass: `weight x + bias`, where `x` is the hidden state, or the
/// hidden state divided by its length when `unit`.
#[derive(Debug, Clone, PartialEq)]
pub struct FoldedHead {
    pub site: Site,
    /// `[out, d_model]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`
    pub bias: Vec<f32>,
    pub out: usize,
    pub unit: bool,
}

impl Probe {
    /// Checks everything and fills in `manifest.heads` from the heads.
    pub fn new(mut manifest: Manifest, heads: Vec<Head>, prober: Option<TwoLayer>) -> Result<Self> {
        manifest.heads = heads.iter().map(Head::spec).collect();
        let mut probe = Self::checked(manifest, heads, prober)?;
        probe.content_hash = crate::container::content_hash(&probe.to_bytes()?);
        Ok(probe)
    }

    /// The parts of a file whose bytes have that hash.
    pub(crate) fn from_parts(
        manifest: Manifest,
        heads: Vec<Head>,
        prober: Option<TwoLayer>,
        content_hash: String,
    ) -> Result<Self> {
        let mut probe = Self::checked(manifest, heads, prober)?;
        probe.content_hash = content_hash;
        Ok(probe)
    }

    fn checked(manifest: Manifest, heads: Vec<Head>, prober: Option<TwoLayer>) -> Result<Self> {
        manifest.check()?;
        for (index, head) in heads.iter().enumerate() {
            head.check(index, manifest.d_model)?;
        }
        let hidden = heads.first().map_or(0, |head| head.out);
        match (&prober, manifest.combine) {
            (None, Combine::Sum) => {}
            (Some(prober), Combine::TwoLayer) => prober.check(hidden)?,
            (None, Combine::TwoLayer) => {
                return Err(Error::invalid(
                    "prober",
                    "a two_layer probe needs its second layer",
                ));
            }
            (Some(_), Combine::Sum) => {
                return Err(Error::invalid(
                    "prober",
                    "only a two_layer probe has a second layer",
                ));
            }
        }
        let combined = match prober {
            Some(prober) => Combined::TwoLayer(Box::new(prober)),
            None if manifest.kind == Kind::Attention => Combined::Attention,
            None => Combined::Sum,
        };
        let probe = Self {
            finisher: Finisher {
                heads: heads.len(),
                out: hidden,
                combined,
            },
            manifest,
            heads,
            content_hash: String::new(),
        };
        probe.check_not_constant()?;
        Ok(probe)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    pub fn heads(&self) -> &[Head] {
        &self.heads
    }

    pub fn prober(&self) -> Option<&TwoLayer> {
        match &self.finisher.combined {
            Combined::TwoLayer(prober) => Some(prober),
            Combined::Sum | Combined::Attention => None,
        }
    }

    /// SHA-256 of the probe's file, in hexadecimal.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    pub fn into_parts(self) -> (Manifest, Vec<Head>, Option<TwoLayer>) {
        let prober = match self.finisher.combined {
            Combined::TwoLayer(prober) => Some(*prober),
            Combined::Sum | Combined::Attention => None,
        };
        (self.manifest, self.heads, prober)
    }

    /// Refuses a model of another width, or one that lacks a site.
    pub fn check_model(&self, d_model: usize, n_layers: usize) -> Result<()> {
        check_d_model(self.manifest.d_model, d_model)?;
        self.heads
            .iter()
            .try_for_each(|head| head.site.check(n_layers))
    }

    /// Refuses another architecture, and tells the same weights from others.
    pub fn identity_against(
        &self,
        architecture_id: &str,
        weights_id: &str,
    ) -> Result<Verification> {
        self.manifest.model.against(architecture_id, weights_id)
    }

    /// Whether these weights reproduce the canaries; see `Manifest::canaries_pass`.
    pub fn canaries_pass(&self, logits: &[f32]) -> Result<(), CanaryFailure> {
        self.manifest.canaries_pass(logits)
    }

    /// The heads with their normalisation folded into weight and bias, in order.
    pub fn folded_heads(&self) -> Vec<FoldedHead> {
        self.heads.iter().map(Head::folded).collect()
    }

    pub fn finisher(&self) -> &Finisher {
        &self.finisher
    }

    /// The plain definition, from the hidden states of one row (`[d_model]` at each site).
    pub fn score_row<'a>(
        &self,
        hidden: impl Fn(Site) -> &'a [f32],
    ) -> Result<TokenOutput, ScoreFailure> {
        let outputs = self
            .heads
            .iter()
            .map(|head| head.apply(hidden(head.site)))
            .collect::<Result<Vec<_>, _>>()?;
        self.finisher.finish(outputs.iter().map(Vec::as_slice))
    }

    /// A score that no hidden state can move is a mistake, not a probe.
    fn check_not_constant(&self) -> Result<()> {
        let out = self.heads.first().map_or(0, |head| head.out);
        let reads = |j: usize| {
            self.heads
                .iter()
                .any(|head| head.row(j).iter().any(|w| *w != 0.0))
        };
        let constant = match self.prober() {
            None => (0..out).any(|j| !reads(j)),
            Some(prober) => !(0..out).any(|j| reads(j) && prober.slope(j) != 0.0),
        };
        if constant {
            return Err(Error::invalid(
                "weight",
                "is all zero, so the score would be constant; fit the probe again",
            ));
        }
        Ok(())
    }
}

impl Finisher {
    /// One row's output from its heads' outputs, each `[out]`, in the order of the heads.
    pub fn finish<'a>(
        &self,
        head_outputs: impl ExactSizeIterator<Item = &'a [f32]> + Clone,
    ) -> Result<TokenOutput, ScoreFailure> {
        let out = self.out;
        let fits = head_outputs.len() == self.heads
            && head_outputs.clone().all(|output| output.len() == out);
        if !fits {
            return Err(ScoreFailure::Shape);
        }
        let sum = |j: usize| {
            let of_heads = head_outputs.clone().map(|output| f64::from(output[j]));
            of_heads.sum::<f64>()
        };
        let output = match &self.combined {
            Combined::TwoLayer(prober) => TokenOutput::logit(prober.logit(sum, out) as f32),
            Combined::Attention => {
                let count = out / 2;
                let pair = |head: usize| (sum(head) as f32, sum(count + head) as f32);
                TokenOutput {
                    logit: (0..count).map(sum).sum::<f64>() as f32,
                    attention: AttentionHeads::new((0..count).map(pair))
                        .ok_or(ScoreFailure::Shape)?,
                }
            }
            Combined::Sum => TokenOutput::logit(sum(0) as f32),
        };
        output.finite()
    }
}

pub(crate) fn check_d_model(made_for: usize, loaded: usize) -> Result<()> {
    if made_for == loaded {
        return Ok(());
    }
    Err(Error::ModelMismatch {
        field: "d_model".to_owned(),
        made_for: made_for.to_string(),
        loaded: loaded.to_string(),
    })
}

impl Head {
    fn spec(&self) -> crate::manifest::HeadSpec {
        crate::manifest::HeadSpec {
            site: self.site,
            out: self.out,
            norm: self.norm.kind(),
        }
    }

    fn check(&self, index: usize, d_model: usize) -> Result<()> {
        let field = |part: &str| format!("heads[{index}].{part}");
        let weights = self.out.saturating_mul(d_model);
        check_values(&field("weight"), &self.weight, weights)?;
        check_values(&field("bias"), &self.bias, self.out)?;
        if let InputNorm::Standard { mean, scale } = &self.norm {
            check_values(&field("mean"), mean, d_model)?;
            check_values(&field("scale"), scale, d_model)?;
            if scale.iter().any(|scale| *scale <= 0.0) {
                return Err(Error::invalid(
                    field("scale"),
                    "must be above 0 in every dimension",
                ));
            }
            // A tiny scale can lift a finite weight out of f32's range.
            let folded = self.folded();
            check_values(&field("weight / scale"), &folded.weight, weights)?;
            check_values(&field("weight / scale"), &folded.bias, self.out)?;
        }
        Ok(())
    }

    fn row(&self, j: usize) -> &[f32] {
        let d_model = self.weight.len() / self.out.max(1);
        &self.weight[j * d_model..(j + 1) * d_model]
    }

    pub(crate) fn apply(&self, hidden: &[f32]) -> Result<Vec<f32>, ScoreFailure> {
        if hidden.len().checked_mul(self.out) != Some(self.weight.len()) {
            return Err(ScoreFailure::Shape);
        }
        let wide: Vec<f64> = hidden.iter().map(|h| f64::from(*h)).collect();
        let input: Vec<f64> = match &self.norm {
            InputNorm::None => wide,
            InputNorm::Unit => {
                // A state of length 0 has no direction: 0/0 is caught as not finite.
                let length = wide.iter().map(|h| h * h).sum::<f64>().sqrt();
                wide.iter().map(|h| h / length).collect()
            }
            InputNorm::Standard { mean, scale } => wide
                .iter()
                .zip(mean.iter().zip(scale))
                .map(|(h, (mean, scale))| (h - f64::from(*mean)) / f64::from(*scale))
                .collect(),
        };
        let output = |j: usize| {
            let terms = self.row(j).iter().zip(&input);
            let sum: f64 = terms.map(|(w, x)| f64::from(*w) * x).sum();
            (sum + f64::from(self.bias[j])) as f32
        };
        Ok((0..self.out).map(output).collect())
    }

    fn folded(&self) -> FoldedHead {
        let (weight, bias) = match &self.norm {
            InputNorm::None | InputNorm::Unit => (self.weight.clone(), self.bias.clone()),
            InputNorm::Standard { mean, scale } => self.fold(mean, scale),
        };
        FoldedHead {
            site: self.site,
            weight,
            bias,
            out: self.out,
            unit: self.norm == InputNorm::Unit,
        }
    }

    /// `w (h - mean) / scale + b = (w / scale) h + (b - (w / scale) mean)`
    fn fold(&self, mean: &[f32], scale: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut weight = Vec::with_capacity(self.weight.len());
        let mut bias = Vec::with_capacity(self.out);
        for j in 0..self.out {
            let mut shift = 0.0;
            for ((w, mean), scale) in self.row(j).iter().zip(mean).zip(scale) {
                let folded = f64::from(*w) / f64::from(*scale);
                shift += folded * f64::from(*mean);
                weight.push(folded as f32);
            }
            bias.push((f64::from(self.bias[j]) - shift) as f32);
        }
        (weight, bias)
    }
}

impl InputNorm {
    pub fn kind(&self) -> NormKind {
        match self {
            Self::None => NormKind::None,
            Self::Standard { .. } => NormKind::Standard,
            Self::Unit => NormKind::Unit,
        }
    }
}

impl TwoLayer {
    fn check(&self, hidden: usize) -> Result<()> {
        if !(1..=2).contains(&self.out) {
            return Err(Error::invalid("prober.w2", "must have 1 or 2 rows"));
        }
        check_values("prober.w2", &self.w2, self.out.saturating_mul(hidden))?;
        check_values("prober.b2", &self.b2, self.out)
    }

    /// How the token's logit changes with hidden unit `j`.
    fn slope(&self, j: usize) -> f64 {
        let hidden = self.w2.len() / self.out.max(1);
        let last = f64::from(self.w2[(self.out - 1) * hidden + j]);
        match self.out {
            2 => last - f64::from(self.w2[j]),
            _ => last,
        }
    }

    fn logit(&self, hidden: impl Fn(usize) -> f64, width: usize) -> f64 {
        let bias = match self.b2[..] {
            [negative, positive] => f64::from(positive) - f64::from(negative),
            [bias] => f64::from(bias),
            _ => f64::NAN,
        };
        // `max` would turn a NaN into 0 and hide it.
        let relu = |x: f64| if x < 0.0 { 0.0 } else { x };
        (0..width)
            .map(|j| relu(hidden(j)) * self.slope(j))
            .sum::<f64>()
            + bias
    }
}

pub(crate) fn check_values(field: &str, values: &[f32], len: usize) -> Result<()> {
    if values.len() != len {
        return Err(Error::invalid(
            field,
            format!("holds {} values, but {len} are needed", values.len()),
        ));
    }
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(Error::invalid(
            field,
            format!("value {at} is not finite; fit it again"),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{attention, logistic, several_heads, two_layer};
    use proptest::prelude::*;

    /// What the engine does: folded products, then `finish`.
    fn scored_in_pass(probe: &Probe, hidden: &[f32]) -> Result<TokenOutput, ScoreFailure> {
        let length = hidden.iter().map(|h| h * h).sum::<f32>().sqrt();
        let product = |head: &FoldedHead| -> Vec<f32> {
            let divisor = if head.unit { length } else { 1.0 };
            let rows = head.weight.chunks(hidden.len()).zip(&head.bias);
            rows.map(|(row, bias)| {
                row.iter()
                    .zip(hidden)
                    .map(|(w, h)| w * h / divisor)
                    .sum::<f32>()
                    + bias
            })
            .collect()
        };
        let outputs: Vec<Vec<f32>> = probe.folded_heads().iter().map(product).collect();
        let outputs: Vec<&[f32]> = outputs.iter().map(Vec::as_slice).collect();
        finish(probe, &outputs)
    }

    fn finish(probe: &Probe, outputs: &[&[f32]]) -> Result<TokenOutput, ScoreFailure> {
        probe.finisher().finish(outputs.iter().copied())
    }

    proptest! {
        #[test]
        fn folded_heads_agree_with_the_plain_definition(hidden in proptest::array::uniform3(-200.0_f32..200.0)) {
            prop_assume!(hidden.iter().any(|h| h.abs() > 1.0));
            for probe in [logistic(), attention(), several_heads(), two_layer()] {
                let plain = probe.score_row(|_| &hidden).unwrap();
                let folded = scored_in_pass(&probe, &hidden).unwrap();
                let close = |a: f32, b: f32| (a - b).abs() <= 1e-3 * (1.0 + a.abs());
                prop_assert!(close(plain.logit, folded.logit), "{plain:?} {folded:?}");
                let pairs = plain.attention.pairs().iter().zip(folded.attention.pairs());
                prop_assert_eq!(plain.attention.pairs().len(), folded.attention.pairs().len());
                for ((value, key), (other_value, other_key)) in pairs {
                    prop_assert!(close(*value, *other_value) && close(*key, *other_key));
                }
            }
        }

        #[test]
        fn a_unit_head_ignores_the_length_of_the_state(factor in 0.01_f32..100.0) {
            let head = crate::testing::head(Site::Embed, 1, InputNorm::Unit);
            let state = [0.3, -0.7, 2.0];
            let longer = state.map(|h| h * factor);
            let (one, other) = (head.apply(&state).unwrap()[0], head.apply(&longer).unwrap()[0]);
            prop_assert!((one - other).abs() < 1e-5);
        }
    }

    #[test]
    fn each_head_reads_its_own_site() {
        let probe = logistic();
        let (at_post, at_mlp) = ([1.0, 2.0, 3.0], [-3.0, 0.5, 1.0]);
        let logit = probe
            .score_row(|site| {
                if site == Site::ResidPost(1) {
                    &at_post
                } else {
                    &at_mlp
                }
            })
            .unwrap()
            .logit;
        let heads = probe.heads();
        let expected = heads[0].apply(&at_post).unwrap()[0] + heads[1].apply(&at_mlp).unwrap()[0];
        assert!((logit - expected).abs() < 1e-5);
    }

    #[test]
    fn an_attention_probe_gives_a_value_and_a_key() {
        let output = finish(&attention(), &[&[1.5, -0.5]]).unwrap();
        assert_eq!(output, TokenOutput::keyed(1.5, -0.5));
        let several = finish(&several_heads(), &[&[1.5, 2.0, -0.5, 3.0]]).unwrap();
        assert_eq!(several.logit, 3.5);
        assert_eq!(several.attention.pairs(), [(1.5, -0.5), (2.0, 3.0)]);
        assert_eq!(
            finish(&logistic(), &[&[1.5], &[1.0]]).unwrap(),
            TokenOutput::logit(2.5)
        );
    }

    #[test]
    fn a_two_layer_logit_is_the_log_odds_of_the_softmax() {
        let probe = two_layer();
        let hidden = [1.0_f32, -1.0, 2.0, 0.5];
        let (w2, b2) = (&probe.prober().unwrap().w2, &probe.prober().unwrap().b2);
        let logit = |row: usize| -> f64 {
            let units = hidden.iter().zip(&w2[row * 4..row * 4 + 4]);
            f64::from(b2[row]) + units.map(|(h, w)| f64::from(h.max(0.0) * w)).sum::<f64>()
        };
        let softmax = logit(1).exp() / (logit(0).exp() + logit(1).exp());
        let got = f64::from(finish(&probe, &[&hidden]).unwrap().logit);
        assert!((1.0 / (1.0 + (-got).exp()) - softmax).abs() < 1e-6);
    }

    #[test]
    fn a_state_that_is_not_finite_fails_the_score() {
        for probe in [logistic(), attention(), two_layer()] {
            for bad in [f32::NAN, f32::INFINITY] {
                let hidden = [1.0, bad, 2.0];
                assert_eq!(probe.score_row(|_| &hidden), Err(ScoreFailure::NotFinite));
            }
        }
        let no_direction = [0.0; 3];
        assert_eq!(
            logistic().score_row(|_| &no_direction),
            Err(ScoreFailure::NotFinite)
        );
        assert_eq!(
            finish(&two_layer(), &[&[0.0, f32::NAN, 0.0, 0.0]]),
            Err(ScoreFailure::NotFinite)
        );
        assert_eq!(
            finish(&two_layer(), &[&[f32::NAN; 4]]),
            Err(ScoreFailure::NotFinite)
        );
    }

    #[test]
    fn outputs_of_another_shape_fail_the_score() {
        let probe = logistic();
        for outputs in [
            &[][..],
            &[&[1.0_f32][..]],
            &[&[1.0, 2.0], &[1.0]],
            &[&[], &[]],
        ] {
            assert_eq!(finish(&probe, outputs), Err(ScoreFailure::Shape));
        }
        assert_eq!(probe.score_row(|_| &[1.0, 2.0]), Err(ScoreFailure::Shape));
    }

    #[test]
    fn a_model_of_another_width_or_depth_is_refused() {
        let probe = logistic();
        assert!(probe.check_model(3, 3).is_ok());
        let message = probe.check_model(4, 3).unwrap_err().to_string();
        assert!(
            message.contains("made for `3`, but the loaded model is `4`"),
            "{message}"
        );
        assert!(
            probe
                .check_model(3, 2)
                .unwrap_err()
                .to_string()
                .contains("blocks.2.hook_mlp_out")
        );
    }

    #[test]
    fn another_architecture_is_refused_and_other_weights_are_unverified() {
        let probe = logistic();
        assert_eq!(
            probe.identity_against("arch-1", "weights-1"),
            Ok(Verification::Native)
        );
        assert_eq!(
            probe.identity_against("arch-1", "tuned"),
            Ok(Verification::Unverified)
        );
        let message = probe
            .identity_against("arch-2", "weights-1")
            .unwrap_err()
            .to_string();
        assert!(message.contains("model.architecture_id"), "{message}");
    }
}
