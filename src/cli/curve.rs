//! `inwit probe curve`: how a probe grows with its training rows, as a table, JSON and a plot.

use inwit_probes::Site;

use super::Exit;
use super::open::ticking;
use super::probe::command_line;
use super::progress::Progress;
use super::study::StudyArgs;
use super::sweep::ranked;
use super::terminal::{note, print};
use crate::error::Result;
use crate::lab::curve::{Curve, Options, curve};
use crate::lab::ranking_plot;

#[derive(Debug, clap::Args)]
pub(super) struct CurveArgs {
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
    #[command(flatten)]
    study: StudyArgs,
}

pub(super) async fn run(args: CurveArgs) -> Result<Exit> {
    let opened = args.study.open("curve").await?;
    let recipe = args.study.recipe();
    let options = Options {
        train: args.study.data,
        dev: args.study.dev,
        sites: args.sites,
        positions: args.study.positions,
        recipe,
        shares: args.shares,
        command: command_line(),
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let found = curve(&opened.bench, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    opened.write(&found, &ranking_plot::by_rows(&title(&found), &found)?)?;
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
