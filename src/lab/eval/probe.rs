//! The evaluation of a probe on labelled sets, beside its baselines.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use inwit_probes::metrics::{auroc, expected_calibration_error, tpr_at_fpr};
use inwit_probes::{Calibration, Gather, GatherChoice, OperatingPoint, Probe, Verification};
use rayon::prelude::*;

use super::baseline::{BaselineScores, Baselines};
use super::claim::{Claim, ClaimRow};
use super::layers::Sweep;
use super::ledger::{Entry, Ledger};
use super::logistic::sigmoid;
use super::measure::{BINS, RATES, Rate, Sample, histogram, reliability, roc};
use super::reading::{ReadSet, read, sites};
use super::recipe::Recipe;
use super::report::{
    BaselineFacts, CategoryRow, Configuration, Detection, PointRow, ProbeFacts, ProbeReport,
    ScorerReport, SetReport, percent,
};
use super::set::EvalSet;
use crate::error::{Error, Result};
use crate::lab::bench::{Bench, Tick};
use crate::lab::fit::{off_thread, unfit};
use crate::lab::learn::name_of;
use crate::lab::scored::Scored;
use crate::registry::{Canaries, Standing};

/// What to evaluate, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// Unset: the first that the probe is calibrated for.
    pub gather: Option<GatherChoice>,
    pub data: Vec<PathBuf>,
    /// What baselines learn from; unset: no baselines.
    pub train: Option<PathBuf>,
    /// Of the bootstrap.
    pub seed: u64,
    /// Of what is fitted with a seed.
    pub seeds: Vec<u64>,
    pub sweep: Option<Sweep>,
    /// For the record.
    pub command: String,
    pub commit: Option<String>,
}

/// A probe to be evaluated, and how it stands to the loaded weights.
#[derive(Clone, Debug)]
pub struct Subject {
    pub probe: Probe,
    pub standing: String,
    /// The same probe fitted with other seeds, told beside it as their mean and range.
    pub refits: Vec<Probe>,
}

impl Subject {
    /// Each file must hold a probe that reads what this one reads, and each another one.
    pub fn with_refits(mut self, bench: &Bench, files: &[PathBuf]) -> Result<Self> {
        for file in files {
            let refit = from_file(bench, file)?.probe;
            let (of, own) = (refit.manifest(), self.probe.manifest());
            let told = |message: String| Error::file(file.display(), message);
            if (of.kind, of.positions) != (own.kind, own.positions)
                || sites(&refit) != sites(&self.probe)
                || of.gathers != own.gathers
            {
                let name = self.probe.name();
                return Err(told(format!(
                    "--refit needs {name} fitted with another seed; this differs in kind, sites, \
                     positions or gathers"
                )));
            }
            let same = |other: &Probe| other.content_hash() == refit.content_hash();
            if same(&self.probe) || self.refits.iter().any(same) {
                return Err(told("--refit names the same probe twice".into()));
            }
            self.refits.push(refit);
        }
        Ok(self)
    }
}

const HISTOGRAM_BINS: usize = 30;

/// A probe of the loaded library by its name, or one from a file.
pub fn find(bench: &Bench, named: &str) -> Result<Subject> {
    let path = Path::new(named);
    if path.is_file() {
        return from_file(bench, path);
    }
    let Some(loaded) = bench.snapshot.probe(named) else {
        let names: Vec<&str> = bench.snapshot.probes.iter().map(|p| &*p.name).collect();
        return Err(Error::NotFound {
            field: "probe".into(),
            kind: "probe",
            name: named.chars().take(80).collect(),
            remedy: match names.is_empty() {
                true => "the library has none for this model; name a file".into(),
                false => format!("name a file, or one of {}", names.join(", ")),
            },
        });
    };
    let standing = match &loaded.standing {
        Standing::Native => "native".to_owned(),
        Standing::Unverified { canaries } => match canaries {
            Canaries::NotRun => "other weights, canaries not run".to_owned(),
            Canaries::Passed => "other weights, canaries passed".to_owned(),
            Canaries::Failed(why) => format!("other weights, canaries failed: {why}"),
        },
    };
    Ok(Subject {
        probe: loaded.probe.clone(),
        standing,
        refits: Vec::new(),
    })
}

fn from_file(bench: &Bench, path: &Path) -> Result<Subject> {
    let probe = Probe::load(path).map_err(unfit)?;
    let info = bench.engine.info();
    let told = |error| Error::file(path.display(), error);
    probe
        .check_model(info.config.d_model, info.config.n_layers)
        .map_err(told)?;
    let verification = probe
        .identity_against(&info.identity.architecture_id, &info.identity.weights_id)
        .map_err(told)?;
    Ok(Subject {
        probe,
        standing: match verification {
            Verification::Native => "native".into(),
            Verification::Unverified => "other weights, canaries not run".into(),
        },
        refits: Vec::new(),
    })
}

/// Evaluates the probe on every set, and appends the results to the log where there is one.
pub async fn evaluate(
    bench: &Bench,
    subject: &Subject,
    options: &Options,
    mut ledger: Option<Ledger>,
    tick: Tick<'_>,
) -> Result<ProbeReport> {
    let probe = &subject.probe;
    let positions = probe.manifest().positions;
    let gather = gather(probe, options.gather.as_ref())?;
    // Every file is read before any work, so that a mistake in the last one costs nothing.
    let sets: Vec<EvalSet> = options
        .data
        .iter()
        .map(|path| EvalSet::read(path, positions))
        .collect::<Result<_>>()?;
    let train = options
        .train
        .as_deref()
        .map(|path| EvalSet::read(path, positions))
        .transpose()?;
    for set in &sets {
        train
            .iter()
            .try_for_each(|train| set.check_same_labels(train))?;
    }

    let baselines = match &train {
        None => None,
        Some(train) => {
            Some(Baselines::fit(bench, train, positions, &options.seeds, &mut *tick).await?)
        }
    };
    let configuration = configuration(bench, subject, &gather, &sets, train.as_ref(), options);
    let known: HashSet<String> = train.iter().flat_map(|t| t.texts(positions)).collect();
    let known: Arc<HashSet<String>> = Arc::new(known.iter().map(|text| plain(text)).collect());
    let mut reports = Vec::with_capacity(sets.len());
    for set in sets {
        let readings = read(bench, probe, &subject.refits, &set, &mut *tick).await?;
        let scored = match &baselines {
            None => Vec::new(),
            Some(baselines) => baselines.score(bench, &set, &mut *tick).await?,
        };
        let evaluation = Evaluation {
            probe: probe.clone(),
            refits: subject.refits.clone(),
            gather,
            set,
            known: known.clone(),
            seed: options.seed,
        };
        reports.push(off_thread(move || evaluation.report(&readings, &scored)).await?);
    }
    let mut report = ProbeReport {
        configuration,
        probe: facts(subject, &gather),
        baselines: baseline_facts(train.as_ref(), baselines.as_ref()),
        sets: reports,
        sweep: options.sweep.clone(),
    };
    if let Some(ledger) = &mut ledger {
        log(ledger, &mut report)?;
    }
    Ok(report)
}

fn gather(probe: &Probe, choice: Option<&GatherChoice>) -> Result<Gather> {
    let manifest = probe.manifest();
    match choice {
        Some(choice) => manifest.gather(choice).map_err(unfit),
        None => {
            let calibrated = manifest.calibrations.first().map(|c| c.gather);
            Ok(calibrated.unwrap_or(manifest.gathers[0]))
        }
    }
}

fn log(ledger: &mut Ledger, report: &mut ProbeReport) -> Result<()> {
    let entry = |set: &SetReport| Entry {
        commit: report.configuration.commit.clone(),
        set: set.data.name.clone(),
        set_sha256: set.data.sha256.clone(),
        what: format!("probe {} ({})", report.probe.name, report.probe.gather),
        hash: report.probe.content_hash.clone(),
        result: set.line(),
    };
    let entries: Vec<Entry> = report.sets.iter().map(entry).collect();
    ledger.append(&entries)?;
    for set in &mut report.sets {
        set.runs_logged = Some(ledger.runs_on(&set.data.sha256));
    }
    Ok(())
}

/// One set under evaluation.
struct Evaluation {
    probe: Probe,
    refits: Vec<Probe>,
    gather: Gather,
    set: EvalSet,
    /// Texts of the baselines' training set.
    known: Arc<HashSet<String>>,
    seed: u64,
}

impl Evaluation {
    fn report(&self, readings: &ReadSet, baselines: &[BaselineScores]) -> Result<SetReport> {
        let sample = self.sample();
        let mut scorers = vec![self.probe_report(readings)?];
        for scored in baselines {
            scorers.push(self.baseline_report(scored)?);
        }
        let (positives, negatives) = (sample.count(true), sample.count(false));
        Ok(SetReport {
            data: self.set.labelled.record.clone(),
            positive: self.set.labels.positive(),
            negative: self.set.labels.negative(),
            positives,
            negatives,
            prevalence: positives as f64 / (positives + negatives) as f64,
            groups: self.set.groups.iter().collect::<HashSet<_>>().len(),
            out_of_domain: readings.out_of_domain,
            runs_logged: None,
            remarks: self.remarks(),
            claims: claims(&scorers),
            refits: self.refit_report(readings),
            categories: self.categories(readings, scorers[0].one_percent())?,
            scorers,
        })
    }

    fn sample(&self) -> Sample<'_> {
        Sample {
            y: self.set.positives(),
            groups: &self.set.groups,
            seed: self.seed,
        }
    }

    fn calibration(&self) -> Option<&Calibration> {
        self.probe.manifest().calibration(&self.gather).ok()
    }

    fn probe_report(&self, readings: &ReadSet) -> Result<ScorerReport> {
        let logits: Vec<f32> = readings
            .rows
            .iter()
            .map(|row| row.ranked(&self.gather))
            .collect();
        let probabilities = self.calibration().map(|c| vec![calibrated(c, &logits)]);
        let points = self.calibration().map_or(&[][..], |c| &c.thresholds[..]);
        let points = points.iter().map(|point| self.point(point, readings));
        let points = points.collect::<Result<_>>()?;
        let name = self.probe.name().to_owned();
        Ok(self.scorer(name, &[logits], probabilities.as_deref(), points))
    }

    /// The refits as runs of one scorer; none without any.
    fn refit_report(&self, readings: &ReadSet) -> Option<ScorerReport> {
        let ranked = |rows: &Vec<Scored>| -> Vec<f32> {
            rows.iter().map(|row| row.ranked(&self.gather)).collect()
        };
        let runs: Vec<Vec<f32>> = readings.refits.iter().map(ranked).collect();
        let probabilities = self.refits.iter().zip(&runs).map(|(refit, run)| {
            let calibration = refit.manifest().calibration(&self.gather).ok()?;
            Some(calibrated(calibration, run))
        });
        let probabilities: Option<Vec<_>> = probabilities.collect();
        let name = format!("{}, {} other fits", self.probe.name(), runs.len());
        (!runs.is_empty()).then(|| self.scorer(name, &runs, probabilities.as_deref(), Vec::new()))
    }

    fn point(&self, point: &OperatingPoint, readings: &ReadSet) -> Result<PointRow> {
        let compared = |row: &Scored| row.for_threshold(&self.gather, point.answer_tokens);
        let runs = [readings.rows.iter().map(compared).collect::<Vec<f32>>()];
        let length = point.answer_tokens;
        let length = length.map_or(String::new(), |tokens| format!(", {tokens} tokens"));
        self.point_row(
            &runs,
            format!("stored for {} FPR{length}", percent(point.fpr)),
            point.threshold_logit,
        )
        .map(|row| PointRow {
            fpr_asked: Some(point.fpr),
            answer_tokens: point.answer_tokens,
            ..row
        })
    }

    fn baseline_report(&self, scored: &BaselineScores) -> Result<ScorerReport> {
        let probability = |run: &Vec<f32>| -> Vec<f32> {
            run.iter().map(|l| sigmoid(f64::from(*l)) as f32).collect()
        };
        let probabilities: Vec<Vec<f32>> = scored.runs.iter().map(probability).collect();
        let half = self.point_row(&scored.runs, "probability 0.5".into(), 0.0)?;
        let name = scored.name.to_owned();
        Ok(self.scorer(name, &scored.runs, Some(&probabilities), vec![half]))
    }

    fn point_row(&self, runs: &[Vec<f32>], name: String, threshold: f32) -> Result<PointRow> {
        let sample = self.sample();
        Ok(PointRow {
            name,
            fpr_asked: None,
            answer_tokens: None,
            threshold_logit: threshold,
            recall: sample.above(runs, threshold, true)?,
            fpr: sample.above(runs, threshold, false)?,
        })
    }

    fn scorer(
        &self,
        name: String,
        runs: &[Vec<f32>],
        probabilities: Option<&[Vec<f32>]>,
        points: Vec<PointRow>,
    ) -> ScorerReport {
        let sample = self.sample();
        let detection = |fpr: f64| -> super::measure::Statistic {
            // Statistics are plain functions: one for each of the rates.
            match RATES.iter().position(|rate| *rate == fpr) {
                Some(0) => |scores, y| tpr_at_fpr(scores, y, RATES[0]),
                Some(1) => |scores, y| tpr_at_fpr(scores, y, RATES[1]),
                _ => |scores, y| tpr_at_fpr(scores, y, RATES[2]),
            }
        };
        let detections = RATES.par_iter().map(|fpr| Detection {
            fpr: *fpr,
            tpr: match sample.resolves(*fpr) {
                true => sample.measure(runs, detection(*fpr)),
                false => None,
            },
        });
        let calibration_error = |p: &[f32], y: &[bool]| expected_calibration_error(p, y, BINS);
        ScorerReport {
            name,
            auroc: sample.measure(runs, auroc),
            detection: detections.collect(),
            points,
            ece: probabilities.and_then(|p| sample.measure(p, calibration_error)),
            roc: roc(&runs[0], sample.y),
            histogram: histogram(&runs[0], sample.y, HISTOGRAM_BINS),
            reliability: match (probabilities, sample.count(true), sample.count(false)) {
                (None, ..) | (_, 0, _) | (_, _, 0) => Vec::new(),
                (Some(p), ..) => reliability(&p[0], sample.y),
            },
        }
    }

    fn categories(&self, readings: &ReadSet, point: Option<&PointRow>) -> Result<Vec<CategoryRow>> {
        let Some(point) = point else {
            return Ok(Vec::new());
        };
        // Positives first, then by name.
        let mut counts: BTreeMap<(bool, &str), (u64, u64)> = BTreeMap::new();
        let rows = self.set.labelled.rows.iter().zip(self.set.positives());
        for ((row, positive), reading) in rows.zip(&readings.rows) {
            let Some(category) = &row.category else {
                continue;
            };
            let (flagged, all) = counts.entry((!positive, category)).or_default();
            *flagged += u64::from(
                reading.for_threshold(&self.gather, point.answer_tokens) > point.threshold_logit,
            );
            *all += 1;
        }
        let row = |((negative, category), (flagged, all)): (&(bool, &str), &(u64, u64))| {
            let rate = Rate::new(*flagged, *all)?;
            Ok(CategoryRow {
                label: match negative {
                    true => self.set.labels.negative(),
                    false => self.set.labels.positive(),
                },
                category: (*category).to_owned(),
                flagged: rate.expect("a category without rows"),
            })
        };
        counts.iter().map(row).collect()
    }

    /// What a reader must know before believing the numbers.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        let own = &self.set.labelled.record.sha256;
        let record = &self.probe.manifest().record;
        if record.data.iter().any(|data| data.sha256 == *own) {
            remarks.push("The probe was fitted or calibrated on this very file.".into());
        }
        let texts = self.set.texts(self.probe.manifest().positions);
        let shared = texts
            .iter()
            .filter(|t| self.known.contains(&plain(t)))
            .count();
        if shared > 0 {
            remarks.push(format!(
                "{shared} of its texts are in the baselines' training set as well."
            ));
        }
        let sample = self.sample();
        match (sample.count(true), sample.count(false)) {
            (0, _) | (_, 0) => {
                remarks.push("It has one label only, so there are rates and no ranking.".into());
            }
            _ => {}
        }
        let groups: HashSet<&String> = self.set.groups.iter().collect();
        if groups.len() < self.set.groups.len() {
            remarks.push(
                "Rows share groups: bootstrap intervals draw whole groups, Clopper-Pearson \
                 intervals count rows and are too narrow by that much."
                    .into(),
            );
        }
        remarks
    }
}

fn calibrated(calibration: &Calibration, logits: &[f32]) -> Vec<f32> {
    let of_row = |logit: &f32| calibration.probability(*logit);
    logits.iter().map(of_row).collect()
}

/// Of a text's words alone, so that spacing and case hide no copy.
fn plain(text: &str) -> String {
    let words = text.split_whitespace().map(str::to_lowercase);
    words.collect::<Vec<_>>().join(" ")
}

/// What may be said of the first scorer against each other one.
fn claims(scorers: &[ScorerReport]) -> Vec<ClaimRow> {
    let Some((ours, others)) = scorers.split_first() else {
        return Vec::new();
    };
    let row = |number: String, against: &str, ours, theirs| match (ours, theirs) {
        (Some(ours), Some(theirs)) => Some(ClaimRow {
            number,
            against: against.to_owned(),
            claim: Claim::of(&ours, &theirs),
            ours,
            theirs,
        }),
        _ => None,
    };
    let mut rows = Vec::new();
    for other in others {
        rows.extend(row("AUROC".into(), &other.name, ours.auroc, other.auroc));
        for (own, their) in ours.detection.iter().zip(&other.detection) {
            let number = format!("TPR at {} FPR", percent(own.fpr));
            rows.extend(row(number, &other.name, own.tpr, their.tpr));
        }
    }
    rows
}

fn facts(subject: &Subject, gather: &Gather) -> ProbeFacts {
    let probe = &subject.probe;
    let manifest = probe.manifest();
    let heads = manifest.heads.iter();
    ProbeFacts {
        name: probe.name().to_owned(),
        content_hash: probe.content_hash().to_owned(),
        kind: name_of(manifest.kind).to_owned(),
        sites: heads.map(|head| head.site.to_string()).collect(),
        positions: manifest.positions.to_string(),
        gather: gather.to_string(),
        standing: subject.standing.clone(),
        prior: manifest.calibration(gather).ok().map(|c| c.prior),
        fitted_on: manifest.record.data.clone(),
    }
}

fn baseline_facts(train: Option<&EvalSet>, baselines: Option<&Baselines>) -> Option<BaselineFacts> {
    let (train, baselines) = (train?, baselines?);
    Some(BaselineFacts {
        trained_on: train.labelled.record.clone(),
        terms: baselines.bag.terms(),
        pairs: baselines.bag.has_pairs(),
        penalty: baselines.bag.penalty,
        recipe_site: Recipe::SITE.to_string(),
        recipe_positions: baselines.recipe.positions.to_string(),
        recipe_seeds: baselines.recipe.seeds(),
    })
}

fn configuration(
    bench: &Bench,
    subject: &Subject,
    gather: &Gather,
    sets: &[EvalSet],
    train: Option<&EvalSet>,
    options: &Options,
) -> Configuration {
    let mut configuration = Configuration::of(
        bench,
        options.command.clone(),
        options.commit.clone(),
        options.seed,
    );
    configuration.seeds = options.seeds.clone();
    let gather = gather.to_string();
    let mut parts = vec![subject.probe.content_hash(), &gather];
    let data = train.into_iter().chain(sets);
    parts.extend(data.map(|set| set.labelled.record.sha256.as_str()));
    parts.extend(subject.refits.iter().map(Probe::content_hash));
    configuration.sealed(&parts)
}

#[cfg(test)]
mod tests {
    use super::super::measure::Measured;
    use super::*;

    fn scorer(name: &str, auroc: [f64; 3]) -> ScorerReport {
        ScorerReport {
            name: name.into(),
            auroc: Some(Measured {
                value: auroc[1],
                interval: Some([auroc[0], auroc[2]]),
                seeds: None,
            }),
            detection: Vec::new(),
            points: Vec::new(),
            ece: None,
            roc: Vec::new(),
            histogram: histogram(&[], &[], 1),
            reliability: Vec::new(),
        }
    }

    #[test]
    fn the_probe_is_compared_with_each_baseline() {
        let claims = claims(&[
            scorer("probe", [0.8, 0.85, 0.9]),
            scorer("words", [0.6, 0.7, 0.79]),
            scorer("length", [0.7, 0.8, 0.82]),
        ]);
        let found: Vec<_> = claims
            .iter()
            .map(|c| (c.against.as_str(), c.claim))
            .collect();
        assert_eq!(found, [("words", Claim::Beats), ("length", Claim::NoClaim)]);
        assert!(super::claims(&[]).is_empty());
    }

    #[test]
    fn spacing_and_case_hide_no_copy() {
        assert_eq!(
            plain("  How do\nMagnets work?"),
            plain("how do magnets work?")
        );
    }
}
