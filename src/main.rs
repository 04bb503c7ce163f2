//! Arguments to a command, its end to an exit code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use inwit::cli::{Cli, exit_code, log_filter, run};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter =
        EnvFilter::try_from_env("INWIT_LOG").unwrap_or_else(|_| EnvFilter::new(log_filter(&cli)));
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

/// The settings say how log lines look; where they are wrong the command itself says so.
fn json_log(cli: &Cli) -> bool {
    cli.settings()
        .is_some_and(|config| config.log_format == inwit::config::LogFormat::Json)
}
