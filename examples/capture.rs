//! How do I read hidden states? One pass over a text, in process.
//!
//! `cargo run --example capture [MODEL] [SITE]`, where MODEL is a GGUF file or a Hugging Face folder.

#![allow(clippy::print_stdout)] // An example speaks to its reader.

use std::path::PathBuf;

use inwit::hooks::{HookPlan, HookRun, Site};
use inwit::model::kernels::{KV_BLOCK, KvType, WeightFormat};
use inwit::model::{Batch, Decoder, KvCache, Placement, Source, SpecialText};

const TINY: &str = "tests/golden/llama/hf";
const TEXT: &str = "The river was quiet that evening.";

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = PathBuf::from(args.next().unwrap_or_else(|| TINY.into()));
    let site: Site = match args.next() {
        Some(name) => name.parse()?,
        None => Site::ResidPost(1),
    };

    let source = Source::open(&model)?;
    let decoder = Decoder::load(&source, &Placement::cpu(WeightFormat::F32))?;
    site.check(decoder.config().n_layers)?;
    let tokens = source.tokenizer.encode(TEXT, SpecialText::AsText)?;

    // Keys and values live in blocks that the caller hands out; one sequence needs these.
    let blocks = tokens.len().div_ceil(KV_BLOCK);
    let mut kv = KvCache::new(decoder.config(), KvType::F32, blocks, decoder.placement())?;
    let mut batch = Batch::default();
    batch.push(&tokens, 0, (0..blocks as u32).collect());

    // What to read: every row, at one site. The key comes back with the states.
    let mut plan = HookPlan::new(decoder.config().n_layers);
    plan.capture(site, 0, 0..tokens.len());
    let mut run = HookRun::new(&plan, tokens.len());
    decoder.forward(&batch, &mut kv, &mut run)?;

    for captured in run.finish()?.captured {
        let d_model = decoder.config().d_model;
        println!(
            "{}: {} rows of {d_model}",
            captured.site,
            captured.rows.len()
        );
        for (token, state) in tokens.iter().zip(captured.values.chunks_exact(d_model)) {
            let length = state.iter().map(|x| x * x).sum::<f32>().sqrt();
            println!(
                "token {token:6}  |h| = {length:8.3}  h = {:.3?} …",
                &state[..4]
            );
        }
    }
    Ok(())
}
