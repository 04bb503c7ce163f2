//! Requests as a fitted probe sees them, and how well it tells them apart.
//! Knows logits, labels and groups; knows no model and no fitting.

use inwit_probes::metrics::{auroc, bootstrap_by_group, tpr_at_fpr};
use inwit_probes::{Gather, GatherState, Metric, Probe, Site, TokenOutput};
use serde::Serialize;

use super::examples::Example;
use super::fit::unfit;
use super::learn::Readings;
use crate::error::{Error, Result};

/// Resamples of the intervals.
const RESAMPLES: usize = 1000;
/// With fewer negatives than this, one in a hundred is none.
const ENOUGH_FOR_ONE_PERCENT: usize = 100;

/// One request as a probe sees it.
#[derive(Clone, Debug)]
pub struct Scored {
    pub positive: bool,
    pub group: String,
    pub outputs: Vec<TokenOutput>,
}

/// How well a probe ranks labelled requests, with 95 % intervals that draw whole groups.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ranking {
    pub auroc: Metric,
    /// None with fewer than a hundred negatives.
    pub tpr_at_one_percent: Option<Metric>,
}

impl Scored {
    /// By the plain definition, so that an artefact's numbers do not hang on a kernel.
    pub fn of(probe: &Probe, readings: &Readings<'_>, example: &Example) -> Result<Self> {
        let sites: Vec<(Site, &Vec<f32>)> = probe
            .heads()
            .iter()
            .map(|head| Ok((head.site, readings.values(example, head.site)?)))
            .collect::<Result<_>>()?;
        let output = |token: usize| {
            let hidden = |site: Site| {
                let found = sites.iter().find(|(own, _)| *own == site);
                let (_, values) = found.expect("a head reads its own sites");
                &values[token * readings.d_model..(token + 1) * readings.d_model]
            };
            probe.score_row(hidden).map_err(Error::internal)
        };
        Ok(Self {
            positive: example.positive,
            group: example.group.clone(),
            outputs: (0..example.states.positions.len())
                .map(output)
                .collect::<Result<_>>()?,
        })
    }

    /// Every example of the readings.
    pub fn all(probe: &Probe, readings: &Readings<'_>) -> Result<Vec<Self>> {
        let examples = readings.examples.iter();
        examples
            .map(|example| Self::of(probe, readings, example))
            .collect()
    }

    /// The request's number, gathered over all its tokens; none for `k_of_n` with fewer than k.
    pub fn gathered(&self, gather: &Gather) -> Option<f32> {
        self.running(gather, usize::MAX).last().copied().flatten()
    }

    /// The request's number where it is compared with others: without a value it is the lowest.
    pub fn ranked(&self, gather: &Gather) -> f32 {
        self.gathered(gather).unwrap_or(f32::MIN)
    }

    /// The highest number that a rule would see while the first `tokens` tokens come.
    pub fn highest(&self, gather: &Gather, tokens: usize) -> f32 {
        let values = self.running(gather, tokens).into_iter();
        values.flatten().fold(f32::MIN, f32::max)
    }

    /// What sets a threshold: the highest of so many tokens of an answer, where a rule may fire at
    /// each, and what all tokens come to otherwise.
    pub fn for_threshold(&self, gather: &Gather, answer_tokens: Option<u32>) -> f32 {
        match answer_tokens {
            Some(tokens) => self.highest(gather, tokens as usize),
            None => self.ranked(gather),
        }
    }

    pub fn logits(&self) -> impl Iterator<Item = f32> {
        self.outputs.iter().map(|output| output.logit)
    }

    fn running(&self, gather: &Gather, tokens: usize) -> Vec<Option<f32>> {
        let mut state = GatherState::new(gather);
        let mut values = Vec::new();
        for output in self.outputs.iter().take(tokens) {
            // Outputs were checked to be finite when they were made.
            if state.push(output).is_ok() {
                values.push(state.value());
            }
        }
        values
    }
}

impl Ranking {
    /// Of requests of both classes under one gather.
    pub fn of(scored: &[Scored], gather: &Gather, seed: u64) -> Result<Self> {
        let logits: Vec<f32> = scored.iter().map(|row| row.ranked(gather)).collect();
        let y: Vec<bool> = scored.iter().map(|row| row.positive).collect();
        let group: Vec<String> = scored.iter().map(|row| row.group.clone()).collect();
        let with_interval = |statistic: Statistic<'_>| -> Result<Metric> {
            let drawn = |rows: &[usize]| {
                let (logits, y): (Vec<f32>, Vec<bool>) =
                    rows.iter().map(|row| (logits[*row], y[*row])).unzip();
                statistic(&logits, &y)
            };
            Ok(Metric {
                value: statistic(&logits, &y).map_err(unfit)?,
                interval: bootstrap_by_group(&group, RESAMPLES, seed, drawn).ok(),
            })
        };
        let negatives = y.iter().filter(|positive| !**positive).count();
        Ok(Self {
            auroc: with_interval(&auroc)?,
            tpr_at_one_percent: match negatives >= ENOUGH_FOR_ONE_PERCENT {
                true => Some(with_interval(&|logits, y| tpr_at_fpr(logits, y, 0.01))?),
                false => None,
            },
        })
    }
}

/// A measure of logits and labels.
type Statistic<'a> = &'a dyn Fn(&[f32], &[bool]) -> inwit_probes::Result<f64>;

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(positive: bool, group: usize, logits: &[f32]) -> Scored {
        Scored {
            positive,
            group: format!("g{group}"),
            outputs: logits.iter().copied().map(TokenOutput::logit).collect(),
        }
    }

    #[test]
    fn a_rule_that_may_fire_at_any_token_is_judged_by_the_highest() {
        let row = scored(false, 0, &[1.0, 5.0, 2.0]);
        assert_eq!(row.ranked(&Gather::Last), 2.0);
        assert_eq!(row.highest(&Gather::Last, usize::MAX), 5.0);
        assert_eq!(row.highest(&Gather::Last, 1), 1.0);
        assert_eq!(row.for_threshold(&Gather::Last, None), 2.0);
        assert_eq!(row.for_threshold(&Gather::Last, Some(2)), 5.0);
    }

    #[test]
    fn fewer_than_k_tokens_have_no_number_and_rank_lowest() {
        let gather = Gather::KOfN { k: 3, n: 8 };
        let row = scored(true, 0, &[1.0, 5.0]);
        assert_eq!(row.gathered(&gather), None);
        assert_eq!(row.ranked(&gather), f32::MIN);
        assert_eq!(row.highest(&gather, 9), f32::MIN);
        assert_eq!(
            scored(true, 0, &[1.0, 5.0, 2.0]).gathered(&gather),
            Some(1.0)
        );
    }

    #[test]
    fn one_percent_is_told_only_with_a_hundred_negatives() {
        let rows = |count: usize| -> Vec<Scored> {
            (0..count)
                .map(|i| {
                    scored(
                        i % 2 == 0,
                        i,
                        &[if i % 2 == 0 { 2.0 } else { 0.0 } + (i % 7) as f32 / 3.0],
                    )
                })
                .collect()
        };
        let few = Ranking::of(&rows(150), &Gather::Last, 1).expect("ranks");
        assert_eq!(few.tpr_at_one_percent, None);
        let many = Ranking::of(&rows(220), &Gather::Last, 1).expect("ranks");
        let [low, high] = many.auroc.interval.expect("an interval");
        assert!(low <= many.auroc.value && many.auroc.value <= high);
        assert!(many.tpr_at_one_percent.is_some());
    }
}
