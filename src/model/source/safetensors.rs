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
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - LENGTH_BYTES {
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
