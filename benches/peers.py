#!/usr/bin/env python3
"""Measures Inwit, llama.cpp and mistral.rs side by side on one GGUF file and writes one table.

    python3 benches/peers.py --model FILE.gguf --inwit target/release/inwit --out peers.md

llama.cpp (its Python package) and mistral.rs (its crate, through mistral/ beside this file) are built
for this processor under --work; each engine runs in processes of its own.
All read the same prose: one prompt of 512 tokens (prefill), then 1, 4, 8 and 16 streams with
prompts of 64 tokens that write 128 tokens each (decode). Both peers run the file as it comes and
the same weights as Q8_0, mistral.rs also as F32, whose products take another path; llama.cpp in
every setting of SETTINGS. Of each engine the best setting counts, by the median of its rounds. The
rounds of all engines take turns, so that a machine that slows down slows all of them. An engine
that cannot be built or fails is left out, and then the exit status is 1.

It does not judge the numbers: the table and the raw results (--json) are what it leaves.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STREAMS = [1, 4, 8, 16]
PROMPT, CONTEXT, ANSWER = 512, 64, 128
MEMORY_STREAMS, MEMORY_TOKENS = 16, 1000
# What llama.cpp lets a user choose here and that made a difference on a CPU; keys and values stay f16.
# Its memory is measured at the last of them.
SETTINGS = [
    {"n_ubatch": n_ubatch, "flash_attn": flash_attn, "kv_unified": kv_unified}
    for n_ubatch, flash_attn, kv_unified in itertools.product((128, 512), (False, True), (False, True))
]
# For --cmake-args: everything that a processor with AVX-512 has, but AMX. A native build would add
# its own flags after ours.
NO_AMX = "-DGGML_NATIVE=OFF" + "".join(
    f" -DGGML_{name}=ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AVX_VNNI")
)
ENGINES = ("inwit", "llama", "mistral")
PACKAGES = ["llama-cpp-python==0.3.36", "numpy"]
# llama.cpp's name of a file type, and its number.
FILE_TYPES = {"q8_0": 7, "f32": 0}
# What an engine that cannot be had or run ends in: the others are measured without it.
FAILURES = (subprocess.CalledProcessError, RuntimeError, OSError, ValueError)


def main():
    options = arguments()
    if options.child:
        return print(json.dumps(llama(options)))
    options.work.mkdir(parents=True, exist_ok=True)
    for path in filter(None, (options.out, options.json)):
        path.touch()
    engines, failed = engines_of(options)
    results = {name: [] for name in engines}
    for turn in range(options.rounds):
        for name, run in engines.items():
            print(f"round {turn + 1}: {name}", file=sys.stderr)
            try:
                results[name].append(run())
            except FAILURES as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
                failed.append(name)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    results = {name: rounds for name, rounds in results.items() if len(rounds) == options.rounds}
    table = report(options, {name: best(rounds) for name, rounds in results.items()})
    (options.out.write_text if options.out else print)(table)
    sys.exit(1 if failed else 0)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--inwit", type=Path, help="the program; without it only the peers run")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which of them to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cmake-args",
        default="-DGGML_NATIVE=ON",
        help="how llama.cpp is built; `no-amx` takes AVX-512 without AMX, whose kernels crash on some virtual machines",
    )
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/inwit-peers")
    parser.add_argument("--out", type=Path, help="the table, in Markdown")
    parser.add_argument("--json", type=Path, help="every result of every round")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that all works")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.engines.split(",") if name not in ENGINES]
    if unknown:
        parser.error(f"--engines {unknown[0]}: known are {', '.join(ENGINES)}")
    if options.inwit is None and options.engines == "inwit":
        parser.error("--engines inwit needs --inwit")
    for flag, file in (("--model", options.model), ("--inwit", options.inwit)):
        if file is not None and not file.is_file():
            parser.error(f"{flag} {file}: there is no such file")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be above 0")
    if options.quick:
        global STREAMS, PROMPT, CONTEXT, ANSWER, SETTINGS, MEMORY_STREAMS, MEMORY_TOKENS
        STREAMS, PROMPT, CONTEXT, ANSWER, SETTINGS = [1, 4], 48, 16, 16, SETTINGS[:2]
        # Those of `inwit bench --quick`, which has no flags for them.
        MEMORY_STREAMS, MEMORY_TOKENS = 2, 48
        options.rounds = 1
    return options


def engines_of(options):
    wanted = options.engines.split(",")
    engines, failed = {}, []
    if options.inwit and "inwit" in wanted:
        engines["Inwit"] = lambda: inwit(options)
    for name, build in (("llama", llama_engines), ("mistral", mistral_engines)):
        if name in wanted:
            try:
                engines |= build(options)
            except FAILURES as error:
                print(f"{name}: left out, it could not be built: {error}", file=sys.stderr)
                failed.append(name)
    return engines, failed


def llama_engines(options):
    python = environment(options)
    q8_0 = requantised(options, python, "q8_0")
    return {
        "llama.cpp, as it comes": lambda: in_child(options, python, options.model),
        "llama.cpp, Q8_0": lambda: in_child(options, python, q8_0),
    }


def mistral_engines(options):
    program, python = mistral_program(options), environment(options)
    q8_0, f32 = (requantised(options, python, name) for name in ("q8_0", "f32"))
    return {
        "mistral.rs, as it comes": lambda: mistral(options, program, options.model),
        "mistral.rs, Q8_0": lambda: mistral(options, program, q8_0),
        "mistral.rs, F32": lambda: mistral(options, program, f32),
    }


# --- the engines, from outside ---


def environment(options):
    """A virtual environment with llama.cpp's package, made once for each way to build it."""
    folder = options.work / "llama"
    python, built = folder / "bin/python", folder / "built"
    cmake_args = NO_AMX if options.cmake_args == "no-amx" else options.cmake_args
    how = " ".join([cmake_args, *PACKAGES])
    if not built.exists() or built.read_text() != how:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        flags = {**os.environ, "CMAKE_ARGS": cmake_args}
        # A wheel would be built for some other processor.
        install = [python, "-m", "pip", "install", "--quiet", *PACKAGES, "--no-binary", "llama-cpp-python"]
        subprocess.run(install, check=True, env=flags)
        built.write_text(how)
    return python


def requantised(options, python, name):
    """The same weights in another format; Q8_0 is the peers' best on many processors."""
    digest = hashlib.sha256(options.model.read_bytes()).hexdigest()[:12]
    out = options.work / f"{digest}.{name}.gguf"
    if not out.exists():
        code = (
            "import sys, llama_cpp as l\n"
            "params = l.llama_model_quantize_default_params()\n"
            "params.ftype, params.allow_requantize = int(sys.argv[3]), True\n"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))"
        )
        partial = out.with_suffix(".partial")
        command = [python, "-c", code, options.model, partial, str(FILE_TYPES[name])]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        partial.rename(out)
    return out


def in_child(options, python, model):
    def run(*flags):
        command = [python, __file__, "--child", "--model", model, "--threads", str(options.threads), *flags]
        return answer_of(options, command + (["--quick"] if options.quick else []))

    # A peak remembers everything before it, so memory has a process of its own.
    return {**run(), "peak_rss": run("--memory")["peak_rss"]}


def answer_of(options, command):
    """The JSON that a process prints last."""
    # Any pool that an engine makes must see the same limit.
    limits = {key: str(options.threads) for key in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    # The last line of what it says is to be the reason.
    limits["RUST_BACKTRACE"] = "0"
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limits})
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["said nothing"])[-1]
        raise RuntimeError(f"it ended with {ended.returncode}: {last}")
    lines = ended.stdout.splitlines()
    if not lines:
        raise RuntimeError("it ended without a result")
    return json.loads(lines[-1])


def mistral_program(options):
    """The program in mistral/, built for this processor."""
    target = options.work / "mistral"
    command = ["cargo", "build", "--release", "--quiet", "--manifest-path", ROOT / "benches/mistral/Cargo.toml"]
    flags = {"RUSTFLAGS": "-C target-cpu=native", "CARGO_TARGET_DIR": str(target)}
    subprocess.run(command, check=True, env={**os.environ, **flags})
    return target / "release/inwit-peer-mistral"


def mistral(options, program, model):
    prose = options.work / "prose.txt"
    prose.write_text(the_prose())

    def run(prompt, context, answer, streams):
        sizes = [str(prompt), str(context), str(answer), ",".join(map(str, streams))]
        return answer_of(options, [program, model.resolve(), prose, *sizes])

    answer = MEMORY_TOKENS // 10
    memory = run(8, MEMORY_TOKENS - answer, answer, [MEMORY_STREAMS])
    speed = run(PROMPT, CONTEXT, ANSWER, STREAMS)
    setting = {"setting": {}, "prefill": speed["prefill"], "decode": speed["decode"]}
    return {"version": "mistralrs 0.8.1, native build", "settings": [setting], "peak_rss": memory["peak_rss"]}


def the_prose():
    prose = re.search(r'const PROSE: &str = "(.*?)";', (ROOT / "src/lab/workload.rs").read_text(), re.DOTALL)
    return prose.group(1).replace("\\\n", "")


def inwit(options):
    file = options.work / "inwit.json"

    def run(parts, *flags):
        command = [options.inwit, "bench", "--model", options.model, "--threads", str(options.threads)]
        command += ["--parts", parts, "--json", file, *flags]
        command += ["--quick"] if options.quick else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())

    memory = run("memory")["memory"]
    sizes = {"--prompt-tokens": PROMPT, "--context-tokens": CONTEXT, "--answer-tokens": ANSWER, "--rounds": 1}
    streams = ["--streams", ",".join(map(str, STREAMS))]
    report = run("throughput", *streams, *(str(word) for size in sizes.items() for word in size))
    rows = {(row["name"], row["streams"]): row["tokens_per_second"] for row in report["rows"] if row["monitor"] == "off"}
    if None in rows.values():
        raise RuntimeError("its answers ended before all streams were writing")
    settings = report["settings"]
    result = {"prefill": rows["prefill", 1], "decode": {str(n): rows["decode", n] for n in STREAMS}}
    return {
        "version": f"commit {report['commit']}",
        "machine": report["machine"],
        "peak_rss": memory["peak_rss_bytes"],
        "settings": [{"setting": {"weights": settings["weight_format"], "kv": settings["kv_type"]}, **result}],
    }


# --- the engines, inside a process of their own ---


def rotated(tokens, stream, count):
    """As `inwit bench` begins each stream elsewhere in the prose."""
    first = stream * 37 % len(tokens)
    return list(itertools.islice(itertools.cycle(tokens), first, first + count))


def llama(options):
    import llama_cpp as l
    import numpy

    # Python and numpy are not llama.cpp's; its libraries are in it as well, some MiB.
    interpreter = resident("VmRSS")
    prose = the_prose()
    l.llama_backend_init()
    silent = l.llama_log_callback(lambda *_: None)
    l.llama_log_set(silent, None)
    model = l.llama_model_load_from_file(str(options.model).encode(), l.llama_model_default_params())
    if not model:
        raise SystemExit(f"{options.model}: llama.cpp cannot load it")
    vocab = l.llama_model_get_vocab(model)
    size = l.llama_vocab_n_tokens(vocab)
    buffer = (l.llama_token * 4096)()
    count = l.llama_tokenize(vocab, prose.encode(), len(prose.encode()), buffer, 4096, False, False)
    tokens = list(buffer[:count])

    def context(setting, streams, positions):
        params = l.llama_context_default_params()
        # Every sequence has room for its own, whichever way the cache is laid out.
        params.n_ctx, params.n_seq_max = streams * (-(-positions // 256) * 256), streams
        params.n_batch = max(2048, streams)
        params.n_ubatch = setting["n_ubatch"]
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = int(setting["flash_attn"])
        params.kv_unified = setting["kv_unified"]
        made = l.llama_init_from_model(model, params)
        if not made:
            raise SystemExit(f"llama.cpp refuses {setting}")
        return made

    def decode(made, rows):
        """`rows`: (token, position, sequence, whether its logits are wanted)."""
        batch = l.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if l.llama_decode(made, batch) != 0:
            raise SystemExit("llama.cpp could not decode a batch")
        l.llama_batch_free(batch)

    def greedy(made, row):
        logits = l.llama_get_logits_ith(made, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(size,)).argmax())

    def read(made, sequence, prompt):
        decode(made, [(t, i, sequence, i + 1 == len(prompt)) for i, t in enumerate(prompt)])
        return greedy(made, len(prompt) - 1)

    def prefill(setting):
        made = context(setting, 1, PROMPT + 1)
        times = []
        for turn in range(3):
            l.llama_memory_clear(l.llama_get_memory(made), True)
            started = time.perf_counter()
            read(made, 0, rotated(tokens, turn, PROMPT))
            times.append(time.perf_counter() - started)
        l.llama_free(made)
        return PROMPT / statistics.median(times)

    def write(setting, streams, prompt, answer):
        made = context(setting, streams, prompt + answer)
        newest = [read(made, s, rotated(tokens, s, prompt)) for s in range(streams)]
        started = time.perf_counter()
        for position in range(prompt, prompt + answer - 1):
            decode(made, [(token, position, s, True) for s, token in enumerate(newest)])
            newest = [greedy(made, row) for row in range(streams)]
        taken = time.perf_counter() - started
        l.llama_free(made)
        return streams * (answer - 1) / taken

    if options.memory:
        answer = MEMORY_TOKENS // 10
        write(SETTINGS[-1], MEMORY_STREAMS, MEMORY_TOKENS - answer, answer)
        return {"peak_rss": resident("VmHWM") - interpreter}
    measured = [
        {
            "setting": setting,
            "prefill": prefill(setting),
            "decode": {str(n): write(setting, n, CONTEXT, ANSWER) for n in STREAMS},
        }
        for setting in SETTINGS
    ]
    info = l.llama_print_system_info().decode().strip()
    return {"version": f"llama-cpp-python {l.__version__} ({info}), KV f16", "settings": measured}


def resident(what):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status).group(1)) * 1024


# --- the table ---


def best(rounds):
    """Of each measure the best setting's median over the rounds, and which setting that was."""
    settings = range(len(rounds[0]["settings"]))

    def highest(value):
        medians = {i: statistics.median(value(one["settings"][i]) for one in rounds) for i in settings}
        index = max(medians, key=medians.get)
        return medians[index], rounds[0]["settings"][index]["setting"]

    cells = {"prefill": highest(lambda one: one["prefill"])}
    for streams in map(str, STREAMS):
        cells[streams] = highest(lambda one, streams=streams: one["decode"][streams])
    return {
        "version": rounds[0]["version"],
        "cells": cells,
        "peak_rss": statistics.median(one["peak_rss"] for one in rounds),
    }


def report(options, engines):
    columns = ["prefill", *map(str, STREAMS)]
    lines = [
        f"Tokens per second on `{options.model.name}`, {options.threads} threads, {machine()}, commit {commit()}.",
        f"Prefill reads {PROMPT} tokens; each stream of a decode has {CONTEXT} and writes {ANSWER}.",
        f"Medians of {options.rounds} round{'s' * (options.rounds > 1)} in turn, of each engine's best setting.",
        f"Memory is the peak (VmHWM) with {MEMORY_STREAMS} streams of {MEMORY_TOKENS} tokens, "
        "llama.cpp's without the Python that calls it.",
        "",
        "| engine | prefill | " + " | ".join(f"{n} stream{'s' * (n > 1)}" for n in STREAMS) + " | memory MiB |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for name, engine in engines.items():
        cells = [f"{engine['cells'][column][0]:.0f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {engine['peak_rss'] / 2**20:.0f} |")
    lines += ["", "| engine | version | best settings |", "|---|---|---|"]
    for name, engine in engines.items():
        chosen = "; ".join(f"{column}: {flags(engine['cells'][column][1])}" for column in columns)
        lines.append(f"| {name} | {engine['version'].replace('|', '/')} | {chosen} |")
    return "\n".join(lines) + "\n"


def flags(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "nothing to choose"


def machine():
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{found.group(1) if found else 'unknown processor'}, {os.cpu_count()} cores"


def commit():
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
