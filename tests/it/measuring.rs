//! `inwit bench` and `inwit load` as they are run: the files that they write have every field that
//! readers of such files rely on. What the numbers are is not looked at.

use std::path::Path;
use std::process::{Command, Output};

use inwit::cli::server::start;
use inwit::config::{Config, Flags};
use serde_json::Value;

use crate::golden::golden;
use crate::wire_support::{Server, Setup};

fn inwit(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inwit"));
    command.args(arguments).output().unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(row: &Value, keys: &[&str]) {
    for key in keys {
        assert!(row[*key].is_number(), "{key} in {row}");
    }
}

#[test]
fn a_benchmark_refuses_what_its_parts_would_not_read() {
    let model = golden("llama/hf");
    for (parts, flag, value, told) in [
        ("memory", "--streams", "2", "throughput, grpc, added"),
        ("memory,prefix", "--pairs", "9", "add one of added"),
        ("added", "--rounds", "2", "throughput, prefix, grpc"),
        ("prefix", "--answer-tokens", "9", "--answer-tokens: none"),
        ("prefix", "--library", "shipped", "its own probes"),
        ("throughput", "--max-running", "4", "as many rows"),
        ("added", "--context-limit", "99", "steps over"),
    ] {
        let model = model.to_str().unwrap();
        let output = inwit(&[
            "bench", "--quick", "--model", model, "--parts", parts, flag, value,
        ]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flag}: {error}");
        assert!(error.contains(told), "{flag}: {error}");
    }
}

#[test]
fn help_names_no_flag_that_a_command_always_refuses() {
    for (command, refused) in [
        (&["bench"][..], &["--library", "--max-running"][..]),
        (
            &["lab", "quality"],
            &[
                "--library",
                "--device",
                "--max-running",
                "--kv-memory",
                "--context-limit",
            ],
        ),
    ] {
        let output = inwit(&[command, &["--help"]].concat());
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(help.contains("--weights <FORMAT>"), "{help}");
        for flag in refused {
            assert!(!help.contains(flag), "{flag} in {help}");
        }
    }
}

#[test]
fn what_a_weight_format_costs_is_written_where_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let [text, file] = ["text.txt", "quality.json"].map(|name| folder.path().join(name));
    std::fs::write(
        &text,
        "A river runs through the valley, and the mill stands beside it. ".repeat(20),
    )
    .unwrap();
    let model = golden("llama/hf");
    let quality = |format: &str, json: &Path| {
        let [model, text, json] = [&model, &text, json].map(|path| path.to_str().unwrap());
        inwit(&[
            "lab",
            "quality",
            "--model",
            model,
            "--text",
            text,
            "--weights",
            format,
            "--kv",
            "f32",
            "--json",
            json,
        ])
    };
    for (format, held, least) in [
        ("f32", "f32", 1.0 - 1e-6),
        ("q8_0", "q8_0", 0.999),
        // The layers at 4 bits, embedding and head at 8.
        ("q4_1", "rounded-q4_1+q8_0", 0.9),
    ] {
        let output = quality(format, &file);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        let report = read(&file);
        assert_eq!(report["weights"], held);
        numbers(
            &report,
            &["tokens", "perplexity", "mean_kl", "top1_agreement"],
        );
        let cosine = report["least_cosine"].as_f64().unwrap();
        assert!(cosine >= least && cosine <= 1.0 + 1e-6, "{report}");
        assert!(
            format == "f32" || cosine < 1.0 - 1e-6,
            "nothing was rounded: {report}"
        );
    }
    let output = quality("q8_0", &text);
    assert!(String::from_utf8_lossy(&output.stderr).contains("would be lost"));
}

#[test]
fn a_benchmark_writes_every_row_that_readers_of_its_file_rely_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bench.json");
    let model = golden("llama/hf");
    let output = inwit(&[
        "bench",
        "--quick",
        "--streams",
        "1,3",
        "--threads",
        "1",
        "--commit",
        "abc",
        "--model",
        model.to_str().unwrap(),
        "--json",
        file.to_str().unwrap(),
    ]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report = read(&file);
    assert_eq!(report["commit"], "abc");
    assert!(!report["machine"].as_str().unwrap().is_empty());
    numbers(
        &report["settings"],
        &["threads", "context_tokens", "weight_bytes", "seed"],
    );

    let rows = report["rows"].as_array().unwrap();
    for monitor in ["off", "probes", "interventions", "capture"] {
        for (name, streams) in [
            ("prefill", 1),
            ("ttft", 1),
            ("decode", 1),
            ("ttft", 3),
            ("decode", 3),
        ] {
            let is_row = |row: &&Value| {
                row["name"] == name && row["streams"] == streams && row["monitor"] == monitor
            };
            assert_eq!(
                rows.iter().filter(is_row).count(),
                1,
                "{name} {streams} {monitor}"
            );
        }
    }
    const MEASURED: [&str; 3] = ["tokens_per_second", "p50_ms", "p99_ms"];
    for row in rows {
        // The tiny model's answers may have ended before all three were being written.
        match row["name"] == "decode" && row["streams"] == 3 && row["tokens_per_second"].is_null() {
            true => assert!(MEASURED.iter().all(|key| row[*key].is_null()), "{row}"),
            false => numbers(row, &MEASURED),
        }
    }
    let added = report["added"].as_array().unwrap();
    assert_eq!(added.len(), 8);
    for row in added {
        numbers(
            row,
            &["streams", "pairs", "base_us", "added_us", "added_percent"],
        );
        for interval in ["interval_us", "interval_percent"] {
            let interval = row[interval].as_array().unwrap();
            assert!(interval[0].as_f64() <= interval[1].as_f64(), "{row}");
        }
    }
    numbers(
        &report["prefix"],
        &["tokens", "cold_ms", "repeated_ms", "percent_of_cold"],
    );
    numbers(
        &report["long_prompt"],
        &[
            "streams_to_the_end",
            "before_p50_ms",
            "alone_ms",
            "among_ms",
        ],
    );
    // The tiny model's streams may all have ended by then.
    for gap in ["during_p99_ms", "without_p50_ms", "during_over_without"] {
        let gap = &report["long_prompt"][gap];
        assert!(gap.is_null() || gap.as_f64() > Some(0.0), "{report}");
    }
    let grpc = &report["grpc"];
    numbers(grpc, &["tokens", "percent_of_in_process"]);
    assert_eq!(grpc["streams"], 3);
    assert!(grpc["tokens"].as_u64().unwrap() > 0, "{grpc}");
    numbers(&report["memory"], &["streams", "tokens"]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(
        table.contains("over gRPC") && table.contains("added us"),
        "{table}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn load_counts_every_call_that_it_planned() {
    let config = Config::load(&Flags {
        model: Some(golden("llama/hf").display().to_string()),
        listen: Some("127.0.0.1:0".into()),
        http_listen: Some("off".into()),
        threads: Some("1".into()),
        ..Flags::default()
    });
    let running = start(&config.unwrap()).await.unwrap();
    let url = format!("http://{}", running.address);
    let folder = tempfile::tempdir().unwrap();
    let (json, svg) = (
        folder.path().join("load.json"),
        folder.path().join("load.svg"),
    );
    let output = {
        let (json, svg) = (json.clone(), svg.clone());
        tokio::task::spawn_blocking(move || {
            inwit(&[
                "load",
                "--url",
                &url,
                "--rate",
                "40",
                "--duration",
                "1",
                "--prompt-words",
                "2,6",
                "--answer-tokens",
                "4,8",
                "--cancel",
                "0.3",
                "--score",
                "0.3",
                "--mode",
                "shadow",
                "--json",
                json.to_str().unwrap(),
                "--plot",
                svg.to_str().unwrap(),
            ])
        })
        .await
        .unwrap()
    };
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report = read(&json);
    let calls = &report["calls"];
    assert_eq!(calls["made"], 40, "{report}");
    let of_kinds = ["answered", "scored", "hung_up", "rejected", "failed"];
    let sum: u64 = of_kinds
        .iter()
        .map(|kind| calls[*kind].as_u64().unwrap())
        .sum();
    assert_eq!((sum, calls["failed"].as_u64()), (40, Some(0)), "{report}");
    for kind in ["answered", "scored", "hung_up"] {
        assert!(calls[kind].as_u64() > Some(0), "{kind}: {report}");
    }
    let codes = report["codes"].as_object().unwrap();
    assert_eq!(codes.values().filter_map(Value::as_u64).sum::<u64>(), 40);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    assert_eq!(
        names,
        [
            "to_first_token",
            "between_tokens",
            "answer",
            "score",
            "late_start"
        ]
    );
    for row in rows {
        numbers(
            row,
            &["count", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"],
        );
    }
    numbers(
        &report["goodput"],
        &["good", "asked", "share", "good_per_second"],
    );
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("to_first_token"));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn steered_calls_of_load_bring_the_vector_and_fail_without_it() {
    let server = Server::start(Setup::default(), |library| {
        library.vector("push", 3.0);
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    for (vector, counted) in [("push", "answered"), ("missing", "failed")] {
        let json = folder.path().join(vector);
        let mut line: Vec<String> = ["--rate", "20", "--duration", "0.5", "--raw", "--steer", "1"]
            .map(String::from)
            .to_vec();
        line.extend(["--prompt-words", "2", "--answer-tokens", "4"].map(String::from));
        line.extend(["--vector".into(), vector.into(), "--url".into()]);
        line.extend([format!("http://{}", server.address), "--json".into()]);
        line.push(json.display().to_string());
        let run = move || {
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            inwit(&[&["load"], &line[..]].concat())
        };
        tokio::task::spawn_blocking(run).await.unwrap();
        let report = read(&json);
        assert_eq!(report["calls"][counted], 10, "{vector}: {report}");
        assert_eq!(report["settings"]["vector"], vector);
    }
}

#[test]
fn load_without_a_server_says_so_and_exits_with_4() {
    // Port 9 of loopback: nobody listens there.
    let output = inwit(&["load", "--url", "http://127.0.0.1:9", "--duration", "1"]);
    assert_eq!(output.status.code(), Some(4));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("inwit serve"), "{told}");
}
