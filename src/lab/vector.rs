//! `lab vector`: the direction from benign to harmful prompts, by the difference of means, and on
//! request without what benign states vary along.

use std::path::PathBuf;

use inwit_probes::fit::{Avoid, FitData, OffSubspace, difference_of_means, off_subspace};
use inwit_probes::vector::{NormStatistics, SteeringVector, VectorManifest};
use inwit_probes::{Metric, Site};
use ndarray::{Array2, Axis};

use super::bench::{Bench, Tick};
use super::examples::{check_harm, record};
use super::fit::{identity, unfit};
use super::rows;
use super::states::visit;
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};

/// Which direction, and where.
#[derive(Clone, Debug)]
pub struct Options {
    pub name: String,
    pub harmful: PathBuf,
    pub benign: PathBuf,
    pub site: Site,
    /// How much of the benign states' space the direction keeps out of.
    pub avoid: Option<Avoid>,
    /// The command line, for the record.
    pub command: String,
}

/// The vector, and what keeping out of the benign states' space left of it.
#[derive(Debug)]
pub struct Made {
    pub vector: SteeringVector,
    pub constrained: Option<OffSubspace>,
}

/// Mean state of the harmful prompts' last token minus that of the benign ones, in the site's own
/// units: adding it once moves a benign prompt's state to where harmful ones are.
///
/// With `avoid` the direction is projected off the benign states' mean and principal directions
/// (see `off_subspace`): what projects out or clamps along it, or reads it as a condition, then
/// leaves benign states nearly as they are.
pub async fn make(bench: &Bench, options: &Options, tick: Tick<'_>) -> Result<Made> {
    options.avoid.map_or(Ok(()), Avoid::check).map_err(unfit)?;
    let mut states = Vec::new();
    let (mut y, mut group, mut data) = (Vec::new(), Vec::new(), Vec::new());
    let site = options.site;
    for (file, positive) in [(&options.harmful, true), (&options.benign, false)] {
        let mut rows = rows::read(file)?;
        check_harm(file, &rows, positive)?;
        // Only the prompt is read.
        rows.iter_mut().for_each(|row| row.answer = None);
        data.push(record(file, rows.len())?);
        let name = file.display().to_string();
        let last = PositionSelection::LastPromptToken;
        visit(bench, &name, &rows, &[site], last, &mut *tick, |_, row| {
            states.extend_from_slice(&row.values[0]);
            group.push(y.len().to_string());
            y.push(positive);
            Ok(())
        })
        .await?;
    }
    let d_model = bench.d_model();
    let norms = norms(&states, d_model);
    let x = Array2::from_shape_vec((y.len(), d_model), states).map_err(Error::internal)?;
    let data_of = FitData { x, y, group };
    let (vector, constrained) = direction(&data_of, options.avoid)?;
    let mut manifest = VectorManifest::new(&options.name, site, d_model, norms, identity(bench));
    let mut metric = |name: &str, value: f64| {
        let metric = Metric {
            value,
            interval: None,
        };
        manifest.record.metrics.insert(name.into(), metric);
    };
    metric("length", f64::from(length(&vector)));
    if let Some(left) = &constrained {
        metric("null_space_rank", left.rank as f64);
        metric("null_space_energy", left.energy);
        metric("benign_variance_along_before", left.variance[0]);
        metric("benign_variance_along_after", left.variance[1]);
        metric("length_kept", left.kept);
    }
    manifest.record.data = data;
    manifest.record.command = options.command.clone();
    Ok(Made {
        vector: SteeringVector::new(manifest, vector).map_err(unfit)?,
        constrained,
    })
}

/// The difference of means, off the benign states' space where asked for.
fn direction(data: &FitData, avoid: Option<Avoid>) -> Result<(Vec<f32>, Option<OffSubspace>)> {
    let vector = difference_of_means(data).map_err(unfit)?;
    let Some(avoid) = avoid else {
        return Ok((vector, None));
    };
    let benign: Vec<usize> = (0..data.y.len()).filter(|row| !data.y[*row]).collect();
    let benign = data.x.select(Axis(0), &benign);
    let left = off_subspace(&vector, &benign, avoid).map_err(unfit)?;
    Ok((left.direction.clone(), Some(left)))
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|v| v * v).sum::<f32>().sqrt()
}

fn norms(states: &[f32], d_model: usize) -> NormStatistics {
    let lengths: Vec<f64> = states
        .chunks(d_model)
        .map(|h| h.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt())
        .collect();
    let count = lengths.len().max(1) as f64;
    let mean = lengths.iter().sum::<f64>() / count;
    let square = lengths
        .iter()
        .map(|length| (length - mean).powi(2))
        .sum::<f64>()
        / count;
    NormStatistics {
        mean: mean as f32,
        std: square.sqrt() as f32,
        rows: lengths.len() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::seeded::Seeded;

    #[test]
    fn a_constrained_direction_hardly_varies_over_benign_states() {
        let mut seeded = Seeded::new(2);
        // Benign states vary widely along the first axis; harm shifts the first and the third.
        let x = Array2::from_shape_fn((200, 3), |(row, d)| {
            let harmful = if row % 2 == 0 && d != 1 { 2.0 } else { 0.0 };
            let wide = if d == 0 { 8.0 } else { 0.5 };
            wide * seeded.signed() + harmful
        });
        let data = FitData {
            x,
            y: (0..200).map(|row| row % 2 == 0).collect(),
            group: (0..200).map(|row| row.to_string()).collect(),
        };
        let (plain, none) = direction(&data, None).expect("a direction");
        assert!(none.is_none() && plain[0].abs() > 0.5);
        let (kept_out, left) = direction(&data, Some(Avoid::Rank(1))).expect("a direction");
        let left = left.expect("constrained");
        assert!(left.variance[1] < 0.1 * left.variance[0], "{left:?}");
        assert!(kept_out[0].abs() < 0.3 && kept_out[2] > 1.0, "{kept_out:?}");
        assert!((length(&kept_out) / length(&plain) - left.kept as f32).abs() < 1e-4);
    }

    #[test]
    fn norms_are_those_of_the_states() {
        let norms = norms(&[3.0, 4.0, 0.0, 15.0], 2);
        assert_eq!((norms.mean, norms.std, norms.rows), (10.0, 5.0, 2));
    }
}
