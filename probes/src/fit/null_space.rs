//! Keeps a direction away from where given states lie: null-space-constrained steering.
//! The constraint is AlphaSteer's (arXiv 2506.07022, which learns a matrix under it) and AlphaEdit's
//! (arXiv 2410.02355); knows states and directions, not what they are for.

use linfa_linalg::eigh::{EigSort, EighInto};
use ndarray::{Array1, Array2, Axis};

use crate::error::{Error, Result};

/// How much of the states' space a direction must avoid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Avoid {
    /// The leading principal directions that hold this share of the variance, in (0, 1].
    Energy(f64),
    /// So many of them.
    Rank(usize),
}

/// A direction without its part in the states' principal subspace.
#[derive(Debug, Clone, PartialEq)]
pub struct OffSubspace {
    /// `[d_model]`, not brought to a length: what is left of the direction.
    pub direction: Vec<f32>,
    /// How many principal directions were avoided; the mean is avoided beside them.
    pub rank: usize,
    /// The share of the states' variance that those hold.
    pub energy: f64,
    /// Variance of the states along the direction, at unit length, before and after.
    pub variance: [f64; 2],
    /// Length of what is left over the length before.
    pub kept: f64,
}

/// Projects `direction` onto the orthogonal complement of the states' mean and of their leading
/// principal directions, so that `h . direction` hardly depends on which of these states `h` is.
///
/// AlphaSteer takes the principal directions of the uncentred second moment. Hidden states have a
/// few huge coordinates whose mean would be nearly all of it, so here the mean is one direction of
/// its own and the share is one of the variance around it. `states` is `[rows, d_model]`.
pub fn off_subspace(direction: &[f32], states: &Array2<f32>, avoid: Avoid) -> Result<OffSubspace> {
    avoid.check()?;
    if states.nrows() < 2 || states.ncols() != direction.len() {
        return Err(Error::data(
            "benign states",
            format!(
                "have shape {:?}; [at least 2 rows, {}] is needed",
                states.dim(),
                direction.len()
            ),
        ));
    }
    if states.iter().chain(direction).any(|v| !v.is_finite()) {
        return Err(Error::data("states", "must be finite"));
    }
    let rows = states.nrows() as f64;
    let states = states.mapv(f64::from);
    let mean = states.sum_axis(Axis(0)) / rows;
    let away = &states - &mean;
    let covariance = away.t().dot(&away) / rows;
    let before: Array1<f64> = direction.iter().map(|v| f64::from(*v)).collect();
    let variance = |d: &Array1<f64>| d.dot(&covariance.dot(d)) / d.dot(d).max(f64::MIN_POSITIVE);

    let (sizes, directions) = covariance
        .clone()
        .eigh_into()
        .map(|found| found.sort_eig_desc())
        .map_err(|e| {
            Error::data(
                "benign states",
                format!("have no principal directions: {e}"),
            )
        })?;
    let total: f64 = sizes.iter().map(|size| size.max(0.0)).sum();
    let rank = avoid.rank(sizes.as_slice().unwrap_or_default(), total);
    let mut after = before.clone();
    let mut basis: Vec<Array1<f64>> = Vec::with_capacity(rank + 1);
    // Principal directions are orthonormal already; the mean is not orthogonal to them.
    let columns = directions.axis_iter(Axis(1)).take(rank);
    for column in columns.map(|column| column.to_owned()).chain([mean]) {
        let mut column = column;
        let length = column.dot(&column).sqrt();
        // Twice, since once leaves rounding errors of the size of what was taken away.
        for _ in 0..2 {
            for other in &basis {
                let along = column.dot(other);
                column.scaled_add(-along, other);
            }
        }
        let left = column.dot(&column).sqrt();
        if left > 1e-9 * length {
            basis.push(column / left);
        }
    }
    for _ in 0..2 {
        for avoided in &basis {
            let along = after.dot(avoided);
            after.scaled_add(-along, avoided);
        }
    }
    let kept = (after.dot(&after) / before.dot(&before).max(f64::MIN_POSITIVE)).sqrt();
    if kept.is_nan() || kept <= 1e-3 {
        return Err(Error::data(
            "null_space",
            format!(
                "nothing of the direction lies outside {rank} principal directions of the benign \
                 states; take a smaller energy or rank"
            ),
        ));
    }
    let held: f64 = sizes.iter().take(rank).map(|size| size.max(0.0)).sum();
    Ok(OffSubspace {
        rank,
        energy: held / total.max(f64::MIN_POSITIVE),
        variance: [variance(&before), variance(&after)],
        kept,
        direction: after.iter().map(|v| *v as f32).collect(),
    })
}

impl Avoid {
    /// Refuses a share or a rank that means nothing.
    pub fn check(self) -> Result<()> {
        match self {
            Self::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                Err(Error::data("null_space_energy", "must lie in (0, 1]"))
            }
            Self::Rank(0) => Err(Error::data("null_space_rank", "must be above 0")),
            _ => Ok(()),
        }
    }

    /// How many of the variances, given from the largest on.
    fn rank(self, sizes: &[f64], total: f64) -> usize {
        let share = match self {
            Self::Rank(rank) => return rank.min(sizes.len()),
            Self::Energy(share) => share,
        };
        let mut held = 0.0;
        let enough = sizes.iter().position(|size| {
            held += size.max(0.0);
            held >= share * total * (1.0 - 1e-12)
        });
        enough.map_or(sizes.len(), |last| last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Spread 8, 4, 2, 1, ... along the axes, around a mean that is far from 0.
    fn states() -> Array2<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        Array2::from_shape_fn((500, 6), |(_, d)| {
            let spread = 8.0 / f32::from(1_u16 << d);
            spread * rng.gen_range(-1.0_f32..1.0) + if d == 5 { 50.0 } else { 0.0 }
        })
    }

    #[test]
    fn what_is_left_is_orthogonal_to_mean_and_principal_directions() {
        let direction = [1.0; 6];
        let left = off_subspace(&direction, &states(), Avoid::Rank(2)).unwrap();
        assert_eq!(left.rank, 2);
        // The axes of the widest spread and of the mean.
        for (axis, most) in [(0, 0.1), (1, 0.1), (5, 0.1)] {
            assert!(left.direction[axis].abs() < most, "{left:?}");
        }
        assert!(left.direction[2].abs() > 0.8, "{left:?}");
        assert!(left.variance[1] < 0.2 * left.variance[0], "{left:?}");
        assert!(left.kept > 0.5 && left.kept < 0.9, "{left:?}");
    }

    #[test]
    fn an_energy_takes_as_few_directions_as_hold_it() {
        let of = |energy| off_subspace(&[1.0; 6], &states(), Avoid::Energy(energy)).unwrap();
        // Variances go as 64, 16, 4, 1: the first holds three quarters, two hold 94 %.
        assert_eq!((of(0.7).rank, of(0.9).rank, of(0.97).rank), (1, 2, 3));
        assert!(of(0.9).energy >= 0.9);
    }

    #[test]
    fn a_direction_inside_the_subspace_has_nothing_left() {
        let all = off_subspace(&[1.0; 6], &states(), Avoid::Rank(6));
        assert!(all.unwrap_err().to_string().contains("smaller"));
    }

    #[test]
    fn states_and_shares_that_mean_nothing_are_refused() {
        for avoid in [
            Avoid::Energy(0.0),
            Avoid::Energy(1.5),
            Avoid::Energy(f64::NAN),
            Avoid::Rank(0),
        ] {
            assert!(off_subspace(&[1.0; 6], &states(), avoid).is_err());
        }
        assert!(off_subspace(&[1.0; 5], &states(), Avoid::Rank(1)).is_err());
        assert!(off_subspace(&[f32::NAN; 6], &states(), Avoid::Rank(1)).is_err());
    }
}
