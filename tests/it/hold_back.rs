//! Held back: a rule that fires at token `t` fires before the tokens it holds have left, and what
//! follows is what a fresh request under its action would have got.

use std::sync::Arc;

use inwit::engine::event::FinishReason;
use inwit::engine::{Draft, Event, PositionSelection};
use inwit::hooks::Site;
use inwit::policy::{Action, Mode};
use inwit::registry::Snapshot;
use inwit_probes::{Gather, Positions};

use crate::support::{
    GEMMA, LLAMA, Library, Outcome, REFUSAL, Rig, Setup, Written, add, draft, prompt,
};

const PROMPT: usize = 30;
const ANSWER: u32 = 12;
const PROBES: u64 = 60;

fn plain() -> Draft {
    draft(prompt(6, PROMPT)).most(ANSWER)
}

fn probe_name(probe: u64) -> String {
    format!("p{probe:02}")
}

/// Many probes of every generated token: for each token there is one that it is the highest for.
fn many_probes(library: Library) -> Library {
    let library = (0..PROBES).fold(library, |library, probe| {
        let sites = [Site::ResidPost(1)];
        let gathers = [Gather::Max];
        let name = probe_name(probe);
        library.probe(
            &name,
            Positions::EveryGenerated,
            &gathers,
            &sites,
            400 + probe,
        )
    });
    library
        .vector("push", Site::ResidPost(0), 21)
        .head("refusing", 31)
}

/// A probe and a threshold that generated token `t` (counted from 1) of the plain answer is the
/// first to exceed.
fn trigger(watched: &Outcome, t: usize) -> (String, f32) {
    for probe in (0..PROBES).map(probe_name) {
        let logits = watched.logits_of(&probe);
        assert_eq!(logits.len(), ANSWER as usize);
        let before = logits[..t - 1]
            .iter()
            .copied()
            .fold(logits[t - 1] - 4.0, f32::max);
        if logits[t - 1] > before + 0.5 {
            return (probe, (logits[t - 1] + before) / 2.0);
        }
    }
    panic!("no probe is highest at token {t}");
}

/// A policy with one rule that fires at token `t`.
fn policy(watched: &Outcome, t: usize, hold_back: u32, action: &str) -> String {
    let (probe, threshold) = trigger(watched, t);
    format!(
        "[[detector]]\nname = \"d\"\nprobe = \"{probe}\"\nthreshold_logit = {threshold:?}\n\
         [[rule]]\nname = \"r\"\nwhen = {{ detector = \"d\" }}\naction = {action}\n\
         hold_back = {hold_back}\n"
    )
}

struct Bench {
    rig: Rig,
    library: Library,
    watched: Outcome,
}

impl Bench {
    fn new(setup: Setup) -> Self {
        let rig = Rig::start(setup);
        let library = many_probes(rig.library());
        let watched = plain().monitored(Mode::Shadow, "empty");
        let watched = rig.run(&library.snapshot(), watched);
        assert_eq!(
            watched.tokens().len(),
            ANSWER as usize,
            "the answer ended early"
        );
        Self {
            rig,
            library,
            watched,
        }
    }

    fn snapshot(&self, t: usize, hold_back: u32, action: &str) -> Arc<Snapshot> {
        let document = policy(&self.watched, t, hold_back, action);
        self.library.clone().policy("p", &document).snapshot()
    }

    fn run(&self, t: usize, hold_back: u32, action: &str) -> Outcome {
        let snapshot = self.snapshot(t, hold_back, action);
        let enforced = plain().monitored(Mode::Enforce, "p");
        let outcome = self.rig.run(&snapshot, enforced);
        assert_eq!(
            outcome.verdicts().len(),
            1,
            "token {t}: {:?}",
            outcome.verdicts()
        );
        outcome
    }
}

/// How many tokens had left when the verdict came.
fn left_before_verdict(outcome: &Outcome) -> usize {
    let mut left = 0;
    for event in &outcome.events {
        match event {
            Event::Delta(delta) => left += delta.token_ids.len(),
            Event::Verdict(_) => return left,
            _ => {}
        }
    }
    panic!("no verdict came");
}

fn check_held(bench: &Bench, action: &str, checked: impl Fn(&Outcome, usize)) {
    for t in [1, 6, ANSWER as usize] {
        for hold_back in 0..=4u32 {
            let outcome = bench.run(t, hold_back, action);
            let left = left_before_verdict(&outcome);
            // Token t - h + 1 and all after it wait; the ones before do not.
            assert_eq!(
                left,
                t.saturating_sub(hold_back as usize),
                "t {t} h {hold_back}"
            );
            assert_eq!(
                outcome.retracts(),
                usize::from(left > 0),
                "t {t} h {hold_back}"
            );
            // The token after t was not yet chosen: the verdict comes with the pass over t.
            let withheld = outcome.completed().usage.withheld_tokens;
            assert_eq!(withheld as usize, t, "t {t} h {hold_back}");
            let folded = outcome.tokens().len();
            assert_eq!(outcome.completed().usage.completion_tokens as usize, folded);
            check_scores_come_with_their_tokens(&outcome);
            checked(&outcome, t);
        }
    }
}

/// A score tells of its token, so it waits with it; a rewound answer has scores of its own.
fn check_scores_come_with_their_tokens(outcome: &Outcome) {
    let (mut left, mut scored) = (0, Vec::new());
    for event in &outcome.events {
        match event {
            Event::Retract(_) => (left, scored) = (0, Vec::new()),
            Event::Delta(delta) => {
                left += delta.token_ids.len();
                let scores = delta
                    .scores
                    .iter()
                    .filter(|score| *score.probe == *probe_name(0));
                scored.extend(scores.map(|score| score.position as usize - PROMPT));
                assert!(
                    scored.last().is_none_or(|last| *last < left),
                    "told too early"
                );
            }
            _ => {}
        }
    }
    if outcome.action() != Action::Refuse {
        assert_eq!(scored, Vec::from_iter(0..outcome.tokens().len()));
    }
}

#[test]
fn a_refusal_holds_what_it_promised_and_folds_to_its_text() {
    let bench = Bench::new(LLAMA);
    let action = format!("{{ refuse = \"{REFUSAL}\" }}");
    check_held(&bench, &action, |outcome, _| {
        assert_eq!(outcome.folded.text, REFUSAL);
        assert_eq!(outcome.reason(), FinishReason::RefusedByPolicy);
        assert_eq!(outcome.action(), Action::Refuse);
    });
}

#[test]
fn a_refusal_head_after_a_rewind_answers_as_if_it_had_been_on_from_the_start() {
    for setup in [LLAMA, GEMMA] {
        let bench = Bench::new(setup);
        let from_start = Draft {
            refusal_head: Some("refusing".into()),
            ..plain()
        };
        let expected = bench.rig.run(&bench.library.snapshot(), from_start);
        assert_ne!(expected.tokens(), bench.watched.tokens());
        check_held(&bench, "\"refusal_head\"", |outcome, _| {
            assert_eq!(outcome.folded.text, expected.folded.text);
            assert_eq!(outcome.tokens(), expected.tokens());
            assert_eq!(outcome.folded.logprobs, expected.folded.logprobs);
            assert_eq!(outcome.reason(), FinishReason::RefusedByPolicy);
            assert_eq!(outcome.action(), Action::RefusalHead);
        });
    }
}

#[test]
fn steering_after_a_rewind_answers_as_if_it_had_been_on_from_the_start() {
    for setup in [LLAMA, GEMMA] {
        let bench = Bench::new(setup);
        for (name, positions) in [
            ("last_prompt_token", PositionSelection::LastPromptToken),
            ("generated", PositionSelection::Generated),
            (
                "last_prompt_token_and_generated",
                PositionSelection::FromLastPromptToken,
            ),
        ] {
            let from_start = plain().steered(add(9.0, positions));
            let expected = bench.rig.run(&bench.library.snapshot(), from_start);
            assert_ne!(expected.tokens(), bench.watched.tokens(), "{name}");
            let action = format!(
                "{{ steer = {{ vector = \"push\", strength = 9.0, positions = \"{name}\" }} }}"
            );
            check_held(&bench, &action, |outcome, _| {
                assert_eq!(outcome.tokens(), expected.tokens());
                assert_eq!(outcome.folded.logprobs, expected.folded.logprobs);
                assert_eq!(outcome.reason(), expected.reason());
                assert_eq!(outcome.action(), Action::Steer);
            });
        }
    }
}

#[test]
fn an_abort_before_the_first_token_is_an_error_and_after_it_a_retracted_end() {
    let bench = Bench::new(LLAMA);
    for t in [1, 6, ANSWER as usize] {
        for hold_back in 0..=4u32 {
            let snapshot = bench.snapshot(t, hold_back, "\"abort\"");
            let outcome = bench
                .rig
                .run(&snapshot, plain().monitored(Mode::Enforce, "p"));
            if t <= hold_back as usize {
                assert_eq!(outcome.error, Some(inwit::error::Error::AbortedByPolicy));
                assert!(outcome.folded.text.is_empty());
                continue;
            }
            assert_eq!(outcome.reason(), FinishReason::RefusedByPolicy);
            assert_eq!(outcome.action(), Action::Abort);
            assert_eq!((outcome.retracts(), outcome.tokens().len()), (1, 0));
            assert_eq!(outcome.folded.text, "");
        }
    }
}

#[test]
fn a_flag_holds_and_withdraws_nothing_of_the_answer() {
    let bench = Bench::new(LLAMA);
    for hold_back in [0, 3] {
        let outcome = bench.run(6, hold_back, "\"flag\"");
        assert_eq!(outcome.tokens(), bench.watched.tokens());
        assert_eq!((outcome.action(), outcome.retracts()), (Action::Flag, 0));
        assert_eq!(left_before_verdict(&outcome), 6 - hold_back as usize);
    }
}

#[test]
fn a_caller_may_hold_more_than_the_policy_and_never_less() {
    let bench = Bench::new(LLAMA);
    let snapshot = bench.snapshot(6, 2, "\"flag\"");
    for (asked, held) in [(None, 2), (Some(0), 2), (Some(1), 2), (Some(5), 5)] {
        let mut enforced = plain().monitored(Mode::Enforce, "p");
        enforced.monitor.hold_back = asked;
        let outcome = bench.rig.run(&snapshot, enforced);
        assert_eq!(left_before_verdict(&outcome), 6 - held, "asked {asked:?}");
        assert_eq!(outcome.tokens(), bench.watched.tokens());
    }
}

#[test]
fn in_shadow_nothing_is_held_and_nothing_is_done() {
    let bench = Bench::new(LLAMA);
    for action in ["\"abort\"", "\"refusal_head\"", "{ refuse = \"no\" }"] {
        let snapshot = bench.snapshot(6, 4, action);
        let outcome = bench
            .rig
            .run(&snapshot, plain().monitored(Mode::Shadow, "p"));
        assert!(outcome.verdicts()[0].shadow);
        assert_eq!(outcome.tokens(), bench.watched.tokens());
        assert_eq!(left_before_verdict(&outcome), 6);
        assert_eq!(outcome.retracts(), 0);
    }
}

#[test]
fn a_rewound_answer_has_its_budget_its_penalties_and_draws_of_its_own() {
    let bench = Bench::new(LLAMA);
    let snapshot = bench.snapshot(6, 1, "{ refusal_head = \"refusing\", strength = 0.0001 }");
    // So weak a head changes no choice: what differs is the second attempt's doing.
    let greedy = bench
        .rig
        .run(&snapshot, plain().monitored(Mode::Enforce, "p"));
    assert_eq!(greedy.verdicts().len(), 1);
    assert_eq!(greedy.tokens(), bench.watched.tokens());
    assert_eq!(greedy.tokens().len(), ANSWER as usize);

    let mut penalised = plain();
    penalised.sampling.frequency_penalty = Some(2.0);
    penalised.sampling.presence_penalty = Some(2.0);
    penalised.sampling.repetition_penalty = Some(1.5);
    let off = bench.rig.run(&snapshot, penalised.clone());
    let sure = sure_policy(&bench, "{ refusal_head = \"refusing\", strength = 0.0001 }");
    let rewound = bench
        .rig
        .run(&sure, penalised.monitored(Mode::Enforce, "p"));
    assert_eq!((rewound.verdicts().len(), rewound.retracts()), (1, 1));
    assert_eq!(rewound.tokens(), off.tokens());

    let mut sampled = plain();
    sampled.sampling.temperature = Some(1.0);
    sampled.sampling.seed = Some(5);
    let off = bench.rig.run(&snapshot, sampled.clone());
    let rewound = bench
        .rig
        .run(&sure, sampled.clone().monitored(Mode::Enforce, "p"));
    assert_eq!(rewound.verdicts().len(), 1);
    assert_ne!(rewound.tokens(), off.tokens());
    let again = bench.rig.run(&sure, sampled.monitored(Mode::Enforce, "p"));
    assert_eq!(again.bits(), rewound.bits());
}

/// Fires at generated token 2, whatever it is.
fn sure_policy(bench: &Bench, action: &str) -> Arc<Snapshot> {
    sure_policy_at(bench, Positions::Generated(2), action)
}

fn sure_policy_at(bench: &Bench, positions: Positions, action: &str) -> Arc<Snapshot> {
    let site = [Site::ResidPost(1)];
    let document = format!(
        "[[detector]]\nname = \"d\"\nprobe = \"second\"\nthreshold_logit = -1e30\n\
         [[rule]]\nname = \"r\"\nwhen = {{ detector = \"d\" }}\naction = {action}\n"
    );
    let library = bench.library.clone();
    let library = library.probe("second", positions, &[Gather::Last], &site, 5);
    library.policy("p", &document).snapshot()
}

#[test]
fn a_rule_over_the_first_tokens_fires_with_the_last_of_them() {
    let bench = Bench::new(LLAMA);
    let withheld = |positions| {
        let snapshot = sure_policy_at(&bench, positions, "{ refuse = \"no\" }");
        let outcome = bench
            .rig
            .run(&snapshot, plain().monitored(Mode::Enforce, "p"));
        assert_eq!(outcome.folded.text, "no");
        outcome.completed().usage.withheld_tokens
    };
    assert_eq!(withheld(Positions::FirstGenerated(1)), 1);
    assert_eq!(withheld(Positions::FirstGenerated(5)), 5);
    assert_eq!(withheld(Positions::Generated(5)), 5);
    assert_eq!(withheld(Positions::EveryGenerated), 1);
}

#[test]
fn what_was_withdrawn_is_no_part_of_any_score() {
    let bench = Bench::new(LLAMA);
    for t in [1, 6, ANSWER as usize] {
        let snapshot = bench.snapshot(t, 1, "\"refusal_head\"");
        let rewound = bench
            .rig
            .run(&snapshot, plain().monitored(Mode::Enforce, "p"));
        let from_start = Draft {
            refusal_head: Some("refusing".into()),
            ..plain().monitored(Mode::Shadow, "p")
        };
        let expected = bench.rig.run(&snapshot, from_start);
        let scores = &rewound.completed().scores;
        assert_eq!(scores.len(), PROBES as usize);
        assert_eq!(scores, &expected.completed().scores, "token {t}");
    }
}

#[test]
fn a_more_severe_rule_fires_on_top_of_a_milder_one() {
    let bench = Bench::new(LLAMA);
    let document = "[[detector]]\nname = \"end\"\nprobe = \"end\"\nthreshold_logit = -1e30\n\
                    [[detector]]\nname = \"two\"\nprobe = \"two\"\nthreshold_logit = -1e30\n\
                    [[detector]]\nname = \"four\"\nprobe = \"four\"\nthreshold_logit = -1e30\n\
                    [[rule]]\nname = \"steer\"\nwhen = { detector = \"end\" }\n\
                    action = { steer = { vector = \"push\", strength = 9.0 } }\n\
                    [[rule]]\nname = \"head\"\nwhen = { detector = \"two\" }\n\
                    action = \"refusal_head\"\n\
                    [[rule]]\nname = \"refuse\"\nwhen = { detector = \"four\" }\n\
                    action = { refuse = \"no\" }\n\
                    [[rule]]\nname = \"flag\"\nwhen = { detector = \"four\" }\n\
                    action = \"flag\"\n";
    let site = [Site::ResidPost(0)];
    let last = [Gather::Last];
    let library = bench.library.clone();
    let snapshot = library
        .probe("end", Positions::LastPromptToken, &last, &site, 1)
        .probe("two", Positions::Generated(2), &last, &site, 2)
        .probe("four", Positions::Generated(4), &last, &site, 3)
        .policy("p", document)
        .snapshot();
    let outcome = bench
        .rig
        .run(&snapshot, plain().monitored(Mode::Enforce, "p"));
    let rules: Vec<_> = outcome.verdicts().iter().map(|v| v.rule.as_str()).collect();
    assert_eq!(rules, ["steer", "head", "refuse", "flag"]);
    assert_eq!(
        (outcome.folded.text.as_str(), outcome.action()),
        ("no", Action::Refuse)
    );
    // Nothing had left when the first fired; two tokens, then four, were withdrawn.
    assert_eq!(
        (
            outcome.retracts(),
            outcome.completed().usage.withheld_tokens
        ),
        (2, 6)
    );
}
