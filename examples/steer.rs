//! How do I steer? The same prompt, answered without and with a vector added to the residual stream.
//!
//! `cargo run --example steer [MODEL]`, where MODEL is a GGUF file or a Hugging Face folder.

#![allow(clippy::print_stdout)] // An example speaks to its reader.

use std::path::PathBuf;
use std::sync::Arc;

use inwit::engine::fold::Folded;
use inwit::engine::sampler::SamplingDraft;
use inwit::engine::{
    Defaults, Draft, Engine, EngineOptions, InterventionDraft, InterventionKindDraft, Model,
    PositionSelection, PromptDraft, VectorDraft, prepare,
};
use inwit::journal::Discard;
use inwit::model::kernels::WeightFormat;
use inwit::model::{Placement, Source};
use inwit::policy::Mode;
use inwit::registry::Snapshot;

const TINY: &str = "tests/golden/llama/hf";

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| TINY.into());
    let source = Source::open(&PathBuf::from(model))?;
    let model = Model::load(&source, &Placement::cpu(WeightFormat::F32))?;
    let (engine, thread) = Engine::start(model, EngineOptions::default(), Arc::new(Discard))?;

    println!("as it is: {:?}", answer(&engine, Vec::new())?);
    // Any vector of the model's width will do; one that means something is fitted, e.g. by
    // `inwit lab vector`.
    let d_model = engine.info().config.d_model;
    let vector = (0..d_model)
        .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    let steer = InterventionDraft {
        vector: VectorDraft::Value(vector),
        site: Some("blocks.0.hook_resid_post".into()),
        kind: InterventionKindDraft::Add,
        strength: Some(2.0),
        positions: PositionSelection::All,
        condition: None,
    };
    println!("steered:  {:?}", answer(&engine, vec![steer])?);

    drop(engine);
    thread.join();
    Ok(())
}

fn answer(engine: &Engine, interventions: Vec<InterventionDraft>) -> anyhow::Result<String> {
    let draft = Draft {
        sampling: SamplingDraft {
            max_tokens: Some(12),
            ..SamplingDraft::default()
        },
        interventions,
        ..Draft::of(PromptDraft::RawText("The river was".into()))
    };
    let defaults = Defaults {
        mode: Mode::Off,
        policy: None,
        max_tokens: 64,
        overrides: true,
    };
    // No probes, no policies: a snapshot of an empty library.
    let request = prepare(draft, engine, &Arc::new(Snapshot::empty()), &defaults)?;
    let mut events = engine.submit(request)?;
    let mut folded = Folded::default();
    while let Some(event) = events.blocking_next() {
        folded.take(event)?;
    }
    Ok(folded.text)
}
