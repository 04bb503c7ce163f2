//! SafeSwitch's own recipe as a baseline (arXiv 2502.01042): the state after the final norm at one
//! token, a prober `d -> 64 -> ReLU -> 2`, a threshold of 0.5. What differs from the authors' code
//! is in `lab/two_layer.rs`.

use inwit_probes::fit::FitData;
use inwit_probes::{Kind, Manifest, ModelIdentity, Positions, Probe, Site};
use ndarray::Array2;

use super::set::EvalSet;
use crate::error::{Error, Result};
use crate::lab::bench::{Bench, Tick};
use crate::lab::fit::{identity, off_thread, unfit};
use crate::lab::two_layer;

/// The token after which the recipe's second stage reads.
const PILOT: u32 = 3;

/// One prober for each seed.
#[derive(Clone, Debug)]
pub struct Recipe {
    probes: Vec<(u64, Probe)>,
    pub positions: Positions,
}

impl Recipe {
    pub const SITE: Site = Site::FinalNorm;

    /// Fits a prober for each seed on the states of `train`; what is read stands beside a probe
    /// that reads at `positions`.
    pub async fn fit(
        bench: &Bench,
        train: &EvalSet,
        positions: Positions,
        seeds: &[u64],
        tick: Tick<'_>,
    ) -> Result<Self> {
        let positions = beside(positions);
        let states = states(bench, train, positions, tick).await?;
        let data = FitData {
            x: Array2::from_shape_vec((train.groups.len(), bench.d_model()), states)
                .map_err(Error::internal)?,
            y: train.positives().to_vec(),
            group: train.groups.clone(),
        };
        let (identity, d_model, seeds) = (identity(bench), bench.d_model(), seeds.to_vec());
        let probers = move || {
            let prober =
                |seed: u64| Ok((seed, prober(&data, &identity, d_model, positions, seed)?));
            seeds.into_iter().map(prober).collect::<Result<_>>()
        };
        Ok(Self {
            probes: off_thread(probers).await?,
            positions,
        })
    }

    pub fn seeds(&self) -> Vec<u64> {
        self.probes.iter().map(|(seed, _)| *seed).collect()
    }

    /// Logits of every row, a run per seed; above 0 is above the threshold of 0.5.
    pub async fn score(
        &self,
        bench: &Bench,
        set: &EvalSet,
        tick: Tick<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let states = states(bench, set, self.positions, tick).await?;
        let run = |(_, probe): &(u64, Probe)| {
            let logit = |state: &[f32]| {
                let output = probe.score_row(|_| state).map_err(Error::internal)?;
                Ok(output.logit)
            };
            states.chunks(bench.d_model()).map(logit).collect()
        };
        self.probes.iter().map(run).collect()
    }
}

fn prober(
    data: &FitData,
    identity: &ModelIdentity,
    d_model: usize,
    positions: Positions,
    seed: u64,
) -> Result<Probe> {
    let params = two_layer::Params {
        seed,
        ..two_layer::Params::default()
    };
    let fitted = two_layer::fit(data, Recipe::SITE, &params)?;
    let kind = Kind::TwoLayer;
    let manifest = Manifest::new("safeswitch", kind, d_model, positions, identity.clone());
    Probe::new(manifest, vec![fitted.head], Some(fitted.prober)).map_err(unfit)
}

/// The recipe reads the last prompt token, and of answers the third token, or the last of shorter
/// ones.
fn beside(positions: Positions) -> Positions {
    match positions {
        Positions::LastPromptToken | Positions::PromptContent => Positions::LastPromptToken,
        Positions::Generated(k) | Positions::FirstGenerated(k) => Positions::Generated(k),
        Positions::EveryGenerated => Positions::Generated(PILOT),
    }
}

/// `[rows, d_model]`
async fn states(
    bench: &Bench,
    set: &EvalSet,
    positions: Positions,
    tick: Tick<'_>,
) -> Result<Vec<f32>> {
    let mut states = Vec::with_capacity(set.groups.len() * bench.d_model());
    set.labelled
        .visit(bench, &[Recipe::SITE], positions, tick, |example, _| {
            let values = &example.states.values[0];
            // One token is read; were there more, the last would be the recipe's.
            states.extend_from_slice(&values[values.len() - bench.d_model()..]);
            Ok(())
        })
        .await?;
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_reads_one_token() {
        let reads = |positions| beside(positions).to_string();
        assert_eq!(reads(Positions::PromptContent), "last_prompt_token");
        assert_eq!(reads(Positions::EveryGenerated), "generated{3}");
        assert_eq!(reads(Positions::Generated(5)), "generated{5}");
    }
}
