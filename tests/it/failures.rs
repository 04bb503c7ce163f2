//! A monitor that fails: closed where its rule enforces and does not say otherwise, open elsewhere.

use std::sync::Arc;

use inwit::engine::event::FinishReason;
use inwit::engine::{Defaults, Draft, prepare};
use inwit::error::Error;
use inwit::hooks::Site;
use inwit::journal::Memory;
use inwit::policy::{DecisionRecord, DecisionSink, Mode};
use inwit::registry::Snapshot;
use inwit_probes::{Gather, Positions};

use crate::support::{LLAMA, Library, Outcome, Rig, Written, draft, numbers, prompt};

fn plain() -> Draft {
    draft(prompt(6, 40))
}

/// Weights with which every state's logit overflows.
fn overflowing(library: Library, name: &str, positions: Positions) -> Library {
    let weight = numbers(1, 64).iter().map(|w| w.signum() * 3e38).collect();
    let last = [Gather::Last];
    library.biased_probe(name, positions, &last, Site::FinalNorm, (weight, 0.0))
}

fn snapshot(rig: &Rig, positions: Positions, rule: &str) -> Arc<Snapshot> {
    let document = format!(
        "[[detector]]\nname = \"d\"\nprobe = \"broken\"\n[[rule]]\nname = \"r\"\n\
         when = {{ detector = \"d\" }}\naction = {{ refuse = \"no\" }}\n{rule}"
    );
    let library = overflowing(rig.library(), "broken", positions);
    library.policy("p", &document).snapshot()
}

fn run(rig: &Rig, snapshot: &Arc<Snapshot>, mode: Mode) -> Outcome {
    rig.run(snapshot, plain().monitored(mode, "p"))
}

fn check_served(rig: &Rig, outcome: &Outcome) {
    let expected = rig.run(&rig.library().snapshot(), plain());
    assert_eq!(outcome.tokens(), expected.tokens());
    assert_eq!(outcome.reason(), FinishReason::Length);
    assert!(outcome.completed().partially_monitored);
    assert!(!expected.completed().partially_monitored);
}

#[test]
fn a_probe_that_fails_on_the_prompt_ends_the_request_before_its_first_token() {
    let rig = Rig::start(LLAMA);
    let snapshot = snapshot(&rig, Positions::LastPromptToken, "");
    for _cold_then_warm in 0..2 {
        let outcome = run(&rig, &snapshot, Mode::Enforce);
        let failed =
            matches!(&outcome.error, Some(Error::MonitorFailed { probe, .. }) if probe == "broken");
        assert!(failed, "{:?}", outcome.error);
        assert!(outcome.folded.text.is_empty());
    }
    rig.settle();
}

#[test]
fn a_probe_that_fails_in_the_answer_ends_it_and_drops_what_was_held() {
    let rig = Rig::start(LLAMA);
    let expected = rig.run(&rig.library().snapshot(), plain());
    for (hold_back, left) in [(0, 3), (1, 2), (2, 1)] {
        let rule = format!("hold_back = {hold_back}\n");
        let snapshot = snapshot(&rig, Positions::Generated(3), &rule);
        let outcome = run(&rig, &snapshot, Mode::Enforce);
        assert_eq!(outcome.reason(), FinishReason::MonitorFailed);
        assert_eq!(outcome.tokens(), &expected.tokens()[..left]);
        assert_eq!(outcome.completed().usage.withheld_tokens, 3 - left as u32);
        assert_eq!(outcome.retracts(), 0);
    }
    let snapshot = snapshot(&rig, Positions::Generated(3), "hold_back = 3\n");
    let outcome = run(&rig, &snapshot, Mode::Enforce);
    assert!(matches!(outcome.error, Some(Error::MonitorFailed { .. })));
}

#[test]
fn a_rule_that_fails_open_serves_and_says_so() {
    let rig = Rig::start(LLAMA);
    for positions in [Positions::LastPromptToken, Positions::Generated(3)] {
        let snapshot = snapshot(&rig, positions, "on_failure = \"open\"\n");
        check_served(&rig, &run(&rig, &snapshot, Mode::Enforce));
    }
}

#[test]
fn in_shadow_a_failure_serves_and_says_so() {
    let rig = Rig::start(LLAMA);
    for positions in [Positions::LastPromptToken, Positions::EveryGenerated] {
        let snapshot = snapshot(&rig, positions, "");
        check_served(&rig, &run(&rig, &snapshot, Mode::Shadow));
    }
}

#[test]
fn a_broken_probe_that_no_rule_reads_stops_nobody() {
    let rig = Rig::start(LLAMA);
    let library = overflowing(rig.library().complete(), "broken", Positions::PromptContent);
    let outcome = rig.run(
        &library.snapshot(),
        plain().monitored(Mode::Enforce, "watch"),
    );
    let healthy = rig.library().complete().snapshot();
    let expected = rig.run(&healthy, plain().monitored(Mode::Enforce, "watch"));
    assert_eq!(outcome.bits(), expected.bits());
}

#[test]
fn a_broken_neighbour_stops_nobody() {
    let rig = Rig::start(LLAMA);
    let broken = snapshot(&rig, Positions::Generated(3), "");
    let healthy = rig.library().complete().snapshot();
    let watched = || plain().monitored(Mode::Enforce, "watch");
    let expected = rig.run(&healthy, watched()).bits();
    let failing = rig
        .submit(&broken, plain().monitored(Mode::Enforce, "p"))
        .unwrap();
    let serving = rig.submit(&healthy, watched()).unwrap();
    assert_eq!(Outcome::of(failing).reason(), FinishReason::MonitorFailed);
    assert_eq!(Outcome::of(serving).bits(), expected);
}

/// Panics at each record of an id that begins with `bad`, after noting it.
struct Fragile(Memory);

impl DecisionSink for Fragile {
    fn record(&self, record: DecisionRecord) {
        let bad = record.request_id.starts_with("bad");
        self.0.record(record);
        assert!(!bad, "this sink breaks on purpose");
    }
}

#[test]
fn a_sink_that_panics_is_called_once_per_request_and_stops_nobody() {
    let sink = Arc::new(Fragile(Memory::new(64)));
    let engine = Rig::engine(LLAMA, sink.clone());
    let snapshot = Arc::new(Snapshot::empty());
    let run = |id: &str, most: u32| {
        let defaults = Defaults {
            mode: Mode::Off,
            policy: None,
            max_tokens: 8,
            overrides: true,
        };
        let request = prepare(plain().named(id).most(most), &engine, &snapshot, &defaults);
        engine.submit(request.unwrap()).unwrap()
    };
    // They end in one step, the breaking one between two others.
    let (first, bad, last) = (run("first", 3), run("bad", 3), run("last", 3));
    let (first, bad, last) = (Outcome::of(first), Outcome::of(bad), Outcome::of(last));
    assert!(
        matches!(bad.error, Some(Error::Internal(_))),
        "{:?}",
        bad.error
    );
    assert_eq!(first.completed().finish_reason, FinishReason::Length);
    assert!(last.error.is_some() || last.folded.completed.is_some());
    let after = Outcome::of(run("after", 3));
    assert_eq!(after.tokens(), first.tokens());
    let ids: Vec<String> = sink.0.records().into_iter().map(|r| r.request_id).collect();
    for id in ["first", "bad", "last", "after"] {
        let times = ids.iter().filter(|other| *other == id).count();
        assert_eq!(times, 1, "{id} in {ids:?}");
    }
}

#[test]
fn a_policy_whose_steering_leaves_no_finite_logits_fails_closed() {
    let rig = Rig::start(LLAMA);
    let document = "[[detector]]\nname = \"sure\"\nprobe = \"prompt_end\"\n\
                    threshold_logit = -1e30\n[[rule]]\nname = \"r\"\n\
                    when = { detector = \"sure\" }\n\
                    action = { steer = { vector = \"overflow\", strength = 900.0 } }\n";
    let library = rig.library().complete();
    let library = library.vector("overflow", Site::ResidPost(1), 0);
    let snapshot = library.policy("p", document).snapshot();
    let outcome = run(&rig, &snapshot, Mode::Enforce);
    let failed =
        matches!(&outcome.error, Some(Error::MonitorFailed { probe, .. }) if probe == "steering");
    assert!(failed, "{:?}", outcome.error);
}
