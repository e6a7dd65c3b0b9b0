"""The embedded catalogue, several seeds: are texts true and for their user, messages understood, batches whole?

Then films with real posters, where those lie beside the checkout: the same path, with ten texts a task in its report.

    make bench-writing                                  # five seeds, 100,000 rows, real posters
    python -m benchmarks.writing --seeds 3 --parts texts  # one more seed

Every stage is an artefact under runs/bench-writing, so a run that stops goes on where it stopped. What was measured is
kept in benchmarks/results/writing.npz, seed by seed: what one call does not measure stays as an earlier one left it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.kept import Kept
from benchmarks.real import DATA, recipe_of
from benchmarks.results import RESULTS, ROOT, Check, finish, over_seeds
from genrec.chat_quality import SETS, measure_chat
from genrec.chat_replies import FITS, STRANGERS
from genrec.config import load_recipe
from genrec.pipeline import Run
from genrec.reader import CANDIDATES
from genrec.serving import torch_engine
from genrec.serving.batch import Wish, describe_pairs
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.synthetic import SIZES
from genrec.text_quality import EXAMPLES, measure
from genrec.whole_path import whole_path
from genrec.writer import PICTURE_ONLY, TASKS

log = logging.getLogger("benchmarks.writing")
WRITING = ROOT / "training" / "recipes" / "writing.yaml"
SEEDS = (0, 1, 2, 3, 4)
PARTS = ("texts", "batch", "posters")
ITEMS_PER_USER = 10
SPEED_ROWS = 2000
MEMORY_ROWS = 1000
KILLS = 10
MAX_TOKENS = 64
FILMS = "movielens-1m-posters"
FILM_ROWS = 1000
FILM_TRAINING: dict[str, Any] = {
    "epochs": 4,
    "batch_rows": 1,
    "pack_tokens": 1024,
    "mixture": {"describe": 1.5, "explain": 1.0, "headline": 0.5, "id_text": 0.05, "text_id": 0.05, "chat": 1.0},
}


def trained(seed: int, runs: Path) -> Run:
    """The writing recipe up to its export."""
    recipe = load_recipe(WRITING)
    run = Run.create(recipe.model_copy(update={"name": f"s{seed}", "seed": seed}), runs)
    run.through_training()
    run.export()
    return run


def films(runs: Path) -> Run:
    """The writing recipe's tasks on films, 1,500 of the users, with their posters' features."""
    writing = load_recipe(WRITING)
    recipe = recipe_of(
        FILMS,
        name="posters",
        data={"max_history": 20},
        backbone=writing.backbone.model_dump(),
        adapter=writing.adapter.model_dump(),
        align=writing.align.model_dump() | {"looks": False},
        finetune={**writing.finetune.model_dump(), **FILM_TRAINING},
        sequence={"epochs": 0},
        evaluate={"baselines": ["popularity", "itemknn"]},
    )
    return Run.create(recipe, runs)


def values_of(run: Run, task: str) -> dict[str, np.ndarray]:
    """What `measure` found for every text: metric -> float64 [n] without texts that say nothing about it."""
    with np.load(run.folder / "texts" / task / "values.npz") as kept:
        return {name: kept[name][~np.isnan(kept[name])] for name in kept.files}


def write_pairs(run: Run, path: Path, rows: int) -> Path:
    """Test users with `ITEMS_PER_USER` random items each, in random order within a row group."""
    rng = np.random.default_rng(0)
    ids, cases = run.space.catalogue.item_ids, run.space.split.test
    schema = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "history": pa.list_(pa.string())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            at = start + rng.permutation(min(10_000, rows - start))
            users = at // ITEMS_PER_USER % len(cases.targets)
            columns = {
                "user_id": [run.space.user_ids[cases.users[u]] for u in users],
                "item_id": [ids[row] for row in rng.integers(len(ids), size=len(at))],
                "history": [[ids[row] for row in cases.histories[u]] for u in users],
            }
            order = np.argsort(at, kind="stable")  # a user's rows are neighbours, as a shop's job writes them
            writer.write_table(pa.table(columns, schema=schema).take(order))
    return path


def batch_process(export: Path, pairs: Path, out: Path) -> subprocess.Popen[bytes]:
    """genrec describe, as one types it."""
    command = [sys.executable, "-m", "genrec.cli", "describe", str(export), "--pairs", str(pairs), "--out", str(out)]
    command += ["--engine", "torch", "--max-tokens", str(MAX_TOKENS)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def peak_mb(export: Path, pairs: Path, out: Path) -> float:
    """Peak memory of a whole batch in MB."""
    process = batch_process(export, pairs, out)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"genrec describe ended with {process.returncode}; run it by hand on {pairs}")
    return usage.ru_maxrss / 1024


def killed(export: Path, pairs: Path, out: Path, kills: int) -> int:
    """A batch that is killed after random times; returns how often it was."""
    rng = np.random.default_rng(1)
    done = 0
    while done < kills:
        before = len(list(out.glob("part-*.parquet")))
        process = batch_process(export, pairs, out)
        while process.poll() is None and len(list(out.glob("part-*.parquet"))) <= before:
            time.sleep(0.02)
        try:
            process.wait(float(rng.uniform(0, 3)))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        else:
            log.warning("the batch was done after %d kills; give more --rows", done)
            break
    return done


def wrong_rows(out: Path, rows: int) -> int:
    """How many of so many rows are in no shard and no side file, and how often one is there again."""
    files = [*out.glob("part-*.parquet"), *out.glob("rejected-*.parquet")]
    found = np.concatenate([pq.read_table(path, columns=["row"])["row"].to_numpy() for path in files])
    return rows - len(np.intersect1d(found, np.arange(rows))) + len(found) - len(np.unique(found))


def rows_per_second(run: Run, pairs: Path, out: Path, least_shared: int) -> float:
    """Speed of the torch engine when prompts share a beginning of so many tokens or more."""
    export = Export.load(run.folder / "export")
    kept, torch_engine.LEAST_SHARED = torch_engine.LEAST_SHARED, least_shared
    try:
        started = time.monotonic()
        describe_pairs(export, TorchEngine(export), pairs, out, Wish(max_tokens=MAX_TOKENS))
        return SPEED_ROWS / (time.monotonic() - started)
    finally:
        torch_engine.LEAST_SHARED = kept


def batch_checks(run: Run, rows: int) -> list[Check]:
    """Kills, memory and speed on one seed's export."""
    folder, export = run.folder / "batch", run.folder / "export"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pairs = write_pairs(run, folder / "pairs.parquet", rows)
    few = write_pairs(run, folder / "few.parquet", MEMORY_ROWS)
    some = write_pairs(run, folder / "some.parquet", SPEED_ROWS)
    small = peak_mb(export, few, folder / "few")
    done = killed(export, pairs, folder / "out", KILLS)
    large = peak_mb(export, pairs, folder / "out")
    wrong = wrong_rows(folder / "out", rows)
    apart = rows_per_second(run, some, folder / "apart", 10**6)
    together = rows_per_second(run, some, folder / "together", torch_engine.LEAST_SHARED)
    log.info("batch: %.1f rows/s with shared beginnings, %.1f without", together, apart)
    ratio, speed = large / small, together / apart
    return [
        Check(f"batch of {rows} rows, killed {done} times: rows lost or doubled", wrong, None, "0", wrong == 0),
        Check(f"batch: peak memory of the last start / of {MEMORY_ROWS} rows", ratio, None, "<= 1.1", ratio <= 1.1),
        Check("batch: rows/s with shared beginnings / without", speed, None, ">= 1.5", speed >= 1.5),
    ]


def film_checks(run: Run) -> list[Check]:
    """The whole path on films: its texts, conversations, a batch, and a report with posters beside the texts."""
    whole_path(run)
    chat = measure_chat(run)["metrics"]
    folder = run.folder / "batch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pairs, export = write_pairs(run, folder / "pairs.parquet", FILM_ROWS), Export.load(run.folder / "export")
    describe_pairs(export, TorchEngine(export), pairs, folder / "out", Wish(max_tokens=MAX_TOKENS))
    wrong = wrong_rows(folder / "out", FILM_ROWS)
    checks = [Check(f"films: batch of {FILM_ROWS} rows: lost or doubled", wrong, None, "0", wrong == 0)]
    report = (run.folder / "report.html").read_text(encoding="utf-8").split("<article ")
    for task in TASKS:
        shown = [text for text in report if text.startswith(f'aria-label="{task} for ')]
        posters = sum('src="data:image/' in text.split("<h4>Text</h4>")[0] for text in shown)
        label = f"films: {task}: texts with their film's poster in the report"
        checks.append(Check(label, posters, None, f"{EXAMPLES}", len(shown) == posters == EXAMPLES))
        metrics = measure(run, task)["metrics"]
        for name in ("faithful", "personal", "personal, item-only writer", "equal to the reference"):
            of = metrics[name]
            checks.append(Check(f"films: {task}: {name}", of["mean"], of["ci95"], "reported", True))
    for name in (SETS["values"], FITS):
        checks.append(Check(f"films: chat: {name}", chat[name]["mean"], chat[name]["ci95"], "reported", True))
    strangers = chat[STRANGERS]["mean"]
    checks.append(Check("films: chat: items mentioned outside the list", strangers, None, "0", strangers == 0))
    return checks


def text_checks(values: dict[str, list[dict[str, np.ndarray]]]) -> list[Check]:
    """What every seed's texts say together: task -> one dictionary of metrics per seed."""

    def of(task: str, metric: str) -> tuple[float, list[float]]:
        return over_seeds([seed[metric] for seed in values[task]])

    checks = []
    for task in TASKS:
        mean, ends = of(task, "faithful")
        checks.append(Check(f"{task}: share of mentions that are true", mean, ends, ">= 0.98", mean >= 0.98))
    mean, ends = of("describe", "picture right")
    checks.append(Check("describe: colour, shape, pattern named rightly", mean, ends, ">= 0.90", mean >= 0.9))
    for name in PICTURE_ONLY:
        chance = 1 / SIZES[name]
        found: Sequence[np.ndarray] = [v[f"{name} right, shuffled soft tokens"] for v in values["describe"]]
        if all(len(part) > 1 for part in found):
            mean, ends = over_seeds(list(found))
            label = f"describe: {name} with shuffled soft tokens (chance {chance:.3f})"
            checks.append(Check(label, mean, ends, "interval not above chance", ends[0] <= chance))
    mean, ends = of("describe", "personal")
    checks.append(Check(f"describe: the reader finds 1 of {CANDIDATES}", mean, ends, ">= 0.25", mean >= 5 / CANDIDATES))
    mean, ends = of("describe", "personal, item-only writer")
    fine = ends[0] <= 1 / CANDIDATES
    checks.append(Check("describe: the same, item-only writer", mean, ends, "interval not above 0.05", fine))
    mean, ends = of("describe", "swapped history, swapped text")
    checks.append(Check("describe: swapped histories swap the text", mean, ends, "interval above 0.5", ends[0] > 0.5))
    mean, ends = of("describe", "useful")
    checks.append(Check("describe: what the user cares about comes first", mean, ends, "reported", True))
    mean, ends = of("chat", SETS["values"])
    checks.append(Check("chat: last query exactly right, held-out values", mean, ends, ">= 0.90", mean >= 0.9))
    fits = [seed[FITS] for seed in values["chat"]]
    mean, ends = over_seeds(fits)
    listed = sum(map(len, fits))
    checks.append(Check(f"chat: returned items ({listed}) that fit the query", mean, ends, "1", mean == 1))
    strangers = np.concatenate([seed[STRANGERS] for seed in values["chat"]])
    label = f"chat: items mentioned outside the list, {len(strangers)} chats"
    checks.append(Check(label, float(strangers.sum()), None, "0", not strangers.any()))
    mean, ends = of("chat", SETS["phrasings"])
    checks.append(Check("chat: the same in phrasings never trained", mean, ends, "reported", True))
    return checks


def measure_seed(seed: int, runs: Path, kept: Kept) -> None:
    """Train a seed, write and chat, and keep what every text and conversation was worth."""
    started = time.monotonic()
    run = trained(seed, runs)
    arrays: dict[str, np.ndarray] = {}
    about: dict[str, str] = {}
    for task in TASKS:
        about[task] = _table(measure(run, task))
        arrays |= {f"{task}/{name}": of for name, of in values_of(run, task).items()}
    measure_chat(run)
    arrays |= {f"chat/{name}": of for name, of in values_of(run, "chat").items()}
    arrays["tables"] = np.array(json.dumps(about))
    kept.put(f"texts/{seed}", arrays, time.monotonic() - started)


def keep_checks(kept: Kept, part: str, measured: Callable[[], list[Check]]) -> None:
    """Measure a part that has verdicts and no values, and keep them."""
    started = time.monotonic()
    checks = measured()
    kept.put(part, {"checks": np.array(json.dumps([asdict(check) for check in checks]))}, time.monotonic() - started)


def verdicts(kept: Kept) -> tuple[list[Check], dict[str, str]]:
    """The lines and tables of all that is kept."""
    values: dict[str, list[dict[str, np.ndarray]]] = {task: [] for task in (*TASKS, "chat")}
    tables: dict[str, str] = {}
    seeds = kept.below("texts")
    for seed in seeds:
        found = kept.get(f"texts/{seed}")
        for task, of in values.items():
            start = f"{task}/"
            of.append({name.removeprefix(start): v for name, v in found.items() if name.startswith(start)})
        if seed == seeds[0]:
            tables |= {f"Seed {seed}, {task}": text for task, text in json.loads(str(found["tables"])).items()}
    whole = seeds == [str(seed) for seed in SEEDS]
    checks = [Check("seeds measured", len(seeds), None, f"{len(SEEDS)}", whole)]
    checks += text_checks(values) if seeds else []
    for part in ("batch", "posters"):
        if found := kept.get(part):
            checks += [Check(**check) for check in json.loads(str(found["checks"]))]
    return checks, tables | {"Which run each number comes from": kept.runs()}


def main() -> int:
    """Measure what is asked for, then write the verdicts on all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS), help="whose texts are measured")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only render what is kept")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the batch, on seed 0")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-writing", help="where the runs go")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kept = Kept(RESULTS / "writing.npz")
    for seed in arguments.seeds if "texts" in arguments.parts else ():
        measure_seed(seed, arguments.runs, kept)
    if "batch" in arguments.parts:
        keep_checks(kept, "batch", lambda: batch_checks(trained(SEEDS[0], arguments.runs), arguments.rows))
    if "posters" in arguments.parts and (DATA / FILMS / "items.jsonl").is_file():
        keep_checks(kept, "posters", lambda: film_checks(films(arguments.runs)))
    elif "posters" in arguments.parts:
        log.warning("%s: no data there, no film is written about", DATA / FILMS)
    checks, tables = verdicts(kept)
    seeds = [int(seed) for seed in kept.below("texts")]
    return finish("writing", "make bench-writing", seeds, kept.seconds, checks, tables)


def _table(result: dict[str, Any]) -> str:
    rows = ["| measure | mean | 95 % interval |", "|---|---|---|"]
    for name, value in result["metrics"].items():
        ends = "" if value["ci95"] is None else "{:.3f} .. {:.3f}".format(*value["ci95"])
        rows.append(f"| {name} | {value['mean']:.3f} | {ends} |")
    rows += ["", "Examples as they came:", ""]
    rows += [f"- {e['item']}, {e['style']}: {json.dumps(e['text'], ensure_ascii=False)}" for e in result["examples"]]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
