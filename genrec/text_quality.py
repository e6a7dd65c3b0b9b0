"""genrec evaluate --task describe|explain|headline: how good the texts of a run's export are, on any catalogue.

Users whose texts were never trained, and any item. Beside each figure stands the control that must lose it: soft tokens
of other items, a writer that knows the item only, histories of other users.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec.artefacts import key_at, run_stage, write_json
from genrec.bases import load_base
from genrec.errors import ConfigError
from genrec.faithful import Checker, words
from genrec.metrics import ci95
from genrec.pipeline import Run
from genrec.reader import CANDIDATES, chance_of_right, overlap
from genrec.reference_scores import bert_score, rouge_l, rouge_n
from genrec.serving.engine import TextRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.text_subjects import Subject, human_subjects, subjects
from genrec.training.texts import held_out_items
from genrec.workspace import Workspace
from genrec.writer import PICTURE_ONLY, STYLES, TASKS, Writer

log = logging.getLogger(__name__)
TEXTS = 300
EXAMPLES = 10
MAX_TOKENS = 128
Values = dict[str, np.ndarray]  # metric -> float64 [n], NaN where a text says nothing about it


def truth_values(checker: Checker, task: str, subject: Subject, text: str) -> dict[str, float]:
    """Faithfulness, usefulness and picture attributes of one text; NaN where it says nothing of the kind."""
    mentions = checker.mentions(text, subject.row, subject.history if task == "explain" else ())
    named = [m.attribute for m in mentions if m.attribute]
    cares = checker.writer.cares(subject.user, subject.history, subject.row)
    values = {
        "faithful": float(np.mean([m.true for m in mentions])) if mentions else np.nan,
        "mentions": float(len(mentions)),
        "untrue": float(sum(not m.true for m in mentions)),
        "useful": float(named[0] in cares) if named and cares else np.nan,
        "words": float(len(words(text))),
    }
    if checker.writer.truth is not None:
        for name in PICTURE_ONLY:
            seen = [m.true for m in mentions if m.attribute == name]
            values[f"{name} right"] = float(np.mean(seen)) if seen else np.nan
        seen = [m.true for m in mentions if m.attribute in PICTURE_ONLY]
        values["picture right"] = float(np.mean(seen)) if seen else np.nan
    return values


def personal_values(
    writer: Writer, task: str, all_subjects: Sequence[Subject], texts: Sequence[str], seed: int
) -> np.ndarray:
    """The reader's chance of naming the right one of `CANDIDATES` users, for each text: float64 [n]."""
    rng = np.random.default_rng([seed, 4])
    right = np.zeros(len(texts))
    for i, (subject, text) in enumerate(zip(all_subjects, texts, strict=True)):
        others = rng.choice(np.delete(np.arange(len(all_subjects)), i), CANDIDATES - 1, replace=False)
        candidates = [subject, *(all_subjects[o] for o in others)]
        references = [writer.write(task, c.style, c.user, c.history, subject.row) for c in candidates]
        right[i] = chance_of_right(text, references, 0)
    return right


def swap_pairs(writer: Writer, task: str, all_subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """(subject, the same with the next user's history), where a perfect writer would write something else."""
    pairs = []
    for one, other in zip(all_subjects, [*all_subjects[1:], all_subjects[0]], strict=True):
        swapped = Subject(other.user, other.history, one.row, one.style)
        if writer.write(task, one.style, one.user, one.history, one.row) != writer.write(
            task, one.style, other.user, other.history, one.row
        ):
            pairs.append((one, swapped))
    return pairs


def swap_values(
    writer: Writer, task: str, pairs: Sequence[tuple[Subject, Subject]], texts: Sequence[str]
) -> np.ndarray:
    """Whether the text written with another's history is nearer to what that other should get: 1, 0.5 (equal) or 0."""
    values = np.zeros(len(pairs))
    for i, ((one, swapped), text) in enumerate(zip(pairs, texts, strict=True)):
        own = overlap(text, writer.write(task, one.style, one.user, one.history, one.row))
        new = overlap(text, writer.write(task, one.style, swapped.user, swapped.history, one.row))
        values[i] = 0.5 if own == new else float(new > own)
    return values


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of the texts together (Li et al. 2016)."""
    grams = [tuple(of[i : i + n]) for of in map(words, texts) for i in range(len(of) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _frozen_base(space: Workspace) -> tuple[Any, int]:
    """The base as it was before training, and the token that its texts begin with."""
    lm, _ = load_base(space.base_path, space.recipe.backbone.load_in, space.recipe.backbone.trust_remote_code)
    return lm.eval(), space.layout.eos if space.layout.bos is None else space.layout.bos


@torch.inference_mode()
def log_perplexity(space: Workspace, texts: Sequence[str]) -> np.ndarray:
    """Mean negative log-likelihood in nats per token under the frozen base, for each text: float64 [n]."""
    lm, start = _frozen_base(space)
    values = np.full(len(texts), np.nan)
    for i, text in enumerate(texts):
        ids = torch.tensor([[start, *space.prompter.text_ids(text)]], device=lm.device)
        if ids.shape[1] > 1:
            values[i] = lm(ids, labels=ids).loss.item()
    return values


def reference_values(space: Workspace, texts: Sequence[str], references: Sequence[str]) -> Values:
    """ROUGE and BERTScore of each text against a person's: metric -> float64 [n].

    Beside them the same texts against what was written about another item, which a text that says something beats.
    """
    lm, start = _frozen_base(space)
    turned = [*references[1:], references[0]]

    def scores(against: Sequence[str]) -> Values:
        pairs = list(zip(texts, against, strict=True))
        ids = [(space.prompter.text_ids(text), space.prompter.text_ids(other)) for text, other in pairs]
        return {
            "rouge-1": np.array([rouge_n(text, other, 1) for text, other in pairs]),
            "rouge-2": np.array([rouge_n(text, other, 2) for text, other in pairs]),
            "rouge-l": np.array([rouge_l(text, other) for text, other in pairs]),
            "bertscore": bert_score(lm, ids, start),
        }

    return scores(references) | {f"{name}, another's text": of for name, of in scores(turned).items()}


def measure(run: Run, task: str, n: int = TEXTS) -> dict[str, Any]:
    """texts/TASK/: write texts and measure them; returns texts.json.

    Args:
        run: a run with an export.
        task: "describe", "explain" or "headline".
        n: at most so many texts.

    Returns:
        {"task", "texts", "metrics": {name: {"mean", "ci95"}}, "examples", "human_examples"}; perplexity in nats per
        token; ROUGE and BERTScore of descriptions where people wrote texts, else no such metrics or examples.

    Raises:
        ConfigError: no such task, or one that the recipe did not train.
        DataError: too few held-out users.
    """
    if task not in TASKS:
        raise ConfigError(f"no task {task!r} to evaluate; there are {', '.join(TASKS)}")
    if getattr(run.recipe.finetune.mixture, task) == 0:
        raise ConfigError(f"{run.folder}: {task} was not trained; set finetune.mixture.{task} above 0 and run again")
    folder = run_stage(
        run.folder, f"texts/{task}", {"texts": n, "seed": run.recipe.seed}, {"export": key_at(run.folder / "export")},
        lambda out: _measure(run, task, n, out), run.force,
    )  # fmt: skip
    result: dict[str, Any] = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return result


def _measure(run: Run, task: str, n: int, out: Path) -> dict[str, Any]:
    space, seed = run.space, run.recipe.seed
    writer, ids = space.writer, space.catalogue.item_ids
    checker = Checker(writer)
    export = Export.load(run.folder / "export")
    chosen = subjects(space, n, seed)

    def texts_of(wanted: Sequence[Subject], source: Export = export) -> list[str]:
        engine = TorchEngine(source)
        requests = [
            TextRequest(ids[s.row], [ids[r] for r in s.history], MAX_TOKENS, task=task, style=s.style) for s in wanted
        ]
        texts = [result.text for result in engine.generate(requests)]
        engine.close()
        return texts

    def values_of(texts: Sequence[str]) -> Values:
        each = [truth_values(checker, task, s, text) for s, text in zip(chosen, texts, strict=True)]
        return {name: np.array([values[name] for values in each]) for name in each[0]}

    texts = texts_of(chosen)
    values = values_of(texts)
    values["personal"] = personal_values(writer, task, chosen, texts, seed)
    plain = [Subject(s.user, [], s.row, STYLES[0]) for s in chosen]
    values["personal, item-only writer"] = personal_values(writer, task, chosen, texts_of(plain), seed)
    pairs = swap_pairs(writer, task, chosen)
    swapped = texts_of([other for _, other in pairs])
    values["swapped history, swapped text"] = swap_values(writer, task, pairs, swapped)
    neighbours = [
        Subject(b.user, b.history, a.row, b.style) for a, b in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
    ]
    values["overlap between users"] = np.array(
        [overlap(a, b) for a, b in zip(texts, texts_of(neighbours), strict=True)]
    )
    values["log perplexity"] = log_perplexity(space, texts)
    order = np.random.default_rng([seed, 5]).permutation(len(ids))
    shuffled = values_of(texts_of(chosen, dataclasses.replace(export, items=export.items[torch.from_numpy(order)])))
    values |= {f"{name}, shuffled soft tokens": shuffled[name] for name in values if name.endswith("right")}
    late = space.split.cold[[s.row for s in chosen]]
    if late.any():
        values["faithful, new items"] = np.where(late, values["faithful"], np.nan)
    apart = held_out_items(len(ids), space.recipe.seed)[[s.row for s in chosen]]
    values |= {
        f"{name}, held-out items": np.where(apart, values[name], np.nan)
        for name in ("faithful", "picture right")
        if name in values
    }
    references = [writer.write(task, s.style, s.user, s.history, s.row) for s in chosen]
    values["equal to the reference"] = np.array([float(a == b) for a, b in zip(texts, references, strict=True)])
    people, human = human_subjects(space, n, seed) if task == "describe" else ([], [])
    retold = texts_of(people) if people else []
    if len(people) > 1:  # one text alone has no other to be compared with
        values |= reference_values(space, retold, human)
    metrics = {name: interval(of, seed) for name, of in values.items() if not np.isnan(of).all()}
    if total := values["mentions"].sum():  # texts that mention nothing are not faithful, they are empty
        metrics["faithful mentions"] = {"mean": float(1 - values["untrue"].sum() / total), "ci95": None}
    for size in (1, 2):
        metrics[f"distinct-{size}"] = {"mean": distinct(texts, size), "ci95": None}
    np.savez_compressed(out / "values.npz", allow_pickle=False, **values)

    def examples(of: Sequence[Subject], texts: Sequence[str], references: Sequence[str]) -> list[dict[str, str]]:
        return [
            {"user": s.user, "item": ids[s.row], "style": s.style, "text": text, "reference": reference}
            for s, text, reference in list(zip(of, texts, references, strict=True))[:EXAMPLES]
        ]

    shown = {"examples": examples(chosen, texts, references), "human_examples": examples(people, retold, human)}
    write_json(out / "texts.json", {"task": task, "texts": len(texts), "metrics": metrics, **shown})
    return {"texts": len(texts)}


def interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean and 95 % interval of what is known, {"mean", "ci95"}; NaN is not."""
    known = values[~np.isnan(values)]
    return {"mean": float(known.mean()), "ci95": [float(end) for end in ci95(known, 1000, seed)]}
