//! Where the artefacts of a model lie: `<library>/<model>/{probes,vectors,heads,policies}/`.
//! Lists files; does not open them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::manifest::check_name;

pub const PROBES: &str = "probes";
pub const VECTORS: &str = "vectors";
pub const HEADS: &str = "heads";
pub const POLICIES: &str = "policies";
const TENSORS: &str = "safetensors";
const TOML: &str = "toml";
/// More files than this in one folder are a mistake, not a library.
const MAX_FILES: usize = 1_024;

/// The files of one model, each list in the order of the names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Library {
    pub probes: Vec<PathBuf>,
    pub vectors: Vec<PathBuf>,
    pub heads: Vec<PathBuf>,
    pub policies: Vec<PathBuf>,
}

impl Library {
    /// Lists `<library>/<model>`. A model without a folder has an empty library; a file whose name
    /// is not `name.safetensors` or `name.toml` is an error, except hidden ones.
    pub fn read(library: impl AsRef<Path>, model: &str) -> Result<Self> {
        check_name("model", model)?;
        let folder = library.as_ref().join(model);
        Ok(Self {
            probes: listed(&folder.join(PROBES), TENSORS)?,
            vectors: listed(&folder.join(VECTORS), TENSORS)?,
            heads: listed(&folder.join(HEADS), TENSORS)?,
            policies: listed(&folder.join(POLICIES), TOML)?,
        })
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn listed(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(folder, &e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, &e))?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        // Editors and half-finished writes leave such files; a README explains.
        if name.starts_with('.') || name.ends_with(".partial") || name.ends_with(".md") {
            continue;
        }
        let stem = name
            .strip_suffix(extension)
            .and_then(|stem| stem.strip_suffix('.'));
        let stem = stem.ok_or_else(|| {
            Error::invalid(
                "file",
                format!("is not a .{extension} file; move it elsewhere"),
            )
            .in_file(&path)
        })?;
        check_name("file", stem).map_err(|e| e.in_file(&path))?;
        files.push(path);
        if files.len() > MAX_FILES {
            return Err(
                Error::invalid("folder", format!("holds more than {MAX_FILES} files"))
                    .in_file(folder),
            );
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_listed_by_kind_and_in_order() {
        let root = tempfile::tempdir().unwrap();
        let model = root.path().join("smollm2-135m");
        for (folder, name) in [
            (PROBES, "b.safetensors"),
            (PROBES, "a.safetensors"),
            (PROBES, ".hidden"),
            (PROBES, "README.md"),
            (PROBES, "a.safetensors.77.partial"),
            (POLICIES, "default.toml"),
        ] {
            fs::create_dir_all(model.join(folder)).unwrap();
            fs::write(model.join(folder).join(name), b"").unwrap();
        }
        let library = Library::read(root.path(), "smollm2-135m").unwrap();
        let probes = model.join(PROBES);
        assert_eq!(
            library.probes,
            [probes.join("a.safetensors"), probes.join("b.safetensors")]
        );
        assert_eq!(
            library.policies,
            [model.join(POLICIES).join("default.toml")]
        );
        assert!(library.vectors.is_empty() && library.heads.is_empty());
    }

    #[test]
    fn a_model_without_a_folder_has_an_empty_library() {
        let root = tempfile::tempdir().unwrap();
        assert!(Library::read(root.path(), "qwen3-0.6b").unwrap().is_empty());
    }

    #[test]
    fn a_model_name_cannot_leave_the_library() {
        let root = tempfile::tempdir().unwrap();
        for name in ["../../x", "/etc", "a/b", "", "..", "a\0b"] {
            assert!(Library::read(root.path(), name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        let root = tempfile::tempdir().unwrap();
        let probes = root.path().join("m").join(PROBES);
        fs::create_dir_all(&probes).unwrap();
        fs::write(probes.join("probe.pickle"), b"").unwrap();
        let message = Library::read(root.path(), "m").unwrap_err().to_string();
        assert!(
            message.contains("probe.pickle") && message.contains(".safetensors"),
            "{message}"
        );
    }
}
