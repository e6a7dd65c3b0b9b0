"""From a recipe to a quantised export: the stages in order, the comparison with the rivals, the report."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artefacts import key_at, peak_rss_mb, read_manifest, run_stage, write_json
from genrec.baseline_rankings import rank_baseline
from genrec.errors import DataError
from genrec.evaluate import evaluate, load_per_user, save_per_user, top_items
from genrec.interactions import Log
from genrec.pipeline import Run
from genrec.report import Example, Shown, Texts, Written, write_report
from genrec.writer import TASKS

log = logging.getLogger(__name__)
EXAMPLES = 12
HAD = 5  # items of a history beside a text
QUANTISED_USERS = 300


def whole_path(run: Run) -> dict[str, Any]:
    """Every stage of a run; returns metrics.json."""
    from genrec.serving.quantise import check_runnable
    from genrec.system_run import check_systems

    started = time.monotonic()
    check_runnable(run.recipe.serve.quantise)
    check_systems(run)
    run.through_training()
    for name in run.recipe.evaluate.ablations:
        log.info("ablation %s", name)
        run.variant(name).train()
    metrics = evaluate_run(run)
    export = run.export()
    if run.recipe.serve.quantise:
        quantise_and_compare(export, run.recipe.serve.quantise, QUANTISED_USERS, run.force)
    report_run(run, metrics, measure_texts(run))
    log.info("%s: whole path in %.0f s, peak memory %.0f MB", run.folder, time.monotonic() - started, peak_rss_mb())
    return metrics


def planted_truth(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The oracle's top 50 and the test users' groups on the embedded catalogue."""
    from genrec.synthetic import KINDS, Truth

    truth = Truth.load(run.shared / "source")
    space, cases = run.space, run.space.split.test
    users = Log.load(run.shared / "interactions").user_ids
    names = [users[u] for u in cases.users]
    row = {item: i for i, item in enumerate(truth.item_ids)}
    ours = np.array([row[item] for item in space.catalogue.item_ids])
    histories = [ours[history] for history in cases.histories]
    scores = truth.scores(names, histories)[:, ours]
    top = top_items(scores, cases.seen if run.recipe.data.exclude_seen else None, 50, space.catalogue.available)
    kind = dict(zip(truth.user_ids, truth.kinds, strict=True))
    kinds = np.array([kind[name] for name in names])
    return top, {name: kinds == i for i, name in enumerate(KINDS)}


def evaluate_run(run: Run) -> dict[str, Any]:
    """eval/: every model on the same test users; returns metrics.json."""
    from genrec.system_run import rank_system

    recipe, space = run.recipe, run.space
    ranked: dict[str, Path] = {name: rank_baseline(run, name) for name in recipe.evaluate.baselines}
    ranked |= {folder.name: folder for folder in (rank_system(run, name) for name in recipe.evaluate.systems)}
    ranked["genrec"] = run.rank_test()
    if recipe.serve.rerank is not None:
        ranked["genrec-reranked"] = run.rank_test(reranked=True)
    ranked |= {name: run.variant(name).rank_test() for name in recipe.evaluate.ablations}

    def build(out: Path) -> None:
        started = time.monotonic()
        rankings: dict[str, np.ndarray] = {}
        groups = None
        if recipe.data.synthetic is not None:
            rankings["oracle"], groups = planted_truth(run)
        rankings |= {name: np.load(folder / "top.npy") for name, folder in ranked.items()}
        others = [name for name in rankings if name not in ("genrec", "oracle")]
        metrics, values = evaluate(
            rankings,
            space.split,
            train_counts=space.popularity,
            user_groups=groups,
            exclude_seen=recipe.data.exclude_seen,
            n_boot=recipe.evaluate.bootstrap,
            seed=recipe.seed,
            pairs=[("genrec", name) for name in others],
            allowed=space.catalogue.available,
            data=recipe.name,
        )
        metrics["seconds"] = round(time.monotonic() - started, 3)
        metrics["peak_rss_mb"] = round(peak_rss_mb(), 1)
        write_json(out / "metrics.json", metrics)
        save_per_user(out / "per_user.npz", values)
        np.savez_compressed(out / "rankings.npz", **rankings)  # type: ignore[arg-type]

    inputs = {"interactions": key_at(run.shared / "interactions")}
    inputs |= {name: key_at(folder) for name, folder in ranked.items()}
    settings = {"evaluate": recipe.evaluate.model_dump(), "seed": recipe.seed, "data": recipe.data.exclude_seen}
    folder = run_stage(run.folder, "eval", settings, inputs, build, run.force)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def quantise_and_compare(export: Path, methods: Sequence[str], users: int, force: bool = False) -> list[dict[str, Any]]:
    """Quantised copies beside an export, and what each costs on some of the run's test users.

    Args:
        export: an export folder inside its run's folder.
        methods: "int8", "nf4", "w8a8", "w4a16".
        users: test users to compare lists on.
        force: do it again even when nothing changed.

    Returns:
        rows of `genrec.serving.quantise.compare_exports`, the export once for each engine that its copies need and
        before them, also kept in quantised/comparison.json beside the export, and whether each row is ``blessed``: a
        copy that agrees less than its serve.min_overlap is not.

    Raises:
        ConfigError: no such method, a model that it does not fit, or vLLM is needed and cannot run here.
    """
    from genrec.serving.export import REFUSED
    from genrec.serving.quantise import (
        ENGINES,
        bless,
        check_runnable,
        compare_exports,
        open_engines,
        quantise_export,
    )

    check_runnable(methods)
    run = Run.open(export.parent)
    copies = {method: quantise_export(export, run.folder, method, force) for method in methods}
    for copy in copies.values():
        (copy / REFUSED).unlink(missing_ok=True)  # an earlier demand may have been higher
    folders_of: dict[str, list[Path]] = {}
    for method, copy in copies.items():
        folders_of.setdefault(ENGINES[method], [export]).append(copy)
    test, seed, exclude_seen = run.space.split.test, run.recipe.seed, run.recipe.data.exclude_seen

    def build(out: Path) -> None:
        n = len(test.targets)
        rows = np.random.default_rng(seed).choice(n, min(users, n), replace=False)
        cases = test[rows]
        table: list[dict[str, Any]] = []
        for kind, folders in folders_of.items():
            with contextlib.closing(open_engines(kind, folders)) as engines:
                table += compare_exports(next(engines), engines, cases, exclude_seen=exclude_seen, seed=seed)
        write_json(out / "comparison.json", table)

    engines = {copy.name: ENGINES[method] for method, copy in copies.items()}
    settings = {"users": users, "seed": seed, "exclude_seen": exclude_seen, "engines": engines}
    inputs = {folder.name: key_at(folder) for folder in (export, *copies.values())}
    inputs["interactions"] = key_at(run.shared / "interactions")
    folder = run_stage(run.folder, "quantised", settings, inputs, build, force)
    table: list[dict[str, Any]] = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    least = run.recipe.serve.min_overlap.model_dump()
    quantised = {copy.name: method for method, copy in copies.items()}
    for row in table:
        log.info(
            "%s (%s): %.1f MB (%.0f %% of bfloat16), %.0f users/s, overlap@10 %.3f, N@10 %+.4f [%+.4f, %+.4f]",
            row["export"], row["engine"], row["bytes"] / 1e6, 100 * row["share"], row["users/s"], row["overlap@10"],
            row["change"], *row["ci95"],
        )  # fmt: skip
        by = quantised.get(row["export"])
        row["blessed"] = by is None or bless(export.parent / row["export"], by, row["overlap@10"], least[by])
    return table


def measure_texts(run: Run) -> list[dict[str, Any]]:
    """texts/: the texts.json of every writing task in the mixture; none where the test users are too few to tell."""
    from genrec.text_quality import measure

    try:
        return [measure(run, task) for task in TASKS if getattr(run.recipe.finetune.mixture, task)]
    except DataError as err:
        log.warning("texts: not measured: %s", err)
        return []


def report_run(run: Run, metrics: dict[str, Any], texts: Sequence[dict[str, Any]] = ()) -> None:
    """report.html: the table, the curves, the ids, texts, a dozen users with pictures.

    Args:
        run: whose stages are there, up to eval/.
        metrics: its metrics.json.
        texts: its texts.json, task by task.
    """
    space, cases = run.space, run.space.split.test
    catalogue = space.catalogue
    rankings = np.load(run.folder / "eval" / "rankings.npz")["genrec"]
    values = load_per_user(run.folder / "eval" / "per_user.npz")["genrec"]["recall@10"]
    rng = np.random.default_rng(run.recipe.seed)
    # as many hits as the model's own recall, at least one where there is any, so that the picture is fair
    hits, misses = rng.permutation(np.flatnonzero(values > 0)), rng.permutation(np.flatnonzero(values == 0))
    n_hits = min(len(hits), max(1, round(EXAMPLES * float(values.mean()))))
    chosen = [*hits[:n_hits], *misses[: EXAMPLES - n_hits]]
    users = Log.load(run.shared / "interactions").user_ids
    groups: dict[str, np.ndarray] = planted_truth(run)[1] if run.recipe.data.synthetic is not None else {}

    def shown(rows: np.ndarray, target: int) -> list[Shown]:
        return [
            Shown(catalogue.item_ids[i], catalogue.titles[i], catalogue.images[i], hit=int(i) == target)
            for i in rows
            if i >= 0
        ]

    case = {users[user]: c for c, user in enumerate(cases.users)}

    def written(of: dict[str, str]) -> Written:
        item = shown(np.array([catalogue.index[of["item"]]]), -1)[0]
        had = shown(cases.histories[case[of["user"]]][-HAD:], -1)
        return Written(item, of["user"], had, of["style"], of["text"], of["reference"])

    examples = [
        Example(
            users[cases.users[c]],
            next((name for name, members in groups.items() if members[c]), None),
            shown(cases.histories[c][-10:], -1),
            shown(rankings[c][:10], int(cases.targets[c])),
            shown(cases.targets[c : c + 1], -1),
        )
        for c in chosen
    ]
    write_report(
        run.folder / "report.html",
        title=run.recipe.name,
        metrics=metrics,
        curves=run.curves(),
        sid_report=read_manifest(run.folder / "semantic_ids")["result"],
        examples=examples,
        settings=json.loads(run.recipe.model_dump_json()),
        texts=[
            Texts(of["task"], of["metrics"], [written(one) for one in of["human_examples"] or of["examples"]])
            for of in texts
        ],
    )
