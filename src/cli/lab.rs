//! `inwit lab`: collects hidden states, labels answers, fits the artefacts that act, refusal heads and
//! steering vectors, and measures what a number format costs.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use inwit_probes::Site;
use inwit_probes::fit::Avoid;

use super::Exit;
use super::open::{ModelArgs, kv_type, ticking, weight_format};
use super::paths;
use super::probe::{command_line, table};
use super::progress::Progress;
use super::terminal::{note, print};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::read_text;
use crate::lab::bench::Tick;
use crate::lab::fit::unfit;
use crate::lab::make_head::{self, HeadData};
use crate::lab::output::{WholeFile, refuse_same_file};
use crate::lab::quality::{self, Quality, Subject};
use crate::lab::refusal_head::Options;
use crate::lab::vector;
use crate::model::kernels::{ComputePool, KvType, WeightFormat};
use crate::model::{Decoder, Placement, Source, SpecialText};

const MOST_TEXT: u64 = 4 << 20;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Keep hidden states of prompts, or of prompts and answers, in a folder; goes on with it
    Collect(Box<super::collect::Args>),
    /// Label answers complied, refused or incoherent by several judges, and measure the judges
    Label(Box<super::label::Args>),
    /// Fit a low-rank refusal head on refusals written after harmful prompts
    RefusalHead(Box<HeadArgs>),
    /// Measure what a weight format and a KV type cost in quality, against f32
    Quality(Box<QualityArgs>),
    /// Write the difference of the mean states of harmful and benign prompts as a steering vector
    Vector(Box<VectorArgs>),
}

#[derive(Debug, clap::Args)]
pub(super) struct HeadArgs {
    /// Harmful prompts
    #[arg(long, value_name = "FILE")]
    harmful: PathBuf,
    /// Refusals: rows with `text`; those of the prompt's `category` are preferred
    #[arg(long, value_name = "FILE")]
    refusals: PathBuf,
    /// Harmless prompts with an `answer`, on which the head should change nothing
    #[arg(long, value_name = "FILE")]
    benign: Option<PathBuf>,
    /// Rank of the change to the head
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 4)]
    epochs: usize,
    #[arg(long, default_value_t = 0.005)]
    learning_rate: f32,
    /// What a harmless token weighs against one of a refusal
    #[arg(long, default_value_t = 1.0, requires = "benign")]
    benign_weight: f32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The head's name in policies [default: the name of the output file]
    #[arg(long)]
    name: Option<String>,
    /// Where to write the head
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct VectorArgs {
    /// Harmful prompts
    #[arg(long, value_name = "FILE")]
    harmful: PathBuf,
    /// Benign prompts
    #[arg(long, value_name = "FILE")]
    benign: PathBuf,
    /// Where to read, e.g. blocks.16.hook_resid_post
    #[arg(long, value_name = "SITE")]
    site: Site,
    /// Keep out of the benign states' principal directions that hold this share of their variance,
    /// e.g. 0.99, and of their mean
    #[arg(long, value_name = "SHARE", conflicts_with = "null_space_rank")]
    null_space_energy: Option<f64>,
    /// The same with so many principal directions
    #[arg(long, value_name = "DIRECTIONS")]
    null_space_rank: Option<usize>,
    /// The vector's name in policies and requests [default: the name of the output file]
    #[arg(long)]
    name: Option<String>,
    /// Where to write the vector
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, clap::Args)]
#[command(
    mut_arg("library", |flag| flag.hide(true)),
    mut_arg("device", |flag| flag.hide(true)),
    mut_arg("max_running", |flag| flag.hide(true)),
    mut_arg("kv_memory", |flag| flag.hide(true)),
    mut_arg("context_limit", |flag| flag.hide(true))
)]
pub(super) struct QualityArgs {
    /// A text of some 10,000 tokens
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Where to write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::Collect(args) => super::collect::run(*args).await,
        Command::Label(args) => super::label::run(*args).await,
        Command::Quality(args) => measure_quality(*args).await,
        Command::RefusalHead(args) => refusal_head(*args).await,
        Command::Vector(args) => steering_vector(*args).await,
    }
}

async fn measure_quality(args: QualityArgs) -> Result<Exit> {
    const UNREAD: &str = "formats are compared on one text, without an engine; leave it away";
    let unread = [
        "--library",
        "--device",
        "--max-running",
        "--kv-memory",
        "--context-limit",
    ];
    args.model.refuse(&unread.map(|name| (name, UNREAD)))?;
    let text = read_text(&args.text, MOST_TEXT, "a text to measure on")?;
    let open = |json: &PathBuf| {
        refuse_same_file(json, &args.text)?;
        WholeFile::create(json)
    };
    let mut file = args.json.as_ref().map(open).transpose()?;
    let config = args.model.load(Some("off"), Some("off"))?;
    let work = move || {
        let mut progress = Progress::new("tokens");
        let mut tick = ticking(&mut progress);
        compare_formats(&config, &text, &mut tick)
    };
    let quality = tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::internal("the comparison ended early: a panic"))??;
    if let Some(file) = &mut file {
        file.row(&quality)?;
    }
    file.map(WholeFile::finish).transpose()?;
    note(&format!(
        "{} tokens, weights {}, kv {}: perplexity {:.4} for {:.4} ({:+.2} %), KL {:.5} nats, \
         the same token first {:.2} %, least cosine of a layer {:.6}; {}",
        quality.tokens,
        quality.weights,
        quality.kv,
        quality.perplexity,
        quality.reference_perplexity,
        100.0 * (quality.perplexity / quality.reference_perplexity - 1.0),
        quality.mean_kl,
        100.0 * quality.top1_agreement,
        quality.least_cosine,
        match quality.beyond().as_slice() {
            [] => "within the bounds".to_owned(),
            beyond => format!("not kept: {}", beyond.join(", ")),
        },
    ));
    Ok(Exit::Done)
}

fn compare_formats(config: &Config, text: &str, tick: Tick<'_>) -> Result<Quality> {
    let open = || Source::open(&super::pull::fetch(&config.model)?);
    let source = open()?;
    let tokens = source.tokenizer.encode(text, SpecialText::AsText)?;
    let exact = Decoder::load(&source, &Placement::cpu(WeightFormat::F32))?;
    let weights = weight_format(config.weights, source.matrices());
    let other = Decoder::load(&open()?, &Placement::cpu(weights))?;
    let reference = Subject {
        decoder: &exact,
        kv: KvType::F32,
    };
    let subject = Subject {
        decoder: &other,
        kv: kv_type(config.kv),
    };
    let pool = ComputePool::new(config.threads.unwrap_or(0))
        .map_err(|error| Error::Config(format!("--threads: {error}")))?;
    pool.install(|| quality::compare(&reference, &subject, &tokens, tick))
}

async fn refusal_head(args: HeadArgs) -> Result<Exit> {
    let mut data: Vec<&Path> = vec![&args.harmful, &args.refusals];
    data.extend(args.benign.as_deref());
    let mut file = paths::open(&args.out, &data)?;
    let bench = args.model.bench(Some("off"), Some("off")).await?;
    let head = args.model.output_head().await?;
    let data = HeadData {
        name: artefact_name(args.name, &args.out),
        harmful: args.harmful,
        refusals: args.refusals,
        benign: args.benign,
        command: command_line(),
    };
    let options = Options {
        rank: args.rank,
        epochs: args.epochs,
        learning_rate: args.learning_rate,
        benign_weight: args.benign_weight,
        seed: args.seed,
    };
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let made = make_head::make(&bench, &head, &data, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    file.bytes(&made.head.to_bytes().map_err(unfit)?)?;
    file.finish()?;
    if made.refusals.is_some() || made.benign.is_some() {
        print(&format!("{}\n", told(&made)))?;
    }
    if made.refusals.is_none() {
        note(
            "how well it refuses was not measured: every tenth group of --harmful and every tenth \
             refusal are kept for that",
        );
    }
    if made.benign.is_none() {
        note("its effect on benign answers was not measured: --benign takes ten or more of them");
    }
    Ok(Exit::Done)
}

/// What the head does to tokens that it was not fitted on.
fn told(made: &make_head::Made) -> String {
    let percent = |share: f32| format!("{:.1} %", 100.0 * share);
    let mut rows = table(&["held-out tokens", "without", "with the head"]);
    if let Some([before, after]) = made.refusals {
        rows.add_row([
            "refusals: nats a token".to_owned(),
            format!("{:.3}", before.loss),
            format!("{:.3}", after.loss),
        ]);
        rows.add_row([
            "refusals: the likeliest token is theirs".to_owned(),
            percent(before.accuracy),
            percent(after.accuracy),
        ]);
    }
    if let Some(benign) = made.benign {
        rows.add_row([
            format!("benign answers ({}): mean KL in nats", benign.tokens),
            "0".to_owned(),
            format!("{:.4}", benign.mean_kl),
        ]);
        rows.add_row([
            "benign answers: another likeliest token".to_owned(),
            "0 %".to_owned(),
            percent(benign.top1_changed),
        ]);
    }
    rows.trim_fmt()
}

async fn steering_vector(args: VectorArgs) -> Result<Exit> {
    let mut file = paths::open(&args.out, &[&args.harmful, &args.benign])?;
    let energy = args.null_space_energy.map(Avoid::Energy);
    let options = vector::Options {
        name: artefact_name(args.name, &args.out),
        harmful: args.harmful,
        benign: args.benign,
        site: args.site,
        avoid: energy.or(args.null_space_rank.map(Avoid::Rank)),
        command: command_line(),
    };
    let bench = args.model.bench(Some("off"), Some("off")).await?;
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let made = vector::make(&bench, &options, &mut tick).await?;
    drop(tick);
    drop(progress);
    file.bytes(&made.vector.to_bytes().map_err(unfit)?)?;
    file.finish()?;
    let manifest = made.vector.manifest();
    note(&format!(
        "a vector of length {:.3}; states there are {:.3} ± {:.3} long",
        manifest.record.metrics["length"].value, manifest.norms.mean, manifest.norms.std
    ));
    if let Some(left) = &made.constrained {
        note(&format!(
            "kept out of {} principal directions ({:.2} % of the benign states' variance): along \
             it they now vary by {:.4} instead of {:.4} ({:.2} % is left); {:.1} % of its length \
             is left",
            left.rank,
            100.0 * left.energy,
            left.variance[1],
            left.variance[0],
            100.0 * left.variance[1] / left.variance[0],
            100.0 * left.kept,
        ));
    }
    Ok(Exit::Done)
}

fn artefact_name(given: Option<String>, out: &Path) -> String {
    given.unwrap_or_else(|| {
        out.file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    })
}
