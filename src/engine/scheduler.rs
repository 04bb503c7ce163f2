//! Decides which rows run next, from token counts, the order of arrival and how long earlier steps
//! took. Knows no tensors, channels or clocks.

/// What a running sequence could feed into the next pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens that are known and not yet computed: many while it is in prefill, then one.
    pub tokens: usize,
    /// Tokens that are computed: the position of the next row.
    pub computed: usize,
    /// It has produced nothing yet.
    pub prefill: bool,
}

/// How much of a step prompts may take beside those who decode.
///
/// A prompt as long as the budget takes a hundred times as long as one more token of everybody
/// else, so beside decoders prompts are read in pieces that take a share of the step's time
/// (chunked prefill: Agrawal et al. 2024, Sarathi-Serve, with time in place of tokens). How long
/// a piece takes is learnt from the steps that ran. Pieces change no bit of what is computed.
pub struct Pace {
    /// Rows of a step, at most.
    budget: usize,
    /// Seconds for prompts per second for decoders.
    prompts_per_decoder: f64,
    /// The position at which attention costs a row as much as the weights do.
    even_position: f64,
    /// What steps take in which so many rows decode and no prompt is read.
    decode: Vec<DecodeStep>,
    /// Seconds that prompts took, and their work, of late.
    prompts: (f64, f64),
}

/// What is known about the steps of one number of decoders.
#[derive(Clone, Copy, Default)]
struct DecodeStep {
    seconds: f64,
    /// How many were measured.
    measured: u32,
    /// How many steps read a prompt beside as many decoders since.
    since: u32,
}

/// Decode steps measured before any is believed, and steps with prompts until the next: contexts
/// grow.
const MEASURED: u32 = 2;
const STALE: u32 = 32;
/// How much longer a decode step may seem than the one before it: an interruption is no trend.
const GROWTH: f64 = 1.25;
/// How much of what is known about prompts one more step replaces.
const NEWEST: f64 = 0.1;
/// Rows of one sequence that attention takes at once.
const TILE: usize = 4;
/// Rows of prompts per step beside decoders while nothing is known about the time they take.
const FIRST_ROWS: f64 = 16.0;

impl Pace {
    /// `prefill_share`: percent of a step's time that prompts may take beside decoders.
    pub fn new(budget: usize, prefill_share: u8, even_position: f64) -> Self {
        let share = f64::from(prefill_share) / 100.0;
        Self {
            budget,
            prompts_per_decoder: share / (1.0 - share).max(0.0),
            even_position,
            decode: Vec::new(),
            prompts: (0.0, 0.0),
        }
    }

    /// How many tokens of each sequence run in the next step, in the order of `pending`.
    ///
    /// Whoever decodes runs: nobody's next token waits for somebody else's prompt. Prompts share
    /// what is left of the budget and of the time, in order of arrival; at least one row of a
    /// prompt runs, so that many decoders cannot starve a newcomer, save in the few steps that
    /// tell how long decoders take alone.
    pub fn next_step(&self, pending: &[Pending]) -> Vec<usize> {
        let decoding = decoders(pending);
        if decoding > 0 && self.prompts_per_decoder.is_finite() && !self.knows(decoding) {
            return pending
                .iter()
                .map(|p| if p.prefill { 0 } else { p.tokens })
                .collect();
        }
        let mut rows_left = self.budget.saturating_sub(decoding).max(1);
        let mut work_left = self.work_beside(decoding);
        let mut first = true;
        pending
            .iter()
            .map(|p| {
                if !p.prefill {
                    return p.tokens;
                }
                let in_time = self.rows_of(work_left, p.computed).max(usize::from(first));
                let tokens = piece_of(p.tokens, rows_left.min(in_time));
                rows_left -= tokens;
                work_left -= self.work(p.computed, tokens);
                first = false;
                tokens
            })
            .collect()
    }

    /// Takes note of a step of `rows` of `pending` that took so many seconds.
    pub fn learn(&mut self, pending: &[Pending], rows: &[usize], seconds: f64) {
        let decoding = decoders(pending);
        let prompts = pending.iter().zip(rows).filter(|(p, _)| p.prefill);
        let work: f64 = prompts.map(|(p, rows)| self.work(p.computed, *rows)).sum();
        if self.decode.len() <= decoding {
            self.decode.resize(decoding + 1, DecodeStep::default());
        }
        let known = &mut self.decode[decoding];
        if work > 0.0 {
            known.since = known.since.saturating_add(1);
            let beside = seconds - known.seconds;
            let (time, done) = &mut self.prompts;
            *time = *time * (1.0 - NEWEST) + beside.max(0.0);
            *done = *done * (1.0 - NEWEST) + work;
        } else {
            known.seconds = match known.measured {
                0 => seconds,
                n if n < MEASURED => known.seconds.min(seconds),
                _ => (known.seconds + seconds.min(known.seconds * GROWTH)) / 2.0,
            };
            known.measured = known.measured.saturating_add(1);
            known.since = 0;
        }
    }

    fn knows(&self, decoding: usize) -> bool {
        let known = self.decode.get(decoding);
        known.is_some_and(|known| known.measured >= MEASURED && known.since < STALE)
    }

    /// What prompts may do in a step in which so many sequences decode, in rows at position 0.
    fn work_beside(&self, decoding: usize) -> f64 {
        if decoding == 0 || self.prompts_per_decoder.is_infinite() {
            return f64::INFINITY;
        }
        let (time, done) = self.prompts;
        let decode = self.decode.get(decoding);
        match decode {
            Some(decode) if time > 0.0 => decode.seconds * self.prompts_per_decoder * done / time,
            _ => FIRST_ROWS,
        }
    }

    /// The work of `rows` rows from `position` on, in rows at position 0.
    fn work(&self, position: usize, rows: usize) -> f64 {
        let (position, rows) = (position as f64, rows as f64);
        rows + (position * rows + rows * rows / 2.0) / self.even_position
    }

    /// How many rows from `position` on are that much work: the inverse of `work`.
    fn rows_of(&self, work: f64, position: usize) -> usize {
        let slope = 1.0 + position as f64 / self.even_position;
        let root = (slope * slope + 2.0 * work.max(0.0) / self.even_position).sqrt();
        ((root - slope) * self.even_position) as usize
    }
}

/// How much of a prompt of `tokens` runs where `most` rows may: all of it, or as many rows as fill
/// whole tiles, since attention reads keys and values once for every tile and once more for what is
/// left over.
fn piece_of(tokens: usize, most: usize) -> usize {
    match most {
        _ if tokens <= most => tokens,
        0..TILE => most,
        _ => most - most % TILE,
    }
}

fn decoders(pending: &[Pending]) -> usize {
    let decoding = pending.iter().filter(|p| !p.prefill);
    decoding.map(|p| p.tokens).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVEN: f64 = 1000.0;

    fn prefill(tokens: usize) -> Pending {
        Pending {
            tokens,
            computed: 0,
            prefill: true,
        }
    }

    const DECODE: Pending = Pending {
        tokens: 1,
        computed: 100,
        prefill: false,
    };

    /// A pace that lets prompts take all the time they want.
    fn by_rows(budget: usize) -> Pace {
        Pace::new(budget, 100, EVEN)
    }

    /// Steps of a machine that needs 10 ms for any number of decoders and 1 ms per row's work.
    fn taught(share: u8) -> Pace {
        let mut pace = Pace::new(512, share, EVEN);
        for _ in 0..MEASURED {
            pace.learn(&[DECODE, DECODE], &[1, 1], 0.010);
        }
        for _ in 0..3 {
            let pending = [DECODE, prefill(40), DECODE];
            let work = pace.work(0, 40);
            pace.learn(&pending, &[1, 40, 1], 0.010 + 0.001 * work);
        }
        pace
    }

    #[test]
    fn a_long_prompt_is_cut_to_what_the_decoders_leave() {
        assert_eq!(
            by_rows(10).next_step(&[DECODE, prefill(100), DECODE]),
            [1, 8, 1]
        );
    }

    #[test]
    fn a_piece_of_a_prompt_is_whole_tiles_and_its_last_one_what_is_left() {
        let rows = |tokens| by_rows(12).next_step(&[DECODE, prefill(tokens)])[1];
        assert_eq!([100, 12, 11, 10, 1].map(rows), [8, 8, 11, 10, 1]);
        assert_eq!(by_rows(4).next_step(&[DECODE, prefill(100)]), [1, 3]);
    }

    #[test]
    fn prompts_go_in_order_of_arrival() {
        assert_eq!(by_rows(10).next_step(&[prefill(6), prefill(6)]), [6, 4]);
    }

    #[test]
    fn many_decoders_do_not_starve_a_prompt() {
        assert_eq!(
            by_rows(2).next_step(&[DECODE, DECODE, prefill(5)]),
            [1, 1, 1]
        );
        let mut pace = Pace::new(512, 1, EVEN);
        for _ in 0..MEASURED {
            pace.learn(&[DECODE], &[1], 1e-6);
        }
        pace.learn(&[DECODE, prefill(9)], &[1, 9], 10.0);
        assert_eq!(pace.next_step(&[DECODE, prefill(5), prefill(5)]), [1, 1, 0]);
    }

    #[test]
    fn beside_decoders_prompts_take_their_share_of_the_time() {
        // Of 10 ms for decoders, half of the step is 10 ms more: ten rows, of which two tiles are whole.
        let rows = |share: u8| taught(share).next_step(&[DECODE, DECODE, prefill(400)])[2];
        assert_eq!([rows(50), rows(75)], [8, 28]);
    }

    #[test]
    fn a_row_far_into_a_prompt_counts_for_more() {
        let far = Pending {
            computed: 3 * EVEN as usize,
            ..prefill(400)
        };
        // As much as 28 rows at the start of one.
        assert_eq!(taught(75).next_step(&[DECODE, DECODE, far])[2], 4);
    }

    #[test]
    fn a_prompt_alone_gets_the_whole_budget() {
        assert_eq!(taught(50).next_step(&[prefill(4000)]), [512]);
    }

    #[test]
    fn a_slower_machine_gives_prompts_fewer_rows() {
        let mut pace = taught(50);
        let before = pace.next_step(&[DECODE, DECODE, prefill(400)])[2];
        for _ in 0..9 {
            pace.learn(&[DECODE, DECODE, prefill(9)], &[1, 1, 9], 0.100);
        }
        let rows = pace.next_step(&[DECODE, DECODE, prefill(400)])[2];
        assert!((1..before).contains(&rows));
    }

    #[test]
    fn how_long_decoders_take_alone_is_measured_before_prompts_join_them_and_now_and_then() {
        let mut pace = taught(50);
        let three = [DECODE, DECODE, DECODE, prefill(400)];
        for _ in 0..MEASURED {
            assert_eq!(pace.next_step(&three), [1, 1, 1, 0]);
            pace.learn(&three, &[1, 1, 1, 0], 0.012);
        }
        for _ in 0..STALE {
            assert!(pace.next_step(&three)[3] > 0);
            pace.learn(&three, &[1, 1, 1, 9], 0.022);
        }
        assert_eq!(pace.next_step(&three), [1, 1, 1, 0]);
    }

    #[test]
    fn one_interrupted_step_does_not_pass_for_a_slow_machine() {
        let mut pace = taught(50);
        pace.learn(&[DECODE, DECODE], &[1, 1], 3.0);
        assert_eq!(pace.next_step(&[DECODE, DECODE, prefill(400)])[2], 8);
    }

    proptest! {
        #[test]
        fn every_decoder_runs_and_something_always_moves(
            sizes in prop::collection::vec((1usize..50, any::<bool>()), 1..20), budget in 1usize..64
        ) {
            let pending: Vec<Pending> = sizes.iter().map(|(n, p)| if *p { prefill(*n) } else { DECODE }).collect();
            let step = by_rows(budget).next_step(&pending);
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
