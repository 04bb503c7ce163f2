//! The flags of what fits a probe several times and measures each: `probe sweep` and `curve`.

use std::path::{Path, PathBuf};

use inwit_probes::{Gather, Positions};
use serde::Serialize;

use super::open::ModelArgs;
use super::paths;
use super::probe::positions;
use super::recipe::RecipeArgs;
use crate::error::{Error, Result};
use crate::lab::bench::Bench;
use crate::lab::learn::Recipe;
use crate::lab::output::WholeFile;

#[derive(Debug, clap::Args)]
pub(super) struct StudyArgs {
    /// JSON lines with `label`, as `probe fit` takes them; a fifth of the groups is held out
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// Labelled files to measure every fit on and that no fit reads; several may be given
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub dev: Vec<PathBuf>,
    /// last, prompt_content, generated:K, generated:1..K or every_generated; all but the first two
    /// need `answer` in the data
    #[arg(long, value_parser = positions, default_value = "last")]
    pub positions: Positions,
    /// How token logits become the request's: last, max, mean, ema{0.2}, k_of_n{2,8},
    /// cumulative_log_odds or attention [default: last; mean for generated:1..K; or attention]
    #[arg(long, value_name = "GATHER")]
    gather: Option<Gather>,
    /// Folder for the numbers as JSON and the plot as SVG, named like the command; it is made if
    /// need be
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Folders of `lab collect`: where one holds the states of a file given here, they are read
    /// instead of running the model; several may be given
    #[arg(long, value_name = "FOLDER", num_args = 1..)]
    states: Vec<PathBuf>,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// What is there before any work begins.
pub(super) struct Opened {
    pub bench: Bench,
    json: WholeFile,
    svg: WholeFile,
    /// After the files, since it is dropped after them.
    _out: OutFolder,
}

impl Opened {
    /// Both files, whole.
    pub(super) fn write(mut self, numbers: &impl Serialize, picture: &str) -> Result<()> {
        self.json.row(numbers)?;
        self.svg.bytes(picture.as_bytes())?;
        self.json.finish()?;
        self.svg.finish()
    }
}

/// The folders that were made here, the innermost first; they go again where nothing came to lie in
/// them.
struct OutFolder(Vec<PathBuf>);

impl OutFolder {
    fn make(path: &Path) -> Result<Self> {
        let missing = path.ancestors().take_while(|folder| {
            // The last ancestor of a relative path has no name.
            !folder.as_os_str().is_empty() && !folder.exists()
        });
        let missing = missing.map(Path::to_owned).collect();
        std::fs::create_dir_all(path)
            .map_err(|error| Error::file(path.display(), format!("cannot be made: {error}")))?;
        Ok(Self(missing))
    }
}

impl Drop for OutFolder {
    fn drop(&mut self) {
        // Refused for a folder that holds something, and then for those around it.
        for folder in &self.0 {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

impl StudyArgs {
    /// An engine, and the two files, `name` with their extensions.
    pub(super) async fn open(&self, name: &str) -> Result<Opened> {
        let out = &self.out;
        let folder = OutFolder::make(out)?;
        let mut data: Vec<&Path> = vec![&self.data];
        data.extend(self.dev.iter().map(PathBuf::as_path));
        let json = paths::open(&out.join(name).with_extension("json"), &data)?;
        let svg = paths::open(&out.join(name).with_extension("svg"), &data)?;
        let mut bench = self.model.bench(Some("off"), Some("off")).await?;
        bench.use_states(&self.states, &data)?;
        Ok(Opened {
            bench,
            json,
            svg,
            _out: folder,
        })
    }

    pub(super) fn recipe(&self) -> Recipe {
        let gathers = self.gather.into_iter().collect();
        let (recipe, _) = self.recipe.recipe(gathers, self.positions);
        recipe
    }
}
