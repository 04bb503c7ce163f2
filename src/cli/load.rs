//! `inwit load`: loads a running server at a constant rate and measures what its callers see.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

use super::Exit;
use super::paths;
use super::progress::Progress;
use super::terminal::{note, print};
use crate::error::{Error, Result};
use crate::lab::load::{
    Caller, Calls, Clock, End, Ended, Goodput, Latencies, LoadOptions, LoadReport, LoadSettings,
    MOST_CALLS, MOST_WORDS, Planned, PlannedWork, Slo, codes, elapsed, run as run_plan,
    tokens_per_second,
};
use crate::lab::machine::{commit, machine};
use crate::lab::output::WholeFile;
use crate::lab::plot;
use crate::policy::Mode;
use crate::rpc::load_client::{Deliveries, LoadClient};

/// Calls begin at a constant rate whether or not earlier ones have ended, and latencies count from
/// the moment at which a call was meant to begin.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where the server listens
    #[arg(long, default_value = "http://127.0.0.1:50051", value_name = "URL")]
    url: String,
    /// Calls per second
    #[arg(long, default_value = "2", value_name = "NUMBER", value_parser = rate)]
    rate: f64,
    /// For how long calls begin, in seconds
    #[arg(long, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    duration: Duration,
    /// Equal seeds make equal calls
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Connections that the calls share
    #[arg(long, default_value_t = 4, value_name = "NUMBER",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    /// Lengths of prompts, each as likely
    #[arg(long, value_name = "WORDS", value_delimiter = ',', default_value = "12,12,60,250",
          value_parser = clap::value_parser!(u16).range(1..))]
    prompt_words: Vec<u16>,
    /// Longest answers, each as likely
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "16,64,128",
          value_parser = clap::value_parser!(u16).range(1..))]
    answer_tokens: Vec<u16>,
    /// Share of calls that hang up in the middle of the answer, 0 to 1
    #[arg(long, default_value = "0", value_name = "SHARE", value_parser = share)]
    cancel: f64,
    /// Share of calls that score a prompt instead of asking for an answer, 0 to 1
    #[arg(long, default_value = "0", value_name = "SHARE", value_parser = share)]
    score: f64,
    /// Share of calls that bring an intervention with `--vector`, 0 to 1: the server must allow it
    /// (its `overrides`)
    #[arg(long, default_value = "0", value_name = "SHARE", value_parser = share, requires = "vector")]
    steer: f64,
    /// A steering vector that the server has loaded, added where it was fitted
    #[arg(long, value_name = "NAME", requires = "steer")]
    vector: Option<String>,
    /// A call that takes longer has failed, with DEADLINE_EXCEEDED
    #[arg(long, default_value = "120", value_name = "SECONDS", value_parser = seconds)]
    deadline: Duration,
    /// Send prompts as they are, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// off, shadow or enforce [default: the server's]
    #[arg(long)]
    mode: Option<Mode>,
    /// Name of a policy that the server has loaded
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// A good answer begins within this time
    #[arg(long, default_value_t = 1000, value_name = "MILLISECONDS")]
    slo_first_token: u64,
    /// And its later tokens take this long at most, on average
    #[arg(long, default_value_t = 100, value_name = "MILLISECONDS")]
    slo_per_token: u64,
    /// What the file says was measured [default: what git says of the working directory]
    #[arg(long, value_name = "COMMIT")]
    commit: Option<String>,
    /// Where to write everything that was measured
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to draw the latencies by percentile
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate = text
        .parse()
        .ok()
        .filter(|rate| (0.01..=10_000.0).contains(rate));
    rate.ok_or_else(|| "must be a number from 0.01 to 10000".into())
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| (0.1..=86_400.0).contains(seconds));
    let seconds = seconds.ok_or("must be a number from 0.1 to 86400")?;
    Ok(Duration::from_secs_f64(seconds))
}

fn share(text: &str) -> std::result::Result<f64, String> {
    let share = text
        .parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".into())
}

pub(super) async fn run(args: Args) -> Result<Exit> {
    // Before minutes of work, not after.
    args.check()?;
    let json = args.json.as_deref().map(WholeFile::create).transpose()?;
    let svg = args.plot.as_deref().map(WholeFile::create).transpose()?;
    let connections = usize::from(args.connections);
    let client = LoadClient::connect(&args.url, connections, args.mode, args.policy.as_deref());
    let client = client
        .await
        .map_err(|error| Error::Unavailable(error.to_string()))?
        .without_template(args.raw)
        .with_vector(args.vector.as_deref());
    let caller = Patient {
        client,
        deadline: args.deadline,
    };

    let plan = args.options().plan();
    let mut progress = Progress::new("calls");
    let tick = |done, total| progress.tick(done, total);
    let ended = run_plan(plan, Arc::new(caller), tick).await?;
    drop(progress);

    let latencies = Latencies::of(&ended);
    let report = args.report(&ended, &latencies);
    print(&format!("{}\n", tables(&report)))?;
    if let Some(mut json) = json {
        json.row(&report)?;
        json.finish()?;
    }
    if let Some(mut svg) = svg {
        let title = format!("{} calls at {} per second", report.calls.made, args.rate);
        svg.bytes(plot::percentiles(&title, &latencies.named())?.as_bytes())?;
        svg.finish()?;
    }
    verdict(&report)
}

/// A server that answered somebody was measured; one that answered nobody was not.
fn verdict(report: &LoadReport) -> Result<Exit> {
    let calls = report.calls;
    let heard = calls.answered + calls.scored + calls.hung_up;
    if heard > 0 {
        return Ok(Exit::Done);
    }
    if calls.failed == 0 {
        return Err(Error::Unavailable(
            "no call was answered: the server refused them all".into(),
        ));
    }
    note("inwit: no call was answered; the codes are in the table");
    Ok(Exit::OtherStatus)
}

impl Args {
    fn check(&self) -> Result<()> {
        let calls = self.rate * self.duration.as_secs_f64();
        if calls > MOST_CALLS {
            return Err(Error::Config(format!(
                "--rate and --duration: together {calls:.0} calls; {MOST_CALLS} at most, so take less of one"
            )));
        }
        let longest = self.prompt_words.iter().copied().max().unwrap_or(0);
        let words = calls * f64::from(longest);
        if words > MOST_WORDS {
            return Err(Error::Config(format!(
                "--prompt-words: {calls:.0} calls of {longest} words at most would be {words:.0} words; \
                 {MOST_WORDS} at most, so take fewer calls or shorter prompts"
            )));
        }
        if self.score + self.steer > 1.0 {
            return Err(Error::Config(
                "--score and --steer: shares of the same calls, so together 1 at most".into(),
            ));
        }
        paths::each_once(&[
            ("--json", self.json.as_deref()),
            ("--plot", self.plot.as_deref()),
        ])
    }

    fn options(&self) -> LoadOptions {
        LoadOptions {
            rate: self.rate,
            duration: self.duration,
            seed: self.seed,
            prompt_words: self.prompt_words.clone(),
            answer_tokens: self.answer_tokens.clone(),
            cancel: self.cancel,
            score: self.score,
            steer: self.steer,
        }
    }

    fn report(&self, ended: &[Ended], latencies: &Latencies) -> LoadReport {
        let slo = Slo {
            first_token_ms: self.slo_first_token,
            per_token_ms: self.slo_per_token,
        };
        LoadReport {
            machine: machine(),
            commit: self.commit.clone().unwrap_or_else(commit),
            url: self.url.clone(),
            settings: LoadSettings {
                rate: self.rate,
                duration_seconds: self.duration.as_secs_f64(),
                seed: self.seed,
                connections: self.connections.into(),
                prompt_words: self.prompt_words.clone(),
                answer_tokens: self.answer_tokens.clone(),
                cancel: self.cancel,
                score: self.score,
                steer: self.steer,
                vector: self.vector.clone(),
                deadline_seconds: self.deadline.as_secs_f64(),
                raw: self.raw,
                mode: self.mode.map(|mode| mode.to_string()),
                policy: self.policy.clone(),
            },
            calls: Calls::of(ended),
            codes: codes(ended),
            rows: latencies.rows(),
            goodput: Goodput::of(ended, slo),
            tokens_per_second: tokens_per_second(ended),
            elapsed_seconds: elapsed(ended).as_secs_f64(),
        }
    }
}

/// Calls that each end within a time, whatever the server does.
struct Patient {
    client: LoadClient,
    deadline: Duration,
}

impl Caller for Patient {
    async fn call(&self, planned: &Planned, clock: Clock) -> (Vec<(Duration, u32)>, End) {
        let mut deliveries = Vec::new();
        let call = async {
            match planned.work {
                PlannedWork::Score => {
                    let scored = self.client.score(&planned.prompt).await;
                    scored.map(|()| End::Scored)
                }
                PlannedWork::Answer {
                    max_tokens,
                    hang_up_after,
                    steered,
                } => {
                    let prompt = &planned.prompt;
                    match self.client.answer(prompt, max_tokens, steered).await {
                        Ok(answer) => read(answer, hang_up_after, clock, &mut deliveries).await,
                        Err(code) => Err(code),
                    }
                }
            }
        };
        let end = tokio::time::timeout(self.deadline, call).await;
        let end = end.unwrap_or(Err("DEADLINE_EXCEEDED"));
        let end = end.unwrap_or_else(|code| End::Failed(code.to_owned()));
        (deliveries, end)
    }
}

/// Reads an answer to its end, or until it is time to hang up.
async fn read(
    mut answer: Deliveries,
    hang_up_after: Option<u32>,
    clock: Clock,
    deliveries: &mut Vec<(Duration, u32)>,
) -> std::result::Result<End, &'static str> {
    let mut came = 0;
    while let Some(tokens) = answer.next().await? {
        deliveries.push((clock.now(), tokens));
        came += tokens;
        if hang_up_after.is_some_and(|after| came >= after) {
            return Ok(End::HungUp);
        }
    }
    Ok(End::Answered)
}

fn tables(report: &LoadReport) -> String {
    let calls = report.calls;
    let codes: Vec<_> = report
        .codes
        .iter()
        .map(|(code, n)| format!("{code} {n}"))
        .collect();
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["ms", "count", "mean", "p50", "p90", "p99", "p99.9", "max"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in &report.rows {
        let times = [
            row.mean_ms,
            row.p50_ms,
            row.p90_ms,
            row.p99_ms,
            row.p999_ms,
            row.max_ms,
        ];
        let mut cells = vec![row.name.replace('_', " "), row.count.to_string()];
        cells.extend(times.iter().map(|time| match row.count {
            0 => "-".to_owned(),
            _ => format!("{time:.1}"),
        }));
        table.add_row(cells);
    }
    let goodput = &report.goodput;
    let good = match goodput.share {
        None => "no answer was to be read to its end".to_owned(),
        Some(share) => format!(
            "{} of {} answers within {} ms to the first token and {} ms per token ({:.1} %, {:.2} \
             per second)",
            goodput.good,
            goodput.asked,
            goodput.slo.first_token_ms,
            goodput.slo.per_token_ms,
            share * 100.0,
            goodput.good_per_second,
        ),
    };
    format!(
        "{}\n{} calls in {:.1} s: {} answered, {} scored, {} hung up on, {} rejected, {} failed ({})\n\
         \n{table}\n\n{:.1} tokens/s; {good}",
        report.machine,
        calls.made,
        report.elapsed_seconds,
        calls.answered,
        calls.scored,
        calls.hung_up,
        calls.rejected,
        calls.failed,
        codes.join(", "),
        report.tokens_per_second,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn checked(flags: &[&str]) -> Result<()> {
        let line = [&["load"], flags].concat();
        Line::parse_from(line).args.check()
    }

    #[test]
    fn a_plan_beyond_memory_and_one_file_for_two_outputs_are_refused() {
        assert!(checked(&["--rate", "100", "--duration", "10000"]).is_ok());
        let told = checked(&["--rate", "10000", "--duration", "86400"]);
        assert!(told.is_err_and(|error| error.to_string().contains("--rate and --duration")));
        let told = checked(&[
            "--rate",
            "100",
            "--duration",
            "9000",
            "--prompt-words",
            "65535",
        ]);
        assert!(told.is_err_and(|error| error.to_string().contains("--prompt-words")));
        let halves = |steer| checked(&["--score", "0.5", "--steer", steer, "--vector", "v"]);
        assert!(halves("0.5").is_ok());
        assert!(halves("0.6").is_err_and(|error| error.to_string().contains("--steer")));
        assert!(Line::try_parse_from(["load", "--steer", "0.1"]).is_err());
        assert!(Line::try_parse_from(["load", "--vector", "v"]).is_err());
        assert!(checked(&["--json", "a", "--plot", "b"]).is_ok());
        let told = checked(&["--json", "a", "--plot", "a"]);
        assert!(told.is_err_and(|error| error.to_string().contains("--json and --plot")));
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_range() {
        assert_eq!(rate("2.5"), Ok(2.5));
        for text in ["0", "-1", "nan", "inf", "x"] {
            assert!(
                rate(text).is_err_and(|error| error.contains("0.01")),
                "{text}"
            );
        }
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        assert!(seconds("1e9").is_err());
        assert_eq!(share("1"), Ok(1.0));
        assert!(share("1.1").is_err() && share("NaN").is_err());
    }
}
