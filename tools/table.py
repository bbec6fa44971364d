"""`make results`: every row of the summary table, measured by one protocol.

Each format of TABLE in tools/formats.py is measured in its own process. Its quality: perplexity and
KL to the float32 model, for all formats on the same held-out tokens, sequence by sequence, so that
differences can be paired. Its cost: bits per weight of the linear layers and the size of the model,
from the bytes held; the time and peak memory of quantizing; time per token at batch size 1.

A row is written to data/results.json ("table/...") as soon as it is measured, so an interrupted run
can be resumed. The STUDIES of tools/formats.py ("study/...") are measured in the same way, but only
their quality, and some only on the first sequences. A row is current as long as its options, the
tokens, the versions of the libraries and the code that it ran are the same; comments, docstrings
and error messages may change.

    python -m tools.table                           rows that are missing or out of date
    python -m tools.table --only cost               only the costs, on a quiet machine
    python -m tools.table "NF4" "FP32" --again      these rows, even if they are current
"""

import argparse
import cProfile
import hashlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from tqdm import tqdm

from chapter13 import corpus, evaluate, models, results
from chapter13.fetch import download
from tools import bench_models, formats, markdown, measure, peers, syntax
from tools.formats import FORMATS, MAKERS, MODEL, STUDIES, TABLE, QuantizedModel

TARGET = "make results"
TOKENS = 16  # timed
ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "table"
PARTS = ("cost", "quality")
PACKAGE = ROOT / "chapter13"
# glibc keeps the memory of a batch's logits for the next batch, instead of asking for it again
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
LOADING = ("models.py", "corpus.py", "wiki.py")  # `inputs` compares what they load
KEYS = {kind.name: f"table/{kind.name}" for kind in TABLE}
KEYS |= {kind.name: f"study/{kind.name}" for kind in STUDIES}
PARTS_OF = dict.fromkeys(KEYS, PARTS) | {kind.name: ("quality",) for kind in STUDIES}
SECTION = markdown.section("table", TARGET)
RESULT = markdown.section("result", TARGET, "README.md")


def keys():
    """The records that this program writes."""
    return set(KEYS.values())


# --- one row, in a process of its own --------------------------------------------------------


def reference(tokenizer, sequences):
    """The evaluation tokens, and the file of the float32 model's predictions, made if missing."""
    tokens = corpus.evaluation_tokens(tokenizer, sequences)
    name = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
    path = WORK / f"reference-{name}"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        evaluate.cache_logits(models.load(MODEL, device="cpu")[0], tokens, path)
    return tokens, path


def measure_part(row, part):
    """The measurement of one row's cost or quality, and the files of the code that ran."""
    # only calls of Python functions: they are enough to know the files
    profile = cProfile.Profile(builtins=False)
    model, tokenizer = models.load(MODEL, device="cpu")
    made = profile.runcall(formats.make, row, model, tokenizer)
    if part == "cost":
        measured = cost(made)
    else:
        tokens, path = reference(tokenizer, row.sequences)
        scores = profile.runcall(
            evaluate.perplexity_and_kl, made.model, path, tokens, progress=False
        )
        measured = {
            name: recorded(score) for name, score in zip(("perplexity", "kl"), scores, strict=True)
        }
    # recorded in this process: another one may use another number of threads
    where = results.environment(("transformers", *row.packages))
    return measured | {"peer": made.versions, "files": files_of(profile), "environment": where}


def recorded(score):
    """A score as data/results.json has it."""
    return {
        "value": round(score.value, 5),
        "interval": [round(end, 5) for end in score.interval],
        "losses": [round(loss, 6) for loss in score.losses.tolist()],
    }


def cost(made: QuantizedModel):
    measured = {
        "bits_per_weight": round(made.bits_per_weight, 4),
        "size_mb": round(made.size_mb, 1),
        "quantize_s": round(made.seconds, 2),
        "quantize_peak_mb": round(made.peak_mb),
        "tokens_per_s": None,
        "run_peak_mb": None,
    }
    if made.runs:
        with measure.memory() as used:
            milliseconds = bench_models.ms_per_token(made.model, TOKENS)
        measured["tokens_per_s"] = round(1e3 / milliseconds, 1)
        measured["run_peak_mb"] = round(used.peak / 1e6)
    return measured


# --- what is current, and what is out of date ------------------------------------------------


def files_of(profile):
    """The files of the package whose functions were called."""
    called = {Path(entry.code.co_filename) for entry in profile.getstats()}
    ours = [path for path in called if PACKAGE in path.parents and path.name not in LOADING]
    return sorted(path.relative_to(ROOT).as_posix() for path in ours)


@cache
def inputs():
    """A digest of the model's manifest, the default calibration and the evaluation tokens."""
    tokenizer = models.load(MODEL, device="cpu")[1]
    texts = (corpus.calibration_tokens(tokenizer), corpus.evaluation_tokens(tokenizer))
    digest = hashlib.sha256((download.require(MODEL) / "manifest.json").read_bytes())
    for tokens in texts:
        digest.update(tokens.numpy().tobytes())
    return digest.hexdigest()


def fingerprint(row, part, files):
    """A digest of all that a part of a row depends on; "" if a file of its code is gone."""
    try:
        sources = [syntax.code(ROOT / file) for file in files]
    except FileNotFoundError:
        return ""
    packages = ("torch", "numpy", "transformers", *row.packages)
    depends = [
        row.maker,
        row.options,
        inspect.getsource(MAKERS[row.maker]),
        sources,
        [results.version_of(name) for name in packages],
        inputs(),
        TOKENS if part == "cost" else row.sequences,
    ]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]


def is_current(records, row, part):
    """Whether the record of this part of a row is of the same code and inputs as today's."""
    record = records.get(KEYS[row.name], {})
    found = record.get(part)
    if found is None or record["family"] != row.family:
        return False
    return found["fingerprint"] == fingerprint(row, part, found["files"])


def store(row, measured):
    """Puts the new parts into the row's record, each with its machine and date."""
    key = KEYS[row.name]
    kept = results.load().get(key, {})
    kept.pop("environment", None)
    packages = ("transformers", *row.packages)
    for part, values in measured.items():
        kept[part] = values | {"fingerprint": fingerprint(row, part, values["files"])}
    kept["family"] = row.family
    results.record(key, kept, TARGET, packages)


# --- all rows --------------------------------------------------------------------------------


def measure_all(rows, parts, again):
    """Measures the rows that are not current; returns the names of those without a result."""
    records = results.load()
    for key in records:
        if key.startswith(("table/", "study/")) and key not in keys():
            results.forget(key)
    failed = set()
    for part in parts:
        asked = [row for row in rows if part in PARTS_OF[row.name]]
        todo = [row for row in asked if again or not is_current(records, row, part)]
        print(f"{part}: {len(asked) - len(todo)} of {len(asked)} rows are current")
        # Times are measured one by one. Predictions are faster with several processes of one thread
        # each than with one process whose threads wait for each other.
        jobs = (os.cpu_count() or 1) if part == "quality" else 1
        if part == "quality":
            for sequences in {row.sequences for row in todo}:
                reference(models.load(MODEL, device="cpu")[1], sequences)
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc=part, unit="row") as bar:
            rows_of = {pool.submit(run, part, jobs > 1, row): row for row in todo}
            try:
                for future in as_completed(rows_of):
                    row, done = rows_of[future], future.result()
                    bar.update()
                    if isinstance(done, str):
                        bar.write(f"{row.name} was not measured: {done}")
                        failed.add(row.name)
                    else:
                        store(row, {part: done})
                        bar.write(line(row.name, part, done))
            except BaseException:  # KeyboardInterrupt too: start no other row
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return sorted(failed)


def run(part, one_thread, row):
    """One part of a row in a separate process: the measurement, or the reason why there is none."""
    if row.maker == "peer":
        try:
            peers.python(row.options["library"])
        except peers.NoPeer as error:
            return str(error)
    environment = os.environ | (ONE_THREAD if one_thread else {})
    command = [sys.executable, "-m", "tools.table", "--measure", row.name, part]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def line(name, part, measured):
    if part == "cost":
        speed = measured["tokens_per_s"]
        text = f"{measured['bits_per_weight']:8.3f} bits {measured['size_mb']:8.1f} MB"
        return f"{name:38}{text}" + (f" {speed:8.1f} tokens/s" if speed else "")
    perplexity, kl = (measured[key]["value"] for key in ("perplexity", "kl"))
    return f"{name:38}perplexity {perplexity:9.2f}   KL {kl:.4f}"


# --- the documents ---------------------------------------------------------------------------

IN_README = (
    "BF16",
    "INT8 weights, per channel",
    "AWQ INT4, groups of 64",
    "GPTQ INT4, groups of 64, clip search",
    "NF4, double quantization",
    "GGUF MXFP4",
)
IN_DOCS = (
    "FP32",
    "BF16",
    "INT8 weights, per channel",
    "INT8 dynamic, per tensor",
    "INT8 dynamic, per token",
    "INT8 static, per channel",
    "LLM.int8()",
    "INT4 absmax, groups of 64",
    "INT4 affine, groups of 64",
    "NF4",
    "NF4, double quantization",
    "AWQ INT4, groups of 64",
    "GPTQ INT4, groups of 64",
    "GPTQ INT4, groups of 64, clip search",
    "AutoGPTQ INT4, groups of 64",
    "GPTQModel INT4, groups of 64",
    "GGUF Q4_1",
    "GGUF MXFP4",
    "INT3 affine, groups of 64",
    "GPTQ INT3, groups of 64, clip search",
    "INT2 affine, groups of 16",
)


COLUMNS = ("method", "bits per weight", "perplexity", "KL, nats per token", "95%")


def columns(name, record):
    """A row's COLUMNS in words."""
    quality = record["quality"]
    low, high = quality["kl"]["interval"]
    return (
        name,
        f"{record['cost']['bits_per_weight']:.2f}",
        f"{quality['perplexity']['value']:.2f}",
        f"{quality['kl']['value']:.4f}",
        f"{low:.4f} to {high:.4f}",
    )


def table_section(records):
    """The summary table of docs/measurements.md, from data/results.json."""
    rows = [(name, records[KEYS[name]]) for name in IN_DOCS]
    where = {
        part: "; ".join(sorted({markdown.where(row[part]["environment"]) for _, row in rows}))
        for part in PARTS
    }
    table = [(*COLUMNS, "MB", "tokens/s")]
    for name, row in rows:
        size, speed = row["cost"]["size_mb"], row["cost"]["tokens_per_s"]
        table.append((*columns(name, row), f"{size:.0f}", "" if speed is None else f"{speed:.0f}"))
    words = f"Losses: {where['quality']}. Memory and speed: {where['cost']}."
    return f"{markdown.table(table)}\n\n{words}\n"


def result_section(records):
    """The README's one result, from data/results.json."""
    rows = (columns(name, records[KEYS[name]]) for name in IN_README)
    return f"{markdown.table([COLUMNS, *rows])}\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows; all if not given")
    parser.add_argument("--only", choices=PARTS, help="one part of each row")
    parser.add_argument("--again", action="store_true", help="measure what is current, too")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, part = arguments.measure
        formats.silence_libraries()
        warnings.simplefilter("ignore")
        print(json.dumps(measure_part(FORMATS[name], part)))
        return
    unknown = [name for name in arguments.rows if name not in KEYS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are: {', '.join(KEYS)}")
    rows = [FORMATS[name] for name in arguments.rows or KEYS]
    parts = [arguments.only] if arguments.only else list(PARTS)
    failed = measure_all(rows, parts, arguments.again)
    records = results.load()
    if all(is_current(records, FORMATS[name], part) for name in IN_DOCS for part in PARTS):
        markdown.write(SECTION, table_section(records))
        markdown.write(RESULT, result_section(records))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
