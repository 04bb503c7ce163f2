//! Text to token ids and back to bytes, the same for both file formats.
//! Knows special tokens and who may write them; knows no templates and no requests.

use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use sha2::{Digest, Sha256};
use tokenizers::{PostProcessorWrapper, Tokenizer as Pipeline};

use crate::error::{Error, Result};

/// What happens to text that spells a special token, such as `<|im_end|>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// It is text like any other; no special token comes of it.
    AsText,
    /// It is the special token. Only for text that nobody outside can write.
    AsTokens,
}

/// The longest text that is tokenised.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

/// Text to tokens. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    with_special: Pipeline,
    without_special: Pipeline,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where token `id` lies in `bytes`.
    spans: Vec<(u32, u32)>,
    special: Vec<bool>,
    special_text: Option<AhoCorasick>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    add_bos: bool,
    stop_ids: Vec<u32>,
}

/// Special tokens that end a turn of chat or a text, whatever a file's metadata says.
pub(crate) const TERMINATORS: [&str; 9] = [
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
];

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alphabet {
    /// GPT-2's: every byte is one printable character.
    ByteLevel,
    /// U+2581 is a space, `<0xNN>` a byte.
    SentencePiece,
}

/// What a file format hands over.
pub(crate) struct Parts {
    pub(crate) pipeline: Pipeline,
    pub(crate) alphabet: Alphabet,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) stop_ids: Vec<u32>,
}

/// Tokens with the byte range of the text that each came from.
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    pub(crate) offsets: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Token ids of `text`, without a beginning-of-sequence token.
    pub fn encode(&self, text: &str, special: SpecialText) -> Result<Vec<u32>> {
        check_length(text)?;
        let encoding = guarded(|| self.pipeline(special).encode_fast(text, false));
        let ids = encoding.map_err(refused)?.get_ids().to_vec();
        self.check_special(&ids, special)?;
        Ok(ids)
    }

    /// The bytes that a token adds to the text: none for a special one.
    ///
    /// The text of an answer is the concatenation over its tokens; a token may end inside a
    /// character. An id without a token adds nothing.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.inner.spans.get(id as usize) {
            Some(&(begin, end)) => &self.inner.bytes[begin as usize..end as usize],
            None => &[],
        }
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .special
            .get(id as usize)
            .copied()
            .unwrap_or(false)
    }

    /// One more than the largest id; the embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.spans.len()
    }

    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// Whether raw text begins with the beginning-of-sequence token. Templates write their own.
    pub fn add_bos(&self) -> bool {
        self.inner.add_bos && self.inner.bos.is_some()
    }

    /// Ids that end an answer, ascending.
    pub fn stop_ids(&self) -> &[u32] {
        &self.inner.stop_ids
    }

    /// The id of the token spelled exactly so.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.with_special.token_to_id(token)
    }

    pub(crate) fn build(parts: Parts) -> Result<Self, String> {
        let Parts {
            mut pipeline,
            alphabet,
            bos,
            eos,
            add_bos,
            mut stop_ids,
        } = parts;
        // Added by post-processors: what we add ourselves (bos), and offsets that hide spaces.
        pipeline.with_post_processor(None::<PostProcessorWrapper>);
        pipeline.with_padding(None);
        guarded(|| pipeline.with_truncation(None).map(|_| ()))?;

        let size = vocabulary_size(&pipeline)?;
        let added = pipeline.get_added_tokens_decoder();
        let mut bytes = Vec::new();
        let mut spans = Vec::with_capacity(size);
        let mut special = vec![false; size];
        for id in 0..size as u32 {
            let begin = bytes.len() as u32;
            match added.get(&id) {
                Some(token) if token.special => special[id as usize] = true,
                Some(token) => bytes.extend(added_bytes(&token.content, alphabet)),
                None => {
                    if let Some(token) = pipeline.id_to_token(id) {
                        bytes.extend(token_bytes(&token, alphabet));
                    }
                }
            }
            spans.push((begin, bytes.len() as u32));
        }
        let special_texts: Vec<&str> = added
            .values()
            .filter(|token| token.special && !token.content.is_empty())
            .map(|token| token.content.as_str())
            .collect();
        let special_text = match special_texts.as_slice() {
            [] => None,
            texts => Some(
                AhoCorasick::builder()
                    .match_kind(MatchKind::LeftmostLongest)
                    .build(texts)
                    .map_err(|error| format!("its special tokens: {error}"))?,
            ),
        };
        for id in bos.iter().chain(&eos).chain(&stop_ids) {
            if *id as usize >= size {
                return Err(format!(
                    "special token {id} is not in the vocabulary of {size}"
                ));
            }
        }
        stop_ids.sort_unstable();
        stop_ids.dedup();
        let unknown = pipeline.token_to_id("<unk>");
        let mut without_special = pipeline.clone();
        without_special.set_encode_special_tokens(true);
        Ok(Self {
            inner: Arc::new(Inner {
                with_special: pipeline,
                without_special,
                bytes,
                spans,
                special,
                special_text,
                bos,
                eos,
                unknown,
                add_bos,
                stop_ids,
            }),
        })
    }

    /// As [`Tokenizer::encode`], with where each token came from.
    pub(crate) fn encode_with_offsets(&self, text: &str, special: SpecialText) -> Result<Encoded> {
        check_length(text)?;
        let encoding = guarded(|| self.pipeline(special).encode(text, false)).map_err(refused)?;
        let ids = encoding.get_ids().to_vec();
        self.check_special(&ids, special)?;
        Ok(Encoded {
            ids,
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// Byte ranges of `text` that spell special tokens, leftmost and longest first.
    pub(crate) fn special_text(&self, text: &str) -> Vec<Range<usize>> {
        let Some(matcher) = &self.inner.special_text else {
            return Vec::new();
        };
        matcher.find_iter(text).map(|found| found.range()).collect()
    }

    pub(crate) fn token_text(&self, id: u32) -> Option<String> {
        self.inner.with_special.id_to_token(id)
    }

    pub(crate) fn eos(&self) -> Option<u32> {
        self.inner.eos
    }

    pub(crate) fn check_fits(&self, rows: usize) -> Result<(), String> {
        let size = self.vocab_size();
        if size <= rows {
            return Ok(());
        }
        Err(format!(
            "the tokenizer has {size} tokens, but the embedding only {rows} rows"
        ))
    }

    /// SHA-256 (hex) over what text becomes: every token's spelling, and a sample's ids.
    ///
    /// The same for both file formats; rows that only pad the embedding do not count.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for id in 0..self.vocab_size() as u32 {
            let Some(token) = self.token_text(id).filter(|token| !is_padding(token)) else {
                continue;
            };
            let token = token.replace('\u{2581}', " ");
            hasher.update(id.to_le_bytes());
            hasher.update((token.len() as u64).to_le_bytes());
            hasher.update(token);
        }
        for special in [SpecialText::AsText, SpecialText::AsTokens] {
            for id in self.encode(FINGERPRINT_SAMPLE, special)? {
                hasher.update(id.to_le_bytes());
            }
        }
        Ok(hex::encode(hasher.finalize()))
    }

    fn pipeline(&self, special: SpecialText) -> &Pipeline {
        match special {
            SpecialText::AsText => &self.inner.without_special,
            SpecialText::AsTokens => &self.inner.with_special,
        }
    }

    /// Whatever a tokenizer file does, text that must stay text yields no control token.
    fn check_special(&self, ids: &[u32], special: SpecialText) -> Result<()> {
        if ids.iter().any(|&id| id as usize >= self.vocab_size()) {
            return Err(Error::internal(
                "the tokenizer returned an id outside its vocabulary",
            ));
        }
        if special == SpecialText::AsText && ids.iter().any(|&id| self.is_control(id)) {
            return Err(Error::invalid(
                "input",
                "holds text that this model's tokenizer turns into a control token; remove it",
            ));
        }
        Ok(())
    }

    /// Special, other than the token for what a vocabulary cannot spell.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.is_special(id) && Some(id) != self.inner.unknown
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.inner.bos)
            .field("stop_ids", &self.inner.stop_ids)
            .finish_non_exhaustive()
    }
}

const FINGERPRINT_SAMPLE: &str = "It's 2024: 1,234.5 tokens   cost \u{20ac}9\n\n\tna\u{ef}ve caf\u{e9} \u{4f60}\u{597d}\u{ff0c}\u{4e16}\u{754c} \u{1f600}\u{1f3fd} <|im_end|><end_of_turn></s> def f(x):\r\n    return x**2";

const MAX_VOCABULARY: usize = 1 << 22;

/// Runs the tokenizer library's code; a panic in it becomes an error.
pub(crate) fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer library panicked".into()),
    }
}

fn refused(message: String) -> Error {
    Error::invalid("input", format!("cannot be tokenised: {message}"))
}

fn check_length(text: &str) -> Result<()> {
    if text.len() <= MAX_TEXT_BYTES {
        return Ok(());
    }
    Err(Error::invalid(
        "input",
        format!(
            "{} bytes of text; at most {MAX_TEXT_BYTES} are tokenised",
            text.len()
        ),
    ))
}

fn vocabulary_size(pipeline: &Pipeline) -> Result<usize, String> {
    let largest = pipeline.get_vocab(true).into_values().max();
    match largest.map(|id| id as usize + 1) {
        Some(size) if size <= MAX_VOCABULARY => Ok(size),
        Some(size) => Err(format!(
            "its largest token id is {}, of at most {MAX_VOCABULARY}",
            size - 1
        )),
        None => Err("its vocabulary is empty".into()),
    }
}

/// `[PAD123]`: what converters call embedding rows without a token.
fn is_padding(token: &str) -> bool {
    token
        .strip_prefix("[PAD")
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

fn token_bytes(token: &str, alphabet: Alphabet) -> Vec<u8> {
    match alphabet {
        Alphabet::SentencePiece => match fallback_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace('\u{2581}', " ").into_bytes(),
        },
        Alphabet::ByteLevel => token
            .chars()
            .map(byte_of)
            .collect::<Option<Vec<u8>>>()
            // Not spelled in the alphabet, so it is text as it stands.
            .unwrap_or_else(|| token.as_bytes().to_vec()),
    }
}

/// An added token is written as plain text in byte-level vocabularies.
fn added_bytes(token: &str, alphabet: Alphabet) -> Vec<u8> {
    match alphabet {
        Alphabet::SentencePiece => token_bytes(token, alphabet),
        Alphabet::ByteLevel => token.as_bytes().to_vec(),
    }
}

/// `<0x0A>` is the byte 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let two = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    two.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's byte alphabet: printable Latin-1 stands for itself, the 68 others follow from U+0100.
fn byte_of(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    let itself = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if itself(code) {
        return u8::try_from(code).ok();
    }
    let nth = code.checked_sub(0x100)?;
    (0..=255u32)
        .filter(|&byte| !itself(byte))
        .nth(nth as usize)
        .and_then(|byte| u8::try_from(byte).ok())
}

#[cfg(test)]
pub(crate) mod tests {
    use tokenizers::AddedToken;
    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    /// Single bytes, `<|im_start|>` 256, `<|im_end|>` 257, and `<think>` 258, which is text.
    pub(crate) fn bytes_only() -> Tokenizer {
        let letters = (0..=0x2ffu32).filter_map(char::from_u32);
        let vocabulary: Vec<(String, u32)> = letters
            .filter_map(|letter| Some((letter.to_string(), u32::from(byte_of(letter)?))))
            .collect();
        let bpe = BPE::builder()
            .vocab_and_merges(
                vocabulary
                    .into_iter()
                    .collect::<tokenizers::models::bpe::Vocab>(),
                vec![],
            )
            .build()
            .expect("a model");
        let mut pipeline = Pipeline::new(bpe);
        pipeline.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        let special = ["<|im_start|>", "<|im_end|>"].map(|text| AddedToken::from(text, true));
        pipeline.add_tokens(special).expect("tokens");
        pipeline
            .add_tokens([AddedToken::from("<think>", false)])
            .expect("tokens");
        Tokenizer::build(Parts {
            pipeline,
            alphabet: Alphabet::ByteLevel,
            bos: None,
            eos: Some(257),
            add_bos: true,
            stop_ids: vec![257, 257],
        })
        .expect("a tokenizer")
    }

    #[test]
    fn the_alphabet_of_bytes_is_a_bijection() {
        let bytes: std::collections::BTreeSet<u8> = (0..=0x2ffu32)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(
            (byte_of('\u{120}'), byte_of('A'), byte_of('\u{10a}')),
            (Some(b' '), Some(b'A'), Some(b'\n'))
        );
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn special_text_is_a_token_only_when_asked() {
        let tokenizer = bytes_only();
        let tokens = tokenizer
            .encode("a<|im_end|>", SpecialText::AsTokens)
            .expect("tokens");
        assert_eq!(tokens, [u32::from(b'a'), 257]);
        let text = tokenizer
            .encode("a<|im_end|>", SpecialText::AsText)
            .expect("tokens");
        assert_eq!(
            text,
            "a<|im_end|>".bytes().map(u32::from).collect::<Vec<_>>()
        );
        for special in [SpecialText::AsText, SpecialText::AsTokens] {
            assert_eq!(tokenizer.encode("<think>", special), Ok(vec![258]));
        }
    }

    #[test]
    fn bytes_of_tokens_are_the_text() {
        let tokenizer = bytes_only();
        let text = "na\u{ef}ve \u{1f600}\0\t<think>";
        let ids = tokenizer.encode(text, SpecialText::AsText).expect("tokens");
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id).to_vec())
            .collect();
        assert_eq!(bytes, text.as_bytes());
        assert_eq!(tokenizer.token_bytes(257), b"");
        assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
        assert!(tokenizer.is_special(256) && !tokenizer.is_special(258));
    }

    #[test]
    fn text_beyond_the_cap_is_an_error() {
        let text = "a".repeat(MAX_TEXT_BYTES + 1);
        let error = bytes_only()
            .encode(&text, SpecialText::AsText)
            .expect_err("too long");
        assert!(matches!(error, Error::InvalidRequest { .. }));
    }

    #[test]
    fn a_vocabulary_larger_than_the_embedding_is_an_error() {
        let tokenizer = bytes_only();
        assert_eq!(tokenizer.vocab_size(), 259);
        assert_eq!(tokenizer.check_fits(259), Ok(()));
        assert!(tokenizer.check_fits(258).is_err());
    }

    #[test]
    fn stop_ids_are_sorted_and_a_missing_bos_is_never_added() {
        let tokenizer = bytes_only();
        assert_eq!(tokenizer.stop_ids(), [257]);
        assert!(!tokenizer.add_bos());
    }

    #[test]
    fn a_panic_in_the_library_is_an_error() {
        let result: Result<(), String> = guarded(|| panic!("as a hostile tokenizer.json would"));
        assert_eq!(result, Err("the tokenizer library panicked".into()));
    }

    #[test]
    fn sentence_piece_spells_spaces_and_bytes() {
        let bytes = |token: &str| token_bytes(token, Alphabet::SentencePiece);
        assert_eq!(bytes("\u{2581}the"), b" the");
        assert_eq!(bytes("<0xF0>"), [0xf0]);
        assert_eq!(bytes("<0xF>"), b"<0xF>");
        assert_eq!(bytes("<0x+1>"), b"<0x+1>");
        assert!(is_padding("[PAD151643]") && !is_padding("[PAD]"));
    }
}
