//! Reads and writes the files of this crate: named f32 tensors and one manifest, in safetensors.
//! Trusts nothing in a file; knows nothing of what the tensors mean.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::manifest::check_version;

/// No file of this crate is larger.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
const MAX_HEADER_BYTES: u64 = 8 << 20;
const MAX_TENSORS: usize = 1_024;

pub(crate) struct Contents {
    manifest: String,
    tensors: BTreeMap<String, Tensor>,
}

pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

impl Contents {
    /// Reads a whole file whose metadata holds the manifest under `key`.
    pub(crate) fn read(bytes: &[u8], key: &str) -> Result<Self> {
        let header = header(bytes)?;
        serde_json::from_slice::<NoDuplicates>(header).map_err(|e| {
            Error::invalid(
                "header",
                format!("is not sound JSON: {e}; save the file again"),
            )
        })?;
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(unsound)?;
        if metadata.tensors().len() > MAX_TENSORS {
            return Err(Error::invalid(
                "header",
                format!("names more than {MAX_TENSORS} tensors"),
            ));
        }
        let manifest = manifest_text(metadata.metadata().as_ref(), key)?;
        let file = SafeTensors::deserialize(bytes).map_err(unsound)?;
        let tensors = file
            .iter()
            .map(|(name, view)| Ok((name.to_owned(), tensor(name, &view)?)))
            .collect::<Result<_>>()?;
        Ok(Self { manifest, tensors })
    }

    pub(crate) fn manifest<T: DeserializeOwned>(&self) -> Result<T> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let unsound =
            |e: serde_json::Error| Error::invalid("manifest", format!("{e}; save the file again"));
        serde_json::from_str::<NoDuplicates>(&self.manifest).map_err(unsound)?;
        // The version first: a file from a later build should say so, not name an unknown field.
        let version: Version = serde_json::from_str(&self.manifest).map_err(unsound)?;
        check_version(version.format_version)?;
        serde_json::from_str(&self.manifest).map_err(unsound)
    }

    /// Takes the named tensor, whatever its shape.
    pub(crate) fn take_any(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| {
            Error::invalid(
                format!("tensor `{name}`"),
                "is missing; save the file again",
            )
        })
    }

    /// Takes the named tensor, which must have that shape.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.take_any(name)?;
        if tensor.shape != shape {
            return Err(Error::invalid(
                format!("tensor `{name}`"),
                format!(
                    "has shape {:?}, but the manifest says {shape:?}",
                    tensor.shape
                ),
            ));
        }
        Ok(tensor.values)
    }

    /// Refuses tensors that nobody took.
    pub(crate) fn finish(self) -> Result<()> {
        match self.tensors.first_key_value() {
            None => Ok(()),
            Some((name, _)) => Err(Error::invalid(
                format!("tensor `{}`", name.escape_debug()),
                "is not part of this kind of file; remove it",
            )),
        }
    }
}

/// The file's bytes: the same parts always give the same bytes.
pub(crate) fn write<T: Serialize>(
    key: &str,
    manifest: &T,
    tensors: &[(String, Vec<usize>, &[f32])],
) -> Result<Vec<u8>> {
    let unsound = |e: String| Error::invalid("file", format!("cannot be written: {e}"));
    let manifest = serde_json::to_string(manifest).map_err(|e| unsound(e.to_string()))?;
    let raw: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect())
        .collect();
    let views = tensors
        .iter()
        .zip(&raw)
        .map(|((name, shape, _), raw)| {
            Ok((
                name.as_str(),
                TensorView::new(Dtype::F32, shape.clone(), raw)?,
            ))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|e| unsound(e.to_string()))?;
    let metadata = HashMap::from([(key.to_owned(), manifest)]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| unsound(e.to_string()))
}

pub(crate) fn content_hash(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let io = |e: std::io::Error| Error::io(path, &e);
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::invalid("file", "is not a regular file").in_file(path));
    }
    let mut bytes = Vec::new();
    // One byte over the cap is enough to know; a growing file cannot fill the memory.
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    Ok(bytes)
}

/// Replaces the file as a whole, so that no reader meets half of it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |e: std::io::Error| Error::io(path, &e);
    let name = path
        .file_name()
        .ok_or_else(|| Error::invalid("file", "has no name").in_file(path))?;
    let mut partial = name.to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(partial);
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
    }
    written.map_err(io)
}

/// The header's bytes, once its length is known to lie inside the file.
fn header(bytes: &[u8]) -> Result<&[u8]> {
    let total = bytes.len() as u64;
    if total > MAX_FILE_BYTES {
        return Err(Error::invalid(
            "file",
            format!("is larger than {} MiB", MAX_FILE_BYTES >> 20),
        ));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::invalid(
            "file",
            "is truncated: shorter than a header's length; copy it again",
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(Error::invalid(
            "header",
            format!(
                "claims {length} bytes, but at most {MAX_HEADER_BYTES} are read; is it a safetensors file?"
            ),
        ));
    }
    usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| Error::invalid("header", "is truncated; copy the file again"))
}

fn unsound(error: safetensors::SafeTensorError) -> Error {
    Error::invalid(
        "header",
        format!("{error}; the file is damaged or truncated, copy or save it again"),
    )
}

fn manifest_text(metadata: Option<&HashMap<String, String>>, key: &str) -> Result<String> {
    let missing = || {
        Error::invalid(
            "metadata",
            format!("has no `{key}`; this is another kind of file"),
        )
    };
    let metadata = metadata.ok_or_else(missing)?;
    // Writers in Python add `format`; anything else is something we would be ignoring.
    match metadata
        .keys()
        .filter(|k| *k != key && *k != "format")
        .min()
    {
        Some(other) if metadata.contains_key(key) => Err(Error::invalid(
            "metadata",
            format!("has an unknown key `{}`; remove it", other.escape_debug()),
        )),
        _ => metadata.get(key).cloned().ok_or_else(missing),
    }
}

fn tensor(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    if view.dtype() != Dtype::F32 {
        return Err(Error::invalid(
            format!("tensor `{}`", name.escape_debug()),
            format!(
                "has dtype {}, but float32 is needed; convert it",
                view.dtype()
            ),
        ));
    }
    let (chunks, _) = view.data().as_chunks::<4>();
    Ok(Tensor {
        shape: view.shape().to_vec(),
        values: chunks
            .iter()
            .map(|chunk| f32::from_le_bytes(*chunk))
            .collect(),
    })
}

/// Any JSON in which no object has a key twice: two readers must never see two different files.
struct NoDuplicates;

impl<'de> Deserialize<'de> for NoDuplicates {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NoDuplicates)
    }
}

impl<'de> Visitor<'de> for NoDuplicates {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate keys")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element::<NoDuplicates>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let shown: String = key.escape_debug().take(80).collect();
            if !seen.insert(key) {
                return Err(A::Error::custom(format!("duplicate key `{shown}`")));
            }
            map.next_value::<NoDuplicates>()?;
        }
        Ok(self)
    }
}
