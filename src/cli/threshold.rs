//! `inwit probe threshold`: sets a threshold at a false-positive rate, on benign requests.

use std::path::PathBuf;

use inwit_probes::{Gather, Probe};

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::probe::{command_line, threshold_table};
use super::progress::Progress;
use super::terminal::{note, print};
use crate::error::Result;
use crate::lab::fit::unfit;
use crate::lab::output::{WholeFile, refuse_same_file};
use crate::lab::threshold::{Options, calibrate, check};

#[derive(Debug, clap::Args)]
pub(super) struct ThresholdArgs {
    /// A probe's .safetensors file
    probe: PathBuf,
    /// False positives per benign request, e.g. 0.01
    #[arg(long, value_name = "RATE")]
    target_fpr: f64,
    /// Benign prompts that the probe was not fitted on, with an `answer` for a probe that reads
    /// answers; they need no label
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// One that the probe is calibrated for [default: the first of them]
    #[arg(long, value_name = "GATHER")]
    gather: Option<Gather>,
    /// Answer length at which the rate holds, for a probe of every generated token; may be given
    /// several times [default: 64, 256 and 1024]
    #[arg(long, value_name = "TOKENS")]
    answer_tokens: Vec<u32>,
    /// Where to write the probe with its threshold; without it nothing is written
    #[arg(long, value_name = "FILE", conflicts_with = "in_place")]
    out: Option<PathBuf>,
    /// Write over the probe itself
    #[arg(long)]
    in_place: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: ThresholdArgs) -> Result<Exit> {
    let probe = Probe::load(&args.probe).map_err(unfit)?;
    let options = Options {
        target_fpr: args.target_fpr,
        data: args.data,
        gather: args.gather,
        answer_tokens: args.answer_tokens,
        command: command_line(),
    };
    check(&probe, &options)?;
    let mut file = match (&args.out, args.in_place) {
        (Some(out), _) => {
            refuse_same_file(out, &args.probe)?;
            Some(paths::open(out, &[&options.data])?)
        }
        (None, true) => Some(WholeFile::create(&args.probe)?),
        (None, false) => None,
    };
    let bench = args.model.bench(Some("off"), Some("off")).await?;
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let found = calibrate(&bench, probe, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    if let Some(file) = &mut file {
        file.bytes(&found.probe.to_bytes().map_err(unfit)?)?;
    }
    let written = file.map(WholeFile::finish).transpose()?.is_some();
    let points = found.points.iter().map(|point| (found.gather, point));
    print(&format!("{}\n", threshold_table(points).trim_fmt()))?;
    for remark in &found.remarks {
        note(remark);
    }
    if !written {
        note("nothing was written; --out FILE keeps it, --in-place writes over the probe");
    }
    Ok(Exit::Done)
}
