//! Checks the header of a safetensors file before a byte of its data is read.
//! Knows the container; knows nothing of what the tensors mean.
//!
//! The `safetensors` crate checks offsets against shapes, order and overlap. Added here: the
//! header's length against the file before anything is allocated, names that appear twice
//! (the crate keeps the last), the file's length, and the types Inwit can use.

use std::fmt;
use std::io::Read;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserializer as _;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};

use super::{StoredType, TensorEntry};

const LENGTH_BYTES: u64 = 8;
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Reads the header from the start of `reader`, a file of `file_bytes` bytes.
///
/// The error says what is wrong; the caller adds the file's name.
pub(crate) fn read_header(
    mut reader: impl Read,
    file_bytes: u64,
) -> Result<Vec<TensorEntry>, String> {
    let mut length = [0; LENGTH_BYTES as usize];
    reader
        .read_exact(&mut length)
        .map_err(|_| "too short to be a safetensors file")?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes.saturating_sub(LENGTH_BYTES) {
        return Err(format!(
            "its header claims {header_bytes} bytes, in a file of {file_bytes} bytes"
        ));
    }
    let mut header = vec![0; header_bytes as usize];
    reader
        .read_exact(&mut header)
        .map_err(|error| format!("its header: {error}"))?;
    let header = std::str::from_utf8(&header).map_err(|_| "its header is not UTF-8")?;
    let mut tensors = parse(header)?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Metadata::new(None, tensors.clone()).map_err(|error| error.to_string())?;

    let data_start = LENGTH_BYTES + header_bytes;
    let data_bytes = tensors.last().map_or(0, |(_, info)| info.data_offsets.1) as u64;
    if data_start.checked_add(data_bytes) != Some(file_bytes) {
        return Err(format!(
            "its header describes {data_bytes} bytes of tensors, but {} follow; the file is truncated or damaged",
            file_bytes - data_start
        ));
    }
    tensors
        .into_iter()
        .map(|(name, info)| place(name, info, data_start))
        .collect()
}

fn place(name: String, info: TensorInfo, data_start: u64) -> Result<TensorEntry, String> {
    let stored_type = match info.dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::BF16 => StoredType::Bf16,
        other => {
            return Err(format!(
                "tensor `{name}`: type {other} is not supported; supported are F32, F16 and BF16"
            ));
        }
    };
    let (begin, end) = info.data_offsets;
    Ok(TensorEntry {
        name,
        stored_type,
        shape: info.shape,
        offset: data_start + begin as u64,
        bytes: (end - begin) as u64,
    })
}

fn parse(header: &str) -> Result<Vec<(String, TensorInfo)>, String> {
    let mut json = serde_json::Deserializer::from_str(header);
    json.deserialize_map(Entries)
        .and_then(|entries| json.end().map(|()| entries))
        .map_err(|error| format!("its header: {error}"))
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen = std::collections::HashSet::new();
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor `{name}` appears twice")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<TensorEntry>, String> {
        read_header(bytes, bytes.len() as u64)
    }

    fn check_refused(header: &str, data: usize, expected: &str) {
        let error = read(&file(header, data)).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_sound_file_is_read() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}"#;
        let entries = read(&file(header, 12)).expect("a sound file");
        assert_eq!(entries[0].name, "a");
        assert_eq!(entries[0].shape, [1, 2]);
        assert_eq!(entries[1].stored_type, StoredType::Bf16);
        assert_eq!(entries[1].offset, 8 + header.len() as u64 + 8);
    }

    #[test]
    fn a_header_longer_than_the_file_is_refused() {
        for claimed in [1u64 << 63, u64::MAX, 1 << 20, 9] {
            let mut bytes = claimed.to_le_bytes().to_vec();
            bytes.extend(b"{}      ");
            assert!(
                read(&bytes).expect_err("refused").contains("claims"),
                "{claimed}"
            );
        }
        assert!(read(b"short").is_err());
    }

    #[test]
    fn damage_is_named() {
        check_refused("[]", 0, "expected an object");
        check_refused("{", 0, "EOF");
        let a = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        check_refused(&format!("{{{a},{a}}}"), 4, "appears twice");
        check_refused(&format!("{{{a}}}"), 8, "truncated or damaged");
        check_refused(&format!("{{{a}}}"), 2, "truncated or damaged");
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        check_refused(overlap, 8, "offset");
        let shape = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
        check_refused(shape, 8, "invalid shape");
        let huge = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}"#;
        check_refused(huge, 8, "overflow");
        let kind = r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
        check_refused(kind, 8, "not supported");
    }
}
