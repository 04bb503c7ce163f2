//! Who judges answers, as the command line names them.

use std::sync::Arc;

use super::open::ModelArgs;
use crate::error::{Error, Result};
use crate::lab::bench::Bench;
use crate::lab::judge::{Judge, ModelJudge, ProbeJudge, RuleJudge};

#[derive(Debug, clap::Args)]
pub(super) struct JudgeArgs {
    /// Who judges: `rules`; `probes`, two of the library that read the model's states of the
    /// answer; or a language model that is asked: a file, a folder or a known name. May be given
    /// several times
    #[arg(long = "judge", value_name = "rules|probes|MODEL", default_values = ["rules", "probes"])]
    judges: Vec<String>,
}

impl JudgeArgs {
    /// In the order in which they are named. `bench` is the one that answers, where there is one.
    pub(super) async fn open(
        &self,
        model: &ModelArgs,
        bench: Option<&Arc<Bench>>,
    ) -> Result<Vec<Box<dyn Judge>>> {
        let mut judges: Vec<Box<dyn Judge>> = Vec::new();
        for name in &self.judges {
            let judge: Box<dyn Judge> = match name.as_str() {
                "rules" => Box::new(RuleJudge),
                "probes" => {
                    let bench = match bench {
                        Some(bench) => bench.clone(),
                        None => Arc::new(model.bench(Some("off"), None).await?),
                    };
                    Box::new(ProbeJudge::new(bench)?)
                }
                name => Box::new(asked(model, name).await?),
            };
            // Verdicts are told apart by it.
            if judges.iter().any(|other| other.name() == judge.name()) {
                let message = format!("two judges are called `{}`; leave one out", judge.name());
                return Err(Error::invalid("--judge", message));
            }
            judges.push(judge);
        }
        Ok(judges)
    }
}

/// The named model, run as the other settings say.
async fn asked(model: &ModelArgs, name: &str) -> Result<ModelJudge> {
    let model = model.with_model(Some(name));
    let bench = model.bench(Some("off"), Some("off")).await;
    let bench = bench.map_err(|error| match error {
        Error::Config(message) => Error::Config(format!("--judge {name}: {message}")),
        error => error,
    })?;
    let name = crate::lab::fit::identity(&bench).name;
    ModelJudge::new(name, bench)
}
