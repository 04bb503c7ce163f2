//! Walks the header of a GGUF file, with caps, before anything else sees the file.
//! Knows the container: magic, metadata, tensor table, alignment. Knows nothing of what keys mean.
//!
//! Every number read from the file is checked before it is used: an allocation that a hostile
//! length asked for would abort the process, which no caller can catch.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use super::{StoredType, TensorEntry};

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_NAME_BYTES: u64 = 1 << 10;
const MAX_STRING_BYTES: u64 = 1 << 24;
/// In all arrays together: a value takes 32 bytes in memory, as little as one in the file.
const MAX_ARRAY_ITEMS: u64 = 1 << 23;
const MAX_ARRAY_DEPTH: usize = 3;
const MAX_DIMS: u32 = 4;
/// All of metadata together; the largest published vocabularies take about 10 MB.
const MAX_HEADER_BYTES: u64 = 1 << 28;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// What a GGUF header says, checked against the file's length.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: Vec<TensorEntry>,
}

impl Header {
    /// Reads the header from the start of `reader`, a file of `file_bytes` bytes.
    ///
    /// The error says what is wrong; the caller adds the file's name.
    pub(crate) fn read(reader: impl Read, file_bytes: u64) -> Result<Self, String> {
        let mut walk = Walk {
            reader,
            position: 0,
            limit: file_bytes.min(MAX_HEADER_BYTES),
            file_bytes,
            items: 0,
        };
        if walk.array::<4>("magic")? != MAGIC {
            return Err("not a GGUF file (it does not begin with `GGUF`)".into());
        }
        let version = walk.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(format!(
                "GGUF version {version}; only 2 and 3 are supported"
            ));
        }
        let tensor_count = capped(
            "number of tensors",
            walk.u64("number of tensors")?,
            MAX_TENSORS,
        )?;
        let key_count = capped("number of keys", walk.u64("number of keys")?, MAX_KEYS)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = walk.string("a key", MAX_NAME_BYTES)?;
            let kind = walk.u32(&key)?;
            let value = walk.value(&key, kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("key `{key}` appears twice"));
            }
        }
        let alignment = alignment(&metadata)?;
        let raw = (0..tensor_count)
            .map(|_| walk.tensor())
            .collect::<Result<Vec<_>, _>>()?;
        let data_start = walk
            .position
            .checked_next_multiple_of(alignment)
            .ok_or("the header's end overflows")?;
        let tensors = raw
            .into_iter()
            .map(|tensor| tensor.place(data_start, alignment, file_bytes))
            .collect::<Result<Vec<_>, _>>()?;
        check_names(&tensors)?;
        check_overlap(&tensors)?;
        Ok(Self { metadata, tensors })
    }
}

fn capped(what: &str, value: u64, most: u64) -> Result<u64, String> {
    if value <= most {
        Ok(value)
    } else {
        Err(format!("{what} is {value}, more than the {most} allowed"))
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, String> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value {
        Value::Unsigned(n) if n.is_power_of_two() && *n <= MAX_ALIGNMENT => Ok(*n),
        other => Err(format!(
            "`general.alignment` must be a power of two up to {MAX_ALIGNMENT}, not {other:?}"
        )),
    }
}

fn check_names(tensors: &[TensorEntry]) -> Result<(), String> {
    let mut seen = HashSet::new();
    match tensors.iter().find(|t| !seen.insert(t.name.as_str())) {
        Some(twice) => Err(format!("tensor `{}` appears twice", twice.name)),
        None => Ok(()),
    }
}

fn check_overlap(tensors: &[TensorEntry]) -> Result<(), String> {
    let mut by_offset: Vec<&TensorEntry> = tensors.iter().collect();
    by_offset.sort_by_key(|t| (t.offset, t.bytes));
    match by_offset
        .windows(2)
        .find(|pair| pair[0].offset + pair[0].bytes > pair[1].offset)
    {
        Some(pair) => Err(format!(
            "tensors `{}` and `{}` overlap",
            pair[0].name, pair[1].name
        )),
        None => Ok(()),
    }
}

/// A tensor's table entry before it is known where the data begins.
struct RawTensor {
    name: String,
    dims: Vec<u64>,
    stored_type: StoredType,
    offset: u64,
}

impl RawTensor {
    fn place(
        self,
        data_start: u64,
        alignment: u64,
        file_bytes: u64,
    ) -> Result<TensorEntry, String> {
        let Self {
            name,
            dims,
            stored_type,
            offset,
        } = self;
        let elements = dims
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .ok_or_else(|| format!("tensor `{name}`: the product of its dimensions overflows"))?;
        let block = stored_type.block_elements() as u64;
        // The innermost dimension is the row, and rows are made of whole blocks.
        let row = dims.first().copied().unwrap_or(1);
        if elements == 0 || !row.is_multiple_of(block) {
            return Err(format!(
                "tensor `{name}`: rows of {row} elements are not whole blocks of {block} ({stored_type})"
            ));
        }
        let bytes = (elements / block)
            .checked_mul(stored_type.block_bytes() as u64)
            .ok_or_else(|| format!("tensor `{name}`: its size overflows"))?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "tensor `{name}`: offset {offset} is not a multiple of the alignment {alignment}"
            ));
        }
        let begin = data_start.checked_add(offset);
        let end = begin.and_then(|begin| begin.checked_add(bytes));
        match (begin, end) {
            (Some(begin), Some(end)) if end <= file_bytes => {
                let shape = dims
                    .iter()
                    .rev()
                    .map(|&dim| usize::try_from(dim))
                    .collect::<Result<_, _>>()
                    .map_err(|_| format!("tensor `{name}`: a dimension is too large"))?;
                Ok(TensorEntry {
                    name,
                    stored_type,
                    shape,
                    offset: begin,
                    bytes,
                })
            }
            _ => Err(format!(
                "tensor `{name}`: {bytes} bytes at offset {offset} reach past the end of the file \
                 ({file_bytes} bytes); the file is truncated or damaged"
            )),
        }
    }
}

struct Walk<R> {
    reader: R,
    position: u64,
    /// Nothing is read past this byte.
    limit: u64,
    file_bytes: u64,
    /// Array items so far.
    items: u64,
}

impl<R: Read> Walk<R> {
    fn remaining(&self) -> u64 {
        self.limit.saturating_sub(self.position)
    }

    /// Refuses a length before anything is allocated for it.
    fn reserve(&self, what: &str, bytes: u64) -> Result<(), String> {
        if bytes <= self.remaining() {
            return Ok(());
        }
        Err(format!(
            "{what}: {bytes} bytes wanted at byte {}, but {} remain (file of {} bytes)",
            self.position,
            self.remaining(),
            self.file_bytes
        ))
    }

    fn bytes(&mut self, what: &str, count: u64) -> Result<Vec<u8>, String> {
        self.reserve(what, count)?;
        let mut buffer = vec![0; count as usize];
        self.reader
            .read_exact(&mut buffer)
            .map_err(|error| format!("{what}: {error}"))?;
        self.position += count;
        Ok(buffer)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        self.reserve(what, N as u64)?;
        let mut buffer = [0; N];
        self.reader
            .read_exact(&mut buffer)
            .map_err(|error| format!("{what}: {error}"))?;
        self.position += N as u64;
        Ok(buffer)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str, most: u64) -> Result<String, String> {
        let length = self.u64(what)?;
        capped(&format!("{what}: string length"), length, most)?;
        let bytes = self.bytes(what, length)?;
        String::from_utf8(bytes).map_err(|_| format!("{what}: not UTF-8"))
    }

    fn value(&mut self, key: &str, kind: u32, depth: usize) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => match u8::from_le_bytes(self.array(key)?) {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(format!("`{key}`: {other} is not a boolean")),
            },
            8 => Value::Text(self.string(key, MAX_STRING_BYTES)?),
            9 => self.list(key, depth)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(format!("`{key}`: unknown value type {other}")),
        })
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<Value, String> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(format!(
                "`{key}`: arrays nested deeper than {MAX_ARRAY_DEPTH}"
            ));
        }
        let kind = self.u32(key)?;
        let length = self.u64(key)?;
        self.items = self.items.saturating_add(length);
        capped(
            &format!("`{key}`: array items"),
            self.items,
            MAX_ARRAY_ITEMS,
        )?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(format!("`{key}`: unknown value type {other}")),
        };
        self.reserve(key, length.saturating_mul(least))?;
        (0..length)
            .map(|_| self.value(key, kind, depth + 1))
            .collect::<Result<_, _>>()
            .map(Value::Array)
    }

    fn tensor(&mut self) -> Result<RawTensor, String> {
        let name = self.string("a tensor's name", MAX_NAME_BYTES)?;
        let n_dims = self.u32(&name)?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(format!(
                "tensor `{name}`: {n_dims} dimensions, must be 1 to {MAX_DIMS}"
            ));
        }
        let dims = (0..n_dims)
            .map(|_| self.u64(&name))
            .collect::<Result<_, _>>()?;
        let code = self.u32(&name)?;
        let stored_type = StoredType::from_ggml(code).ok_or_else(|| {
            format!(
                "tensor `{name}`: type {code} is not supported; supported are {}",
                StoredType::supported()
            )
        })?;
        let offset = self.u64(&name)?;
        Ok(RawTensor {
            name,
            dims,
            stored_type,
            offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes GGUF files, sound and unsound ones.
    #[derive(Clone, Default)]
    struct Craft(Vec<u8>);

    impl Craft {
        fn header(tensors: u64, keys: u64) -> Self {
            Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(keys)
        }

        fn u32(mut self, value: u32) -> Self {
            self.0.extend(value.to_le_bytes());
            self
        }

        fn u64(mut self, value: u64) -> Self {
            self.0.extend(value.to_le_bytes());
            self
        }

        fn text(mut self, text: &str) -> Self {
            self = self.u64(text.len() as u64);
            self.0.extend(text.as_bytes());
            self
        }

        fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
            self = self.text(name).u32(dims.len() as u32);
            for &dim in dims {
                self = self.u64(dim);
            }
            self.u32(kind).u64(offset)
        }

        fn data(mut self, bytes: usize) -> Self {
            let begin = self.0.len().next_multiple_of(32);
            self.0.resize(begin + bytes, 0);
            self
        }

        fn read(&self) -> Result<Header, String> {
            Header::read(self.0.as_slice(), self.0.len() as u64)
        }
    }

    fn check_refused(craft: Craft, expected: &str) {
        let error = craft.read().expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_sound_file_is_read() {
        let header = Craft::header(2, 2)
            .text("general.name")
            .u32(8)
            .text("x")
            .text("sizes")
            .u32(9)
            .u32(4)
            .u64(2)
            .u32(7)
            .u32(8)
            .tensor("a", &[2, 3], 0, 0)
            .tensor("b", &[32], 8, 32)
            .data(32 + 34)
            .read()
            .expect("a sound file");
        assert_eq!(header.metadata["general.name"], Value::Text("x".into()));
        let sizes = Value::Array(vec![Value::Unsigned(7), Value::Unsigned(8)]);
        assert_eq!(header.metadata["sizes"], sizes);
        assert_eq!(header.tensors[0].shape, [3, 2]);
        assert_eq!(
            (header.tensors[1].offset % 32, header.tensors[1].bytes),
            (0, 34)
        );
    }

    #[test]
    fn a_string_longer_than_the_file_is_refused() {
        check_refused(Craft::header(0, 1).u64(1 << 45), "string length");
        check_refused(Craft::header(0, 1).u64(1000), "remain");
    }

    #[test]
    fn an_array_of_absurd_length_is_refused() {
        check_refused(
            Craft::header(0, 1).text("k").u32(9).u32(4).u64(1 << 60),
            "array items",
        );
        check_refused(
            Craft::header(0, 1).text("k").u32(9).u32(8).u64(1 << 20),
            "remain",
        );
    }

    #[test]
    fn an_alignment_that_is_no_power_of_two_is_refused() {
        for alignment in [0, 3, 48, u32::MAX] {
            let craft = Craft::header(1, 1)
                .text("general.alignment")
                .u32(4)
                .u32(alignment);
            check_refused(craft.tensor("a", &[1], 0, 0).data(4), "power of two");
        }
        let wrong_type = Craft::header(0, 1)
            .text("general.alignment")
            .u32(8)
            .text("32");
        check_refused(wrong_type, "power of two");
    }

    #[test]
    fn four_thousand_million_dimensions_are_refused() {
        check_refused(
            Craft::header(1, 0).text("t").u32(4_000_000_000),
            "dimensions",
        );
    }

    #[test]
    fn two_hundred_thousand_nested_arrays_are_refused() {
        let mut craft = Craft::header(0, 1).text("k").u32(9);
        for _ in 0..200_000 {
            craft = craft.u32(9).u64(1);
        }
        check_refused(craft, "nested deeper");
    }

    #[test]
    fn dimensions_whose_product_overflows_are_refused() {
        check_refused(
            Craft::header(1, 0)
                .tensor("t", &[1 << 33, 1 << 33], 0, 0)
                .data(64),
            "overflows",
        );
        // The product fits, its size in bytes does not.
        check_refused(
            Craft::header(1, 0)
                .tensor("t", &[1 << 31, 1 << 32], 0, 0)
                .data(64),
            "overflows",
        );
    }

    #[test]
    fn a_tensor_larger_than_the_file_is_refused() {
        check_refused(
            Craft::header(1, 0).tensor("t", &[1 << 44], 0, 0).data(4096),
            "past the end",
        );
    }

    #[test]
    fn an_offset_past_the_end_is_refused() {
        check_refused(
            Craft::header(1, 0).tensor("t", &[1], 0, 1 << 20).data(64),
            "past the end",
        );
        check_refused(
            Craft::header(1, 0)
                .tensor("t", &[1], 0, u64::MAX - 31)
                .data(64),
            "past the end",
        );
    }

    #[test]
    fn a_truncated_header_is_refused_wherever_it_ends() {
        let whole = Craft::header(1, 1)
            .text("k")
            .u32(8)
            .text("v")
            .tensor("t", &[8], 0, 0)
            .data(32);
        assert!(whole.read().is_ok());
        for length in 0..whole.0.len() {
            let cut = Craft(whole.0[..length].to_vec());
            assert!(cut.read().is_err(), "{length} bytes");
        }
    }

    #[test]
    fn other_damage_is_named() {
        check_refused(Craft(b"GGML".to_vec()).u32(3), "not a GGUF file");
        check_refused(Craft(b"GGUF".to_vec()).u32(1), "version 1");
        check_refused(Craft::header(u64::MAX, 0), "number of tensors");
        check_refused(Craft::header(0, u64::MAX), "number of keys");
        check_refused(Craft::header(0, 1).text("k").u32(77), "unknown value type");
        check_refused(
            Craft::header(1, 0).tensor("t", &[32], 9, 0).data(64),
            "not supported",
        );
        check_refused(
            Craft::header(1, 0).tensor("t", &[33], 8, 0).data(64),
            "whole blocks",
        );
        check_refused(
            Craft::header(1, 0).tensor("t", &[1], 0, 8).data(64),
            "alignment",
        );
        check_refused(
            Craft::header(1, 0).tensor("t", &[0], 0, 0).data(64),
            "whole blocks",
        );
        let twice = Craft::header(2, 0)
            .tensor("t", &[1], 0, 0)
            .tensor("t", &[1], 0, 32);
        check_refused(twice.data(64), "appears twice");
        let overlap = Craft::header(2, 0)
            .tensor("a", &[16], 0, 0)
            .tensor("b", &[1], 0, 32);
        check_refused(overlap.data(64), "overlap");
        let key = Craft::header(0, 2)
            .text("k")
            .u32(4)
            .u32(1)
            .text("k")
            .u32(4)
            .u32(1);
        check_refused(key, "appears twice");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_walk_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            at in 0usize..100,
        ) {
            let mut craft = Craft::header(2, 1).text("k").u32(9).u32(4).u64(1).u32(1)
                .tensor("a", &[4, 2], 0, 0).tensor("b", &[32], 8, 32).data(96);
            for (index, byte) in bytes.iter().enumerate() {
                if let Some(target) = craft.0.get_mut(4 + at + index) {
                    *target = *byte;
                }
            }
            if let Ok(header) = craft.read() {
                for tensor in header.tensors {
                    prop_assert!(tensor.offset + tensor.bytes <= craft.0.len() as u64);
                }
            }
        }
    }
}
