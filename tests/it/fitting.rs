//! `inwit probe fit`, `sweep` and `threshold`, `inwit lab vector` and `refusal-head` as they are
//! run, on a tiny model: what they write, and what they refuse. How good a fit is is not looked at.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use inwit_probes::{Gather, Kind, Positions, Probe, RefusalHead, SteeringVector};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::golden::golden;

const EARLY: &str = "blocks.0.hook_resid_post";
const LATE: &str = "blocks.1.hook_resid_post";

/// A folder with data in it, where commands are run.
struct Bench {
    folder: TempDir,
}

impl Bench {
    /// Sixty pairs: a question and a statement about one thing.
    fn new() -> Self {
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        bench.write("train.jsonl", (0..60).flat_map(pair));
        bench.write("dev.jsonl", (60..75).flat_map(pair));
        bench.write("benign.jsonl", (100..300).map(benign));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, rows: impl IntoIterator<Item = Value>) {
        let lines: Vec<String> = rows.into_iter().map(|row| row.to_string()).collect();
        std::fs::write(self.path(name), lines.join("\n")).unwrap();
    }

    /// Runs a command in the folder, on the tiny model.
    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_inwit"));
        command
            .current_dir(self.folder.path())
            .args(line.split_whitespace())
            .args(["--threads", "1", "--weights", "f32", "--model"])
            .arg(golden("llama/hf"));
        command.output().unwrap()
    }

    fn done(&self, line: &str) -> String {
        let output = self.run(line);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {told}");
        String::from_utf8_lossy(&output.stdout).into_owned() + &told
    }

    fn refused(&self, line: &str, expected: &str) {
        let output = self.run(line);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{line}");
        assert!(told.contains(expected), "{line}: {told}");
    }

    fn probe(&self, name: &str) -> Probe {
        Probe::load(self.path(name)).unwrap()
    }

    fn fit(&self, rest: &str, out: &str) -> Probe {
        self.done(&format!(
            "probe fit --data train.jsonl --positions prompt_content --name asks --out {out} {rest}"
        ));
        self.probe(out)
    }
}

/// Harmful and benign in the data's words: two rows of one group.
fn pair(number: usize) -> [Value; 2] {
    let row = |text: String, label: &str| {
        let (id, group) = (format!("{number}-{label}"), format!("g{number}"));
        json!({"id": id, "text": text, "label": label, "group": group, "answer": "It is here."})
    };
    [
        row(format!("Where is the river {number}?"), "harmful"),
        row(format!("The river is near the ship {number}."), "benign"),
    ]
}

fn harmful(number: usize) -> Value {
    let [harmful, _] = pair(number);
    harmful
}

fn benign(number: usize) -> Value {
    let [_, benign] = pair(number);
    benign
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_kind_is_fitted_over_two_sites_and_twice_the_same() {
    let bench = Bench::new();
    for (kind, name, rest) in [
        (Kind::Lda, "lda", "--shrinkage 0.3 --gather mean"),
        (
            Kind::DifferenceOfMeans,
            "difference_of_means",
            "--gather mean --gather k_of_n{2,64} --gather cumulative_log_odds",
        ),
        (
            Kind::TwoLayer,
            "two_layer",
            "--hidden 8 --epochs 4 --learning-rate 0.01 --gather mean --class-weight 2:1",
        ),
        (
            Kind::Attention,
            "attention",
            "--attention-heads 3 --epochs 4 --batch 8 --learning-rate 0.01",
        ),
        (
            Kind::Logistic,
            "logistic",
            "--alpha 0.1 --gather mean --calibration isotonic --class-weight none",
        ),
    ] {
        let rest = format!("--kind {name} --site {EARLY} --site {LATE} --seed 3 {rest}");
        let probe = bench.fit(&rest, "p.safetensors");
        let manifest = probe.manifest();
        assert_eq!((manifest.kind, manifest.heads.len()), (kind, 2));
        assert_eq!(manifest.calibrations.len(), manifest.gathers.len());
        assert!(manifest.record.note.contains("class weight"), "{name}");
        let auroc = manifest.record.metrics.keys();
        let of_gathers = auroc.filter(|name| name.starts_with("held_out_auroc"));
        assert_eq!(of_gathers.count(), manifest.gathers.len(), "{name}");
        assert_eq!(bench.fit(&rest, "p.safetensors"), probe, "{name}");
    }
    let attention = bench.probe("p.safetensors");
    assert!(attention.prober().is_none());
    bench.refused(
        "probe fit --data train.jsonl --site hook_embed --kind lda --hidden 4 --name p --out q",
        "hidden: is no setting of the kind lda",
    );
}

#[test]
fn the_first_tokens_of_answers_are_read_together() {
    let bench = Bench::new();
    let fit = |positions: &str, gather: &str| {
        bench.done(&format!(
            "probe fit --data train.jsonl --positions {positions} --site {EARLY} --gather {gather} \
             --kind lda --name p --out p.safetensors"
        ));
        bench.probe("p.safetensors")
    };
    let three = fit("generated:1..3", "mean");
    assert_eq!(three.manifest().positions, Positions::FirstGenerated(3));
    // One token alone is read alike under both names.
    let [first, alone] = [fit("generated:1..1", "mean"), fit("generated:1", "last")];
    assert_eq!(first.heads(), alone.heads());
    assert_ne!(first.heads(), three.heads());
    bench.refused(
        "probe fit --data train.jsonl --positions generated:2..3 --site hook_embed --name p --out q",
        "generated:1..3",
    );
}

#[test]
fn states_that_were_collected_give_the_same_probe_without_the_model_s_work() {
    let bench = Bench::new();
    let rest = format!("--site {EARLY} --kind lda --gather mean");
    let probe = bench.fit(&rest, "p.safetensors");
    bench.done(&format!(
        "lab collect --data train.jsonl --site {EARLY} --positions prompt_content --out states"
    ));
    let again = bench.fit(&format!("{rest} --states states"), "q.safetensors");
    assert_eq!(again.heads(), probe.heads());
    assert_eq!(again.manifest().calibrations, probe.manifest().calibrations);
    assert_eq!(again.manifest().canaries, probe.manifest().canaries);
    bench.refused(
        "probe sweep --data dev.jsonl --out sweep --states states",
        "holds the states of another file, train.jsonl",
    );
    bench.refused(
        &format!("probe sweep --data train.jsonl --sites {LATE} --out sweep --states states"),
        "was not collected",
    );
    bench.refused(
        &format!("probe sweep --data train.jsonl --dev train.jsonl --sites {LATE} --out sweep"),
        "the very file that is fitted on",
    );
    bench.refused(
        &format!(
            "probe curve --data train.jsonl --dev dev.jsonl dev.jsonl --site {LATE} --out new/curve"
        ),
        "is given twice",
    );
    for folder in ["sweep", "new"] {
        assert!(
            !bench.path(folder).exists(),
            "a folder for nothing: {folder}"
        );
    }
}

#[test]
fn a_sweep_measures_every_layer_and_draws_it() {
    let bench = Bench::new();
    let table = bench.done(
        "probe sweep --data train.jsonl --dev dev.jsonl --kind lda --positions prompt_content \
         --gather mean --sites all-resid_post,hook_embed --out sweep",
    );
    assert!(
        table.contains(EARLY) && table.contains("dev.jsonl"),
        "{table}"
    );
    let found = read(&bench.path("sweep/sweep.json"));
    let sites = found["sites"].as_array().unwrap();
    let names: Vec<_> = sites
        .iter()
        .filter_map(|row| row["site"].as_str())
        .collect();
    assert_eq!(names.last(), Some(&"hook_embed"));
    assert!(names.contains(&EARLY) && names.contains(&LATE), "{names:?}");
    for row in sites {
        for ranking in [&row["held_out"], &row["dev"][0], &row["dev_together"]] {
            let value = ranking["auroc"]["value"].as_f64().unwrap();
            let interval = ranking["auroc"]["interval"].as_array().unwrap();
            assert!(interval[0].as_f64() <= Some(value), "{row}");
        }
    }
    let fitted = found["rows_fitted"].as_u64().unwrap();
    assert_eq!(fitted + found["rows_held_out"].as_u64().unwrap(), 120);
    let picture = std::fs::read_to_string(bench.path("sweep/sweep.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("dev.jsonl"));
}

#[test]
fn a_curve_measures_growing_shares_of_the_rows_and_draws_them() {
    let bench = Bench::new();
    let curve = |shares: &str| {
        format!(
            "probe curve --data train.jsonl --dev dev.jsonl --site {EARLY} --kind lda \
             --positions prompt_content --gather mean --shares {shares} --out curve"
        )
    };
    let table = bench.done(&curve("1,0.25"));
    assert!(table.contains("dev.jsonl"), "{table}");
    let found = read(&bench.path("curve/curve.json"));
    let points = found["points"].as_array().unwrap();
    let rows: Vec<u64> = points
        .iter()
        .filter_map(|point| point["rows"].as_u64())
        .collect();
    let held_out = found["rows_held_out"].as_u64().unwrap();
    assert!(rows.len() == 2 && rows[0] < rows[1] / 3, "{rows:?}");
    assert_eq!(rows[1] + held_out, 120);
    for point in points {
        assert!(
            point["dev_together"]["auroc"]["value"].is_number(),
            "{point}"
        );
    }
    let picture = std::fs::read_to_string(bench.path("curve/curve.svg")).unwrap();
    assert!(picture.contains("rows learnt from") && picture.contains("dev.jsonl"));
    bench.refused(&curve("0,1"), "above 0");
    bench.refused(&curve("0.5,0.5"), "twice");
}

#[test]
fn a_threshold_is_set_where_it_is_asked_for_and_nowhere_else() {
    let bench = Bench::new();
    let rest = format!("--site {EARLY} --kind lda --gather mean --gather cumulative_log_odds");
    let before = bench.fit(&rest, "p.safetensors");
    let bytes = std::fs::read(bench.path("p.safetensors")).unwrap();
    let set = "probe threshold p.safetensors --data benign.jsonl --target-fpr";

    let told = bench.done(&format!("{set} 0.02"));
    assert!(
        told.contains("2.0 %") && told.contains("nothing was written"),
        "{told}"
    );
    bench.refused(&format!("{set} 0.001"), "at least 999 are needed");
    bench.refused(&format!("{set} 0.02 --gather ema{{0.5}}"), "ema{0.5}");
    bench.refused(&format!("{set} 0.02 --out p.safetensors"), "another");
    bench.refused(
        "probe threshold p.safetensors --data train.jsonl --target-fpr 0.1",
        "must be benign",
    );
    assert_eq!(std::fs::read(bench.path("p.safetensors")).unwrap(), bytes);

    bench.done(&format!(
        "{set} 0.02 --gather cumulative_log_odds --out q.safetensors"
    ));
    let after = bench.probe("q.safetensors");
    let points = |probe: &Probe, gather: &Gather| {
        let calibration = probe.manifest().calibration(gather).unwrap();
        calibration.thresholds.clone()
    };
    assert_eq!(
        points(&after, &Gather::Mean),
        points(&before, &Gather::Mean)
    );
    let all = points(&after, &Gather::CumulativeLogOdds);
    let point = all.iter().find(|point| point.fpr == 0.02).unwrap();
    assert_eq!((point.n, point.answer_tokens), (200, None));
    assert!(point.interval[0] <= 0.02);
    assert_eq!(after.heads(), before.heads());

    bench.done(&format!("{set} 0.02 --in-place"));
    let inside = bench.probe("p.safetensors");
    assert!(
        points(&inside, &Gather::Mean)
            .iter()
            .any(|point| point.fpr == 0.02)
    );
    assert!(inside.manifest().record.note.contains("probe threshold"));
}

#[test]
fn a_vector_keeps_out_of_what_benign_states_vary_along() {
    let bench = Bench::new();
    bench.write("harmful.jsonl", (0..40).map(harmful));
    let line = format!("lab vector --harmful harmful.jsonl --benign benign.jsonl --site {LATE}");
    bench.done(&format!("{line} --out plain.safetensors"));
    let told = bench.done(&format!(
        "{line} --null-space-rank 4 --out kept.safetensors"
    ));
    assert!(
        told.contains("kept out of 4 principal directions"),
        "{told}"
    );
    let vector = SteeringVector::load(bench.path("kept.safetensors")).unwrap();
    let metrics = &vector.manifest().record.metrics;
    let [before, after] =
        ["before", "after"].map(|when| metrics[&format!("benign_variance_along_{when}")].value);
    assert!(after < before, "{after} {before}");
    bench.refused(
        &format!("{line} --null-space-energy 2 --out other.safetensors"),
        "null_space_energy",
    );
    bench.write(
        "benign.jsonl",
        [json!({"text": "A hill.", "label": "harmful"})],
    );
    bench.refused(
        &format!("{line} --out other.safetensors"),
        "the label harmful belongs into the other",
    );
}

#[test]
fn a_refusal_head_says_what_it_does_to_benign_answers() {
    let bench = Bench::new();
    bench.write("harmful.jsonl", (0..40).map(harmful));
    bench.write(
        "refusals.jsonl",
        [
            json!({"text": "The ship is old."}),
            json!({"text": "The hill is near."}),
        ],
    );
    let line = "lab refusal-head --harmful harmful.jsonl --refusals refusals.jsonl --rank 2 \
                --epochs 1";
    let told = bench.done(&format!(
        "{line} --benign benign.jsonl --out head.safetensors"
    ));
    assert!(told.contains("mean KL"), "{told}");
    let head = RefusalHead::load(bench.path("head.safetensors")).unwrap();
    let metrics = &head.manifest().record.metrics;
    assert!(metrics["held_out_benign_mean_kl"].value > 0.0);
    assert!(metrics["held_out_benign_tokens"].value > 0.0);
    let told = bench.done(&format!("{line} --out alone.safetensors"));
    assert!(told.contains("not measured"), "{told}");
    let refusals = (0..20).map(|i| json!({"text": format!("The ship {i} is old.")}));
    bench.write("refusals.jsonl", refusals);
    bench.done(&format!("{line} --out many.safetensors"));
    let many = RefusalHead::load(bench.path("many.safetensors")).unwrap();
    assert!(
        many.manifest()
            .record
            .metrics
            .contains_key("held_out_loss_after")
    );
    let mut show = Command::new(env!("CARGO_BIN_EXE_inwit"));
    let shown = show
        .args(["probe", "show"])
        .arg(bench.path("many.safetensors"));
    let told = String::from_utf8(shown.output().unwrap().stdout).unwrap();
    assert!(
        told.contains("held_out_loss_after") && told.contains("refusals.jsonl"),
        "{told}"
    );

    bench.write("harmful.jsonl", (0..9).map(harmful));
    let told = bench.done(&format!("{line} --out few.safetensors"));
    assert!(told.contains("every tenth group"), "{told}");
    let few = RefusalHead::load(bench.path("few.safetensors")).unwrap();
    assert!(
        !few.manifest()
            .record
            .metrics
            .contains_key("held_out_loss_after")
    );
    bench.refused(
        &format!("{line} --learning-rate 1e9 --out other.safetensors"),
        "learning_rate: is too high",
    );
    bench.refused(
        &format!("{line} --benign harmful.jsonl --out other.safetensors"),
        "the label harmful belongs into the other",
    );
    bench.refused(
        &format!("{line} --benign benign.jsonl --benign-weight=-1 --out other.safetensors"),
        "benign_weight: must be above 0",
    );
    bench.refused(
        &format!("{line} --benign-weight 2 --out other.safetensors"),
        "--benign",
    );
}
