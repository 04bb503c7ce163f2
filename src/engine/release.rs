//! Decides which of an answer's tokens may leave, and with which text.
//! Knows bytes and counts; knows no policy (it is told how many tokens are allowed), tokenizer or channel.

use std::ops::Range;

use super::sampler::TokenLogprobs;

/// The decided tokens of one answer, and how many of them have left.
///
/// Three holds apply, each to whole tokens, and a token leaves when none of them keeps it:
/// - the *stop hold* keeps a token whose tail may yet turn out to begin a stop string;
/// - the *UTF-8 hold* keeps a token that ends inside a character until the tokens that complete it leave with it;
/// - the *policy hold* is the caller's `allowed`.
///
/// A stop string is matched on bytes, wherever token boundaries fall.
/// The match that ends first counts, and of those that end together the longest; the answer's text ends right before it.
/// The tokens of the answer are those with at least one byte in that text, and the ones without bytes in between,
/// so text and token ids end at the same place.
/// The text of all that leaves is `String::from_utf8_lossy` of those bytes, however the calls to `release` fall.
#[derive(Clone, Debug)]
pub struct Release {
    stops: Vec<StopMatcher>,
    tokens: Vec<DecidedToken>,
    /// Of all decided tokens.
    bytes: Vec<u8>,
    /// Where the text ends, once that is known.
    text_end: Option<usize>,
    released: usize,
    /// How many of `bytes` have left.
    released_bytes: usize,
    /// How many bytes of UTF-8 they became.
    released_text_bytes: usize,
}

#[derive(Clone, Debug)]
struct DecidedToken {
    id: u32,
    /// Its bytes end here, and the next token's start.
    end: usize,
    logprobs: Option<TokenLogprobs>,
}

/// What leaves at once.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Released {
    /// May be empty: some tokens have no bytes.
    pub text: String,
    pub token_ids: Vec<u32>,
    /// Of the tokens that were decided with log-probabilities.
    pub logprobs: Vec<TokenLogprobs>,
    /// Which of the answer's tokens left, 0-based.
    pub tokens: Range<usize>,
}

/// What a rewind took back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Withdrawn {
    /// Tokens that had left.
    pub released_tokens: usize,
    /// Bytes of UTF-8 that had left.
    pub released_text_bytes: usize,
    /// Tokens that were decided and never left.
    pub withheld_tokens: usize,
}

impl Release {
    /// For an answer that any of `stop` ends; none of them is empty.
    pub fn new(stop: &[String]) -> Self {
        Self {
            stops: stop.iter().map(|stop| StopMatcher::new(stop)).collect(),
            tokens: Vec::new(),
            bytes: Vec::new(),
            text_end: None,
            released: 0,
            released_bytes: 0,
            released_text_bytes: 0,
        }
    }

    /// Takes in a decided token and its bytes.
    /// True when it completes a stop string: decoding ends, release does not.
    /// What is decided after the answer's end never leaves.
    pub fn decide(&mut self, token: u32, bytes: &[u8], logprobs: Option<TokenLogprobs>) -> bool {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.tokens.push(DecidedToken {
            id: token,
            end: self.bytes.len(),
            logprobs,
        });
        if self.text_end.is_some() {
            return false;
        }
        self.text_end = self.find_stop(start);
        self.text_end.is_some()
    }

    /// No token follows: the stop hold and the UTF-8 hold wait for nothing more.
    pub fn end(&mut self) {
        self.text_end.get_or_insert(self.bytes.len());
    }

    /// Releases what it may of the tokens with an index below `allowed`; `None` when nothing leaves.
    pub fn release(&mut self, allowed: usize) -> Option<Released> {
        let last = (self.released..allowed.min(self.tokens.len()))
            .rev()
            .find(|&index| self.may_be_last(index))?;
        let tokens = self.released..last + 1;
        let bytes = self.released_bytes..self.text_end_of(last);
        let text = String::from_utf8_lossy(&self.bytes[bytes.clone()]).into_owned();
        self.released = tokens.end;
        self.released_bytes = bytes.end;
        self.released_text_bytes += text.len();
        let left = &self.tokens[tokens.clone()];
        Some(Released {
            text,
            token_ids: left.iter().map(|token| token.id).collect(),
            logprobs: left
                .iter()
                .filter_map(|token| token.logprobs.clone())
                .collect(),
            tokens,
        })
    }

    /// How many tokens were decided, those of a stop string included.
    pub fn decided(&self) -> usize {
        self.tokens.len()
    }

    /// How many tokens have left.
    pub fn released(&self) -> usize {
        self.released
    }

    /// How many bytes of UTF-8 have left.
    pub fn released_text_bytes(&self) -> usize {
        self.released_text_bytes
    }

    /// Forgets all that was decided: the answer starts again.
    pub fn rewind(&mut self) -> Withdrawn {
        let withdrawn = Withdrawn {
            released_tokens: self.released,
            released_text_bytes: self.released_text_bytes,
            withheld_tokens: self.tokens.len() - self.released,
        };
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
        self.tokens.clear();
        self.bytes.clear();
        self.text_end = None;
        self.released = 0;
        self.released_bytes = 0;
        self.released_text_bytes = 0;
        withdrawn
    }

    /// Where the first stop string that ends in the bytes from `start` begins.
    fn find_stop(&mut self, start: usize) -> Option<usize> {
        (start..self.bytes.len()).find_map(|index| {
            let byte = self.bytes[index];
            let longest = self
                .stops
                .iter_mut()
                .filter_map(|stop| stop.advance(byte).then_some(stop.pattern.len()))
                .max()?;
            Some(index + 1 - longest)
        })
    }

    /// Whether everything up to this token, and nothing after it, may leave.
    fn may_be_last(&self, index: usize) -> bool {
        let end = self.tokens[index].end;
        match self.text_end {
            Some(text_end) => {
                let start = index.checked_sub(1).map_or(0, |i| self.tokens[i].end);
                let in_answer = start < text_end || end <= text_end;
                in_answer && self.ends_between_characters(end.min(text_end))
            }
            None => end <= self.stop_hold_start() && self.ends_between_characters(end),
        }
    }

    fn text_end_of(&self, index: usize) -> usize {
        let end = self.tokens[index].end;
        self.text_end.map_or(end, |text_end| end.min(text_end))
    }

    /// Where the longest tail begins that a stop string may begin with.
    fn stop_hold_start(&self) -> usize {
        let held = self.stops.iter().map(|stop| stop.matched).max();
        self.bytes.len() - held.unwrap_or(0)
    }

    /// Whether lossy decoding has a boundary at `end` whatever bytes follow the decided ones.
    fn ends_between_characters(&self, end: usize) -> bool {
        let bytes = &self.bytes[..self.text_end.unwrap_or(self.bytes.len())];
        // Only a leading byte starts a sequence, which has at most three continuation bytes.
        let is_leading = |&index: &usize| bytes[index] & 0b1100_0000 != 0b1000_0000;
        let Some(lead) = (end.saturating_sub(3)..end).rev().find(is_leading) else {
            return true;
        };
        let sequence = &bytes[lead..bytes.len().min(lead + 4)];
        let Some(first) = sequence.utf8_chunks().next() else {
            return true;
        };
        let length = match first.valid().chars().next() {
            Some(character) => character.len_utf8(),
            None if self.text_end.is_none() && may_grow(sequence) => return false,
            // It becomes one U+FFFD.
            None => first.invalid().len(),
        };
        lead + length <= end
    }
}

/// Whether more bytes may complete this sequence, which is no character yet.
fn may_grow(sequence: &[u8]) -> bool {
    std::str::from_utf8(sequence).is_err_and(|error| error.error_len().is_none())
}

/// Knuth, Morris and Pratt's automaton (SIAM J. Comput. 6, 1977) for one stop string:
/// it also knows how much of the text's tail the stop string may begin with, which multi-pattern crates hide.
#[derive(Clone, Debug)]
struct StopMatcher {
    pattern: Vec<u8>,
    /// For each length of a matched prefix, less one: the length of the longest shorter prefix that ends it.
    borders: Vec<usize>,
    /// The length of the longest prefix of the pattern that ends the text so far.
    matched: usize,
}

impl StopMatcher {
    fn new(stop: &str) -> Self {
        let pattern = stop.as_bytes().to_vec();
        let mut borders = vec![0; pattern.len()];
        for index in 1..pattern.len() {
            let mut length = borders[index - 1];
            while length > 0 && pattern[length] != pattern[index] {
                length = borders[length - 1];
            }
            borders[index] = length + usize::from(pattern[length] == pattern[index]);
        }
        Self {
            pattern,
            borders,
            matched: 0,
        }
    }

    /// True when the pattern ends at this byte.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.pattern.get(self.matched) != Some(&byte) {
            self.matched = self.borders[self.matched - 1];
        }
        if self.pattern.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched == self.pattern.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn release_for(stops: &[&str]) -> Release {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        Release::new(&stops)
    }

    /// Decides the pieces as tokens 0, 1, 2 … until one completes a stop string; tells whether one did.
    fn decide_all(release: &mut Release, pieces: &[&[u8]]) -> bool {
        pieces.iter().any(|piece| {
            let token = release.decided() as u32;
            release.decide(token, piece, None)
        })
    }

    fn text(released: Option<Released>) -> Option<String> {
        released.map(|released| released.text)
    }

    #[test]
    fn plain_tokens_leave_as_far_as_they_are_allowed() {
        let mut release = release_for(&[]);
        decide_all(&mut release, &[b"one", b" two", b" three"]);
        assert_eq!(release.release(0), None);
        let released = release.release(2).unwrap();
        assert_eq!(released.text, "one two");
        assert_eq!(released.token_ids, [0, 1]);
        assert_eq!(released.tokens, 0..2);
        assert_eq!(release.release(2), None);
        assert_eq!(release.release(1), None);
        assert_eq!(text(release.release(100)).as_deref(), Some(" three"));
        assert_eq!((release.decided(), release.released()), (3, 3));
        assert_eq!(release.released_text_bytes(), "one two three".len());
    }

    #[test]
    fn a_character_in_pieces_leaves_with_its_last_token() {
        let mut release = release_for(&[]);
        decide_all(&mut release, &[b"a", b"\xf0\x9f", b"\x98"]);
        assert_eq!(text(release.release(3)).as_deref(), Some("a"));
        decide_all(&mut release, &[b"\x80"]);
        assert_eq!(release.release(3), None);
        let released = release.release(4).unwrap();
        assert_eq!(released.text, "\u{1f600}");
        assert_eq!(released.tokens, 1..4);
    }

    #[test]
    fn a_character_that_another_token_begins_holds_both() {
        let mut release = release_for(&[]);
        decide_all(&mut release, &[b"ab\xc3", b"\xa9cd\xe2", b"\x82"]);
        assert_eq!(release.release(3), None);
        decide_all(&mut release, &[b"\xac"]);
        assert_eq!(release.release(3), None);
        assert_eq!(
            text(release.release(4)).as_deref(),
            Some("ab\u{e9}cd\u{20ac}")
        );
    }

    #[test]
    fn invalid_bytes_leave_once_they_are_certain() {
        let mut release = release_for(&[]);
        // Never valid anywhere.
        decide_all(&mut release, &[b"\xff"]);
        assert_eq!(text(release.release(1)).as_deref(), Some("\u{fffd}"));
        // A lone continuation byte.
        decide_all(&mut release, &[b"\x80"]);
        assert_eq!(text(release.release(2)).as_deref(), Some("\u{fffd}"));
        // May begin a character until the next byte says no.
        decide_all(&mut release, &[b"\xe2\x82"]);
        assert_eq!(release.release(3), None);
        decide_all(&mut release, &[b"A"]);
        assert_eq!(text(release.release(4)).as_deref(), Some("\u{fffd}A"));
    }

    #[test]
    fn an_incomplete_character_at_the_end_becomes_one_replacement() {
        let mut release = release_for(&[]);
        decide_all(&mut release, &[b"x\xf0", b"\x9f\x98"]);
        assert_eq!(release.release(2), None);
        release.end();
        assert_eq!(release.release(1), None);
        assert_eq!(text(release.release(2)).as_deref(), Some("x\u{fffd}"));
    }

    #[test]
    fn a_stop_string_that_straddles_tokens_never_leaves_in_part() {
        let mut release = release_for(&["\n\nUser:"]);
        assert!(!decide_all(
            &mut release,
            &[b"Hi", b".\n", b"\n", b"Us", b"er"]
        ));
        assert_eq!(text(release.release(5)).as_deref(), Some("Hi"));
        assert!(decide_all(&mut release, &[b": and"]));
        let released = release.release(6).unwrap();
        assert_eq!(released.text, ".");
        assert_eq!(released.token_ids, [1]);
        assert_eq!(release.release(6), None);
        assert_eq!((release.decided(), release.released()), (6, 2));
    }

    #[test]
    fn what_only_looked_like_a_stop_string_leaves() {
        let mut release = release_for(&["stop"]);
        decide_all(&mut release, &[b"a st", b"o"]);
        assert_eq!(release.release(2), None);
        decide_all(&mut release, &[b"ve s"]);
        let released = release.release(3).unwrap();
        assert_eq!(released.text, "a sto");
        assert_eq!(released.tokens, 0..2);
        release.end();
        assert_eq!(text(release.release(3)).as_deref(), Some("ve s"));
    }

    #[test]
    fn a_found_stop_string_does_not_end_the_policy_hold() {
        let mut release = release_for(&["END"]);
        assert!(decide_all(&mut release, &[b"one", b" two", b"END"]));
        assert_eq!(text(release.release(1)).as_deref(), Some("one"));
        assert_eq!(release.release(1), None);
        assert_eq!(text(release.release(2)).as_deref(), Some(" two"));
        assert_eq!(release.release(3), None);
    }

    #[test]
    fn a_token_with_a_byte_before_the_stop_string_belongs_to_the_answer() {
        let mut release = release_for(&["END"]);
        assert!(decide_all(&mut release, &[b"", b"oneEN", b"", b"D!"]));
        let released = release.release(4).unwrap();
        assert_eq!(released.text, "one");
        assert_eq!(released.token_ids, [0, 1]);
    }

    #[test]
    fn a_token_without_bytes_right_before_the_stop_string_belongs_to_the_answer() {
        let mut release = release_for(&["END"]);
        assert!(decide_all(&mut release, &[b"one", b"", b"END"]));
        assert_eq!(release.release(3).unwrap().token_ids, [0, 1]);
    }

    #[test]
    fn an_answer_that_is_a_stop_string_is_empty() {
        let mut release = release_for(&["END"]);
        assert!(decide_all(&mut release, &[b"END"]));
        release.end();
        assert_eq!(release.release(1), None);
        assert_eq!((release.decided(), release.released()), (1, 0));
    }

    #[test]
    fn the_match_that_ends_first_wins_and_of_those_the_longest() {
        let mut release = release_for(&["bcdef", "cd", "bcd"]);
        assert!(decide_all(&mut release, &[b"abcdef"]));
        assert_eq!(text(release.release(1)).as_deref(), Some("a"));
    }

    #[test]
    fn an_incomplete_character_right_before_the_stop_string_becomes_one_replacement() {
        let mut release = release_for(&["END"]);
        assert!(decide_all(&mut release, &[b"a\xe2\x82", b"END"]));
        assert_eq!(text(release.release(2)).as_deref(), Some("a\u{fffd}"));
    }

    #[test]
    fn what_is_decided_after_the_end_never_leaves() {
        let mut release = release_for(&["END"]);
        decide_all(&mut release, &[b"one"]);
        release.end();
        assert!(!release.decide(9, b"END", None));
        assert_eq!(release.release(2).unwrap().tokens, 0..1);
        assert_eq!(release.release(2), None);
    }

    #[test]
    fn logprobs_leave_with_their_tokens() {
        let logprobs = |token: u32| TokenLogprobs {
            chosen: (token, -1.0),
            alternatives: vec![],
        };
        let mut release = release_for(&["!"]);
        release.decide(5, b"a", Some(logprobs(5)));
        release.decide(6, b"b", Some(logprobs(6)));
        release.decide(7, b"!", Some(logprobs(7)));
        assert_eq!(release.release(1).unwrap().logprobs, [logprobs(5)]);
        assert_eq!(release.release(3).unwrap().logprobs, [logprobs(6)]);
    }

    #[test]
    fn a_rewind_tells_what_it_took_back_and_starts_again() {
        let mut release = release_for(&["END"]);
        decide_all(&mut release, &[b"\xff", b"b", b"c", b"E"]);
        release.release(2);
        assert_eq!(
            release.rewind(),
            Withdrawn {
                released_tokens: 2,
                released_text_bytes: "\u{fffd}b".len(),
                withheld_tokens: 2,
            }
        );
        assert_eq!((release.decided(), release.released()), (0, 0));
        assert_eq!(release.released_text_bytes(), 0);
        // The E before the rewind begins no stop string after it.
        assert!(!decide_all(&mut release, &[b"ND"]));
        assert_eq!(release.release(1).unwrap().tokens, 0..1);
    }

    /// The text's end the long way: the earliest-ending match, and of those the longest.
    fn naive_text_end(bytes: &[u8], stops: &[String]) -> Option<usize> {
        (1..=bytes.len()).find_map(|end| {
            let longest = stops
                .iter()
                .filter(|stop| bytes[..end].ends_with(stop.as_bytes()))
                .map(String::len)
                .max()?;
            Some(end - longest)
        })
    }

    /// Bytes that make characters, halves of them, and stop strings often.
    fn any_piece() -> impl Strategy<Value = Vec<u8>> {
        let bytes =
            prop::sample::select(b"aab\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xed\xff".to_vec());
        prop_oneof![
            4 => prop::collection::vec(bytes, 0..5),
            1 => Just("\u{e9}\u{20ac}a".as_bytes().to_vec()),
        ]
    }

    fn any_stops() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[ab\u{e9}\u{20ac}]{1,4}", 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_schedule_releases_what_the_end_would(
            pieces in prop::collection::vec(any_piece(), 0..40),
            stops in any_stops(),
            schedule in prop::collection::vec((any::<bool>(), 0usize..6), 40),
        ) {
            let mut release = Release::new(&stops);
            let mut all_at_once = Release::new(&stops);
            let mut bytes = Vec::new();
            let mut ends = Vec::new();
            let mut text = String::new();
            let mut token_ids = Vec::new();
            let take = |released: Option<Released>, allowed: usize, text: &mut String, ids: &mut Vec<u32>| {
                let Some(released) = released else { return };
                assert_eq!(released.tokens.start, ids.len());
                assert!(!released.tokens.is_empty() && released.tokens.end <= allowed);
                assert_eq!(released.tokens.len(), released.token_ids.len());
                text.push_str(&released.text);
                ids.extend(released.token_ids);
            };

            let mut stopped = false;
            for (token, (piece, (now, held))) in pieces.iter().zip(schedule).enumerate() {
                bytes.extend_from_slice(piece);
                ends.push(bytes.len());
                stopped = release.decide(token as u32, piece, None);
                prop_assert_eq!(stopped, all_at_once.decide(token as u32, piece, None));
                prop_assert_eq!(stopped, naive_text_end(&bytes, &stops).is_some());
                if now {
                    let allowed = (token + 1).saturating_sub(held);
                    take(release.release(allowed), allowed, &mut text, &mut token_ids);
                    // Nothing of a token that is not allowed: what left is the text of whole allowed tokens.
                    let left = token_ids.len().checked_sub(1).map_or(0, |last| ends[last]);
                    let left = naive_text_end(&bytes, &stops).map_or(left, |end| left.min(end));
                    prop_assert_eq!(&*text, String::from_utf8_lossy(&bytes[..left]));
                }
                if stopped {
                    break;
                }
            }
            if !stopped {
                release.end();
                all_at_once.end();
            }
            let decided = ends.len();
            take(release.release(decided), decided, &mut text, &mut token_ids);

            let text_end = naive_text_end(&bytes, &stops).unwrap_or(bytes.len());
            prop_assert_eq!(&*text, String::from_utf8_lossy(&bytes[..text_end]));
            prop_assert_eq!(text.len(), release.released_text_bytes());
            let answer: Vec<u32> = (0..decided)
                .filter(|&index| {
                    let start = if index == 0 { 0 } else { ends[index - 1] };
                    start < text_end || ends[index] == text_end
                })
                .map(|index| index as u32)
                .collect();
            prop_assert_eq!(&token_ids, &answer);

            let (mut text_at_once, mut ids_at_once) = (String::new(), Vec::new());
            take(all_at_once.release(decided), decided, &mut text_at_once, &mut ids_at_once);
            prop_assert_eq!((text, token_ids), (text_at_once, ids_at_once));
            prop_assert_eq!(release.release(usize::MAX), None);
        }

        #[test]
        fn nothing_waits_without_a_reason(
            pieces in prop::collection::vec("[ab\u{e9}\u{20ac}]{0,3}", 1..20),
            stops in any_stops(),
        ) {
            let mut release = Release::new(&stops);
            let mut bytes = Vec::new();
            for piece in &pieces {
                bytes.extend_from_slice(piece.as_bytes());
                if release.decide(0, piece.as_bytes(), None) {
                    break;
                }
                release.release(usize::MAX);
                let may_begin_a_stop = stops.iter().any(|stop| {
                    (1..stop.len()).any(|length| bytes.ends_with(&stop.as_bytes()[..length]))
                });
                prop_assert_eq!(release.released() < release.decided(), may_begin_a_stop);
            }
        }
    }
}
