//! Where an answer ends and what its text is: stop strings, stop tokens, limits and characters.

use inwit::engine::event::FinishReason;
use inwit::engine::{
    Draft, Event, InterventionDraft, InterventionKindDraft, PositionSelection, VectorDraft,
};
use inwit::hooks::Site;

use crate::support::{FAMILIES, LLAMA, Rig, Written, draft, prompt};

fn bytes_of(rig: &Rig, tokens: &[u32]) -> Vec<u8> {
    let tokenizer = rig.engine.tokenizer();
    let bytes = tokens
        .iter()
        .flat_map(|token| tokenizer.token_bytes(*token));
    bytes.copied().collect()
}

#[test]
fn an_answer_is_the_text_of_its_tokens_with_a_log_probability_each() {
    for setup in FAMILIES {
        let rig = Rig::start(setup);
        let snapshot = rig.library().snapshot();
        for seed in 0..20 {
            let outcome = rig.run(&snapshot, draft(prompt(seed, 30)).most(30));
            let text = bytes_of(&rig, outcome.tokens());
            assert_eq!(outcome.folded.text, String::from_utf8_lossy(&text));
            assert_eq!(outcome.folded.logprobs.len(), outcome.tokens().len());
            for (token, logprobs) in outcome.tokens().iter().zip(&outcome.folded.logprobs) {
                assert_eq!(logprobs.chosen.0, *token);
                // Greedy: nothing is likelier.
                assert_eq!(logprobs.chosen, logprobs.alternatives[0]);
                assert!(logprobs.chosen.1 <= 0.0 && logprobs.alternatives.len() == 2);
            }
            let ended = outcome.tokens().len() < 30;
            let reason = if ended {
                FinishReason::Stop
            } else {
                FinishReason::Length
            };
            assert_eq!(outcome.reason(), reason);
        }
    }
}

#[test]
fn a_stop_string_over_two_tokens_ends_the_answer_right_before_it() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().snapshot();
    let mut checked = 0;
    for seed in 0..40 {
        let plain = rig.run(&snapshot, draft(prompt(seed, 30)).most(20));
        let text = bytes_of(&rig, plain.tokens());
        // The first boundary from token 4 on with a letter on either side.
        let boundary = (4..plain.tokens().len()).find_map(|count| {
            let at = bytes_of(&rig, &plain.tokens()[..count]).len();
            let pair = std::str::from_utf8(text.get(at - 1..at + 1)?).ok()?;
            Some((pair.to_owned(), count)).filter(|_| pair.is_ascii())
        });
        let Some((stop, _)) = boundary else {
            continue;
        };
        let at = text
            .windows(2)
            .position(|pair| pair == stop.as_bytes())
            .unwrap();
        let mut stopped = draft(prompt(seed, 30)).most(20);
        stopped.sampling.stop = vec!["never in an answer".into(), stop];
        let outcome = rig.run(&snapshot, stopped);
        assert_eq!(outcome.reason(), FinishReason::StopSequence);
        assert_eq!(outcome.folded.text, String::from_utf8_lossy(&text[..at]));
        let kept = outcome.tokens().len();
        assert_eq!(outcome.tokens(), &plain.tokens()[..kept]);
        assert!(bytes_of(&rig, outcome.tokens()).len() >= at);
        assert_eq!(outcome.folded.logprobs.len(), kept);
        checked += 1;
    }
    assert!(checked > 5, "only {checked} answers had such a boundary");
}

#[test]
fn a_stop_token_ends_the_answer_and_is_no_part_of_it() {
    let rig = Rig::start(LLAMA);
    let snapshot = rig.library().snapshot();
    let plain = rig.run(&snapshot, draft(prompt(1, 30)).most(20));
    let stop = plain.tokens()[7];
    let first = plain
        .tokens()
        .iter()
        .position(|token| *token == stop)
        .unwrap();
    let mut stopped = draft(prompt(1, 30)).most(20);
    stopped.sampling.stop_token_ids = vec![stop];
    let outcome = rig.run(&snapshot, stopped);
    assert_eq!(outcome.tokens(), &plain.tokens()[..first]);
    assert_eq!(outcome.reason(), FinishReason::Stop);
}

#[test]
fn the_model_s_own_end_is_no_part_of_the_answer() {
    let rig = Rig::start(LLAMA);
    let vocab = rig.engine.info().config.vocab_size;
    let end = rig.engine.tokenizer().stop_ids()[0] as usize;
    // Whatever the state, one of the two rows is far above every other token.
    let mut a = vec![0.0; vocab * 2];
    a[end * 2] = 1000.0;
    let snapshot = rig
        .library()
        .head_of("ends", 2, a, constant_reading())
        .snapshot();
    let ended = Draft {
        refusal_head: Some("ends".into()),
        ..held_at(draft(prompt(1, 30)), 1.0)
    };
    let outcome = rig.run(&snapshot, ended);
    assert_eq!(outcome.reason(), FinishReason::Stop);
    assert_eq!(
        (outcome.folded.text.as_str(), outcome.tokens().len()),
        ("", 0)
    );
}

const D_MODEL: usize = 64;

/// Reads the first number of the final state.
fn constant_reading() -> Vec<f32> {
    let mut b = vec![0.0; 2 * D_MODEL];
    b[0] = 1.0;
    b
}

/// With the first number of every final state held at `value`.
fn held_at(draft: Draft, value: f32) -> Draft {
    let mut first = vec![0.0; D_MODEL];
    first[0] = 1.0;
    let clamp = |kind| InterventionDraft {
        vector: VectorDraft::Value(first.clone()),
        site: Some(Site::FinalNorm.to_string()),
        kind,
        strength: Some(value),
        positions: PositionSelection::All,
        condition: None,
    };
    draft
        .steered(clamp(InterventionKindDraft::ClampAbove))
        .steered(clamp(InterventionKindDraft::ClampBelow))
}

#[test]
fn a_character_over_two_tokens_leaves_whole() {
    let rig = Rig::start(LLAMA);
    let vocab = rig.engine.info().config.vocab_size as u32;
    let byte = |byte: u8| {
        let tokenizer = rig.engine.tokenizer();
        let mut tokens = 0..vocab;
        tokens
            .find(|token| tokenizer.token_bytes(*token) == [byte])
            .unwrap() as usize
    };
    let (lead, tail) = (byte(0xc3), byte(0xa9));
    let mut a = vec![0.0; vocab as usize * 2];
    (a[lead * 2], a[tail * 2]) = (1000.0, 1000.0);
    let snapshot = rig
        .library()
        .head_of("bytes", 2, a, constant_reading())
        .snapshot();
    let bytes = |length| {
        let mut bytes = Draft {
            refusal_head: Some("bytes".into()),
            ..held_at(draft(prompt(1, 30)).most(length), 1.0)
        };
        // What was said often is said less: the two bytes take turns, if not strictly.
        bytes.sampling.frequency_penalty = Some(2.0);
        bytes
    };
    for length in 1..30 {
        let outcome = rig.run(&snapshot, bytes(length));
        let text = bytes_of(&rig, outcome.tokens());
        assert_eq!(outcome.tokens().len(), length as usize);
        assert!(
            text.iter().all(|byte| [0xc3, 0xa9].contains(byte)),
            "{text:x?}"
        );
        assert_eq!(outcome.folded.text, String::from_utf8_lossy(&text));
        let mut seen = 0;
        for event in &outcome.events {
            if let Event::Delta(delta) = event {
                seen += delta.token_ids.len();
                let so_far = String::from_utf8_lossy(&text[..seen]).into_owned();
                assert!(
                    outcome.folded.text.starts_with(&so_far),
                    "a character was cut"
                );
            }
        }
    }
    let whole = rig.run(&snapshot, bytes(30));
    assert!(whole.folded.text.contains('é'), "{}", whole.folded.text);
}
