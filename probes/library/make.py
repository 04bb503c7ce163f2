#!/usr/bin/env python3
"""Makes the library that ships for SmolLM2-135M-Instruct: five probes, a refusal head, a vector.

    python3 probes/library/make.py --inwit target/release/inwit --work FOLDER --data-dir FOLDER

FOLDER of --data-dir holds benchmark prompts, which stay out of this repository: train.jsonl, which
../data/fetch puts there if it is missing, and calibration_benign.jsonl, which no package carries.
Without the second the thresholds of prompt_harm come from our own prompts alone, so its file differs
and --out must name another folder than that of what ships, smollm2-135m-instruct/ beside this file.
At the end it says of each file whether its bytes are those that were in --out before: on the machine
and with the build that made them they are.
What was made on the way (prompts, states, answers, labels) stays in --work, and a run that was
interrupted goes on with it. All of it takes more than an hour on two cores.
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
SHIPPED = HERE / "smollm2-135m-instruct"
KINDS = ("probes", "heads", "vectors")
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
# The answers of response_harm: to more prompts, and longer.
RESPONSES = ANSWERED + "contrast_fourth requests_third indirect_more tense_second".split()
RESPONSE_TOKENS = 64
# Benign answers that set its thresholds: as long as most answers get.
BENIGN_TOKENS = 256
# How prompt_harm is fitted, and response_harm.
FIT = "--held-out 0.1 --attention-heads 16 --epochs 16 --weight-decay 3 --token-dropout 0.5".split()
RESPONSE_FIT = "--attention-heads 8 --epochs 12 --weight-decay 3 --token-dropout 0.5".split()
LABELS = ("harmful", "benign")
STEER_SITE = "blocks.14.hook_resid_post"
JUDGED_SITE = "blocks.18.hook_resid_post"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--inwit", required=True, help="the program")
    arguments.add_argument("--work", required=True, type=Path, help="where to keep what is made on the way")
    arguments.add_argument("--data-dir", required=True, type=Path, help="benchmark prompts, outside the repository")
    arguments.add_argument("--out", default=SHIPPED, type=Path, help="where the library lies [default: what ships]")
    options = arguments.parse_args()
    work, out, benchmarks = options.work, options.out, options.data_dir
    whole = (benchmarks / "calibration_benign.jsonl").exists()
    if not whole and out.resolve() == SHIPPED:
        arguments.error(f"{benchmarks} has no calibration_benign.jsonl (GSM8K and TriviaQA, from their authors), so this "
                        "would not make what ships: name another folder with --out")
    if not (benchmarks / "train.jsonl").exists():
        fetch("--out", benchmarks, "--only", "train")
    fetch("--check", benchmarks, "--only", "train", *(["calibration_benign"] if whole else []))
    work.mkdir(parents=True, exist_ok=True)
    (work / "no-library").mkdir(exist_ok=True)
    for folder in KINDS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    before = hashes(out)
    forget_answers_of_another(options.inwit, work)

    def inwit(*words, library=work / "no-library"):
        # Without the library that is being made: its parts would have to fit each other at every step.
        command = [options.inwit, *map(str, words), "--max-running", "32", "--library", library]
        subprocess.run(command, check=True)

    own = [row for name in PROMPTS for row in read(DATA / f"{name}.jsonl")]
    canaries = random.Random(2).sample([row for row in own if len(row["text"]) < 200], 300)
    write(work / "canaries.jsonl", canaries)
    write(work / "prompt_fit.jsonl", prompt_rows(own, read(benchmarks / "train.jsonl")))
    thresholds = read(DATA / "calibration_own.jsonl") + read(DATA / "calibration_second.jsonl")
    if whole:
        thresholds = read(benchmarks / "calibration_benign.jsonl") + thresholds
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
          "--name", "prompt_harm", "--out", out / "probes/prompt_harm.safetensors")

    judges(work, out, inwit, own)

    def answers(asked, name, tokens, *more, least=6):
        write(work / "asked.jsonl", asked)
        if not (work / f"answers_{name}.jsonl").exists():
            inwit("generate", "--data", work / "asked.jsonl", "--out", work / f"answers_{name}.jsonl",
                  "--mode", "off", "--max-tokens", tokens, *more)
        return with_prompts(read(work / f"answers_{name}.jsonl"), asked, name, least)

    def labelled(answered, name):
        write(work / f"answered_{name}.jsonl", answered)
        inwit("lab", "label", "--data", work / f"answered_{name}.jsonl", "--out", work / f"labelled_{name}.jsonl",
              library=work / "judges")
        return read(work / f"labelled_{name}.jsonl")

    asked = [row for name in ANSWERED for row in read(DATA / f"{name}.jsonl")]
    begun = answers(asked, "greedy", 40) + answers(asked, "sampled", 40, "--temperature", 0.8, "--seed", 1)
    answer_rows(work, asked, labelled(begun, "begun"))
    inwit("probe", "fit", "--data", work / "compliance_fit.jsonl", "--canary-data", work / "compliance_fit.jsonl",
          "--site", SITE, "--positions", "generated:3", "--alpha", 0.01,
          "--name", "compliance", "--out", out / "probes/compliance.safetensors")
    more = [row for name in RESPONSES for row in read(DATA / f"{name}.jsonl") if len(row["text"]) < 600]
    response_rows(work, labelled(answers(more, "responses", RESPONSE_TOKENS), "responses"))
    benign = read(DATA / "calibration_own.jsonl") + read(DATA / "calibration_second.jsonl")
    write(work / "response_thresholds.jsonl", answers(benign, "benign", BENIGN_TOKENS, least=1))
    inwit("probe", "fit", "--data", work / "response_fit.jsonl", "--canary-data", work / "response_canaries.jsonl",
          "--calibration-data", work / "response_thresholds.jsonl",
          *sites, "--positions", "every_generated", "--kind", "attention", *RESPONSE_FIT,
          "--name", "response_harm", "--out", out / "probes/response_harm.safetensors")
    # States inside the first words of a refusal against states inside the first words of an answer.
    inwit("lab", "vector", "--harmful", work / "caa_refuse.jsonl", "--benign", work / "caa_comply.jsonl",
          "--site", STEER_SITE, "--name", "refusal", "--out", out / "vectors/refusal.safetensors")
    inwit("lab", "refusal-head", "--harmful", work / "head_harmful.jsonl", "--refusals", DATA / "refusals.jsonl",
          "--benign", work / "head_benign.jsonl", "--rank", 16, "--epochs", 4,
          "--name", "refusal", "--out", out / "heads/refusal.safetensors")
    for file, digest in hashes(out).items():
        print(f"{file:40} {'the bytes that were there' if before.get(file) == digest else 'other bytes'}")


def fetch(*words):
    subprocess.run([sys.executable, DATA / "fetch", *words], check=True)


def hashes(out):
    """Of every artefact, by its name within the folder."""
    files = sorted(file for kind in KINDS for file in (out / kind).glob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def forget_answers_of_another(program, work):
    """Answers are kept from one run to the next, but not those that another build gave."""
    mine, stamp = hashlib.sha256(Path(program).read_bytes()).hexdigest(), work / "program.sha256"
    if not stamp.exists() or stamp.read_text() != mine:
        for answers in work.glob("answers_*.jsonl"):
            answers.unlink()
        stamp.write_text(mine)


def measuring_answers():
    """The half of judge_sample that measures judges."""
    sample = read(DATA / "judge_sample.jsonl")
    return [row for row in sample if hashlib.sha256(row["prompt_id"].encode()).digest()[0] >= 128]


def judged_rows(prompts, judged):
    """Answers with their prompts and what answer_complies, and answer_incoherent, are to say of them."""
    complies, incoherent = [], []
    for row in judged:
        prompt = prompts[row["prompt_id"]]
        kept = {"id": row["id"], "text": prompt["text"], "answer": row["answer"], "group": prompt["group"]}
        if row["label"] != "incoherent":
            complies.append({**kept, "label": row["label"]})
        incoherent.append({**kept, "label": "incoherent" if row["label"] == "incoherent" else "coherent"})
    return complies, incoherent


def judges(work, out, inwit, own):
    """The two probes that judge answers, from labels by hand.

    The half of judge_sample that measures judges stays out, and so does every answer to a prompt of its groups.
    """
    prompts = {row["id"]: row for row in own}
    measured = {prompts[row["prompt_id"]]["group"] for row in measuring_answers()}
    judged = read(DATA / "judge_fit.jsonl") + read(DATA / "judge_sample.jsonl")
    judged = [row for row in judged if prompts[row["prompt_id"]]["group"] not in measured]
    complies, incoherent = judged_rows(prompts, judged)
    (work / "judges/probes").mkdir(parents=True, exist_ok=True)
    for name, rows, weight in (("answer_complies", complies, "balanced"), ("answer_incoherent", incoherent, "none")):
        write(work / f"{name}.jsonl", rows)
        file = f"probes/{name}.safetensors"
        inwit("probe", "fit", "--data", work / f"{name}.jsonl", "--canary-data", work / f"{name}.jsonl",
              "--site", JUDGED_SITE, "--positions", "every_generated", "--gather", "mean", "--alpha", 0.3,
              "--class-weight", weight, "--name", name, "--out", out / file)
        (work / "judges" / file).write_bytes((out / file).read_bytes())


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


def with_prompts(answers, asked, how, least):
    """Rows of a prompt with its answer of so many words at least, as the judges read them."""
    prompts = {row["id"]: row for row in asked}
    rows = []
    for answer in answers:
        prompt = prompts[answer["id"]]
        if len(answer["text"].split()) >= least:
            rows.append({"id": f"{answer['id']}-{how}", "text": prompt["text"], "answer": answer["text"].strip(),
                         "label": prompt["label"], "category": prompt["category"], "group": prompt["group"]})
    return rows


def answer_rows(work, asked, answers):
    """For compliance: the model's own answers, greedy and sampled, and our refusals, by whether they decline."""
    chance = random.Random(5)
    by_category = {}
    for refusal in read(DATA / "refusals.jsonl"):
        by_category.setdefault(refusal["category"], []).append(refusal["text"])
    harmful = [row for row in asked if row["label"] == "harmful"]
    compliance, plain = [], []
    for answer in answers:
        if answer["label"] not in ("complied", "refused"):
            continue
        row = {key: answer[key] for key in ("id", "text", "group")}
        begun = " ".join(answer["answer"].split()[:10])
        asked_harm = answer["prompt_label"] == "harmful"
        compliance.append({**row, "answer": begun, "label": answer["label"], "asked_harm": asked_harm})
        if not asked_harm and answer["label"] == "complied" and answer["id"].endswith("-greedy"):
            plain.append({**row, "answer": answer["answer"], "label": "benign"})
    chance.shuffle(harmful)
    for prompt in harmful[:420]:
        text = chance.choice(by_category.get(prompt["category"], []) + by_category["generic"][:6])
        row = {"id": prompt["id"] + "-refused", "text": prompt["text"], "group": prompt["group"]}
        begun = " ".join(text.split()[:10])
        compliance.append({**row, "answer": begun, "label": "refused", "asked_harm": True})

    complied = [row for row in compliance if row["label"] == "complied"]
    refused = [row for row in compliance if row["label"] == "refused"]
    chance.shuffle(complied)
    chance.shuffle(refused)
    on_harmful = [row for row in complied if row["asked_harm"]][:420]
    on_benign = [row for row in complied if not row["asked_harm"]][:180]
    compliance = on_harmful + on_benign + refused[:600]
    chance.shuffle(compliance)
    write(work / "compliance_fit.jsonl", compliance)

    keep = ("id", "text", "label", "group", "category")
    write(work / "head_harmful.jsonl", [{key: row[key] for key in keep} for row in harmful[:320]])
    chance.shuffle(plain)
    write(work / "head_benign.jsonl", plain[:300])
    begun_answers(work, harmful[:160], [row for row in compliance if row["label"] == "complied"])


def response_rows(work, answers):
    """Answers of which rules and probes agree whether they comply; harmful are those that comply with harm."""
    rows = []
    for answer in answers:
        if answer["label"] in ("complied", "refused"):
            harms = answer["prompt_label"] == "harmful" and answer["label"] == "complied"
            rows.append({**{key: answer[key] for key in ("id", "text", "group", "answer")},
                         "label": "harmful" if harms else "benign"})
    random.Random(6).shuffle(rows)
    write(work / "response_fit.jsonl", rows)
    write(work / "response_canaries.jsonl", rows[:200])


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
