//! Difference of means: the plainest probe, and the direction that steering uses.

use ndarray::{Array1, Array2, Axis};

use super::{FitData, standardisation};
use crate::error::{Error, Result};
use crate::manifest::NormKind;
use crate::probe::{Head, InputNorm};
use crate::site::Site;

/// Mean of the positives minus mean of the negatives, `[d_model]`, in the units of the site.
pub fn difference_of_means(data: &FitData) -> Result<Vec<f32>> {
    data.check()?;
    let (positive, negative) = class_means(&data.x, &data.y);
    Ok((positive - negative).iter().map(|d| *d as f32).collect())
}

/// A head along the difference of means, scaled so that the mean positive has logit 1 and the
/// mean negative -1. Its logits rank; a calibration gives them meaning.
pub fn fit_difference_of_means(data: &FitData, site: Site, norm: NormKind) -> Result<Head> {
    data.check()?;
    let (norm, x) = normalised(&data.x, norm)?;
    let (positive, negative) = class_means(&x, &data.y);
    let apart = &positive - &negative;
    head_between(site, norm, apart, &positive, &negative)
}

/// A head along `direction` whose logit is 1 at one mean and -1 at the other.
pub(super) fn head_between(
    site: Site,
    norm: InputNorm,
    direction: Array1<f64>,
    positive: &Array1<f64>,
    negative: &Array1<f64>,
) -> Result<Head> {
    let half = direction.dot(&(positive - negative)) / 2.0;
    if !(half.is_finite() && half > 0.0) {
        return Err(Error::data(
            "activations",
            "have the same mean in both classes",
        ));
    }
    let weight = direction / half;
    let middle = (positive + negative) / 2.0;
    Ok(Head {
        site,
        bias: vec![-weight.dot(&middle) as f32],
        weight: weight.iter().map(|w| *w as f32).collect(),
        out: 1,
        norm,
    })
}

pub(super) fn normalised(x: &Array2<f32>, norm: NormKind) -> Result<(InputNorm, Array2<f32>)> {
    Ok(match norm {
        NormKind::None => (InputNorm::None, x.clone()),
        NormKind::Standard => {
            let (mean, scale) = standardisation(x);
            let shifted = x - &Array1::from(mean.clone());
            let x = shifted / &Array1::from(scale.clone());
            (InputNorm::Standard { mean, scale }, x)
        }
        NormKind::Unit => {
            let mut x = x.clone();
            for (row, mut state) in x.rows_mut().into_iter().enumerate() {
                let length = state
                    .iter()
                    .map(|h| f64::from(*h).powi(2))
                    .sum::<f64>()
                    .sqrt();
                if length == 0.0 {
                    return Err(Error::data("activations", format!("row {row} is all zero")));
                }
                state.mapv_inplace(|h| (f64::from(h) / length) as f32);
            }
            (InputNorm::Unit, x)
        }
    })
}

pub(super) fn class_means(x: &Array2<f32>, y: &[bool]) -> (Array1<f64>, Array1<f64>) {
    let mean = |class: bool| {
        let mut sum = Array1::<f64>::zeros(x.ncols());
        let mut count = 0.0;
        for (row, _) in x
            .axis_iter(Axis(0))
            .zip(y)
            .filter(|(_, label)| **label == class)
        {
            sum += &row.mapv(f64::from);
            count += 1.0;
        }
        sum / count
    };
    (mean(true), mean(false))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_separates, logits, two_clouds};
    use super::*;

    #[test]
    fn a_standardised_difference_of_means_separates_two_clouds() {
        let data = two_clouds(600, 24, 1);
        let head = fit_difference_of_means(&data, Site::ResidPost(3), NormKind::Standard).unwrap();
        check_separates(&head);
    }

    #[test]
    fn class_means_have_the_logits_one_and_minus_one() {
        for norm in [NormKind::None, NormKind::Standard, NormKind::Unit] {
            let mut data = two_clouds(300, 8, 2);
            // Without the huge dimension, f32 keeps the digits that this test counts.
            data.x.column_mut(0).fill(1.0);
            let head = fit_difference_of_means(&data, Site::Embed, norm).unwrap();
            let logits = logits(&head, &data.x);
            for (class, expected) in [(true, 1.0), (false, -1.0)] {
                let of_class = crate::metrics::of_class(&logits, &data.y, class);
                let mean = of_class.iter().sum::<f32>() / of_class.len() as f32;
                assert!((mean - expected).abs() < 1e-3, "{norm:?} {class} {mean}");
            }
        }
    }

    #[test]
    fn the_direction_points_from_negatives_to_positives() {
        let data = two_clouds(900, 8, 3);
        let direction = difference_of_means(&data).unwrap();
        assert!(
            (direction[2] - 1.0).abs() < 0.3 && direction[3].abs() < 0.3,
            "{direction:?}"
        );
    }

    #[test]
    fn classes_with_one_mean_have_no_direction() {
        let data = FitData {
            x: Array2::ones((4, 3)),
            y: vec![true, false, true, false],
            group: vec![String::new(); 4],
        };
        assert!(fit_difference_of_means(&data, Site::Embed, NormKind::None).is_err());
    }
}
