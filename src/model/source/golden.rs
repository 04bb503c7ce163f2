//! The tiny golden models, read from both formats, against their references.

use std::path::PathBuf;

use serde_json::Value;

use super::*;
use crate::model::{Family, Message, SpecialText};

const FAMILIES: [&str; 5] = ["llama", "llama3", "qwen2", "qwen3", "gemma3"];
const FORMATS: [&str; 2] = ["hf", "model.gguf"];

fn golden(family: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(family)
}

fn open(family: &str, format: &str) -> Source {
    Source::open(&golden(family).join(format)).expect("a golden model")
}

fn each_model(mut check: impl FnMut(&str, &str, &Source)) {
    for family in FAMILIES {
        for format in FORMATS {
            check(family, format, &open(family, format));
        }
    }
}

fn tokens_json(family: &str) -> Value {
    let bytes = std::fs::read(golden(family).join("tokens.json")).expect("tokens.json");
    serde_json::from_slice(&bytes).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("ids").iter();
    ids.map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn token_ids_equal_the_references_from_both_formats() {
    each_model(|family, format, source| {
        let expected = tokens_json(family);
        for row in expected["strings"].as_array().expect("strings") {
            let text = row["text"].as_str().expect("text");
            for (special, name) in [
                (SpecialText::AsText, "as_text"),
                (SpecialText::AsTokens, "as_special"),
            ] {
                let got = source.tokenizer.encode(text, special).expect("tokens");
                assert_eq!(got, ids(&row[name]), "{family} {format} {name} {text:?}");
            }
        }
        assert_eq!(
            Value::from(source.tokenizer.add_bos()),
            expected["add_bos"],
            "{family} {format}"
        );
        // A file may name a token that its tokenizer never adds.
        if !expected["bos_id"].is_null() {
            let bos = Value::from(source.tokenizer.bos());
            assert_eq!(bos, expected["bos_id"], "{family} {format}");
        }
    });
}

#[test]
fn token_bytes_concatenate_to_the_decoded_text() {
    each_model(|family, format, source| {
        for row in tokens_json(family)["strings"].as_array().expect("strings") {
            let bytes: Vec<u8> = ids(&row["as_text"])
                .into_iter()
                .flat_map(|id| source.tokenizer.token_bytes(id).to_vec())
                .collect();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert_eq!(Value::from(text), row["decoded"], "{family} {format}");
        }
    });
}

#[test]
fn chats_render_to_the_references_ids_from_both_formats() {
    each_model(|family, format, source| {
        let template = source.template.as_ref().expect("a template");
        for chat in tokens_json(family)["chats"].as_array().expect("chats") {
            let messages: Vec<Message> = chat["messages"]
                .as_array()
                .expect("messages")
                .iter()
                .map(|m| {
                    let text = |key: &str| m[key].as_str().expect("text").to_owned();
                    Message::new(text("role"), text("content"))
                })
                .collect();
            let rendered = template.render(&messages, &source.tokenizer);
            let what = format!("{family} {format} {}", chat["name"]);
            if chat["error"].is_string() {
                assert!(
                    matches!(rendered, Err(Error::InvalidRequest { .. })),
                    "{what}"
                );
                continue;
            }
            let rendered = rendered.expect(&what);
            assert_eq!(rendered.tokens, ids(&chat["ids"]), "{what}");
            let text = chat["text"].as_str().expect("text");
            assert_eq!(rendered.text_len, text.len(), "{what}");
            assert_eq!(rendered.content.end, rendered.tokens.len(), "{what}");
            let tail: Vec<u8> = rendered.tokens[rendered.content.clone()]
                .iter()
                .flat_map(|&id| source.tokenizer.token_bytes(id).to_vec())
                .collect();
            let last = messages.iter().rfind(|m| m.role == "user").expect("a user");
            let tail = String::from_utf8_lossy(&tail);
            let tail = tail.trim_start();
            // Only the beginning: a tokenizer may compose the characters of the rest.
            let beginning: String = last.content.trim().chars().take(12).collect();
            assert!(tail.starts_with(&beginning), "{what}: {tail:?}");
        }
    });
}

#[test]
fn both_formats_hold_the_same_model() {
    for family in FAMILIES {
        let [folder, gguf] = FORMATS.map(|format| open(family, format));
        assert_eq!(
            folder.config.canonical(),
            gguf.config.canonical(),
            "{family}"
        );
        assert_eq!(
            folder.tokenizer.fingerprint(),
            gguf.tokenizer.fingerprint(),
            "{family}"
        );
        assert_eq!(
            folder.identity.architecture_id,
            gguf.identity.architecture_id
        );
        assert_ne!(folder.identity.weights_id, gguf.identity.weights_id);
        assert_eq!(
            folder.tokenizer.stop_ids(),
            gguf.tokenizer.stop_ids(),
            "{family}"
        );
        let ropes = [&folder, &gguf].map(|source| source.config.rope.inv_freq.iter());
        let [from_folder, from_gguf] = ropes;
        for (a, b) in from_folder.zip(from_gguf) {
            // Where the scaling is stored as a divisor, the last bit may differ.
            assert!((a - b).abs() <= f32::EPSILON * a, "{family}: {a} {b}");
        }
        assert_eq!(
            folder.config.embed_scale, gguf.config.embed_scale,
            "{family}"
        );
        assert_eq!(
            folder.config.sliding_layers, gguf.config.sliding_layers,
            "{family}"
        );
        let names: Vec<&String> = folder.tensors.keys().collect();
        assert_eq!(names, gguf.tensors.keys().collect::<Vec<_>>());
        for (name, stored) in &folder.tensors {
            let shape = &stored.entry.shape;
            let [a, b] = [&folder, &gguf].map(|s| s.tensor(name, shape).expect("a tensor"));
            assert_eq!(a, b, "{family} {name}");
        }
        for source in [folder, gguf] {
            assert_eq!(source.unused_tensors(), Vec::<String>::new());
            assert_eq!(source.check_all_used(), Ok(()));
        }
    }
}

#[test]
fn quantised_files_open_as_the_same_architecture() {
    let plain = open("llama", "model.gguf");
    for file in ["model-q8_0.gguf", "model-mixed.gguf"] {
        let quantised = open("llama", file);
        assert_eq!(
            quantised.identity.architecture_id,
            plain.identity.architecture_id
        );
        let name = "model.layers.0.mlp.up_proj.weight";
        let shape = [quantised.config.d_mlp, quantised.config.d_model];
        let values = quantised.tensor(name, &shape).expect("a tensor");
        let exact = plain.tensor(name, &shape).expect("a tensor");
        let largest = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
        let error = values
            .iter()
            .zip(&exact)
            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(error > 0.0 && error < largest / 4.0, "{file}: {error}");
    }
    let k = open("kquants", "model-q4_k_m.gguf");
    for (name, stored) in &k.tensors {
        k.tensor(name, &stored.entry.shape).expect("a tensor");
    }
    assert_eq!(
        k.stored_type("model.layers.0.self_attn.q_proj.weight"),
        Some(StoredType::Q4K)
    );
}

#[test]
fn what_is_peculiar_to_gemma3_is_read() {
    for format in FORMATS {
        let config = open("gemma3", format).config;
        assert_eq!(config.family, Family::Gemma3);
        assert_eq!(config.sliding_window, Some(8));
        let global: Vec<usize> = (0..7).filter(|&i| !config.sliding_layers[i]).collect();
        assert_eq!(global, [5]);
        assert_ne!(
            config.local_rope.expect("a local base").theta,
            config.rope.theta
        );
        assert!(config.tied_embeddings);
    }
}

#[test]
fn a_tensor_that_nobody_asked_for_is_named() {
    let source = open("qwen2", "model.gguf");
    let error = source.check_all_used().expect_err("nothing was asked for");
    assert!(
        error.to_string().contains("have no place in a qwen2 model"),
        "{error}"
    );
    let error = source
        .tensor("model.norm.weight", &[7])
        .expect_err("a wrong shape");
    assert!(
        error.to_string().contains("the configuration wants [7]"),
        "{error}"
    );
    let error = source
        .tensor("model.nothing", &[7])
        .expect_err("no such tensor");
    assert!(
        error.to_string().contains("`model.nothing` is missing"),
        "{error}"
    );
}

/// A copy of a golden folder, to be damaged.
fn damaged(family: &str, file: &str, damage: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Error {
    let copy = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(golden(family).join("hf")).expect("a folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("a copy");
    }
    let path = copy.path().join(file);
    let bytes = damage(std::fs::read(&path).unwrap_or_default());
    std::fs::write(&path, bytes).expect("a file");
    Source::open(copy.path()).expect_err("a damaged folder")
}

fn check_damaged(file: &str, damage: impl FnOnce(Vec<u8>) -> Vec<u8>, expected: &str) {
    let error = damaged("llama", file, damage).to_string();
    assert!(error.contains(expected), "{error}");
}

fn replaced(bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    let text = String::from_utf8(bytes).expect("text");
    assert!(text.contains(from), "{from}");
    text.replace(from, to).into_bytes()
}

#[test]
fn damaged_folders_are_refused_by_file() {
    check_damaged(
        "model.safetensors",
        |mut bytes| {
            bytes.truncate(bytes.len() - 100);
            bytes
        },
        "truncated or damaged",
    );
    check_damaged("config.json", |_| b"{".to_vec(), "config.json");
    check_damaged(
        "config.json",
        |bytes| {
            let mut config: Value = serde_json::from_slice(&bytes).expect("JSON");
            config["vocab_size"] = 100.into();
            config.to_string().into_bytes()
        },
        "the embedding only 100 rows",
    );
    check_damaged("tokenizer.json", |_| b"{}".to_vec(), "only BPE");
    check_damaged(
        "tokenizer.json",
        |bytes| replaced(bytes, "\"<|im_end|>\"", "\"<|im_e|>\""),
        "tokenizer_config.json",
    );
    let hostile = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    check_damaged(
        "chat_template.jinja",
        |_| hostile.into(),
        "budget of instructions",
    );
    let index = r#"{"weight_map": {"x": "../model.safetensors"}}"#;
    check_damaged(
        "model.safetensors.index.json",
        |_| index.into(),
        "same folder",
    );
}

#[test]
fn a_tokenizer_nested_a_million_deep_is_refused() {
    check_damaged("tokenizer.json", |_| vec![b'['; 1 << 20], "tokenizer.json");
}
