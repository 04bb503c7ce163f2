//! `inwit serve`: the server, until a signal.

use tokio::signal::unix::{SignalKind, signal};

use super::server::{Running, start};
use super::terminal::{note, print};
use super::{Exit, leave, runtime};
use crate::config::{Config, Flags};
use crate::error::{Error, Result};
use crate::registry::{Canaries, Standing};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    flags: Flags,
}

impl Args {
    pub(super) fn settings(&self) -> Result<Config> {
        Config::load(&self.flags)
    }
}

pub(super) fn run(args: &Args) -> Result<Exit> {
    let config = args.settings()?;
    if args.flags.print_config {
        print(&config.to_toml())?;
        return Ok(Exit::Done);
    }
    if args.flags.check_config {
        note("the settings are fine");
        return Ok(Exit::Done);
    }
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let running = tokio::select! {
            running = start(&config) => running?,
            // Nothing runs yet that could be finished.
            () = signals.next() => return Ok(Exit::Done),
        };
        describe(&config, &running);
        running
            .until(async move {
                signals.next().await;
                tracing::info!(grace = ?config.drain_grace, "draining; a second signal exits at once");
                tokio::spawn(async move {
                    signals.next().await;
                    std::process::exit(130);
                });
            })
            .await?;
        tracing::info!("stopped");
        Ok(Exit::Done)
    });
    leave(runtime);
    ended
}

/// SIGTERM and Ctrl-C.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| {
            signal(kind).map_err(|error| Error::internal(format!("cannot hear signals: {error}")))
        };
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What runs, once, so that an operator sees at a glance what watches and what does not.
fn describe(config: &Config, running: &Running) {
    let info = running.engine.info();
    let snapshot = running.registry.snapshot();
    tracing::info!(
        model = info.name,
        architecture_id = info.identity.architecture_id,
        weights_id = info.identity.weights_id,
        weights = info.weight_format,
        kv = info.kv_type,
        kernels = info.kernel_identity,
        context = info.context_length,
        "model"
    );
    for probe in &snapshot.probes {
        let sites: Vec<_> = probe
            .probe
            .heads()
            .iter()
            .map(|head| head.site.to_string())
            .collect();
        let (name, sites, standing) = (&*probe.name, sites.join(", "), standing(&probe.standing));
        match &probe.standing {
            Standing::Unverified {
                canaries: Canaries::Failed(why),
            } => {
                tracing::warn!(probe = name, sites, standing, why, "probe");
            }
            _ => tracing::info!(probe = name, sites, standing, "probe"),
        }
    }
    if !running.watched {
        tracing::warn!(
            "no probe in the library fits this model: the empty policy serves, nothing is watched"
        );
    }
    if let Ok(policy) = snapshot.policy(None) {
        tracing::info!(
            policy = policy.name,
            revision = policy.revision,
            rules = policy.rules.len(),
            mode = %config.mode,
            snapshot = snapshot.hash,
            "policy"
        );
    }
    if !running.address.ip().is_loopback() {
        tracing::warn!("reachable from other machines, without keys or encryption");
    }
    let http = running.http_address.map(|address| address.to_string());
    tracing::info!(
        grpc = %running.address,
        http = http.as_deref().unwrap_or("off"),
        "ready"
    );
}

fn standing(standing: &Standing) -> &'static str {
    match standing {
        Standing::Native => "native",
        Standing::Unverified {
            canaries: Canaries::Passed,
        } => "unverified, canaries passed",
        Standing::Unverified {
            canaries: Canaries::NotRun,
        } => "unverified, canaries not run",
        Standing::Unverified {
            canaries: Canaries::Failed(_),
        } => "unverified, canaries failed",
    }
}
