//! `inwit capture`: writes hidden states to a tensor file.

use std::path::PathBuf;

use clap::ValueEnum;
use inwit_probes::Site;

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::progress::Progress;
use super::terminal::note;
use crate::engine::request::PositionSelection;
use crate::engine::sampler::SamplingDraft;
use crate::error::Result;
use crate::lab::capture::{Options, capture};
use crate::lab::capture_file::Dtype;

/// A safetensors file: one tensor [rows, d_model] per site, named by the site, rows in input order,
/// then position; int64 index.sequence (which of the ids), index.position and index.token; the ids
/// as a JSON list under `ids` in the metadata.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON lines, each with one of `text`, `messages`, `raw`, and perhaps a finished `answer`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to read, e.g. blocks.16.hook_resid_post; may be given several times
    #[arg(long = "site", value_name = "SITE", required = true)]
    sites: Vec<Site>,
    /// Which tokens; where generated ones are wanted, rows without an `answer` are answered
    #[arg(long)]
    positions: Positions,
    /// Where to write the states
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// Element type of the states
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Positions {
    /// The last token of the prompt
    Last,
    Prompt,
    Generated,
    All,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    drop(paths::open(&args.out, &[&args.data])?);
    let bench = args.model.bench(Some("off"), None).await?;
    let options = Options {
        sites: args.sites,
        positions: match args.positions {
            Positions::Last => PositionSelection::LastPromptToken,
            Positions::Prompt => PositionSelection::AllPrompt,
            Positions::Generated => PositionSelection::Generated,
            Positions::All => PositionSelection::All,
        },
        dtype: args.dtype,
        sampling: SamplingDraft {
            max_tokens: args.max_tokens,
            seed: Some(0),
            ..SamplingDraft::default()
        },
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let states = capture(&bench, &args.data, &args.out, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    note(&format!(
        "{}: {states} states at each site",
        args.out.display()
    ));
    Ok(Exit::Done)
}
