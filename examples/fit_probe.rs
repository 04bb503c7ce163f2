//! How do I fit a probe? From states of labelled texts to a probe that scores a new one.
//!
//! `cargo run --example fit_probe [MODEL]`, where MODEL is a GGUF file or a Hugging Face folder.
//! For real data use `inwit probe fit`: it also calibrates on held-out prompts and keeps a record.

#![allow(clippy::print_stdout)] // An example speaks to its reader.

use std::path::PathBuf;

use inwit::hooks::{HookPlan, HookRun, Site};
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::model::{Batch, Decoder, KvCache, Placement, Source, SpecialText};
use inwit_probes::fit::{FitData, LogisticParams, fit_logistic};
use inwit_probes::{Kind, Manifest, ModelIdentity, Positions, Probe};
use ndarray::Array2;

const TINY: &str = "tests/golden/llama/hf";
const SITE: Site = Site::ResidPost(0);

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| TINY.into());
    let source = Source::open(&PathBuf::from(model))?;
    let decoder = Decoder::load(&source, &Placement::cpu(WeightFormat::F32))?;
    let d_model = decoder.config().d_model;

    // Does the text end in a question? Sixteen texts, read at their last token.
    let subjects = [
        "the river",
        "a ship",
        "this road",
        "our house",
        "bread",
        "her letter",
        "the hill",
        "rain",
    ];
    let (mut states, mut y, mut group) = (Vec::new(), Vec::new(), Vec::new());
    for subject in subjects {
        for (text, label) in [
            (format!("Where is {subject}?"), true),
            (format!("Here is {subject}."), false),
        ] {
            states.extend(last_state(&source, &decoder, &text)?);
            y.push(label);
            // Both texts about one subject are one piece of evidence.
            group.push(subject.to_owned());
        }
    }
    let x = Array2::from_shape_vec((y.len(), d_model), states)?;
    let fit = fit_logistic(&FitData { x, y, group }, SITE, &LogisticParams::default())?;

    let identity = ModelIdentity {
        name: source.name.clone(),
        architecture_id: source.identity.architecture_id.clone(),
        weights_id: source.identity.weights_id.clone(),
        weight_format: "f32".into(),
    };
    let manifest = Manifest::new(
        "question",
        Kind::Logistic,
        d_model,
        Positions::LastPromptToken,
        identity,
    );
    let probe = Probe::new(manifest, vec![fit.head], None)?;
    for text in ["Where is the lamp?", "Here is the lamp."] {
        let state = last_state(&source, &decoder, text)?;
        // A logit. It becomes a probability by a calibration on rows that the fit never saw.
        println!("{text:20} {:+.2}", probe.score_row(|_| &state)?.logit);
    }
    Ok(())
}

/// The hidden state of a text's last token at `SITE`: `[d_model]`.
fn last_state(source: &Source, decoder: &Decoder, text: &str) -> anyhow::Result<Vec<f32>> {
    let tokens = source.tokenizer.encode(text, SpecialText::AsText)?;
    let mut kv = KvCache::new(decoder.config(), KvType::F32, 8, decoder.placement())?;
    let mut batch = Batch::default();
    batch.push(&tokens, 0, (0..8).collect());
    let mut plan = HookPlan::new(decoder.config().n_layers);
    plan.capture(SITE, 0, tokens.len() - 1..tokens.len());
    let mut run = HookRun::new(&plan, tokens.len());
    decoder.forward(&batch, &mut kv, &mut run)?;
    Ok(run.finish()?.captured.remove(0).values)
}
