//! From named files to a snapshot: each read, checked against the model, and counted once.
//! Trusts no file; knows a library as a list of named bytes, wherever they come from.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use inwit_probes::library::{HEADS, POLICIES, PROBES, VECTORS};
use inwit_probes::manifest::check_name;
use inwit_probes::{MAX_FILE_BYTES, ModelIdentity, Probe, RefusalHead, SteeringVector};

use super::snapshot::{EMPTY_POLICY, Head, LoadedProbe, ModelIds, Snapshot, Vector, listed};
use crate::error::{Error, Result};
use crate::policy::{MAX_DOCUMENT_BYTES, Policy};

/// More files than this are a mistake, not a library.
const MAX_FILES: usize = 4_096;
const DEFAULT_POLICY: &str = "default";

/// A file of one model's library.
#[derive(Clone, PartialEq, Eq)]
pub struct LibraryFile {
    /// As errors name it.
    pub path: String,
    pub bytes: Vec<u8>,
    kind: Kind,
    /// The file's name without its extension.
    stem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Probe,
    Vector,
    Head,
    Policy,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Probe, Self::Vector, Self::Head, Self::Policy];

    fn folder(self) -> &'static str {
        match self {
            Self::Probe => PROBES,
            Self::Vector => VECTORS,
            Self::Head => HEADS,
            Self::Policy => POLICIES,
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Self::Policy => "toml",
            Self::Probe | Self::Vector | Self::Head => "safetensors",
        }
    }

    fn most_bytes(self) -> u64 {
        match self {
            Self::Policy => MAX_DOCUMENT_BYTES as u64,
            Self::Probe | Self::Vector | Self::Head => MAX_FILE_BYTES,
        }
    }
}

impl LibraryFile {
    /// `inside` is the path within the model's folder, e.g. `probes/prompt_harm.safetensors`; it
    /// says what kind of file this is. None for files that are no part of a library (hidden,
    /// half-written and explaining ones); their bytes are not read.
    pub fn new(
        path: String,
        inside: &str,
        bytes: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Option<Self>> {
        let (folder, name) = inside.split_once('/').unwrap_or(("", inside));
        if name.starts_with('.') || name.ends_with(".partial") || name.ends_with(".md") {
            return Ok(None);
        }
        let kind = Kind::ALL.into_iter().find(|kind| kind.folder() == folder);
        let Some(kind) = kind else {
            let folders = Kind::ALL.map(Kind::folder).join(", ");
            let message = format!("is in none of the folders {folders}; move it");
            return Err(Error::file(path, message));
        };
        let stem = name
            .strip_suffix(kind.extension())
            .and_then(|stem| stem.strip_suffix('.'));
        let Some(stem) = stem else {
            let message = format!("is not a .{} file; move it elsewhere", kind.extension());
            return Err(Error::file(path, message));
        };
        check_name("file name", stem).map_err(|e| Error::file(&path, e))?;
        Ok(Some(Self {
            stem: stem.to_owned(),
            bytes: bytes()?,
            kind,
            path,
        }))
    }

    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::file(&self.path, message)
    }
}

/// One model's folder within `root`: the first whose artefacts were made for this architecture,
/// or `root` itself where it is such a folder. None when there is none.
///
/// An artefact that cannot be read is an error wherever it lies: it might be the one for this
/// model, and a server must not quietly go without.
pub fn library_for(model: &ModelIds, root: &Path) -> Result<Option<PathBuf>> {
    let is_library = |dir: &Path| {
        Kind::ALL
            .iter()
            .any(|kind| dir.join(kind.folder()).is_dir())
    };
    let mut candidates = vec![root.to_owned()];
    if !is_library(root) {
        candidates = entries(root)?
            .into_iter()
            .filter(|path| path.is_dir())
            .collect();
    }
    for dir in candidates {
        if fits(&read_folder(&dir)?, model)? {
            return Ok(Some(dir));
        }
    }
    Ok(None)
}

/// Whether any artefact was made for this architecture and width.
pub(super) fn fits(files: &[LibraryFile], model: &ModelIds) -> Result<bool> {
    for file in files {
        let (identity, d_model) = match file.kind {
            Kind::Probe => of(read_probe(file)?.manifest(), |m| (&m.model, m.d_model)),
            Kind::Vector => of(read_vector(file)?.manifest(), |m| (&m.model, m.d_model)),
            Kind::Head => of(read_head(file)?.manifest(), |m| (&m.model, m.d_model)),
            Kind::Policy => continue,
        };
        if identity.architecture_id == model.architecture_id && d_model == model.d_model {
            return Ok(true);
        }
    }
    Ok(false)
}

fn of<M>(manifest: &M, part: impl Fn(&M) -> (&ModelIdentity, usize)) -> (ModelIdentity, usize) {
    let (identity, d_model) = part(manifest);
    (identity.clone(), d_model)
}

/// The files of one model's folder, in the order of their paths. A missing folder is an error, a
/// missing part of it is not.
pub(super) fn read_folder(dir: &Path) -> Result<Vec<LibraryFile>> {
    if !dir.is_dir() {
        return Err(Error::file(
            dir.display(),
            "is not a folder; name a library's folder",
        ));
    }
    let mut files = Vec::new();
    for kind in Kind::ALL {
        let folder = dir.join(kind.folder());
        if !folder.exists() {
            continue;
        }
        for path in entries(&folder)? {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let inside = format!("{}/{name}", kind.folder());
            let bytes = || read_capped(&path, kind.most_bytes());
            files.extend(LibraryFile::new(
                path.display().to_string(),
                &inside,
                bytes,
            )?);
        }
    }
    Ok(files)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e: std::io::Error| Error::file(folder.display(), e);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        paths.push(entry.map_err(unreadable)?.path());
        if paths.len() > MAX_FILES {
            let message = format!("holds more than {MAX_FILES} files; move the others away");
            return Err(Error::file(folder.display(), message));
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file may grow while it is read, so its size is capped by the reading.
fn read_capped(path: &Path, most: u64) -> Result<Vec<u8>> {
    let unreadable = |e: std::io::Error| {
        let remedy = match e.kind() {
            ErrorKind::PermissionDenied => "; let the server read it",
            _ => "",
        };
        Error::file(path.display(), format!("{e}{remedy}"))
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    // Opening a pipe would wait for its writer.
    if !metadata.is_file() {
        return Err(Error::file(
            path.display(),
            "is not a plain file; move it elsewhere",
        ));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > most {
        let message = format!("is larger than {most} bytes; such a file is no part of a library");
        return Err(Error::file(path.display(), message));
    }
    Ok(bytes)
}

fn read_probe(file: &LibraryFile) -> Result<Probe> {
    Probe::from_bytes(&file.bytes).map_err(|e| file.error(e))
}

fn read_vector(file: &LibraryFile) -> Result<SteeringVector> {
    SteeringVector::from_bytes(&file.bytes).map_err(|e| file.error(e))
}

fn read_head(file: &LibraryFile) -> Result<RefusalHead> {
    RefusalHead::from_bytes(&file.bytes).map_err(|e| file.error(e))
}

impl Snapshot {
    /// Reads and checks every file against the model, then compiles the policies.
    /// `default_policy` unset: the policy named `default`, or the only one there is.
    pub fn from_files(
        files: &[LibraryFile],
        model: &ModelIds,
        default_policy: Option<&str>,
    ) -> Result<Self> {
        let mut snapshot = Self::empty();
        let mut names = Names::default();
        for file in files {
            snapshot.add_artefact(file, model, &mut names)?;
        }
        snapshot.probes.sort_by(|a, b| a.name.cmp(&b.name));
        snapshot.add_policies(files, model, &mut names)?;
        snapshot.default_policy = snapshot.choose_default(default_policy)?;
        snapshot.hash = snapshot.content_hash();
        Ok(snapshot)
    }

    fn add_artefact<'f>(
        &mut self,
        file: &'f LibraryFile,
        model: &ModelIds,
        names: &mut Names<'f>,
    ) -> Result<()> {
        let ids = (model.architecture_id.as_str(), model.weights_id.as_str());
        let wrong = |e: inwit_probes::Error| file.error(e);
        match file.kind {
            Kind::Probe => {
                let probe = read_probe(file)?;
                let verification = probe.identity_against(ids.0, ids.1).map_err(wrong)?;
                probe
                    .check_model(model.d_model, model.n_layers)
                    .map_err(wrong)?;
                check_canaries(&probe, model.vocab).map_err(|message| file.error(message))?;
                names.claim(file, probe.name())?;
                self.probes
                    .push(Arc::new(LoadedProbe::new(probe, verification)));
            }
            Kind::Vector => {
                let vector = read_vector(file)?;
                let verification = vector.identity_against(ids.0, ids.1).map_err(wrong)?;
                vector
                    .check_model(model.d_model, model.n_layers)
                    .map_err(wrong)?;
                names.claim(file, vector.name())?;
                let vector = Arc::new(Vector::new(&vector, verification));
                self.vectors.insert(vector.name.clone(), vector);
            }
            Kind::Head => {
                let head = read_head(file)?;
                let verification = head.identity_against(ids.0, ids.1).map_err(wrong)?;
                head.check_model(model.d_model, model.vocab)
                    .map_err(wrong)?;
                names.claim(file, head.name())?;
                let head = Arc::new(Head::new(&head, verification));
                self.heads.insert(head.name.clone(), head);
            }
            Kind::Policy => {}
        }
        Ok(())
    }

    fn add_policies<'f>(
        &mut self,
        files: &'f [LibraryFile],
        model: &ModelIds,
        names: &mut Names<'f>,
    ) -> Result<()> {
        let mut policies = Vec::new();
        for file in files.iter().filter(|file| file.kind == Kind::Policy) {
            let document = std::str::from_utf8(&file.bytes)
                .map_err(|e| file.error(format!("is not UTF-8: {e}; save it as UTF-8")))?;
            let catalog = self.catalog(model.n_layers);
            let policy = Policy::parse_and_compile(&file.stem, 1, document, &catalog)
                .map_err(|e| file.error(e))?;
            if policy.name == EMPTY_POLICY {
                let message = format!("`{EMPTY_POLICY}` is the policy without rules; rename it");
                return Err(file.error(message));
            }
            names.claim(file, &policy.name)?;
            policies.push(policy);
        }
        for policy in policies {
            self.policies.insert(policy.name.clone(), Arc::new(policy));
        }
        Ok(())
    }

    fn choose_default(&self, wanted: Option<&str>) -> Result<String> {
        let all = &self.policies;
        let written: Vec<_> = all.keys().filter(|name| *name != EMPTY_POLICY).collect();
        match (wanted, &written[..]) {
            (Some(wanted), _) if all.contains_key(wanted) => Ok(wanted.to_owned()),
            (Some(wanted), _) => Err(Error::Config(format!(
                "no policy is named `{}`; there is {}",
                wanted.escape_debug(),
                listed(all.keys())
            ))),
            (None, _) if all.contains_key(DEFAULT_POLICY) => Ok(DEFAULT_POLICY.to_owned()),
            (None, []) => Ok(EMPTY_POLICY.to_owned()),
            (None, [only]) => Ok((*only).clone()),
            (None, _) => Err(Error::Config(format!(
                "several policies and none named `{DEFAULT_POLICY}`: choose one with --policy; \
                 there is {}",
                listed(all.keys())
            ))),
        }
    }
}

/// Canaries are fed to the model, so their tokens must be its own.
fn check_canaries(probe: &Probe, vocab: usize) -> Result<(), String> {
    for (index, canary) in probe.manifest().canaries.iter().enumerate() {
        if let Some(token) = canary.tokens.iter().find(|token| **token as usize >= vocab) {
            return Err(format!(
                "canaries[{index}]: token {token} is beyond the model's {vocab}; fit the probe \
                 again on this model"
            ));
        }
    }
    Ok(())
}

/// Which file claimed which name, per folder.
#[derive(Default)]
struct Names<'f>(BTreeMap<(&'static str, String), &'f str>);

impl<'f> Names<'f> {
    fn claim(&mut self, file: &'f LibraryFile, name: &str) -> Result<()> {
        let key = (file.kind.folder(), name.to_owned());
        match self.0.insert(key, &file.path) {
            None => Ok(()),
            Some(other) => Err(file.error(format!(
                "the name `{name}` is already taken by {other}; rename one of them"
            ))),
        }
    }
}
