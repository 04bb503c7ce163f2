//! `inwit pull`: fetches a model and says where it lies.

use std::io::Write;
use std::path::PathBuf;

use super::Exit;
use crate::error::{Error, Result};
use crate::model::pull;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A known name, a Hugging Face repository (organisation/name), a GGUF file or a folder
    #[arg(default_value = pull::DEFAULT_MODEL)]
    pub model: String,
}

/// Prints the model's path to standard output.
pub(super) async fn run(args: Args) -> Result<Exit> {
    let path = tokio::task::spawn_blocking(move || fetch(&args.model))
        .await
        .map_err(|_| Error::internal("the model could not be fetched: a panic"))??;
    writeln!(std::io::stdout(), "{}", path.display()).map_err(Error::internal)?;
    Ok(Exit::Done)
}

/// The model's file or folder, fetched where it is a name.
pub(super) fn fetch(model: &str) -> Result<PathBuf> {
    pull::resolve(model, pull::progress().as_ref())
}
