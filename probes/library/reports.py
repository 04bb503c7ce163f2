#!/usr/bin/env python3
"""Makes the reports of what ships for SmolLM2-135M-Instruct, from the development sets.

    python3 probes/library/reports.py --inwit target/release/inwit --work FOLDER

FOLDER is the --work of a finished make.py: its prompts and states are read, and what is made on the
way is left in it. The reports land in docs/reports/. No test file is read, with one exception:
--tests FOLDER puts the test sets into the reports of prompt_harm and of the policy default (two: one of
everyday prompts) in place of the development sets, and logs each of those runs in docs/evaluations.md.
All of it takes about an hour on two cores.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

# Nothing but the library belongs into this folder.
sys.dont_write_bytecode = True
from make import DATA, FIT, HERE, PAIR, PROMPTS, RESPONSE_FIT, judged_rows, measuring_answers, read, write  # noqa: E402

ROOT = HERE.parent.parent
REPORTS = ROOT / "docs/reports"
DEV = "dev_contrast dev_tense dev_edgy dev_alarming dev_wrapped dev_wrapped_more dev_wrapped_third".split()
CURVE_DEV = "dev_contrast dev_edgy dev_alarming dev_wrapped_third".split()
TESTS = (
    "test_xstest test_harmbench_vs_edgy test_in_distribution test_jailbreak_wrapped test_harmful_tense_shifted "
    "test_benign_traffic test_benign_questions"
).split()
POLICY_TESTS = ["test_harmbench_vs_edgy", "test_xstest"]
# Every fourth layer's end, and rows enough to rank them: all of both would be many times the states.
SWEPT = ",".join(f"blocks.{layer}.hook_resid_post" for layer in range(2, 30, 4))
SWEPT_ROWS, SWEPT_ANSWERS = 4_000, 1_200
TRAFFIC_TEST = "test_benign_traffic"
TRAFFIC_DEV = "dev_benign_traffic dev_benign_traffic_more dev_benign_backend".split()
PARTS = ("sweep", "curve", "prompt_harm", "answers", "judges", "effects", "policy", "traffic")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--inwit", required=True, help="the program")
    arguments.add_argument("--work", required=True, type=Path, help="the --work of make.py")
    arguments.add_argument("--tests", type=Path, help="folder of the test files; every run on them is logged")
    arguments.add_argument("--states", nargs="*", default=[], type=Path, help="folders of `lab collect`, of prompt_harm's sets")
    arguments.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="what to make; all, unless given")
    arguments.add_argument("--commit", help="what was measured, for the reports and the log")
    arguments = arguments.parse_args()
    work, tests = arguments.work, arguments.tests
    out = work / "reports"
    out.mkdir(exist_ok=True)
    commit = ["--commit", arguments.commit] if arguments.commit else []
    log = ["--log", ROOT / "docs/evaluations.md"] if tests else []
    dev = [DATA / f"{name}.jsonl" for name in DEV]
    prompts = [row for file in dev for row in read(file)]
    write(out / "dev.jsonl", prompts)

    def inwit(*words):
        subprocess.run([arguments.inwit, *map(str, words), "--library", HERE], check=True)

    def report(what, name, *words, file=None):
        file = file or name
        inwit("eval", what, name, *words, *commit, "--report", REPORTS / f"{file}.html", "--json", out / f"{file}.json")

    def sweep():
        rows = random.Random(4).sample(read(work / "prompt_fit.jsonl"), SWEPT_ROWS)
        write(out / "swept.jsonl", rows)
        inwit("probe", "sweep", "--data", out / "swept.jsonl", "--sites", SWEPT, "--dev", *dev,
              "--positions", "prompt_content", "--kind", "attention", "--out", out / "sweep")

    def curve():
        inwit("probe", "curve", "--data", work / "prompt_fit.jsonl", "--states", work / "prompt_fit.states",
              *(word for site in PAIR for word in ("--site", site)),
              "--dev", *(DATA / f"{name}.jsonl" for name in CURVE_DEV),
              "--positions", "prompt_content", "--kind", "attention", *FIT, "--out", out / "curve")
        (REPORTS / "curve.svg").write_bytes((out / "curve/curve.svg").read_bytes())

    def prompt_harm():
        sets = [tests / f"{name}.jsonl" for name in TESTS] if tests else dev
        report("probe", "prompt_harm", "--data", *sets, "--train", work / "prompt_fit.jsonl",
               "--states", work / "prompt_fit.states", *arguments.states, "--seeds", 3, "--sweep-json", out / "sweep/sweep.json", *log)

    def answers():
        """What the model answers to prompts that no fit saw, labelled as the training answers were."""
        inwit("generate", "--data", out / "dev.jsonl", "--out", out / "answers.jsonl",
              "--mode", "off", "--max-tokens", 40)
        texts = {row["id"]: row["text"].strip() for row in read(out / "answers.jsonl")}
        write(out / "answered.jsonl", [{**row, "answer": texts[row["id"]]} for row in prompts if texts[row["id"]]])
        inwit("lab", "label", "--data", out / "answered.jsonl", "--out", out / "labelled.jsonl")
        complied, harms = [], []
        for row in read(out / "labelled.jsonl"):
            if row["label"] not in ("complied", "refused"):
                continue
            kept = {key: row[key] for key in ("id", "text", "answer", "group", "category")}
            harm = row["prompt_label"] == "harmful" and row["label"] == "complied"
            complied.append({**kept, "label": row["label"]})
            harms.append({**kept, "label": "harmful" if harm else "benign"})
        for name, rows, fitted, reading in (
            ("compliance", complied, "compliance_fit", ["--positions", "generated:3"]),
            ("response_harm", harms, "response_fit", ["--positions", "every_generated", "--kind", "attention", *RESPONSE_FIT]),
        ):
            data, fitted = out / f"dev_answers_{name}.jsonl", work / f"{fitted}.jsonl"
            write(data, rows)
            some = out / f"swept_{name}.jsonl"
            write(some, random.Random(4).sample(read(fitted), SWEPT_ANSWERS))
            inwit("probe", "sweep", "--data", some, "--dev", data, "--sites", SWEPT, *reading, "--out", out / f"sweep_{name}")
            report("probe", name, "--data", data, "--train", fitted, "--seeds", 3,
                   "--sweep-json", out / f"sweep_{name}/sweep.json")

    def judges():
        """The two probes that judge answers, on answers that they did not learn from; no page, only figures."""
        asked = {row["id"]: row for name in PROMPTS for row in read(DATA / f"{name}.jsonl")}
        held_out = judged_rows(asked, measuring_answers())
        for name, rows in zip(("answer_complies", "answer_incoherent"), held_out):
            data = out / f"held_out_{name}.jsonl"
            write(data, rows)
            inwit("eval", "probe", name, "--data", data, "--json", out / f"{name}.json")

    def effects():
        """The refusal head and the refusal vector, through the policies that use them."""
        for name in ("safeswitch", "steer"):
            report("policy", name, "--data", out / "dev.jsonl", "--seeds", 0, "--max-tokens", 48)

    def policy():
        sets = [tests / f"{name}.jsonl" for name in POLICY_TESTS] if tests else [out / "dev.jsonl"]
        report("policy", "default", "--data", *sets, "--seeds", 3, "--max-tokens", 48, *log, file="policy")

    def traffic():
        """What the default policy does to everyday prompts, all of them benign."""
        sets = [tests / f"{TRAFFIC_TEST}.jsonl"] if tests else [DATA / f"{name}.jsonl" for name in TRAFFIC_DEV]
        report("policy", "default", "--data", *sets, "--seeds", 0, "--max-tokens", 48, *log, file="policy_traffic")

    parts = dict(zip(PARTS, (sweep, curve, prompt_harm, answers, judges, effects, policy, traffic)))
    for part in arguments.parts:
        parts[part]()


if __name__ == "__main__":
    main()
