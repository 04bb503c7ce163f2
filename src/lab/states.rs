//! The hidden states of one data row, put together from what the engine captured.
//! Knows sites and positions; knows no files and no fitting.

use inwit_probes::Site;

use super::bench::{Bench, Done, Tick, reading};
use super::rows::Row;
use crate::engine::event::Captured;
use crate::engine::request::{PositionSelection, Request};
use crate::error::{Error, Result};

/// States of consecutive or chosen positions, the same at every site.
#[derive(Clone, Debug, PartialEq)]
pub struct RowStates {
    pub positions: Vec<u32>,
    /// The token at each position.
    pub tokens: Vec<u32>,
    /// Per site, in the order asked for: `[positions.len(), d_model]`, row-major.
    pub values: Vec<Vec<f32>>,
}

impl RowStates {
    /// Joins pieces that came in any order of sites and chunks.
    pub fn join(captured: &[Captured], sites: &[Site], d_model: usize) -> Result<Self> {
        let mut joined: Option<Self> = None;
        for site in sites {
            let mut pieces: Vec<_> = captured.iter().filter(|p| p.site == *site).collect();
            pieces.sort_by_key(|piece| piece.first_position);
            let index = |piece: &&Captured| {
                (piece.first_position..)
                    .zip(piece.tokens.clone())
                    .collect::<Vec<_>>()
            };
            let (positions, tokens) = pieces.iter().flat_map(index).unzip();
            let values: Vec<f32> = pieces
                .iter()
                .flat_map(|p| p.values.iter().copied())
                .collect();
            let joined = joined.get_or_insert_with(|| Self {
                positions: Vec::clone(&positions),
                tokens: Vec::clone(&tokens),
                values: Vec::new(),
            });
            if joined.positions != positions || joined.tokens != tokens {
                return Err(Error::internal(format!(
                    "{site} was captured at other positions"
                )));
            }
            if values.len() != positions.len() * d_model {
                return Err(Error::internal(format!(
                    "{site}: a state is not d_model wide"
                )));
            }
            joined.values.push(values);
        }
        joined.ok_or_else(|| Error::invalid("site", "name at least one site"))
    }

    /// The states at the positions that `keep` holds for.
    pub fn filter(self, keep: impl Fn(u32) -> bool) -> Self {
        let count = self.positions.len().max(1);
        let kept: Vec<usize> = (0..self.positions.len())
            .filter(|index| keep(self.positions[*index]))
            .collect();
        let values = |values: &Vec<f32>| {
            let width = values.len() / count;
            let row = |index: &usize| &values[index * width..(index + 1) * width];
            kept.iter().flat_map(row).copied().collect()
        };
        Self {
            positions: kept.iter().map(|index| self.positions[*index]).collect(),
            tokens: kept.iter().map(|index| self.tokens[*index]).collect(),
            values: self.values.iter().map(values).collect(),
        }
    }
}

/// Reads the states of every row at the sites, prefill only, answers taken from the rows, and hands
/// them over in the order of the rows, so that the caller holds no more than it keeps.
pub async fn visit(
    bench: &Bench,
    file: &str,
    rows: &[Row],
    sites: &[Site],
    positions: PositionSelection,
    tick: Tick<'_>,
    mut each: impl FnMut(Request, RowStates) -> Result<()>,
) -> Result<()> {
    bench.check_sites(sites)?;
    let requests = bench.prepare(file, rows, |row| reading(row, sites, positions))?;
    let d_model = bench.d_model();
    let each = |done: Done<'_>| {
        let states = RowStates::join(&done.outcome.captured, sites, d_model)?;
        each(done.request, states)
    };
    bench.run(file, rows, requests, tick, each).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLY: &str = "blocks.0.hook_resid_post";
    const LATE: &str = "blocks.1.hook_resid_post";

    fn site(name: &str) -> Site {
        name.parse().expect("a site")
    }

    fn piece(name: &str, first_position: u32, tokens: &[u32], start: f32) -> Captured {
        let values = (0..tokens.len() * 2).map(|i| start + i as f32).collect();
        Captured {
            site: site(name),
            first_position,
            tokens: tokens.to_vec(),
            values,
        }
    }

    #[test]
    fn chunks_are_joined_in_order_of_position() {
        let captured = [
            piece(EARLY, 2, &[30], 14.0),
            piece(LATE, 0, &[10, 20, 30], 20.0),
            piece(EARLY, 0, &[10, 20], 10.0),
        ];
        let states = RowStates::join(&captured, &[site(LATE), site(EARLY)], 2).expect("joins");
        assert_eq!(states.positions, [0, 1, 2]);
        assert_eq!(states.tokens, [10, 20, 30]);
        assert_eq!(states.values[0], [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]);
        assert_eq!(states.values[1], [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
    }

    #[test]
    fn a_filter_keeps_whole_rows() {
        let states = RowStates::join(&[piece(EARLY, 4, &[1, 2, 3], 0.0)], &[site(EARLY)], 2);
        let states = states.expect("joins").filter(|position| position != 5);
        assert_eq!(states.positions, [4, 6]);
        assert_eq!(states.values, [[0.0, 1.0, 4.0, 5.0]]);
    }

    #[test]
    fn sites_that_disagree_are_an_error() {
        let captured = [piece(EARLY, 0, &[1], 0.0), piece(LATE, 1, &[1], 0.0)];
        assert!(RowStates::join(&captured, &[site(EARLY), site(LATE)], 2).is_err());
    }

    #[test]
    fn a_state_of_another_width_is_an_error() {
        assert!(RowStates::join(&[piece(EARLY, 0, &[1], 0.0)], &[site(EARLY)], 3).is_err());
    }
}
