//! `inwit lab collect`: hidden states of a file of rows, in a folder that can be gone on with.

use std::path::PathBuf;

use inwit_probes::{Positions, Site};

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::probe::positions;
use super::progress::Progress;
use super::terminal::note;
use crate::error::Result;
use crate::lab::capture_file::Dtype;
use crate::lab::collect::{Options, collect};
use crate::lab::output::refuse_same_file;
use crate::lab::rows;

/// The folder holds manifest.json, index.jsonl with a line per row, and for every site a file of
/// its states, [states, d_model], little-endian. A run that was interrupted goes on where it ended.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON lines, each with one of `text`, `messages`, `raw`, and perhaps a finished `answer`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to read, e.g. blocks.16.hook_resid_post; may be given several times
    #[arg(long = "site", value_name = "SITE", required = true)]
    sites: Vec<Site>,
    /// last, prompt_content, generated:K, generated:1..K or every_generated; may be given several
    /// times; all but the first two need `answer` in the data
    #[arg(long = "positions", value_name = "POSITIONS", value_parser = positions, required = true)]
    positions: Vec<Positions>,
    /// The folder to write, or to go on with
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Element type of the states
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    refuse_same_file(&args.out, &args.data)?;
    rows::read(&args.data)?;
    let bench = args.model.bench(Some("off"), Some("off")).await?;
    let options = Options {
        sites: args.sites,
        positions: args.positions,
        dtype: args.dtype,
    };
    let mut progress = Progress::new("rows");
    let mut tick = ticking(&mut progress);
    let done = collect(&bench, &args.data, &args.out, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    let before = match done.rows_before {
        0 => String::new(),
        before => format!(", {before} of them from before"),
    };
    note(&format!(
        "{}: {} rows{before}, {} states at each of {} sites",
        args.out.display(),
        done.rows,
        done.states,
        options.sites.len(),
    ));
    Ok(Exit::Done)
}
