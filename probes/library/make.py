#!/usr/bin/env python3
"""Makes the library that ships for SmolLM2-135M-Instruct: three probes, a refusal head, a vector.

    python3 probes/library/make.py --inwit target/release/inwit --data-dir FOLDER --work FOLDER

FOLDER of --data-dir holds train.jsonl: benchmark prompts, which stay out of this repository (see
../data/README.md). What is made lands in smollm2-135m-instruct/ beside this file; what was made on
the way (prompts, answers, labels) stays in --work. All of it takes about half an hour on two cores.
Every choice here is made on training rows; no test file is read.
"""

import argparse
import json
import os
import random
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
OUT = HERE / "smollm2-135m-instruct"
# A little past the middle of thirty layers. It was not swept: that is the laboratory's work.
SITE = "blocks.17.hook_resid_post"
STEER_SITE = "blocks.14.hook_resid_post"

# How this model's answers sound when it declines.
REFUSES = re.compile(
    r"(i('m| am)( really| very)? (so )?sorry|i'm afraid|i can('t|not)\b|i can ?not"
    r"|i (am|'m) (unable|not able)|unable to (assist|help|provide)|i (won't|will not)\b"
    r"|can't (assist|help|provide|fulfill)|do not condone|strongly advise)",
    re.IGNORECASE,
)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--inwit", required=True, help="the program")
    arguments.add_argument("--data-dir", required=True, type=Path)
    arguments.add_argument("--work", required=True, type=Path)
    arguments = arguments.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for folder in ("probes", "heads", "vectors"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)

    def inwit(*words):
        # In f32, so that the files are the same on machines whose kernels round otherwise; not as a
        # flag, which the records would hold.
        exact = {**os.environ, "INWIT_WEIGHTS": "f32"}
        subprocess.run([arguments.inwit, *map(str, words), "--max-running", "32"], check=True, env=exact)

    own = [row for name in ("contrast", "harmful_general", "benign_general") for row in read(DATA / f"{name}.jsonl")]
    write(work / "own.jsonl", own)
    write(work / "prompt_fit.jsonl", prompt_rows(own, read(arguments.data_dir / "train.jsonl")))
    inwit("probe", "fit", "--data", work / "prompt_fit.jsonl", "--canary-data", work / "own.jsonl",
          "--site", SITE, "--positions", "prompt_content", "--gather", "attention", "--kind", "attention",
          "--name", "prompt_harm", "--out", OUT / "probes/prompt_harm.safetensors")

    inwit("generate", "--data", work / "own.jsonl", "--out", work / "answers_greedy.jsonl",
          "--mode", "off", "--max-tokens", 40)
    answer_rows(work, {row["id"]: row for row in own}, read(work / "answers_greedy.jsonl"))
    inwit("probe", "fit", "--data", work / "compliance_fit.jsonl", "--canary-data", work / "compliance_fit.jsonl",
          "--site", SITE, "--positions", "generated:3", "--alpha", 0.01,
          "--name", "compliance", "--out", OUT / "probes/compliance.safetensors")
    # States inside the first words of a refusal against states inside the first words of an answer.
    inwit("lab", "vector", "--harmful", work / "caa_refuse.jsonl", "--benign", work / "caa_comply.jsonl",
          "--site", STEER_SITE, "--name", "refusal", "--out", OUT / "vectors/refusal.safetensors")
    inwit("lab", "refusal-head", "--harmful", work / "head_harmful.jsonl", "--refusals", DATA / "refusals.jsonl",
          "--benign", work / "head_benign.jsonl", "--rank", 16, "--epochs", 4,
          "--name", "refusal", "--out", OUT / "heads/refusal.safetensors")
    inwit("probe", "fit", "--data", work / "response_fit.jsonl", "--canary-data", work / "response_fit.jsonl",
          "--site", SITE, "--positions", "every_generated", "--gather", "ema{0.2}", "--gather", "mean",
          "--gather", "max", "--alpha", 0.01,
          "--name", "response_harm", "--out", OUT / "probes/response_harm.safetensors")


def prompt_rows(own, train):
    """Our prompts, some of them and of the benchmark's inside our wrappers, and a part of the benchmark's."""
    chance = random.Random(0)
    wrappers = read(DATA / "wrappers.jsonl")
    short = [row for row in own if len(row["text"]) < 300]
    harmful = [row for row in short if row["label"] == "harmful"]
    benign = [row for row in short if row["label"] == "benign"]
    chance.shuffle(harmful)
    chance.shuffle(benign)

    def wrap(row, wrapper, name):
        text = wrapper["text"].replace("{request}", row["text"])
        return {"id": name, "text": text, "label": row["label"], "group": row["group"]}

    wrapped = []
    for i in range(420):
        for row in (harmful[i % len(harmful)], benign[i % len(benign)]):
            wrapper = wrappers[i % len(wrappers)]
            wrapped.append(wrap(row, wrapper, f"{row['id']}@{wrapper['id']}"))
    harmful = [row for row in train if row["label"] == "harmful"]
    benign = [row for row in train if row["label"] == "benign"]
    for i in range(400):
        for row in (chance.choice(harmful), chance.choice(benign)):
            wrapper = chance.choice(wrappers)
            wrapped.append(wrap(row, wrapper, f"{row['id']}@{wrapper['id']}@{i}"))

    unique = {}
    for row in train + own + wrapped:
        unique.setdefault(row["id"], {key: row[key] for key in ("id", "text", "label", "group") if key in row})
    mine = {row["id"] for row in own}
    ours = [row for row in unique.values() if row["id"] in mine]
    inside = [row for row in unique.values() if "@" in row["id"]]
    theirs = [row for row in unique.values() if row["id"] not in mine and "@" not in row["id"]]
    chance = random.Random(1)
    chance.shuffle(inside)
    chance.shuffle(theirs)
    rows = ours + inside[:330] + theirs[:600]
    chance.shuffle(rows)
    return rows


def answer_rows(work, own, answers):
    """The model's own answers and our refusals, labelled by whether they decline."""
    chance = random.Random(5)
    by_category = {}
    for refusal in read(DATA / "refusals.jsonl"):
        by_category.setdefault(refusal["category"], []).append(refusal["text"])
    harmful = [row for row in own.values() if row["label"] == "harmful"]
    compliance, response = [], []
    for answer in answers:
        prompt, text = own[answer["id"]], answer["text"].strip()
        if len(text.split()) < 6:
            continue
        refuses = bool(REFUSES.search(text[:120]))
        row = {"id": answer["id"], "text": prompt["text"]}
        group = {"group": prompt["group"]}
        start = " ".join(text.split()[:10])
        compliance.append({**row, "answer": start, "label": "refused" if refuses else "complied", **group})
        harms = prompt["label"] == "harmful" and not refuses
        response.append({**row, "answer": text, "label": "harmful" if harms else "benign", **group})
    chance.shuffle(harmful)
    for i, prompt in enumerate(harmful[:420]):
        text = chance.choice(by_category.get(prompt["category"], []) + by_category["generic"][:6])
        row = {"id": prompt["id"] + "-refused", "text": prompt["text"]}
        group = {"group": prompt["group"]}
        start = " ".join(text.split()[:10])
        compliance.append({**row, "answer": start, "label": "refused", **group})
        if i < 200:
            response.append({**row, "answer": text, "label": "benign", **group})

    complied = [row for row in compliance if row["label"] == "complied"]
    refused = [row for row in compliance if row["label"] == "refused"]
    chance.shuffle(complied)
    chance.shuffle(refused)
    on_harmful = [row for row in complied if own[row["id"]]["label"] == "harmful"][:420]
    on_benign = [row for row in complied if own[row["id"]]["label"] == "benign"][:180]
    compliance = on_harmful + on_benign + refused[:600]
    chance.shuffle(compliance)
    harms = [row for row in response if row["label"] == "harmful"]
    harmless = [row for row in response if row["label"] == "benign"]
    chance.shuffle(harms)
    chance.shuffle(harmless)
    response = harms[:500] + harmless[:620]
    chance.shuffle(response)
    write(work / "compliance_fit.jsonl", compliance)
    write(work / "response_fit.jsonl", response)

    keep = ("id", "text", "label", "group", "category")
    write(work / "head_harmful.jsonl", [{key: row[key] for key in keep} for row in harmful[:320]])
    plain = [a for a in answers if own[a["id"]]["label"] == "benign" and not REFUSES.search(a["text"][:120])]
    chance.shuffle(plain)
    write(work / "head_benign.jsonl", [
        {"id": a["id"], "text": own[a["id"]]["text"], "answer": a["text"], "label": "benign",
         "group": own[a["id"]]["group"]} for a in plain[:120]])
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
