//! `lab vector`: the direction from benign to harmful prompts, by the difference of means.

use std::path::Path;

use inwit_probes::fit::{FitData, difference_of_means};
use inwit_probes::vector::{NormStatistics, SteeringVector, VectorManifest};
use inwit_probes::{Metric, Site};
use ndarray::Array2;

use super::bench::{Bench, Tick};
use super::examples::record;
use super::fit::{identity, unfit};
use super::rows;
use super::states::visit;
use crate::engine::request::PositionSelection;
use crate::error::{Error, Result};

/// Mean state of the harmful prompts' last token minus that of the benign ones, in the site's own
/// units: adding it once moves a benign prompt's state to where harmful ones are.
///
/// `files` are the harmful and the benign prompts; labels in them are not read.
pub async fn make(
    bench: &Bench,
    name: &str,
    files: [&Path; 2],
    site: Site,
    command: &str,
    tick: Tick<'_>,
) -> Result<SteeringVector> {
    let mut states = Vec::new();
    let (mut y, mut group, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for (file, positive) in files.into_iter().zip([true, false]) {
        let mut rows = rows::read(file)?;
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
    let vector = difference_of_means(&FitData { x, y, group }).map_err(unfit)?;
    let mut manifest = VectorManifest::new(name, site, d_model, norms, identity(bench));
    let length = f64::from(vector.iter().map(|v| v * v).sum::<f32>().sqrt());
    let metric = Metric {
        value: length,
        interval: None,
    };
    manifest.record.metrics.insert("length".into(), metric);
    manifest.record.data = data;
    manifest.record.command = command.to_owned();
    SteeringVector::new(manifest, vector).map_err(unfit)
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

    #[test]
    fn norms_are_those_of_the_states() {
        let norms = norms(&[3.0, 4.0, 0.0, 15.0], 2);
        assert_eq!((norms.mean, norms.std, norms.rows), (10.0, 5.0, 2));
    }
}
