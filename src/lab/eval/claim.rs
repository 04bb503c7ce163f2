//! When one scorer may be called better than another: when their intervals are apart, and then only.

use serde::Serialize;

use super::measure::Measured;

/// What may be said of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    Beats,
    IsBeatenBy,
    /// The intervals meet, or one is not known.
    NoClaim,
}

impl Claim {
    /// Of two numbers of which the greater one is the better.
    pub fn of(ours: &Measured, theirs: &Measured) -> Self {
        let (Some(ours), Some(theirs)) = (ours.interval, theirs.interval) else {
            return Self::NoClaim;
        };
        match () {
            () if ours[0] > theirs[1] => Self::Beats,
            () if ours[1] < theirs[0] => Self::IsBeatenBy,
            () => Self::NoClaim,
        }
    }
}

/// What is said of the probe and a baseline by one number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClaimRow {
    pub number: String,
    pub against: String,
    pub claim: Claim,
    pub ours: Measured,
    pub theirs: Measured,
}

impl ClaimRow {
    /// As a sentence about the probe; says nothing of who is ahead where nothing may be said.
    pub fn sentence(&self) -> String {
        let (number, against) = (&self.number, &self.against);
        match self.claim {
            Claim::Beats => format!("{number}: beats {against}, intervals apart"),
            Claim::IsBeatenBy => format!("{number}: is beaten by {against}, intervals apart"),
            Claim::NoClaim => format!("{number}: no claim against {against}, intervals overlap"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn measured(value: f64, interval: Option<[f64; 2]>) -> Measured {
        Measured {
            value,
            interval,
            seeds: None,
        }
    }

    fn between(low: f64, high: f64) -> Measured {
        measured((low + high) / 2.0, Some([low, high]))
    }

    #[test]
    fn only_intervals_that_are_apart_make_a_claim() {
        let high = between(0.8, 0.9);
        assert_eq!(Claim::of(&high, &between(0.6, 0.79)), Claim::Beats);
        assert_eq!(Claim::of(&between(0.6, 0.79), &high), Claim::IsBeatenBy);
        assert_eq!(Claim::of(&high, &between(0.6, 0.8)), Claim::NoClaim);
        assert_eq!(Claim::of(&high, &measured(0.1, None)), Claim::NoClaim);
    }

    #[test]
    fn a_sentence_without_a_claim_tells_nobody_ahead() {
        let row = ClaimRow {
            number: "AUROC".into(),
            against: "length only".into(),
            claim: Claim::NoClaim,
            ours: between(0.8, 0.9),
            theirs: between(0.7, 0.85),
        };
        let said = row.sentence();
        assert!(!said.contains("beat") && !said.contains("better"), "{said}");
    }

    proptest! {
        #[test]
        fn a_claim_turned_round_is_its_opposite(
            a in (0.0f64..1.0, 0.0f64..0.3), b in (0.0f64..1.0, 0.0f64..0.3),
        ) {
            let (a, b) = (between(a.0, a.0 + a.1), between(b.0, b.0 + b.1));
            let opposite = match Claim::of(&b, &a) {
                Claim::Beats => Claim::IsBeatenBy,
                Claim::IsBeatenBy => Claim::Beats,
                Claim::NoClaim => Claim::NoClaim,
            };
            prop_assert_eq!(Claim::of(&a, &b), opposite);
        }
    }
}
