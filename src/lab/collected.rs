//! A folder of collected hidden states: its manifest, its index, and the states, mapped into memory.
//! Knows rows, sites and positions; knows no engine.
//!
//! | file | holds |
//! |---|---|
//! | `manifest.json` | which model, template and data, which sites and positions, in which type |
//! | `index.jsonl` | a line per row in input order: its tokens, label and group, where its states lie |
//! | `{site}.f32`, `{site}.bf16` | `[states, d_model]`, row-major, little-endian, without a header |

use std::fs::{File, TryLockError};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use inwit_probes::Site;
use inwit_probes::manifest::{DataRecord, ModelIdentity, Positions};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::capture_file::Dtype;
use super::examples::{Example, read_at};
use super::rows::at;
use super::states::RowStates;
use crate::engine::request::PromptForm;
use crate::error::{Error, Result};
use crate::files::{read_capped, read_text};

/// The version of the folder's layout.
const FORMAT: u32 = 1;
const MOST_MANIFEST: u64 = 1 << 20;
const MOST_INDEX: u64 = 4 << 30;
/// No model is wider; a product with it cannot overflow.
const MOST_D_MODEL: usize = 1 << 20;

const MANIFEST: &str = "manifest.json";
const INDEX: &str = "index.jsonl";

/// What a folder's states are of. Two runs with equal manifests write equal bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collection {
    pub format: u32,
    pub model: ModelIdentity,
    /// Machines of another kernel identity give other bits.
    pub kernel_identity: String,
    /// Of the chat template; unset where the model has none.
    pub template_hash: Option<String>,
    pub data: DataRecord,
    pub sites: Vec<String>,
    /// As a probe's manifest spells them.
    pub positions: Vec<String>,
    /// `f32` or `bf16`
    pub dtype: String,
    pub d_model: usize,
}

impl Collection {
    /// The layout's version that this program writes.
    pub const FORMAT: u32 = FORMAT;

    pub(super) fn path(folder: &Path) -> PathBuf {
        folder.join(MANIFEST)
    }

    pub(super) fn index(folder: &Path) -> PathBuf {
        folder.join(INDEX)
    }

    /// Where the states of a site lie.
    pub fn states(&self, folder: &Path, site: &str) -> PathBuf {
        folder.join(format!("{site}.{}", self.dtype))
    }

    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = Self::path(folder);
        let text = read_text(&path, MOST_MANIFEST, "a manifest of collected states")?;
        let wrong = |message: String| Error::file(path.display(), message);
        let manifest: Self = serde_json::from_str(&text)
            .map_err(|error| wrong(format!("is no manifest of collected states: {error}")))?;
        if manifest.format != FORMAT {
            return Err(wrong(format!(
                "has layout {}, this program reads {FORMAT}; collect again",
                manifest.format
            )));
        }
        if !(1..=MOST_D_MODEL).contains(&manifest.d_model) {
            return Err(wrong("`d_model` is no width of a model".into()));
        }
        manifest.types(&path)?;
        Ok(manifest)
    }

    /// The sites, positions and element type that the texts name.
    fn types(&self, path: &Path) -> Result<(Vec<Site>, Vec<Positions>, Dtype)> {
        let wrong = |error: inwit_probes::Error| Error::file(path.display(), error);
        let sites = self.sites.iter().map(|site| site.parse().map_err(wrong));
        let sites = sites.collect::<Result<Vec<Site>>>()?;
        let positions = self.positions.iter().map(|p| p.parse().map_err(wrong));
        let positions = positions.collect::<Result<Vec<Positions>>>()?;
        let dtype = match self.dtype.as_str() {
            "f32" => Dtype::F32,
            "bf16" => Dtype::Bf16,
            _ => {
                let message = "`dtype` must be f32 or bf16";
                return Err(Error::file(path.display(), message));
            }
        };
        Ok((sites, positions, dtype))
    }

    /// Refuses states of another model than the loaded one, by the part that differs.
    pub fn check_model(&self, folder: &Path, model: &ModelIdentity) -> Result<()> {
        let ours = &self.model;
        for (what, then, now) in [
            (
                "architecture_id",
                &ours.architecture_id,
                &model.architecture_id,
            ),
            ("weights_id", &ours.weights_id, &model.weights_id),
            ("weight_format", &ours.weight_format, &model.weight_format),
        ] {
            if then != now {
                let message = format!(
                    "holds states of another model: {what} was {}, is {}; collect again",
                    short(then),
                    short(now)
                );
                return Err(Error::file(folder.display(), message));
            }
        }
        Ok(())
    }

    /// Whether another run may add to this folder's states; names what differs where not.
    pub(super) fn check_same(&self, folder: &Path, other: &Self) -> Result<()> {
        self.check_model(folder, &other.model)?;
        let differs = |what: &str, then: &str, now: &str| {
            let message = format!(
                "was begun with another {what}: {} then, {} now; name another --out, or remove it",
                short(then),
                short(now)
            );
            Error::file(folder.display(), message)
        };
        let none = String::new();
        for (what, then, now) in [
            ("--data", &self.data.sha256, &other.data.sha256),
            (
                "chat template",
                self.template_hash.as_ref().unwrap_or(&none),
                other.template_hash.as_ref().unwrap_or(&none),
            ),
            (
                "--positions",
                &self.positions.join(", "),
                &other.positions.join(", "),
            ),
            ("--dtype", &self.dtype, &other.dtype),
            (
                "kernel identity",
                &self.kernel_identity,
                &other.kernel_identity,
            ),
        ] {
            if then != now {
                return Err(differs(what, then, now));
            }
        }
        if let (Some(site), _) | (None, Some(site)) = (
            first_missing(&self.sites, &other.sites),
            first_missing(&other.sites, &self.sites),
        ) {
            return Err(differs("--site", site, "not the same"));
        }
        if self.sites != other.sites {
            return Err(differs("order of --site", &self.sites[0], &other.sites[0]));
        }
        Ok(())
    }
}

fn first_missing<'a>(of: &'a [String], among: &[String]) -> Option<&'a String> {
    of.iter().find(|site| !among.contains(site))
}

/// Enough of a hash to tell it from another.
fn short(text: &str) -> &str {
    let is_hash = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if is_hash { &text[..12] } else { text }
}

/// A line of the index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IndexLine {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) group: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) category: Option<String>,
    pub(super) form: Form,
    /// Prompt and answer.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_tokens: usize,
    /// Where the last user turn begins.
    pub(super) content_start: usize,
    /// Of the states, rising.
    pub(super) positions: Vec<u32>,
}

/// What a request was made of, as far as a probe's training domain asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Form {
    Raw,
    Chat {
        /// SHA-256 of the text.
        system_prompt: Option<String>,
        user_turns: u32,
        prefilled_answer: bool,
    },
}

impl Form {
    pub(super) fn of(form: &PromptForm) -> Self {
        match form {
            PromptForm::Chat {
                system_prompt,
                user_turns,
                prefilled_answer,
                ..
            } => Self::Chat {
                system_prompt: system_prompt.clone(),
                user_turns: *user_turns,
                prefilled_answer: *prefilled_answer,
            },
            PromptForm::RawText | PromptForm::Tokens => Self::Raw,
        }
    }
}

impl IndexLine {
    /// # Errors
    /// With what makes no sense, as the end of a sentence about the line.
    fn check(&self) -> Result<(), &'static str> {
        let rising = self.positions.windows(2).all(|pair| pair[0] < pair[1]);
        let last = self.positions.last().copied().unwrap_or_default() as usize;
        if self.prompt_tokens > self.tokens.len() || self.content_start > self.prompt_tokens {
            return Err("has a prompt that is longer than its tokens");
        }
        if !rising || (!self.positions.is_empty() && last >= self.tokens.len()) {
            return Err("has positions that are not those of its tokens");
        }
        Ok(())
    }
}

/// The lines of an index that are whole, and their length in bytes.
///
/// # Errors
/// A whole line that makes no sense. Of a line that was cut off, nothing is said.
pub(super) fn read_index(folder: &Path) -> Result<(Vec<IndexLine>, u64)> {
    let path = Collection::index(folder);
    let bytes = read_capped(&path, MOST_INDEX, "an index of collected states")?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n');
    let whole = &bytes[..whole.map_or(0, |end| end + 1)];
    let file = path.display().to_string();
    let mut lines = Vec::new();
    for line in whole.split_inclusive(|byte| *byte == b'\n') {
        let number = lines.len() + 1;
        let parsed: IndexLine = serde_json::from_slice(line)
            .map_err(|error| at(&file, number, format!("is no line of an index: {error}")))?;
        parsed
            .check()
            .map_err(|message| at(&file, number, message))?;
        lines.push(parsed);
    }
    Ok((lines, whole.len() as u64))
}

/// How many states the lines are of.
pub(super) fn states_of(lines: &[IndexLine]) -> u64 {
    lines.iter().map(|line| line.positions.len() as u64).sum()
}

/// Collected states, open for reading: the states are mapped, not read.
pub struct Collected {
    folder: PathBuf,
    manifest: Collection,
    sites: Vec<Site>,
    positions: Vec<Positions>,
    dtype: Dtype,
    lines: Vec<IndexLine>,
    /// Of each line, the number of its first state.
    firsts: Vec<usize>,
    /// One per site.
    maps: Vec<Mmap>,
    /// Shared while the files are mapped: whoever writes holds it alone.
    _lock: File,
}

impl Collected {
    /// Opens a folder that `lab collect` has finished.
    ///
    /// # Errors
    /// Which file is missing, makes no sense or has another length than the index says; a run that
    /// was not finished, or is under way.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest = Collection::read(folder)?;
        let lock = lock(folder, Access::Shared)?;
        let (sites, positions, dtype) = manifest.types(&Collection::path(folder))?;
        let (lines, _) = read_index(folder)?;
        if lines.len() as u64 != manifest.data.rows {
            let message = format!(
                "holds {} of {} rows; run `inwit lab collect` again to finish it",
                lines.len(),
                manifest.data.rows
            );
            return Err(Error::file(folder.display(), message));
        }
        let mut firsts = Vec::with_capacity(lines.len());
        let mut states = 0;
        for line in &lines {
            firsts.push(states);
            states += line.positions.len();
        }
        let bytes = states as u128 * manifest.d_model as u128 * dtype.size() as u128;
        let map = |site: &String| map(&manifest.states(folder, site), bytes);
        let maps = manifest.sites.iter().map(map).collect::<Result<_>>()?;
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            sites,
            positions,
            dtype,
            lines,
            firsts,
            maps,
            _lock: lock,
        })
    }

    pub fn manifest(&self) -> &Collection {
        &self.manifest
    }

    /// Refuses states that were not collected from this model in this weight format.
    pub fn check_model(&self, model: &ModelIdentity) -> Result<()> {
        self.manifest.check_model(&self.folder, model)
    }

    /// Refuses a site or positions that were not collected.
    pub fn check_has(&self, sites: &[Site], positions: Positions) -> Result<()> {
        for site in sites {
            self.site(*site)?;
        }
        if self.positions.iter().any(|has| covers(*has, positions)) {
            return Ok(());
        }
        let message = format!(
            "{positions} were not collected in {}, only {}",
            self.folder.display(),
            self.manifest.positions.join(", ")
        );
        Err(Error::invalid("positions", message))
    }

    /// The rows in the order of the data.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = CollectedRow<'_>> {
        let row = |index| CollectedRow {
            collected: self,
            index,
        };
        (0..self.lines.len()).map(row)
    }

    fn site(&self, site: Site) -> Result<usize> {
        self.sites
            .iter()
            .position(|has| *has == site)
            .ok_or_else(|| {
                let message = format!(
                    "{site} was not collected in {}, only {}",
                    self.folder.display(),
                    self.manifest.sites.join(", ")
                );
                Error::invalid("site", message)
            })
    }

    /// `[d_model]` of one state at one site, appended to `out`.
    fn push_state(&self, site: usize, state: usize, out: &mut Vec<f32>) {
        let bytes = self.manifest.d_model * self.dtype.size();
        let row = &self.maps[site][state * bytes..(state + 1) * bytes];
        match self.dtype {
            Dtype::F32 => {
                let (values, _) = row.as_chunks::<4>();
                out.extend(values.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
            Dtype::Bf16 => {
                let (values, _) = row.as_chunks::<2>();
                let value = |bytes: &[u8; 2]| bf16::from_le_bytes(*bytes).to_f32();
                out.extend(values.iter().map(value));
            }
        }
    }
}

/// One row of the data, with the states that were collected of it.
#[derive(Clone, Copy)]
pub struct CollectedRow<'a> {
    collected: &'a Collected,
    index: usize,
}

impl<'a> CollectedRow<'a> {
    fn line(&self) -> &'a IndexLine {
        &self.collected.lines[self.index]
    }

    pub fn id(&self) -> &'a str {
        &self.line().id
    }

    pub fn label(&self) -> Option<&'a str> {
        self.line().label.as_deref()
    }

    /// Rewrites of one base prompt share it; without one a row is alone.
    pub fn group(&self) -> &'a str {
        self.line().group.as_deref().unwrap_or(self.id())
    }

    pub fn category(&self) -> Option<&'a str> {
        self.line().category.as_deref()
    }

    /// Prompt and answer.
    pub fn tokens(&self) -> &'a [u32] {
        &self.line().tokens
    }

    pub fn prompt_tokens(&self) -> usize {
        self.line().prompt_tokens
    }

    /// The tokens of the last user turn and the template's tail.
    pub fn content(&self) -> Range<usize> {
        self.line().content_start..self.prompt_tokens()
    }

    pub fn form(&self) -> PromptForm {
        match &self.line().form {
            Form::Raw => PromptForm::RawText,
            Form::Chat {
                system_prompt,
                user_turns,
                prefilled_answer,
            } => PromptForm::Chat {
                template_hash: self
                    .collected
                    .manifest
                    .template_hash
                    .clone()
                    .unwrap_or_default(),
                system_prompt: system_prompt.clone(),
                user_turns: *user_turns,
                prefilled_answer: *prefilled_answer,
            },
        }
    }

    /// The states that a probe at `positions` would read, per site in the order asked for, each
    /// `[positions, d_model]` in f32.
    ///
    /// # Errors
    /// A site or positions that were not collected.
    pub fn states(&self, sites: &[Site], positions: Positions) -> Result<RowStates> {
        let collected = self.collected;
        collected.check_has(sites, positions)?;
        let line = self.line();
        let answer = line.tokens.len() - line.prompt_tokens;
        let reads = |(_, position): &(usize, &u32)| {
            read_at(positions, &self.content(), answer, **position as usize)
        };
        let kept: Vec<(usize, u32)> = line
            .positions
            .iter()
            .enumerate()
            .filter(reads)
            .map(|(offset, position)| (collected.firsts[self.index] + offset, *position))
            .collect();
        let values = |site: &Site| {
            let site = collected.site(*site)?;
            let mut values = Vec::with_capacity(kept.len() * collected.manifest.d_model);
            for (state, _) in &kept {
                collected.push_state(site, *state, &mut values);
            }
            Ok(values)
        };
        Ok(RowStates {
            positions: kept.iter().map(|(_, position)| *position).collect(),
            tokens: kept
                .iter()
                .map(|(_, position)| line.tokens[*position as usize])
                .collect(),
            values: sites.iter().map(values).collect::<Result<_>>()?,
        })
    }

    /// The row as an example for a fit, with its class from the caller.
    pub fn example(&self, sites: &[Site], positions: Positions, positive: bool) -> Result<Example> {
        Ok(Example {
            positive,
            group: self.group().to_owned(),
            states: self.states(sites, positions)?,
            tokens: self.tokens().to_vec(),
        })
    }
}

/// Whether states at `has` include all that are read at `wanted`.
fn covers(has: Positions, wanted: Positions) -> bool {
    use Positions::{EveryGenerated, FirstGenerated, Generated, LastPromptToken, PromptContent};
    match (has, wanted) {
        _ if has == wanted => true,
        (PromptContent, LastPromptToken) | (EveryGenerated, Generated(_) | FirstGenerated(_)) => {
            true
        }
        (FirstGenerated(first), Generated(k) | FirstGenerated(k)) => k <= first,
        _ => false,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Shared,
    Alone,
}

/// Keeps writers and readers of a folder apart, for as long as the file is held.
pub(super) fn lock(folder: &Path, access: Access) -> Result<File> {
    let path = Collection::path(folder);
    let failed =
        |error: std::io::Error| Error::file(path.display(), format!("cannot be locked: {error}"));
    let file = File::open(&path).map_err(failed)?;
    let locked = match access {
        Access::Shared => file.try_lock_shared(),
        Access::Alone => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = "is being read or written by another process; wait for its end";
            Err(Error::file(folder.display(), message))
        }
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// Maps a file that must have so many bytes.
fn map(path: &Path, bytes: u128) -> Result<Mmap> {
    let unreadable =
        |error: std::io::Error| Error::file(path.display(), format!("cannot be read: {error}"));
    let file = File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    if u128::from(length) != bytes {
        let message = format!("has {length} bytes, the index says {bytes}; collect again");
        return Err(Error::file(path.display(), message));
    }
    // SAFETY: the map is only sound while nobody changes the file. Those who write such folders
    // hold their lock alone, and whoever opens one to read shares it for as long as the map lives.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) };
    map.map_err(unreadable)
}
