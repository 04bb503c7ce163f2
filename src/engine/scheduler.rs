//! Decides which rows run next. Knows token counts and arrival order; knows no tensors, channels
//! or clocks.

/// What a running sequence could feed into the next pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    /// Tokens that are known and not yet computed: many while it is in prefill, then one.
    pub(super) tokens: usize,
    /// It has produced nothing yet.
    pub(super) prefill: bool,
}

/// How many tokens of each sequence run in the next step, in the order of `pending`.
///
/// Whoever decodes runs: nobody's next token waits for somebody else's prompt. Prompts share what
/// is left of `budget`, in order of arrival; at least one row of a prompt always runs, so that
/// many decoders cannot starve a newcomer.
pub(super) fn next_step(pending: &[Pending], budget: usize) -> Vec<usize> {
    let decoding: usize = pending
        .iter()
        .filter(|p| !p.prefill)
        .map(|p| p.tokens)
        .sum();
    let mut left = budget.saturating_sub(decoding).max(1);
    pending
        .iter()
        .map(|p| {
            if !p.prefill {
                return p.tokens;
            }
            let tokens = p.tokens.min(left);
            left -= tokens;
            tokens
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefill(tokens: usize) -> Pending {
        Pending {
            tokens,
            prefill: true,
        }
    }

    const DECODE: Pending = Pending {
        tokens: 1,
        prefill: false,
    };

    #[test]
    fn a_long_prompt_is_cut_to_what_the_decoders_leave() {
        assert_eq!(next_step(&[DECODE, prefill(100), DECODE], 10), [1, 8, 1]);
    }

    #[test]
    fn prompts_go_in_order_of_arrival() {
        assert_eq!(next_step(&[prefill(6), prefill(6)], 10), [6, 4]);
    }

    #[test]
    fn many_decoders_do_not_starve_a_prompt() {
        assert_eq!(next_step(&[DECODE, DECODE, prefill(5)], 2), [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn every_decoder_runs_and_something_always_moves(
            sizes in prop::collection::vec((1usize..50, any::<bool>()), 1..20), budget in 1usize..64
        ) {
            let pending: Vec<Pending> = sizes.iter().map(|(n, p)| if *p { prefill(*n) } else { DECODE }).collect();
            let step = next_step(&pending, budget);
            prop_assert!(step.iter().sum::<usize>() > 0);
            for (p, n) in pending.iter().zip(&step) {
                prop_assert!(*n <= p.tokens);
                prop_assert!(p.prefill || *n == 1);
            }
            let decoding = pending.iter().filter(|p| !p.prefill).count();
            prop_assert!(step.iter().sum::<usize>() <= budget.max(decoding + 1));
        }
    }
}
