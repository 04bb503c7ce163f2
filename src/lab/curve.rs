//! `probe curve`: the same probe fitted on growing shares of its training rows, which says whether
//! more rows would help.
//! Knows rows, states and rankings; knows no plot and no table.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use inwit_probes::manifest::{DataRecord, ModelIdentity, Positions};
use inwit_probes::{Gather, Site};
use serde::Serialize;

use super::bench::{Bench, Tick};
use super::examples::{Example, Labelled};
use super::fit::{identity, off_thread};
use super::learn::{Recipe, name_of};
use super::seeded::Seeded;
use super::sweep::{Pass, Rankings};
use crate::error::{Error, Result};

/// What to fit, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    pub train: PathBuf,
    /// Labelled files that no fit reads.
    pub dev: Vec<PathBuf>,
    /// Read together.
    pub sites: Vec<Site>,
    pub positions: Positions,
    pub recipe: Recipe,
    /// Of the rows that are not held out, above 0 and at most 1, each once.
    pub shares: Vec<f64>,
    /// The command line, for the record.
    pub command: String,
}

/// How the probe does by the number of rows that it learnt from.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    pub model: ModelIdentity,
    pub kind: &'static str,
    pub sites: Vec<Site>,
    pub positions: Positions,
    pub gather: Gather,
    pub settings: String,
    pub seed: u64,
    pub data: DataRecord,
    pub rows_held_out: usize,
    pub dev: Vec<DataRecord>,
    pub command: String,
    /// From few rows to all of them.
    pub points: Vec<Point>,
}

/// A fit on some of the rows. Each point's rows are among those of the next one.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    pub share: f64,
    pub rows: usize,
    pub groups: usize,
    #[serde(flatten)]
    pub rankings: Rankings,
}

/// Fits and measures a probe on every share. Deterministic for one model, machine and seed.
pub async fn curve(bench: &Bench, options: &Options, tick: Tick<'_>) -> Result<Curve> {
    let recipe = &options.recipe;
    recipe.check()?;
    recipe.check_gathers(&[recipe.gather], options.positions)?;
    bench.check_sites(&options.sites)?;
    let shares = checked(&options.shares)?;
    let train = Labelled::read(&options.train, options.positions)?;
    let dev = train.read_dev(&options.dev, options.positions)?;

    let reading = (recipe, options.positions);
    let mut pass = Pass::read(bench, reading, &options.sites, (&train, &dev), tick).await?;
    pass.rest = in_order_of_groups(pass.rest, recipe.seed);
    let rows_held_out = pass.held_out.len();
    let points = off_thread(move || {
        let point = |share: &f64| pass.point(*share);
        shares.iter().map(point).collect::<Result<Vec<_>>>()
    });
    Ok(Curve {
        model: identity(bench),
        kind: name_of(recipe.kind),
        sites: options.sites.clone(),
        positions: options.positions,
        gather: recipe.gather,
        settings: recipe.described(),
        seed: recipe.seed,
        data: train.record.clone(),
        rows_held_out,
        dev: dev.iter().map(|rows| rows.record.clone()).collect(),
        command: options.command.clone(),
        points: points.await?,
    })
}

/// In rising order.
fn checked(shares: &[f64]) -> Result<Vec<f64>> {
    let mut sorted = shares.to_vec();
    sorted.sort_by(f64::total_cmp);
    let within = sorted.iter().all(|share| *share > 0.0 && *share <= 1.0);
    if sorted.is_empty() || !within {
        return Err(Error::invalid("shares", "must be above 0 and at most 1"));
    }
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::invalid("shares", "holds a share twice"));
    }
    Ok(sorted)
}

/// Groups in an order drawn by the seed, the rows of a group together: a share is a beginning.
fn in_order_of_groups(mut examples: Vec<Example>, seed: u64) -> Vec<Example> {
    let mut groups: Vec<&str> = examples.iter().map(|e| e.group.as_str()).collect();
    groups.sort_unstable();
    groups.dedup();
    Seeded::new(seed).shuffle(&mut groups);
    let drawn = groups.into_iter().zip(0..);
    let places: HashMap<String, usize> = drawn.map(|(g, at)| (g.to_owned(), at)).collect();
    examples.sort_by_key(|example| places[&example.group]);
    examples
}

/// Where the first `share` of the rows ends, its last group whole.
fn end_of(examples: &[Example], share: f64) -> usize {
    let wanted = ((examples.len() as f64 * share).round() as usize).clamp(1, examples.len());
    let group = &examples[wanted - 1].group;
    let more = examples[wanted..].iter().take_while(|e| e.group == *group);
    wanted + more.count()
}

impl Pass {
    fn point(&self, share: f64) -> Result<Point> {
        if self.rest.is_empty() {
            return Err(Error::invalid("data", "every row is held out"));
        }
        let rest = &self.rest[..end_of(&self.rest, share)];
        let named = format!("probe on a share of {share}, {} rows", rest.len());
        let groups: HashSet<&str> = rest.iter().map(|example| example.group.as_str()).collect();
        Ok(Point {
            share,
            rows: rest.len(),
            groups: groups.len(),
            rankings: self.fitted(&self.sites, rest, named)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use inwit_probes::{Gather, Kind};

    use super::super::sweep::tests::pass;
    use super::*;

    #[test]
    fn more_rows_rank_no_worse_and_hold_the_fewer_ones() {
        let mut pass = pass(Kind::Lda, Gather::Mean);
        pass.rest = in_order_of_groups(std::mem::take(&mut pass.rest), 3);
        let [few, all] = [0.2, 1.0].map(|share| pass.point(share).expect("fits"));
        assert_eq!(all.rows, pass.rest.len());
        assert!(few.rows < all.rows / 4 && few.groups < all.groups);
        let auroc = |point: &Point| point.rankings.held_out.auroc.value;
        assert!(auroc(&all) >= auroc(&few) - 0.02 && auroc(&all) > 0.9);
    }

    #[test]
    fn a_share_tears_no_group_apart() {
        let rest = in_order_of_groups(pass(Kind::Lda, Gather::Mean).rest, 5);
        for share in [0.01, 0.13, 0.5, 0.77] {
            let (taken, left) = rest.split_at(end_of(&rest, share));
            assert!(!taken.is_empty());
            assert!(
                taken
                    .iter()
                    .all(|t| left.iter().all(|l| l.group != t.group))
            );
        }
        assert_eq!(end_of(&rest, 1.0), rest.len());
    }

    #[test]
    fn shares_are_checked_and_put_in_order() {
        assert_eq!(checked(&[1.0, 0.25]).expect("are good"), [0.25, 1.0]);
        for bad in [&[][..], &[0.0], &[1.5], &[f64::NAN], &[0.5, 0.5]] {
            assert!(checked(bad).is_err(), "{bad:?}");
        }
    }
}
