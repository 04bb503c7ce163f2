//! From labelled states to the heads of a probe: which mathematics, with which settings, on which
//! view of a request.
//! Knows states, labels and groups; knows no model, no files and no calibration.

use std::fmt::Write as _;

use inwit_probes::fit::{
    AttentionData, AttentionParams, ClassWeight, FitData, LogisticParams, TokenStates,
    check_shrinkage, fit_attention, fit_difference_of_means, fit_lda, fit_logistic,
};
use inwit_probes::{Gather, Head, InputNorm, Kind, NormKind, Positions, Site, TwoLayer};
use ndarray::Array2;

use super::examples::Example;
use super::fit::unfit;
use super::two_layer;
use crate::error::{Error, Result};

/// Tokens of one request that a fit of single tokens learns from: long requests do not outvote
/// short ones.
const TOKENS_PER_REQUEST: usize = 8;
/// The share of the groups on which a probe is calibrated and measured, unless told otherwise.
pub const HELD_OUT: f64 = 0.2;
/// How far an LDA's covariance is shrunk unless told otherwise.
const SHRINKAGE: f64 = 0.1;

/// How to fit. Settings that are unset have the kind's own value; one that the kind does not have
/// is an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    pub kind: Kind,
    /// Shapes the fit: what a request is to it.
    pub gather: Gather,
    pub class_weight: ClassWeight,
    /// L2 penalties; with several, cross-validation by group chooses.
    pub alphas: Vec<f64>,
    /// Of the covariance towards its mean variance.
    pub shrinkage: Option<f64>,
    /// Units between the layers.
    pub hidden: Option<usize>,
    /// Attention heads over the same tokens.
    pub attention_heads: Option<usize>,
    /// Steps in which attention's learning rate rises.
    pub warm_up: Option<usize>,
    /// Share of tokens that a step of attention does not see.
    pub token_dropout: Option<f64>,
    pub epochs: Option<usize>,
    /// Rows or requests per step.
    pub batch: Option<usize>,
    pub learning_rate: Option<f64>,
    pub weight_decay: Option<f64>,
    /// Share of the groups that no fit sees.
    pub held_out: f64,
    /// Of the split, the draws and the fit.
    pub seed: u64,
}

/// Examples whose states were read at these sites, in this order.
#[derive(Clone, Copy, Debug)]
pub struct Readings<'a> {
    pub sites: &'a [Site],
    pub d_model: usize,
    pub examples: &'a [Example],
}

/// What a fit gives.
#[derive(Clone, Debug, Default)]
pub struct Learnt {
    /// One per site.
    pub heads: Vec<Head>,
    pub prober: Option<TwoLayer>,
    /// For the record.
    pub metrics: Vec<(&'static str, f64)>,
    pub remarks: Vec<String>,
}

impl Recipe {
    /// A recipe with the kind's own settings.
    pub fn new(kind: Kind, gather: Gather, seed: u64) -> Self {
        Self {
            kind,
            gather,
            class_weight: ClassWeight::default(),
            alphas: Vec::new(),
            shrinkage: None,
            hidden: None,
            attention_heads: None,
            warm_up: None,
            token_dropout: None,
            epochs: None,
            batch: None,
            learning_rate: None,
            weight_decay: None,
            held_out: HELD_OUT,
            seed,
        }
    }

    /// Refuses settings that the kind does not have.
    pub fn check(&self) -> Result<()> {
        let descends = matches!(self.kind, Kind::TwoLayer | Kind::Attention);
        let penalised = matches!(self.kind, Kind::Logistic | Kind::Attention);
        let settings = [
            ("alpha", !self.alphas.is_empty(), penalised),
            (
                "shrinkage",
                self.shrinkage.is_some(),
                self.kind == Kind::Lda,
            ),
            ("hidden", self.hidden.is_some(), self.kind == Kind::TwoLayer),
            (
                "attention_heads",
                self.attention_heads.is_some(),
                self.kind == Kind::Attention,
            ),
            (
                "warm_up",
                self.warm_up.is_some(),
                self.kind == Kind::Attention,
            ),
            (
                "token_dropout",
                self.token_dropout.is_some(),
                self.kind == Kind::Attention,
            ),
            ("epochs", self.epochs.is_some(), descends),
            ("batch", self.batch.is_some(), descends),
            ("learning_rate", self.learning_rate.is_some(), descends),
            ("weight_decay", self.weight_decay.is_some(), descends),
        ];
        if let Some((name, ..)) = settings.iter().find(|(_, set, has)| *set && !has) {
            let message = format!(
                "is no setting of the kind {}; leave it out",
                name_of(self.kind)
            );
            return Err(Error::invalid(*name, message));
        }
        if !(self.held_out > 0.0 && self.held_out < 1.0) {
            return Err(Error::invalid(
                "held_out",
                "must lie strictly between 0 and 1",
            ));
        }
        self.check_values()?;
        if self.kind == Kind::Attention && self.alphas.len() > 1 {
            let message = "takes one value for attention; only logistic chooses among several";
            return Err(Error::invalid("alpha", message));
        }
        Ok(())
    }

    /// What the fit would refuse, told before the states are read.
    fn check_values(&self) -> Result<()> {
        match self.kind {
            Kind::Logistic => self.logistic().check().map_err(unfit),
            Kind::Lda => check_shrinkage(self.shrinkage()).map_err(unfit),
            Kind::TwoLayer => self.two_layer().check(),
            Kind::Attention => self.attention().check().map_err(unfit),
            Kind::DifferenceOfMeans => Ok(()),
        }
    }

    /// Refuses gathers that the kind or the positions do not have.
    pub fn check_gathers(&self, gathers: &[Gather], positions: Positions) -> Result<()> {
        let attention = gathers.contains(&Gather::Attention);
        if attention != (self.kind == Kind::Attention) || (attention && gathers.len() > 1) {
            return Err(Error::invalid(
                "gather",
                "attention goes with --kind attention, and alone",
            ));
        }
        if let Some(twice) = (1..gathers.len()).find(|i| gathers[..*i].contains(&gathers[*i])) {
            let message = format!("{} is given twice", gathers[twice]);
            return Err(Error::invalid("gather", message));
        }
        if gathers.is_empty() {
            return Err(Error::invalid("gather", "name at least one"));
        }
        if !positions.per_token() && gathers.iter().any(|gather| *gather != Gather::Last) {
            let message = format!("at {positions} a probe reads one token; use --gather last");
            return Err(Error::invalid("gather", message));
        }
        Ok(())
    }

    /// The settings that counted, for the record.
    pub fn described(&self) -> String {
        let mut text = format!("class weight {}", self.class_weight);
        let mut add = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = write!(text, ", {name} {value}");
        };
        match self.kind {
            Kind::Logistic | Kind::DifferenceOfMeans => {}
            Kind::Lda => add("shrinkage", self.shrinkage().to_string()),
            Kind::TwoLayer => {
                let params = self.two_layer();
                add("hidden", params.hidden.to_string());
                add("epochs", params.epochs.to_string());
                add("batch", params.batch.to_string());
                add("learning rate", params.learning_rate.to_string());
                add("weight decay", params.weight_decay.to_string());
            }
            Kind::Attention => {
                let params = self.attention();
                add("attention heads", params.heads.to_string());
                add("warm-up", params.warm_up.to_string());
                add("token dropout", params.token_dropout.to_string());
                add("epochs", params.epochs.to_string());
                add("batch", params.batch.to_string());
                add("learning rate", params.learning_rate.to_string());
                add("alpha", params.alpha.to_string());
                add("weight decay", params.weight_decay.to_string());
            }
        }
        text
    }

    fn shrinkage(&self) -> f64 {
        self.shrinkage.unwrap_or(SHRINKAGE)
    }

    fn two_layer(&self) -> two_layer::Params {
        let own = two_layer::Params::default();
        two_layer::Params {
            hidden: self.hidden.unwrap_or(own.hidden),
            epochs: self.epochs.unwrap_or(own.epochs),
            batch: self.batch.unwrap_or(own.batch),
            learning_rate: self.learning_rate.unwrap_or(own.learning_rate),
            weight_decay: self.weight_decay.unwrap_or(own.weight_decay),
            class_weight: self.class_weight,
            seed: self.seed,
        }
    }

    fn attention(&self) -> AttentionParams {
        let own = AttentionParams::default();
        let narrow = |value: Option<f64>, own: f32| value.map_or(own, |value| value as f32);
        AttentionParams {
            heads: self.attention_heads.unwrap_or(own.heads),
            warm_up: self.warm_up.unwrap_or(own.warm_up),
            token_dropout: narrow(self.token_dropout, own.token_dropout),
            epochs: self.epochs.unwrap_or(own.epochs),
            batch: self.batch.unwrap_or(own.batch),
            learning_rate: narrow(self.learning_rate, own.learning_rate),
            alpha: narrow(self.alphas.first().copied(), own.alpha),
            weight_decay: narrow(self.weight_decay, own.weight_decay),
            class_weight: self.class_weight,
            seed: self.seed,
        }
    }

    fn logistic(&self) -> LogisticParams {
        let own = LogisticParams::default();
        LogisticParams {
            alphas: match self.alphas.is_empty() {
                true => own.alphas,
                false => self.alphas.clone(),
            },
            class_weight: self.class_weight,
            seed: self.seed,
            ..own
        }
    }
}

/// One head per site: fitted together, on the sites' states side by side.
///
/// `sites` are some of those of the readings.
pub fn learn(recipe: &Recipe, sites: &[Site], readings: &Readings<'_>) -> Result<Learnt> {
    recipe.check()?;
    let site = *sites
        .first()
        .ok_or_else(|| Error::invalid("site", "name at least one"))?;
    let mut learnt = Learnt::default();
    let joint = match recipe.kind {
        Kind::Attention => {
            let states = readings.requests(sites)?;
            let examples = readings.examples.iter();
            let (y, group): (Vec<bool>, Vec<String>) = examples
                .map(|example| (example.positive, example.group.clone()))
                .unzip();
            let data = AttentionData {
                states: &states,
                y: &y,
                group: &group,
            };
            let fit = fit_attention(data, site, &recipe.attention()).map_err(unfit)?;
            let last = fit.losses.last().copied().unwrap_or_default();
            learnt.metrics.push(("loss_of_last_epoch", f64::from(last)));
            fit.head
        }
        Kind::TwoLayer => {
            let fit = two_layer::fit(&readings.views(recipe, sites)?, site, &recipe.two_layer())?;
            let last = fit.losses.last().copied().unwrap_or_default();
            learnt.metrics.push(("loss_of_last_epoch", f64::from(last)));
            learnt.prober = Some(fit.prober);
            fit.head
        }
        Kind::DifferenceOfMeans => {
            let data = readings.views(recipe, sites)?;
            let data = data.weighted(recipe.class_weight, recipe.seed);
            fit_difference_of_means(&data, site, NormKind::Standard).map_err(unfit)?
        }
        Kind::Lda => {
            let data = readings.views(recipe, sites)?;
            let data = data.weighted(recipe.class_weight, recipe.seed);
            fit_lda(&data, site, recipe.shrinkage()).map_err(unfit)?
        }
        Kind::Logistic => {
            let data = readings.views(recipe, sites)?;
            let fit = fit_logistic(&data, site, &recipe.logistic()).map_err(unfit)?;
            learnt.metrics.push(("alpha", fit.alpha));
            if !fit.converged {
                let length = fit.gradient;
                learnt
                    .remarks
                    .push(format!("The solver stopped at gradient {length:.1e}."));
            }
            fit.head
        }
    };
    learnt.heads = part(&joint, sites, readings.d_model);
    Ok(learnt)
}

/// A kind as files and flags spell it.
pub fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Logistic => "logistic",
        Kind::DifferenceOfMeans => "difference_of_means",
        Kind::Lda => "lda",
        Kind::TwoLayer => "two_layer",
        Kind::Attention => "attention",
    }
}

impl Readings<'_> {
    /// The states of one example at the sites, `[tokens, sites x d_model]`.
    pub fn side_by_side(&self, example: &Example, sites: &[Site]) -> Result<Vec<f32>> {
        let columns: Vec<&Vec<f32>> = sites
            .iter()
            .map(|site| self.values(example, *site))
            .collect::<Result<_>>()?;
        let tokens = example.states.positions.len();
        let mut states = Vec::with_capacity(tokens * sites.len() * self.d_model);
        for token in 0..tokens {
            for values in &columns {
                states.extend_from_slice(&values[token * self.d_model..(token + 1) * self.d_model]);
            }
        }
        Ok(states)
    }

    /// `[tokens, d_model]`
    pub fn values<'a>(&self, example: &'a Example, site: Site) -> Result<&'a Vec<f32>> {
        let index = self.sites.iter().position(|own| *own == site);
        index
            .and_then(|index| example.states.values.get(index))
            .ok_or_else(|| Error::internal(format!("no states were read at {site}")))
    }

    /// What a fit of single states learns from: where logit and gather are linear the gathered
    /// state itself, whose logit is the gathered logit, and single tokens for the others.
    fn views(&self, recipe: &Recipe, sites: &[Site]) -> Result<FitData> {
        let width = self.d_model * sites.len();
        let linear = recipe.kind != Kind::TwoLayer;
        let (mut x, mut y, mut group) = (Vec::new(), Vec::new(), Vec::new());
        for example in self.examples {
            let states = self.side_by_side(example, sites)?;
            let views = match recipe.gather {
                Gather::Mean if linear => mean(&states, width),
                Gather::Last => states[states.len() - width..].to_vec(),
                _ => spread(&states, width, TOKENS_PER_REQUEST),
            };
            for _ in 0..views.len() / width {
                y.push(example.positive);
                group.push(example.group.clone());
            }
            x.extend(views);
        }
        let x = Array2::from_shape_vec((y.len(), width), x).map_err(Error::internal)?;
        Ok(FitData { x, y, group })
    }

    fn requests(&self, sites: &[Site]) -> Result<Requests<'_>> {
        let of_sites = |example| {
            let values = sites.iter().map(|site| self.values(example, *site));
            values.map(|values| Ok(values?.as_slice())).collect()
        };
        Ok(Requests {
            d_model: self.d_model,
            states: self.examples.iter().map(of_sites).collect::<Result<_>>()?,
        })
    }
}

/// The states of every example at some sites, where they lie: tokens are put together from their
/// sites as a fit reads them.
struct Requests<'a> {
    d_model: usize,
    /// Per example and site, `[tokens, d_model]`.
    states: Vec<Vec<&'a [f32]>>,
}

impl TokenStates for Requests<'_> {
    fn requests(&self) -> usize {
        self.states.len()
    }

    fn width(&self) -> usize {
        self.d_model * self.states.first().map_or(0, Vec::len)
    }

    fn tokens(&self, request: usize) -> usize {
        self.states[request]
            .first()
            .map_or(0, |values| values.len() / self.d_model)
    }

    fn read(&self, request: usize, into: &mut Vec<f32>) {
        for token in 0..self.tokens(request) {
            let place = token * self.d_model..(token + 1) * self.d_model;
            for values in &self.states[request] {
                into.extend_from_slice(&values[place.clone()]);
            }
        }
    }
}

/// Takes a head over several sites side by side apart: one head per site, the bias with the first.
fn part(joint: &Head, sites: &[Site], d_model: usize) -> Vec<Head> {
    let width = sites.len() * d_model;
    let of_site = |values: &[f32], index: usize| -> Vec<f32> {
        let rows = values.chunks(width);
        rows.flat_map(|row| row[index * d_model..(index + 1) * d_model].to_vec())
            .collect()
    };
    let head = |(index, site): (usize, &Site)| Head {
        site: *site,
        weight: of_site(&joint.weight, index),
        bias: match index {
            0 => joint.bias.clone(),
            _ => vec![0.0; joint.out],
        },
        out: joint.out,
        norm: match &joint.norm {
            InputNorm::Standard { mean, scale } => InputNorm::Standard {
                mean: of_site(mean, index),
                scale: of_site(scale, index),
            },
            norm => norm.clone(),
        },
    };
    sites.iter().enumerate().map(head).collect()
}

fn mean(states: &[f32], width: usize) -> Vec<f32> {
    let rows = (states.len() / width) as f64;
    let column = |column: usize| {
        let sum: f64 = states
            .iter()
            .skip(column)
            .step_by(width)
            .map(|v| f64::from(*v))
            .sum();
        (sum / rows) as f32
    };
    (0..width).map(column).collect()
}

/// At most `most` rows, evenly spread, the last one among them.
fn spread(states: &[f32], width: usize, most: usize) -> Vec<f32> {
    let rows = states.len() / width;
    let taken = rows.min(most);
    let row = |index: usize| {
        let row = (index + 1) * rows / taken - 1;
        states[row * width..(row + 1) * width].to_vec()
    };
    (0..taken).flat_map(row).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use inwit_probes::metrics::auroc;
    use inwit_probes::{Manifest, ModelIdentity, Probe};

    use super::*;
    use crate::lab::scored::Scored;
    use crate::lab::seeded::Seeded;
    use crate::lab::states::RowStates;

    pub(in crate::lab) const D_MODEL: usize = 3;

    pub(in crate::lab) fn sites() -> Vec<Site> {
        vec![Site::ResidPost(0), Site::ResidPost(1)]
    }

    /// Positives differ at the second site's last dimension.
    pub(in crate::lab) fn examples(count: usize) -> Vec<Example> {
        let mut seeded = Seeded::new(5);
        let mut state = |positive: bool, tokens: usize, site: usize| -> Vec<f32> {
            let mut values: Vec<f32> = (0..tokens * D_MODEL).map(|_| seeded.signed()).collect();
            if positive && site == 1 {
                values
                    .iter_mut()
                    .skip(2)
                    .step_by(D_MODEL)
                    .for_each(|v| *v += 1.5);
            }
            values
        };
        let example = |index: usize| {
            let (positive, tokens) = (index.is_multiple_of(2), 2 + index % 3);
            Example {
                positive,
                group: format!("g{index}"),
                states: RowStates {
                    positions: (4..).take(tokens).collect(),
                    tokens: vec![9; tokens],
                    values: (0..2).map(|site| state(positive, tokens, site)).collect(),
                },
                tokens: vec![9; 4 + tokens],
            }
        };
        (0..count).map(example).collect()
    }

    /// A recipe that fits the little examples in a moment.
    pub(in crate::lab) fn recipe(kind: Kind, gather: Gather) -> Recipe {
        let mut recipe = Recipe::new(kind, gather, 1);
        match kind {
            Kind::Logistic => recipe.alphas = vec![1e-3],
            Kind::TwoLayer => {
                recipe.hidden = Some(8);
                recipe.learning_rate = Some(1e-2);
            }
            Kind::Attention => {
                recipe.attention_heads = Some(2);
                recipe.epochs = Some(20);
                recipe.batch = Some(16);
                recipe.learning_rate = Some(2e-2);
                recipe.weight_decay = Some(0.01);
                recipe.token_dropout = Some(0.0);
            }
            _ => {}
        }
        recipe
    }

    pub(in crate::lab) fn probe(recipe: &Recipe, learnt: Learnt) -> Probe {
        let identity = ModelIdentity {
            name: "m".into(),
            architecture_id: "a".into(),
            weights_id: "w".into(),
            weight_format: "f32".into(),
        };
        let mut manifest = Manifest::new(
            "prompt_harm",
            recipe.kind,
            D_MODEL,
            Positions::PromptContent,
            identity,
        );
        manifest.gathers = vec![recipe.gather];
        Probe::new(manifest, learnt.heads, learnt.prober).expect("a probe")
    }

    fn readings<'a>(sites: &'a [Site], examples: &'a [Example]) -> Readings<'a> {
        Readings {
            sites,
            d_model: D_MODEL,
            examples,
        }
    }

    fn check_separates(kind: Kind, gather: Gather) {
        let (recipe, sites) = (recipe(kind, gather), sites());
        let examples = examples(240);
        let (fresh, learnt_from) = examples.split_at(80);
        let learnt = learn(&recipe, &sites, &readings(&sites, learnt_from)).expect("fits");
        assert_eq!(learnt.heads.len(), 2);
        let probe = probe(&recipe, learnt);
        let scored = Scored::all(&probe, &readings(&sites, fresh)).expect("scores");
        let logits: Vec<f32> = scored.iter().map(|row| row.ranked(&gather)).collect();
        let y: Vec<bool> = fresh.iter().map(|example| example.positive).collect();
        let found = auroc(&logits, &y).expect("ranks");
        assert!(found > 0.9, "{kind:?} {gather}: {found}");
    }

    #[test]
    fn every_kind_separates_over_two_sites() {
        for kind in [
            Kind::Logistic,
            Kind::DifferenceOfMeans,
            Kind::Lda,
            Kind::TwoLayer,
        ] {
            check_separates(kind, Gather::Mean);
        }
        check_separates(Kind::Attention, Gather::Attention);
    }

    #[test]
    fn every_gather_has_a_fit() {
        for gather in [
            Gather::Last,
            Gather::Max,
            Gather::Ema { a: 0.3 },
            Gather::KOfN { k: 2, n: 4 },
            Gather::CumulativeLogOdds,
        ] {
            check_separates(Kind::Logistic, gather);
        }
    }

    #[test]
    fn some_of_the_sites_can_be_learnt_from() {
        let (recipe, sites, examples) = (recipe(Kind::Lda, Gather::Mean), sites(), examples(100));
        let readings = readings(&sites, &examples);
        let learnt = learn(&recipe, &sites[1..], &readings).expect("fits");
        assert_eq!(learnt.heads.len(), 1);
        assert_eq!(learnt.heads[0].site, sites[1]);
        let elsewhere = learn(&recipe, &[Site::Embed], &readings).expect_err("refused");
        assert!(elsewhere.to_string().contains("hook_embed"), "{elsewhere}");
    }

    #[test]
    fn a_head_in_parts_scores_like_the_whole() {
        let (recipe, sites, examples) =
            (recipe(Kind::Logistic, Gather::Mean), sites(), examples(100));
        let readings = readings(&sites, &examples);
        let learnt = learn(&recipe, &sites, &readings).expect("fits");
        let probe = probe(&recipe, learnt);
        // The logit of the mean state is the mean of the logits.
        let scored = &Scored::all(&probe, &readings).expect("scores")[0];
        let states = readings.side_by_side(&examples[0], &sites).expect("states");
        let view = mean(&states, 2 * D_MODEL);
        let whole = probe
            .score_row(|site| match site == sites[0] {
                true => &view[..D_MODEL],
                false => &view[D_MODEL..],
            })
            .expect("scores");
        let gathered = scored.ranked(&Gather::Mean);
        assert!(
            (whole.logit - gathered).abs() < 1e-4,
            "{} {gathered}",
            whole.logit
        );
    }

    #[test]
    fn tokens_are_spread_over_the_request() {
        let states: Vec<f32> = (0..20).map(|i| i as f32).collect();
        assert_eq!(spread(&states, 1, 4), [4.0, 9.0, 14.0, 19.0]);
        assert_eq!(spread(&states[..3], 1, 4), [0.0, 1.0, 2.0]);
    }

    #[test]
    fn a_setting_that_the_kind_lacks_is_refused_by_name() {
        let check = |kind, change: fn(&mut Recipe), field: &str| {
            let mut bad = Recipe::new(kind, Gather::Last, 0);
            change(&mut bad);
            let error = bad.check().expect_err("refused").to_string();
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
        };
        check(Kind::Lda, |r| r.alphas = vec![1.0], "alpha");
        check(Kind::Logistic, |r| r.shrinkage = Some(0.1), "shrinkage");
        check(Kind::Attention, |r| r.hidden = Some(4), "hidden");
        check(Kind::Logistic, |r| r.epochs = Some(4), "epochs");
        check(Kind::Attention, |r| r.alphas = vec![1.0, 2.0], "alpha");
        check(Kind::Lda, |r| r.held_out = 1.0, "held_out");
        check(Kind::Lda, |r| r.shrinkage = Some(2.0), "shrinkage");
        check(Kind::Logistic, |r| r.alphas = vec![f64::NAN], "alpha");
        check(Kind::TwoLayer, |r| r.hidden = Some(100_000_000), "hidden");
        check(Kind::TwoLayer, |r| r.epochs = Some(0), "epochs");
        check(Kind::Attention, |r| r.batch = Some(0), "batch");
        check(
            Kind::Attention,
            |r| r.weight_decay = Some(-1.0),
            "weight_decay",
        );
        check(
            Kind::Attention,
            |r| r.attention_heads = Some(20),
            "attention_heads",
        );
        check(
            Kind::Attention,
            |r| r.token_dropout = Some(1.0),
            "token_dropout",
        );
        assert!(Recipe::new(Kind::TwoLayer, Gather::Last, 0).check().is_ok());
    }

    #[test]
    fn gathers_that_make_no_sense_are_refused() {
        let logistic = Recipe::new(Kind::Logistic, Gather::Attention, 0);
        let error = logistic
            .check_gathers(&[Gather::Attention], Positions::PromptContent)
            .expect_err("refused");
        assert!(error.to_string().starts_with("gather:"), "{error}");
        let last = |gathers: &[Gather]| logistic.check_gathers(gathers, Positions::LastPromptToken);
        assert!(last(&[Gather::Mean]).is_err());
        assert!(last(&[]).is_err());
        assert!(last(&[Gather::Last]).is_ok());
    }

    #[test]
    fn the_settings_that_counted_are_told() {
        let text = Recipe::new(Kind::TwoLayer, Gather::Last, 0).described();
        assert_eq!(
            text,
            "class weight balanced, hidden 64, epochs 20, batch 8, learning rate 0.0001, \
             weight decay 0.01"
        );
    }
}
