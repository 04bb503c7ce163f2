//! `lab collect`: reads a file of prompts, or of prompts and answers, once, and keeps the hidden
//! states of many sites and positions in a folder that goes on where an interrupted run ended.
//! Knows how the folder is written; `collected.rs` reads it.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use inwit_probes::Site;
use inwit_probes::manifest::Positions;

use super::bench::{Bench, Tick, reading};
use super::capture_file::Dtype;
use super::collected::{Access, Collection, Form, IndexLine, lock, read_index, states_of};
use super::examples::{answer, read_at, record, selection as selection_of};
use super::fit::identity;
use super::output::{WholeFile, refuse_same_file};
use super::rows::{self, Row, at};
use super::states::RowStates;
use crate::engine::request::{PositionSelection, Request};
use crate::error::{Error, Result};

/// Rows between two moments at which everything is on disk: what a kill may cost.
const ROWS_PER_FLUSH: usize = 64;

/// What to keep of every row.
#[derive(Clone, Debug)]
pub struct Options {
    pub sites: Vec<Site>,
    /// States at any of these are kept, once.
    pub positions: Vec<Positions>,
    pub dtype: Dtype,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub rows: usize,
    /// Those that an earlier run had left.
    pub rows_before: usize,
    /// Per site, over all rows.
    pub states: u64,
}

/// Collects the states of every row of `data` into the folder `out`, prefill only.
///
/// A folder that an equal run has begun is gone on with; `tick` counts the rows of both.
///
/// # Errors
/// A folder that was begun with another model, template, data or options, by what differs; a row
/// without the answer that the positions need, by its line.
pub async fn collect(
    bench: &Bench,
    data: &Path,
    out: &Path,
    options: &Options,
    tick: Tick<'_>,
) -> Result<Done> {
    check(bench, options)?;
    refuse_same_file(out, data)?;
    let file = data.display().to_string();
    let rows = rows::read(data)?;
    check_answers(&file, &rows, &options.positions)?;
    let manifest = manifest(bench, data, rows.len(), options)?;
    let mut folder = Folder::open(out, &manifest)?;
    let before = folder.rows;
    let left = rows.get(before..).unwrap_or_default();
    let selection = selection(&options.positions);
    let requests = bench.prepare(&file, left, |row| reading(row, &options.sites, selection))?;
    let d_model = bench.d_model();
    let total = rows.len();
    let mut tick = |done: usize, _: usize| tick(before + done, total);
    bench
        .run(&file, left, requests, &mut tick, |done| {
            let states = RowStates::join(&done.outcome.captured, &options.sites, d_model)?;
            let states = kept(states, &options.positions, &done.request);
            folder.push(
                line(done.row, &done.request, &states),
                &states,
                options.dtype,
            )
        })
        .await?;
    folder.flush()?;
    Ok(Done {
        rows: total,
        rows_before: before,
        states: folder.states,
    })
}

fn check(bench: &Bench, options: &Options) -> Result<()> {
    bench.check_sites(&options.sites)?;
    if options.sites.is_empty() || options.positions.is_empty() {
        return Err(Error::invalid(
            "site",
            "name at least one site, and positions",
        ));
    }
    for (index, positions) in options.positions.iter().enumerate() {
        if options.positions[..index].contains(positions) {
            let message = format!("{positions} are named twice");
            return Err(Error::invalid("positions", message));
        }
    }
    Ok(())
}

fn check_answers(file: &str, rows: &[Row], positions: &[Positions]) -> Result<()> {
    let Some(positions) = positions.iter().find(|positions| positions.of_answer()) else {
        return Ok(());
    };
    let missing = |row: &&Row| row.answer.as_deref().is_none_or(str::is_empty);
    match rows.iter().find(missing) {
        None => Ok(()),
        Some(row) => {
            let message = format!(
                "no `answer`, but the positions {positions} are of answers; \
                 write some with `inwit generate` and put each `text` into its row as `answer`"
            );
            Err(at(file, row.line, message))
        }
    }
}

fn manifest(bench: &Bench, data: &Path, rows: usize, options: &Options) -> Result<Collection> {
    let info = bench.engine.info();
    Ok(Collection {
        format: Collection::FORMAT,
        model: identity(bench),
        kernel_identity: info.kernel_identity.clone(),
        template_hash: bench.engine.template().map(|template| template.hash()),
        data: record(data, rows)?,
        sites: options.sites.iter().map(Site::to_string).collect(),
        positions: options.positions.iter().map(Positions::to_string).collect(),
        dtype: options.dtype.to_string(),
        d_model: bench.d_model(),
    })
}

/// The fewest positions that the engine can be asked for.
fn selection(positions: &[Positions]) -> PositionSelection {
    let mut selections = positions.iter().map(|positions| selection_of(*positions));
    use PositionSelection::{All, AllPrompt, FromLastPromptToken, Generated, LastPromptToken};
    let first = selections.next().unwrap_or(All);
    selections.fold(first, |all, one| match (all, one) {
        (all, one) if all == one => all,
        (LastPromptToken, AllPrompt) | (AllPrompt, LastPromptToken) => AllPrompt,
        (LastPromptToken, Generated) | (Generated, LastPromptToken) => FromLastPromptToken,
        (FromLastPromptToken, LastPromptToken | Generated) => FromLastPromptToken,
        _ => All,
    })
}

fn kept(states: RowStates, positions: &[Positions], request: &Request) -> RowStates {
    let (content, answer) = (&request.prompt.content, answer(request).len());
    states.filter(|position| {
        let mut all = positions.iter();
        all.any(|positions| read_at(*positions, content, answer, position as usize))
    })
}

fn line(row: &Row, request: &Request, states: &RowStates) -> IndexLine {
    IndexLine {
        id: row.id.clone(),
        label: row.label.clone(),
        group: row.group.clone(),
        category: row.category.clone(),
        form: Form::of(&request.prompt.form),
        tokens: [&request.prompt.tokens, answer(request)].concat(),
        prompt_tokens: request.prompt.tokens.len(),
        content_start: request.prompt.content.start,
        positions: states.positions.clone(),
    }
}

/// A folder that is being written: an index, and a file of states per site.
struct Folder {
    path: PathBuf,
    index: File,
    sites: Vec<BufWriter<File>>,
    /// Lines whose states are not on disk yet.
    waiting: Vec<IndexLine>,
    rows: usize,
    states: u64,
    _lock: File,
}

impl Folder {
    /// Begins a folder, or goes on with one after its last whole row.
    fn open(path: &Path, manifest: &Collection) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(|error| unwritten(path, &error))?;
        let begun = Collection::path(path).exists();
        if !begun {
            refuse_foreign(path)?;
            let mut file = WholeFile::create(&Collection::path(path))?;
            let text = serde_json::to_string_pretty(manifest).map_err(Error::internal)?;
            file.bytes(text.as_bytes())?;
            file.bytes(b"\n")?;
            file.finish()?;
        }
        let lock = lock(path, Access::Alone)?;
        Collection::read(path)?.check_same(path, manifest)?;
        let index = Collection::index(path);
        let mut index = open_to_append(&index)?;
        let files = manifest.sites.iter();
        let files = files.map(|site| open_to_append(&manifest.states(path, site)));
        let mut files = files.collect::<Result<Vec<File>>>()?;
        let (lines, rows, states) = whole_rows(path, manifest, &files)?;
        let bytes = states * state_bytes(manifest);
        for file in &mut files {
            cut(path, file, bytes)?;
        }
        cut(path, &mut index, lines)?;
        Ok(Self {
            path: path.to_owned(),
            index,
            sites: files.into_iter().map(BufWriter::new).collect(),
            waiting: Vec::new(),
            rows,
            states,
            _lock: lock,
        })
    }

    fn push(&mut self, line: IndexLine, states: &RowStates, dtype: Dtype) -> Result<()> {
        for (file, values) in self.sites.iter_mut().zip(&states.values) {
            dtype
                .write(values, file)
                .map_err(|error| unwritten(&self.path, &error))?;
        }
        self.states += states.positions.len() as u64;
        self.rows += 1;
        self.waiting.push(line);
        if self.waiting.len() == ROWS_PER_FLUSH {
            self.flush()?;
        }
        Ok(())
    }

    /// States first: a line in the index is the proof that its states are there.
    fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let failed = |error: std::io::Error| unwritten(&self.path, &error);
        for file in &mut self.sites {
            file.flush().map_err(failed)?;
            file.get_ref().sync_data().map_err(failed)?;
        }
        let mut lines = Vec::new();
        for line in self.waiting.drain(..) {
            serde_json::to_writer(&mut lines, &line).map_err(Error::internal)?;
            lines.push(b'\n');
        }
        self.index.write_all(&lines).map_err(failed)?;
        self.index.sync_data().map_err(failed)
    }
}

/// A run that is interrupted keeps what it has; one that is killed loses the rows since a flush.
impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be written here is read again by the run that goes on.
        let _ = self.flush();
    }
}

/// The bytes of the index, the rows and the states that are whole in every file.
fn whole_rows(path: &Path, manifest: &Collection, files: &[File]) -> Result<(u64, usize, u64)> {
    let (lines, length) = read_index(path)?;
    let states = states_of(&lines);
    for file in files {
        let metadata = file.metadata().map_err(|error| unwritten(path, &error))?;
        if metadata.len() / state_bytes(manifest) < states {
            let message = "lacks states that its index names; remove it and collect again";
            return Err(Error::file(path.display(), message));
        }
    }
    if lines.len() as u64 > manifest.data.rows {
        let message = "has more rows than the data; remove it and collect again";
        return Err(Error::file(path.display(), message));
    }
    Ok((length, lines.len(), states))
}

fn state_bytes(manifest: &Collection) -> u64 {
    let size = if manifest.dtype == "f32" { 4 } else { 2 };
    manifest.d_model as u64 * size
}

/// A folder that holds anything else is not written to.
fn refuse_foreign(path: &Path) -> Result<()> {
    let unreadable = |error| Error::file(path.display(), format!("cannot be read: {error}"));
    match std::fs::read_dir(path).map_err(unreadable)?.next() {
        None => Ok(()),
        Some(_) => Err(Error::file(
            path.display(),
            "is not empty and holds no collected states; name another --out",
        )),
    }
}

fn open_to_append(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(|error| unwritten(path, &error))
}

fn cut(path: &Path, file: &mut File, length: u64) -> Result<()> {
    let failed = |error: std::io::Error| unwritten(path, &error);
    file.set_len(length).map_err(failed)?;
    file.seek(SeekFrom::Start(length)).map_err(failed)?;
    Ok(())
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    Error::file(path.display(), format!("cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::collected::Collected;
    use super::*;
    use inwit_probes::manifest::{DataRecord, ModelIdentity};

    const SITES: [&str; 2] = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"];

    fn manifest(rows: u64, dtype: &str) -> Collection {
        Collection {
            format: Collection::FORMAT,
            model: ModelIdentity {
                name: "m".into(),
                architecture_id: "a".repeat(64),
                weights_id: "b".repeat(64),
                weight_format: "f32".into(),
            },
            kernel_identity: "k".into(),
            template_hash: Some("t".into()),
            data: DataRecord {
                name: "data.jsonl".into(),
                sha256: "c".repeat(64),
                rows,
            },
            sites: SITES.map(str::to_owned).to_vec(),
            positions: vec!["prompt_content".into(), "generated{2}".into()],
            dtype: dtype.into(),
            d_model: 2,
        }
    }

    /// Five tokens of prompt, the first two of the template, and three of an answer; states at the
    /// prompt's content and the answer's second token.
    fn row(number: u32) -> (IndexLine, RowStates) {
        let positions = vec![2, 3, 4, 6];
        let line = IndexLine {
            id: format!("row{number}"),
            label: Some("benign".into()),
            group: (number == 0).then(|| "g".into()),
            category: None,
            form: Form::Chat {
                system_prompt: None,
                user_turns: 1,
                prefilled_answer: false,
            },
            tokens: (0..8).map(|token| token + 10 * number).collect(),
            prompt_tokens: 5,
            content_start: 2,
            positions: positions.clone(),
        };
        let values = |site: u32| {
            let value = |index: u32| (number * 100 + site * 10 + index) as f32;
            (0..8).map(value).collect()
        };
        let states = RowStates {
            tokens: positions.iter().map(|p| p + 10 * number).collect(),
            positions,
            values: vec![values(0), values(1)],
        };
        (line, states)
    }

    fn write(path: &Path, manifest: &Collection, rows: std::ops::Range<u32>) {
        let mut folder = Folder::open(path, manifest).expect("opens");
        assert_eq!(folder.rows, rows.start as usize);
        let dtype = match manifest.dtype.as_str() {
            "f32" => Dtype::F32,
            _ => Dtype::Bf16,
        };
        for number in rows {
            let (line, states) = row(number);
            folder.push(line, &states, dtype).expect("pushes");
        }
    }

    fn sites() -> Vec<Site> {
        SITES.map(|site| site.parse().expect("a site")).to_vec()
    }

    #[test]
    fn what_was_collected_is_read_back_by_site_and_positions() {
        for dtype in ["f32", "bf16"] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("states");
            write(&path, &manifest(2, dtype), 0..2);
            let collected = Collected::open(&path).expect("opens");
            let rows: Vec<_> = collected.rows().collect();
            assert_eq!((rows[0].group(), rows[1].group()), ("g", "row1"));
            assert_eq!(rows[1].tokens()[0], 10);
            let late = [sites()[1]];
            let states = rows[1].states(&late, Positions::PromptContent);
            let states = states.expect("reads");
            assert_eq!(states.positions, [2, 3, 4]);
            assert_eq!(states.tokens, [12, 13, 14]);
            assert_eq!(states.values, [[110.0, 111.0, 112.0, 113.0, 114.0, 115.0]]);
            let last = rows[0].states(&sites(), Positions::LastPromptToken);
            assert_eq!(last.expect("reads").values, [[4.0, 5.0], [14.0, 15.0]]);
            let second = rows[0].states(&late, Positions::Generated(2));
            assert_eq!(second.expect("reads").positions, [6]);
        }
    }

    #[test]
    fn what_was_not_collected_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &manifest(1, "f32"), 0..1);
        let collected = Collected::open(folder.path()).expect("opens");
        let check = |site: &str, positions| {
            let site: Site = site.parse().expect("a site");
            let checked = collected.check_has(&[site], positions);
            checked.expect_err("is refused").to_string()
        };
        let other = check("blocks.0.hook_mlp_out", Positions::PromptContent);
        assert!(other.contains("hook_mlp_out"), "{other}");
        let other = check(SITES[0], Positions::EveryGenerated);
        assert!(
            other.contains("every_generated") && other.contains("generated{2}"),
            "{other}"
        );
        let mut model = manifest(1, "f32").model;
        assert!(collected.check_model(&model).is_ok());
        model.weight_format = "q8_0".into();
        let error = collected.check_model(&model).expect_err("is refused");
        assert!(error.to_string().contains("weight_format"), "{error}");
    }

    #[test]
    fn a_run_goes_on_after_the_last_whole_row_wherever_it_was_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
        let manifest = manifest(3, "f32");
        write(&whole, &manifest, 0..3);
        write(&cut, &manifest, 0..2);
        assert!(Collected::open(&cut).is_err_and(|e| e.to_string().contains("2 of 3 rows")));
        let spoil = |name: &str, bytes: &[u8]| {
            let mut file = OpenOptions::new()
                .append(true)
                .open(cut.join(name))
                .expect("opens");
            file.write_all(bytes).expect("writes");
        };
        // In the middle of a character.
        spoil("index.jsonl", b"{\"id\": \"row\xc3");
        spoil(&format!("{}.f32", SITES[0]), &[1; 13]);
        write(&cut, &manifest, 2..3);
        for name in ["index.jsonl", "manifest.json", &format!("{}.f32", SITES[0])] {
            let read = |folder: &Path| std::fs::read(folder.join(name)).expect("reads");
            assert_eq!(read(&whole), read(&cut), "{name}");
        }
        assert_eq!(Collected::open(&cut).expect("opens").rows().len(), 3);
    }

    #[test]
    fn a_folder_of_another_run_is_refused_by_what_differs() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = manifest(1, "f32");
        write(folder.path(), &first, 0..1);
        let refused = |change: &dyn Fn(&mut Collection), expected: &str| {
            let mut other = first.clone();
            change(&mut other);
            let error = Folder::open(folder.path(), &other)
                .map(|_| ())
                .expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        };
        refused(&|m| m.data.sha256 = "d".repeat(64), "--data");
        refused(&|m| m.model.weights_id = "d".repeat(64), "weights_id");
        refused(
            &|m| m.model.architecture_id = "d".repeat(64),
            "architecture_id",
        );
        refused(&|m| m.template_hash = None, "template");
        refused(&|m| m.positions.truncate(1), "--positions");
        refused(&|m| m.dtype = "bf16".into(), "--dtype");
        refused(&|m| m.sites.truncate(1), "--site");
        refused(&|m| m.sites.reverse(), "--site");
        assert!(Folder::open(folder.path(), &first).is_ok());
    }

    #[test]
    fn damaged_and_foreign_folders_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("states");
        write(&path, &manifest(1, "f32"), 0..1);
        let opened = || {
            Collected::open(&path)
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        let spoil = |name: &str, from: &str, to: &str, expected: &str| {
            let file = path.join(name);
            let text = std::fs::read_to_string(&file).expect("reads");
            assert!(text.contains(from), "{name} lacks {from}");
            std::fs::write(&file, text.replace(from, to)).expect("writes");
            let error = opened().expect_err(expected);
            assert!(error.contains(expected), "{error}");
            std::fs::write(&file, text).expect("writes");
        };
        spoil("index.jsonl", "[2,3,4,6]", "[2,3,4,9]", "positions");
        spoil("index.jsonl", "[2,3,4,6]", "[2,4,3,6]", "positions");
        spoil("index.jsonl", "[2,3,4,6]", "[2,3,4]", "bytes");
        spoil(
            "index.jsonl",
            "\"prompt_tokens\":5",
            "\"prompt_tokens\":9",
            "longer",
        );
        spoil(
            "index.jsonl",
            "\"content_start\":2",
            "\"content_start\":6",
            "longer",
        );
        spoil(
            "manifest.json",
            "\"d_model\": 2",
            "\"d_model\": 0",
            "d_model",
        );
        spoil("manifest.json", "\"format\": 1", "\"format\": 9", "layout");
        spoil(
            "manifest.json",
            "hook_resid_post",
            "hook_nothing",
            "hook_nothing",
        );
        spoil("manifest.json", "\"f32\",\n", "\"f16\",\n", "dtype");
        assert_eq!(opened(), Ok(()));
        let foreign = folder.path().join("foreign");
        std::fs::create_dir(&foreign).expect("creates");
        std::fs::write(foreign.join("thesis.txt"), "mine").expect("writes");
        let error = Folder::open(&foreign, &manifest(1, "f32")).map(|_| ());
        assert!(
            error
                .expect_err("is refused")
                .to_string()
                .contains("not empty")
        );
    }

    #[test]
    fn who_writes_a_folder_is_alone_with_it() {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), &manifest(1, "f32"), 0..1);
        let reader = Collected::open(folder.path()).expect("opens");
        let busy = Folder::open(folder.path(), &manifest(1, "f32")).map(|_| ());
        assert!(
            busy.expect_err("is refused")
                .to_string()
                .contains("another process")
        );
        assert!(Collected::open(folder.path()).is_ok());
        drop(reader);
        assert!(Folder::open(folder.path(), &manifest(1, "f32")).is_ok());
    }

    #[test]
    fn the_engine_is_asked_for_no_more_than_is_kept() {
        use Positions::{EveryGenerated, LastPromptToken, PromptContent};
        let check = |positions: &[Positions], expected| {
            assert_eq!(selection(positions), expected, "{positions:?}");
        };
        check(&[LastPromptToken], PositionSelection::LastPromptToken);
        check(
            &[LastPromptToken, PromptContent],
            PositionSelection::AllPrompt,
        );
        check(
            &[EveryGenerated, LastPromptToken, Positions::Generated(3)],
            PositionSelection::FromLastPromptToken,
        );
        check(&[EveryGenerated, PromptContent], PositionSelection::All);
        check(
            &[PromptContent, LastPromptToken, EveryGenerated],
            PositionSelection::All,
        );
    }
}
