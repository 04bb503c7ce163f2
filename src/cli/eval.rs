//! `inwit eval`: measures a probe or a policy on labelled sets, beside what it must beat.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use comfy_table::{Table, presets};
use inwit_probes::GatherChoice;
use serde::Serialize;

use super::Exit;
use super::judges::JudgeArgs;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::probe::command_line;
use super::progress::Progress;
use super::terminal::{note, print};
use crate::error::Result;
use crate::lab::eval::ledger::Ledger;
use crate::lab::eval::page::{Page, Section};
use crate::lab::eval::probe::{Options, evaluate, find};
use crate::lab::eval::trial::Setting;
use crate::lab::eval::{html, layers, policy, policy_page, probe_page};
use crate::lab::fit::identity;
use crate::lab::output::{WholeFile, refuse_same_file};
use crate::lab::rows;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Measure a probe on labelled sets, beside length, bag of words and SafeSwitch's recipe
    Probe(Box<ProbeArgs>),
    /// Measure a policy: answers with it enforced against answers with it off
    Policy(Box<PolicyArgs>),
}

#[derive(Debug, clap::Args)]
pub(super) struct ProbeArgs {
    /// A probe of the library by its name, or a probe's .safetensors file
    #[arg(value_name = "PROBE")]
    probe: String,
    /// Sets with `label`: harmful or benign, or complied or refused; rows with the same `group`
    /// are one piece of evidence
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// What the baselines learn from; without it there are none
    #[arg(long, value_name = "FILE")]
    train: Option<PathBuf>,
    /// How token logits become the request's [default: the probe's first calibration]
    #[arg(long, value_name = "GATHER")]
    gather: Option<GatherChoice>,
    /// Of the bootstrap
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How often SafeSwitch's recipe is fitted to the rows of --train, with seeds from 0 [default: 5]
    #[arg(long, value_name = "NUMBER", requires = "train", value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: Option<u64>,
    /// Files of the same probe fitted with other seeds: told beside it as their mean and range
    #[arg(long = "refit", value_name = "FILE", num_args = 1..)]
    refits: Vec<PathBuf>,
    /// The sweep.json of `inwit probe sweep`, for the layer curve
    #[arg(long, value_name = "FILE")]
    sweep_json: Option<PathBuf>,
    /// Folders of `lab collect`: where one holds the states of a file given here, they are read
    /// from it instead of running the model
    #[arg(long, value_name = "FOLDER", num_args = 1..)]
    states: Vec<PathBuf>,
    #[command(flatten)]
    outputs: Outputs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct PolicyArgs {
    /// A policy of the library by its name, or a .toml file
    #[arg(value_name = "POLICY")]
    policy: String,
    /// Prompts with `label`: harmful or benign
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    max_tokens: u32,
    /// Of the sampled answers, which stand beside greedy ones
    #[arg(long, value_name = "TEMPERATURE", default_value_t = 0.7, value_parser = temperature)]
    temperature: f32,
    /// How often each row is sampled, with seeds from 0; 0 for greedy answers only
    #[arg(long, value_name = "NUMBER", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=100))]
    seeds: u64,
    /// Of the bootstrap
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    judges: JudgeArgs,
    #[command(flatten)]
    outputs: Outputs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Seeds where none are asked for.
const SEEDS: u64 = 5;

fn temperature(text: &str) -> std::result::Result<f32, String> {
    let temperature = text.parse().ok();
    let temperature = temperature.filter(|value| (0.01..=2.0).contains(value));
    temperature.ok_or_else(|| "must be a number from 0.01 to 2".into())
}

#[derive(Debug, clap::Args)]
struct Outputs {
    /// Where to write everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to write the report as one page
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// The file that remembers every run on a set, e.g. docs/evaluations.md; one line is appended
    /// for each set
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// What the report says was measured [default: what git says of the working directory]
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,
}

/// Files that are there to be written before any work begins.
struct Opened {
    files: Files,
    ledger: Option<Ledger>,
}

struct Files {
    json: Option<WholeFile>,
    report: Option<WholeFile>,
}

impl Outputs {
    /// `read`: what else the command reads, so nothing is written there.
    fn open(&self, data: &[&Path], read: &[&Path]) -> Result<Opened> {
        // Mistakes in the data are told whether or not anything is written.
        for path in data {
            rows::read(path)?;
        }
        paths::each_once(&[
            ("--json", self.json.as_deref()),
            ("--report", self.report.as_deref()),
            ("--log", self.log.as_deref()),
        ])?;
        for out in [&self.json, &self.report, &self.log].into_iter().flatten() {
            let mut read = data.iter().chain(read);
            read.try_for_each(|read| refuse_same_file(out, read))?;
        }
        let writable = |out: &Option<PathBuf>| {
            let out = out.as_deref();
            out.map(|out| paths::open(out, data)).transpose()
        };
        Ok(Opened {
            files: Files {
                json: writable(&self.json)?,
                report: writable(&self.report)?,
            },
            ledger: self.log.as_deref().map(Ledger::open).transpose()?,
        })
    }
}

pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Probe(args) => probe(*args).await,
        Command::Policy(args) => policy(*args).await,
    }
}

async fn probe(args: ProbeArgs) -> Result<Exit> {
    let data: Vec<&Path> = args
        .data
        .iter()
        .chain(&args.train)
        .map(PathBuf::as_path)
        .collect();
    let read = [Some(Path::new(&args.probe)), args.sweep_json.as_deref()];
    let refits = args.refits.iter().map(PathBuf::as_path);
    let read: Vec<&Path> = read.into_iter().flatten().chain(refits).collect();
    let opened = args.outputs.open(&data, &read)?;
    let sweep = args.sweep_json.as_deref().map(layers::read).transpose()?;
    let mut bench = args.model.bench(Some("off"), Some("off")).await?;
    if let (Some(sweep), Some(path)) = (&sweep, &args.sweep_json) {
        sweep.check_model(path, &identity(&bench))?;
    }
    bench.use_states(&args.states, &data)?;
    let subject = find(&bench, &args.probe)?.with_refits(&bench, &args.refits)?;
    let options = Options {
        gather: args.gather,
        data: args.data,
        train: args.train,
        seed: args.seed,
        seeds: (0..args.seeds.unwrap_or(SEEDS)).collect(),
        sweep,
        command: command_line(),
        commit: args.outputs.commit,
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let report = evaluate(&bench, &subject, &options, opened.ledger, &mut tick).await?;
    drop(tick);
    drop(progress);
    opened.files.write(&report, &probe_page::page(&report))?;
    Ok(Exit::Done)
}

async fn policy(args: PolicyArgs) -> Result<Exit> {
    let data: Vec<&Path> = args.data.iter().map(PathBuf::as_path).collect();
    let opened = args.outputs.open(&data, &[Path::new(&args.policy)])?;
    let bench = args.model.bench(Some("enforce"), Some(&args.policy));
    let bench = Arc::new(bench.await?);
    let judges = args.judges.open(&args.model, Some(&bench)).await?;
    let mut settings = vec![Setting {
        name: "greedy".into(),
        temperature: None,
        seeds: vec![0],
    }];
    if args.seeds > 0 {
        settings.push(Setting {
            name: format!("temperature {}", args.temperature),
            temperature: Some(args.temperature),
            seeds: (0..args.seeds).collect(),
        });
    }
    let options = policy::Options {
        data: args.data,
        settings,
        max_tokens: Some(args.max_tokens),
        seed: args.seed,
        command: command_line(),
        commit: args.outputs.commit,
    };
    let mut progress = Progress::new("answers");
    let mut tick = ticking(&mut progress);
    let report = policy::evaluate(&bench, &judges, &options, opened.ledger, &mut tick).await?;
    drop(tick);
    drop(progress);
    opened.files.write(&report, &policy_page::page(&report))?;
    Ok(Exit::Done)
}

impl Files {
    /// Shows the page and writes what was asked for.
    fn write(self, report: &impl Serialize, page: &Page) -> Result<()> {
        print(&shown(page))?;
        if let Some(mut file) = self.json {
            file.row(report)?;
            file.finish()?;
        }
        if let Some(mut file) = self.report {
            file.bytes(html::render(page)?.as_bytes())?;
            file.finish()?;
            note("the report is written: open it in a browser");
        }
        Ok(())
    }
}

/// The page for a terminal: its tables, remarks and claims.
fn shown(page: &Page) -> String {
    let sections = page
        .sections
        .iter()
        .filter(|section| !section.tables.is_empty());
    let sections: Vec<String> = sections.map(shown_section).collect();
    format!("{}\n\n{}\n", page.lead, sections.join("\n\n"))
}

fn shown_section(section: &Section) -> String {
    let mut parts = vec![section.title.clone()];
    parts.extend(section.remarks.iter().map(|remark| format!("! {remark}")));
    for table in &section.tables {
        let mut shown = Table::new();
        shown.load_style(presets::NOTHING).set_header(&table.head);
        for row in &table.rows {
            shown.add_row(row);
        }
        parts.push(shown.trim_fmt());
    }
    parts.extend(section.claims.iter().map(|claim| format!("- {claim}")));
    parts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::eval::page::Table as PageTable;

    #[test]
    fn no_output_goes_into_the_data_or_into_another_output() {
        let folder = tempfile::tempdir().expect("a folder");
        let [data, probe, out] =
            ["a.jsonl", "p.safetensors", "out"].map(|name| folder.path().join(name));
        std::fs::write(&data, "{\"text\": \"Hi\"}\n").expect("written");
        std::fs::write(&probe, "a probe").expect("written");
        let refusal = |json: Option<&PathBuf>, log: Option<&PathBuf>| {
            let outputs = Outputs {
                json: json.cloned(),
                report: None,
                log: log.cloned(),
                commit: None,
            };
            let opened = outputs.open(&[&data], &[&probe]);
            opened.err().map(|error| error.to_string())
        };
        assert_eq!(refusal(Some(&out), None), None);
        for read in [&data, &probe] {
            for (json, log) in [(Some(read), None), (None, Some(read))] {
                assert!(refusal(json, log).is_some_and(|told| told.contains("is read here")));
            }
        }
        std::fs::write(&out, "no table").expect("written");
        assert!(refusal(None, Some(&out)).is_some_and(|told| told.contains("is no log")));
        assert!(
            refusal(Some(&out), Some(&out)).is_some_and(|told| told.contains("--json and --log"))
        );
        assert_eq!(
            std::fs::read_to_string(&data).expect("read"),
            "{\"text\": \"Hi\"}\n"
        );
    }

    #[test]
    fn a_temperature_that_cannot_sample_is_refused_with_the_range() {
        assert_eq!(temperature("0.7"), Ok(0.7));
        for text in ["0", "9", "nan", "x"] {
            assert!(
                temperature(text).is_err_and(|error| error.contains("0.01")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_terminal_shows_tables_remarks_and_claims() {
        let mut table = PageTable::new("caption", &["set", "AUROC"]);
        table.rows.push(vec!["dev.jsonl".into(), "0.9".into()]);
        let page = Page {
            title: "Probe p".into(),
            lead: "A probe.".into(),
            sections: vec![
                Section {
                    title: "Overview".into(),
                    remarks: vec!["Careful.".into()],
                    tables: vec![table],
                    claims: vec!["AUROC: no claim".into()],
                    ..Section::default()
                },
                Section {
                    title: "Configuration".into(),
                    ..Section::default()
                },
            ],
        };
        let text = shown(&page);
        for part in ["A probe.", "! Careful.", "dev.jsonl", "- AUROC: no claim"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("Configuration"), "{text}");
    }
}
