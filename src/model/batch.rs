//! One step's rows: all tokens of all running sequences, packed without padding.

/// Rows of a step. Row `i` is `tokens[i]` at `positions[i]` of the sequence whose span holds it.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// Disjoint, in row order, covering all rows.
    pub spans: Vec<Span>,
}

/// The rows of one sequence: consecutive positions from `start`.
#[derive(Clone, Debug)]
pub struct Span {
    pub first_row: usize,
    pub rows: usize,
    pub start: usize,
    /// The sequence's KV blocks, enough for `start + rows` positions.
    pub blocks: Vec<u32>,
}

impl Batch {
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Appends consecutive tokens of one sequence.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: Vec<u32>) {
        self.spans.push(Span {
            first_row: self.tokens.len(),
            rows: tokens.len(),
            start,
            blocks,
        });
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((start..start + tokens.len()).map(|position| position as u32));
    }
}
