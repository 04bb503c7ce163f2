//! `inwit probe`: fits a probe, compares sites, sets thresholds, or shows what a probe says about
//! itself.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use comfy_table::{Table, presets};
use inwit_probes::manifest::{ModelIdentity, Record};
use inwit_probes::{
    Gather, Kind, Manifest, OperatingPoint, Positions, Probe, RefusalHead, Site, SteeringVector,
};

use super::curve::CurveArgs;
use super::open::{ModelArgs, ticking};
use super::paths;
use super::progress::Progress;
use super::recipe::RecipeArgs;
use super::sweep::SweepArgs;
use super::terminal::{note, print};
use super::threshold::ThresholdArgs;
use super::{Exit, wait};
use crate::error::Result;
use crate::lab::fit::{Curve, Options, fit, unfit};
use crate::lab::learn::name_of;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Fit a probe on labelled prompts, calibrate it on held-out ones, and write it down
    Fit(Box<FitArgs>),
    /// Fit a probe at one site after another and measure each: which layer tells the classes apart
    Sweep(Box<SweepArgs>),
    /// Fit a probe on growing shares of its rows and measure each: whether more rows would help
    Curve(Box<CurveArgs>),
    /// Set a probe's threshold for a false-positive rate, on benign prompts
    Threshold(Box<ThresholdArgs>),
    /// Print what a probe file says about itself
    Show {
        /// The .safetensors file of a probe, a refusal head or a steering vector
        file: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct FitArgs {
    /// JSON lines with `label`: harmful or benign, complied or refused, or incoherent or coherent;
    /// rows with the same `group` are never torn apart
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to read, e.g. blocks.16.hook_resid_post; several are read together
    #[arg(long = "site", value_name = "SITE", required = true)]
    sites: Vec<Site>,
    /// last, prompt_content, generated:K, generated:1..K (the first K together) or every_generated;
    /// all but the first two need `answer` in the data
    #[arg(long, value_parser = positions, default_value = "last")]
    positions: Positions,
    /// How token logits become the request's: last, max, mean, ema{0.2}, k_of_n{2,8},
    /// cumulative_log_odds, attention; may be given several times, each is calibrated and the first
    /// shapes the fit [default: last; mean for generated:1..K; or attention]
    #[arg(long = "gather", value_name = "GATHER")]
    gathers: Vec<Gather>,
    /// How logits become probabilities, on the rows that are held out
    #[arg(long, value_enum, value_name = "CURVE", default_value = "platt")]
    calibration: Curve,
    /// Benign rows that set the thresholds, instead of the held-out ones
    #[arg(long, value_name = "FILE")]
    calibration_data: Option<PathBuf>,
    /// Labelled rows whose tokens the file may carry as canaries, instead of held-out ones
    #[arg(long, value_name = "FILE")]
    canary_data: Option<PathBuf>,
    /// The probe's name in policies
    #[arg(long)]
    name: String,
    /// Where to write the probe
    #[arg(long, value_name = "FILE")]
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

pub(super) fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Fit(args) => wait(run_fit(*args)),
        Command::Sweep(args) => wait(super::sweep::run(*args)),
        Command::Curve(args) => wait(super::curve::run(*args)),
        Command::Threshold(args) => wait(super::threshold::run(*args)),
        Command::Show { file } => show(&file),
    }
}

async fn run_fit(args: FitArgs) -> Result<Exit> {
    let (recipe, gathers) = args.recipe.recipe(args.gathers, args.positions);
    let data = [
        Some(&args.data),
        args.calibration_data.as_ref(),
        args.canary_data.as_ref(),
    ];
    let data: Vec<&Path> = data.into_iter().flatten().map(PathBuf::as_path).collect();
    let mut file = paths::open(&args.out, &data)?;
    let mut bench = args.model.bench(Some("off"), Some("off")).await?;
    bench.use_states(&args.states, &data)?;
    let options = Options {
        name: args.name,
        train: args.data,
        calibration: args.calibration_data,
        canaries: args.canary_data,
        sites: args.sites,
        positions: args.positions,
        gathers,
        recipe,
        curve: args.calibration,
        command: command_line(),
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let fitted = fit(&bench, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    file.bytes(&fitted.probe.to_bytes().map_err(unfit)?)?;
    file.finish()?;
    print(&described(fitted.probe.manifest()))?;
    for remark in &fitted.remarks {
        note(remark);
    }
    Ok(Exit::Done)
}

fn show(file: &Path) -> Result<Exit> {
    let (text, hash) = if let Ok(head) = RefusalHead::load(file) {
        let manifest = head.manifest();
        let facts = [
            ("rank", manifest.rank.to_string()),
            ("vocabulary", manifest.vocab.to_string()),
        ];
        let named = ("refusal head", manifest.name.as_str());
        let text = record_told(named, &facts, &manifest.model, &manifest.record);
        (text, head.content_hash().to_owned())
    } else if let Ok(vector) = SteeringVector::load(file) {
        let manifest = vector.manifest();
        let norms = manifest.norms;
        let facts = [
            ("site", manifest.site.to_string()),
            (
                "states there",
                format!("{:.2} long on average, of {} rows", norms.mean, norms.rows),
            ),
        ];
        let named = ("vector", manifest.name.as_str());
        let text = record_told(named, &facts, &manifest.model, &manifest.record);
        (text, vector.content_hash().to_owned())
    } else {
        let probe = Probe::load(file).map_err(unfit)?;
        (described(probe.manifest()), probe.content_hash().to_owned())
    };
    print(&text)?;
    print(&format!("content hash  {hash}\n"))?;
    Ok(Exit::Done)
}

/// Options whose values are files and folders.
const PATHS: [&str; 17] = [
    "--data",
    "--dev",
    "--states",
    "--train",
    "--json",
    "--report",
    "--log",
    "--sweep-json",
    "--out",
    "--calibration-data",
    "--canary-data",
    "--harmful",
    "--benign",
    "--refusals",
    "--config",
    "--library",
    "--model",
];

/// The command line as the record keeps it: how the artefact can be made again.
pub(super) fn command_line() -> String {
    recorded(std::env::args().skip(1), |path| Path::new(path).exists())
}

/// Folders differ between machines, and tell about them: of paths the last part is kept. A model
/// or a probe may be a path or a name, so `exists` is asked.
fn recorded(args: impl Iterator<Item = String>, exists: impl Fn(&str) -> bool) -> String {
    let kept = |option: &str, value: &str| {
        let is_path = (PATHS.contains(&option) && option != "--model") || exists(value);
        match Path::new(value).file_name() {
            Some(name) if is_path => name.to_string_lossy().into_owned(),
            _ => value.to_owned(),
        }
    };
    let mut words = vec!["inwit".to_owned()];
    let mut option = String::new();
    for arg in args {
        words.push(match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                format!("{name}={}", kept(name, value))
            }
            _ => kept(&option, &arg),
        });
        // An option may take several values.
        if arg.starts_with("--") {
            option = arg;
        }
    }
    words.join(" ")
}

/// `generated:3` as well as the manifest's own `generated{3}`.
pub(super) fn positions(text: &str) -> std::result::Result<Positions, String> {
    let manifest_text = match text.split_once(':') {
        Some(("generated", k)) => format!("generated{{{k}}}"),
        _ if text == "last" => "last_prompt_token".into(),
        _ => text.into(),
    };
    manifest_text.parse().map_err(|_| {
        "expected last, prompt_content, generated:3 (counted from 1), generated:1..3 \
         or every_generated"
            .to_owned()
    })
}

/// The manifest as tables.
fn described(manifest: &Manifest) -> String {
    let listed = |items: Vec<String>| items.join(", ");
    let sites = manifest.heads.iter().map(|head| head.site.to_string());
    let mut facts = vec![
        ("kind", name_of(manifest.kind).to_owned()),
        ("sites", listed(sites.collect())),
        ("reads", manifest.positions.to_string()),
        (
            "gathers",
            listed(manifest.gathers.iter().map(Gather::to_string).collect()),
        ),
        ("canaries", manifest.canaries.len().to_string()),
    ];
    if manifest.kind == Kind::Attention {
        let heads = manifest.attention_heads().to_string();
        facts.insert(1, ("attention heads", heads));
    }
    let points = manifest.calibrations.iter().flat_map(|calibration| {
        let points = calibration.thresholds.iter();
        points.map(|point| (calibration.gather, point))
    });
    let thresholds = threshold_table(points);
    let named = ("probe", manifest.name.as_str());
    let mut text = record_told(named, &facts, &manifest.model, &manifest.record);
    if !thresholds.is_empty() {
        text += &format!("\n{}\n", thresholds.trim_fmt());
    }
    text
}

/// What every artefact tells: what it is, for which model, from which data, and how well it did.
fn record_told(
    (what, name): (&str, &str),
    facts_of_kind: &[(&str, String)],
    model: &ModelIdentity,
    record: &Record,
) -> String {
    let mut facts = table(&[what, name]);
    let mut fact = |name: &str, value: String| {
        facts.add_row([name, &value]);
    };
    for (name, value) in facts_of_kind {
        fact(name, value.clone());
    }
    fact("model", format!("{} ({})", model.name, model.weight_format));
    fact("architecture id", model.architecture_id.clone());
    fact("weights id", model.weights_id.clone());
    for data in &record.data {
        fact(
            "data",
            format!("{}, {} rows, sha256 {}", data.name, data.rows, data.sha256),
        );
    }
    fact("seed", record.seed.to_string());
    fact("command", record.command.clone());
    if !record.note.is_empty() {
        fact("note", record.note.clone());
    }

    let mut metrics = table(&["measure", "value", "95 % interval"]);
    for (name, metric) in &record.metrics {
        let interval = metric
            .interval
            .map(|[low, high]| format!("{low:.4} to {high:.4}"));
        let is_count = metric.interval.is_none() && metric.value.fract() == 0.0;
        let value = match is_count {
            true => format!("{:.0}", metric.value),
            false => format!("{:.4}", metric.value),
        };
        metrics.add_row([name, &value, &interval.unwrap_or_default()]);
    }

    let tables = [facts, metrics].into_iter();
    let filled = tables.filter(|table| !table.is_empty());
    let texts: Vec<String> = filled.map(|table| table.trim_fmt()).collect();
    format!("{}\n", texts.join("\n\n"))
}

/// Operating points with the gather that they belong to.
pub(super) fn threshold_table<'a>(
    points: impl Iterator<Item = (Gather, &'a OperatingPoint)>,
) -> Table {
    let mut thresholds = table(&[
        "gather",
        "false positives",
        "answer",
        "threshold",
        "95 % interval",
        "rows",
    ]);
    for (gather, point) in points {
        let answer = point.answer_tokens.map(|tokens| format!("{tokens} tokens"));
        thresholds.add_row([
            gather.to_string(),
            format!("{:.1} %", point.fpr * 100.0),
            answer.unwrap_or_default(),
            format!("{:.3}", point.threshold_logit),
            format!(
                "{:.2} to {:.2} %",
                point.interval[0] * 100.0,
                point.interval[1] * 100.0
            ),
            point.n.to_string(),
        ]);
    }
    thresholds
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

#[cfg(test)]
mod tests {
    use inwit_probes::manifest::{Metric, ModelIdentity};

    use super::*;

    #[test]
    fn positions_are_read_in_both_spellings() {
        assert_eq!(positions("last"), Ok(Positions::LastPromptToken));
        assert_eq!(positions("generated:3"), Ok(Positions::Generated(3)));
        assert_eq!(positions("generated{3}"), Ok(Positions::Generated(3)));
        assert_eq!(
            positions("generated:1..3"),
            Ok(Positions::FirstGenerated(3))
        );
        assert!(positions("generated:0").is_err());
        assert!(positions("somewhere").is_err());
    }

    #[test]
    fn a_recorded_command_keeps_names_and_no_folders() {
        let check = |line: &str, expected: &str| {
            let args = line.split(' ').map(str::to_owned);
            assert_eq!(recorded(args, |path| path.starts_with('/')), expected);
        };
        check(
            "probe fit --data /home/x/a.jsonl --out=/home/x/y.safetensors --model org/name",
            "inwit probe fit --data a.jsonl --out=y.safetensors --model org/name",
        );
        check(
            "lab vector --harmful a/b --model /m/x.gguf --model=org/name --name a/b",
            "inwit lab vector --harmful b --model x.gguf --model=org/name --name a/b",
        );
        check(
            "eval probe /m/p.safetensors --data a/b.jsonl c/d.jsonl --report x/r.html",
            "inwit eval probe p.safetensors --data b.jsonl d.jsonl --report r.html",
        );
    }

    #[test]
    fn a_description_names_what_counts() {
        let identity = ModelIdentity {
            name: "tiny".into(),
            architecture_id: "a1".into(),
            weights_id: "w1".into(),
            weight_format: "f32".into(),
        };
        let mut manifest = Manifest::new(
            "prompt_harm",
            Kind::Logistic,
            4,
            Positions::PromptContent,
            identity,
        );
        let metric = Metric {
            value: 0.97,
            interval: Some([0.95, 0.99]),
        };
        manifest
            .record
            .metrics
            .insert("held_out_auroc_mean".into(), metric);
        let text = described(&manifest);
        for part in [
            "prompt_harm",
            "prompt_content",
            "0.9700",
            "0.9500 to 0.9900",
            "a1",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
