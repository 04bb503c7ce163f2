//! The library that is built into the binary. Knows where it lies in the sources, not what is in it.

use include_dir::{Dir, include_dir};

use super::load::{LibraryFile, fits};
use super::snapshot::ModelIds;
use crate::error::Result;

static LIBRARY: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/probes/library");

/// The files that were fitted on this model's architecture; none when nothing was.
pub(super) fn library_for(model: &ModelIds) -> Result<Option<Vec<LibraryFile>>> {
    for dir in LIBRARY.dirs() {
        let files = files_of(dir)?;
        if fits(&files, model)? {
            return Ok(Some(files));
        }
    }
    Ok(None)
}

fn files_of(model: &Dir<'static>) -> Result<Vec<LibraryFile>> {
    let mut files = Vec::new();
    for folder in model.dirs() {
        for file in folder.files() {
            let path = file.path().display().to_string();
            let inside = file.path().strip_prefix(model.path());
            let inside = inside.map_or_else(|_| path.clone(), |p| p.display().to_string());
            files.extend(LibraryFile::new(
                format!("shipped:{path}"),
                &inside,
                || Ok(file.contents().to_vec()),
            )?);
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_ships_is_readable() {
        for dir in LIBRARY.dirs() {
            let files = files_of(dir).unwrap();
            assert!(!files.is_empty(), "{} is empty", dir.path().display());
            let mine = ModelIds {
                architecture_id: "of no model".into(),
                weights_id: String::new(),
                d_model: 1,
                n_layers: 1,
                vocab: 1,
            };
            assert!(!fits(&files, &mine).unwrap());
        }
    }
}
