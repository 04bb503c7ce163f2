//! Logistic regression on sparse rows, for baselines with ten thousand features.
//! linfa's takes dense rows only, which for a bag of words would be gigabytes of zeros.

/// The features of one row that are not zero: `(feature, value)`.
pub type SparseRow = Vec<(u32, f32)>;

/// `logit = weight x + bias`
#[derive(Clone, Debug, PartialEq)]
pub struct Plane {
    pub weight: Vec<f64>,
    pub bias: f64,
}

/// Rows to learn from. Both classes weigh the same, whatever their numbers.
#[derive(Clone, Copy, Debug)]
pub struct Training<'a> {
    pub rows: &'a [&'a SparseRow],
    pub y: &'a [bool],
    pub features: usize,
}

const MAX_STEPS: usize = 2000;
/// The loss is then within `tolerance^2 / (2 penalty)` of its minimum.
const GRADIENT_TOLERANCE: f64 = 1e-4;

impl Plane {
    pub fn zero(features: usize) -> Self {
        Self {
            weight: vec![0.0; features],
            bias: 0.0,
        }
    }

    /// Minimises `weighted mean log loss + penalty / 2 |weight|^2` from `start`, by accelerated
    /// gradient steps that begin anew when they overshoot (Nesterov 1983; O'Donoghue and Candès
    /// 2015). The loss is convex, so where it starts does not matter for where it ends.
    pub fn fit(training: &Training<'_>, penalty: f64, start: Self) -> Self {
        let weights = class_weights(training.y);
        let length = |row: &&SparseRow| row.iter().map(|(_, v)| f64::from(*v).powi(2)).sum::<f64>();
        let longest = training.rows.iter().map(length).fold(0.0, f64::max);
        // A bound on the curvature: the logistic loss bends by at most a quarter.
        let step = 1.0 / (0.25 * (longest + 1.0) + penalty);
        let (mut now, mut ahead, mut pace) = (start.clone(), start, 1.0_f64);
        for _ in 0..MAX_STEPS {
            let gradient = ahead.gradient(training, &weights, penalty);
            if gradient.length() <= GRADIENT_TOLERANCE {
                return ahead;
            }
            let next = ahead.plus(&gradient, -step);
            let moved = next.plus(&now, -1.0);
            let next_pace = (1.0 + (1.0 + 4.0 * pace * pace).sqrt()) / 2.0;
            if gradient.dot(&moved) > 0.0 {
                (ahead, pace) = (next.clone(), 1.0);
            } else {
                ahead = next.plus(&moved, (pace - 1.0) / next_pace);
                pace = next_pace;
            }
            now = next;
        }
        now
    }

    pub fn logit(&self, row: &SparseRow) -> f64 {
        let term = |(feature, value): &(u32, f32)| {
            let weight = self.weight.get(*feature as usize);
            weight.copied().unwrap_or(0.0) * f64::from(*value)
        };
        row.iter().map(term).sum::<f64>() + self.bias
    }

    /// Mean over both classes of the log loss; 0 of nothing.
    pub fn log_loss(&self, rows: &[&SparseRow], y: &[bool]) -> f64 {
        let weights = class_weights(y);
        let loss = |(row, positive): (&&SparseRow, &bool)| {
            let sign = if *positive { -1.0 } else { 1.0 };
            weights[usize::from(*positive)] * softplus(sign * self.logit(row))
        };
        rows.iter().zip(y).map(loss).sum::<f64>() / y.len().max(1) as f64
    }

    fn gradient(&self, training: &Training<'_>, weights: &[f64; 2], penalty: f64) -> Self {
        let mut gradient = Self::zero(self.weight.len());
        let count = training.y.len().max(1) as f64;
        for (row, positive) in training.rows.iter().zip(training.y) {
            let target = f64::from(u8::from(*positive));
            let error = (sigmoid(self.logit(row)) - target) * weights[usize::from(*positive)];
            for (feature, value) in row.iter() {
                gradient.weight[*feature as usize] += error * f64::from(*value) / count;
            }
            gradient.bias += error / count;
        }
        for (slope, weight) in gradient.weight.iter_mut().zip(&self.weight) {
            *slope += penalty * weight;
        }
        gradient
    }

    fn plus(&self, other: &Self, factor: f64) -> Self {
        let pairs = self.weight.iter().zip(&other.weight);
        Self {
            weight: pairs.map(|(a, b)| a + factor * b).collect(),
            bias: self.bias + factor * other.bias,
        }
    }

    fn dot(&self, other: &Self) -> f64 {
        let pairs = self.weight.iter().zip(&other.weight);
        pairs.map(|(a, b)| a * b).sum::<f64>() + self.bias * other.bias
    }

    fn length(&self) -> f64 {
        self.dot(self).sqrt()
    }
}

/// Of `[negatives, positives]`: half of all rows' weight each, 1 on average.
fn class_weights(y: &[bool]) -> [f64; 2] {
    let positives = y.iter().filter(|positive| **positive).count();
    let half = y.len() as f64 / 2.0;
    match (y.len() - positives, positives) {
        (0, _) | (_, 0) => [1.0, 1.0],
        (negatives, positives) => [half / negatives as f64, half / positives as f64],
    }
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fit(rows: &[SparseRow], y: &[bool], features: usize, penalty: f64) -> Plane {
        let rows: Vec<&SparseRow> = rows.iter().collect();
        let training = Training {
            rows: &rows,
            y,
            features,
        };
        Plane::fit(&training, penalty, Plane::zero(features))
    }

    #[test]
    fn one_feature_has_the_weight_of_its_equation() {
        // Two rows at -1 and 1: the gradient vanishes where sigmoid(-w) = penalty * w; with
        // w = 1 that is penalty = sigmoid(-1).
        let rows = [vec![(0, -1.0)], vec![(0, 1.0)]];
        let plane = fit(&rows, &[false, true], 1, sigmoid(-1.0));
        assert!((plane.weight[0] - 1.0).abs() < 1e-3, "{plane:?}");
        assert!(plane.bias.abs() < 1e-3);
    }

    #[test]
    fn classes_weigh_the_same_whatever_their_numbers() {
        // Nothing tells the rows apart, so an even chance is all that can be said.
        let rows = vec![vec![(0, 1.0)]; 10];
        let y: Vec<bool> = (0..10).map(|row| row == 0).collect();
        let plane = fit(&rows, &y, 1, 0.1);
        assert!(plane.logit(&rows[0]).abs() < 1e-3, "{plane:?}");
    }

    #[test]
    fn a_feature_never_seen_weighs_nothing() {
        let plane = fit(&[vec![(0, 1.0)], vec![(1, 1.0)]], &[true, false], 2, 0.1);
        assert_eq!(plane.logit(&vec![(7, 3.0)]), plane.bias);
    }

    proptest! {
        #[test]
        fn no_step_away_from_the_fit_is_better(
            values in prop::collection::vec((-2.0f32..2.0, -2.0f32..2.0, any::<bool>()), 4..20),
            away in (-0.1f64..0.1, -0.1f64..0.1, -0.1f64..0.1),
        ) {
            let rows: Vec<SparseRow> = values.iter().map(|v| vec![(0, v.0), (1, v.1)]).collect();
            let y: Vec<bool> = values.iter().map(|v| v.2).collect();
            let penalty = 0.1;
            let plane = fit(&rows, &y, 2, penalty);
            let refs: Vec<&SparseRow> = rows.iter().collect();
            let cost = |plane: &Plane| {
                let length: f64 = plane.weight.iter().map(|w| w * w).sum();
                plane.log_loss(&refs, &y) + penalty / 2.0 * length
            };
            let other = Plane {
                weight: vec![plane.weight[0] + away.0, plane.weight[1] + away.1],
                bias: plane.bias + away.2,
            };
            prop_assert!(cost(&plane) <= cost(&other) + 1e-6);
        }
    }
}
