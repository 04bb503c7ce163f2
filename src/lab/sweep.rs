//! `probe sweep`: the same probe fitted at one site after another, and how well each does on groups
//! that the fit never saw and on development files.
//! Knows rows, states and rankings; knows no plot and no table.

use std::path::PathBuf;
use std::str::FromStr;

use inwit_probes::manifest::{DataRecord, Manifest, Metric, ModelIdentity, Positions};
use inwit_probes::{Gather, Probe, Site};
use rayon::prelude::*;
use serde::Serialize;

use super::bench::{Bench, Tick};
use super::examples::{Example, Labelled, split};
use super::fit::{identity, off_thread, unfit};
use super::learn::{Readings, Recipe, learn, name_of};
use super::scored::{Ranking, Scored};
use crate::error::{Error, Result};

/// States that are held at once, in bytes; what does not fit is read in several passes.
pub const MOST_STATES: u64 = 4 << 30;

/// Where to sweep: one site, or every layer's site of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SiteChoice {
    One(Site),
    /// What follows `hook_`, such as `resid_post`.
    EveryLayer(String),
}

/// What to fit at every site, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    pub train: PathBuf,
    /// Labelled files that no fit reads.
    pub dev: Vec<PathBuf>,
    pub sites: Vec<SiteChoice>,
    pub positions: Positions,
    pub recipe: Recipe,
    /// See `MOST_STATES`.
    pub most_states: u64,
    /// The command line, for the record.
    pub command: String,
}

/// How every site did.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    pub model: ModelIdentity,
    pub kind: &'static str,
    pub positions: Positions,
    pub gather: Gather,
    pub settings: String,
    pub seed: u64,
    pub data: DataRecord,
    pub rows_fitted: usize,
    pub rows_held_out: usize,
    pub dev: Vec<DataRecord>,
    /// Times that the data went through the model.
    pub passes: usize,
    pub command: String,
    pub sites: Vec<SiteRow>,
}

/// How one site did.
#[derive(Clone, Debug, Serialize)]
pub struct SiteRow {
    pub site: Site,
    #[serde(flatten)]
    pub rankings: Rankings,
}

/// How one fitted probe ranks what its fit never saw.
#[derive(Clone, Debug, Serialize)]
pub struct Rankings {
    pub held_out: Ranking,
    /// Per development file, in the order given; null where it holds one class only.
    pub dev: Vec<Option<Ranking>>,
    /// All development files as one; null without any.
    pub dev_together: Option<Ranking>,
    pub remarks: Vec<String>,
}

impl FromStr for SiteChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let every_layer = |name: &str| {
            let known = Site::all(1).any(|site| site.layer().is_some() && is_named(site, name));
            known.then(|| Self::EveryLayer(name.to_owned()))
        };
        if let Some(name) = text.strip_prefix("all-") {
            return every_layer(name).ok_or_else(|| {
                "expected all-resid_post, all-resid_mid, all-resid_pre, all-attn_out or \
                 all-mlp_out"
                    .to_owned()
            });
        }
        text.parse()
            .map(Self::One)
            .map_err(|error| format!("{error}, or all-resid_post for every layer"))
    }
}

fn is_named(site: Site, name: &str) -> bool {
    let text = site.to_string();
    text.rsplit_once(".hook_")
        .is_some_and(|(_, own)| own == name)
}

impl SiteChoice {
    fn sites(&self, n_layers: usize) -> Vec<Site> {
        match self {
            Self::One(site) => vec![*site],
            Self::EveryLayer(name) => Site::all(n_layers)
                .filter(|site| site.layer().is_some() && is_named(*site, name))
                .collect(),
        }
    }
}

/// Fits and measures a probe at every site. Deterministic for one model, machine and seed.
pub async fn sweep(bench: &Bench, options: &Options, tick: Tick<'_>) -> Result<Sweep> {
    let recipe = &options.recipe;
    recipe.check()?;
    recipe.check_gathers(&[recipe.gather], options.positions)?;
    let n_layers = bench.engine.info().config.n_layers;
    let chosen = options.sites.iter().flat_map(|site| site.sites(n_layers));
    let sites: Vec<Site> = chosen.collect();
    bench.check_sites(&sites)?;
    if sites.is_empty() {
        return Err(Error::invalid("sites", "name at least one"));
    }
    let train = Labelled::read(&options.train, options.positions)?;
    let dev = train.read_dev(&options.dev, options.positions)?;

    let mut tokens = 0;
    for rows in std::iter::once(&train).chain(&dev) {
        tokens += rows.tokens_read(bench, options.positions)?;
    }
    let per_site = tokens as u64 * bench.d_model() as u64 * size_of::<f32>() as u64;
    let at_once = sites_at_once(options.most_states, per_site, sites.len());
    let mut found = Sweep {
        model: identity(bench),
        kind: name_of(recipe.kind),
        positions: options.positions,
        gather: recipe.gather,
        settings: recipe.described(),
        seed: recipe.seed,
        data: train.record.clone(),
        rows_fitted: 0,
        rows_held_out: 0,
        dev: dev.iter().map(|rows| rows.record.clone()).collect(),
        passes: sites.len().div_ceil(at_once),
        command: options.command.clone(),
        sites: Vec::with_capacity(sites.len()),
    };
    for sites in sites.chunks(at_once) {
        let reading = (recipe, options.positions);
        let pass = Pass::read(bench, reading, sites, (&train, &dev), &mut *tick).await?;
        (found.rows_fitted, found.rows_held_out) = (pass.rest.len(), pass.held_out.len());
        found.sites.extend(off_thread(move || pass.run()).await?);
    }
    Ok(found)
}

impl Sweep {
    /// The site with the highest AUROC on the development files together, else on held-out rows.
    pub fn highest(&self) -> Option<&SiteRow> {
        let by = |row: &&SiteRow| row.rankings.judged_by().auroc.value;
        self.sites.iter().max_by(|a, b| by(a).total_cmp(&by(b)))
    }

    /// Sites whose interval reaches into that of the highest: these data do not tell them apart.
    pub fn not_told_apart(&self) -> usize {
        let interval = |row: &SiteRow| row.rankings.judged_by().auroc.interval;
        let Some([low, _]) = self.highest().and_then(interval) else {
            return self.sites.len();
        };
        let reaches = |row: &&SiteRow| interval(row).is_none_or(|[_, high]| high >= low);
        self.sites.iter().filter(reaches).count()
    }
}

impl Rankings {
    fn judged_by(&self) -> &Ranking {
        self.dev_together.as_ref().unwrap_or(&self.held_out)
    }
}

fn sites_at_once(most: u64, per_site: u64, sites: usize) -> usize {
    let fit = most / per_site.max(1);
    usize::try_from(fit).unwrap_or(usize::MAX).clamp(1, sites)
}

async fn collect(
    bench: &Bench,
    rows: &Labelled,
    sites: &[Site],
    positions: Positions,
    tick: Tick<'_>,
) -> Result<Vec<Example>> {
    let mut examples = Vec::with_capacity(rows.rows.len());
    rows.visit(bench, sites, positions, tick, |example, _| {
        examples.push(example);
        Ok(())
    })
    .await?;
    Ok(examples)
}

/// States at some sites, with all that is needed to fit and to measure there.
pub(super) struct Pass {
    pub sites: Vec<Site>,
    pub d_model: usize,
    pub model: ModelIdentity,
    pub positions: Positions,
    pub recipe: Recipe,
    pub rest: Vec<Example>,
    pub held_out: Vec<Example>,
    pub dev: Vec<Vec<Example>>,
}

impl Pass {
    /// Reads the states of every row, and holds some of the training rows out.
    pub(super) async fn read(
        bench: &Bench,
        (recipe, positions): (&Recipe, Positions),
        sites: &[Site],
        (train, dev): (&Labelled, &[Labelled]),
        tick: Tick<'_>,
    ) -> Result<Self> {
        let examples = collect(bench, train, sites, positions, &mut *tick).await?;
        let (rest, held_out) = split(examples, recipe.seed, recipe.held_out);
        let mut pass = Self {
            sites: sites.to_vec(),
            d_model: bench.d_model(),
            model: identity(bench),
            positions,
            recipe: recipe.clone(),
            rest,
            held_out,
            dev: Vec::with_capacity(dev.len()),
        };
        for rows in dev {
            let examples = collect(bench, rows, sites, positions, &mut *tick).await?;
            pass.dev.push(examples);
        }
        Ok(pass)
    }

    fn run(&self) -> Result<Vec<SiteRow>> {
        self.sites.par_iter().map(|site| self.at(*site)).collect()
    }

    fn at(&self, site: Site) -> Result<SiteRow> {
        let named = format!("probe at {site}");
        Ok(SiteRow {
            site,
            rankings: self.fitted(&[site], &self.rest, named)?,
        })
    }

    /// Fits one probe over the sites on `rest`, and measures it. What cannot be fitted is told of
    /// as `named`.
    pub(super) fn fitted(
        &self,
        sites: &[Site],
        rest: &[Example],
        named: String,
    ) -> Result<Rankings> {
        let learnt = learn(&self.recipe, sites, &self.readings(rest));
        let learnt = learnt.map_err(|error| match error {
            Error::FailedPrecondition { message, .. } => Error::FailedPrecondition {
                subject: named,
                message,
            },
            error => error,
        })?;
        let (kind, gather, seed) = (self.recipe.kind, self.recipe.gather, self.recipe.seed);
        let mut manifest = Manifest::new(
            "sweep",
            kind,
            self.d_model,
            self.positions,
            self.model.clone(),
        );
        manifest.gathers = vec![gather];
        let probe = Probe::new(manifest, learnt.heads, learnt.prober).map_err(unfit)?;
        let held_out = Scored::all(&probe, &self.readings(&self.held_out))?;
        let mut dev = Vec::with_capacity(self.dev.len());
        let mut together = Vec::new();
        for examples in &self.dev {
            let scored = Scored::all(&probe, &self.readings(examples))?;
            let of_class = |class| scored.iter().any(|row| row.positive == class);
            dev.push(match of_class(true) && of_class(false) {
                true => Some(Ranking::of(&scored, &gather, seed)?),
                false => None,
            });
            together.extend(scored);
        }
        Ok(Rankings {
            held_out: Ranking::of(&held_out, &gather, seed)?,
            dev_together: match together.is_empty() {
                true => None,
                false => Some(Ranking::of(&together, &gather, seed)?),
            },
            dev,
            remarks: learnt.remarks,
        })
    }

    fn readings<'a>(&'a self, examples: &'a [Example]) -> Readings<'a> {
        Readings {
            sites: &self.sites,
            d_model: self.d_model,
            examples,
        }
    }
}

/// The value and the ends of the interval, for a line of a plot.
pub fn ends(metric: &Metric) -> [f64; 3] {
    let [low, high] = metric.interval.unwrap_or([metric.value; 2]);
    [low, metric.value, high]
}

#[cfg(test)]
pub(super) mod tests {
    use inwit_probes::Kind;

    use super::*;
    use crate::lab::learn::tests as tiny;

    pub(in crate::lab) fn pass(kind: Kind, gather: Gather) -> Pass {
        let (rest, held_out) = split(tiny::examples(240), 1, 0.2);
        Pass {
            sites: tiny::sites(),
            d_model: tiny::D_MODEL,
            model: ModelIdentity {
                name: "m".into(),
                architecture_id: "a".into(),
                weights_id: "w".into(),
                weight_format: "f32".into(),
            },
            positions: Positions::PromptContent,
            recipe: tiny::recipe(kind, gather),
            rest,
            held_out,
            dev: Vec::new(),
        }
    }

    fn sweep_of(sites: Vec<SiteRow>) -> Sweep {
        let pass = pass(Kind::Lda, Gather::Mean);
        Sweep {
            model: pass.model,
            kind: "lda",
            positions: pass.positions,
            gather: Gather::Mean,
            settings: String::new(),
            seed: 1,
            data: DataRecord {
                name: "train.jsonl".into(),
                sha256: "0".into(),
                rows: 3,
            },
            rows_fitted: 2,
            rows_held_out: 1,
            dev: Vec::new(),
            passes: 1,
            command: "inwit probe sweep".into(),
            sites,
        }
    }

    #[test]
    fn the_site_that_carries_the_class_stands_out() {
        for (kind, gather) in [
            (Kind::Lda, Gather::Mean),
            (Kind::TwoLayer, Gather::Last),
            (Kind::Attention, Gather::Attention),
        ] {
            let rows = pass(kind, gather).run().expect("sweeps");
            let found = sweep_of(rows);
            // The classes differ at the second site only.
            assert_eq!(found.highest().expect("a site").site, tiny::sites()[1]);
            assert_eq!(found.not_told_apart(), 1, "{kind:?}");
            assert!(found.sites[0].rankings.held_out.auroc.value < 0.8);
        }
    }

    #[test]
    fn a_development_file_of_one_class_counts_only_among_the_others() {
        let mut pass = pass(Kind::Lda, Gather::Mean);
        let (harmful, both) = tiny::examples(120)
            .into_iter()
            .partition(|example| example.positive && example.group.len() == 2);
        pass.dev = vec![harmful, both];
        let row = pass.at(tiny::sites()[1]).expect("sweeps");
        let rankings = &row.rankings;
        assert!(rankings.dev[0].is_none() && rankings.dev[1].is_some());
        assert!(rankings.dev_together.is_some());
    }

    #[test]
    fn sites_are_taken_in_as_many_passes_as_their_states_need() {
        assert_eq!(sites_at_once(100, 10, 30), 10);
        assert_eq!(sites_at_once(100, 10, 4), 4);
        assert_eq!(sites_at_once(100, 1000, 4), 1);
        assert_eq!(sites_at_once(100, 0, 4), 4);
    }

    #[test]
    fn sites_are_named_one_by_one_or_for_every_layer() {
        let every: SiteChoice = "all-resid_post".parse().expect("parses");
        assert_eq!(
            every.sites(3),
            [Site::ResidPost(0), Site::ResidPost(1), Site::ResidPost(2)]
        );
        let one: SiteChoice = "hook_embed".parse().expect("parses");
        assert_eq!(one.sites(3), [Site::Embed]);
        for bad in ["all-", "all-embed", "all-normalized", "layers.7", ""] {
            assert!(bad.parse::<SiteChoice>().is_err(), "{bad}");
        }
    }
}
