//! Fits a probe: collects states through the engine, fits, calibrates and measures on groups that
//! the fit never saw, and writes down how it was done.
//! Knows which mathematics to call; the mathematics is in `inwit-probes`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use inwit_probes::fit::{
    AttentionData, AttentionParams, FitData, LogisticParams, fit_attention,
    fit_difference_of_means, fit_logistic, operating_point, platt,
};
use inwit_probes::manifest::{Canary, Kind, Manifest, Metric, ModelIdentity, NormKind, Positions};
use inwit_probes::metrics::{auroc, bootstrap_by_group, tpr_at_fpr};
use inwit_probes::{
    Calibration, Gather, GatherState, Head, InputNorm, OperatingPoint, Probe, Site, TokenOutput,
};
use ndarray::Array2;

use super::bench::{Bench, Tick};
use super::examples::{Example, Labelled, split};
use super::seeded::Seeded;
use crate::error::{Error, Result};

/// The share of the groups on which the probe is calibrated and measured.
const HELD_OUT: f64 = 0.2;
/// Tokens of one request that a per-token fit learns from: long requests do not outvote short ones.
const TOKENS_PER_REQUEST: usize = 8;
/// Requests whose false-positive rates get a threshold.
const RATES: [f64; 3] = [0.001, 0.01, 0.05];
/// Answer lengths for which a probe of every generated token gets thresholds.
const ANSWER_LENGTHS: [u32; 3] = [64, 256, 1024];
const CANARIES_PER_SIGN: usize = 8;
const RESAMPLES: usize = 1000;

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
    /// Each gets its calibration; the first one shapes the fit.
    pub gathers: Vec<Gather>,
    pub kind: Kind,
    /// L2 penalties; with several, cross-validation chooses. Empty for the defaults.
    pub alphas: Vec<f64>,
    pub seed: u64,
    /// The command line, for the record.
    pub command: String,
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
    let (mut examples, mut forms) = (Vec::new(), Vec::new());
    train
        .visit(
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
    let trained_on = train.form(&forms)?;
    let (rest, held_out) = split(examples, options.seed, HELD_OUT);

    let mut work = Work::new(bench, options);
    let heads = work.heads(&rest)?;
    let mut manifest = Manifest::new(
        &options.name,
        options.kind,
        bench.d_model(),
        options.positions,
        identity(bench),
    );
    manifest.gathers = options.gathers.clone();
    manifest.trained_on = trained_on;
    manifest.record.data.push(train.record.clone());
    manifest.record.seed = options.seed;
    manifest.record.command = options.command.clone();
    let mut probe = Probe::new(manifest, heads, None).map_err(unfit)?;

    let scored = work.score_all(&probe, &held_out)?;
    let mut benign: Vec<Scored> = scored.iter().filter(|row| !row.positive).cloned().collect();
    let canaries = match &options.canaries {
        None => work.canaries(&probe, &held_out)?,
        Some(path) => {
            let mut examples = Vec::new();
            let rows = Labelled::read(path, options.positions)?;
            let keep = |example, _: &_| {
                examples.push(example);
                Ok(())
            };
            rows.visit(bench, &options.sites, options.positions, tick, keep)
                .await?;
            work.canaries(&probe, &examples)?
        }
    };
    let mut calibration_data = None;
    if let Some(path) = &options.calibration {
        let rows = Labelled::read(path, options.positions)?;
        if let Some(index) = rows.positives.iter().position(|positive| *positive) {
            let line = rows.rows[index].line;
            return Err(super::rows::at(
                &rows.file,
                line,
                "must be benign: it sets thresholds",
            ));
        }
        benign.clear();
        rows.visit(
            bench,
            &options.sites,
            options.positions,
            tick,
            |example, _| {
                benign.push(work.score(&probe, &example)?);
                Ok(())
            },
        )
        .await?;
        calibration_data = Some(rows.record);
    }

    let calibrations = options
        .gathers
        .iter()
        .map(|gather| work.calibrate(gather, &scored, &benign))
        .collect::<Result<Vec<_>>>()?;
    work.measure_counts(&rest, &scored, &benign);
    let std = standard_deviation(scored.iter().flat_map(|row| row.logits()));
    let (mut manifest, heads, prober) = {
        let parts = probe.into_parts();
        (parts.0, parts.1, parts.2)
    };
    manifest.record.data.extend(calibration_data);
    manifest.record.metrics = work.metrics;
    manifest.record.note = work.remarks.join(" ");
    manifest.calibrations = calibrations;
    manifest.calibration_logit_std = std;
    manifest.canaries = canaries;
    probe = Probe::new(manifest, heads, prober).map_err(unfit)?;
    Ok(Fitted {
        probe,
        remarks: work.remarks,
    })
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
    if !matches!(
        options.kind,
        Kind::Logistic | Kind::DifferenceOfMeans | Kind::Attention
    ) {
        return Err(Error::unsupported(
            "kind",
            "use logistic, difference_of_means or attention",
        ));
    }
    let attention = options.gathers.contains(&Gather::Attention);
    if attention != (options.kind == Kind::Attention) || (attention && options.gathers.len() > 1) {
        return Err(Error::invalid(
            "gather",
            "attention goes with --kind attention, and alone",
        ));
    }
    if options.gathers.is_empty() {
        return Err(Error::invalid("gather", "name at least one"));
    }
    if !options.positions.per_token()
        && options.gathers.iter().any(|gather| *gather != Gather::Last)
    {
        let message = format!(
            "at {} a probe reads one token; use --gather last",
            options.positions
        );
        return Err(Error::invalid("gather", message));
    }
    Ok(())
}

/// A measure of logits and labels.
type Statistic<'a> = &'a dyn Fn(&[f32], &[bool]) -> inwit_probes::Result<f64>;

/// One request as the fitted probe sees it.
#[derive(Clone, Debug)]
struct Scored {
    positive: bool,
    group: String,
    outputs: Vec<TokenOutput>,
}

impl Scored {
    /// The request's number: gathered over the first `tokens` tokens.
    fn gathered(&self, gather: &Gather, tokens: usize) -> f32 {
        self.running(gather, tokens)
            .last()
            .copied()
            .unwrap_or(f32::MIN)
    }

    /// The highest number that a rule would see while the tokens come.
    fn highest(&self, gather: &Gather, tokens: usize) -> f32 {
        self.running(gather, tokens)
            .into_iter()
            .fold(f32::MIN, f32::max)
    }

    fn running(&self, gather: &Gather, tokens: usize) -> Vec<f32> {
        let mut state = GatherState::new(gather);
        let mut values = Vec::new();
        for output in self.outputs.iter().take(tokens) {
            // Outputs were checked to be finite when they were made.
            if state.push(*output).is_ok() {
                values.push(state.value().unwrap_or(f32::MIN));
            }
        }
        values
    }

    fn logits(&self) -> impl Iterator<Item = f32> {
        self.outputs.iter().map(|output| output.logit)
    }
}

/// The fit under way: what is known so far, and what has to be said about it.
struct Work<'a> {
    options: &'a Options,
    d_model: usize,
    metrics: BTreeMap<String, Metric>,
    remarks: Vec<String>,
}

impl<'a> Work<'a> {
    fn new(bench: &Bench, options: &'a Options) -> Self {
        Self {
            options,
            d_model: bench.d_model(),
            metrics: BTreeMap::new(),
            remarks: Vec::new(),
        }
    }

    /// One head per site: fitted together, on the sites' states side by side.
    fn heads(&mut self, examples: &[Example]) -> Result<Vec<Head>> {
        let site = self.options.sites[0];
        let joint = match self.options.kind {
            Kind::Attention => {
                let params = AttentionParams {
                    seed: self.options.seed,
                    ..Default::default()
                };
                fit_attention(&self.requests(examples)?, site, &params)
                    .map_err(unfit)?
                    .head
            }
            Kind::DifferenceOfMeans => {
                fit_difference_of_means(&self.views(examples)?, site, NormKind::Standard)
                    .map_err(unfit)?
            }
            _ => {
                let mut params = LogisticParams {
                    seed: self.options.seed,
                    ..Default::default()
                };
                if !self.options.alphas.is_empty() {
                    params.alphas = self.options.alphas.clone();
                }
                let fit = fit_logistic(&self.views(examples)?, site, &params).map_err(unfit)?;
                self.metric("alpha", fit.alpha, None);
                if !fit.converged {
                    let length = fit.gradient;
                    self.remarks
                        .push(format!("The solver stopped at gradient {length:.1e}."));
                }
                fit.head
            }
        };
        Ok(part(&joint, &self.options.sites, self.d_model))
    }

    /// What a linear fit learns from: for gathers that are linear in the logits the gathered state
    /// itself, whose logit is the gathered logit, and single tokens for the others.
    fn views(&self, examples: &[Example]) -> Result<FitData> {
        let width = self.d_model * self.options.sites.len();
        let (mut x, mut y, mut group) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
            let states = self.side_by_side(example);
            let views = match self.options.gathers[0] {
                Gather::Mean => mean(&states, width),
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

    fn requests(&self, examples: &[Example]) -> Result<AttentionData> {
        let width = self.d_model * self.options.sites.len();
        let request = |example: &Example| {
            let states = self.side_by_side(example);
            Array2::from_shape_vec((states.len() / width, width), states).map_err(Error::internal)
        };
        Ok(AttentionData {
            x: examples.iter().map(request).collect::<Result<_>>()?,
            y: examples.iter().map(|example| example.positive).collect(),
            group: examples
                .iter()
                .map(|example| example.group.clone())
                .collect(),
        })
    }

    /// `[tokens, sites x d_model]`
    fn side_by_side(&self, example: &Example) -> Vec<f32> {
        let state = |token: usize| {
            let site = move |values: &'_ Vec<f32>| {
                values[token * self.d_model..(token + 1) * self.d_model].to_vec()
            };
            example
                .states
                .values
                .iter()
                .flat_map(site)
                .collect::<Vec<_>>()
        };
        (0..example.states.positions.len())
            .flat_map(state)
            .collect()
    }

    fn score_all(&self, probe: &Probe, examples: &[Example]) -> Result<Vec<Scored>> {
        examples
            .iter()
            .map(|example| self.score(probe, example))
            .collect()
    }

    /// By the plain definition, so that an artefact's numbers do not hang on a kernel.
    fn score(&self, probe: &Probe, example: &Example) -> Result<Scored> {
        let output = |token: usize| {
            let hidden = |site: Site| {
                let index = self.options.sites.iter().position(|own| *own == site);
                let values = &example.states.values[index.expect("a head of a site not asked for")];
                &values[token * self.d_model..(token + 1) * self.d_model]
            };
            probe.score_row(hidden).map_err(Error::internal)
        };
        Ok(Scored {
            positive: example.positive,
            group: example.group.clone(),
            outputs: (0..example.states.positions.len())
                .map(output)
                .collect::<Result<_>>()?,
        })
    }

    /// Probabilities from the held-out rows, thresholds from benign ones.
    fn calibrate(
        &mut self,
        gather: &Gather,
        held_out: &[Scored],
        benign: &[Scored],
    ) -> Result<Calibration> {
        let logits: Vec<f32> = held_out
            .iter()
            .map(|row| row.gathered(gather, usize::MAX))
            .collect();
        let y: Vec<bool> = held_out.iter().map(|row| row.positive).collect();
        let group: Vec<String> = held_out.iter().map(|row| row.group.clone()).collect();
        self.measure(gather, &logits, &y, &group)?;
        let kind = platt(&logits, &y).map_err(unfit)?;
        let mut calibration = Calibration::new(*gather, kind, &logits, &y).map_err(unfit)?;
        let reads_answers = self.options.positions == Positions::EveryGenerated;
        let lengths: Vec<Option<u32>> = match reads_answers {
            true => ANSWER_LENGTHS.map(Some).to_vec(),
            false => vec![None],
        };
        for length in lengths {
            let of_request = |row: &Scored| match length {
                // A rule may fire at any token of the answer.
                Some(tokens) => row.highest(gather, tokens as usize),
                None => row.gathered(gather, usize::MAX),
            };
            let benign: Vec<f32> = benign.iter().map(of_request).collect();
            calibration
                .thresholds
                .extend(self.thresholds(&benign, length));
        }
        Ok(calibration)
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

    fn measure(
        &mut self,
        gather: &Gather,
        logits: &[f32],
        y: &[bool],
        group: &[String],
    ) -> Result<()> {
        let choose = |rows: &[usize]| -> (Vec<f32>, Vec<bool>) {
            rows.iter().map(|row| (logits[*row], y[*row])).unzip()
        };
        let interval = |statistic: Statistic<'_>| {
            bootstrap_by_group(group, RESAMPLES, self.options.seed, |rows| {
                let (logits, y) = choose(rows);
                statistic(&logits, &y)
            })
            .ok()
        };
        let ranked = (auroc(logits, y).map_err(unfit)?, interval(&auroc));
        self.metric(
            &format!("held_out_auroc_{}", plain(gather)),
            ranked.0,
            ranked.1,
        );
        // With fewer than a hundred, one in a hundred is none.
        if y.iter().filter(|positive| !**positive).count() < 100 {
            return Ok(());
        }
        let at_one_percent = |logits: &[f32], y: &[bool]| tpr_at_fpr(logits, y, 0.01);
        let caught = (
            at_one_percent(logits, y).map_err(unfit)?,
            interval(&at_one_percent),
        );
        self.metric(
            &format!("held_out_tpr_at_fpr_0.01_{}", plain(gather)),
            caught.0,
            caught.1,
        );
        Ok(())
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
        Seeded::new(self.options.seed).shuffle(&mut order);
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
        let scored = self.score(probe, example)?;
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
        self.metrics
            .insert(name.to_owned(), Metric { value, interval });
    }
}

/// `ema{0.2}` as part of a metric's name.
fn plain(gather: &Gather) -> String {
    gather
        .to_string()
        .replace(['{', ',', ' '], "_")
        .replace('}', "")
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
    use super::*;
    use crate::lab::states::RowStates;

    const SITES: [&str; 2] = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"];
    const D_MODEL: usize = 3;

    fn options(kind: Kind, gather: Gather) -> Options {
        Options {
            name: "prompt_harm".into(),
            train: "train.jsonl".into(),
            calibration: None,
            canaries: None,
            sites: SITES.map(|site| site.parse().expect("a site")).to_vec(),
            positions: Positions::PromptContent,
            gathers: vec![gather],
            kind,
            alphas: vec![1e-3],
            seed: 1,
            command: "inwit probe fit".into(),
        }
    }

    fn work(options: &Options) -> Work<'_> {
        Work {
            options,
            d_model: D_MODEL,
            metrics: BTreeMap::new(),
            remarks: Vec::new(),
        }
    }

    /// Positives differ at the second site's last dimension.
    fn examples(count: usize) -> Vec<Example> {
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

    fn probe(options: &Options, work: &mut Work<'_>, examples: &[Example]) -> Probe {
        let identity = ModelIdentity {
            name: "m".into(),
            architecture_id: "a".into(),
            weights_id: "w".into(),
            weight_format: "f32".into(),
        };
        let heads = work.heads(examples).expect("fits");
        let mut manifest = Manifest::new(
            "prompt_harm",
            options.kind,
            D_MODEL,
            options.positions,
            identity,
        );
        manifest.gathers = options.gathers.clone();
        Probe::new(manifest, heads, None).expect("a probe")
    }

    fn check_separates(kind: Kind, gather: Gather) {
        let options = options(kind, gather);
        let mut work = work(&options);
        let (rest, held_out) = split(examples(200), 1, HELD_OUT);
        let probe = probe(&options, &mut work, &rest);
        assert_eq!(probe.heads().len(), 2);
        let scored = work.score_all(&probe, &held_out).expect("scores");
        let calibration = work
            .calibrate(&gather, &scored, &scored)
            .expect("calibrates");
        let auroc = work.metrics[&format!("held_out_auroc_{}", plain(&gather))];
        assert!(auroc.value > 0.95, "{kind:?}: {auroc:?}");
        assert!(calibration.probability(100.0) > calibration.probability(-100.0));
    }

    #[test]
    fn every_kind_and_gather_separates_what_is_apart() {
        check_separates(Kind::Logistic, Gather::Mean);
        check_separates(Kind::Logistic, Gather::Last);
        check_separates(Kind::Logistic, Gather::Max);
        check_separates(Kind::DifferenceOfMeans, Gather::Mean);
        check_separates(Kind::Attention, Gather::Attention);
    }

    #[test]
    fn a_head_in_parts_scores_like_the_whole() {
        let options = options(Kind::Logistic, Gather::Mean);
        let mut work = work(&options);
        let examples = examples(100);
        let probe = probe(&options, &mut work, &examples);
        // The logit of the mean state is the mean of the logits.
        let scored = work.score(&probe, &examples[0]).expect("scores");
        let view = mean(&work.side_by_side(&examples[0]), 2 * D_MODEL);
        let whole = probe
            .score_row(|site| match site == options.sites[0] {
                true => &view[..D_MODEL],
                false => &view[D_MODEL..],
            })
            .expect("scores");
        let gathered = scored.gathered(&Gather::Mean, usize::MAX);
        assert!(
            (whole.logit - gathered).abs() < 1e-4,
            "{} {gathered}",
            whole.logit
        );
    }

    #[test]
    fn too_few_benign_rows_are_remarked_not_hidden() {
        let options = options(Kind::Logistic, Gather::Mean);
        let mut work = work(&options);
        let benign: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let points = work.thresholds(&benign, None);
        assert_eq!(
            points.iter().map(|point| point.fpr).collect::<Vec<_>>(),
            [0.01, 0.05]
        );
        assert!(work.remarks[0].contains("0.001"), "{:?}", work.remarks);
    }

    #[test]
    fn canaries_are_of_both_signs_and_end_where_the_probe_reads() {
        let options = options(Kind::Logistic, Gather::Mean);
        let mut work = work(&options);
        let examples = examples(60);
        let probe = probe(&options, &mut work, &examples);
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
    fn tokens_are_spread_over_the_request() {
        let states: Vec<f32> = (0..20).map(|i| i as f32).collect();
        assert_eq!(spread(&states, 1, 4), [4.0, 9.0, 14.0, 19.0]);
        assert_eq!(spread(&states[..3], 1, 4), [0.0, 1.0, 2.0]);
    }

    #[test]
    fn a_rule_that_may_fire_at_any_token_is_judged_by_the_highest() {
        let scored = Scored {
            positive: false,
            group: "g".into(),
            outputs: [1.0, 5.0, 2.0].map(TokenOutput::logit).to_vec(),
        };
        assert_eq!(scored.gathered(&Gather::Last, usize::MAX), 2.0);
        assert_eq!(scored.highest(&Gather::Last, usize::MAX), 5.0);
        assert_eq!(scored.highest(&Gather::Last, 1), 1.0);
    }

    #[test]
    fn a_model_name_with_spaces_becomes_one_word() {
        assert_eq!(one_word("SmolLM2 135M Instruct"), "SmolLM2-135M-Instruct");
        assert_eq!(one_word(""), "unnamed");
    }

    #[test]
    fn gathers_that_make_no_sense_are_refused() {
        let error = check(&options(Kind::Logistic, Gather::Attention)).expect_err("refused");
        assert!(error.to_string().starts_with("gather:"), "{error}");
        let last = Options {
            positions: Positions::LastPromptToken,
            ..options(Kind::Logistic, Gather::Mean)
        };
        assert!(check(&last).is_err());
    }
}
