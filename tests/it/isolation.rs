//! Isolated: what a request gets does not depend on its company, on how its prompt was cut into
//! chunks, or on what lay in the cache; and monitoring alone changes nothing.

use inwit::engine::sampler::SamplingDraft;
use inwit::engine::{
    ConditionDraft, Draft, InterventionDraft, InterventionKindDraft, PositionSelection,
};
use inwit::error::Error;
use inwit::hooks::Site;
use inwit::model::kernels::{KvType, WeightFormat};
use inwit::policy::Mode;

use crate::support::{FAMILIES, GEMMA, LLAMA, Rig, Setup, Written, add, draft, prompt, push};

const LENGTHS: [usize; 16] = [
    1, 200, 2, 16, 17, 33, 5, 64, 65, 100, 31, 128, 8, 48, 150, 199,
];

fn sampled(mut draft: Draft, seed: u64) -> Draft {
    draft.sampling = SamplingDraft {
        temperature: Some(0.9),
        top_p: Some(0.95),
        repetition_penalty: Some(1.1),
        presence_penalty: Some(0.2),
        seed: Some(seed),
        ..draft.sampling
    };
    draft
}

fn conditional(kind: InterventionKindDraft, strength: Option<f32>) -> InterventionDraft {
    InterventionDraft {
        // The probe `early` reads the embedding: above 0 on some rows only.
        condition: Some(ConditionDraft {
            detector: "early".into(),
            above: 0.0,
        }),
        ..push(kind, strength, PositionSelection::All)
    }
}

/// One of each kind of company, by its place.
fn guest(place: usize) -> Draft {
    use InterventionKindDraft::{ClampAbove, ClampBelow, ProjectOut};
    use PositionSelection::{All, AllPrompt, Generated, LastPromptToken};
    let plain = draft(prompt(place as u64 % 5, LENGTHS[place]));
    let watched = plain.clone().monitored(Mode::Shadow, "watch");
    let enforced = |policy| plain.clone().monitored(Mode::Enforce, policy);
    match place {
        0 => plain,
        1 | 15 => watched,
        2 => enforced("watch"),
        3 => watched.steered(add(2.0, All)),
        4 => plain.steered(push(ProjectOut, None, AllPrompt)),
        5 => watched.steered(push(ClampAbove, Some(-3.0), Generated)),
        6 => plain.steered(push(ClampBelow, Some(12.0), LastPromptToken)),
        7 => plain.steered(conditional(InterventionKindDraft::Add, Some(4.0))),
        8 => Draft {
            refusal_head: Some("refusing".into()),
            ..watched
        },
        9 => enforced("refuses"),
        10 => sampled(enforced("head-late"), 3),
        11 => enforced("steers-late"),
        12 => sampled(plain, 1),
        13 => sampled(watched.steered(conditional(ProjectOut, None)), 2),
        _ => enforced("aborts"),
    }
}

fn guests() -> impl Iterator<Item = Draft> {
    (0..LENGTHS.len()).map(guest)
}

/// What each guest gets alone: one at a time, no cache, its prompt in one piece.
fn alone(setup: Setup) -> Vec<Vec<String>> {
    let rig = Rig::start(Setup {
        budget: 100_000,
        ..setup
    });
    let snapshot = rig.library().complete().snapshot();
    guests()
        .map(|guest| rig.run(&snapshot, guest.uncached()).bits())
        .collect()
}

fn check_in_company(setup: Setup, budgets: &[usize]) {
    let alone = alone(setup);
    for budget in budgets {
        for cached in [false, true] {
            let rig = Rig::start(Setup {
                budget: *budget,
                ..setup
            });
            let snapshot = rig.library().complete().snapshot();
            let drafts =
                |warm: bool| guests().map(move |guest| if warm { guest } else { guest.uncached() });
            // With a cache, once cold and once warm.
            for round in 0..1 + usize::from(cached) {
                let together = rig.run_all(&snapshot, drafts(cached));
                for (place, (together, alone)) in together.iter().zip(&alone).enumerate() {
                    assert_eq!(
                        &together.bits(),
                        alone,
                        "{} budget {budget} cached {cached} round {round} guest {place}",
                        setup.model
                    );
                    let hit = LENGTHS[place] > 16 && round == 1;
                    assert!(!hit || together.cached() > 0, "guest {place} missed");
                }
            }
            rig.settle();
        }
    }
}

#[test]
fn sixteen_at_once_get_bit_for_bit_what_each_gets_alone() {
    check_in_company(LLAMA, &[7, 64, 100_000]);
}

#[test]
fn so_do_they_where_prompts_take_a_share_of_the_time() {
    check_in_company(Setup { share: 50, ..LLAMA }, &[64]);
}

#[test]
fn so_do_they_however_many_threads_compute() {
    for (model, weights) in [
        ("llama/model-mixed.gguf", WeightFormat::AsIs),
        ("llama/hf", WeightFormat::F32),
        ("gemma3/hf", WeightFormat::Bf16),
    ] {
        let kv = KvType::Bf16;
        let one = Setup {
            model,
            weights,
            kv,
            ..LLAMA
        };
        let alone = alone(one);
        for threads in [2, 3] {
            let rig = Rig::start(Setup { threads, ..one });
            let snapshot = rig.library().complete().snapshot();
            let together = rig.run_all(&snapshot, guests().map(Draft::uncached));
            for (place, (together, alone)) in together.iter().zip(&alone).enumerate() {
                assert_eq!(&together.bits(), alone, "{model} {threads} guest {place}");
            }
        }
    }
}

#[test]
fn so_do_they_on_a_model_with_windows_and_many_layers() {
    check_in_company(GEMMA, &[7, 100_000]);
}

#[test]
fn so_do_they_on_the_other_families() {
    for setup in &FAMILIES[1..3] {
        check_in_company(*setup, &[23]);
    }
}

#[test]
fn so_do_they_with_half_precision_weights_and_cache() {
    for setup in [LLAMA, GEMMA] {
        let weights = WeightFormat::Bf16;
        check_in_company(Setup { weights, ..setup }, &[7]);
        let kv = KvType::Bf16I8;
        check_in_company(Setup { kv, ..setup }, &[7]);
        let kv = KvType::Bf16;
        check_in_company(Setup { kv, ..setup }, &[7]);
        check_in_company(
            Setup {
                kv,
                weights,
                ..setup
            },
            &[64],
        );
    }
}

#[test]
fn so_do_they_with_weights_of_few_bits() {
    for (weights, kv) in [
        (WeightFormat::AsIs, KvType::F32),
        // What is chosen for the default model.
        (WeightFormat::AsIs, KvType::Bf16),
        (WeightFormat::AsIs, KvType::Bf16I8),
        (WeightFormat::Q8_0, KvType::F32),
        (WeightFormat::Q4_1, KvType::Bf16),
    ] {
        let model = "llama/model-mixed.gguf";
        check_in_company(
            Setup {
                weights,
                kv,
                model,
                ..LLAMA
            },
            &[7],
        );
    }
    check_in_company(
        Setup {
            weights: WeightFormat::Q8_0,
            ..GEMMA
        },
        &[64],
    );
}

#[test]
fn guests_are_what_they_claim_to_be() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let plain = |place: usize| {
        let plain = draft(prompt(place as u64 % 5, LENGTHS[place]));
        rig.run(&snapshot, plain).tokens().to_vec()
    };
    for place in [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13] {
        let outcome = rig.run(&snapshot, guest(place));
        assert_ne!(
            outcome.tokens(),
            plain(place),
            "guest {place} changed nothing"
        );
    }
    for place in [0, 1, 2, 15] {
        let outcome = rig.run(&snapshot, guest(place));
        assert_eq!(
            outcome.tokens(),
            plain(place),
            "guest {place} changed something"
        );
    }
    let aborted = rig.run(&snapshot, guest(14)).error;
    assert_eq!(aborted, Some(Error::AbortedByPolicy));
}

#[test]
fn neighbours_that_leave_change_nothing_for_those_who_stay() {
    let alone = alone(LLAMA);
    let rig = Rig::start(Setup { budget: 7, ..LLAMA });
    let snapshot = rig.library().complete().snapshot();
    let mut staying = Vec::new();
    let mut leaving = Vec::new();
    for (place, guest) in guests().enumerate() {
        staying.push(rig.submit(&snapshot, guest).unwrap());
        let neighbour = draft(prompt(90 + place as u64, 60)).most(200);
        let name = format!("leaver-{place}");
        leaving.push((rig.submit(&snapshot, neighbour.named(&name)).unwrap(), name));
    }
    for (place, (mut events, name)) in leaving.into_iter().enumerate() {
        events.blocking_next();
        match place % 2 {
            0 => drop(events),
            _ => assert!(rig.engine.abort(&name)),
        }
    }
    for (place, (events, alone)) in staying.into_iter().zip(&alone).enumerate() {
        let outcome = crate::support::Outcome::of(events);
        assert_eq!(&outcome.bits(), alone, "guest {place}");
    }
    rig.settle();
}

#[test]
fn a_neighbour_whose_states_overflow_spoils_nobody_not_even_who_gets_its_blocks() {
    let few_blocks = Setup {
        context: Some(128),
        max_running: 2,
        ..LLAMA
    };
    let rig = Rig::start(few_blocks);
    let snapshot = rig.library().complete().snapshot();
    let healthy = || {
        draft(prompt(1, 60))
            .monitored(Mode::Shadow, "watch")
            .uncached()
    };
    let before = rig.run(&snapshot, healthy()).bits();
    let width = rig.engine.info().config.d_model;
    for _ in 0..4 {
        let mut overflow = add(1000.0, PositionSelection::All);
        overflow.vector = inwit::engine::VectorDraft::Value(vec![3e38; width]);
        overflow.site = Some(Site::Embed.to_string());
        let spoiled = draft(prompt(2, 100)).steered(overflow);
        let together = rig.run_all(&snapshot, [spoiled, healthy()]);
        assert!(
            matches!(together[0].error, Some(Error::InvalidRequest { .. })),
            "{:?}",
            together[0].error
        );
        assert_eq!(together[1].bits(), before);
    }
    assert_eq!(rig.run(&snapshot, healthy()).bits(), before);
}

#[test]
fn who_is_never_flagged_gets_the_tokens_of_who_is_not_watched() {
    for setup in FAMILIES {
        let rig = Rig::start(setup);
        let snapshot = rig.library().complete().snapshot();
        let plain = draft(prompt(4, 40));
        let off = rig.run(&snapshot, plain.clone());
        for (mode, policy) in [
            (Mode::Shadow, "watch"),
            (Mode::Enforce, "watch"),
            (Mode::Enforce, "flags"),
            (Mode::Shadow, "refuses"),
            (Mode::Shadow, "aborts"),
            (Mode::Shadow, "head-late"),
            (Mode::Shadow, "steers-late"),
        ] {
            let watched = rig.run(&snapshot, plain.clone().monitored(mode, policy));
            assert_eq!(watched.tokens(), off.tokens(), "{policy}");
            assert_eq!(watched.folded.logprobs, off.folded.logprobs, "{policy}");
            assert_eq!(watched.reason(), off.reason(), "{policy}");
        }
    }
}

#[test]
fn a_refusal_head_does_not_outlive_its_request() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let plain = || draft(prompt(4, 40));
    let before = rig.run(&snapshot, plain());
    let headed = Draft {
        refusal_head: Some("refusing".into()),
        ..plain()
    };
    assert_ne!(rig.run(&snapshot, headed).tokens(), before.tokens());
    assert_eq!(rig.run(&snapshot, plain()).bits(), before.bits());
    let refused = plain().monitored(Mode::Enforce, "head");
    assert_ne!(rig.run(&snapshot, refused).tokens(), before.tokens());
    assert_eq!(rig.run(&snapshot, plain()).bits(), before.bits());
}

#[test]
fn the_same_request_twice_has_the_same_bits() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    for guest in guests() {
        let first = rig.run(&snapshot, guest.clone());
        assert_eq!(rig.run(&snapshot, guest).bits(), first.bits());
    }
}
