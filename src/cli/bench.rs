//! `inwit bench`: measures the engine in this process, and what monitoring adds to a step.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};

use super::Exit;
use super::bench_grpc::grpc;
use super::open::{ModelArgs, load_model, size};
use super::progress::Progress;
use super::terminal::{note, print};
use crate::config::Config;
use crate::engine::handle::{Engine, EngineThread, Model};
use crate::error::{Error, Result};
use crate::journal::Discard;
use crate::lab::benchmark::{Benchmark, Loaded, Report, Row, Settings, Sizes};
use crate::lab::machine::{commit, machine, peak_rss};
use crate::lab::monitoring::{Monitor, Monitoring};
use crate::lab::output::WholeFile;
use crate::lab::paired::{AddedRow, PairedOptions, Steps};
use crate::lab::workload;
use crate::model::kernels::ComputePool;
use crate::registry::ModelIds;

/// Writes {"machine","commit","settings","rows","added","prefix","long_prompt","grpc","memory","peak_rss_bytes"};
/// rows are {"name","streams","monitor","tokens_per_second","p50_ms","p99_ms"}, null where nothing was measured.
#[derive(Debug, clap::Args)]
#[command(mut_arg("library", |flag| flag.hide(true)), mut_arg("max_running", |flag| flag.hide(true)))]
pub(super) struct Args {
    /// Streams that decode at once [default: 1,4,8,16,32]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    streams: Option<Vec<u16>>,
    /// What to measure
    #[arg(
        long,
        value_name = "PARTS",
        value_delimiter = ',',
        default_value = "memory,throughput,prefix,long-prompt,grpc,added"
    )]
    parts: Vec<Part>,
    /// Pairs of a step without and a step with monitoring [default: 2000]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pairs: Option<u32>,
    /// How often a row is measured [default: 3]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Prompt of a prefill row [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: Option<u32>,
    /// Prompt of each stream of a decode row [default: 64]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    context_tokens: Option<u32>,
    /// Answer of each stream of a decode row [default: 128]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    answer_tokens: Option<u32>,
    /// A small run that shows that all works; its numbers mean nothing
    #[arg(long)]
    quick: bool,
    /// Draws probes, vectors, prompts and orders [default: 0]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// What the file says was measured [default: what git says of the working directory]
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,
    /// Where to write everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Peak memory of many long streams
    Memory,
    /// Prefill, time to first token and decode, under each kind of monitoring
    Throughput,
    /// A repeated prefix
    Prefix,
    /// A long prompt that arrives among streams
    LongPrompt,
    /// The same answers in process and as gRPC streams, with the most of --streams
    Grpc,
    /// What monitoring adds to a decode step
    Added,
}

/// Tokens of context beside a long prompt: what follows it.
const BESIDE: usize = 64;
/// Most tokens of a prompt that is asked in process and over gRPC.
const GRPC_PROMPT: usize = 384;
const STREAMS: [u16; 5] = [1, 4, 8, 16, 32];
const QUICK_PAIRS: u32 = 8;
const PAIRS: u32 = 2000;

pub(super) async fn run(args: Args) -> Result<Exit> {
    args.check()?;
    // Before minutes of work, not after.
    let file = args.json.as_deref().map(WholeFile::create).transpose()?;
    let report = measure(&args).await?;
    print(&format!("{}\n", tables(&report)))?;
    if let Some(mut file) = file {
        file.row(&report)?;
        file.finish()?;
    }
    Ok(Exit::Done)
}

impl Args {
    fn sizes(&self) -> Sizes {
        let mut sizes = match self.quick {
            true => Sizes::quick(),
            false => Sizes::default(),
        };
        let set = |size: &mut usize, asked: Option<u32>| {
            if let Some(asked) = asked {
                *size = asked as usize;
            }
        };
        set(&mut sizes.prompt_tokens, self.prompt_tokens);
        set(&mut sizes.context_tokens, self.context_tokens);
        set(&mut sizes.answer_tokens, self.answer_tokens);
        set(&mut sizes.rounds, self.rounds.map(u32::from));
        sizes
    }

    fn streams(&self) -> Vec<usize> {
        let asked = self.streams.as_deref().unwrap_or(&STREAMS);
        asked.iter().map(|streams| usize::from(*streams)).collect()
    }

    fn most_streams(&self) -> usize {
        self.streams().into_iter().max().unwrap_or(1)
    }

    /// Refuses what none of the parts asked for reads.
    fn check(&self) -> Result<()> {
        use Part::{Added, Grpc, LongPrompt, Prefix, Throughput};
        let read_by: [(&str, bool, &[Part]); 7] = [
            ("--seed", self.seed.is_some(), &[Throughput, Grpc, Added]),
            (
                "--streams",
                self.streams.is_some(),
                &[Throughput, Grpc, Added],
            ),
            ("--pairs", self.pairs.is_some(), &[Added]),
            (
                "--rounds",
                self.rounds.is_some(),
                &[Throughput, Prefix, Grpc],
            ),
            (
                "--prompt-tokens",
                self.prompt_tokens.is_some(),
                &[Throughput],
            ),
            (
                "--context-tokens",
                self.context_tokens.is_some(),
                &[Throughput, LongPrompt, Added],
            ),
            (
                "--answer-tokens",
                self.answer_tokens.is_some(),
                &[Throughput, LongPrompt, Grpc, Added],
            ),
        ];
        for (flag, given, parts) in read_by {
            if given && !parts.iter().any(|part| self.wants(*part)) {
                let names = parts.iter().filter_map(Part::to_possible_value);
                let names: Vec<_> = names.map(|name| name.get_name().to_owned()).collect();
                return Err(Error::Config(format!(
                    "{flag}: none of the parts asked for reads it; leave it away, or add one of {} \
                     to --parts",
                    names.join(", ")
                )));
            }
        }
        self.model.refuse(&[
            (
                "--library",
                "a benchmark makes its own probes and vectors; leave it away",
            ),
            (
                "--max-running",
                "each part runs as many rows as it has streams; leave it away",
            ),
        ])?;
        if self.parts.iter().all(|part| *part == Added) {
            const UNREAD: &str =
                "the part added keeps just the tokens that it steps over; leave it away";
            self.model
                .refuse(&[("--kv-memory", UNREAD), ("--context-limit", UNREAD)])?;
        }
        Ok(())
    }

    fn wants(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }
}

async fn measure(args: &Args) -> Result<Report> {
    let sizes = args.sizes();
    let seed = args.seed.unwrap_or_default();
    let base = args.model.load(Some("off"), Some("off"))?;
    let mut report = Report {
        machine: machine(),
        commit: args.commit.clone().unwrap_or_else(commit),
        settings: Settings {
            loaded: Loaded::default(),
            threads: base.threads.unwrap_or_else(cores),
            step_token_budget: base.step_token_budget,
            prefill_share: base.prefill_share,
            seed,
            sizes,
        },
        rows: Vec::new(),
        added: Vec::new(),
        prefix: None,
        long_prompt: None,
        grpc: None,
        memory: None,
        peak_rss_bytes: None,
    };
    // Memory comes first: a peak remembers everything before it.
    if args.wants(Part::Memory) {
        let config = sized(&base, sizes.memory_streams, sizes.memory_tokens);
        let bench = Bench::start(config, seed, &mut report).await?;
        report.memory = Some(bench.on(sizes).memory().await?);
        bench.stop().await?;
        note("memory: measured");
    }
    if args.wants(Part::Throughput) {
        throughput(args, &base, sizes, &mut report).await?;
    }
    if args.wants(Part::Prefix) {
        let longest = sizes.prefix_tokens + BESIDE;
        let bench = Bench::start(sized(&base, 1, longest), seed, &mut report).await?;
        if bench.has_room("prefix", longest) {
            report.prefix = Some(bench.on(sizes).prefix().await?);
        }
        bench.stop().await?;
    }
    if args.wants(Part::LongPrompt) {
        let longest = sizes.long_prompt_tokens + BESIDE;
        let config = sized(&base, sizes.long_prompt_streams + 1, longest);
        let bench = Bench::start(config, seed, &mut report).await?;
        if bench.has_room("long-prompt", longest) {
            report.long_prompt = Some(bench.on(sizes).long_prompt().await?);
        }
        bench.stop().await?;
    }
    if args.wants(Part::Grpc) {
        let streams = args.most_streams();
        let longest = GRPC_PROMPT + sizes.answer_tokens;
        let bench = Bench::start(sized(&base, streams, longest), seed, &mut report).await?;
        if bench.has_room("grpc", longest) {
            report.grpc = Some(grpc(&bench.on(sizes), streams, seed).await?);
            note("grpc: measured");
        }
        bench.stop().await?;
    }
    if args.wants(Part::Added) {
        let config = base.clone();
        let options = Added {
            streams: args.streams(),
            pairs: args
                .pairs
                .unwrap_or(if args.quick { QUICK_PAIRS } else { PAIRS })
                as usize,
            sizes,
            seed,
        };
        let measured = tokio::task::spawn_blocking(move || added(&config, &options));
        (report.added, report.settings.loaded) = measured
            .await
            .map_err(|_| Error::internal("the paired steps ended in a panic"))??;
    }
    report.peak_rss_bytes = peak_rss();
    Ok(report)
}

/// Prefill, time to first token and decode, under each kind of monitoring.
async fn throughput(args: &Args, base: &Config, sizes: Sizes, report: &mut Report) -> Result<()> {
    let longest = (sizes.prompt_tokens + 1).max(sizes.context_tokens + sizes.answer_tokens);
    let config = sized(base, args.most_streams(), longest);
    let bench = Bench::start(config, args.seed.unwrap_or_default(), report).await?;
    let measured = bench.on(sizes);
    for monitor in Monitor::ALL {
        report.rows.push(measured.prefill(monitor).await?);
        for streams in args.streams() {
            let rows = measured.decode(streams, monitor).await?;
            let together = rows.iter().all(|row| row.tokens_per_second.is_some());
            report.rows.extend(rows);
            note(&match together {
                true => format!("{monitor}, {streams} streams: measured"),
                false => format!(
                    "{monitor}, {streams} streams: the first ended before the last began, so \
                     nothing was measured; take a larger --answer-tokens"
                ),
            });
        }
    }
    bench.stop().await
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Room for what is measured and no more.
fn sized(base: &Config, streams: usize, tokens: usize) -> Config {
    let mut config = base.clone();
    config.max_running = streams;
    config.max_waiting = config.max_waiting.max(streams);
    config.context_limit = Some(base.context_limit.unwrap_or(tokens).min(tokens));
    config
}

/// An engine with what a benchmark asks of it.
struct Bench {
    engine: Engine,
    thread: EngineThread,
    monitoring: Monitoring,
}

impl Bench {
    /// Notes in `report` what was loaded.
    async fn start(config: Config, seed: u64, report: &mut Report) -> Result<Self> {
        let start = move || {
            let (model, options) = load_model(&config)?;
            Engine::start(model, options, Arc::new(Discard))
        };
        let (engine, thread) = tokio::task::spawn_blocking(start)
            .await
            .map_err(|_| Error::internal("the model could not be loaded: a panic"))??;
        let info = engine.info();
        report.settings.loaded = Loaded {
            model: info.name.clone(),
            weight_format: info.weight_format.clone(),
            kv_type: info.kv_type.clone(),
            weight_bytes: info.weight_bytes,
        };
        Ok(Self {
            monitoring: Monitoring::new(&info.ids(), seed)?,
            engine,
            thread,
        })
    }

    fn on(&self, sizes: Sizes) -> Benchmark<'_> {
        Benchmark {
            engine: &self.engine,
            monitoring: &self.monitoring,
            sizes,
        }
    }

    /// Says so where there is none.
    fn has_room(&self, part: &str, tokens: usize) -> bool {
        let context = self.engine.info().context_length;
        if context < tokens {
            note(&format!(
                "{part}: left out, it takes a context of {tokens}, and here are {context}"
            ));
        }
        context >= tokens
    }

    /// Waits for the thread: the next part wants the memory and the cores.
    async fn stop(self) -> Result<()> {
        drop(self.engine);
        let thread = self.thread;
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .map_err(|_| Error::internal("the engine ended in a panic"))
    }
}

struct Added {
    streams: Vec<usize>,
    pairs: usize,
    sizes: Sizes,
    seed: u64,
}

/// Every variant for every number of streams, and the model that was measured.
fn added(config: &Config, options: &Added) -> Result<(Vec<AddedRow>, Loaded)> {
    let (model, engine) = load_model(config)?;
    let Model {
        decoder,
        tokenizer,
        identity,
        name,
        ..
    } = model;
    let loaded = Loaded {
        model: name,
        weight_format: decoder.weights_held_as(),
        kv_type: engine.kv_type.to_string(),
        weight_bytes: decoder.weight_bytes(),
    };
    let pool = ComputePool::new(engine.threads)
        .map_err(|error| Error::Config(format!("--threads: {error}")))?;
    let ids = ModelIds {
        architecture_id: identity.architecture_id,
        weights_id: identity.weights_id,
        d_model: decoder.config().d_model,
        n_layers: decoder.config().n_layers,
        vocab: decoder.config().vocab_size,
    };
    let monitoring = Monitoring::new(&ids, options.seed)?;
    let paired = PairedOptions {
        pairs: options.pairs,
        context: options.sizes.context_tokens,
        window: options.sizes.answer_tokens,
        kv_type: engine.kv_type,
        seed: options.seed,
    };
    let positions = paired.context + paired.window;
    if positions > decoder.config().context_length {
        return Err(Error::Config(format!(
            "--context-tokens and --answer-tokens: together more than the model's context of {}",
            decoder.config().context_length
        )));
    }
    // Off against itself is the control: what the method says where there is no difference.
    let variants = Monitor::ALL;
    let total = options.streams.len() * variants.len() * options.pairs.div_ceil(2);
    let mut progress = Progress::new("alternations");
    let (mut rows, mut done) = (Vec::new(), 0);
    for streams in &options.streams {
        let tokens = (0..*streams).map(|s| workload::tokens(&tokenizer, s, positions));
        let tokens = tokens.collect::<Result<_>>()?;
        let mut steps = Steps::new(&decoder, &pool, &monitoring, tokens, paired.clone())?;
        for variant in variants {
            rows.push(steps.added(variant, || {
                done += 1;
                progress.tick(done, total);
            })?);
        }
    }
    Ok((rows, loaded))
}

fn tables(report: &Report) -> String {
    let settings = &report.settings;
    let mut text = format!(
        "{}\ncommit {}; {}, weights {}, kv {}, {} threads\n",
        report.machine,
        report.commit,
        settings.loaded.model,
        settings.loaded.weight_format,
        settings.loaded.kv_type,
        settings.threads,
    );
    let mut section = |table: Table| text.push_str(&format!("\n{table}\n"));
    if !report.rows.is_empty() {
        section(throughput_table(&report.rows));
    }
    if !report.added.is_empty() {
        section(added_table(&report.added));
    }
    if let Some(prefix) = &report.prefix {
        text.push_str(&format!(
            "\na repeated prefix of {} tokens: first token after {:.1} ms, at first {:.1} ms ({:.1} %)\n",
            prefix.tokens, prefix.repeated_ms, prefix.cold_ms, prefix.percent_of_cold
        ));
    }
    if let Some(long) = &report.long_prompt {
        let of_without = long.without_p50_ms.zip(long.during_over_without);
        let during = match (long.during_p99_ms, long.during_over_before) {
            (Some(p99), Some(over)) => {
                let without = of_without.map(|(without, over)| {
                    format!("{over:.1}x the median without it, {without:.1} ms, and ")
                });
                format!(
                    "p99 between their tokens {p99:.1} ms ({}{over:.1}x the median before it)",
                    without.unwrap_or_default()
                )
            }
            _ => "none of them wrote a token meanwhile".to_owned(),
        };
        text.push_str(&format!(
            "\na prompt of {} tokens among {} streams, {} to its end: {during}, before it {:.1} ms \
             at the median; its first token after {:.0} ms, alone {:.0} ms ({:.2}x)\n",
            long.tokens,
            long.streams,
            long.streams_to_the_end,
            long.before_p50_ms,
            long.among_ms,
            long.alone_ms,
            long.among_over_alone,
        ));
    }
    if let Some(grpc) = &report.grpc {
        let [low, high] = grpc.interval_percent;
        text.push_str(&format!(
            "\n{} streams, {} tokens: {:.0} tokens/s in process, {:.0} over gRPC: {:.1} % \
             (95 % {low:.1} to {high:.1} %)\n",
            grpc.streams,
            grpc.tokens,
            grpc.in_process_tokens_per_second,
            grpc.grpc_tokens_per_second,
            grpc.percent_of_in_process,
        ));
    }
    if let Some((memory, peak)) = report
        .memory
        .as_ref()
        .and_then(|m| Some((m, m.peak_rss_bytes?)))
    {
        text.push_str(&format!(
            "\npeak memory with {} streams of {} tokens: {}\n",
            memory.streams,
            memory.tokens,
            size(peak)
        ));
    }
    text
}

fn table<const N: usize>(header: [&str; N], left: usize) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_header(header);
    for column in table.column_iter_mut().skip(left) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn throughput_table(rows: &[Row]) -> Table {
    let header = [
        "what",
        "monitoring",
        "streams",
        "tokens/s",
        "p50 ms",
        "p99 ms",
    ];
    let told = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let mut table = table(header, 2);
    for row in rows {
        table.add_row([
            row.name.to_owned(),
            row.monitor.to_string(),
            row.streams.to_string(),
            told(row.tokens_per_second, 1),
            told(row.p50_ms, 2),
            told(row.p99_ms, 2),
        ]);
    }
    table
}

fn added_table(rows: &[AddedRow]) -> Table {
    let header = [
        "added by", "streams", "step us", "added us", "95 %", "added %", "95 %", "pairs",
    ];
    let mut table = table(header, 1);
    for AddedRow {
        streams,
        monitor,
        added,
    } in rows
    {
        let interval =
            |[low, high]: [f64; 2], digits: usize| format!("{low:.digits$} to {high:.digits$}");
        table.add_row([
            monitor.to_string(),
            streams.to_string(),
            format!("{:.0}", added.base_us),
            format!("{:.1}", added.added_us),
            interval(added.interval_us, 1),
            format!("{:.3}", added.added_percent),
            interval(added.interval_percent, 3),
            added.pairs.to_string(),
        ]);
    }
    table
}
