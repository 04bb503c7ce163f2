//! Where the artefacts of a model lie: `<library>/<model>/{probes,vectors,heads,policies}/`.

pub const PROBES: &str = "probes";
pub const VECTORS: &str = "vectors";
pub const HEADS: &str = "heads";
pub const POLICIES: &str = "policies";
