//! A probe as a file: which tensors it holds and how they are named.
//! Reading the container safely is `container.rs`'s work, judging the parts `probe.rs`'s.

use std::path::Path;

use crate::container::{self, Contents};
use crate::error::{Error, Result};
use crate::manifest::{Combine, HeadSpec, Manifest, NormKind};
use crate::probe::{Head, InputNorm, Probe, TwoLayer};

/// Where a probe's manifest lies in the file's metadata.
pub const PROBE_KEY: &str = "inwit.probe";

impl Probe {
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = container::read_file(path)?;
        Self::from_bytes(&bytes).map_err(|e| e.in_file(path))
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut contents = Contents::read(bytes, PROBE_KEY)?;
        let manifest: Manifest = contents.manifest()?;
        manifest.check()?;
        let heads = manifest.heads.iter().enumerate();
        let heads = heads
            .map(|(index, spec)| read_head(&mut contents, index, spec, manifest.d_model))
            .collect::<Result<Vec<_>>>()?;
        let prober = match manifest.combine {
            Combine::Sum => None,
            Combine::TwoLayer => Some(read_prober(&mut contents, manifest.heads[0].out)?),
        };
        contents.finish()?;
        Self::from_parts(manifest, heads, prober, container::content_hash(bytes))
    }

    /// Writes the file as a whole: a reader sees the old one or the new one.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        container::write_file(path.as_ref(), &self.to_bytes()?)
    }

    /// The same probe always gives the same bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let d_model = self.manifest().d_model;
        let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
        for (index, head) in self.heads().iter().enumerate() {
            let name = |part| tensor_name(index, part);
            tensors.push((name("weight"), vec![head.out, d_model], &head.weight));
            tensors.push((name("bias"), vec![head.out], &head.bias));
            if let InputNorm::Standard { mean, scale } = &head.norm {
                tensors.push((name("mean"), vec![d_model], mean));
                tensors.push((name("scale"), vec![d_model], scale));
            }
        }
        if let Some(prober) = self.prober() {
            let hidden = self.heads().first().map_or(0, |head| head.out);
            tensors.push((W2.to_owned(), vec![prober.out, hidden], &prober.w2));
            tensors.push((B2.to_owned(), vec![prober.out], &prober.b2));
        }
        container::write(PROBE_KEY, self.manifest(), &tensors)
    }
}

const W2: &str = "prober.w2";
const B2: &str = "prober.b2";

fn tensor_name(head: usize, part: &str) -> String {
    format!("heads.{head}.{part}")
}

fn read_head(
    contents: &mut Contents,
    index: usize,
    spec: &HeadSpec,
    d_model: usize,
) -> Result<Head> {
    let mut take = |part, shape: &[usize]| contents.take(&tensor_name(index, part), shape);
    Ok(Head {
        site: spec.site,
        weight: take("weight", &[spec.out, d_model])?,
        bias: take("bias", &[spec.out])?,
        out: spec.out,
        norm: match spec.norm {
            NormKind::None => InputNorm::None,
            NormKind::Unit => InputNorm::Unit,
            NormKind::Standard => InputNorm::Standard {
                mean: take("mean", &[d_model])?,
                scale: take("scale", &[d_model])?,
            },
        },
    })
}

fn read_prober(contents: &mut Contents, hidden: usize) -> Result<TwoLayer> {
    let w2 = contents.take_any(W2)?;
    let out = match w2.shape[..] {
        [out, width] if width == hidden => out,
        _ => {
            return Err(Error::invalid(
                format!("tensor `{W2}`"),
                format!("has shape {:?}, but [1 or 2, {hidden}] is needed", w2.shape),
            ));
        }
    };
    Ok(TwoLayer {
        w2: w2.values,
        b2: contents.take(B2, &[out])?,
        out,
    })
}
