//! Reads every row of a set with a probe.
//! Scores by the plain definition, so that a result does not hang on a kernel of the engine.

use inwit_probes::{Probe, Site};

use super::set::EvalSet;
use crate::error::Result;
use crate::lab::bench::{Bench, Tick};
use crate::lab::learn;
use crate::lab::scored::Scored;

/// A set as the probe sees it.
#[derive(Clone, Debug)]
pub struct ReadSet {
    /// One per row.
    pub rows: Vec<Scored>,
    /// Rows of a form that the probe was not trained on.
    pub out_of_domain: usize,
    /// The rows once more for each refit of the probe.
    pub refits: Vec<Vec<Scored>>,
}

/// Reads the states of every row at the probe's sites, and scores them; also by `refits`, which
/// read the same states.
pub async fn read(
    bench: &Bench,
    probe: &Probe,
    refits: &[Probe],
    set: &EvalSet,
    tick: Tick<'_>,
) -> Result<ReadSet> {
    let sites = sites(probe);
    let manifest = probe.manifest();
    let mut read = ReadSet {
        rows: Vec::with_capacity(set.groups.len()),
        out_of_domain: 0,
        refits: vec![Vec::with_capacity(set.groups.len()); refits.len()],
    };
    set.labelled
        .visit(
            bench,
            &sites,
            manifest.positions,
            tick,
            |example, request| {
                let within = request.prompt.form.within(&manifest.trained_on);
                read.out_of_domain += usize::from(!within);
                let readings = learn::Readings {
                    sites: &sites,
                    d_model: bench.d_model(),
                    examples: std::slice::from_ref(&example),
                };
                read.rows.push(Scored::of(probe, &readings, &example)?);
                for (rows, refit) in read.refits.iter_mut().zip(refits) {
                    rows.push(Scored::of(refit, &readings, &example)?);
                }
                Ok(())
            },
        )
        .await?;
    Ok(read)
}

/// Each site once, in the order of the heads.
pub(super) fn sites(probe: &Probe) -> Vec<Site> {
    let mut sites: Vec<Site> = Vec::new();
    for head in probe.heads() {
        if !sites.contains(&head.site) {
            sites.push(head.site);
        }
    }
    sites
}
