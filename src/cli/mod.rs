//! The commands of `inwit`: one file each, arguments in, library calls out.
//! Knows the terminal and exit codes; the work is done elsewhere.

mod bench;
mod bench_grpc;
mod capture;
mod chat;
mod collect;
mod curve;
mod demo;
mod eval;
mod generate;
mod judges;
mod lab;
mod label;
mod load;
mod open;
mod paths;
mod probe;
mod progress;
mod pull;
mod recipe;
mod score;
mod serve;
pub mod server;
mod study;
mod sweep;
mod terminal;
mod threshold;

use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::Config;
use crate::error::{Error, Result};
pub use open::{Opened, open};

/// An inference server that watches its own activations while it generates, and acts on what it sees.
#[derive(Debug, Parser)]
#[command(name = "inwit", version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    done; the chat was answered
  1    failed; the demo did not go as it should
  2    wrong arguments, settings or files
  3    the chat was refused by the policy
  4    no connection, or the server is not available
  5    the server answered with another error
  130  interrupted";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over gRPC, every forward pass watched
    Serve(Box<serve::Args>),
    /// Ask a running server and print the answer as it comes
    Chat(chat::Args),
    /// Answer a file of prompts offline
    Generate(generate::Args),
    /// Score a file of prompts, with their answers where given, without generating
    Score(score::Args),
    /// Write hidden states of a file of prompts to a tensor file
    Capture(capture::Args),
    /// Fit a probe, compare sites, set thresholds, or show a probe
    #[command(subcommand)]
    Probe(probe::Command),
    /// Collect hidden states, label answers, fit refusal heads and steering vectors, and measure
    /// what a number format costs
    #[command(subcommand)]
    Lab(lab::Command),
    /// Measure probes and policies on labelled sets, beside what they must beat
    #[command(subcommand)]
    Eval(eval::Command),
    /// Measure the engine in this process, and what monitoring adds to a step
    Bench(Box<bench::Args>),
    /// Load a running server at a constant rate and measure what its callers see
    Load(load::Args),
    /// Fetch a known model
    Pull(pull::Args),
    /// Fetch the default model and watch it answer, steer and refuse
    Demo(demo::Args),
}

impl Cli {
    /// What `serve` would run with; `None` for other commands and for settings that are wrong.
    pub fn settings(&self) -> Option<Config> {
        match &self.command {
            Command::Serve(args) => args.settings().ok(),
            _ => None,
        }
    }
}

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    Failed,
    Refused,
    OtherStatus,
}

impl Exit {
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Refused => 3,
            Self::OtherStatus => 5,
        }
    }
}

/// The exit code of a command that failed, by who must act.
pub fn exit_code(error: &Error) -> u8 {
    match error {
        Error::InvalidRequest { .. }
        | Error::ContextLength { .. }
        | Error::NotFound { .. }
        | Error::Unsupported { .. }
        | Error::Config(_)
        | Error::File { .. } => 2,
        Error::AbortedByPolicy => 3,
        Error::Unavailable(_) | Error::Overloaded { .. } => 4,
        Error::Cancelled => 130,
        Error::AlreadyExists(_)
        | Error::DeadlineExceeded { .. }
        | Error::MonitorFailed { .. }
        | Error::FailedPrecondition { .. }
        | Error::Internal(_) => 1,
    }
}

/// Runs the command to its end.
pub fn run(cli: Cli) -> Result<Exit> {
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Chat(args) => wait(chat::run(args)),
        Command::Generate(args) => wait(generate::run(args)),
        Command::Score(args) => wait(score::run(args)),
        Command::Capture(args) => wait(capture::run(args)),
        Command::Probe(command) => probe::run(command),
        Command::Lab(command) => wait(lab::run(command)),
        Command::Eval(command) => wait(eval::run(command)),
        Command::Bench(args) => wait(bench::run(*args)),
        Command::Load(args) => wait(load::run(args)),
        Command::Pull(args) => wait(pull::run(args)),
        Command::Demo(args) => wait(demo::run(args)),
    }
}

/// What is logged unless INWIT_LOG says otherwise: commands whose output is for people log less.
pub fn log_filter(cli: &Cli) -> &'static str {
    match cli.command {
        Command::Probe(probe::Command::Show { .. }) => "warn",
        Command::Serve(_) | Command::Pull(_) | Command::Probe(_) => "info",
        Command::Generate(_) | Command::Score(_) | Command::Capture(_) | Command::Lab(_) => "info",
        Command::Eval(_) => "info",
        Command::Demo(_) => "error",
        _ => "warn",
    }
}

/// Runs a command until it ends or Ctrl-C is pressed; what it holds is dropped either way, so
/// requests are cancelled and half-written files go.
fn wait(command: impl Future<Output = Result<Exit>>) -> Result<Exit> {
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = command => ended,
            _ = tokio::signal::ctrl_c() => Err(Error::Cancelled),
        }
    });
    leave(runtime);
    ended
}

/// Ends what still runs on threads of its own: a model that is loaded or fetched must not hold an
/// exit that was asked for.
fn leave(runtime: tokio::runtime::Runtime) {
    /// For a fetch to notice and to clear away what it has.
    const CLEARING_AWAY: Duration = Duration::from_millis(500);
    crate::model::pull::abandon();
    runtime.shutdown_timeout(CLEARING_AWAY);
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("cannot start threads: {error}")))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn check_parses(line: &str) {
        let parsed = Cli::try_parse_from(line.split_whitespace());
        assert!(parsed.is_ok(), "{line}: {}", parsed.expect_err("an error"));
    }

    fn check_refused(line: &str, expected: &str) {
        let error = Cli::try_parse_from(line.split_whitespace()).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(expected), "{line}: {error}");
    }

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_commands_of_the_manual_parse() {
        check_parses("inwit serve --model m.gguf --listen 127.0.0.1:0 --mode enforce");
        check_parses("inwit serve --print-config");
        check_parses("inwit chat hello --temperature 0.5 --seed 1 --scores --mode shadow");
        check_parses("inwit chat hello --steer vector=refusal,strength=4");
        check_parses("inwit generate --data a.jsonl --out b.jsonl --mode off --max-tokens 9");
        check_parses("inwit score --data a.jsonl --out b.jsonl --per-token");
        check_parses(
            "inwit capture --data a.jsonl --site blocks.16.hook_resid_post --site hook_embed \
             --positions last --out a.safetensors",
        );
        check_parses(
            "inwit probe fit --data a.jsonl --site blocks.16.hook_resid_post \
             --positions generated:3 --gather last --name compliance --out p.safetensors",
        );
        check_parses(
            "inwit probe fit --data a.jsonl --site blocks.2.hook_resid_post --site hook_embed \
             --kind two_layer --hidden 32 --epochs 5 --batch 4 --learning-rate 1e-3 \
             --weight-decay 0 --class-weight 2:1 --calibration isotonic --name p --out p.safetensors",
        );
        check_parses(
            "inwit probe sweep --data a.jsonl --dev b.jsonl c.jsonl --sites all-resid_post,hook_embed \
             --kind lda --shrinkage 0.2 --states s t --out sweep",
        );
        check_parses(
            "inwit probe curve --data a.jsonl --dev b.jsonl --site hook_embed --shares 0.5,1 \
             --kind attention --positions prompt_content --out curve",
        );
        check_parses(
            "inwit probe threshold p.safetensors --target-fpr 0.01 --data b.jsonl --gather max \
             --out q.safetensors",
        );
        check_parses(
            "inwit probe threshold p.safetensors --target-fpr 0.01 --data b.jsonl --in-place",
        );
        check_parses("inwit probe show p.safetensors");
        check_parses(
            "inwit lab refusal-head --harmful a.jsonl --refusals b.jsonl --rank 8 --out h.safetensors",
        );
        check_parses(
            "inwit lab vector --harmful a.jsonl --benign b.jsonl \
             --site blocks.16.hook_resid_post --out v.safetensors",
        );
        check_parses(
            "inwit lab vector --harmful a.jsonl --benign b.jsonl --null-space-energy 0.99 \
             --site blocks.16.hook_resid_post --out v.safetensors",
        );
        check_parses(
            "inwit lab collect --data a.jsonl --site hook_embed --site ln_final.hook_normalized \
             --positions last --positions generated:3 --dtype bf16 --out states",
        );
        check_parses("inwit lab label --data a.jsonl --out b.jsonl --judge rules --judge m.gguf");
        check_parses("inwit lab label --hand-labelled s.jsonl --judge rules");
        check_parses("inwit demo");
        check_parses(
            "inwit eval probe prompt_harm --data a.jsonl b.jsonl --train t.jsonl --gather attention \
             --json r.json --report r.html --log docs/evaluations.md",
        );
        check_parses(
            "inwit eval policy default --data a.jsonl --temperature 0.7 --seeds 5 --max-tokens 64 \
             --judge m.gguf --report r.html",
        );
    }

    #[test]
    fn wrong_arguments_are_refused_with_what_helps() {
        check_refused("inwit generate --data a.jsonl", "--out");
        check_refused(
            "inwit capture --data a --out b --site layers.7 --positions last",
            "layers.7",
        );
        check_refused("inwit capture --data a --out b --positions last", "--site");
        check_refused("inwit chat hello --steer strength=4", "vector=");
        check_refused("inwit chat hello --steer vector=a,power=4", "power");
        check_refused(
            "inwit chat hello --steer vector=a,strength=much",
            "strength",
        );
        check_refused("inwit chat hello --mode loud", "loud");
        check_refused(
            "inwit probe fit --data a --site hook_embed --name p --out o --positions generated:0",
            "generated:3",
        );
        check_refused(
            "inwit probe fit --data a --site hook_embed --name p --out o --class-weight heavy",
            "balanced",
        );
        check_refused(
            "inwit probe sweep --data a --out o --sites all-embed",
            "all-resid_post",
        );
        check_refused(
            "inwit probe threshold p --target-fpr 0.01 --data b --out q --in-place",
            "--in-place",
        );
        check_refused("inwit lab label --data a.jsonl", "--out");
        check_refused("inwit lab label --judge rules", "--hand-labelled");
        check_refused(
            "inwit lab collect --data a --site hook_embed --out b",
            "--positions",
        );
        check_refused("inwit fly", "fly");
    }

    #[test]
    fn commands_that_take_long_say_how_far_they_are() {
        let level = |line: &str| {
            let cli = Cli::try_parse_from(line.split_whitespace()).expect(line);
            log_filter(&cli)
        };
        let fit = "inwit probe fit --data a --site hook_embed --name p --out o";
        assert_eq!([level("inwit pull"), level(fit)], ["info", "info"]);
        assert_eq!(level("inwit probe show p.safetensors"), "warn");
    }

    #[test]
    fn an_exit_code_says_who_must_act() {
        assert_eq!(exit_code(&Error::Config("no".into())), 2);
        assert_eq!(exit_code(&Error::AbortedByPolicy), 3);
        assert_eq!(exit_code(&Error::Unavailable("gone".into())), 4);
        assert_eq!(exit_code(&Error::Cancelled), 130);
        assert_eq!(exit_code(&Error::internal("broken")), 1);
        assert_eq!([Exit::Done, Exit::Refused].map(Exit::code), [0, 3]);
    }
}
