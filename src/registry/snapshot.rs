//! Everything that is loaded, as one immutable value with one hash.
//! Knows checked artefacts and how they stand to the model; running canaries is the engine's work.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use inwit_probes::{Probe, RefusalHead, Site, SteeringVector, Verification};
use sha2::{Digest, Sha256};

use super::domain::PromptForm;
use crate::error::{Error, Result};
use crate::policy::{Catalog, Policy};

/// The name of the policy that reads nothing and allows everything; it is always there.
pub const EMPTY_POLICY: &str = "empty";

/// What `--policy` and requests mean by these is no document.
pub(super) const RESERVED_POLICIES: [&str; 3] = [EMPTY_POLICY, "off", "auto"];

/// What artefacts are compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelIds {
    pub architecture_id: String,
    pub weights_id: String,
    pub d_model: usize,
    pub n_layers: usize,
    pub vocab: usize,
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    /// In the order of their names; indices of a policy compiled against this snapshot.
    pub probes: Vec<Arc<LoadedProbe>>,
    pub vectors: BTreeMap<String, Arc<Vector>>,
    pub heads: BTreeMap<String, Arc<Head>>,
    pub policies: BTreeMap<String, Arc<Policy>>,
    pub default_policy: String,
    /// SHA-256 over the names and contents of everything above.
    pub hash: String,
}

#[derive(Clone, Debug)]
pub struct LoadedProbe {
    pub name: Arc<str>,
    pub revision: u64,
    pub content_hash: String,
    pub probe: Probe,
    pub standing: Standing,
}

/// How a probe stands to the weights that are loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Fitted on exactly these.
    Native,
    /// Fitted on others of the same architecture: may enforce once its canaries pass.
    Unverified { canaries: Canaries },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Canaries {
    NotRun,
    Passed,
    Failed(String),
}

#[derive(Clone, Debug)]
pub struct Vector {
    pub name: String,
    pub content_hash: String,
    pub site: Site,
    /// `[d_model]`, as stored: not necessarily of length 1.
    pub values: Arc<[f32]>,
    pub verification: Verification,
}

/// A low-rank difference to the language-model head: `logits += g * A (B h)`.
#[derive(Clone, Debug)]
pub struct Head {
    pub name: String,
    pub content_hash: String,
    pub rank: usize,
    /// `[vocab, rank]`, row-major.
    pub a: Arc<[f32]>,
    /// `[rank, d_model]`, row-major.
    pub b: Arc<[f32]>,
    pub verification: Verification,
}

impl Snapshot {
    pub fn empty() -> Self {
        let empty = Arc::new(Policy::empty());
        let mut snapshot = Self {
            probes: Vec::new(),
            vectors: BTreeMap::new(),
            heads: BTreeMap::new(),
            policies: BTreeMap::from([(EMPTY_POLICY.to_owned(), empty)]),
            default_policy: EMPTY_POLICY.to_owned(),
            hash: String::new(),
        };
        snapshot.hash = snapshot.content_hash();
        snapshot
    }

    pub fn probe(&self, name: &str) -> Option<&Arc<LoadedProbe>> {
        self.probes.iter().find(|probe| *probe.name == *name)
    }

    /// The named policy, or the default one.
    pub fn policy(&self, name: Option<&str>) -> Result<&Arc<Policy>> {
        let name = name.unwrap_or(&self.default_policy);
        self.policies.get(name).ok_or_else(|| Error::NotFound {
            field: "monitor.policy".into(),
            kind: "policy",
            name: name.chars().take(64).collect(),
            remedy: format!("there is {}", listed(self.policies.keys())),
        })
    }

    /// What a policy document may name.
    pub fn catalog(&self, n_layers: usize) -> Catalog<'_> {
        let vectors = self.vectors.values();
        Catalog {
            probes: self.probes.iter().map(|p| p.probe.manifest()).collect(),
            vectors: vectors.map(|v| (v.name.as_str(), v.site)).collect(),
            heads: self.heads.keys().map(String::as_str).collect(),
            n_layers,
        }
    }

    /// The same snapshot with `policy`, compiled against its catalog, as the default one; an
    /// error where its name means something else already.
    pub fn with_default_policy(&self, policy: Policy) -> Result<Self, String> {
        if RESERVED_POLICIES.contains(&policy.name.as_str()) {
            return Err(format!("`{}` is no name for a policy", policy.name));
        }
        if self.policies.contains_key(&policy.name) {
            return Err(format!("the library has a policy `{}`", policy.name));
        }
        let mut snapshot = self.clone();
        snapshot.default_policy = policy.name.clone();
        snapshot
            .policies
            .insert(policy.name.clone(), Arc::new(policy));
        snapshot.hash = snapshot.content_hash();
        Ok(snapshot)
    }

    /// Refuses a policy that reads a probe whose canaries did not pass on these weights.
    pub fn may_enforce(&self, policy: &Policy) -> Result<()> {
        let read: BTreeSet<_> = policy.detectors.iter().map(|d| d.probe).collect();
        for probe in read {
            let probe = self
                .probes
                .get(probe)
                .ok_or_else(|| Error::internal("a policy was compiled against another snapshot"))?;
            probe.may_enforce(&policy.name)?;
        }
        Ok(())
    }

    /// The same snapshot with what the canaries said. For each named probe: the logits of its
    /// canaries in their order, or why they could not be computed. Native probes stay native.
    pub fn with_canary_results<'a>(
        &self,
        results: impl IntoIterator<Item = (&'a str, Result<Vec<f32>, String>)>,
    ) -> Self {
        let mut snapshot = self.clone();
        for (name, logits) in results {
            let probe = snapshot.probes.iter_mut().find(|p| *p.name == *name);
            if let Some(probe) = probe
                && probe.standing != Standing::Native
            {
                let judged = logits.and_then(|logits| {
                    probe
                        .probe
                        .canaries_pass(&logits)
                        .map_err(|e| e.to_string())
                });
                let canaries = judged.map_or_else(Canaries::Failed, |()| Canaries::Passed);
                Arc::make_mut(probe).standing = Standing::Unverified { canaries };
            }
        }
        snapshot
    }

    pub(super) fn content_hash(&self) -> String {
        let mut hasher = Sha256::new();
        // Names and hashes hold no line breaks, so no two snapshots write the same lines.
        let mut line = |kind: &str, name: &str, hash: &str| {
            hasher.update(format!("{kind} {name} {hash}\n"));
        };
        for probe in &self.probes {
            line("probe", &probe.name, &probe.content_hash);
        }
        for vector in self.vectors.values() {
            line("vector", &vector.name, &vector.content_hash);
        }
        for head in self.heads.values() {
            line("head", &head.name, &head.content_hash);
        }
        for policy in self.policies.values() {
            line("policy", &policy.name, &policy.hash);
        }
        line("default", &self.default_policy, "");
        hex::encode(hasher.finalize())
    }
}

impl LoadedProbe {
    pub(super) fn new(probe: Probe, verification: Verification) -> Self {
        Self {
            name: Arc::from(probe.name()),
            revision: 1,
            content_hash: probe.content_hash().to_owned(),
            probe,
            standing: match verification {
                Verification::Native => Standing::Native,
                Verification::Unverified => Standing::Unverified {
                    canaries: Canaries::NotRun,
                },
            },
        }
    }

    /// Whether the request is of a kind that the probe was not trained on.
    pub fn out_of_domain(&self, form: &PromptForm) -> bool {
        !form.within(&self.probe.manifest().trained_on)
    }

    fn may_enforce(&self, policy: &str) -> Result<()> {
        let why = match &self.standing {
            Standing::Native
            | Standing::Unverified {
                canaries: Canaries::Passed,
            } => return Ok(()),
            Standing::Unverified {
                canaries: Canaries::NotRun,
            } => "its canaries were not run",
            Standing::Unverified {
                canaries: Canaries::Failed(why),
            } => why,
        };
        Err(Error::FailedPrecondition {
            subject: format!("policy `{policy}`, probe `{}`", self.name),
            message: format!(
                "was fitted on other weights, and {why}; it may not enforce: use --mode shadow, \
                 or fit it again on this model"
            ),
        })
    }
}

impl Vector {
    pub(super) fn new(vector: &SteeringVector, verification: Verification) -> Self {
        Self {
            name: vector.name().to_owned(),
            content_hash: vector.content_hash().to_owned(),
            site: vector.manifest().site,
            values: Arc::from(vector.vector()),
            verification,
        }
    }
}

impl Head {
    pub(super) fn new(head: &RefusalHead, verification: Verification) -> Self {
        Self {
            name: head.name().to_owned(),
            content_hash: head.content_hash().to_owned(),
            rank: head.manifest().rank,
            a: Arc::from(head.a()),
            b: Arc::from(head.b()),
            verification,
        }
    }
}

pub(super) fn listed<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_cannot_take_a_name_that_means_something_else() {
        let named = |name: &str| Policy {
            name: name.into(),
            ..Policy::empty()
        };
        let snapshot = Snapshot::empty();
        for name in RESERVED_POLICIES {
            assert!(snapshot.with_default_policy(named(name)).is_err(), "{name}");
        }
        let mine = snapshot.with_default_policy(named("mine")).expect("taken");
        assert_eq!(mine.default_policy, "mine");
        assert_ne!(mine.hash, snapshot.hash);
        assert!(mine.with_default_policy(named("mine")).is_err());
    }
}
