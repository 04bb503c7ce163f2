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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gather::MAX_ATTENTION_HEADS;
    use crate::testing::{
        attention, logistic, several_heads, two_layer, with_header, with_manifest, with_value,
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn refused(bytes: &[u8], expected: &str) {
        let message = Probe::from_bytes(bytes).map(|_| "was read".to_owned());
        let message = message.unwrap_or_else(|e| e.to_string());
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }

    /// Sets one place of the manifest.
    fn manifest_refused(pointer: &str, value: Value, expected: &str) {
        let bytes = with_manifest(&logistic().to_bytes().unwrap(), PROBE_KEY, |manifest| {
            *manifest.pointer_mut(pointer).unwrap() = value;
        });
        refused(&bytes, expected);
    }

    #[test]
    fn every_kind_of_probe_round_trips_bit_for_bit() {
        for probe in [logistic(), attention(), several_heads(), two_layer()] {
            let bytes = probe.to_bytes().unwrap();
            let read = Probe::from_bytes(&bytes).unwrap();
            assert_eq!(read, probe);
            assert_eq!(read.to_bytes().unwrap(), bytes);
            assert_eq!(read.content_hash(), container::content_hash(&bytes));
        }
    }

    #[test]
    fn a_saved_probe_loads_and_errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sample.safetensors");
        logistic().save(&path).unwrap();
        assert_eq!(Probe::load(&path).unwrap(), logistic());
        std::fs::write(&path, b"short").unwrap();
        let message = Probe::load(&path).unwrap_err().to_string();
        assert!(
            message.contains("sample.safetensors: file: is truncated"),
            "{message}"
        );
    }

    #[test]
    fn another_content_has_another_hash() {
        let bytes = with_value(&logistic().to_bytes().unwrap(), "heads.0.weight", 0, 0.5);
        let other = Probe::from_bytes(&bytes).unwrap();
        assert_ne!(other.content_hash(), logistic().content_hash());
    }

    #[test]
    fn weights_that_are_not_finite_are_refused() {
        let bytes = logistic().to_bytes().unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for tensor in [
                "heads.0.weight",
                "heads.0.bias",
                "heads.0.mean",
                "heads.0.scale",
            ] {
                refused(&with_value(&bytes, tensor, 0, bad), "value 0 is not finite");
            }
        }
        let bytes = two_layer().to_bytes().unwrap();
        refused(
            &with_value(&bytes, "prober.w2", 3, f32::NAN),
            "prober.w2: value 3",
        );
    }

    #[test]
    fn a_scale_that_cannot_divide_is_refused() {
        let bytes = logistic().to_bytes().unwrap();
        refused(
            &with_value(&bytes, "heads.0.scale", 1, 0.0),
            "must be above 0",
        );
        refused(
            &with_value(&bytes, "heads.0.scale", 1, -1.0),
            "must be above 0",
        );
        refused(
            &with_value(&bytes, "heads.0.scale", 1, 1e-45),
            "weight / scale",
        );
    }

    #[test]
    fn a_constant_score_is_refused() {
        let (manifest, mut heads, _) = logistic().into_parts();
        heads.iter_mut().for_each(|head| head.weight.fill(0.0));
        let error = Probe::new(manifest, heads, None).unwrap_err();
        assert!(error.to_string().contains("would be constant"), "{error}");

        let (manifest, mut heads, _) = attention().into_parts();
        heads[0].weight[3..].fill(0.0);
        assert!(
            Probe::new(manifest, heads, None).is_err(),
            "a key that is always the same"
        );

        let (manifest, heads, prober) = two_layer().into_parts();
        let mut prober = prober.unwrap();
        prober.w2.fill(0.5);
        assert!(
            Probe::new(manifest, heads, Some(prober)).is_err(),
            "both logits alike"
        );
    }

    #[test]
    fn tensors_must_have_the_shapes_of_the_manifest() {
        manifest_refused("/d_model", json!(4), "has shape");
        manifest_refused("/d_model", json!(0), "between 1 and 65536");
        manifest_refused("/d_model", json!(u64::MAX), "between 1 and 65536");
        manifest_refused("/d_model", json!(-3), "manifest");
        manifest_refused("/heads/0/out", json!(2), "needs 1 in every head");
        manifest_refused(
            "/heads/1/norm",
            json!("standard"),
            "`heads.1.mean`: is missing",
        );
        manifest_refused(
            "/heads/0/norm",
            json!("none"),
            "is not part of this kind of file",
        );
        manifest_refused("/heads", json!([]), "heads: is 0");
        let bytes = with_header(&logistic().to_bytes().unwrap(), |header| {
            let moved = header
                .as_object_mut()
                .unwrap()
                .remove("heads.0.bias")
                .unwrap();
            header["heads.9.bias"] = moved;
        });
        refused(&bytes, "`heads.0.bias`: is missing");
    }

    #[test]
    fn a_site_that_no_model_has_is_refused() {
        manifest_refused(
            "/heads/0/site",
            json!("blocks.70000.hook_resid_post"),
            "unknown site",
        );
        manifest_refused("/heads/0/site", json!("../../x"), "unknown site");
    }

    #[test]
    fn names_that_could_mean_a_path_are_refused() {
        let long = "a".repeat(65);
        for name in [
            "../../x",
            "/etc/passwd",
            "a\0b",
            "",
            ".hidden",
            "a/b",
            "A",
            "a b",
            "é",
            &long,
        ] {
            manifest_refused("/name", json!(name), "is not a name");
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let point = "/calibrations/0/thresholds/0";
        // JSON has no NaN; null and a number beyond f32 are how one would arrive.
        manifest_refused(&format!("{point}/threshold_logit"), json!(null), "manifest");
        manifest_refused(
            &format!("{point}/threshold_logit"),
            json!(1e300),
            "must be finite",
        );
        manifest_refused(
            &format!("{point}/fpr"),
            json!(0.0),
            "strictly between 0 and 1",
        );
        manifest_refused(
            &format!("{point}/fpr"),
            json!(1.5),
            "strictly between 0 and 1",
        );
        manifest_refused(
            &format!("{point}/interval"),
            json!([0.5, 0.1]),
            "[low, high]",
        );
        manifest_refused("/calibrations/0/kind/platt/a", json!(-1.0), "a above 0");
        manifest_refused("/calibrations/0/prior", json!(1.0), "prior");
        manifest_refused("/calibration_logit_std", json!(0.0), "above 0");
        manifest_refused("/calibration_logit_std", json!(1e300), "finite");
        manifest_refused("/canaries/0/logit", json!(-1e300), "must be finite");
        manifest_refused("/canaries/0/position", json!(3), "beyond its 3 tokens");
        manifest_refused("/canaries/0/tokens", json!([]), "canaries[0].tokens");
        manifest_refused("/canaries/0/tokens", json!([-1]), "manifest");
    }

    #[test]
    fn isotonic_calibrations_must_rise() {
        let kind = |x: Value, y: Value| json!({"isotonic": {"x": x, "y": y}});
        for (x, y) in [
            (json!([]), json!([])),
            (json!([0.0, 0.0]), json!([0.1, 0.2])),
            (json!([1.0, 0.0]), json!([0.1, 0.2])),
            (json!([0.0, 1.0]), json!([0.2, 0.1])),
            (json!([0.0, 1.0]), json!([0.2])),
            (json!([0.0, 1.0]), json!([0.2, 1.1])),
            (json!([0.0, 1e300]), json!([0.2, 0.3])),
        ] {
            manifest_refused("/calibrations/0/kind", kind(x, y), "isotonic");
        }
    }

    #[test]
    fn gathers_must_fit_the_probe_and_each_other() {
        manifest_refused(
            "/gathers",
            json!(["last", "attention"]),
            "needs a probe of kind attention",
        );
        manifest_refused("/gathers", json!(["last", "last"]), "appears twice");
        manifest_refused("/gathers", json!(["max"]), "not among the probe's gathers");
        manifest_refused("/gathers", json!([]), "gathers: is 0");
        manifest_refused("/gathers/0", json!("ema{2}"), "(0, 1]");
        manifest_refused("/positions", json!("generated{0}"), "counted from 1");
        manifest_refused(
            "/combine",
            json!("two_layer"),
            "goes with the kind two_layer",
        );
    }

    #[test]
    fn what_this_build_does_not_know_is_refused() {
        manifest_refused("/format_version", json!(2), "this build reads version 1");
        manifest_refused("/kind", json!("oracle"), "unknown variant `oracle`");
        let add = |pointer: &'static str| {
            with_manifest(&logistic().to_bytes().unwrap(), PROBE_KEY, |manifest| {
                manifest.pointer_mut(pointer).unwrap()["surprise"] = json!(1);
            })
        };
        for pointer in [
            "",
            "/model",
            "/trained_on",
            "/record",
            "/calibrations/0",
            "/heads/0",
            "/canaries/0",
        ] {
            refused(&add(pointer), "unknown field `surprise`");
        }
        // The version is judged first: a later file may have any field.
        let later = with_manifest(&add(""), PROBE_KEY, |manifest| {
            manifest["format_version"] = json!(9)
        });
        refused(&later, "format_version: is 9");
    }

    #[test]
    fn attention_heads_are_pairs_and_not_too_many() {
        for out in [1, 3, 2 * MAX_ATTENTION_HEADS + 2] {
            let (manifest, mut heads, _) = attention().into_parts();
            heads[0] = crate::testing::head(heads[0].site, out, InputNorm::None);
            let error = Probe::new(manifest, heads, None).unwrap_err().to_string();
            let most = format!("1 to {MAX_ATTENTION_HEADS} attention heads");
            assert!(error.contains(&most), "{error}");
        }
    }

    #[test]
    fn a_two_layer_probe_needs_its_second_layer() {
        let (manifest, heads, prober) = two_layer().into_parts();
        assert!(Probe::new(manifest, heads, None).is_err());
        let (manifest, heads, _) = logistic().into_parts();
        assert!(Probe::new(manifest, heads, prober).is_err());
        let bytes = with_header(&two_layer().to_bytes().unwrap(), |header| {
            header["prober.w2"]["shape"] = json!([4, 2]);
        });
        refused(&bytes, "[1 or 2, 4] is needed");
    }

    proptest! {
        #[test]
        fn a_damaged_probe_is_refused_or_scores_without_panic(
            at in any::<prop::sample::Index>(), byte in any::<u8>(),
        ) {
            let mut bytes = two_layer().to_bytes().unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(probe) = Probe::from_bytes(&bytes) {
                let _ = probe.score_row(|_| &[1.0, 2.0, 3.0]);
            }
        }
    }
}
