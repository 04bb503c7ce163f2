//! The loaded probes, vectors, refusal heads and policies: one immutable snapshot, swapped whole.
//! Knows files and identities; knows neither the model's weights nor who asks.

mod domain;
mod load;
mod shipped;
mod snapshot;

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;

pub use domain::PromptForm;
pub use load::{LibraryFile, library_for};
pub use snapshot::{
    Canaries, EMPTY_POLICY, Head, LoadedProbe, ModelIds, Snapshot, Standing, Vector,
};

use crate::error::Result;

/// Hands out the current snapshot. A request keeps the one it was admitted under.
pub struct Registry {
    current: ArcSwap<Snapshot>,
}

impl Registry {
    pub fn new(snapshot: Snapshot) -> Self {
        Self {
            current: ArcSwap::from_pointee(snapshot),
        }
    }

    /// For a model that no library fits: nothing but the empty policy.
    pub fn empty() -> Self {
        Self::new(Snapshot::empty())
    }

    /// Loads one model's folder, as `library_for` finds it. `default_policy` unset: the policy
    /// named `default`, or the only one there is. Errors name the file and the remedy.
    pub fn load(dir: &Path, model: &ModelIds, default_policy: Option<&str>) -> Result<Self> {
        let files = load::read_folder(dir)?;
        Ok(Self::new(Snapshot::from_files(
            &files,
            model,
            default_policy,
        )?))
    }

    /// Loads what is built into the binary for this model; none when nothing is.
    pub fn load_shipped(model: &ModelIds, default_policy: Option<&str>) -> Result<Option<Self>> {
        let Some(files) = shipped::library_for(model)? else {
            return Ok(None);
        };
        let snapshot = Snapshot::from_files(&files, model, default_policy)?;
        Ok(Some(Self::new(snapshot)))
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Swaps the whole snapshot; requests in flight keep theirs.
    pub fn replace(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
    }
}
