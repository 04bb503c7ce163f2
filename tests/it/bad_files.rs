//! Files that lie: models, tokenizers, templates, probes and policies, each refused with an error that
//! names the file, never with a panic; and a start that fails says why in one line.
//! Knows the formats from outside, as whoever crafts such a file does.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use inwit::error::Error;
use inwit::model::kernels::WeightFormat;
use inwit::model::{Decoder, Message, Placement, Source};
use inwit::registry::{ModelIds, Registry};
use inwit_probes::{Head, InputNorm, Kind, Manifest, ModelIdentity, Positions, Probe, Site};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::golden::golden;

/// Everything that reads a model, up to weights in memory.
fn load(path: &Path) -> Result<(), Error> {
    let source = Source::open(path)?;
    Decoder::load(&source, &Placement::cpu(WeightFormat::F32)).map(|_| ())
}

fn check_named(result: Result<(), Error>, path: &Path, case: &str) {
    match result {
        Err(Error::File { file, message }) => {
            assert!(file.contains(path.to_str().unwrap()), "{case}: {file}");
            assert!(!message.trim().is_empty(), "{case}");
        }
        other => panic!("{case}: {other:?}"),
    }
}

// ---- GGUF ----

const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const U32: u32 = 4;

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn gguf(tensors: u64, keys: u64) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(keys.to_le_bytes());
    bytes
}

fn key(name: &str, kind: u32) -> Vec<u8> {
    let mut bytes = gguf(0, 1);
    text(&mut bytes, name);
    bytes.extend(kind.to_le_bytes());
    bytes
}

/// One tensor of f32 in a file that ends 4 KiB after its header.
fn tensor(dims: &[u64], offset: u64) -> Vec<u8> {
    named_tensor("token_embd.weight", dims, offset)
}

fn named_tensor(name: &str, dims: &[u64], offset: u64) -> Vec<u8> {
    let mut bytes = gguf(1, 0);
    text(&mut bytes, name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.extend([0; 4096]);
    bytes
}

fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let long_text = [key("general.name", TEXT), (1u64 << 45).to_le_bytes().into()].concat();
    let long_array = [
        key("general.tags", ARRAY),
        TEXT.to_le_bytes().into(),
        (1u64 << 60).to_le_bytes().into(),
    ]
    .concat();
    let mut nested = key("general.tags", ARRAY);
    for _ in 0..200_000 {
        nested.extend(ARRAY.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    let mut many_dims = gguf(1, 0);
    text(&mut many_dims, "token_embd.weight");
    many_dims.extend(4_000_000_000u32.to_le_bytes());
    let unaligned = [key("general.alignment", U32), vec![0; 4]].concat();
    vec![
        ("a text of 2^45 bytes", long_text),
        ("an array of 2^60", long_array),
        ("an alignment of 0", unaligned),
        ("4e9 dimensions", many_dims),
        ("200,000 nested arrays", nested),
        ("2^33 x 2^33", tensor(&[1 << 33, 1 << 33], 0)),
        ("2^44 elements in 4 KiB", tensor(&[1 << 44], 0)),
        ("an offset past the end", tensor(&[32], 1 << 40)),
        ("a header cut short", gguf(1, 1)[..13].to_vec()),
        ("2^63 tensors", gguf(1 << 63, 0)),
        ("nothing", Vec::new()),
    ]
}

#[test]
fn crafted_gguf_files_are_refused() {
    let folder = TempDir::new().unwrap();
    for (case, bytes) in bombs() {
        let path = folder.path().join("bomb.gguf");
        fs::write(&path, bytes).unwrap();
        check_named(load(&path), &path, case);
    }
}

#[test]
fn a_sparse_file_as_long_as_it_says_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.gguf");
    for name in ["rope_freqs.weight", "token_embd.weight", "output.weight"] {
        let elements = 1u64 << 40;
        let mut file = fs::File::create(&path).unwrap();
        let header = named_tensor(name, &[elements], 0);
        std::io::Write::write_all(&mut file, &header).unwrap();
        if file.set_len(header.len() as u64 + 4 * elements).is_err() {
            // A file system without room for holes of this size; a smaller one says as much.
            file.set_len(header.len() as u64 + (4 << 30)).unwrap();
        }
        check_named(load(&path), &path, name);
    }
}

#[test]
fn a_gguf_file_that_ends_early_is_refused_wherever_it_ends() {
    let whole = fs::read(golden("llama3/model.gguf")).unwrap();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("cut.gguf");
    for part in 0..40 {
        fs::write(&path, &whole[..whole.len() * part / 40]).unwrap();
        check_named(load(&path), &path, &format!("{part} of 40 parts"));
    }
}

/// No byte of the header may bring the process down; whether a change is noticed is another matter.
#[test]
fn a_damaged_header_is_an_error_or_a_model() {
    let whole = fs::read(golden("llama3/model.gguf")).unwrap();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("damaged.gguf");
    let mut refused = 0;
    for number in 0..150usize {
        let mut bytes = whole.clone();
        bytes[number * 131 % 20_000] ^= [0xff, 0x80, 0x01][number % 3];
        fs::write(&path, bytes).unwrap();
        match load(&path) {
            Ok(()) => {}
            Err(Error::Internal(message)) => panic!("byte {number}: {message}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 10, "only {refused} of 150 were noticed");
}

// ---- Hugging Face folders ----

fn folder_of(model: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    for entry in fs::read_dir(golden(&format!("{model}/hf"))).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

fn change_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn absurd_configurations_are_refused() {
    for (name, value) in [
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(-4)),
        ("num_key_value_heads", json!(3)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!(3)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!(65)),
        ("vocab_size", json!(1u64 << 40)),
        ("vocab_size", json!(511)),
        ("rope_theta", json!(-1.0)),
        ("rope_theta", json!("NaN")),
        ("rms_norm_eps", json!(-1.0)),
        ("max_position_embeddings", json!(0)),
        ("hidden_act", json!("sine")),
        ("model_type", json!("../llama")),
    ] {
        let folder = folder_of("llama");
        change_json(&folder.path().join("config.json"), |config| {
            config[name] = value.clone();
        });
        check_named(
            load(folder.path()),
            folder.path(),
            &format!("{name}: {value}"),
        );
    }
}

#[test]
fn damaged_folders_are_refused() {
    type Damage = fn(&Path);
    let cases: Vec<(&str, Damage)> = vec![
        ("no configuration", |p| {
            fs::remove_file(p.join("config.json")).unwrap()
        }),
        ("no JSON", |p| {
            fs::write(p.join("config.json"), "{\"a\": NaN").unwrap()
        }),
        ("no weights", |p| {
            fs::remove_file(p.join("model.safetensors")).unwrap()
        }),
        ("no tokenizer", |p| {
            fs::remove_file(p.join("tokenizer.json")).unwrap()
        }),
        ("half the weights", |p| {
            let bytes = fs::read(p.join("model.safetensors")).unwrap();
            fs::write(p.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("a header of 2^63 bytes", |p| {
            fs::write(p.join("model.safetensors"), (1u64 << 63).to_le_bytes()).unwrap();
        }),
        ("a header that is no JSON", |p| {
            let bytes = [&8u64.to_le_bytes()[..], b"{{{{{{{{"].concat();
            fs::write(p.join("model.safetensors"), bytes).unwrap();
        }),
        ("a shape that overflows", |p| {
            let header = "{\"model.embed_tokens.weight\":{\"dtype\":\"F32\",\
                \"shape\":[8589934592,8589934592],\"data_offsets\":[0,4]}}";
            let bytes = [
                &(header.len() as u64).to_le_bytes()[..],
                header.as_bytes(),
                &[0; 4],
            ];
            fs::write(p.join("model.safetensors"), bytes.concat()).unwrap();
        }),
        ("an index that leaves the folder", |p| {
            fs::rename(p.join("model.safetensors"), p.join("one.safetensors")).unwrap();
            let index = json!({"weight_map": {"model.embed_tokens.weight": "../one.safetensors"}});
            fs::write(p.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }),
        ("a shard that is not there", |p| {
            fs::remove_file(p.join("model.safetensors")).unwrap();
            let index = json!({"weight_map": {"model.embed_tokens.weight": "two.safetensors"}});
            fs::write(p.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }),
        ("a tokenizer that is no JSON", |p| {
            fs::write(p.join("tokenizer.json"), "[".repeat(100_000)).unwrap();
        }),
        ("more tokens than rows", |p| {
            change_json(&p.join("tokenizer.json"), |tokenizer| {
                tokenizer["model"]["vocab"]["zzzzzz"] = json!(70_000);
            });
        }),
        ("an expression that is none", |p| {
            change_json(&p.join("tokenizer.json"), |tokenizer| {
                tokenizer["pre_tokenizer"] = json!({
                    "type": "Split", "behavior": "Isolated", "invert": false,
                    "pattern": {"Regex": "(((a+)+"},
                });
            });
        }),
    ];
    for (case, damage) in cases {
        let folder = folder_of("llama");
        damage(folder.path());
        check_named(load(folder.path()), folder.path(), case);
    }
}

/// Refused when it is read, or when it is used: in either case at once and as an error.
#[test]
fn hostile_templates_run_out_of_fuel() {
    for template in [
        "{% for a in range(10000000000) %}x{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000000 }}",
        "{{ messages[0].content | replace('', 'x' * 60000) | replace('x', 'y' * 30000) }}",
        "{{ messages[0].content.replace('', 'x' * 60000).replace('x', 'y' * 30000) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content.format }}{{ raise_exception('no') }}",
        "{{",
    ] {
        let folder = folder_of("llama");
        change_json(&folder.path().join("tokenizer_config.json"), |settings| {
            settings["chat_template"] = json!(template);
        });
        match Source::open(folder.path()) {
            Err(Error::File { .. }) => {}
            Err(other) => panic!("{template}: {other}"),
            Ok(source) => {
                let message = Message {
                    role: "user".into(),
                    content: "Hi".into(),
                };
                let rendered = source
                    .template
                    .unwrap()
                    .render(&[message], &source.tokenizer);
                assert!(rendered.is_err(), "{template}");
            }
        }
    }
}

// ---- probes ----

fn ids() -> ModelIds {
    ModelIds {
        architecture_id: "arch".into(),
        weights_id: "weights".into(),
        d_model: 4,
        n_layers: 2,
        vocab: 8,
    }
}

fn probe_of(d_model: usize, site: Site, architecture: &str) -> Vec<u8> {
    let identity = ModelIdentity {
        name: "tiny".into(),
        architecture_id: architecture.into(),
        weights_id: "weights".into(),
        weight_format: "f32".into(),
    };
    let positions = Positions::LastPromptToken;
    let manifest = Manifest::new("probe", Kind::Logistic, d_model, positions, identity);
    let head = Head {
        site,
        weight: vec![1.0; d_model],
        bias: vec![0.5],
        out: 1,
        norm: InputNorm::None,
    };
    Probe::new(manifest, vec![head], None)
        .unwrap()
        .to_bytes()
        .unwrap()
}

fn good_probe() -> Vec<u8> {
    probe_of(4, Site::ResidPost(1), "arch")
}

/// The header of a safetensors file changed, its data kept.
fn with_header(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let file = good_probe();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    change(&mut header);
    let header = header.to_string();
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// The first tensor of the header.
fn a_tensor(header: &mut Value) -> &mut Value {
    let tensors = header.as_object_mut().unwrap();
    let name = tensors
        .keys()
        .find(|key| *key != "__metadata__")
        .unwrap()
        .clone();
    tensors.get_mut(&name).unwrap()
}

fn with_last_value(value: f32) -> Vec<u8> {
    let mut file = good_probe();
    let at = file.len() - 4;
    file[at..].copy_from_slice(&value.to_le_bytes());
    file
}

fn renamed(name: &str) -> Vec<u8> {
    with_header(|header| {
        for text in header["__metadata__"].as_object_mut().unwrap().values_mut() {
            let Ok(mut manifest) = serde_json::from_str::<Value>(text.as_str().unwrap()) else {
                continue;
            };
            if manifest.get("name").is_some() {
                manifest["name"] = json!(name);
                *text = json!(manifest.to_string());
            }
        }
    })
}

#[test]
fn hostile_probe_files_are_refused() {
    let good = good_probe();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("a header of 2^63 bytes", (1u64 << 63).to_le_bytes().into()),
        ("no JSON", [&4u64.to_le_bytes()[..], b"nope"].concat()),
        ("cut short", good[..good.len() - 1].to_vec()),
        ("more than there is", [&good[..], &[0; 8]].concat()),
        (
            "out of range",
            with_header(|h| a_tensor(h)["data_offsets"] = json!([0, 1u64 << 40])),
        ),
        (
            "backwards",
            with_header(|h| a_tensor(h)["data_offsets"] = json!([16, 0])),
        ),
        (
            "another type",
            with_header(|h| a_tensor(h)["dtype"] = json!("I64")),
        ),
        (
            "an unknown type",
            with_header(|h| a_tensor(h)["dtype"] = json!("F77")),
        ),
        (
            "a shape that overflows",
            with_header(|h| a_tensor(h)["shape"] = json!([1u64 << 40, 1u64 << 40])),
        ),
        (
            "no manifest",
            with_header(|h| h["__metadata__"] = json!({})),
        ),
        ("NaN", with_last_value(f32::NAN)),
        ("infinity", with_last_value(f32::INFINITY)),
        ("another width", probe_of(5, Site::ResidPost(1), "arch")),
        ("a layer too many", probe_of(4, Site::ResidPost(2), "arch")),
        ("another model", probe_of(4, Site::ResidPost(1), "another")),
        ("a path for a name", renamed("../../x")),
        ("an absolute path for a name", renamed("/etc/passwd")),
        ("a name with a NUL", renamed("a\0b")),
    ];
    let folder = TempDir::new().unwrap();
    let probes = folder.path().join("probes");
    fs::create_dir(&probes).unwrap();
    let path = probes.join("probe.safetensors");
    fs::write(&path, &good).unwrap();
    Registry::load(folder.path(), &ids(), None).expect("a good probe");
    for (case, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        let loaded = Registry::load(folder.path(), &ids(), None).map(|_| ());
        check_named(loaded, &path, case);
    }
    // Half-written files are none of the library's.
    fs::write(&path, &good).unwrap();
    fs::write(probes.join("next.safetensors.partial"), &good[..9]).unwrap();
    Registry::load(folder.path(), &ids(), None).expect("the good probe alone");
}

#[test]
fn hostile_policies_are_refused() {
    let folder = TempDir::new().unwrap();
    let policies = folder.path().join("policies");
    fs::create_dir(&policies).unwrap();
    let path = policies.join("bad.toml");
    let deep = format!("a = {}1{}", "[".repeat(50_000), "]".repeat(50_000));
    let detector = "[[detector]]\nname = \"d\"\nprobe = \"nobody\"\n";
    let unknown = "[[rule]]\nname = \"r\"\nwhen = { detector = \"d\" }\naction = \"flag\"\n";
    for (case, document) in [
        ("an unknown probe", detector.as_bytes()),
        ("an unknown detector", unknown.as_bytes()),
        ("too deep", deep.as_bytes()),
        ("no TOML", b"[[[[" as &[u8]),
        ("no UTF-8", &[0xff, 0xfe]),
        ("an unknown key", b"kill = true"),
    ] {
        fs::write(&path, document).unwrap();
        let loaded = Registry::load(folder.path(), &ids(), None).map(|_| ());
        check_named(loaded, &path, case);
    }
}

// ---- the start ----

/// Runs the binary to its end, which must come by itself.
fn inwit(arguments: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_inwit"))
        .args(arguments)
        .env_remove("INWIT_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    for _ in 0..6000 {
        if child.try_wait().unwrap().is_some() {
            return child.wait_with_output().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("{arguments:?} goes on for ever");
}

fn serve(model: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["serve", "--model", model.to_str().unwrap()];
    for (flag, value) in [("--listen", "127.0.0.1:0"), ("--http-listen", "off")] {
        if !more.contains(&flag) {
            arguments.extend([flag, value]);
        }
    }
    arguments.extend(more);
    inwit(&arguments)
}

/// A status above 0, and one line that names what is wrong.
fn check_failed(output: &Output, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code().expect("no signal");
    assert!(code != 0 && code != 101, "{code}: {stderr}");
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(
        lines[0].starts_with("inwit: ") && lines[0].contains(says),
        "{stderr}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn a_start_that_fails_says_why_in_one_line() {
    let model: PathBuf = golden("llama/model.gguf");
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("missing.gguf");
    check_failed(&serve(&missing, &[]), "missing.gguf");

    let bomb = folder.path().join("bomb.gguf");
    fs::write(&bomb, gguf(1 << 63, 0)).unwrap();
    check_failed(&serve(&bomb, &[]), "bomb.gguf");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    check_failed(&serve(&model, &["--listen", &address]), &address);

    let library = folder.path().join("library");
    fs::create_dir_all(library.join("probes")).unwrap();
    fs::write(library.join("probes/half.safetensors"), [1, 2, 3]).unwrap();
    let library = library.to_str().unwrap();
    check_failed(&serve(&model, &["--library", library]), "half.safetensors");

    // More than there is: known before it is taken.
    check_failed(
        &serve(&model, &["--kv-memory", "900000GiB"]),
        "lower --kv-memory",
    );
    check_failed(&serve(&model, &["--config", "/dev/zero"]), "/dev/zero");
    let empty = folder.path().join("empty.toml");
    fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap();
    check_failed(&serve(&model, &["--policy", empty]), "empty.toml");

    let unreadable = Command::new(env!("CARGO_BIN_EXE_inwit"))
        .args(["serve", "--check-config"])
        .env("INWIT_LOG", "inwit=loudly")
        .output()
        .unwrap();
    check_failed(&unreadable, "INWIT_LOG");

    for (flag, value) in [
        ("--policy", "nobody"),
        ("--kv-memory", "1"),
        ("--listen", "nowhere"),
        ("--mode", "sometimes"),
    ] {
        check_failed(&serve(&model, &[flag, value]), flag);
    }
}
