use inwit::engine::*;
use inwit::engine::fold::Folded;
use inwit::engine::sampler::SamplingDraft;
use inwit::model::kernels::*;
use inwit::model::*;
use inwit::policy::Mode;
use inwit::registry::*;
use std::sync::Arc;
use std::time::Instant;
fn main() {
    let t = Instant::now();
    let source = Source::open(std::path::Path::new("/root/models/SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    println!("open {:?}", t.elapsed());
    let f = if std::env::args().nth(1).as_deref() == Some("bf16") { WeightFormat::Bf16 } else { WeightFormat::F32 };
    let model = Model::load(&source, &Placement::cpu(f)).unwrap();
    println!("load {:?} {} MB", t.elapsed(), model.decoder.weight_bytes() / 1000000);
    let (engine, _thread) = Engine::start(model, EngineOptions::default(), Arc::new(inwit::journal::Discard)).unwrap();
    let snapshot = Arc::new(Snapshot::empty());
    for n in [1usize, 4, 16] {
        for prefill in [false, true] {
            let len = if prefill { 400 } else { 8 };
            let max = if prefill { 1 } else { 48 };
            let t = Instant::now();
            let mut all = vec![];
            for i in 0..n {
                let draft = Draft { id: None, model: None, prompt: PromptDraft::Tokens((0..len).map(|k| (k * 37 + i as u32 * 101 + 5 + n as u32) % 40000).collect()), answer: None, score_only: false,
                    sampling: SamplingDraft { max_tokens: Some(max), ..Default::default() }, monitor: MonitorDraft::default(), interventions: vec![], refusal_head: None, capture: None, skip_prefix_cache: true, deadline: None };
                let r = prepare(draft, &engine, &snapshot, &Defaults { mode: Mode::Off, policy: None, max_tokens: 64, overrides: true }).unwrap();
                all.push(engine.submit(r).unwrap());
            }
            let mut tokens = 0;
            for mut e in all { let mut f = Folded::default(); while let Some(ev) = e.blocking_next() { f.take(ev).unwrap(); } tokens += f.token_ids.len(); }
            let d = t.elapsed().as_secs_f64();
            println!("{n} x {len}+{max}: {:.3}s tokens {tokens} -> {:.0} gen tok/s, {:.0} prompt tok/s", d, tokens as f64 / d, (n * len as usize) as f64 / d);
        }
    }
    let draft = Draft { id: None, model: None, prompt: PromptDraft::RawText("<|im_start|>".into()), answer: None, score_only: false, sampling: SamplingDraft { max_tokens: Some(40), ..Default::default() }, monitor: MonitorDraft::default(), interventions: vec![], refusal_head: None, capture: None, skip_prefix_cache: true, deadline: None };
    let mut d2 = draft.clone(); d2.prompt = PromptDraft::RawText("The capital of France is".into());
    let r = prepare(d2, &engine, &snapshot, &Defaults { mode: Mode::Off, policy: None, max_tokens: 64, overrides: true }).unwrap();
    let mut e = engine.submit(r).unwrap(); let mut f = Folded::default(); while let Some(ev) = e.blocking_next() { f.take(ev).unwrap(); }
    println!("{}", f.text);
}
