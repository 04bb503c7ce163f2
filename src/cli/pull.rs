//! `inwit pull`: fetches a model and says where it lies.

use std::io::Write;

use crate::error::{Error, Result};
use crate::model::pull;

#[derive(Debug, clap::Args)]
pub struct PullArgs {
    /// A known name, a Hugging Face repository (organisation/name), a GGUF file or a folder
    #[arg(default_value = pull::DEFAULT_MODEL)]
    pub model: String,
}

/// Prints the model's path to standard output.
pub fn run(args: PullArgs) -> Result<()> {
    let path = pull::resolve(&args.model, pull::progress().as_ref())?;
    writeln!(std::io::stdout(), "{}", path.display()).map_err(Error::internal)
}
