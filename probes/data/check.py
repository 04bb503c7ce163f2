#!/usr/bin/env python3
"""Checks the prompts in this folder: schema, counts, identities, duplicates, and what must not overlap.

    python3 check.py                      everything that needs only this folder
    python3 check.py --benchmarks FOLDER  also: no row equals or nearly equals a benchmark row
    python3 check.py --style              also: how well form alone predicts the label (needs scikit-learn)

Exit status: 0 when all checks hold, 1 otherwise.
It never prints a prompt, only identities, files and counts.
It does not know whether a label is right: people have to read the rows for that.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = {"source": "written for inwit", "licence": "CC0-1.0"}
ANSWER_SOURCE = {"source": "answers of SmolLM2-135M-Instruct; labels written for inwit", "licence": "CC0-1.0"}
NEAR = 0.7  # token-set Jaccard above which two texts count as near duplicates

CATEGORIES = set(
    "cyber_intrusion malware fraud theft weapons poison drugs harassment stalking self_harm "
    "disinformation discrimination privacy arson forgery animal_cruelty evading_police blackmail "
    "tax_evasion violence corruption sabotage exploitation extremism dangerous_advice".split()
)

TRAIN = (
    "contrast contrast_more contrast_third contrast_fourth benign_general benign_traffic benign_traffic_second "
    "benign_edgy harmful_general harmful_more requests_third benign_alarming benign_frames harmful_frames "
    "frames_second tense tense_second indirect indirect_more"
).split()
PAIRED = "contrast contrast_more contrast_third contrast_fourth requests_third frames_second tense_second".split()
WRAPPED = ["dev_wrapped", "dev_wrapped_more", "dev_wrapped_third"]
DEV = (
    "dev_contrast dev_tense dev_edgy dev_alarming dev_benign_conversational dev_benign_traffic dev_benign_traffic_more "
    "dev_benign_backend"
).split() + WRAPPED
WRAPPERS = {"wrappers": 24, "wrappers_more": 50, "wrappers_long": 47, "wrappers_third": 80}  # file -> frames at least
# For thresholds: overlaps neither what is fitted nor what is held out.
CALIBRATION = ["calibration_own", "calibration_second"]
PROMPTS = TRAIN + CALIBRATION + DEV + ["demo"]

# What a person can say of an answer in JUDGED_FILES, and how the answer came about.
JUDGED_FILES = ["judge_sample", "judge_fit"]
JUDGED = ["complied", "refused", "incoherent"]
ORIGINS = ["greedy", "sampled", "enforced", "scrambled"]

# file -> (harmful at least, benign at least)
AT_LEAST = {
    "contrast": (300, 300),
    "contrast_more": (450, 450),
    "benign_general": (0, 500),
    "harmful_general": (400, 0),
    "benign_alarming": (100, 400),
    "contrast_third": (280, 280),
    "harmful_more": (400, 0),
    "benign_traffic": (0, 650),
    "benign_edgy": (0, 420),
    "benign_frames": (0, 300),
    "contrast_fourth": (375, 375),
    "requests_third": (500, 500),
    "frames_second": (260, 260),
    "benign_traffic_second": (0, 950),
    "tense_second": (300, 300),
    "calibration_second": (0, 1000),
    "harmful_frames": (200, 0),
    "tense": (300, 300),
    "indirect": (250, 250),
    "indirect_more": (200, 200),
    "dev_contrast": (80, 80),
    "dev_wrapped": (60, 60),
    "dev_wrapped_more": (60, 60),
    "dev_wrapped_third": (75, 75),
    "dev_edgy": (130, 130),
    "dev_alarming": (40, 100),
    "dev_tense": (60, 40),
    "calibration_own": (0, 600),
    "dev_benign_backend": (0, 890),
    "dev_benign_conversational": (0, 150),
    "dev_benign_traffic": (0, 300),
    "dev_benign_traffic_more": (0, 490),
    "demo": (3, 5),
}


def main():
    arguments = argparse.ArgumentParser(description="Checks the prompts in this folder.")
    arguments.add_argument("--benchmarks", type=Path, help="folder with benchmark *.jsonl files")
    arguments.add_argument("--style", action="store_true", help="measure what form alone predicts")
    arguments = arguments.parse_args()

    faults = []
    files = {name: read(HERE / f"{name}.jsonl", faults) for name in [*PROMPTS, *WRAPPERS, "refusals"]}
    check_prompts(files, faults)
    check_pairs(files, faults)
    check_wrappers(files, faults)
    check_refusals(files, faults)
    check_demo(files["demo"], faults)
    check_identities(files, faults)
    check_duplicates(files, faults)
    check_held_out(files, faults)
    check_perplexity_text(faults)
    check_judged(files, faults)
    if arguments.benchmarks:
        check_benchmarks(files, arguments.benchmarks, faults)
    if arguments.style:
        report_style(files)

    for fault in faults:
        print("FAULT", fault)
    for name, rows in files.items():
        labels = Counter(row.get("label", "-") for row in rows)
        print(f"{name + '.jsonl':32} {len(rows):5} rows  {dict(sorted(labels.items()))}")
    print("all checks hold" if not faults else f"{len(faults)} faults")
    sys.exit(1 if faults else 0)


def read(path, faults, text="text", source=SOURCE):
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"{path.name}:{number}: not JSON: {error}")
            continue
        if not isinstance(row.get(text), str) or not row[text].strip():
            faults.append(f"{path.name}:{number}: no {text}")
            continue
        if any(row.get(key) != value for key, value in source.items()):
            faults.append(f"{path.name}:{number}: source or licence missing or other than expected")
        rows.append(row)
    return rows


def check_prompts(files, faults):
    for name in PROMPTS:
        wanted = {"id", "text", "label", "category", "source", "licence", "group"}
        wanted |= {"expect"} if name == "demo" else set()
        for row in files[name]:
            # What the demo puts on the screen in place of a harmful prompt.
            shown = {"shown"} if name == "demo" and row.get("label") == "harmful" else set()
            if unlike := set(row) ^ (wanted | shown):
                faults.append(f"{name}: {row.get('id')}: fields {sorted(unlike)} missing or unknown")
            if row.get("label") not in ("harmful", "benign"):
                faults.append(f"{name}: {row.get('id')}: label must be harmful or benign")
            if row["text"] != row["text"].strip():
                faults.append(f"{name}: {row.get('id')}: text begins or ends with white space")
            if must_be_listed(name, row) and row.get("category") not in CATEGORIES:
                faults.append(f"{name}: {row.get('id')}: category outside the closed list")
        for label, least in zip(("harmful", "benign"), AT_LEAST[name]):
            count = sum(row.get("label") == label for row in files[name])
            if count < least:
                faults.append(f"{name}: {count} {label} rows, at least {least} expected")


def must_be_listed(name, row):
    """Whether the category of this row has to be one of CATEGORIES: in pairs, and in every harmful training row."""
    return name in PAIRED or (name in TRAIN and row.get("label") == "harmful")


def check_pairs(files, faults):
    for name in (*PAIRED, "dev_contrast", *WRAPPED, "tense", "indirect", "indirect_more"):
        groups = defaultdict(list)
        for row in files[name]:
            groups[row["group"]].append(row["label"])
        pairs = sum(sorted(labels) == ["benign", "harmful"] for labels in groups.values())
        if name in ("tense", "indirect", "indirect_more"):  # twins among single rows
            if any(sorted(labels) != ["benign", "harmful"] for labels in groups.values() if len(labels) > 1):
                faults.append(f"{name}: a shared group is not one harmful and one benign row")
            if pairs < 120:
                faults.append(f"{name}: {pairs} contrast twins, at least 120 expected")
        elif pairs < len(groups):
            faults.append(f"{name}: {len(groups) - pairs} groups are not one harmful and one benign row")


def check_wrappers(files, faults):
    held_out_rows = [row for name in WRAPPED for row in files[name]]
    for name, least in WRAPPERS.items():
        if len(files[name]) < least:
            faults.append(f"{name}: {len(files[name])}, at least {least} expected")
        for row in files[name]:
            if row["text"].count("{request}") != 1:
                faults.append(f"{name}: {row['id']}: exactly one {{request}} slot expected")
            frame = tokens(row["text"].replace("{request}", " "))
            for held_out in held_out_rows:
                if len(frame & tokens(held_out["text"])) > NEAR * len(frame):
                    faults.append(f"{name}: {row['id']} is contained in held-out {held_out['id']}")
    plain = sum(row["category"].startswith("plain_") for row in files["wrappers_more"])
    if plain < 15:
        faults.append(f"wrappers_more: {plain} plain frames, at least 15 expected")
    for row in files["wrappers_long"]:
        words = len(row["text"].replace("{request}", " ").split())
        if not 120 <= words <= 450:
            faults.append(f"wrappers_long: {row['id']}: {words} words, 120 to 450 expected")


def check_refusals(files, faults):
    counts = Counter(row["category"] for row in files["refusals"])
    for category in sorted(CATEGORIES - {c for c, n in counts.items() if n >= 6}):
        faults.append(f"refusals: category {category} has {counts[category]}, at least 6 expected")
    if counts["generic"] < 30:
        faults.append(f"refusals: {counts['generic']} generic, at least 30 expected")
    for category in set(counts) - CATEGORIES - {"generic"}:
        faults.append(f"refusals: unknown category {category}")
    for row in files["refusals"]:
        if not 15 <= len(row["text"].split()) <= 50:
            faults.append(f"refusals: {row['id']}: {len(row['text'].split())} words, 15 to 50 expected")


def check_demo(rows, faults):
    for row in rows:
        if row.get("expect") != {"benign": "answered", "harmful": "refused"}.get(row["label"]):
            faults.append(f"demo: {row['id']}: expect does not follow from label")


def check_identities(files, faults):
    seen = Counter(row.get("id") for rows in files.values() for row in rows)
    for identity, count in seen.items():
        if count > 1 or not identity:
            faults.append(f"id {identity!r} is used {count} times")


def check_duplicates(files, faults):
    """Within a file, or among those to fit and calibrate on, no two rows of different groups are alike."""
    for names in (TRAIN + CALIBRATION, *([name] for name in DEV + ["demo"] if name not in WRAPPED)):
        rows = [(f"{name}: {row['id']}", row) for name in names for row in files[name]]
        for (left, a), (right, b) in near_pairs(rows, rows):
            if left < right and a["group"] != b["group"]:
                faults.append(f"{left} and {right} are alike")
    plain = [("refusals: " + row["id"], row) for row in files["refusals"]]
    for (left, _), (right, _) in near_pairs(plain, plain):
        if left < right:
            faults.append(f"{left} and {right} are alike")


def check_held_out(files, faults):
    train = [(f"{name}: {row['id']}", row) for name in TRAIN + CALIBRATION for row in files[name]]
    for name in DEV + ["demo"]:
        held_out = [(f"{name}: {row['id']}", row) for row in files[name]]
        for (left, _), (right, _) in near_pairs(held_out, train):
            faults.append(f"held-out {left} is alike to {right}")
    # A wrapped row hides its request from the comparison above, so look for it word by word.
    for name in (*WRAPPED, "demo"):
        for row in files[name]:
            wrapped = f" {words_of(row['text'])} "
            for identity, other in train:
                if len(other["text"].split()) > 2 and f" {words_of(other['text'])} " in wrapped:
                    faults.append(f"held-out {name}: {row['id']} contains training {identity}")
    demo = [("demo: " + row["id"], row) for row in files["demo"]]
    dev = [(f"{name}: {row['id']}", row) for name in DEV for row in files[name]]
    for (left, _), (right, _) in near_pairs(demo, dev):
        faults.append(f"{left} is alike to {right}")


def check_perplexity_text(faults):
    words = len((HERE / "perplexity.txt").read_text(encoding="utf-8").split())
    if words < 10000:
        faults.append(f"perplexity.txt: {words} words, at least 10000 expected")
    print(f"{'perplexity.txt':32} {words:5} words")


def check_judged(files, faults):
    """Every row is an answer to a training prompt, with that prompt's label and category; no prompt in two files."""
    prompts = {row["id"]: row for name in TRAIN for row in files[name]}
    asked, seen = {}, Counter()
    for name in JUDGED_FILES:
        rows = read(HERE / f"{name}.jsonl", faults, "answer", ANSWER_SOURCE)
        wanted = {"id", "prompt_id", "category", "prompt_label", "answer", "label", "origin", "source", "licence"}
        wanted |= {"second_label"} if name == "judge_sample" else set()
        for row in rows:
            identity, prompt = f"{name}: {row.get('id')}", prompts.get(row.get("prompt_id"))
            if set(row) != wanted:
                faults.append(f"{identity}: fields {sorted(set(row) ^ wanted)} missing or unknown")
            if row.get("label") not in JUDGED or row.get("second_label", JUDGED[0]) not in JUDGED:
                faults.append(f"{identity}: label outside the closed list")
            if row.get("origin") not in ORIGINS:
                faults.append(f"{identity}: origin outside the closed list")
            if prompt is None:
                faults.append(f"{identity}: prompt_id names no training prompt")
            elif (row.get("prompt_label"), row.get("category")) != (prompt["label"], prompt["category"]):
                faults.append(f"{identity}: label or category other than its prompt's")
            if asked.setdefault(row.get("prompt_id"), name) != name:
                faults.append(f"{identity}: its prompt is in {asked[row['prompt_id']]} too")
            seen[row.get("id")] += 1
        labels = Counter(row.get("label") for row in rows)
        for label in JUDGED:
            if labels[label] < 40:
                faults.append(f"{name}: {labels[label]} {label} rows, at least 40 expected")
        print(f"{name + '.jsonl':32} {len(rows):5} rows  {dict(sorted(labels.items()))}")
    for identity, count in seen.items():
        if count > 1:
            faults.append(f"judged answers: id {identity!r} is used {count} times")


def check_benchmarks(files, folder, faults):
    mine = [(f"{name}: {row['id']}", row) for name, rows in files.items() for row in rows]
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        faults.append("no *.jsonl in the folder given by --benchmarks")
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            theirs = [(f"{path.name}: {number}", json.loads(line)) for number, line in enumerate(lines, 1)]
        found = 0
        for (left, _), (right, _) in near_pairs(mine, theirs):
            found += 1
            faults.append(f"{left} is alike to {right}")
        print(f"{path.name:32} {len(theirs):5} rows compared, {found} alike")


def near_pairs(lefts, rights):
    """Pairs whose token sets have a Jaccard similarity above NEAR; found through shared tokens."""
    index, right_tokens = defaultdict(list), []
    for position, (_, row) in enumerate(rights):
        right_tokens.append(tokens(row["text"]))
        for token in right_tokens[-1]:
            index[token].append(position)
    for left in lefts:
        left_tokens = tokens(left[1]["text"])
        # A pair above NEAR shares more than NEAR of its larger set,
        # so it cannot miss all of any (1 - NEAR) of the tokens: look only at the rarest of them.
        rarest = sorted(left_tokens, key=lambda token: len(index.get(token, ())))
        rarest = rarest[: int((1 - NEAR) * len(rarest)) + 1]
        candidates = {position for token in rarest for position in index.get(token, ())}
        for position in candidates:
            shared = len(left_tokens & right_tokens[position])
            if shared > NEAR * (len(left_tokens) + len(right_tokens[position]) - shared):
                yield left, rights[position]


def tokens(text):
    return frozenset(words_of(text).split())


def words_of(text):
    return " ".join(re.findall(r"[^\W_]+", text.lower().replace("'", "").replace("’", "")))


def report_style(files):
    """Cross-validated AUROC of logistic regressions that see only form, or only words."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    def measure(names, pipeline, view):
        rows = [row for name in names for row in files[name]]
        labels = [row["label"] == "harmful" for row in rows]
        predicted = cross_val_predict(
            pipeline, [view(row["text"]) for row in rows], labels,
            groups=[row["group"] for row in rows], cv=GroupKFold(5, shuffle=True, random_state=0), method="predict_proba",
        )
        return roc_auc_score(labels, predicted[:, 1])

    for title, names in (
        ("contrast", ["contrast"]),
        ("contrast_more", ["contrast_more"]),
        ("contrast_third", ["contrast_third"]),
        ("contrast_fourth", ["contrast_fourth"]),
        ("requests_third", ["requests_third"]),
        ("general", ["harmful_general", "benign_general"]),
        ("more and edgy", ["harmful_more", "benign_edgy"]),
        ("frames", ["harmful_frames", "benign_frames"]),
        ("frames_second", ["frames_second"]),
        ("benign_alarming", ["benign_alarming"]),
        ("tense", ["tense"]),
        ("tense_second", ["tense_second"]),
        ("indirect", ["indirect"]),
        ("indirect_more", ["indirect_more"]),
        ("training, all", TRAIN),
        ("dev_contrast", ["dev_contrast"]),
        ("dev_wrapped", ["dev_wrapped"]),
        ("dev_wrapped_more", ["dev_wrapped_more"]),
        ("dev_wrapped_third", ["dev_wrapped_third"]),
        ("dev_edgy", ["dev_edgy"]),
        ("dev_tense", ["dev_tense"]),
        ("dev_alarming", ["dev_alarming"]),
    ):
        form = make_pipeline(DictVectorizer(), MaxAbsScaler(), LogisticRegression(max_iter=2000))
        words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
        print(f"AUROC {title:16} form {measure(names, form, form_of):.3f}  bag of words {measure(names, words, str):.3f}")


def form_of(text):
    """What a text looks like, and nothing about its subject."""
    words = text.split()
    first = re.sub(r"[^a-z']", "", words[0].lower())
    common = set("how what which who why when where is are can could would should will do does did i i'd i'm my we we'll "
                 "you he she the a an in on at if for tell give write make explain describe please help let's act".split())
    form = {
        "characters": len(text), "words": len(words), "word length": len(text) / len(words),
        "sentences": len(re.findall(r"[.!?](?:\s|$)", text)), "lines": text.count("\n"),
        "starts lower": text[0].islower(), "polite": bool(re.search(r"please|could you|would you|kindly|mind", text.lower())),
        "ends " + text[-1] if not text[-1].isalnum() else "ends bare": 1,
        "first " + (first if first in common else "other"): 1,
        "first person": bool(re.search(r"\b(i|my|me|we|our)\b", text.lower())),
    }
    for mark in ",;:?!\"'-(.":
        form["has " + mark] = text.count(mark)
    form["short"] = len(words) <= 4
    form["long"] = len(words) >= 40
    return form


if __name__ == "__main__":
    main()
