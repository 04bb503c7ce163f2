//! A model's files as raw material: configuration, tokenizer, template, weights in f32.
//! Knows GGUF files and Hugging Face folders and hides which of them it reads; knows nothing of
//! kernels or requests.
//!
//! Weights are read from open files, not mapped: a file that is replaced meanwhile cannot fault
//! the process, and one that is changed in place is an error.

mod folder;
mod gguf;
mod gguf_model;
mod gguf_tokenizer;
#[cfg(test)]
mod golden;
mod safetensors;
mod stored_type;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::model::kernels::{QUANT_BLOCK, QuantKind, WeightFormat};
use crate::model::{ChatTemplate, ModelConfig, Tokenizer};
use stored_type::AlignedBytes;
pub use stored_type::StoredType;

/// Where a tensor lies in a file, checked against the file's length.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) stored_type: StoredType,
    /// Row-major, outermost first.
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// What says whether a probe fits a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// SHA-256 (hex) over configuration, tokenizer and template; the same model has the same
    /// value in both file formats and at every quantisation.
    pub architecture_id: String,
    /// SHA-256 (hex) of the GGUF file, or over the sorted safetensors files of a folder.
    pub weights_id: String,
}

/// A model's files, opened and checked; tensors are read on request.
#[derive(Debug)]
pub struct Source {
    pub config: ModelConfig,
    pub tokenizer: Tokenizer,
    /// `None` for a model without a chat template: it takes raw text and tokens only.
    pub template: Option<ChatTemplate>,
    pub identity: Identity,
    pub name: String,
    pub path: PathBuf,
    files: Vec<WeightFile>,
    /// By Hugging Face checkpoint name.
    tensors: BTreeMap<String, StoredTensor>,
    asked: Mutex<BTreeSet<String>>,
}

impl Source {
    /// Opens a GGUF file or a Hugging Face folder (`config.json`, safetensors, tokenizer).
    ///
    /// Reads the weights once to hash them; everything but the weights is in memory afterwards.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(|error| Error::file(path.display(), error))?;
        let parts = if kind.is_dir() {
            folder::open(path)?
        } else {
            gguf_model::open(path)?
        };
        Self::assemble(path, parts)
    }

    fn assemble(path: &Path, parts: Parts) -> Result<Self> {
        let Parts {
            config,
            tokenizer,
            template,
            name,
            files,
            tensors,
        } = parts;
        config
            .check()
            .map_err(|message| Error::file(path.display(), message))?;
        tokenizer
            .check_fits(config.vocab_size)
            .map_err(|message| Error::file(path.display(), message))?;
        let identity = Identity {
            architecture_id: architecture_id(&config, &tokenizer, template.as_ref())?,
            weights_id: weights_id(&files)?,
        };
        let mut source = Self {
            config,
            tokenizer,
            template,
            identity,
            name,
            path: path.to_path_buf(),
            files,
            tensors,
            asked: Mutex::default(),
        };
        source.drop_copied_head()?;
        Ok(source)
    }

    /// The tensor's values, dequantised, row-major `[out, in]`, under its Hugging Face name.
    ///
    /// The same for both formats: rotary rows of llama are half-split, gemma3's norm weights
    /// are the multipliers themselves. A tensor that is missing, misshapen or not finite is an
    /// error that names it.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (stored, file) = self.find(name, shape)?;
        let fail = |message| stored.error(file, message);
        let bytes = file.read(&stored.entry)?;
        let stored_type = stored.entry.stored_type;
        let mut values = stored_type.to_f32(bytes.as_slice()).map_err(fail)?;
        if !values.iter().all(|value| value.is_finite()) {
            return Err(fail("it holds values that are not finite".into()));
        }
        stored.adjustment.apply(&mut values, shape).map_err(fail)?;
        self.mark_asked(name);
        Ok(values)
    }

    /// A matrix `[out, in]` in the blocks in which the file holds it, rows in the order of
    /// `tensor`; none where no kernel takes such blocks.
    pub fn blocks(&self, name: &str, shape: [usize; 2]) -> Result<Option<(QuantKind, Vec<u8>)>> {
        let (stored, file) = self.find(name, &shape)?;
        let fail = |message| stored.error(file, message);
        let stored_type = stored.entry.stored_type;
        if stored_type.kernel().is_none() || !shape[1].is_multiple_of(QUANT_BLOCK) {
            return Ok(None);
        }
        let bytes = file.read(&stored.entry)?;
        let Some((kind, mut blocks)) = stored_type.to_blocks(bytes.as_slice()) else {
            return Err(fail("it holds values that are not finite".into()));
        };
        let row = blocks.len() / shape[0].max(1);
        stored
            .adjustment
            .apply_to_rows(&mut blocks, shape[0], row)
            .map_err(fail)?;
        self.mark_asked(name);
        Ok(Some((kind, blocks)))
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(&StoredTensor, &WeightFile)> {
        let stored = self.tensors.get(name).ok_or_else(|| {
            Error::file(self.path.display(), format!("tensor `{name}` is missing"))
        })?;
        let file = &self.files[stored.file];
        if stored.entry.shape != shape {
            let message = format!(
                "its shape is {:?}, the configuration wants {shape:?}",
                stored.entry.shape
            );
            return Err(stored.error(file, message));
        }
        Ok((stored, file))
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    #[cfg(test)]
    fn stored_type(&self, name: &str) -> Option<StoredType> {
        self.tensors
            .get(name)
            .map(|stored| stored.entry.stored_type)
    }

    /// How each matrix is stored; vectors (norms, biases) are computed with in f32 in any case.
    pub fn matrices(&self) -> impl Iterator<Item = StoredType> {
        let matrices = self.tensors.values().filter(|t| t.entry.shape.len() >= 2);
        matrices.map(|stored| stored.entry.stored_type)
    }

    /// Names, as the files spell them, of tensors that nobody asked for.
    ///
    /// A model that ignores part of its checkpoint computes something else than its authors
    /// did, so a loader treats these as an error.
    pub fn unused_tensors(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        self.tensors
            .iter()
            .filter(|(name, _)| !asked.contains(*name))
            .map(|(_, stored)| stored.entry.name.clone())
            .collect()
    }

    /// An error that names the tensors nobody asked for, if there are any.
    pub fn check_all_used(&self) -> Result<()> {
        let unused = self.unused_tensors();
        if unused.is_empty() {
            return Ok(());
        }
        let some = unused.iter().take(4).map(|n| format!("`{n}`"));
        let some = some.collect::<Vec<_>>().join(", ");
        Err(Error::file(
            self.path.display(),
            format!(
                "{} tensors have no place in a {} model, among them {some}; \
                 this variant of the architecture is not supported",
                unused.len(),
                self.config.family
            ),
        ))
    }

    /// What all weights take in memory when they are held as `format`, in bytes.
    pub fn weight_bytes(&self, format: WeightFormat) -> u64 {
        let bytes = |(name, stored): (&String, &StoredTensor)| {
            let elements = stored.entry.shape.iter().product::<usize>() as u64;
            let format = match name.as_str() {
                EMBEDDING | HEAD => format.of_vocabulary(),
                _ => format,
            };
            let blocks_of = match format {
                WeightFormat::AsIs => stored.entry.stored_type.kernel(),
                format => format.rounded_to(),
            };
            match blocks_of {
                Some(kind) => elements / QUANT_BLOCK as u64 * kind.block_bytes() as u64,
                None if format == WeightFormat::Bf16 => 2 * elements,
                None => 4 * elements,
            }
        };
        self.tensors.iter().map(bytes).sum()
    }

    fn mark_asked(&self, name: &str) {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned());
    }

    /// Some checkpoints with tied embeddings store the head again; it must be the same.
    fn drop_copied_head(&mut self) -> Result<()> {
        let (Some(head), Some(embedding), true) = (
            self.tensors.get(HEAD),
            self.tensors.get(EMBEDDING),
            self.config.tied_embeddings,
        ) else {
            return Ok(());
        };
        let shape = [self.config.vocab_size, self.config.d_model];
        let alike = head.entry.stored_type == embedding.entry.stored_type
            && head.entry.shape == shape
            && embedding.entry.shape == shape;
        let hash = |stored: &StoredTensor| self.files[stored.file].hash(&stored.entry);
        if !alike || hash(head)? != hash(embedding)? {
            return Err(Error::file(
                self.path.display(),
                "the configuration ties the head to the embedding, but the file holds a head of its own",
            ));
        }
        self.tensors.remove(HEAD);
        Ok(())
    }
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// What a file format hands over.
struct Parts {
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    name: String,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// A tensor's place, and what makes it equal to the other format's.
#[derive(Debug)]
struct StoredTensor {
    /// Index into `Source::files`.
    file: usize,
    entry: TensorEntry,
    adjustment: Adjustment,
}

/// What is done to a tensor after dequantising it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Adjustment {
    None,
    /// Rows of each head from interleaved rotary pairs to half-split ones.
    SplitRotaryPairs {
        heads: usize,
    },
    /// A norm stored as the difference to one.
    AddOne,
}

impl StoredTensor {
    fn error(&self, file: &WeightFile, message: String) -> Error {
        let message = format!("tensor `{}`: {message}", self.entry.name);
        Error::file(file.path.display(), message)
    }
}

impl Adjustment {
    /// To rows of any kind of block.
    fn apply_to_rows(self, blocks: &mut Vec<u8>, rows: usize, row: usize) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::AddOne => Err("a norm is no matrix".into()),
            Self::SplitRotaryPairs { heads } => {
                check_heads(rows, heads)?;
                *blocks = split_rotary_pairs(blocks, rows / heads, row);
                Ok(())
            }
        }
    }

    fn apply(self, values: &mut Vec<f32>, shape: &[usize]) -> Result<(), String> {
        match self {
            Self::None => {}
            Self::AddOne => values.iter_mut().for_each(|value| *value += 1.0),
            Self::SplitRotaryPairs { heads } => {
                let [rows, columns] = shape else {
                    return Err("rotary rows need two dimensions".into());
                };
                check_heads(*rows, heads)?;
                *values = split_rotary_pairs(values, rows / heads, *columns);
            }
        }
        Ok(())
    }
}

fn check_heads(rows: usize, heads: usize) -> Result<(), String> {
    if heads == 0 || !rows.is_multiple_of(2 * heads) {
        return Err(format!("{rows} rows are not {heads} heads of pairs"));
    }
    Ok(())
}

/// Within each head, row `2 i + s` goes to row `s * head_dim / 2 + i`.
fn split_rotary_pairs<T: Clone>(values: &[T], head_dim: usize, columns: usize) -> Vec<T> {
    let mut split = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = (2 * pair + half) * columns;
                split.extend_from_slice(&head[row..row + columns]);
            }
        }
    }
    split
}

/// An open file of weights and how it looked when it was opened.
#[derive(Debug)]
struct WeightFile {
    path: PathBuf,
    file: Mutex<File>,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl WeightFile {
    fn open(path: &Path) -> Result<Self> {
        let fail = |error| Error::file(path.display(), error);
        // Before opening: a pipe would wait for a writer.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::file(path.display(), "not a regular file"));
        }
        let file = File::open(path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        Ok(Self {
            path: path.to_path_buf(),
            file: Mutex::new(file),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }

    /// Runs `read` over the file from its start.
    fn rewound<T>(&self, read: impl FnOnce(&mut File) -> Result<T, String>) -> Result<T> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(0))
            .map_err(|error| error.to_string())
            .and_then(|_| read(&mut file))
            .map_err(|message| Error::file(self.path.display(), message))
    }

    /// SHA-256 of a tensor's bytes, which are never in memory at once.
    fn hash(&self, entry: &TensorEntry) -> Result<[u8; 32]> {
        let mut hasher = Sha256::new();
        self.rewound(|file| {
            let of_file = |error: std::io::Error| format!("tensor `{}`: {error}", entry.name);
            file.seek(SeekFrom::Start(entry.offset)).map_err(of_file)?;
            let mut left = entry.bytes;
            let mut buffer = vec![0; 1 << 20];
            while left > 0 {
                let next = left.min(buffer.len() as u64) as usize;
                file.read_exact(&mut buffer[..next]).map_err(of_file)?;
                hasher.update(&buffer[..next]);
                left -= next as u64;
            }
            Ok(())
        })?;
        Ok(hasher.finalize().into())
    }

    fn read(&self, entry: &TensorEntry) -> Result<AlignedBytes> {
        let fail = |message: String| {
            Error::file(
                self.path.display(),
                format!("tensor `{}`: {message}", entry.name),
            )
        };
        let length = usize::try_from(entry.bytes).map_err(|e| fail(e.to_string()))?;
        let mut bytes = AlignedBytes::zeroed(length).map_err(fail)?;
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(entry.offset))
            .and_then(|_| file.read_exact(bytes.as_mut_slice()))
            .map_err(|error| fail(error.to_string()))?;
        let now = file.metadata().map_err(|error| fail(error.to_string()))?;
        if now.len() != self.bytes || now.modified().ok() != self.modified {
            return Err(Error::file(
                self.path.display(),
                "the file changed while it was being loaded; replace model files by renaming, then start again",
            ));
        }
        Ok(bytes)
    }
}

fn weights_id(files: &[WeightFile]) -> Result<String> {
    let mut hasher = Sha256::new();
    for weights in files {
        weights.rewound(|file| {
            let mut buffer = vec![0; 1 << 20];
            loop {
                match file.read(&mut buffer).map_err(|error| error.to_string())? {
                    0 => return Ok(()),
                    count => hasher.update(&buffer[..count]),
                }
            }
        })?;
    }
    Ok(hex::encode(hasher.finalize()))
}

fn architecture_id(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<String> {
    let template = template.map_or_else(|| "none".to_owned(), ChatTemplate::hash);
    let parts = [config.canonical(), tokenizer.fingerprint()?, template];
    Ok(hex::encode(Sha256::digest(parts.join("\n"))))
}

/// Reads a small text file, refusing one larger than `most` bytes before it is read.
fn read_capped(path: &Path, most: u64) -> Result<Vec<u8>> {
    let fail = |error: std::io::Error| Error::file(path.display(), error);
    let file = File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > most {
        return Err(Error::file(
            path.display(),
            format!("larger than the {most} bytes allowed for such a file"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rotary_rows_become_halves() {
        // Two heads of four rows with one column; rows are numbered as they are stored.
        let stored = [0., 1., 2., 3., 10., 11., 12., 13.];
        let split = split_rotary_pairs(&stored, 4, 1);
        assert_eq!(split, [0., 2., 1., 3., 10., 12., 11., 13.]);
        let mut values = stored.to_vec();
        let heads = Adjustment::SplitRotaryPairs { heads: 3 };
        assert!(heads.apply(&mut values, &[8, 1]).is_err());
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights");
        std::fs::write(&path, [1u8; 64]).expect("a file");
        let file = WeightFile::open(&path).expect("a file");
        let entry = TensorEntry {
            name: "w".into(),
            stored_type: StoredType::F32,
            shape: vec![8],
            offset: 0,
            bytes: 32,
        };
        assert_eq!(file.read(&entry).expect("bytes").as_slice(), [1u8; 32]);
        std::fs::write(&path, [1u8; 48]).expect("a shorter file");
        let error = file.read(&entry).err().expect("changed").to_string();
        assert!(error.contains("changed while"), "{error}");
        std::fs::write(&path, [1u8; 8]).expect("a much shorter file");
        assert!(file.read(&entry).is_err());
    }

    #[test]
    fn what_is_no_model_is_refused_with_its_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = folder.path().join("notes.txt");
        std::fs::write(&text, "hello").expect("a file");
        for path in [
            folder.path().join("nothing"),
            text,
            folder.path().to_path_buf(),
        ] {
            match Source::open(&path) {
                Err(Error::File { file, .. }) => {
                    assert!(file.contains(&*folder.path().to_string_lossy()))
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_source_can_be_read_by_several_threads() {
        fn check<T: Send + Sync>() {}
        check::<Source>();
    }
}
