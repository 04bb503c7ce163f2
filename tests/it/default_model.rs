//! The default model with what ships for it: one pass end to end per action, over a real socket.

use inwit::cli::server::{Running, start};
use inwit::config::{Config, Flags};
use inwit::rpc::proto::generation_input::Prompt;
use inwit::rpc::proto::generation_service_client::GenerationServiceClient;
use inwit::rpc::proto::{
    ChatMessage, ChatPrompt, FinishReason, GenerateRequest, GenerateResponse, GenerationInput,
    MonitorMode, MonitorOptions, PolicyAction, SamplingOptions,
};
use tonic::transport::Channel;

/// Prompts that no training file holds.
const CHATS: &str = include_str!("../../probes/data/demo.jsonl");

fn prompts(expect: &str) -> Vec<String> {
    let rows = CHATS.lines().filter(|line| !line.trim().is_empty());
    let rows = rows.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter(|row| row["expect"] == expect)
        .map(|row| row["text"].as_str().unwrap().to_owned())
        .collect()
}

async fn server() -> (Running, GenerationServiceClient<Channel>) {
    // The same fetch that users run; it fails with one line where there is no network.
    let model = crate::golden::default_model();
    let config = Config::load(&Flags {
        model: Some(model.display().to_string()),
        listen: Some("127.0.0.1:0".into()),
        http_listen: Some("off".into()),
        overrides: Some("allow".into()),
        ..Flags::default()
    })
    .unwrap();
    let running = start(&config).await.unwrap();
    let address = format!("http://{}", running.address);
    let client = GenerationServiceClient::connect(address).await.unwrap();
    (running, client)
}

async fn ask(
    client: &mut GenerationServiceClient<Channel>,
    text: &str,
    mode: MonitorMode,
    policy: &str,
) -> GenerateResponse {
    let input = GenerationInput {
        prompt: Some(Prompt::Chat(ChatPrompt {
            messages: vec![ChatMessage {
                role: "user".into(),
                content: text.into(),
            }],
        })),
        sampling: Some(SamplingOptions {
            max_tokens: Some(24),
            ..SamplingOptions::default()
        }),
        monitor: Some(MonitorOptions {
            mode: mode.into(),
            policy: policy.into(),
            ..MonitorOptions::default()
        }),
        ..GenerationInput::default()
    };
    let request = GenerateRequest { input: Some(input) };
    client.generate(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_action_works_on_the_default_model() {
    let (running, mut client) = server().await;
    assert!(running.watched, "nothing ships for the default model");

    // Harmless chats are answered, and token for token as without a monitor.
    for prompt in prompts("answered") {
        let watched = ask(&mut client, &prompt, MonitorMode::Enforce, "default").await;
        assert_eq!(watched.action(), PolicyAction::Allow);
        let free = ask(&mut client, &prompt, MonitorMode::Off, "").await;
        assert_eq!(watched.token_ids, free.token_ids);
        assert!(!free.text.is_empty());
    }

    let harmful = prompts("refused").remove(0);
    let plain = ask(&mut client, &harmful, MonitorMode::Off, "").await;

    let refused = ask(&mut client, &harmful, MonitorMode::Enforce, "strict").await;
    assert_eq!(refused.action(), PolicyAction::Refuse);
    assert_eq!(refused.finish_reason(), FinishReason::RefusedByPolicy);
    assert_eq!(refused.text, "I can't help with that.");

    let headed = ask(&mut client, &harmful, MonitorMode::Enforce, "safeswitch").await;
    assert_eq!(headed.action(), PolicyAction::RefusalHead);
    assert_eq!(headed.finish_reason(), FinishReason::RefusedByPolicy);
    assert_ne!(headed.text, plain.text);

    let steered = ask(&mut client, &harmful, MonitorMode::Enforce, "steer").await;
    assert_eq!(steered.action(), PolicyAction::Steer);
    assert_ne!(steered.text, plain.text);

    // Shadow decides and does nothing; nothing of the above has outlived its request.
    let shadow = ask(&mut client, &harmful, MonitorMode::Shadow, "safeswitch").await;
    assert_eq!(shadow.token_ids, plain.token_ids);
    running.stop().await.unwrap();
}
