//! Never skipped: the prefix cache changes what is computed again, never what is computed.

use std::sync::Arc;

use inwit::engine::{
    ConditionDraft, Draft, InterventionDraft, InterventionKindDraft, PositionSelection,
};
use inwit::hooks::Site;
use inwit::policy::Mode;
use inwit::registry::Snapshot;
use inwit_probes::{Gather, Positions};

use crate::support::{FAMILIES, LLAMA, Library, Rig, Setup, Written, add, draft, prompt, push};

/// Long enough for five full blocks besides the last prompt token.
const LENGTH: usize = 90;
const FULL_BLOCKS: u32 = 80;

fn plain() -> Draft {
    draft(prompt(3, LENGTH))
}

/// Steered at every prompt position, so that hardly a block could be shared.
fn steered_ways() -> Vec<Draft> {
    use InterventionKindDraft::{Add, ClampAbove, ClampBelow, ProjectOut};
    use PositionSelection::{All, AllPrompt};
    let some_rows = |kind, strength, above| InterventionDraft {
        condition: Some(ConditionDraft {
            detector: "early".into(),
            above,
        }),
        ..push(kind, strength, All)
    };
    [
        push(Add, Some(3.0), AllPrompt),
        push(Add, Some(3.0), All),
        push(Add, Some(-3.0), All),
        push(ProjectOut, None, AllPrompt),
        push(ClampAbove, Some(-1.0), All),
        push(ClampBelow, Some(1.0), All),
        some_rows(Add, Some(5.0), 0.0),
        some_rows(Add, Some(5.0), 0.1),
        InterventionDraft {
            site: Some(Site::MlpOut(0).to_string()),
            ..push(Add, Some(3.0), All)
        },
    ]
    .into_iter()
    .map(|intervention| plain().steered(intervention))
    .collect()
}

/// What a request gets where nothing ran before.
fn fresh(setup: Setup, library: impl Fn(Library) -> Library, draft: Draft) -> Vec<String> {
    let rig = Rig::start(setup);
    let snapshot = library(rig.library()).snapshot();
    rig.run(&snapshot, draft).bits()
}

/// Runs the drafts one after the other on one engine: each must get what it gets on a fresh one.
fn check_in_turn(setup: Setup, drafts: &[Draft]) {
    let rig = Rig::start(setup);
    let snapshot = rig.library().complete().snapshot();
    for (turn, draft) in drafts.iter().enumerate() {
        let outcome = rig.run(&snapshot, draft.clone());
        let expected = fresh(setup, Library::complete, draft.clone());
        assert_eq!(outcome.bits(), expected, "{} turn {turn}", setup.model);
    }
}

#[test]
fn steered_after_unsteered_and_back_is_as_on_a_fresh_engine() {
    for budget in [7, 100_000] {
        let setup = Setup { budget, ..LLAMA };
        let mut drafts = vec![plain()];
        for steered in steered_ways() {
            drafts.extend([steered, plain()]);
        }
        check_in_turn(setup, &drafts);
    }
}

#[test]
fn so_it_is_on_every_family() {
    for setup in FAMILIES {
        let ways = steered_ways();
        let drafts = [plain(), ways[1].clone(), plain(), ways[6].clone(), plain()];
        check_in_turn(setup, &drafts);
    }
}

#[test]
fn every_way_of_steering_changes_the_answer() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let unsteered = rig.run(&snapshot, plain());
    let mut seen = vec![unsteered.bits()];
    for (way, steered) in steered_ways().into_iter().enumerate() {
        let bits = rig.run(&snapshot, steered).bits();
        assert!(!seen.contains(&bits), "way {way} equals another");
        seen.push(bits);
    }
}

#[test]
fn the_same_steering_shares_its_own_blocks() {
    for steered in steered_ways() {
        let rig = Rig::start(LLAMA);
        let snapshot = rig.library().complete().snapshot();
        let first = rig.run(&snapshot, steered.clone());
        let again = rig.run(&snapshot, steered);
        assert_eq!((first.cached(), again.cached()), (0, FULL_BLOCKS));
        assert_eq!(again.bits(), first.bits());
    }
}

#[test]
fn steering_that_begins_with_the_answer_leaves_the_prompt_shareable() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    rig.run(&snapshot, plain());
    for positions in [
        PositionSelection::Generated,
        PositionSelection::LastPromptToken,
        PositionSelection::FromLastPromptToken,
    ] {
        let steered = plain().steered(add(3.0, positions));
        let outcome = rig.run(&snapshot, steered.clone());
        assert_eq!(outcome.cached(), FULL_BLOCKS, "{positions:?}");
        let expected = fresh(LLAMA, Library::complete, steered);
        assert_eq!(outcome.bits(), expected, "{positions:?}");
    }
}

#[test]
fn a_steered_answer_is_no_prefix_for_an_unsteered_request() {
    let policy = plain().monitored(Mode::Enforce, "steers");
    let interventions = [
        plain()
            .steered(add(3.0, PositionSelection::Generated))
            .most(60),
        plain()
            .steered(add(3.0, PositionSelection::FromLastPromptToken))
            .most(60),
        policy.most(60),
    ];
    for steered in interventions {
        let rig = Rig::start(LLAMA);
        let snapshot = rig.library().complete().snapshot();
        let answer = rig.run(&snapshot, steered);
        let mut longer = prompt(3, LENGTH);
        longer.extend(answer.tokens());
        longer.extend(prompt(8, 20));
        let next = draft(longer);
        let outcome = rig.run(&snapshot, next.clone());
        assert_eq!(outcome.cached(), FULL_BLOCKS);
        assert_eq!(outcome.bits(), fresh(LLAMA, Library::complete, next));
    }
}

#[test]
fn the_answer_to_a_plain_request_is_a_prefix_for_the_next_turn() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let first = plain().monitored(Mode::Shadow, "watch").most(60);
    let answer = rig.run(&snapshot, first);
    rig.settle();
    let mut longer = prompt(3, LENGTH);
    longer.extend(answer.tokens());
    longer.extend(prompt(8, 20));
    let next = draft(longer).monitored(Mode::Shadow, "watch");
    let outcome = rig.run(&snapshot, next.clone());
    assert!(outcome.cached() > FULL_BLOCKS, "{}", outcome.cached());
    assert_eq!(outcome.bits(), fresh(LLAMA, Library::complete, next));
}

#[test]
fn a_cached_prefix_still_has_its_scores() {
    for setup in FAMILIES {
        let rig = Rig::start(setup);
        let snapshot = rig.library().complete().snapshot();
        let watched = plain().monitored(Mode::Shadow, "watch");
        let first = rig.run(&snapshot, watched.clone());
        let again = rig.run(&snapshot, watched);
        assert_eq!((first.cached(), again.cached()), (0, FULL_BLOCKS));
        assert!(first.completed().scores.len() >= 7);
        assert_eq!(again.bits(), first.bits());
    }
}

#[test]
fn a_score_of_the_whole_prompt_is_told_from_the_cache_too() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let mut score = plain().monitored(Mode::Shadow, "watch");
    score.score_only = true;
    let first = rig.run(&snapshot, score.clone());
    let again = rig.run(&snapshot, score);
    assert!(again.cached() > 0);
    assert_eq!(first.logits_of("content").len(), LENGTH);
    assert_eq!(again.bits(), first.bits());
}

#[test]
fn a_prefix_that_ran_unwatched_is_a_miss_for_who_is_watched() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let watched = plain().monitored(Mode::Shadow, "watch");
    rig.run(&snapshot, plain());
    let first = rig.run(&snapshot, watched.clone());
    assert_eq!(first.cached(), 0);
    assert_eq!(
        first.bits(),
        fresh(LLAMA, Library::complete, watched.clone())
    );
    let again = rig.run(&snapshot, watched);
    assert_eq!(again.cached(), FULL_BLOCKS);
    assert_eq!(again.bits(), first.bits());
    assert_eq!(rig.run(&snapshot, plain()).cached(), FULL_BLOCKS);
}

fn other_probe(library: Library) -> Library {
    let content = Positions::PromptContent;
    let sites = [Site::ResidMid(0)];
    library
        .complete()
        .probe("newcomer", content, &[Gather::Max], &sites, 77)
}

#[test]
fn a_probe_that_never_saw_the_prefix_makes_it_a_miss() {
    let rig = Rig::start(LLAMA);
    let old = rig.library().complete().snapshot();
    let new = other_probe(rig.library()).snapshot();
    let watched = plain().monitored(Mode::Shadow, "watch");
    let run = |snapshot: &Arc<Snapshot>| rig.run(snapshot, watched.clone());
    run(&old);
    let first = run(&new);
    assert_eq!(first.cached(), 0);
    assert_eq!(first.bits(), fresh(LLAMA, other_probe, watched.clone()));
    let again = run(&new);
    assert_eq!(again.cached(), FULL_BLOCKS);
    assert_eq!(again.bits(), first.bits());
    assert_eq!(run(&old).cached(), FULL_BLOCKS);
}

#[test]
fn who_opts_out_neither_reads_nor_fills_the_cache() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    rig.run(&snapshot, plain().uncached());
    assert_eq!(rig.run(&snapshot, plain()).cached(), 0);
    assert_eq!(rig.run(&snapshot, plain().uncached()).cached(), 0);
    assert_eq!(rig.run(&snapshot, plain()).cached(), FULL_BLOCKS);
}

#[test]
fn a_full_cache_makes_room_and_stays_right() {
    let small = Setup {
        context: Some(160),
        max_running: 2,
        ..LLAMA
    };
    let rig = Rig::start(small);
    let snapshot = rig.library().complete().snapshot();
    let watched = |seed| draft(prompt(seed, 120)).monitored(Mode::Shadow, "watch");
    let expected: Vec<_> = (0..6)
        .map(|seed| fresh(small, Library::complete, watched(seed)))
        .collect();
    for round in 0..3 {
        let outcomes = rig.run_all(&snapshot, (0..6).map(watched));
        for (seed, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
            assert_eq!(&outcome.bits(), expected, "round {round} prompt {seed}");
        }
    }
    rig.settle();
}
