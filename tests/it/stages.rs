//! Two stages: a prompt's score and a pilot's score, in a product or each for itself.

use std::sync::Arc;

use inwit::engine::event::FinishReason;
use inwit::engine::{Draft, Event};
use inwit::hooks::Site;
use inwit::policy::{Action, Mode};
use inwit::registry::Snapshot;
use inwit_probes::{Gather, Positions};

use crate::support::{LLAMA, Library, Outcome, Rig, Written, draft, prompt};

const POLICIES: [&str; 2] = [
    "when = { product = [\"one\", \"two\"], threshold = 0.5 }",
    "when = { all = [\"one\", \"two\"] }",
];

/// Stage one reads the prompt's end, stage two generated token 3. A threshold in the middle of
/// nowhere makes a stage sure or impossible; the product sees probabilities instead.
fn library(library: Library, when: &str, signs: [f32; 2]) -> Library {
    let width = 64;
    let constant = |sign: f32| {
        let mut weight = vec![0.0; width];
        // Never moved by it, so the bias alone decides.
        weight[0] = 1e-6;
        (weight, sign)
    };
    let thresholds = signs.map(|sign| if sign > 0.0 { -1e30 } else { 1e30 });
    let product = when.contains("product");
    let threshold = |stage: usize| match product {
        true => String::new(),
        false => format!("threshold_logit = {:?}\n", thresholds[stage]),
    };
    let document = format!(
        "[[detector]]\nname = \"one\"\nprobe = \"end\"\n{}[[detector]]\nname = \"two\"\n\
         probe = \"third\"\n{}[[rule]]\nname = \"both\"\n{when}\naction = {{ refuse = \"no\" }}\n\
         hold_back = 3\n",
        threshold(0),
        threshold(1)
    );
    let last = [Gather::Last];
    let site = Site::ResidPost(0);
    let (first, second) = (constant(signs[0]), constant(signs[1]));
    library
        .biased_probe("end", Positions::LastPromptToken, &last, site, first)
        .biased_probe("third", Positions::Generated(3), &last, site, second)
        .policy("p", &document)
}

fn enforced(max_tokens: u32) -> Draft {
    draft(prompt(6, 30))
        .most(max_tokens)
        .monitored(Mode::Enforce, "p")
}

fn snapshot(rig: &Rig, when: &str, signs: [f32; 2]) -> Arc<Snapshot> {
    library(rig.library(), when, signs).snapshot()
}

const YES: f32 = 9.0;
const NO: f32 = -9.0;

/// Sizes of the deltas that carried tokens.
fn deltas(outcome: &Outcome) -> Vec<usize> {
    let sizes = outcome.events.iter().filter_map(|event| match event {
        Event::Delta(delta) => Some(delta.token_ids.len()),
        _ => None,
    });
    sizes.filter(|size| *size > 0).collect()
}

#[test]
fn both_stages_must_agree_to_refuse() {
    let rig = Rig::start(LLAMA);
    for when in POLICIES {
        for (signs, refused) in [
            ([YES, YES], true),
            ([YES, NO], false),
            ([NO, YES], false),
            ([NO, NO], false),
        ] {
            let outcome = rig.run(&snapshot(&rig, when, signs), enforced(10));
            assert_eq!(
                outcome.action() == Action::Refuse,
                refused,
                "{when} {signs:?}"
            );
            assert_eq!(outcome.folded.text == "no", refused, "{when} {signs:?}");
            // Three tokens were held until the verdict on the third.
            assert_eq!(outcome.retracts(), 0);
            if refused {
                assert_eq!(outcome.completed().usage.withheld_tokens, 3);
                assert_eq!(outcome.gathered("two").position, 30 + 2);
            }
        }
    }
}

#[test]
fn a_negative_stage_one_releases_at_once() {
    let rig = Rig::start(LLAMA);
    for when in POLICIES {
        let outcome = rig.run(&snapshot(&rig, when, [NO, YES]), enforced(10));
        assert_eq!(deltas(&outcome), [1; 10], "{when}");
        let outcome = rig.run(&snapshot(&rig, when, [YES, NO]), enforced(10));
        assert_eq!(deltas(&outcome)[0], 4, "{when}");
    }
}

#[test]
fn an_answer_that_ends_earlier_has_stage_two_read_at_its_end() {
    let rig = Rig::start(LLAMA);
    for when in POLICIES {
        for tokens in [1, 2] {
            let outcome = rig.run(&snapshot(&rig, when, [YES, YES]), enforced(tokens));
            assert_eq!(outcome.folded.text, "no", "{when} {tokens}");
            assert_eq!(outcome.gathered("two").position, 30 + tokens - 1);
            assert!(!outcome.completed().partially_monitored);
            let outcome = rig.run(&snapshot(&rig, when, [YES, NO]), enforced(tokens));
            assert_eq!(outcome.tokens().len(), tokens as usize);
            assert_eq!(outcome.reason(), FinishReason::Length);
        }
    }
}

#[test]
fn an_empty_answer_has_stage_two_read_at_the_prompt() {
    let rig = Rig::start(LLAMA);
    for when in POLICIES {
        let snapshot = snapshot(&rig, when, [YES, YES]);
        let first = rig.run(&snapshot, draft(prompt(6, 30)).most(1)).tokens()[0];
        let mut empty = enforced(10);
        empty.sampling.stop_token_ids = vec![first];
        let outcome = rig.run(&snapshot, empty.clone());
        assert_eq!(outcome.folded.text, "no", "{when}");
        assert_eq!(outcome.gathered("two").position, 29);
        let snapshot = self::snapshot(&rig, when, [YES, NO]);
        let outcome = rig.run(&snapshot, empty);
        assert_eq!(outcome.reason(), FinishReason::Stop);
        assert_eq!(
            (outcome.folded.text.as_str(), outcome.tokens()),
            ("", &[][..])
        );
        assert_eq!(outcome.completed().usage.completion_tokens, 0);
    }
}

#[test]
fn a_short_answer_that_stage_one_cleared_is_wholly_monitored() {
    let rig = Rig::start(LLAMA);
    for when in POLICIES {
        let mut enforced = enforced(2);
        enforced.monitor.return_scores = false;
        let outcome = rig.run(&snapshot(&rig, when, [NO, YES]), enforced);
        assert_eq!(outcome.reason(), FinishReason::Length);
        assert!(!outcome.completed().partially_monitored, "{when}");
    }
}
