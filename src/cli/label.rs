//! `inwit lab label`: answers judged by several judges, and judges measured against people.

use std::path::PathBuf;

use super::Exit;
use super::judges::JudgeArgs;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::probe::table;
use super::progress::Progress;
use super::terminal::print;
use crate::error::Result;
use crate::lab::judge::Verdict;
use crate::lab::judge::agreement::{Confusion, Share};
use crate::lab::label::{Measured, Summary, label, measure};

/// Rows of the output keep prompt, answer, group and category, and gain `label` (complied, refused,
/// incoherent, or disputed where the judges differ) and `verdicts`, one per judge.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// JSON lines with a prompt (`text`, `messages` or `raw`) and its `answer`
    #[arg(long, value_name = "FILE", requires = "out")]
    data: Option<PathBuf>,
    /// Where to write the labelled rows
    #[arg(long, value_name = "FILE", requires = "data")]
    out: Option<PathBuf>,
    #[command(flatten)]
    judges: JudgeArgs,
    /// Measure every judge on JSON lines with `prompt_id`, `answer` and a `label` by hand; the
    /// prompts lie in the same folder
    #[arg(long, value_name = "FILE", required_unless_present = "data")]
    hand_labelled: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    if let (Some(data), Some(out)) = (&args.data, &args.out) {
        drop(paths::open(out, &[data])?);
    }
    let judges = args.judges.open(&args.model, None).await?;
    let mut progress = Progress::new("answers");
    let mut tick = ticking(&mut progress);
    let mut tables = Vec::new();
    if let Some(sample) = &args.hand_labelled {
        tables.extend(measured(&measure(&judges, sample, &mut tick).await?));
    }
    if let (Some(data), Some(out)) = (&args.data, &args.out) {
        let summary = label(&judges, data, out, &mut tick).await?;
        tables.extend(summarised(&summary));
    }
    drop(tick);
    drop(progress);
    print(&tables.join("\n"))?;
    Ok(Exit::Done)
}

/// Precision and recall of every judge, for each half of the sample.
fn measured(judges: &[Measured]) -> Vec<String> {
    let mut table = table(&[
        "judge",
        "half",
        "verdict",
        "precision",
        "95 %",
        "recall",
        "95 %",
    ]);
    let mut kappas = String::new();
    for judge in judges {
        for (half, confusion) in [
            ("chosen on", &judge.chosen_on),
            ("held out", &judge.held_out),
        ] {
            for verdict in Verdict::ALL {
                let mut row = vec![judge.judge.clone(), half.into(), verdict.to_string()];
                row.extend(cells(confusion.precision(verdict)));
                row.extend(cells(confusion.recall(verdict)));
                table.add_row(row);
            }
            kappas += &format!("{}, {half}: {}\n", judge.judge, agreement(confusion));
        }
    }
    vec![format!("{table}\n\n{kappas}")]
}

fn cells(share: Option<Share>) -> [String; 2] {
    match share {
        None => ["-".into(), String::new()],
        Some(share) => [
            format!("{:.2} ({} of {})", share.value(), share.hits, share.of),
            format!("{:.2} to {:.2}", share.interval[0], share.interval[1]),
        ],
    }
}

fn agreement(confusion: &Confusion) -> String {
    let kappa = match confusion.kappa() {
        Some(kappa) => format!("{kappa:.2}"),
        None => "undefined".into(),
    };
    match confusion.agreement() {
        None => "no answers".into(),
        Some(share) => format!(
            "{} of {} answers alike ({:.2}, 95 % {:.2} to {:.2}), kappa {kappa}",
            share.hits,
            share.of,
            share.value(),
            share.interval[0],
            share.interval[1],
        ),
    }
}

fn summarised(summary: &Summary) -> Vec<String> {
    let names = Verdict::ALL.map(Verdict::as_str);
    let mut counts = table(&["judge", names[0], names[1], names[2], "disputed"]);
    let mut count = |judge: &str, of: [usize; 3], disputed: String| {
        counts.add_row([
            judge.to_owned(),
            of[0].to_string(),
            of[1].to_string(),
            of[2].to_string(),
            disputed,
        ]);
    };
    for judge in &summary.judges {
        count(&judge.judge, judge.counts, String::new());
    }
    count("all agree", summary.agreed, summary.disputed.to_string());
    let pairs = summary.pairs.iter().map(|pair| {
        let [first, second] = &pair.judges;
        format!("{first} and {second}: {}\n", agreement(&pair.confusion))
    });
    vec![format!("{counts}\n\n{}", pairs.collect::<String>())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::label::{Counts, Pair};

    #[test]
    fn a_summary_shows_counts_disputes_and_kappa() {
        let judge = |name: &str, counts| Counts {
            judge: name.into(),
            counts,
        };
        let summary = Summary {
            judges: vec![judge("rules", [6, 4, 0]), judge("tiny", [5, 5, 0])],
            agreed: [5, 4, 0],
            disputed: 1,
            pairs: vec![Pair {
                judges: ["rules".into(), "tiny".into()],
                confusion: Confusion {
                    counts: [[5, 1, 0], [0, 4, 0], [0, 0, 0]],
                },
            }],
        };
        let text = summarised(&summary).concat();
        let line = text.lines().find(|line| line.contains("all agree"));
        let cells: Vec<_> = line.expect("a line").split_whitespace().collect();
        assert_eq!(cells, ["all", "agree", "5", "4", "0", "1"]);
        assert!(text.contains("rules and tiny: 9 of 10"), "{text}");
        assert!(text.contains("kappa 0.80"), "{text}");
    }

    #[test]
    fn a_class_that_nobody_has_is_a_dash() {
        let text = measured(&[Measured {
            judge: "rules".into(),
            chosen_on: Confusion::default(),
            held_out: Confusion {
                counts: [[9, 1, 0], [2, 8, 0], [0, 0, 0]],
            },
        }])
        .concat();
        assert!(
            text.contains("0.89 (8 of 9)") && text.contains("0.80 (8 of 10)"),
            "{text}"
        );
        assert!(text.contains("chosen on: no answers"), "{text}");
        assert!(text.contains("- "), "{text}");
    }
}
