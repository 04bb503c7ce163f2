//! Arguments to a command, its end to an exit code.

use std::env::VarError;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use inwit::cli::{Cli, exit_code, log_filter, run};
use tracing_subscriber::EnvFilter;

/// With the system's allocator whatever monitoring holds moves where the next buffers of a pass lie,
/// and with it how fast the pass is.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match filter(&cli) {
        Ok(filter) => filter,
        Err(message) => {
            eprintln!("inwit: {message}");
            return ExitCode::from(2);
        }
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(std::io::stderr);
    if json_log(&cli) {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
    match run(cli) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => {
            eprintln!("inwit: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn filter(cli: &Cli) -> Result<EnvFilter, String> {
    const VARIABLE: &str = "INWIT_LOG";
    let text = match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => text,
        Ok(_) | Err(VarError::NotPresent) => return Ok(EnvFilter::new(log_filter(cli))),
        Err(VarError::NotUnicode(_)) => {
            return Err(format!("the variable {VARIABLE} is not UTF-8"));
        }
    };
    EnvFilter::try_new(&text).map_err(|error| {
        format!(
            "the variable {VARIABLE} is `{text}`: {error}; expected e.g. `info` or `inwit=debug`"
        )
    })
}

/// The settings say how log lines look; where they are wrong the command itself says so.
fn json_log(cli: &Cli) -> bool {
    cli.settings()
        .is_some_and(|config| config.log_format == inwit::config::LogFormat::Json)
}
