//! `probe threshold`: sets a probe's threshold at a false-positive rate, on benign requests.
//! Knows probes and rows; where the probe is kept is the command's.

use std::path::PathBuf;

use inwit_probes::fit::operating_point;
use inwit_probes::manifest::{Metric, Verification};
use inwit_probes::{Gather, OperatingPoint, Positions, Probe};

use super::bench::{Bench, Tick};
use super::examples::Labelled;
use super::fit::{answer_lengths, plain, score_rows, unfit};
use super::scored::Scored;
use crate::error::{Error, Result};

/// Which threshold, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// False positives per request, above 0 and below 1.
    pub target_fpr: f64,
    /// Benign rows that the probe was not fitted on.
    pub data: PathBuf,
    /// Unset: the first that the probe is calibrated for.
    pub gather: Option<Gather>,
    /// For a probe of every generated token; empty for the usual lengths.
    pub answer_tokens: Vec<u32>,
    /// The command line, for the record.
    pub command: String,
}

/// The probe with its thresholds.
#[derive(Debug)]
pub struct Calibrated {
    pub probe: Probe,
    pub gather: Gather,
    pub points: Vec<OperatingPoint>,
    pub remarks: Vec<String>,
}

/// Scores the benign rows and sets, for each answer length, the threshold that a fresh benign
/// request exceeds with a chance of at most the target.
pub async fn calibrate(
    bench: &Bench,
    probe: Probe,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Calibrated> {
    let positions = probe.manifest().positions;
    let gather = check(&probe, options)?;
    let info = bench.engine.info();
    let identity = &info.identity;
    let standing = probe.identity_against(&identity.architecture_id, &identity.weights_id);
    if standing.map_err(unfit)? == Verification::Unverified {
        return Err(Error::FailedPrecondition {
            subject: format!("probe `{}`", probe.name()),
            message: format!(
                "was fitted on other weights ({}); its thresholds are measured on those: load \
                 them with --model",
                probe.manifest().model.weights_id
            ),
        });
    }
    let rows = Labelled::read_benign(&options.data, positions)?;
    let benign = score_rows(bench, &probe, &rows, positions, tick).await?;
    let (points, remarks) = points(&benign, &gather, positions, options)?;
    let probe = with_points(probe, &gather, &points, rows.record, options)?;
    Ok(Calibrated {
        probe,
        gather,
        points,
        remarks,
    })
}

/// What can be judged without the model.
pub fn check(probe: &Probe, options: &Options) -> Result<Gather> {
    if !(options.target_fpr > 0.0 && options.target_fpr < 1.0) {
        return Err(Error::invalid(
            "target_fpr",
            "must lie strictly between 0 and 1",
        ));
    }
    let manifest = probe.manifest();
    if !options.answer_tokens.is_empty() && manifest.positions != Positions::EveryGenerated {
        let message = format!("the probe reads {}; leave it out", manifest.positions);
        return Err(Error::invalid("answer_tokens", message));
    }
    if options.answer_tokens.contains(&0) {
        return Err(Error::invalid("answer_tokens", "must be above 0"));
    }
    let first = || manifest.calibrations.first().map(|c| c.gather);
    let gather = options.gather.or_else(first).unwrap_or(Gather::Last);
    manifest.calibration(&gather).map_err(unfit)?;
    Ok(gather)
}

fn points(
    benign: &[Scored],
    gather: &Gather,
    positions: Positions,
    options: &Options,
) -> Result<(Vec<OperatingPoint>, Vec<String>)> {
    let mut lengths = answer_lengths(positions);
    if !options.answer_tokens.is_empty() {
        lengths = options.answer_tokens.iter().copied().map(Some).collect();
        lengths.sort_unstable();
        lengths.dedup();
    }
    let point = |length: &Option<u32>| {
        let logits: Vec<f32> = benign
            .iter()
            .map(|row| row.for_threshold(gather, *length))
            .collect();
        operating_point(&logits, options.target_fpr, *length).map_err(|error| {
            Error::FailedPrecondition {
                subject: options.data.display().to_string(),
                message: error.to_string(),
            }
        })
    };
    let points: Vec<OperatingPoint> = lengths.iter().map(point).collect::<Result<_>>()?;
    let mut remarks = Vec::new();
    let groups: std::collections::HashSet<&str> =
        benign.iter().map(|row| row.group.as_str()).collect();
    if groups.len() < benign.len() {
        remarks.push(format!(
            "The {} rows are of {} groups; threshold and interval take rows as independent, so \
             give one row of each group for exact ones.",
            benign.len(),
            groups.len()
        ));
    }
    for tokens in lengths.into_iter().flatten() {
        let long = |row: &&Scored| row.outputs.len() >= tokens as usize;
        let reached = benign.iter().filter(long).count();
        if reached < benign.len() {
            remarks.push(format!(
                "{reached} of {} answers have {tokens} tokens; the others count as far as they go.",
                benign.len()
            ));
        }
    }
    Ok((points, remarks))
}

/// The probe with the points in the calibration of the gather, and with what set them.
fn with_points(
    probe: Probe,
    gather: &Gather,
    points: &[OperatingPoint],
    data: inwit_probes::DataRecord,
    options: &Options,
) -> Result<Probe> {
    let (mut manifest, heads, prober) = probe.into_parts();
    for calibration in &mut manifest.calibrations {
        if calibration.gather == *gather {
            points
                .iter()
                .for_each(|point| calibration.set_threshold(*point));
        }
    }
    let record = &mut manifest.record;
    if !record.data.contains(&data) {
        record.data.push(data);
    }
    for point in points {
        let length = point
            .answer_tokens
            .map(|tokens| format!("_{tokens}_tokens"));
        let name = format!(
            "threshold_at_fpr_{}_{}{}",
            point.fpr,
            plain(gather),
            length.unwrap_or_default()
        );
        let metric = Metric {
            value: f64::from(point.threshold_logit),
            interval: None,
        };
        record.metrics.insert(name, metric);
    }
    let again = format!("Then: {}.", options.command);
    if !record.note.contains(&again) {
        let space = if record.note.is_empty() { "" } else { " " };
        record.note = format!("{}{space}{again}", record.note);
    }
    Probe::new(manifest, heads, prober).map_err(unfit)
}

#[cfg(test)]
mod tests {
    use inwit_probes::manifest::DataRecord;
    use inwit_probes::{Calibration, CalibrationKind, Kind, TokenOutput};

    use super::*;
    use crate::lab::learn::{Readings, learn, tests as tiny};

    fn probe() -> Probe {
        let recipe = tiny::recipe(Kind::Lda, Gather::Mean);
        let (sites, examples) = (tiny::sites(), tiny::examples(100));
        let readings = Readings {
            sites: &sites,
            d_model: tiny::D_MODEL,
            examples: &examples,
        };
        let learnt = learn(&recipe, &sites, &readings).expect("fits");
        let (mut manifest, heads, prober) = tiny::probe(&recipe, learnt).into_parts();
        manifest.calibrations = vec![Calibration {
            gather: Gather::Mean,
            kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
            prior: 0.5,
            thresholds: Vec::new(),
            n_benign: 50,
            n_harmful: 50,
        }];
        Probe::new(manifest, heads, prober).expect("a probe")
    }

    fn options(target_fpr: f64) -> Options {
        Options {
            target_fpr,
            data: "benign.jsonl".into(),
            gather: None,
            answer_tokens: Vec::new(),
            command: "inwit probe threshold p --target-fpr 0.01".into(),
        }
    }

    fn benign(count: usize, tokens: usize) -> Vec<Scored> {
        let scored = |row: usize| Scored {
            positive: false,
            group: format!("g{}", row / 2),
            outputs: vec![TokenOutput::logit(row as f32); tokens],
        };
        (0..count).map(scored).collect()
    }

    fn record() -> DataRecord {
        DataRecord {
            name: "benign.jsonl".into(),
            sha256: "0".into(),
            rows: 999,
        }
    }

    #[test]
    fn the_threshold_lies_in_the_calibration_of_its_gather() {
        let options = options(0.01);
        let gather = check(&probe(), &options).expect("is calibrated");
        let (found, remarks) = points(&benign(999, 3), &gather, Positions::PromptContent, &options)
            .expect("enough rows");
        // The 990th of 999 from below.
        assert_eq!(found[0].threshold_logit, 989.0);
        assert!(remarks[0].contains("500 groups"), "{remarks:?}");
        let probe = with_points(probe(), &gather, &found, record(), &options).expect("a probe");
        let calibration = probe.manifest().calibration(&gather).expect("there");
        assert_eq!(calibration.threshold_at(0.01, None), Ok(989.0));
        assert!(probe.manifest().record.note.contains("probe threshold"));

        // Again, with another result: it takes the old one's place.
        let again = OperatingPoint {
            threshold_logit: 5.0,
            ..found[0]
        };
        let probe = with_points(probe, &gather, &[again], record(), &options).expect("a probe");
        let calibration = probe.manifest().calibration(&gather).expect("there");
        assert_eq!(calibration.thresholds, [again]);
        assert_eq!(probe.manifest().record.data.len(), 1);
    }

    #[test]
    fn too_few_rows_are_refused_with_the_number_needed() {
        let of = |rows, target| {
            points(
                &benign(rows, 1),
                &Gather::Mean,
                Positions::PromptContent,
                &options(target),
            )
        };
        let message = of(98, 0.01).expect_err("refused").to_string();
        assert!(
            message.contains("benign.jsonl") && message.contains("at least 99"),
            "{message}"
        );
        let message = of(500, 0.001).expect_err("refused").to_string();
        assert!(message.contains("at least 999"), "{message}");
        assert!(of(99, 0.01).is_ok());
    }

    #[test]
    fn answers_have_a_threshold_for_every_length() {
        let mut options = options(0.05);
        let of = |options: &Options| {
            points(
                &benign(200, 100),
                &Gather::Max,
                Positions::EveryGenerated,
                options,
            )
            .expect("enough rows")
        };
        let lengths = |options: &Options| -> Vec<Option<u32>> {
            of(options)
                .0
                .iter()
                .map(|point| point.answer_tokens)
                .collect()
        };
        assert_eq!(lengths(&options), [Some(64), Some(256), Some(1024)]);
        options.answer_tokens = vec![80, 20, 80];
        assert_eq!(lengths(&options), [Some(20), Some(80)]);
        options.answer_tokens = vec![101];
        assert!(
            of(&options)
                .1
                .iter()
                .any(|remark| remark.starts_with("0 of 200"))
        );
    }

    #[test]
    fn what_the_probe_does_not_have_is_refused_before_any_work() {
        let refused = |change: fn(&mut Options), field: &str| {
            let mut bad = options(0.01);
            change(&mut bad);
            let error = check(&probe(), &bad).expect_err("refused").to_string();
            assert!(error.contains(field), "{error}");
        };
        refused(|o| o.target_fpr = 0.0, "target_fpr");
        refused(|o| o.target_fpr = f64::NAN, "target_fpr");
        refused(|o| o.gather = Some(Gather::Max), "max");
        refused(|o| o.answer_tokens = vec![64], "answer_tokens");
    }
}
