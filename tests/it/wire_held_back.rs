//! What the policy withholds is never on the wire: read from the socket itself, byte by byte of the
//! body, at the first token, at the last, inside a character and inside a stop string.
//! And what is left is the same answer whichever way it is asked for.

use inwit::engine::sampler::SamplingDraft;
use inwit::lab::answer;
use inwit::lab::bench::Bench;
use inwit::policy::Mode;
use inwit::rpc::proto::generate_stream_response::Event;
use inwit::rpc::proto::generation_service_client::GenerationServiceClient;
use inwit::rpc::proto::{
    CaptureActivationsRequest, FinishReason, GenerateResponse, GenerateStreamRequest,
    GenerateStreamResponse, GenerationInput, MonitorMode, PolicyAction, PositionSelection,
    ProbeScore, SamplingOptions,
};
use inwit_probes::Positions;
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::wire_support::{
    Answer, GENERATE_STREAM, Library, Server, Setup, enforced, framed, raw, raw_call, stream, unary,
};

const REFUSAL: &str = "I can't help with that. ✋";
const PROMPT: &str = "The harbour was quiet before";
/// The answers below have at most this many tokens.
const LENGTH: u32 = 24;
const HOLDS: [u32; 4] = [0, 1, 2, 5];

fn policy(fires_at: u32, hold_back: u32, action: &str) -> String {
    format!("at-{fires_at}-hold-{hold_back}-{action}")
}

/// For every token a probe that fires there, under every action and hold-back.
fn stock(library: &mut Library) {
    library.head("soft");
    for k in 1..=LENGTH + 2 {
        library.probe(&format!("at-{k}"), Positions::Generated(k), 10.0);
        for hold_back in HOLDS {
            for (name, action) in [
                ("refuse", format!("{{ refuse = \"{REFUSAL}\" }}")),
                ("head", "\"refusal_head\"".to_owned()),
                ("abort", "\"abort\"".to_owned()),
                ("flag", "\"flag\"".to_owned()),
            ] {
                let rest = format!("action = {action}\nhold_back = {hold_back}");
                library.rule(&policy(k, hold_back, name), &format!("at-{k}"), &rest);
            }
        }
    }
    // It reads every token, so it could fire until the end, and never does.
    library
        .probe("never", Positions::EveryGenerated, -10.0)
        .rule("watch", "never", "action = \"abort\"\nhold_back = 3");
}

async fn start() -> Server {
    Server::start(Setup::default(), stock).await
}

/// An answer of which nothing was withheld.
struct Plain {
    reply: GenerateResponse,
    /// The text after each token, as the tokenizer has it, lossy.
    bytes: Vec<Vec<u8>>,
}

impl Plain {
    async fn of(
        server: &Server,
        client: &mut GenerationServiceClient<Channel>,
        input: GenerationInput,
    ) -> Self {
        let reply = unary(client, input).await.unwrap();
        let tokenizer = server.engine.tokenizer();
        let bytes = reply.token_ids.iter();
        Self {
            bytes: bytes
                .map(|id| tokenizer.token_bytes(*id).to_vec())
                .collect(),
            reply,
        }
    }

    /// The bytes of the first tokens.
    fn first(&self, tokens: usize) -> Vec<u8> {
        self.bytes[..tokens].concat()
    }
}

fn request(input: GenerationInput) -> bytes::Bytes {
    framed(&GenerateStreamRequest { input: Some(input) })
}

/// What lay on the socket before the verdict, and the whole stream.
async fn on_the_wire(server: &Server, input: GenerationInput) -> (Answer, Answer) {
    let raw = raw_call(server.address, GENERATE_STREAM, &[], request(input)).await;
    assert!(raw.broken.is_none(), "{raw:?}");
    let (mut before, mut all) = (Answer::default(), Answer::default());
    for message in raw.messages::<GenerateStreamResponse>() {
        let verdict = matches!(message.event, Some(Event::Verdict(_)));
        if !verdict && all.verdicts.is_empty() {
            before.take(message.clone());
        }
        all.take(message);
    }
    if raw.grpc_status == Some(0) {
        assert!(all.completed.is_some());
    } else {
        assert!(all.completed.is_none());
        all.status = Some(tonic::Status::new(
            raw.grpc_status.unwrap_or(2).into(),
            "as it was on the wire",
        ));
    }
    (before, all)
}

/// Nothing of the tokens from `last - hold_back + 1` on may have left, in ids, text or otherwise.
fn check_withheld(plain: &Plain, before: &Answer, fires_at: u32, hold_back: u32, case: &str) {
    let most = fires_at.saturating_sub(hold_back) as usize;
    let left = before.token_ids.len();
    assert!(left <= most, "{case}: {left} tokens left, {most} may");
    assert_eq!(before.token_ids, plain.reply.token_ids[..left], "{case}");
    assert_eq!(before.logprobs.len(), left, "{case}: log-probabilities");
    let text = String::from_utf8_lossy(&plain.first(left)).into_owned();
    assert!(
        text.starts_with(&before.text),
        "{case}: {:?} is not of the first {left} tokens",
        before.text
    );
}

/// Every way to ask gives the same answer.
async fn check_all_ways(
    server: &Server,
    client: &mut GenerationServiceClient<Channel>,
    input: GenerationInput,
    wire: &Answer,
    case: &str,
) {
    let folded = stream(client, input.clone()).await;
    assert_eq!(folded.events.len(), wire.events.len(), "{case}");
    let whole = unary(client, input.clone()).await;
    if let Some(row) = offline_row(server, &input).await {
        check_row(&row, wire, case);
        let mut scored = input.clone();
        scored.monitor.get_or_insert_default().return_scores = true;
        if let Ok(reply) = unary(client, scored).await {
            check_scores(&row, &reply.scores, case);
        }
    }
    let Some(completed) = &wire.completed else {
        let code = wire.status.as_ref().unwrap().code();
        assert_eq!(folded.status.unwrap().code(), code, "{case}");
        assert_eq!(whole.expect_err("refused").code(), code, "{case}");
        return;
    };
    let whole = whole.unwrap();
    for (text, ids) in [
        (&folded.text, &folded.token_ids),
        (&whole.text, &whole.token_ids),
    ] {
        assert_eq!((text, ids), (&wire.text, &wire.token_ids), "{case}");
    }
    assert_eq!(whole.logprobs, wire.logprobs, "{case}");
    assert_eq!(folded.logprobs, wire.logprobs, "{case}");
    assert_eq!(whole.verdicts, wire.verdicts, "{case}");
    assert_eq!(whole.finish_reason, completed.finish_reason, "{case}");
    assert_eq!(whole.action, completed.action, "{case}");
    let (counted, usage) = (whole.usage.unwrap(), completed.usage.unwrap());
    assert_eq!(counted.completion_tokens, usage.completion_tokens, "{case}");
    assert_eq!(counted.withheld_tokens, usage.withheld_tokens, "{case}");
    assert_eq!(
        whole.token_ids.len() as u32,
        usage.completion_tokens,
        "{case}"
    );
}

/// The row that `inwit generate` writes to a file; it has no word for a caller's own hold-back.
async fn offline_row(server: &Server, input: &GenerationInput) -> Option<Value> {
    let holds = input.monitor.as_ref().and_then(|m| m.hold_back);
    match holds {
        Some(_) => None,
        None => Some(row_of(server, input, Mode::Enforce).await),
    }
}

async fn row_of(server: &Server, input: &GenerationInput, mode: Mode) -> Value {
    use inwit::rpc::proto::generation_input::Prompt;
    let Some(Prompt::RawText(text)) = &input.prompt else {
        panic!("these prompts are raw text");
    };
    let sampling = input.sampling.clone().unwrap();
    let monitor = input.monitor.clone().unwrap_or_default();
    let options = answer::Options {
        mode,
        policy: (!monitor.policy.is_empty()).then_some(monitor.policy),
        sampling: SamplingDraft {
            max_tokens: sampling.max_tokens,
            temperature: sampling.temperature,
            seed: sampling.seed,
            stop: sampling.stop,
            logprobs: sampling.logprobs,
            ..Default::default()
        },
    };
    let bench = Bench {
        engine: server.engine.clone(),
        snapshot: server.registry.snapshot(),
        defaults: server.defaults.clone(),
        in_flight: 1,
        states: Vec::new(),
    };
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::write(&data, json!({"id": "one", "raw": text}).to_string()).unwrap();
    answer::generate(&bench, &data, &out, &options, &mut |_, _| {})
        .await
        .unwrap();
    let row = std::fs::read(&out).unwrap();
    serde_json::from_slice(&row).unwrap()
}

/// The same answer as the wire's, an abort before the first token included.
fn check_row(row: &Value, wire: &Answer, case: &str) {
    assert_eq!(row["id"], "one", "{case}");
    assert_eq!(row["text"].as_str(), Some(wire.text.as_str()), "{case}");
    assert_eq!(row["token_ids"], json!(wire.token_ids), "{case}");
    let Some(completed) = &wire.completed else {
        assert_eq!(row["finish_reason"], "refused_by_policy", "{case}");
        assert_eq!(row["action"], "abort", "{case}");
        return;
    };
    let word = |name: &str, prefix: &str| {
        let word = name.strip_prefix(prefix).expect("an enum's own prefix");
        word.to_ascii_lowercase()
    };
    let reason = word(completed.finish_reason().as_str_name(), "FINISH_REASON_");
    assert_eq!(row["finish_reason"], reason, "{case}");
    let action = word(completed.action().as_str_name(), "POLICY_ACTION_");
    assert_eq!(row["action"], action, "{case}");
}

/// To the last bit.
fn check_scores(row: &Value, scores: &[ProbeScore], case: &str) {
    let of_row = row["scores"].as_object().unwrap();
    assert_eq!(of_row.len(), scores.len(), "{case}: {of_row:?} {scores:?}");
    for score in scores {
        let logit = of_row[&score.probe]["logit"].as_f64().unwrap();
        assert_eq!(logit as f32, score.logit, "{case}");
    }
}

fn input(change: impl Fn(&mut SamplingOptions)) -> GenerationInput {
    let mut input = raw(PROMPT, LENGTH);
    let sampling = input.sampling.as_mut().unwrap();
    sampling.logprobs = Some(0);
    change(sampling);
    input
}

fn own_hold(mut input: GenerationInput, hold_back: u32) -> GenerationInput {
    input.monitor.as_mut().unwrap().hold_back = Some(hold_back);
    input
}

/// One answer whose rule fires at `fires_at`, for every hold-back, the policy's and the caller's own.
async fn check_place(
    server: &Server,
    client: &mut GenerationServiceClient<Channel>,
    plain: &Plain,
    input: &GenerationInput,
    fires_at: u32,
    action: &str,
) {
    for hold_back in HOLDS {
        let by_policy = enforced(&policy(fires_at, hold_back, action), input.clone());
        let by_caller = enforced(&policy(fires_at, 0, action), input.clone());
        for (who, asked) in [
            ("policy", by_policy),
            ("caller", own_hold(by_caller, hold_back)),
        ] {
            let case = format!("{action} at {fires_at}, held back {hold_back} by the {who}");
            let (before, all) = on_the_wire(server, asked.clone()).await;
            check_withheld(plain, &before, fires_at, hold_back, &case);
            if action == "refuse" {
                check_refused(&before, &all, &case);
            }
            check_all_ways(server, client, asked, &all, &case).await;
        }
    }
}

/// The text stands in place of the answer; a retract is there exactly when something had left.
fn check_refused(before: &Answer, all: &Answer, case: &str) {
    assert_eq!(all.text, REFUSAL, "{case}");
    assert_eq!(
        all.completed().finish_reason,
        FinishReason::RefusedByPolicy as i32
    );
    assert_eq!(all.completed().action, PolicyAction::Refuse as i32);
    assert_eq!(all.verdicts.len(), 1, "{case}");
    assert!(all.logprobs.is_empty(), "{case}");
    let verdict = all.place(|event| matches!(event, Event::Verdict(_)));
    let retract = all.place(|event| matches!(event, Event::Retract(_)));
    let left = !before.token_ids.is_empty() || !before.text.is_empty();
    assert_eq!(retract.is_some(), left, "{case}");
    assert!(retract.is_none() || retract > verdict, "{case}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unwatched_row_is_the_plain_answer_without_scores() {
    let server = start().await;
    let mut client = server.generation().await;
    let mut input = raw(PROMPT, LENGTH);
    input.monitor.get_or_insert_default().mode = MonitorMode::Off.into();
    let plain = unary(&mut client, input.clone()).await.unwrap();
    let row = row_of(&server, &input, Mode::Off).await;
    assert_eq!(row["token_ids"], json!(plain.token_ids));
    assert_eq!(row["scores"], json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_withheld_token_is_ever_on_the_wire() {
    let server = start().await;
    let mut client = server.generation().await;
    let input = input(|_| {});
    let plain = Plain::of(&server, &mut client, input.clone()).await;
    assert_eq!(
        plain.reply.token_ids.len() as u32,
        LENGTH,
        "{:?}",
        plain.reply
    );
    // The first token, some in between, the last one.
    for fires_at in [1, 2, 7, LENGTH - 1, LENGTH] {
        check_place(&server, &mut client, &plain, &input, fires_at, "refuse").await;
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_action_withholds_alike() {
    let server = start().await;
    let mut client = server.generation().await;
    let input = input(|_| {});
    let plain = Plain::of(&server, &mut client, input.clone()).await;
    for action in ["head", "abort", "flag"] {
        for fires_at in [1, 6, LENGTH] {
            check_place(&server, &mut client, &plain, &input, fires_at, action).await;
        }
    }
    server.idle().await;
}

/// The generated tokens whose states lay on the wire, and whether they came after a verdict.
async fn captured(server: &Server, input: GenerationInput) -> Vec<(u32, bool)> {
    use inwit::rpc::proto::capture_activations_response::Event as Item;
    let request = CaptureActivationsRequest {
        input: Some(input),
        sites: vec!["hook_embed".into()],
        positions: PositionSelection::Generated as i32,
        ..Default::default()
    };
    let mut client = server.activation().await;
    let mut items = client
        .capture_activations(request)
        .await
        .unwrap()
        .into_inner();
    let (mut tokens, mut judged) = (Vec::new(), false);
    while let Some(item) = items.message().await.unwrap() {
        match item.event {
            Some(Item::Verdict(_)) => judged = true,
            Some(Item::Chunk(chunk)) => {
                tokens.extend(chunk.token_ids.into_iter().map(|token| (token, judged)));
            }
            _ => {}
        }
    }
    tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_of_a_withheld_token_is_withheld_too() {
    let server = start().await;
    let mut client = server.generation().await;
    let input = raw(PROMPT, LENGTH);
    let plain = unary(&mut client, input.clone()).await.unwrap().token_ids;
    for fires_at in [1, 2, 7, LENGTH] {
        for hold_back in HOLDS {
            let asked = enforced(&policy(fires_at, hold_back, "refuse"), input.clone());
            let captured = captured(&server, asked).await;
            // What the pass of the verdict itself read is not told.
            let most = fires_at.saturating_sub(hold_back.max(1)) as usize;
            let tokens: Vec<u32> = captured.iter().map(|(token, _)| *token).collect();
            let case = format!("at {fires_at}, held back {hold_back}");
            assert_eq!(tokens, plain[..most], "{case}");
            assert!(captured.iter().all(|(_, judged)| !judged), "{case}");
        }
    }
    // Nothing is lost where nothing is withheld.
    let captured = captured(&server, enforced("watch", input)).await;
    let tokens: Vec<u32> = captured.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, plain);
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_verdict_everything_arrives_a_little_later() {
    let server = start().await;
    let mut client = server.generation().await;
    let plain = Plain::of(&server, &mut client, input(|_| {})).await;
    let asked = enforced("watch", input(|_| {}));
    let (_, all) = on_the_wire(&server, asked.clone()).await;
    assert_eq!(all.text, plain.reply.text);
    assert_eq!(all.token_ids, plain.reply.token_ids);
    assert_eq!(all.logprobs, plain.reply.logprobs);
    check_all_ways(&server, &mut client, asked, &all, "watched").await;
    server.idle().await;
}

/// A sampled answer in which a character is spread over several tokens: which token begins one.
async fn split_character(
    server: &Server,
    client: &mut GenerationServiceClient<Channel>,
) -> (GenerationInput, Plain, u32) {
    for seed in 0..4000 {
        let sampled = input(|sampling| {
            sampling.seed = Some(seed);
            sampling.temperature = Some(5.0);
        });
        let plain = Plain::of(server, client, sampled.clone()).await;
        for place in 1..plain.bytes.len() {
            let (so_far, next) = (plain.first(place), &plain.bytes[place]);
            let open = std::str::from_utf8(&so_far)
                .is_err_and(|e| e.error_len().is_none() && so_far.len() > e.valid_up_to());
            let lead = so_far.len()
                - so_far
                    .iter()
                    .rev()
                    .take_while(|b| **b & 0xc0 == 0x80)
                    .count();
            let whole = [&so_far[lead.saturating_sub(1)..], next].concat();
            // Valid up to here but for the one character that the next token completes.
            if open && std::str::from_utf8(&whole).is_ok() {
                return (sampled, plain, place as u32);
            }
        }
    }
    panic!("no seed spreads a character over two tokens");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_of_a_character_that_is_cut_by_a_verdict() {
    let server = start().await;
    let mut client = server.generation().await;
    let (input, plain, place) = split_character(&server, &mut client).await;
    for fires_at in [place, place + 1] {
        check_place(&server, &mut client, &plain, &input, fires_at, "refuse").await;
    }
    // And where it is released, it is released whole.
    let asked = enforced("watch", input);
    let (_, all) = on_the_wire(&server, asked).await;
    assert_eq!(all.text, plain.reply.text);
    for event in &all.events {
        if let Event::Delta(delta) = event {
            // What the whole answer holds as replacement characters is all that may be one here.
            let lossy = |text: &str| text.matches('\u{fffd}').count();
            assert!(lossy(&delta.text) <= lossy(&plain.reply.text));
        }
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_of_a_stop_string_that_is_cut_by_a_verdict() {
    let server = start().await;
    let mut client = server.generation().await;
    let plain = Plain::of(&server, &mut client, input(|_| {})).await;
    // From the middle of one token to the end of the third after it.
    let at = (4..plain.bytes.len() - 6)
        .find(|at| {
            let stop = String::from_utf8(plain.bytes[*at..at + 3].concat());
            let earlier = String::from_utf8_lossy(&plain.first(at + 2)).into_owned();
            stop.is_ok_and(|stop| stop.len() > 3 && !earlier.contains(&stop))
        })
        .expect("three tokens that are text");
    let stop = String::from_utf8(plain.bytes[at..at + 3].concat()).unwrap();
    let stopped = input(|sampling| sampling.stop = vec![stop.clone()]);
    let reply = unary(&mut client, stopped.clone()).await.unwrap();
    assert_eq!(reply.finish_reason, FinishReason::StopSequence as i32);
    assert!(!reply.text.contains(&stop));
    assert!(plain.reply.text.starts_with(&reply.text));
    // Before it, inside it, at its last token: decoding is over then, the wait for the verdict is not.
    for fires_at in at as u32..=at as u32 + 3 {
        check_place(&server, &mut client, &plain, &stopped, fires_at, "refuse").await;
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_shadow_nothing_is_withheld_and_everything_is_told() {
    let server = start().await;
    let mut client = server.generation().await;
    let plain = Plain::of(&server, &mut client, input(|_| {})).await;
    for fires_at in [1, 7, LENGTH] {
        let name = policy(fires_at, 2, "abort");
        let asked = crate::wire_support::under(&name, MonitorMode::Shadow, input(|_| {}));
        let (before, all) = on_the_wire(&server, asked).await;
        assert_eq!(all.text, plain.reply.text);
        assert_eq!(all.token_ids, plain.reply.token_ids);
        // The token that is judged has left by then.
        assert_eq!(before.token_ids.len() as u32, fires_at);
        assert_eq!(all.verdicts.len(), 1);
        assert!(all.verdicts[0].shadow);
        assert_eq!(all.verdicts[0].action, PolicyAction::Abort as i32);
        assert_ne!(
            all.completed().finish_reason,
            FinishReason::RefusedByPolicy as i32
        );
    }
    server.idle().await;
}
