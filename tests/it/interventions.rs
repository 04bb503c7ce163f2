//! Interventions and captures: what is asked for is done, what changes nothing changes no bit.

use std::collections::BTreeMap;

use inwit::engine::sampler::SamplingDraft;
use inwit::engine::{
    CaptureDraft, ConditionDraft, Draft, Event, InterventionDraft, InterventionKindDraft,
    PositionSelection, VectorDraft,
};
use inwit::error::Error;
use inwit::hooks::Site;
use inwit::policy::{Action, Mode};

use crate::support::{
    FAMILIES, LLAMA, Outcome, Rig, Setup, Written, add, draft, numbers, prompt, push,
};

fn capturing(draft: Draft, sites: &[Site], positions: PositionSelection) -> Draft {
    Draft {
        capture: Some(CaptureDraft {
            sites: sites.iter().map(Site::to_string).collect(),
            positions,
        }),
        ..draft
    }
}

/// Per site, position -> (token, hidden state). No position may come twice.
type Captures = BTreeMap<Site, BTreeMap<u32, (u32, Vec<f32>)>>;

fn captures(outcome: &Outcome) -> Captures {
    let mut captures = Captures::new();
    for event in &outcome.events {
        let Event::Captured(captured) = event else {
            continue;
        };
        let width = captured.values.len() / captured.tokens.len();
        let rows = captured.tokens.iter().zip(captured.values.chunks(width));
        for (position, (token, row)) in (captured.first_position..).zip(rows) {
            let of_site = captures.entry(captured.site).or_default();
            let before = of_site.insert(position, (*token, row.to_vec()));
            assert!(before.is_none(), "{} {position} twice", captured.site);
        }
    }
    captures
}

fn all_sites(rig: &Rig) -> Vec<Site> {
    Site::all(rig.engine.info().config.n_layers).collect()
}

#[test]
fn the_residual_stream_is_the_sum_of_what_is_added_to_it() {
    for setup in FAMILIES {
        let rig = Rig::start(setup);
        let snapshot = rig.library().snapshot();
        let wish = capturing(
            draft(prompt(1, 20)),
            &all_sites(&rig),
            PositionSelection::All,
        );
        let captures = captures(&rig.run(&snapshot, wish));
        let layers = rig.engine.info().config.n_layers as u16;
        let check = |before: Site, added: Site, after: Site| {
            for (position, (_, after_row)) in &captures[&after] {
                let before_row = &captures[&before][position].1;
                let added_row = &captures[&added][position].1;
                let sum: Vec<f32> = before_row
                    .iter()
                    .zip(added_row)
                    .map(|(b, a)| b + a)
                    .collect();
                assert_eq!(&sum, after_row, "{} {after} @{position}", setup.model);
            }
        };
        for layer in 0..layers {
            check(
                Site::ResidPre(layer),
                Site::AttnOut(layer),
                Site::ResidMid(layer),
            );
            check(
                Site::ResidMid(layer),
                Site::MlpOut(layer),
                Site::ResidPost(layer),
            );
            if layer > 0 {
                let (before, after) = (Site::ResidPost(layer - 1), Site::ResidPre(layer));
                assert_eq!(captures[&before], captures[&after]);
            }
        }
        assert_eq!(captures[&Site::Embed], captures[&Site::ResidPre(0)]);
    }
}

fn direction(kind: InterventionKindDraft, vector: Vec<f32>) -> InterventionDraft {
    InterventionDraft {
        vector: VectorDraft::Value(vector),
        site: Some(Site::ResidPost(0).to_string()),
        ..push(kind, None, PositionSelection::All)
    }
}

#[test]
fn a_direction_is_the_same_however_long_its_vector() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().snapshot();
    let along = numbers(3, 64);
    let of = |scale: f32| {
        let vector = along.iter().map(|value| value * scale).collect();
        let steered =
            draft(prompt(1, 20)).steered(direction(InterventionKindDraft::ProjectOut, vector));
        captures(&rig.run(
            &snapshot,
            capturing(steered, &[Site::ResidPost(0)], PositionSelection::All),
        ))
    };
    // Squares of these overflow and vanish in f32.
    let (plain, long, short) = (of(1.0), of(2f32.powi(80)), of(2f32.powi(-80)));
    assert_eq!(long, plain);
    assert_eq!(short, plain);
    let row = &plain[&Site::ResidPost(0)][&5].1;
    let dot: f32 = row.iter().zip(&along).map(|(a, b)| a * b).sum();
    assert!(dot.abs() < 1e-4, "{dot} is left along the vector");
}

#[test]
fn a_steered_state_that_is_not_finite_is_the_caller_s_fault_wherever_it_shows() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let huge = InterventionDraft {
        vector: VectorDraft::Value(vec![3e38; 64]),
        site: Some(Site::ResidPost(0).to_string()),
        ..add(900.0, PositionSelection::All)
    };
    let answered = draft(prompt(1, 20)).steered(huge);
    let watched = answered.clone().monitored(Mode::Enforce, "watch");
    let scored = Draft {
        score_only: true,
        sampling: SamplingDraft::default(),
        ..answered.clone().monitored(Mode::Shadow, "watch")
    };
    let site = [Site::ResidPost(1)];
    let read = capturing(answered.clone(), &site, PositionSelection::AllPrompt);
    for (case, wish) in [
        ("answered", answered),
        ("watched", watched),
        ("scored", scored),
        ("captured", read),
    ] {
        let outcome = rig.run(&snapshot, wish);
        let named = matches!(&outcome.error, Some(Error::InvalidRequest { field, .. }) if field == "input.interventions");
        assert!(named, "{case}: {:?}", outcome.error);
        assert!(captures(&outcome).is_empty(), "{case}");
    }
    rig.settle();
}

#[test]
fn a_caller_s_refusal_head_stays_when_the_policy_steers() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let headed = |draft: Draft| Draft {
        refusal_head: Some("refusing".into()),
        ..draft
    };
    let plain = || draft(prompt(1, 20));
    let steered = || plain().monitored(Mode::Enforce, "steers");
    let both = rig.run(&snapshot, headed(steered()));
    let steered = rig.run(&snapshot, steered());
    let headed = rig.run(&snapshot, headed(plain()));
    assert_ne!(both.tokens(), steered.tokens());
    assert_ne!(both.tokens(), headed.tokens());
    assert_ne!(both.folded.logprobs[0], steered.folded.logprobs[0]);
    assert_eq!(both.action(), Action::Steer);
}

#[test]
fn states_that_nobody_reads_are_bounded_over_all_requests() {
    // Two sites of 64 numbers for ten tokens of a prompt: 5,120 bytes.
    let rig = Rig::start(Setup {
        capture_bytes: 12_000,
        ..LLAMA
    });
    let snapshot = rig.library().snapshot();
    let sites = [Site::Embed, Site::FinalNorm];
    let wish = |tokens| {
        capturing(
            draft(prompt(1, tokens)),
            &sites,
            PositionSelection::AllPrompt,
        )
    };
    let held = [
        rig.submit(&snapshot, wish(10)).unwrap(),
        rig.submit(&snapshot, wish(10)).unwrap(),
    ];
    let refused = rig.submit(&snapshot, wish(10));
    assert!(matches!(refused, Err(Error::Overloaded { .. })));
    let never = rig.submit(&snapshot, wish(40));
    assert!(matches!(never, Err(Error::InvalidRequest { field, .. }) if field == "sites"));
    for events in held {
        assert_eq!(captures(&Outcome::of(events)).len(), 2);
    }
    rig.submit(&snapshot, wish(10)).unwrap();
}

#[test]
fn captures_do_not_depend_on_how_the_prompt_was_cut() {
    for setup in FAMILIES {
        let of = |budget| {
            let rig = Rig::start(Setup { budget, ..setup });
            let snapshot = rig.library().snapshot();
            let sites = all_sites(&rig);
            let wish = capturing(draft(prompt(1, 50)), &sites, PositionSelection::All);
            captures(&rig.run(&snapshot, wish))
        };
        let whole = of(100_000);
        assert_eq!(of(7), whole);
        assert_eq!(of(1), whole);
    }
}

#[test]
fn captured_positions_are_those_asked_for_the_last_generated_one_included() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let site = [Site::ResidPost(1)];
    let (length, answer) = (50, 10);
    let of = |positions| {
        let wish = capturing(draft(prompt(1, length as usize)), &site, positions);
        let outcome = rig.run(&snapshot, wish);
        let mut tokens = prompt(1, length as usize);
        tokens.extend(outcome.tokens());
        let captures = captures(&outcome).remove(&site[0]).unwrap();
        for (position, (token, _)) in &captures {
            assert_eq!(*token, tokens[*position as usize]);
        }
        captures
    };
    let all = of(PositionSelection::All);
    assert_eq!(
        all.keys().copied().collect::<Vec<_>>(),
        Vec::from_iter(0..length + answer)
    );
    for (positions, range) in [
        (PositionSelection::LastPromptToken, length - 1..length),
        (PositionSelection::AllPrompt, 0..length),
        (PositionSelection::Generated, length..length + answer),
        (
            PositionSelection::FromLastPromptToken,
            length - 1..length + answer,
        ),
    ] {
        let captures = of(positions);
        let expected: BTreeMap<_, _> = range.map(|p| (p, all[&p].clone())).collect();
        assert_eq!(
            captures.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>()
        );
        assert_eq!(captures, expected, "{positions:?}");
    }
}

#[test]
fn a_capture_reads_every_row_even_where_the_prefix_is_cached() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().snapshot();
    let wish = || {
        capturing(
            draft(prompt(1, 50)),
            &[Site::Embed],
            PositionSelection::AllPrompt,
        )
    };
    rig.run(&snapshot, draft(prompt(1, 50)));
    let captures = captures(&rig.run(&snapshot, wish()));
    assert_eq!(captures[&Site::Embed].len(), 50);
}

#[test]
fn a_capture_of_an_answer_given_is_that_of_the_same_answer_generated() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().snapshot();
    let sites = [Site::ResidPost(0), Site::FinalNorm];
    let generated = rig.run(
        &snapshot,
        capturing(draft(prompt(1, 30)), &sites, PositionSelection::All),
    );
    let mut tokens = prompt(1, 30);
    tokens.extend(generated.tokens());
    let mut given = capturing(draft(tokens), &sites, PositionSelection::All);
    given.score_only = true;
    assert_eq!(captures(&rig.run(&snapshot, given)), captures(&generated));
}

#[test]
fn steering_by_nothing_is_no_steering() {
    for setup in FAMILIES {
        let rig = Rig::start(setup);
        let snapshot = rig.library().complete().snapshot();
        let sites = all_sites(&rig);
        let watched = || {
            let watched = draft(prompt(2, 40))
                .monitored(Mode::Shadow, "watch")
                .uncached();
            capturing(watched, &sites, PositionSelection::All)
        };
        let none = rig.run(&snapshot, watched()).bits();
        let width = rig.engine.info().config.d_model;
        for site in &sites {
            let nothing = |vector, strength| InterventionDraft {
                vector,
                site: Some(site.to_string()),
                ..add(strength, PositionSelection::All)
            };
            let zero_vector = nothing(VectorDraft::Value(vec![0.0; width]), 5.0);
            let zero_strength = nothing(VectorDraft::Named("push".into()), 0.0);
            for intervention in [zero_vector, zero_strength] {
                let steered = watched().steered(intervention);
                assert_eq!(rig.run(&snapshot, steered).bits(), none, "{site}");
            }
        }
    }
}

#[test]
fn each_kind_moves_the_state_as_its_formula_says() {
    let rig = Rig::start(LLAMA);
    let library = rig.library().complete();
    let snapshot = library.snapshot();
    let site = Site::ResidPost(0);
    let vector = snapshot.vectors["push"].values.to_vec();
    let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    let unit: Vec<f32> = vector.iter().map(|v| v / length).collect();
    let along = |row: &[f32]| row.iter().zip(&unit).map(|(h, v)| h * v).sum::<f32>();
    let states = |intervention: Option<InterventionDraft>| {
        let mut wish = capturing(draft(prompt(2, 20)), &[site], PositionSelection::AllPrompt);
        wish.interventions.extend(intervention);
        let rows = captures(&rig.run(&snapshot, wish)).remove(&site).unwrap();
        rows.into_values().map(|(_, row)| row).collect::<Vec<_>>()
    };
    let before = states(None);
    let check = |kind, strength, expected: &dyn Fn(&[f32]) -> f32| {
        let after = states(Some(push(kind, strength, PositionSelection::AllPrompt)));
        for (before, after) in before.iter().zip(&after) {
            let moved = expected(before) - along(before);
            for ((b, a), v) in before.iter().zip(after).zip(&unit) {
                assert!((b + moved * v - a).abs() < 1e-4, "{kind:?}");
            }
        }
    };
    let bound = before.iter().map(|row| along(row)).sum::<f32>() / before.len() as f32;
    assert!(before.iter().any(|row| along(row) > bound + 0.01));
    assert!(before.iter().any(|row| along(row) < bound - 0.01));
    check(InterventionKindDraft::Add, Some(2.0), &|row| {
        along(row) + 2.0 * length
    });
    check(InterventionKindDraft::ProjectOut, None, &|_| 0.0);
    check(InterventionKindDraft::ClampAbove, Some(bound), &|row| {
        along(row).min(bound)
    });
    check(InterventionKindDraft::ClampBelow, Some(bound), &|row| {
        along(row).max(bound)
    });
}

#[test]
fn a_condition_steers_exactly_the_rows_whose_score_is_above() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let site = Site::ResidPost(0);
    let probe = &snapshot.probe("early").unwrap().probe;
    let wish = || {
        let sites = [Site::Embed, site];
        capturing(draft(prompt(2, 60)), &sites, PositionSelection::All)
    };
    let before = captures(&rig.run(&snapshot, wish()));
    // Mode off: a condition is scored whether or not anybody watches.
    let above = 0.1;
    let steered = wish().steered(InterventionDraft {
        condition: Some(ConditionDraft {
            detector: "early".into(),
            above,
        }),
        ..add(4.0, PositionSelection::AllPrompt)
    });
    let after = captures(&rig.run(&snapshot, steered));
    let mut held = 0;
    for position in 0..60u32 {
        let embedding = &before[&Site::Embed][&position].1;
        let holds = probe.score_row(|_| embedding).unwrap().logit > above;
        held += usize::from(holds);
        let (before, after) = (&before[&site][&position].1, &after[&site][&position].1);
        if position == 0 || holds {
            assert_eq!(before != after, holds, "row {position}");
        }
        let vector = &snapshot.vectors["push"].values;
        let dot = |row: &[f32]| {
            row.iter()
                .zip(vector.iter())
                .map(|(h, v)| h * v)
                .sum::<f32>()
        };
        let square: f32 = vector.iter().map(|v| v * v).sum();
        let moved = (dot(after) - dot(before)) / square;
        assert!(
            (moved - if holds { 4.0 } else { 0.0 }).abs() < 0.5,
            "{position} {moved}"
        );
    }
    assert!((10..50).contains(&held), "{held} rows held");
}

#[test]
fn several_interventions_apply_in_their_order() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let clamp = || {
        push(
            InterventionKindDraft::ClampAbove,
            Some(0.0),
            PositionSelection::All,
        )
    };
    let run = |first: InterventionDraft, then: InterventionDraft| {
        let steered = draft(prompt(2, 40)).steered(first).steered(then);
        rig.run(&snapshot, steered).bits()
    };
    let push_last = run(clamp(), add(3.0, PositionSelection::All));
    let clamp_last = run(add(3.0, PositionSelection::All), clamp());
    assert_ne!(push_last, clamp_last);
}

#[test]
fn an_intervention_that_leaves_no_finite_logits_fails_the_request() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let width = rig.engine.info().config.d_model;
    let overflow = InterventionDraft {
        vector: VectorDraft::Value(vec![3e38; width]),
        site: Some(Site::ResidPost(1).to_string()),
        ..add(1000.0, PositionSelection::All)
    };
    let outcome = rig.run(&snapshot, draft(prompt(2, 40)).steered(overflow));
    let message = outcome.error.expect("fails").to_string();
    assert!(message.contains("input.interventions"), "{message}");
}

#[test]
fn a_sampled_request_keeps_its_draws_under_a_capture() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().complete().snapshot();
    let sampled = || {
        let mut sampled = draft(prompt(2, 40));
        sampled.sampling = SamplingDraft {
            temperature: Some(1.0),
            seed: Some(9),
            ..sampled.sampling
        };
        sampled
    };
    let plain = rig.run(&snapshot, sampled());
    let wish = capturing(sampled(), &[Site::FinalNorm], PositionSelection::All);
    assert_eq!(rig.run(&snapshot, wish).tokens(), plain.tokens());
}
