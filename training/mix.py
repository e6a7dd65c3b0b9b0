"""The mixer learns from validation: lists whose next item is known, some of whose known items play new ones."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from genrec.adapters.kinship import KIN
from genrec.adapters.mixer import Mixer
from genrec.adapters.newcomers import Newcomers
from genrec.backbone import Backbone
from genrec.decode import Ranked
from genrec.errors import ConfigError
from genrec.ranking import allowed_items, search_cases
from genrec.workspace import MIXER, Workspace

log = logging.getLogger(__name__)
POOLS = 10  # parts of the known items that play new ones in turn
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 0.1
STEPS = 300
SURE = 3.0  # standard errors of what mixing gains; below, chance may have said so
FOLDS = 4  # of the cases, each judged by a mixer that learned from the others
USERS_AT_ONCE = 256


@dataclass(frozen=True)
class CrossFit:
    """Mixers of parts of the cases, each taught by the other parts: what mixing is worth on cases that it did not see.

    Attributes:
        plain: orders lists as they are.
        features: of the lists that hold their target, [M, C, F] with a score of -inf where a list has ended.
        targets: int64 [M], the target's place.
        part: int64 [len(space.mixes)], the part that each case is of.
        mixers: by part; `plain` for all where mixing does not pay.
        result: of the stage, see `fit_mixer`.
    """

    plain: Mixer
    features: Tensor
    targets: Tensor
    part: np.ndarray
    mixers: list[Mixer]
    result: dict[str, dict[str, float]]

    @property
    def pays(self) -> bool:
        """Whether mixing is worth it on cases that it did not see, see `fit_mixer`."""
        known, nats = self.result["known"], self.result.get("nats")
        knows = nats is not None and nats["gain"] > SURE * nats["error"] and known["gain"] > -known["error"]
        return knows or known["gain"] > SURE * known["error"]


def fit_mixer(space: Workspace, folder: Path) -> dict[str, Any]:
    """Train it and write mixer.safetensors into a stage's folder.

    Args:
        space: a run whose generator is tuned, with its sequence part.
        folder: the stage's.

    Returns:
        the manifest's result, by mixers that did not learn from what they judge: "known", N@10 of the lists whose
        target is a known item, and where new items join "nats", the log-likelihood of all targets in their lists. Each
        has the number of "lists", the mean that they have "plain" and "mixed", and over cases the mean of what mixing
        gains and its standard "error". It is used where known items gain more than `SURE` errors; or where it knows
        more, by as much, and known items lose no more than one error: how many places new items then take is the
        lift's business.

    Raises:
        ConfigError: too few lists hold their target.
    """
    found = cross_fitted(space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(space.recipe.seed)
        mixer = _fitted(found.plain, found.features, found.targets) if found.pays else found.plain
    mixer.save(folder / MIXER)
    return found.result


def cross_fitted(space: Workspace) -> CrossFit:
    """Part the cases of ``space.mixes`` and teach a mixer for each part; arguments and errors as for `fit_mixer`."""
    backbone = space.tuned_backbone()
    parts = [] if backbone.item_scores is None else backbone.item_scores.names
    plain = Mixer(parts, space.mixed_keys, torch.from_numpy(space.popularity))
    features, targets, cases, new = _lists(space, backbone, plain)
    of_case = np.random.default_rng(space.recipe.seed).permutation(len(space.mixes)) % FOLDS
    part = torch.from_numpy(of_case[cases])  # by case: one stands in several lists
    if len(part.unique()) < FOLDS:
        raise ConfigError(
            f"mix.users: {len(np.unique(cases))} of {len(space.mixes)} lists hold their next item, too few to learn "
            "from; set it to 0"
        )
    mixed, mixers = torch.zeros(2, len(targets)), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(space.recipe.seed)
        for one in range(FOLDS):
            mixers.append(_fitted(copy.deepcopy(plain), features[part != one], targets[part != one]))
            mixed[:, part == one] = _judged(mixers[-1], features[part == one], targets[part == one])
    before = _judged(plain, features, targets)
    result = {"known": _gain(before[0, ~new], mixed[0, ~new], cases[~new.numpy()])}
    if new.any():
        result["nats"] = _gain(before[1], mixed[1], cases)
    log.info("mixer: %s", result)
    found = CrossFit(plain, features, targets, of_case, mixers, result)
    return found if found.pays else replace(found, mixers=[plain] * FOLDS)


def _gain(before: Tensor, mixed: Tensor, cases: np.ndarray) -> dict[str, float]:
    """What mixing gains lists that had `before` and have `mixed`, float32 [M]; every one of `cases`, int64 [M], counts
    once."""
    lists = np.bincount(cases)
    gains = np.bincount(cases, (mixed - before).numpy())[lists > 0] / lists[lists > 0]
    return {
        "lists": len(cases), "plain": float(before.mean()), "mixed": float(mixed.mean()),
        "gain": float(gains.mean()), "error": float(stats.sem(gains)),
    }  # fmt: skip


def _fitted(mixer: Mixer, features: Tensor, targets: Tensor) -> Mixer:
    """Trained on lists [M, C, F] with targets int64 [M]."""
    real = features[features[:, :, 0] > -torch.inf]
    mixer.set_scale(real.mean(0), real.std(0).clamp(min=1e-3))
    optimiser = torch.optim.AdamW(mixer.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=STEPS)
    orders = (rows for _ in range(STEPS) for rows in torch.randperm(len(targets)).split(BATCH))
    mixer.train()
    for rows in itertools.islice(orders, STEPS):
        loss = F.cross_entropy(_logits(mixer, features[rows]), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return mixer.eval()


def _logits(mixer: Mixer, features: Tensor) -> Tensor:
    """[M, C, F] -> [M, C]; places whose score is -inf hold nothing."""
    empty = features[:, :, 0] == -torch.inf
    return mixer(features.masked_fill(empty[:, :, None], 0)).masked_fill(empty, torch.finfo(torch.float32).min)


@torch.inference_mode()
def _judged(mixer: Mixer, features: Tensor, targets: Tensor) -> Tensor:
    """N@10 and log-likelihood of the targets int64 [M] in their lists [M, C, F], float32 [2, M]."""
    logits = _logits(mixer.eval(), features)
    place = (logits > logits.gather(1, targets[:, None])).sum(1)
    nats = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return torch.stack([torch.where(place < 10, 1 / (place + 2).log2(), 0.0), nats])


@torch.inference_mode()
def _lists(space: Workspace, backbone: Backbone, plain: Mixer) -> tuple[Tensor, Tensor, np.ndarray, Tensor]:
    """The lists that hold their target: features float32 [M, C, F] with a score of -inf where a list has ended, the
    target's place int64 [M], the case that each list is of int64 [M], and whether its target plays a new item bool [M].
    """
    recipe, cases = space.recipe, space.mixes
    known = torch.from_numpy(~space.split.cold)
    available = space.catalogue.available & known.numpy()
    found = search_cases(
        backbone, space.prompter, cases, available=available, exclude_seen=recipe.data.exclude_seen,
        beams=recipe.evaluate.beams,
    )  # fmt: skip
    keys = {name: plain.keys(name) for name in plain.modalities}
    pools: list[tuple[Tensor, Newcomers | None, dict[str, Tensor]]] = [
        (known.new_zeros(0, dtype=torch.int64), None, keys)
    ]
    if recipe.new_items.relatives and space.features:
        shuffled = np.random.default_rng(recipe.seed).permutation(np.flatnonzero(known))
        pools = []
        for pool in torch.from_numpy(shuffled[: len(shuffled) // POOLS * POOLS]).view(POOLS, -1):
            others = known.index_fill(0, pool, False)
            kin = {KIN: space.kinship_of(others).keys(space.content_keys)}  # it never saw these items either
            joining = Newcomers.nearest(space.content_keys | kin, others, recipe.new_items.relatives, 0.0)
            pools.append((pool, joining, {name: kin.get(name, of) for name, of in keys.items()}))
    features, targets, users, new = [], [], [], []
    for start in range(0, len(cases), USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        histories, wanted = cases.histories[rows], torch.from_numpy(cases.targets[rows]).long()
        likely = backbone.likely(histories, apart=True)
        likely = None if likely is None else likely.cpu()
        allowed = allowed_items(torch.from_numpy(available), cases[rows], recipe.data.exclude_seen)
        for pool, newcomers, theirs in pools:
            hidden = torch.isin(found.items[rows], pool)
            left = Ranked(found.items[rows].masked_fill(hidden, -1), found.scores[rows].masked_fill(hidden, -torch.inf))
            judge = plain.with_items(theirs, plain.popularity.index_fill(0, pool, 0))
            items, scores = judge.candidates(left, likely, allowed, newcomers)
            holds = (items == wanted[:, None]).any(1)
            of = judge.features(histories, items, scores, likely)
            of[:, :, 0].masked_fill_(items < 0, -torch.inf)
            features.append(of[holds])
            targets.append((items == wanted[:, None]).float().argmax(1)[holds])
            users.append(start + holds.nonzero()[:, 0].numpy())
            new.append(torch.isin(wanted, pool)[holds])
    return torch.cat(features), torch.cat(targets), np.concatenate(users), torch.cat(new)
