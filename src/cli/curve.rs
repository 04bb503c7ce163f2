//! `inwit probe curve`: how a probe grows with its training rows, as a table, JSON and a plot.

use std::path::{Path, PathBuf};

use inwit_probes::{Gather, Positions, Site};

use super::Exit;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::probe::{command_line, positions};
use super::progress::Progress;
use super::recipe::RecipeArgs;
use super::sweep::ranked;
use super::terminal::{note, print};
use crate::error::{Error, Result};
use crate::lab::curve::{Curve, Options, curve};
use crate::lab::layer_plot;

#[derive(Debug, clap::Args)]
pub(super) struct CurveArgs {
    /// JSON lines with `label`, as `probe fit` takes them; a fifth of the groups is held out
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Labelled files to measure on that no fit reads; several may be given
    #[arg(long, value_name = "FILE", num_args = 1..)]
    dev: Vec<PathBuf>,
    /// Where to read, e.g. blocks.16.hook_resid_post; several are read together
    #[arg(long = "site", value_name = "SITE", required = true)]
    sites: Vec<Site>,
    /// Shares of the training rows to fit on, separated by commas
    #[arg(
        long,
        value_name = "SHARES",
        value_delimiter = ',',
        default_value = "0.0625,0.125,0.25,0.5,1"
    )]
    shares: Vec<f64>,
    /// last, prompt_content, generated:K or every_generated; the last two need `answer` in the data
    #[arg(long, value_parser = positions, default_value = "last")]
    positions: Positions,
    /// How token logits become the request's: last, max, mean, ema{0.2}, k_of_n{2,8},
    /// cumulative_log_odds or attention [default: last, or attention]
    #[arg(long, value_name = "GATHER")]
    gather: Option<Gather>,
    /// Folder for curve.json and curve.svg; it is made if need be
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Folders of `lab collect`: where one holds the states of a file given here, they are read
    /// instead of running the model; several may be given
    #[arg(long, value_name = "FOLDER", num_args = 1..)]
    states: Vec<PathBuf>,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: CurveArgs) -> Result<Exit> {
    std::fs::create_dir_all(&args.out)
        .map_err(|error| Error::file(args.out.display(), format!("cannot be made: {error}")))?;
    let mut data: Vec<&Path> = vec![&args.data];
    data.extend(args.dev.iter().map(PathBuf::as_path));
    let mut json = paths::open(&args.out.join("curve.json"), &data)?;
    let mut svg = paths::open(&args.out.join("curve.svg"), &data)?;

    let mut bench = args.model.bench(Some("off"), Some("off")).await?;
    bench.use_states(&args.states, &data)?;
    let (recipe, _) = args.recipe.recipe(args.gather.into_iter().collect());
    let options = Options {
        train: args.data,
        dev: args.dev,
        sites: args.sites,
        positions: args.positions,
        recipe,
        shares: args.shares,
        command: command_line(),
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let found = curve(&bench, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    json.row(&found)?;
    svg.bytes(layer_plot::by_rows(&title(&found), &found)?.as_bytes())?;
    json.finish()?;
    svg.finish()?;
    let fits = found.points.iter();
    let fits = fits.map(|point| (point.rows.to_string(), &point.rankings));
    print(&format!("{}\n", ranked("rows", &found.dev, fits)))?;
    for point in &found.points {
        if !point.rankings.remarks.is_empty() {
            let remarks = point.rankings.remarks.join(" ");
            note(&format!("{} rows: {remarks}", point.rows));
        }
    }
    Ok(Exit::Done)
}

fn title(found: &Curve) -> String {
    let sites: Vec<String> = found.sites.iter().map(Site::to_string).collect();
    format!(
        "{} at {} of {}, {} fitted on shares of {}",
        found.kind,
        found.positions,
        sites.join(" and "),
        found.model.name,
        found.data.name
    )
}
