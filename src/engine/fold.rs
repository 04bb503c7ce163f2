//! Folds a stream of events into the answer it leaves: deltas minus retracts plus replacements.
//! The unary reply, the offline row and the streaming client all use it, so they agree byte for byte.

use super::event::{Completed, Delta, Event, Retract, Verdict};
use super::sampler::TokenLogprobs;
use crate::error::{Error, Result};

#[derive(Clone, Debug, Default)]
pub struct Folded {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub verdicts: Vec<Verdict>,
    pub completed: Option<Completed>,
}

impl Folded {
    /// Takes in one event. A `Failed` is returned as its error.
    pub fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Started(_) | Event::Captured(_) => {}
            Event::Delta(delta) => self.extend(delta),
            Event::Verdict(verdict) => self.verdicts.push(verdict),
            Event::Retract(retract) => self.retract(retract)?,
            Event::Completed(completed) => self.completed = Some(*completed),
            Event::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn extend(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.token_ids.extend(delta.token_ids);
        self.logprobs.extend(delta.logprobs);
    }

    fn retract(&mut self, retract: Retract) -> Result<()> {
        let keep = retract.keep_text_bytes as usize;
        if !self.text.is_char_boundary(keep) {
            return Err(Error::internal("a retract cut a character"));
        }
        self.text.truncate(keep);
        self.text.push_str(&retract.replacement_text);
        self.token_ids.truncate(retract.keep_token_count as usize);
        self.logprobs.truncate(retract.keep_token_count as usize);
        self.token_ids.extend(retract.replacement_token_ids);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(text: &str, ids: &[u32]) -> Event {
        Event::Delta(Delta {
            text: text.into(),
            token_ids: ids.to_vec(),
            ..Delta::default()
        })
    }

    #[test]
    fn deltas_minus_retracts_plus_replacement() {
        let mut folded = Folded::default();
        folded.take(delta("Sure, ", &[1, 2])).expect("folds");
        folded.take(delta("here", &[3])).expect("folds");
        let retract = Retract {
            keep_token_count: 0,
            keep_text_bytes: 0,
            replacement_text: "I can't help.".into(),
            replacement_token_ids: vec![9, 8],
        };
        folded.take(Event::Retract(retract)).expect("folds");
        assert_eq!(folded.text, "I can't help.");
        assert_eq!(folded.token_ids, [9, 8]);
    }

    #[test]
    fn a_retract_inside_a_character_is_an_error() {
        let mut folded = Folded::default();
        folded.take(delta("é", &[1])).expect("folds");
        let retract = Retract {
            keep_token_count: 0,
            keep_text_bytes: 1,
            replacement_text: String::new(),
            replacement_token_ids: vec![],
        };
        assert!(folded.take(Event::Retract(retract)).is_err());
    }

    #[test]
    fn a_failure_is_its_error() {
        let error = Error::Cancelled;
        assert_eq!(
            Folded::default().take(Event::Failed(error.clone())),
            Err(error)
        );
    }
}
