//! The flags that say how a probe is fitted, the same for `probe fit`, `sweep` and `curve`.

use clap::ValueEnum;
use inwit_probes::fit::ClassWeight;
use inwit_probes::{Gather, Kind, Positions};

use crate::lab::learn::{HELD_OUT, Recipe};

#[derive(Debug, clap::Args)]
pub(super) struct RecipeArgs {
    /// What to fit
    #[arg(long, value_enum, default_value = "logistic")]
    pub kind: KindArg,
    /// What the positive rows together weigh against the negative ones: balanced, none (as they
    /// are), or e.g. 2:1; by drawing rows of the rarer class again, group by group (attention: in
    /// the loss)
    #[arg(long, value_name = "WEIGHT", default_value = "balanced")]
    pub class_weight: ClassWeight,
    /// Strength of the L2 penalty, for logistic and attention; given several times, cross-validation
    /// by group chooses (logistic)
    #[arg(long = "alpha", value_name = "ALPHA", allow_negative_numbers = true)]
    pub alphas: Vec<f64>,
    /// How far lda's covariance is shrunk towards its mean variance [default: 0.1]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub shrinkage: Option<f64>,
    /// Units between the layers of two_layer [default: 64]
    #[arg(long, value_name = "UNITS")]
    pub hidden: Option<usize>,
    /// Attention heads over the same tokens, 1 to 16 [default: 8]
    #[arg(long, value_name = "HEADS")]
    pub attention_heads: Option<usize>,
    /// Steps in which attention's learning rate rises, before it falls to 0 [default: 50]
    #[arg(long, value_name = "STEPS")]
    pub warm_up: Option<usize>,
    /// Share of a request's tokens that a step of attention does not see [default: 0.3]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub token_dropout: Option<f64>,
    /// Times that two_layer and attention see every row [default: 20 and 6]
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Rows per step [default: 8 for two_layer, 64 for attention]
    #[arg(long, value_name = "ROWS")]
    pub batch: Option<usize>,
    /// Of AdamW [default: 0.0001 for two_layer, 0.001 for attention]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,
    /// Of AdamW [default: 0.01 for two_layer, 1 for attention]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub weight_decay: Option<f64>,
    /// Share of the groups that no fit sees, for calibrating and measuring
    #[arg(long, value_name = "SHARE", default_value_t = HELD_OUT, allow_negative_numbers = true)]
    pub held_out: f64,
    /// Of the split, the draws and the fit
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum KindArg {
    Logistic,
    #[value(name = "difference_of_means")]
    DifferenceOfMeans,
    /// Linear discriminant analysis with a shrunk covariance
    Lda,
    /// SafeSwitch's prober: a hidden layer with ReLU, then two logits
    #[value(name = "two_layer")]
    TwoLayer,
    /// A value and a key, gathered by attention over the tokens
    Attention,
}

impl RecipeArgs {
    /// The recipe, and the gathers with the one that shapes it first: unset, what the kind and the
    /// positions ask for.
    pub(super) fn recipe(
        &self,
        gathers: Vec<Gather>,
        positions: Positions,
    ) -> (Recipe, Vec<Gather>) {
        let kind = match self.kind {
            KindArg::Logistic => Kind::Logistic,
            KindArg::DifferenceOfMeans => Kind::DifferenceOfMeans,
            KindArg::Lda => Kind::Lda,
            KindArg::TwoLayer => Kind::TwoLayer,
            KindArg::Attention => Kind::Attention,
        };
        let own = match (kind, positions) {
            (Kind::Attention, _) => Gather::Attention,
            (_, Positions::FirstGenerated(_)) => Gather::Mean,
            _ => Gather::Last,
        };
        let gather = gathers.first().copied().unwrap_or(own);
        let recipe = Recipe {
            class_weight: self.class_weight,
            alphas: self.alphas.clone(),
            shrinkage: self.shrinkage,
            hidden: self.hidden,
            attention_heads: self.attention_heads,
            warm_up: self.warm_up,
            token_dropout: self.token_dropout,
            epochs: self.epochs,
            batch: self.batch,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            held_out: self.held_out,
            ..Recipe::new(kind, gather, self.seed)
        };
        match gathers.is_empty() {
            true => (recipe, vec![own]),
            false => (recipe, gathers),
        }
    }
}
