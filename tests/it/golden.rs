//! The model against Hugging Face transformers: every site, logits and greedy tokens, for every
//! family and both file formats, by the reference files of `tests/golden`.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use inwit::hooks::{HookPlan, HookRun, Site};
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::model::{Batch, Decoder, KvCache, Placement, Source, SpecialText};

/// What README.md of `tests/golden` asks for on the default model; the tiny models get the
/// stricter bound that it recommends.
const TOLERANCE: f32 = 1e-3;
const TINY_TOLERANCE: f32 = 1e-4;
const COSINE: f64 = 0.9999;

pub(crate) fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

/// The reference numbers of one file.
struct Reference(candle_core::safetensors::MmapedSafetensors);

impl Reference {
    #[allow(unsafe_code)]
    fn open(path: &str) -> Self {
        // SAFETY: the reference files are part of the checkout and nobody writes to them.
        Self(unsafe { candle_core::safetensors::MmapedSafetensors::new(golden(path)) }.unwrap())
    }

    fn has(&self, name: &str) -> bool {
        self.0.get(name).is_ok()
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.0.load(name, &Device::Cpu).unwrap()
    }

    fn floats(&self, name: &str) -> Vec<Vec<f32>> {
        let tensor = self.tensor(name).to_dtype(DType::F32).unwrap();
        if tensor.rank() == 1 {
            return vec![tensor.to_vec1().unwrap()];
        }
        tensor.to_vec2().unwrap()
    }

    fn integers(&self, name: &str) -> Vec<u32> {
        let values: Vec<i64> = self.tensor(name).flatten_all().unwrap().to_vec1().unwrap();
        values.iter().map(|value| *value as u32).collect()
    }
}

/// One sequence alone on a decoder.
struct Alone<'a> {
    decoder: &'a Decoder,
    kv: KvCache,
    blocks: Vec<u32>,
    seen: usize,
}

impl<'a> Alone<'a> {
    fn new(decoder: &'a Decoder) -> Self {
        let kv = KvCache::new(decoder.config(), KvType::F32, 16, decoder.placement()).unwrap();
        Self {
            decoder,
            kv,
            blocks: (0..16).rev().collect(),
            seen: 0,
        }
    }

    /// Hidden states after the final norm, and what was captured at each site.
    fn feed(&mut self, tokens: &[u32], sites: &[Site]) -> (Tensor, Vec<(Site, Vec<f32>)>) {
        let mut batch = Batch::default();
        batch.push(tokens, self.seen, self.blocks.clone());
        let mut plan = HookPlan::new(self.decoder.config().n_layers);
        for site in sites {
            plan.capture(*site, 0, 0..tokens.len());
        }
        let mut run = HookRun::new(&plan, tokens.len());
        let hidden = self
            .decoder
            .forward(&batch, &mut self.kv, &mut run)
            .unwrap();
        self.seen += tokens.len();
        let captured = run.finish().expect("scores").captured;
        (
            hidden,
            captured.into_iter().map(|c| (c.site, c.values)).collect(),
        )
    }

    fn last_logits(&self, hidden: &Tensor) -> Vec<f32> {
        let last = hidden.dim(0).unwrap() - 1;
        self.decoder.logits(hidden, &[last], &[]).unwrap()
    }
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = got
        .iter()
        .zip(expected)
        .fold(0f32, |m, (g, e)| m.max((g - e).abs()));
    assert!(
        worst <= tolerance * largest,
        "{what}: relative error {}",
        worst / largest
    );
    let cosine = cosine(got, expected);
    assert!(cosine >= COSINE, "{what}: cosine {cosine}");
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

fn check(model: &str, reference: &str, placement: &Placement) {
    let source = Source::open(&golden(model)).unwrap();
    let decoder = Decoder::load(&source, placement).unwrap();
    check_decoder(&decoder, &Reference::open(reference), TINY_TOLERANCE, model);
}

fn check_decoder(decoder: &Decoder, reference: &Reference, tolerance: f32, model: &str) {
    let width = decoder.config().d_model;
    let mut compared = 0;
    for prompt in (0..4).filter(|p| reference.has(&format!("p{p}.tokens"))) {
        let tokens = reference.integers(&format!("p{prompt}.tokens"));
        let positions = reference.integers(&format!("p{prompt}.positions"));
        let sites: Vec<Site> = Site::all(decoder.config().n_layers).collect();
        let mut alone = Alone::new(decoder);
        let (hidden, captured) = alone.feed(&tokens, &sites);
        assert_eq!(
            captured.len(),
            sites.len(),
            "{model}: a site was not visited"
        );
        for (site, values) in &captured {
            let name = format!("p{prompt}.{site}");
            if !reference.has(&name) {
                let needed = matches!(site, Site::ResidPost(_) | Site::FinalNorm);
                assert!(!needed, "{model}: the reference lacks {name}");
                continue;
            }
            for (row, position) in reference.floats(&name).iter().zip(&positions) {
                let got = &values[*position as usize * width..][..width];
                assert_close(got, row, tolerance, &format!("{model} {name}@{position}"));
                compared += 1;
            }
        }
        check_logits(
            decoder, reference, prompt, &hidden, &positions, tolerance, model,
        );
        check_greedy(&mut alone, reference, prompt, hidden, tolerance, model);
    }
    assert!(compared > 0, "{model}: nothing was compared");
}

fn check_logits(
    decoder: &Decoder,
    reference: &Reference,
    prompt: usize,
    hidden: &Tensor,
    positions: &[u32],
    tolerance: f32,
    model: &str,
) {
    let picked: Vec<usize> = positions.iter().map(|p| *p as usize).collect();
    let logits = decoder.logits(hidden, &picked, &[]).unwrap();
    let vocab = decoder.config().vocab_size;
    if reference.has(&format!("p{prompt}.logits")) {
        let rows = reference.floats(&format!("p{prompt}.logits"));
        for (got, row) in logits.chunks_exact(vocab).zip(rows) {
            assert_close(got, &row, tolerance, &format!("{model} p{prompt}.logits"));
        }
        return;
    }
    let ids = reference.integers(&format!("p{prompt}.top_ids"));
    let rows = reference.floats(&format!("p{prompt}.top_logits"));
    for ((got, row), ids) in logits
        .chunks_exact(vocab)
        .zip(&rows)
        .zip(ids.chunks(rows[0].len()))
    {
        let got: Vec<f32> = ids.iter().map(|id| got[*id as usize]).collect();
        assert_close(
            &got,
            row,
            tolerance,
            &format!("{model} p{prompt}.top_logits"),
        );
    }
}

/// Greedy tokens equal up to the first step whose two best logits are closer than the tolerance.
fn check_greedy(
    alone: &mut Alone<'_>,
    reference: &Reference,
    prompt: usize,
    mut hidden: Tensor,
    tolerance: f32,
    model: &str,
) {
    let expected = reference.integers(&format!("p{prompt}.greedy"));
    let margins = &reference.floats(&format!("p{prompt}.greedy_margin"))[0];
    for (step, (expected, margin)) in expected.iter().zip(margins).enumerate() {
        let logits = alone.last_logits(&hidden);
        let largest = logits.iter().fold(0f32, |m, v| m.max(v.abs()));
        if *margin < 2.0 * tolerance * largest {
            assert!(step > 0, "{model} p{prompt}: no greedy step is decidable");
            return;
        }
        assert_eq!(
            argmax(&logits),
            *expected,
            "{model} p{prompt} greedy step {step}"
        );
        hidden = alone.feed(&[*expected], &[]).0;
    }
}

const FILES: &[(&str, &str)] = &[
    ("llama/hf", "llama/reference.safetensors"),
    ("llama/model.gguf", "llama/reference.safetensors"),
    ("llama/model-q8_0.gguf", "llama/reference_q8_0.safetensors"),
    (
        "llama/model-mixed.gguf",
        "llama/reference_mixed.safetensors",
    ),
    ("llama3/hf", "llama3/reference.safetensors"),
    ("llama3/model.gguf", "llama3/reference.safetensors"),
    ("qwen2/hf", "qwen2/reference.safetensors"),
    ("qwen2/model.gguf", "qwen2/reference.safetensors"),
    ("qwen3/hf", "qwen3/reference.safetensors"),
    ("qwen3/model.gguf", "qwen3/reference.safetensors"),
    ("gemma3/hf", "gemma3/reference.safetensors"),
    ("gemma3/model.gguf", "gemma3/reference.safetensors"),
];

#[test]
fn every_family_agrees_with_the_reference_at_every_site_from_both_formats() {
    for (model, reference) in FILES {
        check(model, reference, &Placement::cpu(WeightFormat::F32));
    }
}

#[test]
fn the_tensor_path_of_other_devices_agrees_with_the_reference_too() {
    for (model, reference) in FILES {
        let placement = Placement {
            portable: true,
            ..Placement::cpu(WeightFormat::F32)
        };
        check(model, reference, &placement);
    }
}

#[test]
fn k_quants_agree_with_their_dequantised_reference() {
    let gguf: Vec<PathBuf> = std::fs::read_dir(golden("kquants"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    assert!(!gguf.is_empty());
    for path in gguf {
        let name = path.file_name().unwrap().to_str().unwrap();
        let reference = match name
            .strip_prefix("model-")
            .and_then(|n| n.strip_suffix(".gguf"))
        {
            Some(format) => format!("kquants/reference_{format}.safetensors"),
            None => "kquants/reference.safetensors".to_owned(),
        };
        let model = format!("kquants/{name}");
        check(&model, &reference, &Placement::cpu(WeightFormat::F32));
    }
}

fn check_near(decoder: &Decoder, reference: &Reference, least: f64, model: &str) {
    let width = decoder.config().d_model;
    let sites: Vec<Site> = Site::all(decoder.config().n_layers).collect();
    let mut compared = 0;
    for prompt in (0..4).filter(|p| reference.has(&format!("p{p}.tokens"))) {
        let tokens = reference.integers(&format!("p{prompt}.tokens"));
        let positions = reference.integers(&format!("p{prompt}.positions"));
        let (_, captured) = Alone::new(decoder).feed(&tokens, &sites);
        for (site, values) in &captured {
            let name = format!("p{prompt}.{site}");
            if !reference.has(&name) {
                continue;
            }
            for (row, position) in reference.floats(&name).iter().zip(&positions) {
                let got = &values[*position as usize * width..][..width];
                let cosine = cosine(got, row);
                assert!(
                    cosine >= least,
                    "{model} {name}@{position}: cosine {cosine}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "{model}: nothing was compared");
}

#[test]
fn weights_of_few_bits_are_those_of_the_file_and_stay_near_its_reference() {
    let path = default_model();
    let reference = Reference::open("smollm2/reference.safetensors");
    let source = Source::open(&path).unwrap();
    let decoder = Decoder::load(&source, &Placement::cpu(WeightFormat::AsIs)).unwrap();
    assert_eq!(decoder.weights_held_as(), "q4_1+q8_0");
    // Every row at every layer; what may be chosen automatically must keep it on the mean.
    check_near(&decoder, &reference, 0.999, "as it is held");
}

#[test]
fn the_default_model_agrees_with_the_reference() {
    let source = Source::open(&default_model()).unwrap();
    let decoder = Decoder::load(&source, &Placement::cpu(WeightFormat::F32)).unwrap();
    let reference = Reference::open("smollm2/reference.safetensors");
    check_decoder(&decoder, &reference, TOLERANCE, "smollm2");
}

#[test]
fn the_default_model_has_the_token_ids_of_the_reference() {
    let source = Source::open(&default_model()).unwrap();
    let tokens = std::fs::read(golden("smollm2/tokens.json")).unwrap();
    let tokens: serde_json::Value = serde_json::from_slice(&tokens).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        let ids = value.as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let mut compared = 0;
    for string in tokens["strings"].as_array().unwrap() {
        let text = string["text"].as_str().unwrap();
        for (field, special) in [
            ("as_text", SpecialText::AsText),
            ("as_special", SpecialText::AsTokens),
        ] {
            let got = source.tokenizer.encode(text, special).unwrap();
            assert_eq!(got, ids(&string[field]), "{text:?} {field}");
            compared += 1;
        }
    }
    assert!(compared > 50, "{compared} strings");
}

/// The file that `inwit pull` fetches; without network one line says what to run.
pub(crate) fn default_model() -> PathBuf {
    let fetched = inwit::model::pull::resolve(
        inwit::model::pull::DEFAULT_MODEL,
        inwit::model::pull::progress().as_ref(),
    );
    match fetched {
        Ok(path) => path,
        Err(error) => panic!("run `cargo run --release -- pull` first: {error}"),
    }
}
