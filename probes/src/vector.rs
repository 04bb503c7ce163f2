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
