//! `inwit probe sweep`: which site tells the classes apart, as a table, JSON and a plot.

use inwit_probes::{DataRecord, Kind, Metric};

use super::Exit;
use super::open::ticking;
use super::probe::{command_line, table};
use super::progress::Progress;
use super::study::StudyArgs;
use super::terminal::{note, print};
use crate::error::Result;
use crate::lab::ranking_plot;
use crate::lab::scored::Ranking;
use crate::lab::sweep::{MOST_STATES, Options, Rankings, SiteChoice, Sweep, sweep};

/// One penalty for every site, since a search at each takes twenty times as long.
const ALPHA: f64 = 0.01;

#[derive(Debug, clap::Args)]
pub(super) struct SweepArgs {
    /// Sites, separated by commas, or every layer's of a name: all-resid_post, all-resid_mid,
    /// all-resid_pre, all-attn_out, all-mlp_out
    #[arg(
        long,
        value_name = "SITES",
        value_delimiter = ',',
        default_value = "all-resid_post"
    )]
    sites: Vec<SiteChoice>,
    #[command(flatten)]
    study: StudyArgs,
}

pub(super) async fn run(args: SweepArgs) -> Result<Exit> {
    let opened = args.study.open("sweep").await?;
    let mut recipe = args.study.recipe();
    if recipe.kind == Kind::Logistic && recipe.alphas.is_empty() {
        recipe.alphas.push(ALPHA);
    }
    let options = Options {
        train: args.study.data,
        dev: args.study.dev,
        sites: args.sites,
        positions: args.study.positions,
        recipe,
        most_states: MOST_STATES,
        command: command_line(),
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let found = sweep(&opened.bench, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    opened.write(&found, &ranking_plot::by_site(&title(&found), &found)?)?;
    print(&format!("{}\n", tabled(&found)))?;
    summarise(&found);
    Ok(Exit::Done)
}

fn title(found: &Sweep) -> String {
    format!(
        "{} at {} ({}), {} fitted on {}",
        found.kind, found.positions, found.gather, found.model.name, found.data.name
    )
}

fn tabled(found: &Sweep) -> String {
    let rows = found.sites.iter();
    let rows = rows.map(|row| (row.site.to_string(), &row.rankings));
    ranked("site", &found.dev, rows)
}

/// A line for each fit, named in the first column.
pub(super) fn ranked<'a>(
    first: &str,
    dev: &[DataRecord],
    fits: impl Iterator<Item = (String, &'a Rankings)>,
) -> String {
    let mut header = vec![first, "held-out AUROC", "held-out TPR at 1 % FPR"];
    header.extend(dev.iter().map(|data| data.name.as_str()));
    if dev.len() > 1 {
        header.extend(["together", "together TPR at 1 %"]);
    } else if dev.len() == 1 {
        header.push("its TPR at 1 %");
    }
    let mut rows = table(&header);
    for (name, fit) in fits {
        let mut cells = vec![
            name,
            told(Some(&fit.held_out.auroc)),
            told(fit.held_out.tpr_at_one_percent.as_ref()),
        ];
        let auroc = |ranking: &Option<Ranking>| told(ranking.as_ref().map(|r| &r.auroc));
        cells.extend(fit.dev.iter().map(auroc));
        let together = fit.dev_together.as_ref();
        if dev.len() > 1 {
            cells.push(told(together.map(|ranking| &ranking.auroc)));
        }
        if !dev.is_empty() {
            cells.push(told(together.and_then(|r| r.tpr_at_one_percent.as_ref())));
        }
        rows.add_row(cells);
    }
    rows.trim_fmt()
}

/// A value with its interval; a dash where there is none.
fn told(metric: Option<&Metric>) -> String {
    match metric {
        None => "-".into(),
        Some(Metric {
            value,
            interval: Some([low, high]),
        }) => format!("{value:.3} ({low:.3} to {high:.3})"),
        Some(metric) => format!("{:.3}", metric.value),
    }
}

fn summarise(found: &Sweep) {
    let on = match found.dev.is_empty() {
        true => "on held-out groups",
        false => "on the development files together",
    };
    if let Some(row) = found.highest() {
        note(&format!(
            "highest AUROC {on}: {}; the intervals of {} of {} sites reach into its own, so these \
             rows do not tell them apart",
            row.site,
            found.not_told_apart(),
            found.sites.len()
        ));
    }
    for row in &found.sites {
        let remarks = &row.rankings.remarks;
        if !remarks.is_empty() {
            note(&format!("{}: {}", row.site, remarks.join(" ")));
        }
    }
    if found.passes > 1 {
        note(&format!(
            "the states of all sites do not fit in memory at once: read in {} passes",
            found.passes
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_is_a_dash() {
        assert_eq!(told(None), "-");
        let metric = Metric {
            value: 0.5,
            interval: Some([0.25, 0.75]),
        };
        assert_eq!(told(Some(&metric)), "0.500 (0.250 to 0.750)");
    }
}
