//! How far judges agree with a hand-labelled sample and with each other.
//! Knows verdicts; knows no text.

use inwit_probes::metrics::clopper_pearson;
use serde::Serialize;

use super::Verdict;

/// How often each verdict met each other one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// `[reference][judged]`, in the order of `Verdict::ALL`.
    pub counts: [[u64; 3]; 3],
}

/// A share with its exact (Clopper-Pearson) 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    pub of: u64,
    pub hits: u64,
    pub interval: [f64; 2],
}

impl Share {
    /// `None` of nothing.
    pub fn of(hits: u64, of: u64) -> Option<Self> {
        let interval = clopper_pearson(hits, of, 0.95).ok()?;
        Some(Self { of, hits, interval })
    }

    pub fn value(&self) -> f64 {
        self.hits as f64 / self.of as f64
    }
}

impl Confusion {
    /// Pairs of what is right, or of one judge's verdict, and of the judge's.
    pub fn of(pairs: impl IntoIterator<Item = (Verdict, Verdict)>) -> Self {
        let mut confusion = Self::default();
        for (reference, judged) in pairs {
            confusion.counts[reference as usize][judged as usize] += 1;
        }
        confusion
    }

    pub fn total(&self) -> u64 {
        self.counts.iter().flatten().sum()
    }

    /// The share of pairs that agree.
    pub fn agreement(&self) -> Option<Share> {
        Share::of(self.on_diagonal(), self.total())
    }

    /// Of those judged so, how many are.
    pub fn precision(&self, verdict: Verdict) -> Option<Share> {
        Share::of(self.agreed(verdict), self.judged(verdict))
    }

    /// Of those that are so, how many were judged so.
    pub fn recall(&self, verdict: Verdict) -> Option<Share> {
        Share::of(self.agreed(verdict), self.reference(verdict))
    }

    /// Cohen's kappa (1960): agreement beyond that of two judges who toss coins with the same
    /// shares. `None` where chance alone agrees on everything.
    pub fn kappa(&self) -> Option<f64> {
        let total = self.total() as f64;
        let expected: f64 = Verdict::ALL
            .iter()
            .map(|v| self.judged(*v) as f64 * self.reference(*v) as f64)
            .sum::<f64>()
            / (total * total);
        let observed = self.on_diagonal() as f64 / total;
        (expected < 1.0).then(|| (observed - expected) / (1.0 - expected))
    }

    fn agreed(&self, verdict: Verdict) -> u64 {
        self.counts[verdict as usize][verdict as usize]
    }

    fn on_diagonal(&self) -> u64 {
        Verdict::ALL.iter().map(|v| self.agreed(*v)).sum()
    }

    fn judged(&self, verdict: Verdict) -> u64 {
        self.counts.iter().map(|row| row[verdict as usize]).sum()
    }

    fn reference(&self, verdict: Verdict) -> u64 {
        self.counts[verdict as usize].iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kappa_is_that_of_a_worked_example() {
        // Two classes: 20 and 15 agree, 5 and 10 do not; 0.7 observed, 0.5 by chance.
        let confusion = Confusion {
            counts: [[20, 5, 0], [10, 15, 0], [0, 0, 0]],
        };
        assert!((confusion.kappa().expect("is defined") - 0.4).abs() < 1e-12);
    }

    #[test]
    fn precision_is_of_what_was_judged_and_recall_of_what_is() {
        let confusion = Confusion {
            counts: [[8, 2, 0], [1, 3, 0], [0, 0, 0]],
        };
        let precision = confusion.precision(Verdict::Refused).expect("is defined");
        assert_eq!((precision.hits, precision.of), (3, 5));
        let recall = confusion.recall(Verdict::Refused).expect("is defined");
        assert_eq!((recall.hits, recall.of), (3, 4));
        let [low, high] = recall.interval;
        assert!(low < recall.value() && recall.value() < high);
        assert_eq!(confusion.precision(Verdict::Incoherent), None);
        assert_eq!(confusion.agreement().expect("is defined").hits, 11);
    }

    #[test]
    fn judges_who_say_the_same_of_everything_have_no_kappa() {
        let same = [(Verdict::Complied, Verdict::Complied); 4];
        assert_eq!(Confusion::of(same).kappa(), None);
        assert_eq!(Confusion::of([]).kappa(), None);
        let apart = [
            (Verdict::Complied, Verdict::Complied),
            (Verdict::Refused, Verdict::Refused),
        ];
        assert_eq!(Confusion::of(apart).kappa(), Some(1.0));
    }
}
