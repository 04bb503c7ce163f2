//! A refusal head as a file: a low-rank difference to the language-model head,
//! `logits = T h + g A (B h)` (the form that replaces SafeSwitch's full copy of the head).
//! Knows nothing of when it is switched on.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::container::{self, Contents};
use crate::error::{Error, Result};
use crate::manifest::{
    FORMAT_VERSION, MAX_D_MODEL, ModelIdentity, Record, Verification, check_between, check_name,
    check_version,
};
use crate::probe::{check_d_model, check_values};

/// Where a refusal head's manifest lies in the file's metadata.
pub const REFUSAL_HEAD_KEY: &str = "inwit.refusal_head";
const MAX_RANK: usize = 1_024;
const MAX_VOCAB: usize = 1 << 21;

#[derive(Debug, Clone, PartialEq)]
pub struct RefusalHead {
    manifest: RefusalHeadManifest,
    a: Vec<f32>,
    b: Vec<f32>,
    content_hash: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusalHeadManifest {
    pub format_version: u32,
    pub name: String,
    pub rank: usize,
    pub d_model: usize,
    pub vocab: usize,
    pub model: ModelIdentity,
    pub record: Record,
}

impl RefusalHeadManifest {
    pub fn new(
        name: &str,
        rank: usize,
        d_model: usize,
        vocab: usize,
        model: ModelIdentity,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            name: name.to_owned(),
            rank,
            d_model,
            vocab,
            model,
            record: Record::default(),
        }
    }

    fn check(&self) -> Result<()> {
        check_version(self.format_version)?;
        check_name("name", &self.name)?;
        check_between("rank", self.rank, 1, MAX_RANK)?;
        check_between("d_model", self.d_model, 1, MAX_D_MODEL)?;
        check_between("vocab", self.vocab, 1, MAX_VOCAB)?;
        self.model.check()?;
        self.record.check()
    }
}

impl RefusalHead {
    /// `a` is `[vocab, rank]`, `b` is `[rank, d_model]`, both row-major.
    pub fn new(manifest: RefusalHeadManifest, a: Vec<f32>, b: Vec<f32>) -> Result<Self> {
        let mut made = Self::checked(manifest, a, b)?;
        let bytes = made.to_bytes()?;
        if bytes.len() as u64 > container::MAX_FILE_BYTES {
            return Err(Error::invalid(
                "rank",
                format!(
                    "makes a file above {} MiB; choose a lower one",
                    container::MAX_FILE_BYTES >> 20
                ),
            ));
        }
        made.content_hash = container::content_hash(&bytes);
        Ok(made)
    }

    fn checked(manifest: RefusalHeadManifest, a: Vec<f32>, b: Vec<f32>) -> Result<Self> {
        manifest.check()?;
        // The caps on each keep the products far inside a usize.
        check_values("a", &a, manifest.vocab * manifest.rank)?;
        check_values("b", &b, manifest.rank * manifest.d_model)?;
        if a.iter().all(|x| *x == 0.0) || b.iter().all(|x| *x == 0.0) {
            return Err(Error::invalid(
                "a, b",
                "are all zero, so the head would change nothing; fit it again",
            ));
        }
        Ok(Self {
            manifest,
            a,
            b,
            content_hash: String::new(),
        })
    }

    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = container::read_file(path)?;
        Self::from_bytes(&bytes).map_err(|e| e.in_file(path))
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut contents = Contents::read(bytes, REFUSAL_HEAD_KEY)?;
        let manifest: RefusalHeadManifest = contents.manifest()?;
        manifest.check()?;
        let a = contents.take("a", &[manifest.vocab, manifest.rank])?;
        let b = contents.take("b", &[manifest.rank, manifest.d_model])?;
        contents.finish()?;
        let mut read = Self::checked(manifest, a, b)?;
        read.content_hash = container::content_hash(bytes);
        Ok(read)
    }

    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        container::write_file(path.as_ref(), &self.to_bytes()?)
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let m = &self.manifest;
        let tensors = [
            ("a".to_owned(), vec![m.vocab, m.rank], self.a.as_slice()),
            ("b".to_owned(), vec![m.rank, m.d_model], self.b.as_slice()),
        ];
        container::write(REFUSAL_HEAD_KEY, m, &tensors)
    }

    pub fn manifest(&self) -> &RefusalHeadManifest {
        &self.manifest
    }

    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// `[vocab, rank]`, row-major.
    pub fn a(&self) -> &[f32] {
        &self.a
    }

    /// `[rank, d_model]`, row-major.
    pub fn b(&self) -> &[f32] {
        &self.b
    }

    /// SHA-256 of the head's file, in hexadecimal.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Refuses a model of another width or vocabulary (the number of rows of its head).
    pub fn check_model(&self, d_model: usize, vocab: usize) -> Result<()> {
        check_d_model(self.manifest.d_model, d_model)?;
        if self.manifest.vocab == vocab {
            return Ok(());
        }
        Err(Error::ModelMismatch {
            field: "vocab".to_owned(),
            made_for: self.manifest.vocab.to_string(),
            loaded: vocab.to_string(),
        })
    }

    /// Refuses another architecture, and tells the same weights from others.
    pub fn identity_against(
        &self,
        architecture_id: &str,
        weights_id: &str,
    ) -> Result<Verification> {
        self.manifest.model.against(architecture_id, weights_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{model, with_manifest, with_value};
    use serde_json::json;

    fn sample() -> RefusalHead {
        let manifest = RefusalHeadManifest::new("refuses", 2, 3, 5, model());
        let wave = |len: usize| (0..len).map(|i| (i as f32).cos()).collect();
        RefusalHead::new(manifest, wave(10), wave(6)).unwrap()
    }

    fn refused(bytes: &[u8], expected: &str) {
        let message = RefusalHead::from_bytes(bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }

    #[test]
    fn a_head_round_trips_through_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("refuses.safetensors");
        sample().save(&path).unwrap();
        let loaded = RefusalHead::load(&path).unwrap();
        assert_eq!(loaded, sample());
        assert_eq!(loaded.to_bytes().unwrap(), std::fs::read(&path).unwrap());
    }

    #[test]
    fn a_damaged_head_is_refused() {
        let bytes = sample().to_bytes().unwrap();
        refused(
            &with_value(&bytes, "a", 9, f32::INFINITY),
            "a: value 9 is not finite",
        );
        refused(
            &with_value(&bytes, "b", 0, f32::NAN),
            "b: value 0 is not finite",
        );
        let change = |field: &'static str, value| {
            with_manifest(&bytes, REFUSAL_HEAD_KEY, |m| m[field] = value)
        };
        refused(&change("rank", json!(3)), "has shape [5, 2]");
        refused(&change("rank", json!(0)), "between 1 and 1024");
        refused(&change("vocab", json!(1_u64 << 40)), "vocab");
        refused(&change("name", json!("/x")), "is not a name");
        refused(&change("surprise", json!(1)), "unknown field `surprise`");
        refused(&change("format_version", json!(0)), "reads version 1");
    }

    #[test]
    fn a_head_that_changes_nothing_is_refused() {
        let manifest = sample().manifest().clone();
        let b = sample().b().to_vec();
        assert!(RefusalHead::new(manifest, vec![0.0; 10], b).is_err());
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused() {
        assert!(sample().check_model(3, 5).is_ok());
        assert!(sample().check_model(4, 5).is_err());
        let message = sample().check_model(3, 6).unwrap_err().to_string();
        assert!(message.contains("vocab"), "{message}");
    }
}
