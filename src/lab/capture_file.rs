//! Writes captured hidden states to a safetensors file of any length in constant memory.
//! Knows rows, sites and positions; knows no engine.
//!
//! One tensor `[rows, d_model]` per site, named by the site, rows in input order, then position;
//! int64 `index.sequence` (which of `ids`), `index.position` and `index.token`, each `[rows]`;
//! the ids as a JSON list under `ids` in the metadata.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use inwit_probes::Site;
use serde_json::{Map, Value, json};

use super::output::WholeFile;
use super::states::RowStates;
use crate::error::{Error, Result};

/// The element type of the captured states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
        }
    }

    pub(super) fn write(self, values: &[f32], out: &mut impl Write) -> std::io::Result<()> {
        match self {
            Self::F32 => values
                .iter()
                .try_for_each(|value| out.write_all(&value.to_le_bytes())),
            Self::Bf16 => values
                .iter()
                .try_for_each(|value| out.write_all(&bf16::from_f32(*value).to_le_bytes())),
        }
    }

    pub(super) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// A capture file under way. Rows wait in nameless files, since a header needs their number.
pub struct CaptureFile {
    path: PathBuf,
    /// Opened first, so that a place that cannot be written fails before any work is done.
    file: WholeFile,
    dtype: Dtype,
    d_model: usize,
    sites: Vec<(Site, BufWriter<File>)>,
    ids: Vec<String>,
    sequences: Vec<i64>,
    positions: Vec<i64>,
    tokens: Vec<i64>,
}

impl CaptureFile {
    pub fn create(path: &Path, sites: &[Site], d_model: usize, dtype: Dtype) -> Result<Self> {
        let spool = |site: &Site| {
            let file = tempfile::tempfile().map_err(|error| unwritten(path, &error))?;
            Ok((*site, BufWriter::new(file)))
        };
        Ok(Self {
            path: path.to_owned(),
            file: WholeFile::create(path)?,
            dtype,
            d_model,
            sites: sites.iter().map(spool).collect::<Result<_>>()?,
            ids: Vec::new(),
            sequences: Vec::new(),
            positions: Vec::new(),
            tokens: Vec::new(),
        })
    }

    /// Appends the states of one input row; it may have none.
    pub fn push(&mut self, id: &str, states: &RowStates) -> Result<()> {
        if states.values.len() != self.sites.len() {
            return Err(Error::internal("a row lacks a site of the capture file"));
        }
        for ((_, spool), values) in self.sites.iter_mut().zip(&states.values) {
            self.dtype
                .write(values, spool)
                .map_err(|error| unwritten(&self.path, &error))?;
        }
        let sequence = self.ids.len() as i64;
        self.sequences
            .extend(states.positions.iter().map(|_| sequence));
        self.positions
            .extend(states.positions.iter().map(|p| i64::from(*p)));
        self.tokens
            .extend(states.tokens.iter().map(|t| i64::from(*t)));
        self.ids.push(id.to_owned());
        Ok(())
    }

    /// The rows so far, over all sequences.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Writes header and tensors and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        let header = self.header()?;
        self.file.bytes(&(header.len() as u64).to_le_bytes())?;
        self.file.bytes(&header)?;
        for index in [&self.positions, &self.sequences, &self.tokens] {
            self.file.bytes(&le_bytes(index))?;
        }
        for (_, spool) in self.sites {
            let mut spool = spool
                .into_inner()
                .map_err(|error| unwritten(&self.path, error.error()))?;
            spool
                .rewind()
                .map_err(|error| unwritten(&self.path, &error))?;
            let mut piece = vec![0; 1 << 20];
            loop {
                let read = spool
                    .read(&mut piece)
                    .map_err(|error| unwritten(&self.path, &error))?;
                if read == 0 {
                    break;
                }
                self.file.bytes(&piece[..read])?;
            }
        }
        self.file.finish()
    }

    /// A safetensors header, padded so that every tensor is aligned to its elements.
    fn header(&self) -> Result<Vec<u8>> {
        let rows = self.rows();
        let mut header = Map::new();
        let ids = serde_json::to_string(&self.ids).map_err(Error::internal)?;
        header.insert("__metadata__".into(), json!({ "ids": ids }));
        let mut offset = 0;
        let mut tensor = |name: &str, dtype: &str, shape: &[usize], size: usize| {
            let end = offset + shape.iter().product::<usize>() * size;
            let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
            header.insert(name.to_owned(), info);
            offset = end;
        };
        for name in ["index.position", "index.sequence", "index.token"] {
            tensor(name, "I64", &[rows], 8);
        }
        for (site, _) in &self.sites {
            let shape = [rows, self.d_model];
            tensor(
                &site.to_string(),
                self.dtype.name(),
                &shape,
                self.dtype.size(),
            );
        }
        let mut header = serde_json::to_vec(&Value::Object(header)).map_err(Error::internal)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(header)
    }
}

fn le_bytes(values: &[i64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn unwritten(path: &Path, error: &std::io::Error) -> Error {
    Error::file(
        path.display(),
        format!("cannot be written: {error}; free some space"),
    )
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn site(name: &str) -> Site {
        name.parse().expect("a site")
    }

    fn states(first: u32, tokens: &[u32], starts: [f32; 2]) -> RowStates {
        let values = |start: f32| (0..tokens.len() * 2).map(|i| start + i as f32).collect();
        RowStates {
            positions: (first..).take(tokens.len()).collect(),
            tokens: tokens.to_vec(),
            values: starts.map(values).to_vec(),
        }
    }

    const EARLY: &str = "blocks.0.hook_resid_post";
    const LATE: &str = "blocks.1.hook_resid_post";

    fn written(dtype: Dtype) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("activations.safetensors");
        let sites = [site(LATE), site(EARLY)];
        let mut file = CaptureFile::create(&path, &sites, 2, dtype).expect("creates");
        let first = states(0, &[10, 20, 30], [20.0, 10.0]);
        file.push("first", &first).expect("pushes");
        file.push("nothing", &states(0, &[], [0.0, 0.0]))
            .expect("pushes");
        file.push("last", &states(5, &[40], [2.0, 1.0]))
            .expect("pushes");
        assert_eq!(file.rows(), 4);
        file.finish().expect("finishes");
        std::fs::read(&path).expect("reads")
    }

    fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
        let data = file.tensor(name).expect("is there").data().to_vec();
        data.chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")))
            .collect()
    }

    #[test]
    fn a_capture_file_is_read_back_by_any_safetensors_reader() {
        let bytes = written(Dtype::F32);
        let file = SafeTensors::deserialize(&bytes).expect("parses");
        assert_eq!(integers(&file, "index.sequence"), [0, 0, 0, 2]);
        assert_eq!(integers(&file, "index.position"), [0, 1, 2, 5]);
        assert_eq!(integers(&file, "index.token"), [10, 20, 30, 40]);
        let early = file.tensor(EARLY).expect("is there");
        assert_eq!(early.shape(), [4, 2]);
        let values: Vec<f32> = early
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")))
            .collect();
        assert_eq!(values, [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 1.0, 2.0]);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("reads");
        let ids = &metadata.metadata().as_ref().expect("metadata")["ids"];
        assert_eq!(ids, r#"["first","nothing","last"]"#);
    }

    #[test]
    fn bf16_halves_the_states_and_keeps_their_shape() {
        let bytes = written(Dtype::Bf16);
        let file = SafeTensors::deserialize(&bytes).expect("parses");
        let late = file.tensor(LATE).expect("is there");
        assert_eq!((late.shape(), late.data().len()), (&[4, 2][..], 16));
    }

    #[test]
    fn the_same_states_give_the_same_bytes() {
        assert_eq!(written(Dtype::F32), written(Dtype::F32));
    }

    #[test]
    fn a_row_without_one_of_the_sites_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.safetensors");
        let mut file = CaptureFile::create(&path, &[site(EARLY)], 2, Dtype::F32).expect("creates");
        assert!(file.push("a", &states(0, &[1], [0.0, 1.0])).is_err());
    }
}
