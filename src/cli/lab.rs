//! `inwit lab`: collects hidden states, labels answers, fits the artefacts that act, refusal heads and
//! steering vectors, and measures what a number format costs.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use inwit_probes::Site;

use super::Exit;
use super::open::{ModelArgs, kv_type, ticking, weight_format};
use super::paths;
use super::probe::command_line;
use super::progress::Progress;
use super::terminal::note;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::read_text;
use crate::lab::bench::Tick;
use crate::lab::fit::unfit;
use crate::lab::make_head::{self, HeadData};
use crate::lab::output::WholeFile;
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
    #[arg(long, default_value_t = 1.0)]
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
    let text = read_text(&args.text, MOST_TEXT, "a text to measure on")?;
    let mut file = args.json.as_deref().map(WholeFile::create).transpose()?;
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
    note(&format!(
        "held-out refusals: {:.3} nats a token and {:.1} % right before, {:.3} and {:.1} % after",
        made.before.loss,
        made.before.accuracy * 100.0,
        made.after.loss,
        made.after.accuracy * 100.0,
    ));
    Ok(Exit::Done)
}

async fn steering_vector(args: VectorArgs) -> Result<Exit> {
    let mut file = paths::open(&args.out, &[&args.harmful, &args.benign])?;
    let bench = args.model.bench(Some("off"), Some("off")).await?;
    let name = artefact_name(args.name, &args.out);
    let mut progress = Progress::new("prompts");
    let mut tick = ticking(&mut progress);
    let made = vector::make(
        &bench,
        &name,
        [&args.harmful, &args.benign],
        args.site,
        &command_line(),
        &mut tick,
    )
    .await?;
    drop(tick);
    drop(progress);
    file.bytes(&made.to_bytes().map_err(unfit)?)?;
    file.finish()?;
    let norms = made.manifest().norms;
    let length = made.vector().iter().map(|v| v * v).sum::<f32>().sqrt();
    note(&format!(
        "a vector of length {length:.3}; states there are {:.3} ± {:.3} long",
        norms.mean, norms.std
    ));
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
