//! `inwit generate`: answers a file of prompts offline.

use std::path::PathBuf;

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::progress::Progress;
use super::terminal::note;
use crate::engine::sampler::SamplingDraft;
use crate::error::Result;
use crate::lab::answer::{Options, generate};
use crate::policy::Mode;

/// Rows of the output: {"id","text","token_ids","finish_reason","action","scores"}, in input order.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON lines, each with one of `text`, `messages`, `raw`, and an `id` if it has one
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to write the answers
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// off, shadow or enforce [default: shadow]
    #[arg(long)]
    mode: Option<Mode>,
    /// Name of a policy of the library, a .toml file, or `off` for the empty one
    #[arg(long, value_name = "POLICY")]
    policy: Option<String>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// 0, the default, is greedy
    #[arg(long)]
    temperature: Option<f32>,
    /// Equal seeds give equal answers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    drop(paths::open(&args.out, &[&args.data])?);
    let mode = args.mode.map(|mode| mode.to_string());
    let bench = args
        .model
        .bench(mode.as_deref(), args.policy.as_deref())
        .await?;
    let options = Options {
        mode: bench.defaults.mode,
        policy: None,
        sampling: SamplingDraft {
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            seed: Some(args.seed),
            ..SamplingDraft::default()
        },
    };
    let mut progress = Progress::new("answers");
    let mut tick = ticking(&mut progress);
    let counts = generate(&bench, &args.data, &args.out, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    let counts: Vec<_> = counts
        .iter()
        .map(|(action, rows)| format!("{action} {rows}"))
        .collect();
    note(&format!("{}: {}", args.out.display(), counts.join(", ")));
    Ok(Exit::Done)
}
