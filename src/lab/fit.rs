//! Fits a probe: collects states through the engine, fits, calibrates and measures on groups that
//! the fit never saw, and writes down how it was done.
//! Knows which mathematics to call; the mathematics is in `inwit-probes` and `learn.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use inwit_probes::fit::{isotonic, operating_point, platt};
use inwit_probes::manifest::{Canary, DataRecord, Manifest, Metric, ModelIdentity, Positions};
use inwit_probes::{Calibration, Gather, OperatingPoint, Probe, Site, TrainedOn};

use super::bench::{Bench, Tick};
use super::examples::{Example, Labelled, split};
use super::learn::{Learnt, Readings, Recipe, learn};
use super::scored::{Ranking, Scored};
use super::seeded::Seeded;
use crate::engine::request::PromptForm;
use crate::error::{Error, Result};

/// False-positive rates that get a threshold.
const RATES: [f64; 5] = [0.001, 0.002, 0.005, 0.01, 0.05];
/// Answer lengths for which a probe of every generated token gets thresholds.
pub const ANSWER_LENGTHS: [u32; 3] = [64, 256, 1024];
const CANARIES_PER_SIGN: usize = 8;

/// What to fit, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    pub name: String,
    pub train: PathBuf,
    /// Benign rows for the thresholds; unset takes the held-out benign ones.
    pub calibration: Option<PathBuf>,
    /// Labelled rows whose tokens go into the file as canaries; unset takes held-out ones.
    pub canaries: Option<PathBuf>,
    /// Several sites are read together.
    pub sites: Vec<Site>,
    pub positions: Positions,
    /// Each gets its calibration; the first one is the recipe's.
    pub gathers: Vec<Gather>,
    pub recipe: Recipe,
    pub curve: Curve,
    /// The command line, for the record.
    pub command: String,
}

/// How logits become probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Curve {
    /// A logistic curve (Platt 1999)
    #[default]
    Platt,
    /// A rising step curve: needs more rows, assumes less
    Isotonic,
}

/// A fitted probe and what could not be said about it.
#[derive(Debug)]
pub struct Fitted {
    pub probe: Probe,
    pub remarks: Vec<String>,
}

/// Fits, calibrates and measures a probe. Deterministic for one model, machine and seed.
pub async fn fit(bench: &Bench, options: &Options, tick: Tick<'_>) -> Result<Fitted> {
    check(options)?;
    bench.check_sites(&options.sites)?;
    let train = Labelled::read(&options.train, options.positions)?;
    let benign = |path: &PathBuf| Labelled::read_benign(path, options.positions);
    // Before the work, so that a row that is not benign is told at once.
    let calibration = options.calibration.as_ref().map(benign).transpose()?;
    let labelled = |path: &PathBuf| Labelled::read(path, options.positions);
    let canaries = options.canaries.as_ref().map(labelled).transpose()?;
    let (examples, forms) = collect(bench, &train, options, &mut *tick).await?;
    let trained_on = train.form(&forms)?;
    let (rest, held_out) = split(examples, options.recipe.seed, options.recipe.held_out);

    let mut work = Work::new(bench.d_model(), options);
    let (learnt, rest) = work.learn(rest).await?;
    let probe = work.probe(learnt, identity(bench), trained_on, &train.record)?;
    let scored = Scored::all(&probe, &work.readings(&held_out))?;
    let canaries = match canaries {
        None => work.canaries(&probe, &held_out)?,
        Some(rows) => {
            let (examples, _) = collect(bench, &rows, options, &mut *tick).await?;
            work.canaries(&probe, &examples)?
        }
    };
    let held_out_benign = || scored.iter().filter(|row| !row.positive).cloned().collect();
    let (benign, benign_data) = match calibration {
        None => (held_out_benign(), None),
        Some(rows) => {
            let benign = score_rows(bench, &probe, &rows, options.positions, tick).await?;
            (benign, Some(rows.record))
        }
    };

    let calibrations = options
        .gathers
        .iter()
        .map(|gather| work.calibrate(gather, &scored, &benign))
        .collect::<Result<Vec<_>>>()?;
    work.measure_counts(&rest, &scored, &benign);
    let (mut manifest, heads, prober) = probe.into_parts();
    manifest.record.data.extend(benign_data);
    manifest.record.metrics = work.metrics;
    manifest.record.note = work.remarks.join(" ");
    manifest.calibrations = calibrations;
    manifest.calibration_logit_std = standard_deviation(scored.iter().flat_map(Scored::logits));
    manifest.canaries = canaries;
    work.remarks.remove(0); // The settings, which whoever gave the command knows.
    Ok(Fitted {
        probe: Probe::new(manifest, heads, prober).map_err(unfit)?,
        remarks: work.remarks,
    })
}

/// The rows' states at the sites of the options, and what requests they are.
async fn collect(
    bench: &Bench,
    rows: &Labelled,
    options: &Options,
    tick: Tick<'_>,
) -> Result<(Vec<Example>, Vec<PromptForm>)> {
    let (mut examples, mut forms) = (Vec::new(), Vec::new());
    rows.visit(
        bench,
        &options.sites,
        options.positions,
        tick,
        |example, request| {
            examples.push(example);
            forms.push(request.prompt.form.clone());
            Ok(())
        },
    )
    .await?;
    Ok((examples, forms))
}

/// Computes where it holds up neither the engine's events nor Ctrl-C.
pub(super) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::internal("the fit ended early: a panic"))?
}

/// Scores rows and keeps no states.
pub(super) async fn score_rows(
    bench: &Bench,
    probe: &Probe,
    rows: &Labelled,
    positions: Positions,
    tick: Tick<'_>,
) -> Result<Vec<Scored>> {
    let sites: Vec<Site> = probe.heads().iter().map(|head| head.site).collect();
    let readings = Readings {
        sites: &sites,
        d_model: bench.d_model(),
        examples: &[],
    };
    let mut scored = Vec::new();
    rows.visit(bench, &sites, positions, tick, |example, _| {
        scored.push(Scored::of(probe, &readings, &example)?);
        Ok(())
    })
    .await?;
    Ok(scored)
}

/// The loaded model, as artefacts name it.
pub fn identity(bench: &Bench) -> ModelIdentity {
    let info = bench.engine.info();
    ModelIdentity {
        name: one_word(&info.name),
        architecture_id: info.identity.architecture_id.clone(),
        weights_id: info.identity.weights_id.clone(),
        weight_format: info.weight_format.to_string(),
    }
}

/// A model file may give itself any name; artefacts carry one of printable ASCII without spaces.
fn one_word(name: &str) -> String {
    let word: String = name
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { '-' })
        .take(128)
        .collect();
    if word.is_empty() {
        "unnamed".into()
    } else {
        word
    }
}

/// An error of the probe crate, as one of ours: its texts name field and remedy already.
pub fn unfit(error: inwit_probes::Error) -> Error {
    match error {
        inwit_probes::Error::Invalid { field, message } => Error::invalid(field, message),
        inwit_probes::Error::InFile { file, source } => Error::file(file, source),
        inwit_probes::Error::Io { file, message } => Error::file(file, message),
        error => Error::FailedPrecondition {
            subject: "probe".into(),
            message: error.to_string(),
        },
    }
}

fn check(options: &Options) -> Result<()> {
    inwit_probes::manifest::check_name("name", &options.name).map_err(unfit)?;
    options.recipe.check()?;
    options
        .recipe
        .check_gathers(&options.gathers, options.positions)
}

/// The fit under way: what is known so far, and what has to be said about it.
struct Work<'a> {
    options: &'a Options,
    d_model: usize,
    metrics: BTreeMap<String, Metric>,
    /// The settings first.
    remarks: Vec<String>,
}

impl<'a> Work<'a> {
    fn new(d_model: usize, options: &'a Options) -> Self {
        Self {
            options,
            d_model,
            metrics: BTreeMap::new(),
            remarks: vec![format!("Settings: {}.", options.recipe.described())],
        }
    }

    fn readings<'b>(&self, examples: &'b [Example]) -> Readings<'b>
    where
        'a: 'b,
    {
        Readings {
            sites: &self.options.sites,
            d_model: self.d_model,
            examples,
        }
    }

    /// Fits, and gives the examples back.
    async fn learn(&self, examples: Vec<Example>) -> Result<(Learnt, Vec<Example>)> {
        let (recipe, sites) = (self.options.recipe.clone(), self.options.sites.clone());
        let d_model = self.d_model;
        off_thread(move || {
            let readings = Readings {
                sites: &sites,
                d_model,
                examples: &examples,
            };
            let learnt = learn(&recipe, &sites, &readings)?;
            Ok((learnt, examples))
        })
        .await
    }

    /// The probe before it means anything: no calibration, no canaries.
    fn probe(
        &mut self,
        learnt: Learnt,
        model: ModelIdentity,
        trained_on: TrainedOn,
        data: &DataRecord,
    ) -> Result<Probe> {
        for (name, value) in learnt.metrics {
            self.metric(name, value, None);
        }
        self.remarks.extend(learnt.remarks);
        let (options, kind) = (self.options, self.options.recipe.kind);
        let mut manifest =
            Manifest::new(&options.name, kind, self.d_model, options.positions, model);
        manifest.gathers = options.gathers.clone();
        manifest.trained_on = trained_on;
        manifest.record.data.push(data.clone());
        manifest.record.seed = options.recipe.seed;
        manifest.record.command = options.command.clone();
        Probe::new(manifest, learnt.heads, learnt.prober).map_err(unfit)
    }

    /// Probabilities from the held-out rows, thresholds from benign ones.
    fn calibrate(
        &mut self,
        gather: &Gather,
        held_out: &[Scored],
        benign: &[Scored],
    ) -> Result<Calibration> {
        let ranking = Ranking::of(held_out, gather, self.options.recipe.seed)?;
        let name = plain(gather);
        self.insert(&format!("held_out_auroc_{name}"), ranking.auroc);
        if let Some(caught) = ranking.tpr_at_one_percent {
            self.insert(&format!("held_out_tpr_at_fpr_0.01_{name}"), caught);
        }
        let (logits, y) = self.with_values(gather, held_out);
        let kind = match self.options.curve {
            Curve::Platt => platt(&logits, &y),
            Curve::Isotonic => isotonic(&logits, &y),
        };
        let kind = kind.map_err(unfit)?;
        let mut calibration = Calibration::new(*gather, kind, &logits, &y).map_err(unfit)?;
        for length in answer_lengths(self.options.positions) {
            let of_request = |row: &Scored| row.for_threshold(gather, length);
            let benign: Vec<f32> = benign.iter().map(of_request).collect();
            calibration
                .thresholds
                .extend(self.thresholds(&benign, length));
        }
        Ok(calibration)
    }

    /// The gathered logits of the requests that have one, and their labels.
    fn with_values(&mut self, gather: &Gather, held_out: &[Scored]) -> (Vec<f32>, Vec<bool>) {
        let valued = held_out
            .iter()
            .filter_map(|row| Some((row.gathered(gather)?, row.positive)));
        let (logits, y): (Vec<f32>, Vec<bool>) = valued.unzip();
        let without = held_out.len() - y.len();
        if without > 0 {
            self.remarks.push(format!(
                "{without} of {} held-out rows are too short for {gather} and have no probability.",
                held_out.len()
            ));
        }
        (logits, y)
    }

    fn thresholds(&mut self, benign: &[f32], length: Option<u32>) -> Vec<OperatingPoint> {
        let mut points = Vec::new();
        for rate in RATES {
            match operating_point(benign, rate, length) {
                Ok(point) => points.push(point),
                Err(error) => {
                    let remark =
                        format!("No threshold for a false-positive rate of {rate}: {error}.");
                    if !self.remarks.contains(&remark) {
                        self.remarks.push(remark);
                    }
                }
            }
        }
        points
    }

    fn measure_counts(&mut self, rest: &[Example], held_out: &[Scored], benign: &[Scored]) {
        self.metric("rows_fitted", rest.len() as f64, None);
        self.metric("rows_held_out", held_out.len() as f64, None);
        self.metric("rows_for_thresholds", benign.len() as f64, None);
        if self.options.positions != Positions::EveryGenerated {
            return;
        }
        for length in ANSWER_LENGTHS {
            let long = benign
                .iter()
                .filter(|row| row.outputs.len() >= length as usize)
                .count();
            let share = long as f64 / benign.len().max(1) as f64;
            self.metric(&format!("benign_answers_of_{length}_tokens"), share, None);
        }
    }

    /// Token sequences of both signs whose logits another weight format must reproduce.
    fn canaries(&self, probe: &Probe, examples: &[Example]) -> Result<Vec<Canary>> {
        let mut order: Vec<usize> = (0..examples.len()).collect();
        Seeded::new(self.options.recipe.seed).shuffle(&mut order);
        let mut canaries = Vec::new();
        for positive in [true, false] {
            let of_sign = order.iter().map(|index| &examples[*index]);
            let chosen: Vec<_> = of_sign
                .filter(|example| example.positive == positive)
                .take(CANARIES_PER_SIGN)
                .collect();
            if chosen.len() < CANARIES_PER_SIGN {
                return Err(Error::FailedPrecondition {
                    subject: "canaries".into(),
                    message: format!(
                        "{} rows of one sign are left, {CANARIES_PER_SIGN} are needed; \
                         give more rows, or others with --canary-data",
                        chosen.len()
                    ),
                });
            }
            for example in chosen {
                canaries.push(self.canary(probe, example)?);
            }
        }
        Ok(canaries)
    }

    /// Read at the last token that the probe reads.
    fn canary(&self, probe: &Probe, example: &Example) -> Result<Canary> {
        let scored = Scored::of(probe, &self.readings(&[]), example)?;
        let last = example.states.positions.len() - 1;
        let position = example.states.positions[last] as usize;
        Ok(Canary {
            tokens: example.tokens[..=position].to_vec(),
            position,
            logit: scored.outputs[last].logit,
            positive: example.positive,
        })
    }

    fn metric(&mut self, name: &str, value: f64, interval: Option<[f64; 2]>) {
        self.insert(name, Metric { value, interval });
    }

    fn insert(&mut self, name: &str, metric: Metric) {
        self.metrics.insert(name.to_owned(), metric);
    }
}

/// The answer lengths at which a probe at these positions has thresholds.
pub(super) fn answer_lengths(positions: Positions) -> Vec<Option<u32>> {
    match positions {
        Positions::EveryGenerated => ANSWER_LENGTHS.map(Some).to_vec(),
        _ => vec![None],
    }
}

/// `ema{0.2}` as part of a metric's name.
pub(super) fn plain(gather: &Gather) -> String {
    gather
        .to_string()
        .replace(['{', ',', ' '], "_")
        .replace('}', "")
}

fn standard_deviation(values: impl Iterator<Item = f32>) -> f32 {
    let values: Vec<f64> = values.map(f64::from).collect();
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let square = values
        .iter()
        .map(|value| (value - mean).powi(2))
        .sum::<f64>()
        / count;
    square.sqrt() as f32
}

#[cfg(test)]
mod tests {
    use inwit_probes::{CalibrationKind, Kind};

    use super::*;
    use crate::lab::learn::tests as tiny;

    fn options(kind: Kind, gather: Gather) -> Options {
        Options {
            name: "prompt_harm".into(),
            train: "train.jsonl".into(),
            calibration: None,
            canaries: None,
            sites: tiny::sites(),
            positions: Positions::PromptContent,
            gathers: vec![gather],
            recipe: tiny::recipe(kind, gather),
            curve: Curve::Platt,
            command: "inwit probe fit".into(),
        }
    }

    fn probe(work: &Work<'_>, examples: &[Example]) -> Probe {
        let recipe = &work.options.recipe;
        let learnt = learn(recipe, &work.options.sites, &work.readings(examples)).expect("fits");
        tiny::probe(recipe, learnt)
    }

    fn check_calibrates(kind: Kind, gather: Gather, curve: Curve) -> Vec<String> {
        let options = Options {
            curve,
            ..options(kind, gather)
        };
        let mut work = Work::new(tiny::D_MODEL, &options);
        let (rest, held_out) = split(tiny::examples(240), 1, 0.2);
        let probe = probe(&work, &rest);
        let scored = Scored::all(&probe, &work.readings(&held_out)).expect("scores");
        let calibration = work
            .calibrate(&gather, &scored, &scored)
            .expect("calibrates");
        let auroc = work.metrics[&format!("held_out_auroc_{}", plain(&gather))];
        // Under k_of_n a third of these requests has no number and ranks lowest.
        let least = if matches!(gather, Gather::KOfN { .. }) {
            0.6
        } else {
            0.9
        };
        assert!(auroc.value > least, "{kind:?}: {auroc:?}");
        assert!(calibration.probability(100.0) > calibration.probability(-100.0));
        let isotonic = matches!(calibration.kind, CalibrationKind::Isotonic { .. });
        assert_eq!(isotonic, curve == Curve::Isotonic);
        work.remarks
    }

    #[test]
    fn every_kind_is_calibrated_on_rows_that_it_never_saw() {
        check_calibrates(Kind::Logistic, Gather::Mean, Curve::Platt);
        check_calibrates(Kind::Lda, Gather::Last, Curve::Platt);
        check_calibrates(
            Kind::DifferenceOfMeans,
            Gather::CumulativeLogOdds,
            Curve::Isotonic,
        );
        check_calibrates(Kind::TwoLayer, Gather::Max, Curve::Platt);
        check_calibrates(Kind::Attention, Gather::Attention, Curve::Isotonic);
    }

    #[test]
    fn requests_too_short_for_their_gather_are_left_out_of_the_curve_and_told() {
        // The tiny requests have two to four tokens.
        let gather = Gather::KOfN { k: 3, n: 4 };
        let remarks = check_calibrates(Kind::Logistic, gather, Curve::Platt);
        assert!(remarks[1].contains("too short for k_of_n"), "{remarks:?}");
    }

    #[test]
    fn too_few_benign_rows_are_remarked_not_hidden() {
        let options = options(Kind::Logistic, Gather::Mean);
        let mut work = Work::new(tiny::D_MODEL, &options);
        let benign: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let points = work.thresholds(&benign, None);
        assert_eq!(
            points.iter().map(|point| point.fpr).collect::<Vec<_>>(),
            [0.01, 0.05]
        );
        assert!(work.remarks[1].contains("0.001"), "{:?}", work.remarks);
    }

    #[test]
    fn canaries_are_of_both_signs_and_end_where_the_probe_reads() {
        let options = options(Kind::Logistic, Gather::Mean);
        let work = Work::new(tiny::D_MODEL, &options);
        let examples = tiny::examples(60);
        let probe = probe(&work, &examples);
        let canaries = work.canaries(&probe, &examples).expect("canaries");
        assert_eq!(canaries.len(), 2 * CANARIES_PER_SIGN);
        assert_eq!(
            canaries.iter().filter(|canary| canary.positive).count(),
            CANARIES_PER_SIGN
        );
        assert!(
            canaries
                .iter()
                .all(|canary| canary.position + 1 == canary.tokens.len())
        );
        assert!(work.canaries(&probe, &examples[..10]).is_err());
    }

    #[test]
    fn a_model_name_with_spaces_becomes_one_word() {
        assert_eq!(one_word("SmolLM2 135M Instruct"), "SmolLM2-135M-Instruct");
        assert_eq!(one_word(""), "unnamed");
    }

    #[test]
    fn what_cannot_be_fitted_is_refused_before_any_work() {
        assert!(check(&options(Kind::Logistic, Gather::Attention)).is_err());
        let mut unnamed = options(Kind::Logistic, Gather::Mean);
        unnamed.name = "No Name".into();
        assert!(check(&unnamed).is_err());
        let mut odd = options(Kind::Logistic, Gather::Mean);
        odd.recipe.hidden = Some(3);
        assert!(check(&odd).is_err());
    }
}
