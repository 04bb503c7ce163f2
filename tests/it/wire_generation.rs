//! What policies do to answers, as callers see it: actions, statuses, what is told and what is not.
//! Knows the contract's words; the arithmetic behind them is tested elsewhere.

use std::collections::BTreeSet;

use inwit::policy::Mode;
use inwit::rpc::proto::generate_stream_response::Event;
use inwit::rpc::proto::intervention::Vector;
use inwit::rpc::proto::{
    Condition, DataType, FinishReason, GenerationInput, Intervention, InterventionKind,
    MonitorMode, MonitorOptions, PolicyAction, PositionSelection, ScoreRequest, Tensor,
};
use inwit_probes::{Positions, Site};
use tonic::Code;

use crate::wire_support::{
    Answer, Library, Server, Setup, chat, direction, enforced, raw, refusal, stream, unary, under,
};

const REFUSAL: &str = "No.";
const D_MODEL: usize = 64;
const LENGTH: u32 = 12;
const SECRETS: [&str; 3] = ["at-prompt", "at-4", "broken-4"];

fn stock(library: &mut Library) {
    library
        .probe("at-prompt", Positions::LastPromptToken, 10.0)
        .probe("at-4", Positions::Generated(4), 10.0)
        .probe("calm", Positions::EveryGenerated, -10.0)
        .probe_at("embedded", Site::Embed, Positions::EveryGenerated, 10.0)
        .broken_probe("broken-1", Positions::LastPromptToken)
        .broken_probe("broken-4", Positions::Generated(4))
        .vector("sideways", 4.0)
        .vector("explosive", 3e38)
        .head("soft");
    let actions = [
        ("flag", "\"flag\"".to_owned()),
        (
            "steer",
            "{ steer = { vector = \"sideways\", strength = 3.0 } }".to_owned(),
        ),
        (
            "explode",
            "{ steer = { vector = \"explosive\", strength = 1000.0 } }".to_owned(),
        ),
        ("head", "\"refusal_head\"".to_owned()),
        ("refuse", format!("{{ refuse = \"{REFUSAL}\" }}")),
        ("abort", "\"abort\"".to_owned()),
    ];
    for probe in ["at-prompt", "at-4", "broken-1", "broken-4", "calm"] {
        for (name, action) in &actions {
            library.rule(
                &format!("{probe}-{name}"),
                probe,
                &format!("action = {action}"),
            );
        }
    }
    library.rule(
        "open",
        "broken-4",
        "action = \"abort\"\non_failure = \"open\"",
    );
    library.policy(
        "strangers",
        &format!("out_of_domain = {{ refuse = \"{REFUSAL}\" }}"),
    );
}

async fn start() -> Server {
    Server::start(Setup::default(), stock).await
}

fn prompt() -> GenerationInput {
    chat(&[("user", "How was the harbour?")], LENGTH)
}

fn telling(mut input: GenerationInput) -> GenerationInput {
    input.monitor.get_or_insert_default().return_scores = true;
    input
}

/// Asks both ways, which must agree.
async fn ask(server: &Server, input: GenerationInput) -> Answer {
    let mut client = server.generation().await;
    let whole = unary(&mut client, input.clone()).await;
    let answer = stream(&mut client, input).await;
    match (&whole, &answer.status) {
        (Ok(whole), None) => {
            assert_eq!(
                (&whole.text, &whole.token_ids),
                (&answer.text, &answer.token_ids)
            );
            let end = answer.completed();
            assert_eq!(whole.finish_reason, end.finish_reason);
            assert_eq!(
                (whole.action, &whole.verdicts),
                (end.action, &answer.verdicts)
            );
            assert_eq!(whole.scores, end.scores);
            assert_eq!(whole.partially_monitored, end.partially_monitored);
            assert_eq!(whole.out_of_domain, end.out_of_domain);
        }
        (Err(whole), Some(streamed)) => assert_eq!(refusal(whole), refusal(streamed)),
        _ => panic!("{whole:?} but {answer:?}"),
    }
    server.idle().await;
    answer
}

fn check_end(answer: &Answer, reason: FinishReason, action: PolicyAction) {
    let end = answer.completed();
    assert_eq!(end.finish_reason, reason as i32, "{end:?}");
    assert_eq!(end.action, action as i32, "{end:?}");
}

fn check_status(answer: &Answer, code: Code, reason: &str) {
    let status = answer.status.as_ref().expect("a status");
    let told = refusal(status);
    assert_eq!((told.code, told.reason.as_str()), (code, reason));
    assert!(answer.completed.is_none());
    for secret in SECRETS {
        assert!(!format!("{status:?}").contains(secret), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flag_changes_nothing_and_is_told() {
    let server = start().await;
    let plain = ask(&server, prompt()).await;
    assert_eq!(plain.token_ids.len() as u32, LENGTH);
    check_end(&plain, FinishReason::Length, PolicyAction::Allow);
    for policy in ["at-prompt-flag", "at-4-flag"] {
        let flagged = ask(&server, enforced(policy, prompt())).await;
        assert_eq!(flagged.text, plain.text);
        check_end(&flagged, FinishReason::Length, PolicyAction::Flag);
        assert_eq!(flagged.verdicts.len(), 1);
        assert!(!flagged.verdicts[0].shadow);
        assert_eq!(flagged.verdicts[0].action, PolicyAction::Flag as i32);
        let started = flagged.started.as_ref().unwrap();
        assert_eq!(started.mode, MonitorMode::Enforce as i32);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steering_writes_the_answer_anew_and_keeps_the_ordinary_reason() {
    let server = start().await;
    let plain = ask(&server, prompt()).await;
    for policy in ["at-prompt-steer", "at-4-steer"] {
        let steered = ask(&server, enforced(policy, prompt())).await;
        check_end(&steered, FinishReason::Length, PolicyAction::Steer);
        assert_ne!(steered.text, plain.text);
        assert_eq!(steered.token_ids.len() as u32, LENGTH);
    }
    // Fired before anything left, and after: the same answer in the end.
    let early = ask(&server, enforced("at-prompt-steer", prompt())).await;
    let late = ask(&server, enforced("at-4-steer", prompt())).await;
    assert_eq!(early.text, late.text);
    assert!(early.place(|e| matches!(e, Event::Retract(_))).is_none());
    let verdict = late.place(|e| matches!(e, Event::Verdict(_)));
    let retract = late.place(|e| matches!(e, Event::Retract(_)));
    assert!(verdict.is_some() && verdict < retract, "{late:?}");
    let withheld = late.completed().usage.unwrap().withheld_tokens;
    assert_eq!(withheld, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_refusal_head_writes_the_answer_anew() {
    let server = start().await;
    let plain = ask(&server, prompt()).await;
    let early = ask(&server, enforced("at-prompt-head", prompt())).await;
    let late = ask(&server, enforced("at-4-head", prompt())).await;
    for answer in [&early, &late] {
        check_end(
            answer,
            FinishReason::RefusedByPolicy,
            PolicyAction::RefusalHead,
        );
        assert_ne!(answer.text, plain.text);
    }
    assert_eq!(early.text, late.text);
    // A caller may ask for the head by name: the same words, and no verdict.
    let asked = GenerationInput {
        refusal_head: "soft".into(),
        ..prompt()
    };
    let asked = ask(&server, asked).await;
    assert_eq!(asked.text, early.text);
    check_end(&asked, FinishReason::Length, PolicyAction::Allow);
    // And the cache of prompts does not remember it.
    assert_eq!(ask(&server, prompt()).await.text, plain.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_an_answer_and_not_an_error() {
    let server = start().await;
    for (policy, retracted) in [("at-prompt-refuse", false), ("at-4-refuse", true)] {
        let answer = ask(&server, enforced(policy, prompt())).await;
        check_end(&answer, FinishReason::RefusedByPolicy, PolicyAction::Refuse);
        assert_eq!(answer.text, REFUSAL);
        let retract = answer.place(|e| matches!(e, Event::Retract(_)));
        assert_eq!(retract.is_some(), retracted);
        let usage = answer.completed().usage.unwrap();
        assert_eq!(usage.completion_tokens as usize, answer.token_ids.len());
        assert_eq!(usage.withheld_tokens, if retracted { 4 } else { 0 });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_is_a_status_before_the_first_token_and_an_end_after_it() {
    let server = start().await;
    let early = ask(&server, enforced("at-prompt-abort", prompt())).await;
    check_status(&early, Code::PermissionDenied, "ABORTED_BY_POLICY");
    assert!(early.token_ids.is_empty() && early.text.is_empty());
    let late = ask(&server, enforced("at-4-abort", prompt())).await;
    check_end(&late, FinishReason::RefusedByPolicy, PolicyAction::Abort);
    assert!(
        late.text.is_empty() && late.token_ids.is_empty(),
        "{late:?}"
    );
    // Held back until the verdict, nothing has left: a status again.
    let mut held = enforced("at-4-abort", prompt());
    held.monitor.as_mut().unwrap().hold_back = Some(4);
    let held = ask(&server, held).await;
    check_status(&held, Code::PermissionDenied, "ABORTED_BY_POLICY");
    assert!(held.token_ids.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_monitor_closes_where_it_enforces() {
    let server = start().await;
    let plain = ask(&server, prompt()).await;
    let early = ask(&server, enforced("broken-1-flag", prompt())).await;
    check_status(&early, Code::Internal, "MONITOR_FAILED");
    let late = ask(&server, enforced("broken-4-flag", prompt())).await;
    let end = late.completed();
    assert_eq!(end.finish_reason, FinishReason::MonitorFailed as i32);
    assert!(end.partially_monitored);
    // What had left stays, what had not is dropped.
    assert!(!late.token_ids.is_empty() && late.token_ids.len() <= 4);
    assert_eq!(late.token_ids, plain.token_ids[..late.token_ids.len()]);

    // Open where its rule says so, in shadow, and where no rule needs it.
    for input in [
        enforced("open", prompt()),
        under("broken-4-flag", MonitorMode::Shadow, prompt()),
        under("broken-1-abort", MonitorMode::Shadow, prompt()),
    ] {
        let open = ask(&server, input).await;
        assert_eq!(open.text, plain.text);
        check_end(&open, FinishReason::Length, PolicyAction::Allow);
        assert!(open.completed().partially_monitored);
    }
    // A steering vector that breaks the model fails as a monitor does.
    let broken = ask(&server, enforced("at-prompt-explode", prompt())).await;
    check_status(&broken, Code::Internal, "MONITOR_FAILED");
    assert_eq!(ask(&server, prompt()).await.text, plain.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_shadow_verdicts_are_told_and_not_acted_upon() {
    let server = start().await;
    let plain = ask(&server, prompt()).await;
    for (policy, action) in [
        ("at-prompt-abort", PolicyAction::Abort),
        ("at-4-refuse", PolicyAction::Refuse),
        ("at-4-head", PolicyAction::RefusalHead),
        ("at-prompt-steer", PolicyAction::Steer),
    ] {
        let answer = ask(&server, under(policy, MonitorMode::Shadow, prompt())).await;
        assert_eq!(answer.text, plain.text, "{policy}");
        check_end(&answer, FinishReason::Length, action);
        assert!(answer.verdicts.iter().all(|verdict| verdict.shadow));
        let decision = server
            .decision(&answer.started.as_ref().unwrap().request_id)
            .await;
        assert_eq!(decision.mode, Mode::Shadow);
        assert!(decision.actions.iter().all(|action| action.shadow));
    }
    let off = GenerationInput {
        monitor: Some(MonitorOptions {
            mode: MonitorMode::Off.into(),
            ..Default::default()
        }),
        ..prompt()
    };
    let off = ask(&server, off).await;
    assert_eq!(off.text, plain.text);
    assert!(off.verdicts.is_empty());
    check_end(&off, FinishReason::Length, PolicyAction::Allow);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scores_and_names_are_told_only_to_who_asks() {
    let server = start().await;
    for policy in [
        "at-prompt-refuse",
        "at-4-flag",
        "calm-abort",
        "broken-4-flag",
    ] {
        let silent = ask(&server, enforced(policy, prompt())).await;
        let told = format!("{:?}", silent.events);
        for word in SECRETS.iter().chain(&["calm", "rule\"", "detector\""]) {
            assert!(!told.contains(&format!("\"{word}")), "{word}: {told}");
        }
        assert!(silent.completed().scores.is_empty());
        assert!(
            silent
                .verdicts
                .iter()
                .all(|v| v.evidence.is_empty() && v.rule.is_empty())
        );
    }

    let open = ask(&server, telling(enforced("at-4-flag", prompt()))).await;
    let verdict = &open.verdicts[0];
    assert_eq!(verdict.rule, "at-4-flag-rule");
    let evidence = &verdict.evidence[0];
    assert_eq!(evidence.probe, "at-4");
    assert_eq!(evidence.detector, "at-4-detector");
    assert_eq!(evidence.sites, ["blocks.0.hook_resid_post"]);
    assert!(evidence.threshold.is_some_and(|bound| bound.abs() < 1e-3));
    assert!(evidence.fired && (evidence.logit - 10.0).abs() < 1e-3);
    assert!(evidence.probability.is_some_and(|p| p > 0.99));
    let prompt_tokens = i64::from(open.completed().usage.unwrap().prompt_tokens);
    assert_eq!(evidence.position, prompt_tokens + 3);
    // Per token: no probability, and every answer token once for the probe that reads them all.
    let mut positions = Vec::new();
    for event in &open.events {
        let Event::Delta(delta) = event else { continue };
        for score in &delta.scores {
            assert!(score.probability.is_none() && score.detector.is_empty());
            if score.probe == "calm" {
                positions.push(score.position);
            }
        }
    }
    let expected: Vec<i64> = (prompt_tokens..prompt_tokens + i64::from(LENGTH)).collect();
    assert_eq!(positions, expected);
    // One gathered score per detector, and per probe without one; a probe that failed has none.
    let gathered: BTreeSet<_> = open
        .completed()
        .scores
        .iter()
        .map(|s| s.probe.as_str())
        .collect();
    assert!(gathered.contains("at-4") && gathered.contains("calm"));
    assert!(!gathered.contains("broken-4"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_score_reads_a_prompt_or_a_finished_answer() {
    let server = start().await;
    let mut client = server.generation().await;
    let input = |policy: &str| GenerationInput {
        sampling: None,
        ..enforced(policy, prompt())
    };
    let request = ScoreRequest {
        input: Some(input("at-prompt-abort")),
        answer: None,
    };
    let scored = client.score(request).await.unwrap().into_inner();
    assert_eq!(scored.action, PolicyAction::Abort as i32);
    assert!(scored.verdicts[0].shadow, "a score acts on nothing");
    assert!(scored.verdicts[0].rule.is_empty());
    assert_eq!(scored.usage.unwrap().completion_tokens, 0);
    let probes: Vec<_> = scored.scores.iter().map(|s| s.probe.as_str()).collect();
    assert!(probes.contains(&"at-prompt"), "{probes:?}");

    let request = ScoreRequest {
        input: Some(telling(input("at-4-flag"))),
        answer: Some("The harbour was quiet before the morning.".into()),
    };
    let scored = client.score(request).await.unwrap().into_inner();
    let usage = scored.usage.unwrap();
    assert!(usage.completion_tokens >= 4);
    assert_eq!(scored.action, PolicyAction::Flag as i32);
    let of_answer = scored.token_scores.iter().filter(|s| s.probe == "calm");
    assert_eq!(of_answer.count() as u32, usage.completion_tokens);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_another_form_is_marked_or_refused() {
    let server = start().await;
    let inside = ask(&server, prompt()).await;
    assert!(!inside.completed().out_of_domain);
    for input in [
        raw("Once", 4),
        chat(&[("system", "Be brief."), ("user", "Hi")], 4),
        chat(&[("user", "Hi"), ("assistant", "Hello"), ("user", "Hi")], 4),
        chat(&[("user", "Hi"), ("assistant", "Sure")], 4),
    ] {
        let outside = ask(&server, input.clone()).await;
        assert!(outside.completed().out_of_domain);
        check_end(&outside, FinishReason::Length, PolicyAction::Allow);
        let refused = ask(&server, enforced("strangers", input)).await;
        assert_eq!(refused.text, REFUSAL);
        check_end(
            &refused,
            FinishReason::RefusedByPolicy,
            PolicyAction::Refuse,
        );
    }
    let served = ask(&server, enforced("strangers", prompt())).await;
    assert_eq!(served.text, inside.text);
}

fn by_value(values: &[f32], strength: f32) -> Intervention {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Intervention {
        vector: Some(Vector::Value(Tensor {
            dtype: DataType::Fp32.into(),
            shape: vec![values.len() as i64],
            crc32c: Some(crc32c::crc32c(&bytes)),
            data: bytes.into(),
        })),
        site: "blocks.0.hook_resid_post".into(),
        kind: InterventionKind::Add.into(),
        strength: Some(strength),
        ..Default::default()
    }
}

fn by_name(strength: f32) -> Intervention {
    Intervention {
        vector: Some(Vector::Name("sideways".into())),
        kind: InterventionKind::Add.into(),
        strength: Some(strength),
        ..Default::default()
    }
}

async fn steered(server: &Server, interventions: Vec<Intervention>) -> String {
    let input = GenerationInput {
        interventions,
        ..prompt()
    };
    let answer = ask(server, input).await;
    check_end(&answer, FinishReason::Length, PolicyAction::Allow);
    answer.text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interventions_by_name_and_by_value_are_the_same() {
    let server = start().await;
    let plain = ask(&server, prompt()).await.text;
    let values = direction(D_MODEL, 4.0);
    let named = steered(&server, vec![by_name(3.0)]).await;
    assert_ne!(named, plain);
    assert_eq!(steered(&server, vec![by_value(&values, 3.0)]).await, named);
    // What two do one does; nothing does nothing.
    let twice = vec![by_name(1.0), by_value(&values, 2.0)];
    assert_eq!(steered(&server, twice).await, named);
    assert_eq!(steered(&server, vec![by_name(0.0)]).await, plain);
    assert_eq!(
        steered(&server, vec![by_value(&[0.0; D_MODEL], 3.0)]).await,
        plain
    );
    // A condition that holds changes nothing, one that does not leaves the row alone.
    let only_if = |above: f32| Intervention {
        condition: Some(Condition {
            detector: "embedded".into(),
            above,
        }),
        ..by_name(3.0)
    };
    assert_eq!(steered(&server, vec![only_if(0.0)]).await, named);
    assert_eq!(steered(&server, vec![only_if(20.0)]).await, plain);
    // Only where it is asked for: what comes after the prompt alone is another answer.
    let generated = Intervention {
        positions: PositionSelection::Generated.into(),
        ..by_name(3.0)
    };
    let late = steered(&server, vec![generated]).await;
    assert_ne!(late, named);
    // And nobody else was touched.
    assert_eq!(ask(&server, prompt()).await.text, plain);
}
