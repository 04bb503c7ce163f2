#!/usr/bin/env python3
"""Checks that the documents name what is there.

    python3 .ci/documents.py                 links, tests, metrics and settings
    python3 .ci/documents.py --binary FILE   commands and flags, by asking the program

Exit status: 0 when all holds, 1 otherwise.
It does not know whether what the documents say of these things is true.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:inwit|cargo run --release --) ((?:probe |lab |eval )?[a-z][a-z-]*)(.*)")


def main():
    arguments = argparse.ArgumentParser(description="Checks that the documents name what is there.")
    arguments.add_argument("--binary", type=Path, help="the program, to check commands and flags")
    arguments = arguments.parse_args()

    faults = []
    if arguments.binary:
        check_commands(arguments.binary, faults)
    else:
        check_links(faults)
        check_tests(faults)
        check_metrics(faults)
        check_settings(faults)
    for fault in faults:
        print("FAULT", fault)
    print("the documents hold" if not faults else f"{len(faults)} faults")
    sys.exit(1 if faults else 0)


def check_links(faults):
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                faults.append(f"{document.name}: there is no {target}")


def check_tests(faults):
    """Every invariant names at least one test, and every test that it names exists."""
    sources = [path.read_text() for folder in ("src", "probes/src", "tests/it") for path in (ROOT / folder).rglob("*.rs")]
    tests = set(re.findall(r"\bfn ([a-z0-9_]+)\(", "\n".join(sources)))
    document = ROOT / "docs/architecture.md"
    for line in document.read_text().splitlines():
        if not line.startswith("**Architecture invariant:**"):
            continue
        _, _, shown = line.partition("Shown by ")
        names = re.findall(r"`([a-z0-9_]+)`", shown)
        if not names:
            faults.append(f"{document.name}: no test is named in: {line[:90]}")
        faults.extend(f"{document.name}: there is no test {name}" for name in names if name not in tests)


def check_metrics(faults):
    """The table of metrics is that of the source."""
    metric = r"inwit_[a-z_]+"
    source = set(re.findall(rf'= "({metric})";', (ROOT / "src/metrics.rs").read_text()))
    table = set(re.findall(rf"^\| `({metric})", (ROOT / "docs/operating.md").read_text(), re.MULTILINE))
    faults.extend(f"operating.md: lacks the metric {name}" for name in sorted(source - table))
    faults.extend(f"operating.md: there is no metric {name}" for name in sorted(table - source))


def check_settings(faults):
    """The table of settings is that of the source, defaults included."""
    source = (ROOT / "src/config.rs").read_text()
    defaults = source[source.index("const DEFAULTS") : source.index("const DURATION_UNITS")]
    known = dict(re.findall(r'\("([a-z_]+)", "([^"]*)"\)', defaults))
    rows = re.findall(r"^\| `--([a-z-]+)` \| `([^`]*)` \|", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    table = {name.replace("-", "_"): default for name, default in rows}
    for name in sorted(known.keys() | table.keys()):
        if known.get(name) != table.get(name):
            faults.append(f"operating.md: {name} is {table.get(name)}, in the source {known.get(name)}")


def check_commands(binary, faults):
    helps = {}

    def help_of(command):
        if command not in helps:
            asked = subprocess.run([binary, *command.split(), "--help"], capture_output=True, text=True)
            helps[command] = asked.stdout if asked.returncode == 0 else None
        return helps[command]

    named = set()
    for document in DOCUMENTS:
        for command, rest in commands_of(document):
            text = help_of(command)
            named.add(command)
            if text is None:
                faults.append(f"{document.name}: there is no command inwit {command}")
                continue
            for flag in re.findall(r"(?:^|\s)(--[a-z][a-z-]*)", rest):
                if not re.search(rf"(?<![a-z-]){flag}(?![a-z-])", text):
                    faults.append(f"{document.name}: inwit {command} has no {flag}")
    print(f"{len(named)} commands are named: {', '.join(sorted(named))}")


def commands_of(document):
    """The commands in a document's shell blocks and sentences, each with what follows it."""
    text = document.read_text()
    yield from re.findall(r"`inwit ((?:probe |lab |eval )?[a-z][a-z-]*)([^`]*)`", text)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in (body for language, body in blocks if language == "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            found = COMMAND.match(line.split(" #")[0])
            if found:
                yield found.groups()


if __name__ == "__main__":
    main()
