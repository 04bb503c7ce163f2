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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::join;
    use proptest::prelude::*;

    const KEY: &str = "inwit.test";

    fn sample() -> Vec<u8> {
        let tensors = [
            ("a".to_owned(), vec![2, 2], &[1.0, 2.0, 3.0, 4.0][..]),
            ("b".to_owned(), vec![2], &[5.0, 6.0][..]),
        ];
        write(KEY, &serde_json::json!({"format_version": 1}), &tensors).unwrap()
    }

    fn tensor_json(offsets: &str, shape: &str, dtype: &str) -> String {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    }

    fn refused(bytes: &[u8], expected: &str) {
        let message = match Contents::read(bytes, KEY) {
            Ok(_) => panic!("was read; expected an error with {expected:?}"),
            Err(e) => e.to_string(),
        };
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut contents = Contents::read(&sample(), KEY).unwrap();
        assert_eq!(contents.take("a", &[2, 2]).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let message = contents.take("b", &[1, 2]).unwrap_err().to_string();
        assert!(message.contains("has shape [2]"), "{message}");
        contents.finish().unwrap();
    }

    #[test]
    fn a_tensor_that_nobody_asked_for_is_refused() {
        let mut contents = Contents::read(&sample(), KEY).unwrap();
        contents.take("a", &[2, 2]).unwrap();
        assert!(
            contents
                .take("c", &[1])
                .unwrap_err()
                .to_string()
                .contains("is missing")
        );
        assert!(contents.finish().unwrap_err().to_string().contains("`b`"));
    }

    #[test]
    fn the_same_parts_give_the_same_bytes() {
        assert_eq!(sample(), sample());
        assert_eq!(content_hash(&sample()).len(), 64);
    }

    #[test]
    fn a_header_of_impossible_length_is_refused_before_anything_is_reserved() {
        for length in [1_u64 << 63, u64::MAX, 1 << 40, MAX_HEADER_BYTES + 1] {
            let mut bytes = sample();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            refused(&bytes, "at most");
        }
        let mut bytes = sample();
        bytes[..8].copy_from_slice(&MAX_HEADER_BYTES.to_le_bytes());
        refused(&bytes, "truncated");
    }

    #[test]
    fn a_header_that_is_not_sound_json_is_refused() {
        refused(&join("{{", &[]), "not sound JSON");
        refused(&join("", &[]), "not sound JSON");
        refused(&join("[1]", &[]), "header");
        refused(&join(&"[".repeat(100_000), &[]), "recursion limit");
        let mut bytes = join("\"ab\"", &[]);
        bytes[9] = 0xff;
        refused(&bytes, "not sound JSON");
    }

    #[test]
    fn duplicate_keys_are_refused_at_every_depth() {
        let t = tensor_json("[0,4]", "[1]", "F32");
        refused(
            &join(&format!(r#"{{"a":{t},"a":{t}}}"#), &[0; 4]),
            "duplicate key `a`",
        );
        let twice = r#"{"__metadata__":{"inwit.test":"{}","inwit.test":"{}"}}"#;
        refused(&join(twice, &[]), "duplicate key `inwit.test`");
        let shape = r#"{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}"#;
        refused(&join(shape, &[0; 4]), "duplicate key `shape`");
    }

    #[test]
    fn duplicate_keys_in_the_manifest_are_refused() {
        let manifest = r#"{\"format_version\":1,\"m\":{\"x\":1,\"x\":2}}"#;
        let file = join(
            &format!(r#"{{"__metadata__":{{"{KEY}":"{manifest}"}}}}"#),
            &[],
        );
        let contents = Contents::read(&file, KEY).unwrap();
        let message = contents
            .manifest::<serde_json::Value>()
            .unwrap_err()
            .to_string();
        assert!(message.contains("duplicate key `x`"), "{message}");
    }

    #[test]
    fn offsets_must_tile_the_file() {
        let one = |offsets| format!(r#"{{"a":{}}}"#, tensor_json(offsets, "[2]", "F32"));
        let two = |a, b| {
            let (a, b) = (tensor_json(a, "[1]", "F32"), tensor_json(b, "[1]", "F32"));
            format!(r#"{{"a":{a},"b":{b}}}"#)
        };
        refused(&join(&one("[0,800]"), &[0; 8]), "damaged or truncated");
        refused(&join(&one("[8,0]"), &[0; 8]), "damaged or truncated");
        refused(
            &join(&one("[18446744073709551608,18446744073709551615]"), &[0; 8]),
            "damaged",
        );
        refused(&join(&one("[-8,0]"), &[0; 8]), "header");
        refused(&join(&two("[0,4]", "[0,4]"), &[0; 8]), "invalid offset");
        refused(&join(&two("[0,4]", "[2,6]"), &[0; 8]), "invalid offset");
        refused(&join(&two("[0,4]", "[8,12]"), &[0; 12]), "invalid offset");
        refused(&join(&one("[0,8]"), &[0; 9]), "not fully covered");
    }

    #[test]
    fn a_shape_whose_product_overflows_is_refused() {
        let shape = "[4294967296,4294967296,2]";
        let header = format!(r#"{{"a":{}}}"#, tensor_json("[0,0]", shape, "F32"));
        refused(&join(&header, &[]), "overflow");
    }

    #[test]
    fn another_dtype_is_refused_with_the_one_that_is_needed() {
        let t = tensor_json("[0,4]", "[2]", "F16");
        let header = format!(r#"{{"__metadata__":{{"{KEY}":"{{}}"}},"a":{t}}}"#);
        refused(&join(&header, &[0; 4]), "float32 is needed");
    }

    #[test]
    fn another_kind_of_file_is_named_as_such() {
        refused(&join("{}", &[]), "another kind of file");
        refused(
            &join(r#"{"__metadata__":{"inwit.other":"{}"}}"#, &[]),
            "another kind of file",
        );
        let both = format!(r#"{{"__metadata__":{{"{KEY}":"{{}}","author":"x"}}}}"#);
        refused(&join(&both, &[]), "unknown key `author`");
        let python = format!(r#"{{"__metadata__":{{"{KEY}":"{{}}","format":"np"}}}}"#);
        assert!(Contents::read(&join(&python, &[]), KEY).is_ok());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(Contents::read(&bytes[..length], KEY).is_err(), "{length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        refused(&longer, "not fully covered");
    }

    #[test]
    fn a_file_above_the_cap_is_refused() {
        let bytes = vec![0; MAX_FILE_BYTES as usize + 1];
        refused(&bytes, "larger than 64 MiB");
    }

    #[test]
    fn a_replaced_file_leaves_no_partial_one_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new").unwrap();
        assert_eq!(read_file(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_file(&folder.path().join("none/a"), b"x").is_err());
        // A folder in the way makes the rename fail.
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(write_file(&folder.path().join("taken"), b"x").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_path_that_is_not_a_file_is_an_error_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(
            read_file(folder.path())
                .unwrap_err()
                .to_string()
                .contains("not a regular file")
        );
        let missing = folder.path().join("missing.safetensors");
        assert!(
            read_file(&missing)
                .unwrap_err()
                .to_string()
                .contains("missing.safetensors")
        );
    }

    proptest! {
        #[test]
        fn no_damage_makes_reading_panic(
            at in any::<prop::sample::Index>(), byte in any::<u8>(), second in any::<prop::sample::Index>(),
        ) {
            let mut bytes = sample();
            let (at, second) = (at.index(bytes.len()), second.index(bytes.len()));
            bytes[at] = byte;
            bytes[second] ^= 1 << (byte % 8);
            if let Ok(contents) = Contents::read(&bytes, KEY) {
                let _ = contents.manifest::<serde_json::Value>();
            }
        }

        #[test]
        fn noise_is_never_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Contents::read(&bytes, KEY).is_err());
        }
    }
}
