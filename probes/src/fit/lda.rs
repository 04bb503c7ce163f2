//! Linear discriminant analysis: difference of means seen through the shared covariance,
//! shrunk towards its mean variance.

use ndarray::{Array1, Array2, Axis};

use super::FitData;
use super::means::{class_means, head_between, normalised};
use crate::error::{Error, Result};
use crate::manifest::NormKind;
use crate::probe::Head;
use crate::site::Site;

/// Refuses a share that does not shrink, or more than all of it.
pub fn check_shrinkage(shrinkage: f64) -> Result<()> {
    match shrinkage > 0.0 && shrinkage <= 1.0 {
        true => Ok(()),
        false => Err(Error::invalid("shrinkage", "must lie in (0, 1]")),
    }
}

/// `w = ((1 - s) C + s m I)^-1 (mean of positives - mean of negatives)` on standardised inputs,
/// with `C` the covariance within the classes, `m` its mean variance and `0 < s <= 1`.
/// Scaled like `fit_difference_of_means`.
pub fn fit_lda(data: &FitData, site: Site, shrinkage: f64) -> Result<Head> {
    data.check()?;
    check_shrinkage(shrinkage)?;
    let (norm, x) = normalised(&data.x, NormKind::Standard)?;
    let (positive, negative) = class_means(&x, &data.y);
    let mut covariance = within_classes(&x, &data.y, &positive, &negative);
    let dimensions = covariance.nrows();
    let variance = covariance.diag().sum() / dimensions as f64;
    covariance *= 1.0 - shrinkage;
    covariance
        .diag_mut()
        .map_inplace(|v| *v += shrinkage * variance);
    let direction = solve(covariance, &positive - &negative)
        .ok_or_else(|| Error::data("activations", "do not vary within the classes"))?;
    head_between(site, norm, direction, &positive, &negative)
}

fn within_classes(
    x: &Array2<f32>,
    y: &[bool],
    positive: &Array1<f64>,
    negative: &Array1<f64>,
) -> Array2<f64> {
    let mut away = x.mapv(f64::from);
    for (mut row, label) in away.axis_iter_mut(Axis(0)).zip(y) {
        row -= if *label { positive } else { negative };
    }
    away.t().dot(&away) / y.len() as f64
}

/// Solves `m x = b` for a symmetric positive definite `m` by Cholesky's decomposition.
fn solve(mut m: Array2<f64>, b: Array1<f64>) -> Option<Array1<f64>> {
    let n = b.len();
    for j in 0..n {
        for i in j..n {
            let done = m
                .row(i)
                .slice(ndarray::s![..j])
                .dot(&m.row(j).slice(ndarray::s![..j]));
            let rest = m[[i, j]] - done;
            if i == j {
                if !(rest.is_finite() && rest > 0.0) {
                    return None;
                }
                m[[j, j]] = rest.sqrt();
            } else {
                m[[i, j]] = rest / m[[j, j]];
            }
        }
    }
    let mut x = b;
    for i in 0..n {
        let done: f64 = (0..i).map(|k| m[[i, k]] * x[k]).sum();
        x[i] = (x[i] - done) / m[[i, i]];
    }
    for i in (0..n).rev() {
        let done: f64 = (i + 1..n).map(|k| m[[k, i]] * x[k]).sum();
        x[i] = (x[i] - done) / m[[i, i]];
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_separates, two_clouds};
    use super::*;
    use ndarray::array;

    #[test]
    fn lda_separates_two_clouds() {
        let head = fit_lda(&two_clouds(600, 24, 1), Site::ResidPost(3), 0.1).unwrap();
        check_separates(&head);
    }

    #[test]
    fn a_system_is_solved() {
        let m = array![[4.0, 2.0, 0.6], [2.0, 3.0, 0.4], [0.6, 0.4, 2.0]];
        let x = solve(m.clone(), array![1.0, -2.0, 3.0]).unwrap();
        let back = m.dot(&x);
        assert!(
            (back - array![1.0, -2.0, 3.0])
                .iter()
                .all(|e| e.abs() < 1e-12)
        );
        assert!(solve(array![[0.0]], array![1.0]).is_none());
    }

    #[test]
    fn shrinkage_outside_its_range_is_refused() {
        for shrinkage in [0.0, 1.5, f64::NAN] {
            assert!(fit_lda(&two_clouds(30, 4, 1), Site::Embed, shrinkage).is_err());
        }
    }
}
