//! Builds a tokenizer from a GGUF file's token lists.
//! Knows the two kinds Inwit's families use: byte-level BPE with merges (`gpt2`) and
//! SentencePiece BPE with scores (`llama`).

use std::collections::HashMap;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer as Pipeline};

use super::gguf_model::{Metadata, integer};
use crate::model::Tokenizer;
use crate::model::tokenizer::{Alphabet, Parts, TERMINATORS, guarded};

pub(super) fn build(metadata: &Metadata<'_>) -> Result<Tokenizer, String> {
    let model = metadata
        .text("tokenizer.ggml.model")?
        .ok_or("key `tokenizer.ggml.model` is missing; the file has no tokenizer")?;
    let vocabulary = Vocabulary::read(metadata)?;
    let (pipeline, alphabet, bos_by_default) = match model {
        "gpt2" => (
            byte_level(metadata, &vocabulary)?,
            Alphabet::ByteLevel,
            false,
        ),
        "llama" => (
            sentence_piece(metadata, &vocabulary)?,
            Alphabet::SentencePiece,
            true,
        ),
        other => {
            return Err(format!(
                "tokenizer `{other}` is not supported; supported are gpt2 and llama"
            ));
        }
    };
    let pipeline = with_added_tokens(pipeline, &vocabulary)?;
    let id = |key: &str| -> Result<Option<u32>, String> {
        match metadata.integer(key)? {
            None => Ok(None),
            Some(id) if id < vocabulary.tokens.len() => Ok(Some(id as u32)),
            Some(id) => Err(format!(
                "`{key}` is {id}, but there are {} tokens",
                vocabulary.tokens.len()
            )),
        }
    };
    let eos = id("tokenizer.ggml.eos_token_id")?;
    let mut stop_ids: Vec<u32> = eos.into_iter().collect();
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        stop_ids.extend(id(key)?);
    }
    stop_ids.extend(TERMINATORS.iter().filter_map(|text| {
        let id = *vocabulary.ids.get(text)?;
        (vocabulary.kinds[id as usize] == Kind::Control).then_some(id)
    }));
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let add_bos = metadata
        .boolean("tokenizer.ggml.add_bos_token")?
        .unwrap_or(bos_by_default || is_llama3(metadata)?);
    Tokenizer::build(Parts {
        pipeline,
        alphabet,
        bos,
        eos,
        add_bos,
        stop_ids,
    })
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self, String> {
        let tokens = metadata
            .strings("tokenizer.ggml.tokens")?
            .filter(|tokens| !tokens.is_empty())
            .ok_or("key `tokenizer.ggml.tokens` is missing or empty")?;
        let key = "tokenizer.ggml.token_type";
        let kinds = match metadata.array(key)? {
            Some(values) => values
                .iter()
                .map(|value| match integer(key, value)? {
                    1 => Ok(Kind::Normal),
                    2 => Ok(Kind::Unknown),
                    3 => Ok(Kind::Control),
                    4 => Ok(Kind::UserDefined),
                    5 => Ok(Kind::Unused),
                    6 => Ok(Kind::Byte),
                    other => Err(format!("`{key}`: {other} is not a token type")),
                })
                .collect::<Result<Vec<_>, _>>()?,
            None => return Err(format!("key `{key}` is missing")),
        };
        if kinds.len() != tokens.len() {
            return Err(format!(
                "{} token types for {} tokens",
                kinds.len(),
                tokens.len()
            ));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = ids.insert(*token, id as u32) {
                return Err(format!("tokens {first} and {id} are the same text"));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    fn owned(&self) -> Vec<(String, u32)> {
        self.ids
            .iter()
            .map(|(token, &id)| ((*token).to_owned(), id))
            .collect()
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (u32, &'a str)> {
        let pairs = self.tokens.iter().zip(&self.kinds).enumerate();
        pairs.filter_map(move |(id, (token, k))| (*k == kind).then_some((id as u32, *token)))
    }
}

/// Control tokens become special; user-defined ones match whole, before merging, but are text.
fn with_added_tokens(
    mut pipeline: Pipeline,
    vocabulary: &Vocabulary<'_>,
) -> Result<Pipeline, String> {
    let added = |kind, special| {
        vocabulary
            .of_kind(kind)
            .map(move |(_, token)| AddedToken::from(token, special).normalized(false))
    };
    // A piece that holds spaces meets the text only after its spaces became U+2581.
    let user_defined = added(Kind::UserDefined, false).map(|token| {
        let spaced = token.content.contains('\u{2581}');
        token.normalized(spaced)
    });
    let tokens: Vec<AddedToken> = added(Kind::Control, true)
        .chain(added(Kind::Unknown, true))
        .chain(user_defined)
        .filter(|token| !token.content.is_empty())
        .collect();
    guarded(|| pipeline.add_tokens(tokens))?;
    Ok(pipeline)
}

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut into words before merging, by the file's name for it.
///
/// Closed on purpose: a guess tokenises almost everything rightly and the rest silently wrong.
struct PreTokenizer {
    compose: bool,
    split: WordSplit,
    /// A word that is a token as a whole is taken without merging.
    whole_words: bool,
}

enum WordSplit {
    /// GPT-2's own pattern.
    Gpt2,
    /// The same after single digits were cut out.
    DigitsThenGpt2,
    Pattern(&'static str),
}

fn pre_tokenizer(name: &str) -> Result<PreTokenizer, String> {
    let (compose, split, whole_words) = match name {
        "gpt-2" => (false, WordSplit::Gpt2, false),
        "smollm" => (false, WordSplit::DigitsThenGpt2, false),
        "llama-bpe" | "llama-v3" | "llama3" => (false, WordSplit::Pattern(LLAMA3_SPLIT), true),
        "qwen2" => (true, WordSplit::Pattern(QWEN2_SPLIT), false),
        other => {
            return Err(format!(
                "`tokenizer.ggml.pre` is `{other}`, whose word splitting is not known here; \
                 known are gpt-2, smollm, llama-bpe and qwen2. Use the model's Hugging Face folder instead"
            ));
        }
    };
    Ok(PreTokenizer {
        compose,
        split,
        whole_words,
    })
}

fn is_llama3(metadata: &Metadata<'_>) -> Result<bool, String> {
    let pre = metadata.text("tokenizer.ggml.pre")?;
    Ok(matches!(pre, Some("llama-bpe" | "llama-v3" | "llama3")))
}

fn byte_level(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Pipeline, String> {
    let name = metadata
        .text("tokenizer.ggml.pre")?
        .ok_or("key `tokenizer.ggml.pre` is missing; without it words cannot be split as the model learned them")?;
    let pre = pre_tokenizer(name)?;
    let merges = merges(metadata, vocabulary)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.owned().into_iter().collect::<Vocab>(), merges)
        .ignore_merges(pre.whole_words);
    let mut pipeline = Pipeline::new(guarded(|| bpe.build())?);
    if pre.compose {
        guarded(|| pipeline.with_normalizer(Some(NFC)).map(|_| ()))?;
    }
    let steps: Vec<PreTokenizerWrapper> = match pre.split {
        WordSplit::Gpt2 => vec![ByteLevel::new(false, true, true).into()],
        WordSplit::DigitsThenGpt2 => {
            vec![
                Digits::new(true).into(),
                ByteLevel::new(false, true, true).into(),
            ]
        }
        WordSplit::Pattern(pattern) => {
            let pattern = SplitPattern::Regex(pattern.into());
            let split = guarded(|| Split::new(pattern, SplitDelimiterBehavior::Isolated, false))?;
            vec![split.into(), ByteLevel::new(false, true, false).into()]
        }
    };
    pipeline.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    Ok(pipeline)
}

type Vocab = tokenizers::models::bpe::Vocab;
type Merges = Vec<(String, String)>;

fn merges(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Merges, String> {
    let merges = metadata
        .strings("tokenizer.ggml.merges")?
        .ok_or("key `tokenizer.ggml.merges` is missing")?;
    let known = |token: &str| vocabulary.ids.contains_key(token);
    merges
        .into_iter()
        .enumerate()
        .map(|(rank, merge)| match merge.split_once(' ') {
            Some((left, right))
                if known(left) && known(right) && known(&format!("{left}{right}")) =>
            {
                Ok((left.to_owned(), right.to_owned()))
            }
            _ => Err(format!(
                "`tokenizer.ggml.merges`: merge {rank} is not made of tokens"
            )),
        })
        .collect()
}

/// SentencePiece merges the pair whose union scores highest; as BPE, unions ranked by score.
fn sentence_piece(
    metadata: &Metadata<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<Pipeline, String> {
    let scores = scores(metadata, vocabulary)?;
    let unknown = vocabulary.of_kind(Kind::Unknown).next();
    let mut bpe = BPE::builder()
        .vocab_and_merges(
            vocabulary.owned().into_iter().collect::<Vocab>(),
            merges_from_scores(vocabulary, &scores)?,
        )
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some((_, token)) = unknown {
        bpe = bpe.unk_token(token.to_owned());
    }
    let mut pipeline = Pipeline::new(guarded(|| bpe.build())?);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if metadata
        .boolean("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true)
    {
        steps.push(Prepend::new("\u{2581}".into()).into());
    }
    let spaces = guarded(|| Replace::new(" ", "\u{2581}"))?;
    steps.push(spaces.into());
    guarded(|| {
        pipeline
            .with_normalizer(Some(Normalizers::new(steps)))
            .map(|_| ())
    })?;
    Ok(pipeline)
}

fn scores(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Vec<f64>, String> {
    let key = "tokenizer.ggml.scores";
    use super::gguf::Value;
    let values = metadata
        .array(key)?
        .ok_or_else(|| format!("key `{key}` is missing"))?;
    if values.len() != vocabulary.tokens.len() {
        return Err(format!(
            "{} scores for {} tokens",
            values.len(),
            vocabulary.tokens.len()
        ));
    }
    values
        .iter()
        .map(|value| match value {
            Value::Float(score) if !score.is_nan() => Ok(*score),
            _ => Err(format!("`{key}` must hold numbers")),
        })
        .collect()
}

/// Longest token whose splits are tried.
const MAX_MERGED_BYTES: usize = 1 << 10;
/// Far more than any model's vocabulary gives, far less than a machine's memory: a hostile one
/// makes every prefix and every suffix of its tokens a token.
const MAX_MERGES: usize = 4 << 20;
const MAX_MERGES_BYTES: usize = 64 << 20;

fn merges_from_scores(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Result<Merges, String> {
    let mergeable = |id: u32| vocabulary.kinds[id as usize] == Kind::Normal;
    let part = |text: &str| {
        vocabulary
            .ids
            .get(text)
            .copied()
            .filter(|&id| mergeable(id))
    };
    let mut merges = Vec::new();
    let mut bytes = 0;
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if !mergeable(id as u32) || token.len() > MAX_MERGED_BYTES {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (part(left), part(right)) {
                merges.push((scores[id], left, right, id, left_id, right_id));
                bytes += token.len();
                if merges.len() > MAX_MERGES || bytes > MAX_MERGES_BYTES {
                    return Err(format!(
                        "`tokenizer.ggml.tokens` can be put together from one another in more \
                         than {MAX_MERGES} ways; this is not the vocabulary of a model"
                    ));
                }
            }
        }
    }
    // The order in which the reference converter lists merges: by score, then by the length of
    // the parts, longer first, then by ids.
    merges.sort_by(|a, b| {
        let length = |text: &str| text.chars().count();
        b.0.total_cmp(&a.0)
            .then_with(|| length(b.1).cmp(&length(a.1)))
            .then_with(|| length(b.2).cmp(&length(a.2)))
            .then_with(|| (a.3, a.4, a.5).cmp(&(b.3, b.4, b.5)))
    });
    Ok(merges
        .into_iter()
        .map(|(_, left, right, ..)| (left.to_owned(), right.to_owned()))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::gguf::Value;
    use super::*;
    use crate::model::SpecialText;

    /// A SentencePiece vocabulary: four controls, the bytes of "é", and a few pieces.
    fn pieces() -> BTreeMap<String, Value> {
        let tokens = [
            ("<unk>", 2, 0.0),
            ("<s>", 3, 0.0),
            ("</s>", 3, 0.0),
            ("<0xC3>", 6, 0.0),
            ("<0xA9>", 6, 0.0),
            ("\u{2581}", 1, -9.0),
            ("a", 1, -8.0),
            ("b", 1, -8.0),
            ("ab", 1, -2.0),
            ("ba", 1, -1.0),
            ("\u{2581}ab", 1, -3.0),
            ("\n\n", 4, 0.0),
        ];
        let list = |values: Vec<Value>| Value::Array(values);
        BTreeMap::from([
            ("tokenizer.ggml.model".into(), Value::Text("llama".into())),
            (
                "tokenizer.ggml.tokens".into(),
                list(tokens.iter().map(|t| Value::Text(t.0.into())).collect()),
            ),
            (
                "tokenizer.ggml.token_type".into(),
                list(tokens.iter().map(|t| Value::Signed(t.1)).collect()),
            ),
            (
                "tokenizer.ggml.scores".into(),
                list(tokens.iter().map(|t| Value::Float(t.2)).collect()),
            ),
            ("tokenizer.ggml.bos_token_id".into(), Value::Unsigned(1)),
            ("tokenizer.ggml.eos_token_id".into(), Value::Unsigned(2)),
            ("tokenizer.ggml.add_space_prefix".into(), Value::Bool(false)),
        ])
    }

    fn check_refused(key: &str, value: Value, expected: &str) {
        let mut metadata = pieces();
        metadata.insert(key.into(), value);
        let error = build(&Metadata(&metadata)).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn the_best_scored_pair_merges_first() {
        let tokenizer = build(&Metadata(&pieces())).expect("a tokenizer");
        let ids = |text: &str| tokenizer.encode(text, SpecialText::AsText).expect("tokens");
        // "ba" scores above "ab", though it begins later.
        assert_eq!(ids("aba"), [6, 9]);
        assert_eq!(ids(" ab"), [10]);
        assert_eq!(ids("a\n\na"), [6, 11, 6]);
        assert_eq!(ids("\u{e9}"), [3, 4]);
        assert_eq!(ids("</s>").first(), Some(&0));
        assert_eq!(
            tokenizer.encode("a</s>", SpecialText::AsTokens),
            Ok(vec![6, 2])
        );
        assert!(tokenizer.add_bos());
        assert_eq!(tokenizer.stop_ids(), [2]);
        assert_eq!(tokenizer.token_bytes(3), [0xc3]);
    }

    #[test]
    fn a_vocabulary_that_splits_without_end_is_refused_before_it_takes_memory() {
        // Every prefix of one long token is a token: 500 thousand splits a letter.
        let mut tokens = vec![Value::Text("<unk>".into())];
        for letter in ["a", "b"] {
            let lengths = 1..=MAX_MERGED_BYTES;
            tokens.extend(lengths.map(|length| Value::Text(letter.repeat(length))));
        }
        let mut metadata = pieces();
        let all = |value: Value| Value::Array(vec![value; tokens.len()]);
        metadata.insert("tokenizer.ggml.scores".into(), all(Value::Float(0.0)));
        metadata.insert("tokenizer.ggml.token_type".into(), all(Value::Signed(1)));
        metadata.insert("tokenizer.ggml.tokens".into(), Value::Array(tokens));
        let error = build(&Metadata(&metadata)).expect_err("refused");
        assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
    }

    #[test]
    fn a_space_prefix_is_added_unless_the_file_says_no() {
        let mut metadata = pieces();
        metadata.remove("tokenizer.ggml.add_space_prefix");
        let tokenizer = build(&Metadata(&metadata)).expect("a tokenizer");
        assert_eq!(tokenizer.encode("ab", SpecialText::AsText), Ok(vec![10]));
    }

    #[test]
    fn unsound_token_lists_are_refused_by_name() {
        check_refused("tokenizer.ggml.model", Value::Text("t5".into()), "`t5`");
        check_refused(
            "tokenizer.ggml.scores",
            Value::Array(vec![]),
            "0 scores for 12 tokens",
        );
        check_refused(
            "tokenizer.ggml.token_type",
            Value::Array(vec![]),
            "0 token types",
        );
        check_refused(
            "tokenizer.ggml.eos_token_id",
            Value::Unsigned(12),
            "eos_token_id",
        );
        let twice = Value::Array(vec![Value::Text("a".into()); 12]);
        check_refused("tokenizer.ggml.tokens", twice, "the same text");
        let mut metadata = pieces();
        metadata.insert("tokenizer.ggml.model".into(), Value::Text("gpt2".into()));
        let error = build(&Metadata(&metadata)).expect_err("no rule");
        assert!(error.contains("tokenizer.ggml.pre"), "{error}");
        metadata.insert("tokenizer.ggml.pre".into(), Value::Text("tekken".into()));
        let error = build(&Metadata(&metadata)).expect_err("an unknown rule");
        assert!(error.contains("`tekken`"), "{error}");
        metadata.insert("tokenizer.ggml.pre".into(), Value::Text("smollm".into()));
        let merges = Value::Array(vec![Value::Text("a zz".into())]);
        metadata.insert("tokenizer.ggml.merges".into(), merges);
        let error = build(&Metadata(&metadata)).expect_err("a bad merge");
        assert!(error.contains("merge 0"), "{error}");
    }
}
