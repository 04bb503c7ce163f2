//! A steering vector as a file: a direction at one site, and how large states are there.
//! Knows nothing of how strongly, where or when it is applied.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::container::{self, Contents};
use crate::error::{Error, Result};
use crate::manifest::{
    FORMAT_VERSION, MAX_D_MODEL, ModelIdentity, Record, Verification, check_between, check_name,
    check_version,
};
use crate::probe::{check_d_model, check_values};
use crate::site::Site;

/// Where a vector's manifest lies in the file's metadata.
pub const VECTOR_KEY: &str = "inwit.vector";

#[derive(Debug, Clone, PartialEq)]
pub struct SteeringVector {
    manifest: VectorManifest,
    vector: Vec<f32>,
    content_hash: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorManifest {
    pub format_version: u32,
    pub name: String,
    pub site: Site,
    pub d_model: usize,
    pub norms: NormStatistics,
    pub model: ModelIdentity,
    pub record: Record,
}

/// How long hidden states are at the site, so that a strength can be judged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormStatistics {
    /// Mean of `|h|` over `rows` states.
    pub mean: f32,
    pub std: f32,
    pub rows: u64,
}

impl VectorManifest {
    pub fn new(
        name: &str,
        site: Site,
        d_model: usize,
        norms: NormStatistics,
        model: ModelIdentity,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            name: name.to_owned(),
            site,
            d_model,
            norms,
            model,
            record: Record::default(),
        }
    }

    fn check(&self) -> Result<()> {
        check_version(self.format_version)?;
        check_name("name", &self.name)?;
        check_between("d_model", self.d_model, 1, MAX_D_MODEL)?;
        let NormStatistics { mean, std, .. } = self.norms;
        if !(mean.is_finite() && mean > 0.0 && std.is_finite() && std >= 0.0) {
            return Err(Error::invalid(
                "norms",
                "must be finite, with a mean above 0",
            ));
        }
        self.model.check()?;
        self.record.check()
    }
}

impl SteeringVector {
    pub fn new(manifest: VectorManifest, vector: Vec<f32>) -> Result<Self> {
        let mut made = Self::checked(manifest, vector)?;
        made.content_hash = container::content_hash(&made.to_bytes()?);
        Ok(made)
    }

    fn checked(manifest: VectorManifest, vector: Vec<f32>) -> Result<Self> {
        manifest.check()?;
        check_values("vector", &vector, manifest.d_model)?;
        if vector.iter().all(|v| *v == 0.0) {
            return Err(Error::invalid(
                "vector",
                "is all zero and has no direction; fit it again",
            ));
        }
        Ok(Self {
            manifest,
            vector,
            content_hash: String::new(),
        })
    }

    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = container::read_file(path)?;
        Self::from_bytes(&bytes).map_err(|e| e.in_file(path))
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut contents = Contents::read(bytes, VECTOR_KEY)?;
        let manifest: VectorManifest = contents.manifest()?;
        manifest.check()?;
        let vector = contents.take("vector", &[manifest.d_model])?;
        contents.finish()?;
        let mut read = Self::checked(manifest, vector)?;
        read.content_hash = container::content_hash(bytes);
        Ok(read)
    }

    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        container::write_file(path.as_ref(), &self.to_bytes()?)
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let tensors = [(
            "vector".to_owned(),
            vec![self.manifest.d_model],
            self.vector.as_slice(),
        )];
        container::write(VECTOR_KEY, &self.manifest, &tensors)
    }

    pub fn manifest(&self) -> &VectorManifest {
        &self.manifest
    }

    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// `[d_model]`, as stored: not necessarily of length 1.
    pub fn vector(&self) -> &[f32] {
        &self.vector
    }

    /// SHA-256 of the vector's file, in hexadecimal.
    pub fn content_hash(&self) -> &str {
        &self.content_hash
    }

    /// Refuses a model of another width, or one that lacks the site.
    pub fn check_model(&self, d_model: usize, n_layers: usize) -> Result<()> {
        check_d_model(self.manifest.d_model, d_model)?;
        self.manifest.site.check(n_layers)
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
    use crate::testing::{logistic, model, with_manifest, with_value};
    use serde_json::json;

    fn sample() -> SteeringVector {
        let norms = NormStatistics {
            mean: 31.5,
            std: 4.0,
            rows: 512,
        };
        let manifest = VectorManifest::new("refusal", Site::ResidPost(7), 4, norms, model());
        SteeringVector::new(manifest, vec![0.5, -1.0, 0.0, 2.0]).unwrap()
    }

    fn refused(bytes: &[u8], expected: &str) {
        let message = SteeringVector::from_bytes(bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }

    #[test]
    fn a_vector_round_trips_through_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("refusal.safetensors");
        sample().save(&path).unwrap();
        let loaded = SteeringVector::load(&path).unwrap();
        assert_eq!(loaded, sample());
        assert_eq!(loaded.to_bytes().unwrap(), std::fs::read(&path).unwrap());
    }

    #[test]
    fn a_damaged_vector_is_refused() {
        let bytes = sample().to_bytes().unwrap();
        refused(
            &with_value(&bytes, "vector", 2, f32::NAN),
            "value 2 is not finite",
        );
        refused(&bytes[..bytes.len() - 1], "damaged or truncated");
        let change =
            |field: &'static str, value| with_manifest(&bytes, VECTOR_KEY, |m| m[field] = value);
        refused(&change("d_model", json!(5)), "has shape [4]");
        refused(&change("name", json!("../../x")), "is not a name");
        refused(&change("surprise", json!(1)), "unknown field `surprise`");
        refused(&change("format_version", json!(7)), "reads version 1");
        refused(
            &change("norms", json!({"mean": 1e300, "std": 0.0, "rows": 1})),
            "norms",
        );
    }

    #[test]
    fn a_probe_is_not_a_vector() {
        refused(&logistic().to_bytes().unwrap(), "another kind of file");
    }

    #[test]
    fn a_vector_without_direction_is_refused() {
        let manifest = sample().manifest().clone();
        let error = SteeringVector::new(manifest, vec![0.0; 4]).unwrap_err();
        assert!(error.to_string().contains("no direction"), "{error}");
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused() {
        assert!(sample().check_model(4, 8).is_ok());
        assert!(sample().check_model(5, 8).is_err());
        assert!(sample().check_model(4, 7).is_err());
        assert!(sample().identity_against("other", "weights-1").is_err());
    }
}
