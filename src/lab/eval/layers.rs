//! Reads a sweep over sites that `inwit probe sweep` wrote, for the curve in the report.

use std::path::Path;

use inwit_probes::manifest::ModelIdentity;
use inwit_probes::{DataRecord, Metric, Site};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::read_text;

const MOST_BYTES: u64 = 16 << 20;
const MOST_SITES: usize = 10_000;

/// The sweep as a report shows it. What else the file says stays there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    pub model: ModelIdentity,
    pub kind: String,
    pub data: DataRecord,
    pub sites: Vec<SweptSite>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweptSite {
    pub site: Site,
    pub held_out: Ranked,
    /// All development files as one.
    pub dev_together: Option<Ranked>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    pub auroc: Metric,
}

/// Reads the file of a sweep.
pub fn read(path: &Path) -> Result<Sweep> {
    let text = read_text(path, MOST_BYTES, "a sweep")?;
    parse(&text).map_err(|message| Error::file(path.display(), message))
}

impl Sweep {
    /// Refuses the layers of another model than the one that is evaluated.
    pub fn check_model(&self, path: &Path, model: &ModelIdentity) -> Result<()> {
        if self.model.weights_id == model.weights_id {
            return Ok(());
        }
        let message = format!(
            "is a sweep over {} ({}), not over the loaded {} ({})",
            self.model.name, self.model.weights_id, model.name, model.weights_id
        );
        Err(Error::file(path.display(), message))
    }
}

fn parse(text: &str) -> Result<Sweep, String> {
    let sweep: Sweep = serde_json::from_str(text).map_err(|error| {
        format!("is no sweep: {error}; name the sweep.json of `inwit probe sweep`")
    })?;
    if sweep.sites.len() > MOST_SITES {
        return Err(format!("has more than {MOST_SITES} sites"));
    }
    for swept in &sweep.sites {
        let rankings = [Some(swept.held_out), swept.dev_together];
        for Metric { value, interval } in rankings.into_iter().flatten().map(|r| r.auroc) {
            let numbers = [value].into_iter().chain(interval.into_iter().flatten());
            if !numbers.into_iter().all(|n| (0.0..=1.0).contains(&n)) {
                return Err(format!("{}: an AUROC must lie in [0, 1]", swept.site));
            }
        }
    }
    Ok(sweep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(value: f64) -> String {
        format!(
            r#"{{"model":{{"name":"m","architecture_id":"a","weights_id":"w","weight_format":"f32"}},"kind":"logistic","data":{{"name":"a","sha256":"b","rows":1}},
               "sites":[{{"site":"blocks.1.hook_resid_post","dev":[],"dev_together":null,
               "held_out":{{"auroc":{{"value":{value},"interval":[0.7,0.9]}},"tpr_at_one_percent":null}}}}]}}"#
        )
    }

    #[test]
    fn a_sweep_is_read_for_its_rankings() {
        let read = parse(&sweep(0.8)).expect("reads");
        assert_eq!(read.sites[0].held_out.auroc.interval, Some([0.7, 0.9]));
        assert_eq!(read.sites[0].site, Site::ResidPost(1));
        assert_eq!(read.sites[0].dev_together, None);
        let other = ModelIdentity {
            weights_id: "v".into(),
            ..read.model.clone()
        };
        let path = Path::new("sweep.json");
        assert!(read.check_model(path, &read.model).is_ok());
        let error = read.check_model(path, &other).expect_err("refused");
        assert!(error.to_string().contains("over m (w)"), "{error}");
    }

    #[test]
    fn what_is_no_sweep_is_refused_with_what_was_expected() {
        assert!(
            parse("[]")
                .expect_err("refused")
                .contains("inwit probe sweep")
        );
        assert!(
            parse(&sweep(7.0))
                .expect_err("refused")
                .contains("blocks.1")
        );
    }
}
