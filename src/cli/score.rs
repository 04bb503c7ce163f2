//! `inwit score`: reads every probe on a file of prompts, generating nothing.

use std::path::PathBuf;

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::progress::Progress;
use super::terminal::note;
use crate::error::Result;
use crate::lab::score::{Options, score};

/// Rows of the output: {"id","scores":{probe:{"logit","probability"}}}, in input order.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON lines, each with one of `text`, `messages`, `raw`, and perhaps a finished `answer`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to write the scores
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The policy whose detectors score: a name, or a .toml file
    #[arg(long, value_name = "POLICY")]
    policy: Option<String>,
    /// Add "token_logits": {probe: [[position, logit], …]}
    #[arg(long)]
    per_token: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    drop(paths::open(&args.out, &[&args.data])?);
    let bench = args
        .model
        .bench(Some("shadow"), args.policy.as_deref())
        .await?;
    let options = Options {
        policy: None,
        per_token: args.per_token,
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let rows = score(&bench, &args.data, &args.out, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    note(&format!("{}: {rows} rows", args.out.display()));
    Ok(Exit::Done)
}
