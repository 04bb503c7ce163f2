//! The engine's books: places, blocks, deadlines, and one decision record per request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use inwit::engine::event::FinishReason;
use inwit::engine::{Draft, Event};
use inwit::error::Error;
use inwit::policy::{Mode, replay};
use inwit::registry::{Registry, Snapshot};

use crate::support::{LLAMA, Library, Outcome, Rig, Setup, Written, draft, prompt};

fn long() -> Draft {
    draft(prompt(1, 100)).most(400)
}

fn short() -> Draft {
    draft(prompt(2, 40)).most(1)
}

fn snapshot(rig: &Rig) -> Arc<Snapshot> {
    rig.library().complete().snapshot()
}

/// Runs `first` up to its end and stops the engine there.
fn stop_at_end_of(rig: &Rig, snapshot: &Arc<Snapshot>, first: Draft) -> inwit::engine::Events {
    let events = rig.submit(snapshot, first).unwrap();
    let start = Instant::now();
    while rig.journal.records().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_micros(200));
    }
    events
}

#[test]
fn blocks_return_after_every_kind_of_end() {
    let rig = Rig::start(LLAMA);
    let snapshot = snapshot(&rig);
    let total = rig.engine.load().kv_blocks_total;
    for policy in [
        "watch",
        "refuses",
        "refuses-late",
        "head-late",
        "steers-late",
        "aborts",
    ] {
        rig.run(&snapshot, short().most(20).monitored(Mode::Enforce, policy));
        rig.settle();
    }
    let mut dropped = rig.submit(&snapshot, long()).unwrap();
    dropped.blocking_next();
    drop(dropped);
    rig.settle();
    let aborted = rig.submit(&snapshot, long().named("a")).unwrap();
    assert!(rig.engine.abort("a"));
    assert_eq!(Outcome::of(aborted).error, Some(Error::Cancelled));
    rig.settle();
    let late = Draft {
        deadline: Some(Instant::now()),
        ..long()
    };
    let error = rig.run(&snapshot, late).error;
    assert!(matches!(
        error,
        Some(Error::DeadlineExceeded { tokens_done: 0, .. })
    ));
    rig.settle();
    assert_eq!(rig.engine.load().kv_blocks_total, total);
    assert!(!rig.engine.abort("a"), "it is gone");
}

#[test]
fn a_full_queue_refuses_and_a_freed_place_is_given_again() {
    let (rig, gate) = Rig::gated(Setup {
        max_waiting: 2,
        ..LLAMA
    });
    let snapshot = snapshot(&rig);
    let first = stop_at_end_of(&rig, &snapshot, short());
    let waiting = [
        rig.submit(&snapshot, short()).unwrap(),
        rig.submit(&snapshot, short().named("waits")).unwrap(),
    ];
    assert_eq!(rig.engine.load().waiting, 2);
    assert_eq!(rig.engine.load().queued_tokens, 80);
    let refused = rig.submit(&snapshot, short().named("refused")).map(|_| ());
    assert!(
        matches!(refused, Err(Error::Overloaded { .. })),
        "{refused:?}"
    );
    gate.let_on(4);
    Outcome::of(first).completed();
    for events in waiting {
        Outcome::of(events).completed();
    }
    rig.settle();
    assert_eq!(rig.engine.load().queued_tokens, 0);
    rig.run(&snapshot, short().named("refused")).completed();
}

#[test]
fn an_id_in_flight_is_taken_and_free_once_its_end_is_told() {
    let (rig, gate) = Rig::gated(Setup {
        budget: 100_000,
        ..LLAMA
    });
    let snapshot = snapshot(&rig);
    let first = stop_at_end_of(&rig, &snapshot, short());
    let twin = rig.submit(&snapshot, short().named("twin")).unwrap();
    let refused = rig.submit(&snapshot, short().named("twin")).map(|_| ());
    assert_eq!(refused, Err(Error::AlreadyExists("twin".into())));
    // They run with the twin, so the step in which it ends has much to do after it was told.
    let crowd = |seed| draft(prompt(seed, 400)).monitored(Mode::Shadow, "watch");
    let crowd: Vec<_> = (0..30)
        .map(|seed| rig.submit(&snapshot, crowd(seed)).unwrap())
        .collect();
    gate.let_on(1000);
    Outcome::of(first).completed();
    let mut twin = twin;
    while !matches!(twin.blocking_next(), Some(Event::Completed(_))) {}
    rig.run(&snapshot, short().named("twin")).completed();
    drop(crowd);
}

#[test]
fn a_deadline_holds_in_the_queue_and_while_running() {
    let (rig, gate) = Rig::gated(LLAMA);
    let snapshot = snapshot(&rig);
    let first = stop_at_end_of(&rig, &snapshot, short());
    let queued = Draft {
        deadline: Some(Instant::now()),
        ..short()
    };
    let queued = rig.submit(&snapshot, queued).unwrap();
    let deadline = Instant::now() + Duration::from_millis(400);
    let running = Draft {
        deadline: Some(deadline),
        ..long()
    };
    let running = rig.submit(&snapshot, running).unwrap();
    let stopper = rig.submit(&snapshot, short()).unwrap();
    // The first and the queued one end; the stopper ends while the long one runs beside it.
    gate.let_on(2);
    Outcome::of(first).completed();
    let queued = Outcome::of(queued);
    assert!(matches!(
        queued.error,
        Some(Error::DeadlineExceeded { tokens_done: 0, .. })
    ));
    assert!(
        !queued
            .events
            .iter()
            .any(|event| matches!(event, Event::Started(_)))
    );
    std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
    gate.let_on(2);
    Outcome::of(stopper).completed();
    let running = Outcome::of(running);
    let Some(Error::DeadlineExceeded { tokens_done, .. }) = running.error else {
        panic!("{:?}", running.error);
    };
    assert!((1..400).contains(&tokens_done), "{tokens_done}");
    rig.settle();
}

#[test]
fn who_leaves_the_queue_never_runs_and_is_recorded() {
    let (rig, gate) = Rig::gated(LLAMA);
    let snapshot = snapshot(&rig);
    let first = stop_at_end_of(&rig, &snapshot, short());
    drop(rig.submit(&snapshot, long().named("left")).unwrap());
    let aborted = rig.submit(&snapshot, long().named("aborted")).unwrap();
    assert!(rig.engine.abort("aborted"));
    gate.let_on(3);
    Outcome::of(first).completed();
    assert_eq!(Outcome::of(aborted).error, Some(Error::Cancelled));
    rig.settle();
    for id in ["left", "aborted"] {
        let record = rig.record_of(id);
        assert_eq!(
            (record.finish_reason.as_str(), record.steps.len()),
            ("cancelled", 0)
        );
    }
}

#[test]
fn a_draining_engine_refuses_and_finishes_what_it_has() {
    let (rig, gate) = Rig::gated(LLAMA);
    let snapshot = snapshot(&rig);
    let first = stop_at_end_of(&rig, &snapshot, short());
    let waiting = rig.submit(&snapshot, short()).unwrap();
    rig.engine.drain();
    let refused = rig.submit(&snapshot, short()).map(|_| ());
    assert!(matches!(refused, Err(Error::Unavailable(_))));
    gate.let_on(2);
    Outcome::of(first).completed();
    Outcome::of(waiting).completed();
}

#[test]
fn what_does_not_fit_is_refused_and_what_just_fits_is_served() {
    let rig = Rig::start(Setup {
        context: Some(128),
        ..LLAMA
    });
    let snapshot = snapshot(&rig);
    let fits = |length, max_tokens| {
        let mut draft = draft(prompt(1, length));
        draft.sampling.max_tokens = max_tokens;
        rig.submit(&snapshot, draft).map(Outcome::of)
    };
    for (length, max_tokens) in [(128, None), (128, Some(1)), (127, Some(2)), (200, None)] {
        let refused = fits(length, max_tokens).map(|_| ());
        assert!(
            matches!(refused, Err(Error::ContextLength { .. })),
            "{length}"
        );
    }
    for (length, max_tokens, answer) in [(127, Some(1), 1), (127, None, 1), (100, Some(28), 28)] {
        let outcome = fits(length, max_tokens).unwrap();
        assert_eq!(outcome.tokens().len(), answer);
        assert_eq!(outcome.reason(), FinishReason::Length);
    }
}

#[test]
fn more_requests_than_blocks_all_get_their_turn() {
    let rig = Rig::start(Setup {
        kv_blocks: 20,
        ..LLAMA
    });
    let snapshot = snapshot(&rig);
    // Eight blocks each: two run at once, all others wait.
    let outcomes = rig.run_all(
        &snapshot,
        (0..20).map(|seed| draft(prompt(seed, 110)).most(18)),
    );
    for outcome in outcomes {
        assert_eq!(outcome.tokens().len(), 18, "{:?}", outcome.error);
    }
    rig.settle();
    let whole = rig.run(&snapshot, draft(prompt(99, 300)).most(20));
    assert_eq!(whole.tokens().len(), 20);
}

const POLICIES: [&str; 9] = [
    "watch",
    "flags",
    "refuses",
    "refuses-late",
    "head",
    "head-late",
    "steers",
    "steers-late",
    "aborts",
];

#[test]
fn every_request_is_recorded_once_and_its_record_decides_the_same_again() {
    let rig = Rig::start(Setup { budget: 9, ..LLAMA });
    let snapshot = snapshot(&rig);
    let mut drafts = Vec::new();
    for policy in POLICIES {
        for mode in [Mode::Shadow, Mode::Enforce] {
            let plain = draft(prompt(5, 60));
            drafts.push((
                policy,
                plain
                    .monitored(mode, policy)
                    .named(&format!("{policy}-{mode}")),
            ));
        }
    }
    let ids: Vec<_> = drafts
        .iter()
        .map(|(_, draft)| draft.id.clone().unwrap())
        .collect();
    for _cold_then_warm in 0..2 {
        rig.run_all(&snapshot, drafts.iter().map(|(_, draft)| draft.clone()));
    }
    assert_eq!(rig.journal.records().len(), 2 * drafts.len());
    for ((policy, draft), id) in drafts.iter().zip(ids) {
        let policy = &snapshot.policies[*policy];
        let records = rig.journal.records().into_iter();
        let records: Vec<_> = records.filter(|r| r.request_id == id).collect();
        assert_eq!(records.len(), 2, "{id}");
        for record in &records {
            let outcome = replay(policy, record).unwrap();
            let decisions: Vec<_> = record.decisions().cloned().collect();
            assert_eq!(outcome.decisions, decisions, "{id}");
            assert!(!decisions.is_empty());
            assert_eq!(outcome.action, record.action, "{id}");
        }
        // From the cache, the same was seen and the same decided.
        assert_eq!(records[0].steps, records[1].steps, "{id}");
        assert_eq!(records[0].actions, records[1].actions, "{id}");
        let again = rig.run(&snapshot, draft.clone().named("again"));
        if let Some(completed) = &again.folded.completed {
            let (usage, record) = (completed.usage, &records[1]);
            let counts = (
                record.tokens.completion,
                record.tokens.withheld,
                record.tokens.prompt,
            );
            let usage = (
                usage.completion_tokens,
                usage.withheld_tokens,
                usage.prompt_tokens,
            );
            assert_eq!(counts, usage, "{id}");
            assert_eq!(record.finish_reason, completed.finish_reason.as_str());
        }
    }
}

#[test]
fn a_swap_of_the_snapshot_does_not_reach_who_is_on_the_way() {
    let rig = Rig::start(LLAMA);
    let other = |library: Library| {
        let document = "[[detector]]\nname = \"end\"\nprobe = \"prompt_end\"\n\
                        threshold_logit = -1e30\n[[rule]]\nname = \"other\"\n\
                        when = { detector = \"end\" }\naction = { refuse = \"other\" }\n";
        library.complete().policy("mine", document).snapshot()
    };
    let mine = rig.library().complete();
    let watching = "[[detector]]\nname = \"late\"\nprobe = \"third\"\nthreshold_logit = -1e30\n\
                    [[rule]]\nname = \"mine\"\nwhen = { detector = \"late\" }\n\
                    action = { refuse = \"mine\" }\n";
    let mine = mine.policy("mine", watching).snapshot();
    let registry = Registry::new((*mine).clone());
    let request = || draft(prompt(3, 80)).monitored(Mode::Enforce, "mine");
    let alone = [
        rig.run(&mine, request().uncached()).bits(),
        rig.run(&other(rig.library()), request().uncached()).bits(),
    ];
    let (rig, gate) = Rig::gated(LLAMA);
    let first = stop_at_end_of(&rig, &registry.snapshot(), short());
    let before = rig.submit(&registry.snapshot(), request()).unwrap();
    registry.replace((*other(rig.library())).clone());
    let after = rig.submit(&registry.snapshot(), request()).unwrap();
    gate.let_on(3);
    Outcome::of(first).completed();
    // Both run in the same batches, each under its own snapshot.
    let (before, after) = (Outcome::of(before), Outcome::of(after));
    assert_eq!(
        (before.bits(), after.bits()),
        (alone[0].clone(), alone[1].clone())
    );
    assert_eq!(
        (before.folded.text, after.folded.text),
        ("mine".into(), "other".into())
    );
}
