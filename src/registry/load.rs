//! From named files to a snapshot: each read, checked against the model, and counted once.
//! Trusts no file; knows a library as a list of named bytes, wherever they come from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use inwit_probes::library::{HEADS, POLICIES, PROBES, VECTORS};
use inwit_probes::manifest::check_name;
use inwit_probes::{MAX_FILE_BYTES, ModelIdentity, Probe, RefusalHead, SteeringVector};

use super::snapshot::{
    EMPTY_POLICY, Head, LoadedProbe, ModelIds, RESERVED_POLICIES, Snapshot, Vector, listed,
};
use crate::error::{Error, Result};
use crate::files::read_capped;
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
        let (folder, name) = inside.rsplit_once('/').unwrap_or(("", inside));
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
            let bytes = || read_capped(&path, kind.most_bytes(), "part of a library");
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
            if RESERVED_POLICIES.contains(&policy.name.as_str()) {
                let message = format!("`{}` is no name for a policy; rename it", policy.name);
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

#[cfg(test)]
mod tests {
    use inwit_probes::{
        Calibration, CalibrationKind, Canary, Gather, Head as ProbeHead, InputNorm, Kind as Form,
        Manifest, NormStatistics, Positions, RefusalHeadManifest, Site, VectorManifest,
    };

    use super::super::snapshot::{Canaries, Standing};
    use super::super::{PromptForm, Registry};
    use super::*;

    const POLICY: &str = "[[detector]]\nname = \"harm\"\nprobe = \"prompt_harm\"\n\
                          [[rule]]\nname = \"r\"\nwhen = { detector = \"harm\" }\n\
                          action = \"refusal_head\"\n";

    fn ids() -> ModelIds {
        ModelIds {
            architecture_id: "arch".into(),
            weights_id: "weights".into(),
            d_model: 2,
            n_layers: 4,
            vocab: 8,
        }
    }

    fn identity() -> ModelIdentity {
        ModelIdentity {
            name: "tiny".into(),
            architecture_id: "arch".into(),
            weights_id: "weights".into(),
            weight_format: "f32".into(),
        }
    }

    fn probe(name: &str, change: impl Fn(&mut Manifest)) -> Vec<u8> {
        let positions = Positions::LastPromptToken;
        let mut manifest = Manifest::new(name, Form::Logistic, 2, positions, identity());
        manifest.trained_on.template_hash = "template".into();
        manifest.calibrations = vec![Calibration {
            gather: Gather::Last,
            kind: CalibrationKind::Platt { a: 1.0, b: 0.0 },
            prior: 0.5,
            thresholds: vec![],
            n_benign: 10,
            n_harmful: 10,
        }];
        let canary = |i: u32| Canary {
            tokens: vec![1, i % 8],
            position: 1,
            logit: i as f32 - 3.5,
            positive: i > 3,
        };
        manifest.canaries = (0..8).map(canary).collect();
        change(&mut manifest);
        let head = ProbeHead {
            site: Site::ResidPost(3),
            weight: vec![1.0; manifest.d_model],
            bias: vec![0.0],
            out: 1,
            norm: InputNorm::None,
        };
        Probe::new(manifest, vec![head], None)
            .unwrap()
            .to_bytes()
            .unwrap()
    }

    fn vector(name: &str) -> Vec<u8> {
        let norms = NormStatistics {
            mean: 1.0,
            std: 0.1,
            rows: 10,
        };
        let manifest = VectorManifest::new(name, Site::ResidPost(1), 2, norms, identity());
        SteeringVector::new(manifest, vec![1.0, 0.0])
            .unwrap()
            .to_bytes()
            .unwrap()
    }

    fn head(name: &str, vocab: usize) -> Vec<u8> {
        let manifest = RefusalHeadManifest::new(name, 1, 2, vocab, identity());
        let head = RefusalHead::new(manifest, vec![1.0; vocab], vec![1.0; 2]).unwrap();
        head.to_bytes().unwrap()
    }

    fn file(inside: &str, bytes: impl Into<Vec<u8>>) -> LibraryFile {
        let bytes = bytes.into();
        LibraryFile::new(format!("lib/{inside}"), inside, || Ok(bytes))
            .unwrap()
            .expect("part of a library")
    }

    fn complete() -> Vec<LibraryFile> {
        vec![
            file(
                "probes/prompt_harm.safetensors",
                probe("prompt_harm", |_| {}),
            ),
            file("vectors/refusal.safetensors", vector("refusal")),
            file("heads/soft.safetensors", head("soft", 8)),
            file("policies/default.toml", POLICY),
        ]
    }

    fn snapshot(files: &[LibraryFile]) -> Snapshot {
        Snapshot::from_files(files, &ids(), None).expect("loads")
    }

    /// Refused, and the message names the file and says why.
    fn check_refused(files: &[LibraryFile], says: &[&str]) {
        let error = Snapshot::from_files(files, &ids(), None).expect_err("refused");
        let message = error.to_string();
        for part in says {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn a_library_loads_whole() {
        let snapshot = snapshot(&complete());
        let probe = snapshot.probe("prompt_harm").expect("loaded");
        assert_eq!(probe.standing, Standing::Native);
        assert_eq!(snapshot.vectors["refusal"].values[..], [1.0, 0.0]);
        assert_eq!(snapshot.heads["soft"].rank, 1);
        assert_eq!(snapshot.default_policy, "default");
        let policy = snapshot.policy(None).unwrap();
        assert_eq!(&*policy.detectors[0].probe_name, "prompt_harm");
        assert!(snapshot.policy(Some(EMPTY_POLICY)).unwrap().is_empty());
        snapshot.may_enforce(policy).unwrap();
        let message = snapshot.policy(Some("x")).unwrap_err().to_string();
        assert!(message.contains("`default`"), "{message}");
    }

    #[test]
    fn the_hash_knows_every_byte_and_no_order() {
        let files = complete();
        let hash = snapshot(&files).hash;
        let mut turned = files.clone();
        turned.reverse();
        assert_eq!(snapshot(&turned).hash, hash);
        let others = [
            file(
                "probes/prompt_harm.safetensors",
                probe("prompt_harm", |m| m.record.seed = 1),
            ),
            file("vectors/refusal.safetensors", vector("other")),
            file("heads/soft.safetensors", head("other", 8)),
            file("policies/default.toml", format!("{POLICY}# changed")),
        ];
        for (index, other) in others.into_iter().enumerate() {
            let mut changed = files.clone();
            changed[index] = other;
            assert_ne!(snapshot(&changed).hash, hash, "file {index}");
        }
        assert_ne!(snapshot(&files[..3]).hash, hash);
    }

    #[test]
    fn an_artefact_of_another_model_is_refused_by_name() {
        let wrong = |change: fn(&mut Manifest)| [file("probes/p.safetensors", probe("p", change))];
        let named = "lib/probes/p.safetensors";
        check_refused(
            &wrong(|m| m.model.architecture_id = "other".into()),
            &[named, "`other`", "fit it again"],
        );
        check_refused(
            &wrong(|m| m.d_model = 3),
            &[named, "d_model", "fit it again"],
        );
        check_refused(
            &wrong(|m| m.canaries[0].tokens[0] = 8),
            &[named, "canaries[0]", "token 8"],
        );
        check_refused(
            &[file("heads/h.safetensors", head("h", 9))],
            &["lib/heads/h.safetensors", "vocab"],
        );
        let mut shallow = ids();
        shallow.n_layers = 3;
        let error = Snapshot::from_files(&complete(), &shallow, None).unwrap_err();
        assert!(
            error.to_string().contains("prompt_harm.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn a_name_is_taken_once_per_kind() {
        check_refused(
            &[
                file("probes/a.safetensors", probe("p", |_| {})),
                file("probes/b.safetensors", probe("p", |_| {})),
            ],
            &[
                "lib/probes/b.safetensors",
                "`p`",
                "lib/probes/a.safetensors",
            ],
        );
        check_refused(
            &[
                file("policies/a.toml", "name = \"x\""),
                file("policies/x.toml", ""),
            ],
            &["lib/policies/x.toml", "lib/policies/a.toml"],
        );
        check_refused(&[file("policies/empty.toml", "")], &["rename it"]);
        // A vector and a head may share a name.
        snapshot(&[
            file("vectors/v.safetensors", vector("refusal")),
            file("heads/h.safetensors", head("refusal", 8)),
        ]);
    }

    #[test]
    fn a_broken_file_is_refused_by_name() {
        for (inside, bytes) in [
            (
                "probes/p.safetensors",
                &b"\xff\xff\xff\xff\xff\xff\xff\x7f"[..],
            ),
            ("vectors/v.safetensors", b""),
            ("heads/h.safetensors", b"{}"),
            ("policies/p.toml", b"\xff"),
            ("policies/p.toml", b"[[rule]]"),
        ] {
            check_refused(&[file(inside, bytes)], &["lib/", inside]);
        }
        check_refused(
            &[file("policies/p.toml", POLICY)],
            &["lib/policies/p.toml", "detector `harm`", "prompt_harm"],
        );
    }

    #[test]
    fn what_is_no_part_of_a_library_is_passed_over_or_refused() {
        let read = |inside: &str| LibraryFile::new("x".into(), inside, || Ok(vec![]));
        for inside in [
            "README.md",
            "probes/.hidden",
            "probes/a.partial",
            "probes/NOTES.md",
        ] {
            assert!(read(inside).unwrap().is_none(), "{inside}");
        }
        for inside in [
            "probes/p.pickle",
            "probes/p",
            "probes/A.safetensors",
            "probes/../x.safetensors",
            "policies/p.safetensors",
            "weights/p.safetensors",
            "p.safetensors",
        ] {
            assert!(read(inside).is_err(), "{inside}");
        }
    }

    #[test]
    fn the_default_policy_is_chosen_named_or_the_only_one() {
        let chosen = |names: &[&str], wanted: Option<&str>| {
            let files: Vec<_> = names
                .iter()
                .map(|name| file(&format!("policies/{name}.toml"), ""))
                .collect();
            Snapshot::from_files(&files, &ids(), wanted).map(|snapshot| snapshot.default_policy)
        };
        assert_eq!(chosen(&[], None).unwrap(), EMPTY_POLICY);
        assert_eq!(chosen(&["a"], None).unwrap(), "a");
        assert_eq!(chosen(&["a", "default"], None).unwrap(), "default");
        assert_eq!(chosen(&["a", "default"], Some("a")).unwrap(), "a");
        assert_eq!(chosen(&["a"], Some(EMPTY_POLICY)).unwrap(), EMPTY_POLICY);
        assert!(
            chosen(&["a", "b"], None)
                .unwrap_err()
                .to_string()
                .contains("--policy")
        );
        assert!(
            chosen(&["a"], Some("b"))
                .unwrap_err()
                .to_string()
                .contains("`a`")
        );
    }

    #[test]
    fn on_other_weights_a_probe_enforces_only_after_its_canaries() {
        let mut tuned = ids();
        tuned.weights_id = "tuned".into();
        let snapshot = Snapshot::from_files(&complete(), &tuned, None).unwrap();
        let policy = snapshot.policy(None).unwrap().clone();
        let refused = |snapshot: &Snapshot| {
            let error = snapshot.may_enforce(&policy).expect_err("may not enforce");
            error.to_string()
        };
        assert!(refused(&snapshot).contains("not run"));
        snapshot.may_enforce(&Policy::empty()).unwrap();

        let good: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).collect();
        let judged = |logits| snapshot.with_canary_results([("prompt_harm", logits)]);
        let passed = judged(Ok(good.clone()));
        passed.may_enforce(&policy).unwrap();
        assert_eq!(passed.hash, snapshot.hash);

        let mut off = good;
        off[2] += 1.0;
        assert!(refused(&judged(Ok(off))).contains("canary 2"));
        assert!(refused(&judged(Err("the pass failed".into()))).contains("the pass failed"));
        assert!(refused(&judged(Ok(vec![f32::NAN; 8]))).contains("canary 0"));
        let standing = &judged(Ok(vec![])).probes[0].standing;
        let failed = matches!(
            standing,
            Standing::Unverified {
                canaries: Canaries::Failed(_)
            }
        );
        assert!(failed, "{standing:?}");
    }

    #[test]
    fn canaries_leave_a_native_probe_native() {
        let snapshot = snapshot(&complete());
        let judged = snapshot.with_canary_results([("prompt_harm", Ok(vec![0.0; 8]))]);
        assert_eq!(judged.probes[0].standing, Standing::Native);
    }

    #[test]
    fn a_request_outside_the_training_is_out_of_domain() {
        let snapshot = snapshot(&complete());
        let chat = |user_turns| PromptForm::Chat {
            template_hash: "template".into(),
            system_prompt: None,
            user_turns,
            prefilled_answer: false,
        };
        assert!(!snapshot.probes[0].out_of_domain(&chat(1)));
        assert!(snapshot.probes[0].out_of_domain(&chat(2)));
        assert!(snapshot.probes[0].out_of_domain(&PromptForm::RawText));
    }

    fn write(dir: &Path, files: &[LibraryFile]) {
        for file in files {
            let path = dir.join(file.path.strip_prefix("lib/").unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, &file.bytes).unwrap();
        }
    }

    #[test]
    fn a_folder_gives_what_its_files_give() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &complete());
        fs::write(root.path().join("probes/README.md"), "").unwrap();
        let registry = Registry::load(root.path(), &ids(), None).unwrap();
        let before = registry.snapshot();
        assert_eq!(before.hash, snapshot(&complete()).hash);
        registry.replace(Snapshot::empty());
        assert!(registry.snapshot().probes.is_empty());
        assert_eq!(
            before.probes.len(),
            1,
            "a request keeps the snapshot it was admitted under"
        );
    }

    #[test]
    fn a_missing_folder_or_a_folder_as_a_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("nowhere");
        let message = |dir: &Path| Registry::load(dir, &ids(), None).err().unwrap().to_string();
        assert!(message(&missing).contains("nowhere"));
        fs::create_dir_all(root.path().join("probes/p.safetensors")).unwrap();
        assert!(message(root.path()).contains("p.safetensors: is not a plain file"));
    }

    #[test]
    fn the_library_is_the_one_made_for_the_architecture() {
        let root = tempfile::tempdir().unwrap();
        let other = probe("p", |m| m.model.architecture_id = "other".into());
        write(
            &root.path().join("a"),
            &[file("probes/p.safetensors", other)],
        );
        assert_eq!(library_for(&ids(), root.path()).unwrap(), None);
        write(&root.path().join("b"), &complete());
        let found = library_for(&ids(), root.path()).unwrap();
        assert_eq!(found, Some(root.path().join("b")));
        let itself = library_for(&ids(), &root.path().join("b")).unwrap();
        assert_eq!(itself, Some(root.path().join("b")));
        write(
            &root.path().join("a"),
            &[file("probes/q.safetensors", *b"broken")],
        );
        let message = library_for(&ids(), root.path()).unwrap_err().to_string();
        assert!(message.contains("q.safetensors"), "{message}");
    }
}
