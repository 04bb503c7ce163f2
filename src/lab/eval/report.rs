//! What a report holds: numbers, hashes and names. Written as JSON; the table and the page are
//! made from it.

use inwit_probes::DataRecord;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::claim::ClaimRow;
use super::layers::Sweep;
use super::measure::{Bin, Histogram, Measured, Rate};
use crate::lab::bench::Bench;
use crate::lab::machine;

/// Where and how a report was made.
#[derive(Clone, Debug, Serialize)]
pub struct Configuration {
    pub command: String,
    pub version: &'static str,
    pub commit: String,
    pub machine: String,
    pub model: String,
    pub architecture_id: String,
    pub weights_id: String,
    pub weight_format: String,
    pub kv_type: String,
    /// Of the bootstrap, and of what is shuffled.
    pub seed: u64,
    /// Of what is fitted or sampled several times.
    pub seeds: Vec<u64>,
    pub resamples: usize,
    /// SHA-256 of what decides the numbers: model, subject, data, seeds and options.
    pub configuration_hash: String,
}

impl Configuration {
    /// `decides`: what else decides the numbers, e.g. the hashes of subject and data.
    pub fn of(bench: &Bench, command: String, commit: Option<String>, seed: u64) -> Self {
        let info = bench.engine.info();
        Self {
            command,
            version: env!("CARGO_PKG_VERSION"),
            commit: commit.unwrap_or_else(machine::commit),
            machine: machine::machine(),
            model: info.name.clone(),
            architecture_id: info.identity.architecture_id.clone(),
            weights_id: info.identity.weights_id.clone(),
            weight_format: info.weight_format.to_string(),
            kv_type: info.kv_type.to_string(),
            seed,
            seeds: Vec::new(),
            resamples: super::measure::RESAMPLES,
            configuration_hash: String::new(),
        }
    }

    /// Fills in the hash. `parts` are the subject, the data and the options, in a fixed order.
    pub fn sealed(mut self, parts: &[&str]) -> Self {
        let mut hasher = Sha256::new();
        let own = [
            &self.architecture_id,
            &self.weights_id,
            &self.weight_format,
            &self.kv_type,
        ];
        let numbers = format!("{} {:?} {}", self.seed, self.seeds, self.resamples);
        let all = own.into_iter().map(String::as_str);
        for part in all.chain([numbers.as_str()]).chain(parts.iter().copied()) {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        self.configuration_hash = hex::encode(hasher.finalize());
        self
    }
}

/// How a probe did.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeReport {
    pub configuration: Configuration,
    pub probe: ProbeFacts,
    /// None without `--train`: no baselines.
    pub baselines: Option<BaselineFacts>,
    pub sets: Vec<SetReport>,
    /// A sweep over sites that was made when the site was chosen.
    pub sweep: Option<Sweep>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ProbeFacts {
    pub name: String,
    pub content_hash: String,
    pub kind: String,
    pub sites: Vec<String>,
    pub positions: String,
    pub gather: String,
    /// `native`, or what is known of other weights.
    pub standing: String,
    /// The share of positives that its probabilities refer to; none where it is not calibrated for
    /// the gather.
    pub prior: Option<f64>,
    pub fitted_on: Vec<DataRecord>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BaselineFacts {
    pub trained_on: DataRecord,
    /// Of the bag of words.
    pub terms: usize,
    pub pairs: bool,
    pub penalty: f64,
    pub recipe_site: String,
    pub recipe_positions: String,
    pub recipe_seeds: Vec<u64>,
}

/// How the probe and its baselines did on one set.
#[derive(Clone, Debug, Serialize)]
pub struct SetReport {
    pub data: DataRecord,
    pub positive: &'static str,
    pub negative: &'static str,
    pub positives: u64,
    pub negatives: u64,
    /// Positives among all rows.
    pub prevalence: f64,
    pub groups: usize,
    /// Rows of a form that the probe was not trained on.
    pub out_of_domain: usize,
    /// Runs on this set that the log holds, this one included; none without a log.
    pub runs_logged: Option<usize>,
    pub remarks: Vec<String>,
    /// The probe, then the baselines.
    pub scorers: Vec<ScorerReport>,
    /// The probe fitted with other seeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refits: Option<ScorerReport>,
    pub claims: Vec<ClaimRow>,
    /// At the probe's threshold for one false positive in a hundred.
    pub categories: Vec<CategoryRow>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ScorerReport {
    pub name: String,
    pub auroc: Option<Measured>,
    pub detection: Vec<Detection>,
    pub points: Vec<PointRow>,
    pub ece: Option<Measured>,
    pub roc: Vec<[f64; 2]>,
    pub histogram: Histogram,
    pub reliability: Vec<Bin>,
}

/// The share of positives above the threshold that this set's own negatives give; for comparing
/// scorers, since nobody has such a threshold in advance.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Detection {
    pub fpr: f64,
    /// None where the set has too few negatives for such a rate.
    pub tpr: Option<Measured>,
}

/// What a threshold that was stored beforehand does on this set.
#[derive(Clone, Debug, Serialize)]
pub struct PointRow {
    /// E.g. `1 % in calibration` or `probability 0.5`.
    pub name: String,
    /// The rate that the threshold was made for.
    pub fpr_asked: Option<f64>,
    pub answer_tokens: Option<u32>,
    pub threshold_logit: f32,
    pub recall: Option<Rate>,
    pub fpr: Option<Rate>,
}

/// Rows of one label and category above the threshold.
#[derive(Clone, Debug, Serialize)]
pub struct CategoryRow {
    pub label: &'static str,
    pub category: String,
    pub flagged: Rate,
}

impl ScorerReport {
    /// The stored point for one false positive in a hundred; of several answer lengths the longest.
    pub fn one_percent(&self) -> Option<&PointRow> {
        let made_for = |point: &&PointRow| {
            point
                .fpr_asked
                .is_some_and(|fpr| (fpr - 0.01).abs() <= 1e-9)
        };
        let points = self.points.iter().filter(made_for);
        points.max_by_key(|point| point.answer_tokens)
    }
}

impl SetReport {
    /// The result in one line, for the log.
    pub fn line(&self) -> String {
        let probe = &self.scorers[0];
        let mut parts = vec![format!(
            "{} {}, {} {}",
            self.positives, self.positive, self.negatives, self.negative
        )];
        parts.extend(probe.auroc.map(|auroc| format!("AUROC {}", auroc.short())));
        for detection in &probe.detection {
            let at = percent(detection.fpr);
            parts.extend(
                detection
                    .tpr
                    .map(|tpr| format!("TPR at {at} FPR {}", tpr.short())),
            );
        }
        if let Some(point) = probe.one_percent() {
            let rate = |name: &str, rate: &Option<Rate>| {
                rate.map(|rate| format!("{name} at the 1 % threshold {}", rate.short()))
            };
            parts.extend(rate("recall", &point.recall));
            parts.extend(rate("FPR", &point.fpr));
        }
        parts.extend(probe.ece.map(|ece| format!("ECE {}", ece.short())));
        parts.join("; ")
    }
}

impl Measured {
    /// `0.812 (0.790 to 0.835)`
    pub fn short(&self) -> String {
        match self.interval {
            Some([low, high]) => format!("{:.3} ({low:.3} to {high:.3})", self.value),
            None => format!("{:.3}", self.value),
        }
    }
}

impl Rate {
    /// `3/120 = 2.5 % (0.5 to 7.1 %)`
    pub fn short(&self) -> String {
        format!(
            "{}/{} = {:.1} % ({:.1} to {:.1} %)",
            self.count,
            self.of,
            self.rate * 100.0,
            self.interval[0] * 100.0,
            self.interval[1] * 100.0
        )
    }
}

/// `0.1 %` of 0.001.
pub fn percent(share: f64) -> String {
    let percent = share * 100.0;
    let digits = usize::from((percent - percent.round()).abs() > 1e-9);
    format!("{percent:.digits$} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_carry_their_intervals() {
        let measured = Measured {
            value: 0.81234,
            interval: Some([0.79, 0.8351]),
            seeds: None,
        };
        assert_eq!(measured.short(), "0.812 (0.790 to 0.835)");
        let rate = Rate::new(3, 120).expect("counts").expect("rows");
        assert_eq!(rate.short(), "3/120 = 2.5 % (0.5 to 7.1 %)");
        assert_eq!(["0.1 %", "5 %"], [percent(0.001), percent(0.05)]);
    }

    #[test]
    fn the_point_of_one_percent_is_the_longest_answers() {
        let point = |fpr: f64, answer_tokens| PointRow {
            name: String::new(),
            fpr_asked: Some(fpr),
            answer_tokens,
            threshold_logit: 0.0,
            recall: None,
            fpr: None,
        };
        let scorer = ScorerReport {
            name: "p".into(),
            auroc: None,
            detection: Vec::new(),
            points: vec![
                point(0.01, Some(64)),
                point(0.01, Some(1024)),
                point(0.05, Some(1024)),
            ],
            ece: None,
            roc: Vec::new(),
            histogram: super::super::measure::histogram(&[], &[], 1),
            reliability: Vec::new(),
        };
        let found = scorer.one_percent().expect("is there");
        assert_eq!(
            (found.fpr_asked, found.answer_tokens),
            (Some(0.01), Some(1024))
        );
    }
}
