"""The mixer learns from validation: lists whose next item is known, some of whose known items play new ones."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from genrec.adapters.item_scores import Likely
from genrec.adapters.kinship import KIN
from genrec.adapters.mixer import Mixer
from genrec.adapters.newcomers import Newcomers, known_shares
from genrec.backbone import Backbone
from genrec.decode import Ranked
from genrec.errors import ConfigError
from genrec.ranking import allowed_items, search_cases
from genrec.splits import Cases
from genrec.training.price import LOOKED_AT, TOP, Prices
from genrec.workspace import MIXER, Workspace

log = logging.getLogger(__name__)
POOLS = 10  # parts of the known items that play new ones in turn
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 0.1
STEPS = 300
SURE = 3.0  # standard errors of what mixing gains; below, chance may have said so
TEMPERS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)  # of inherited probabilities
FOLDS = 4  # of the cases, each judged by a mixer that learned from the others
USERS_AT_ONCE = 256


@dataclass(frozen=True)
class Pool:
    """Known items that play new ones.

    Attributes:
        rows: int64 [P].
        newcomers: that they are, beside the run's own; None where new items do not join.
        keys: what a mixer reads, by name, see `Mixer`; kinship never saw them.
    """

    rows: Tensor
    newcomers: Newcomers | None
    keys: dict[str, Tensor]

    def hidden_from(self, found: Ranked) -> Ranked:
        """What was found without them."""
        hidden = torch.isin(found.items, self.rows)
        return Ranked(found.items.masked_fill(hidden, -1), found.scores.masked_fill(hidden, -torch.inf))


@dataclass(frozen=True)
class CrossFit:
    """Mixers of parts of the cases, each taught by the other parts: what mixing is worth on cases that it did not see.

    Attributes:
        start: a mixer that has not learned yet: of all items, of new ones alone, or None where mixing does not pay.
        features: of the lists that hold their target, [M, C, F] with a score of -inf where a list has ended.
        targets: int64 [M], the target's place.
        part: int64 [len(space.mixes)], the part that each case is of.
        mixers: by part; those that order lists as they are where mixing does not pay. New items enter by what they
            cost the other parts.
        prices: what they cost each case; None where there are no new items.
        result: of the stage, see `fit_mixer`.
    """

    start: Mixer | None
    features: Tensor
    targets: Tensor
    part: np.ndarray
    mixers: list[Mixer]
    prices: Prices | None
    result: dict[str, Any]


def fit_mixer(space: Workspace, folder: Path) -> dict[str, Any]:
    """Train it and write mixer.safetensors into a stage's folder.

    Args:
        space: a run whose generator is tuned, with its sequence part.
        folder: the stage's.

    Returns:
        the manifest's result: "entry", the nats with which new items cost `mix.price`; and by mixers that did not learn
        from what they judge: "all", what one that orders all items does for N@10 among known items, of lists whose
        target is one; and where new items join, "new", what one that orders these alone does for the log-likelihood of
        all targets in their lists. Each has the number of "lists", the mean that they have "plain" and "mixed", and
        over cases the mean of what mixing gains and its standard "error". The first whose gain is more than `SURE`
        errors is used ("orders"): how many places new items then take is the price's business.

    Raises:
        ConfigError: too few lists hold their target.
    """
    found = cross_fitted(space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(space.recipe.seed)
        mixer = found.mixers[0] if found.start is None else _fitted(found.start, found.features, found.targets)
    if found.prices is not None:
        mixer.entry.fill_(found.prices.entry(space.recipe.mix.price))
    mixer.save(folder / MIXER)
    return found.result | {"entry": float(mixer.entry)}


def cross_fitted(space: Workspace) -> CrossFit:
    """Part the cases of ``space.mixes`` and teach a mixer for each part; arguments and errors as for `fit_mixer`."""
    backbone = space.tuned_backbone()
    parts = [] if backbone.item_scores is None else backbone.item_scores.names
    plain = Mixer(parts, space.mixed_keys, torch.from_numpy(space.popularity))
    pools, found = _pools(space, plain), _known(space, backbone, space.mixes)
    if pools[0].newcomers is not None:
        plain.temper.fill_(_temper(space, backbone, pools))
        log.info("mixer: new items inherit with a temper of %.2g", plain.temper)
    features, targets, cases, new = _lists(space, backbone, plain, pools, found)
    of_case = np.random.default_rng(space.recipe.seed).permutation(len(space.mixes)) % FOLDS
    part = torch.from_numpy(of_case[cases])  # by case: one stands in several lists
    if len(part.unique()) < FOLDS:
        raise ConfigError(
            f"mix.users: {len(np.unique(cases))} of {len(space.mixes)} lists hold their next item, too few to learn "
            "from; set it to 0"
        )
    before, result = _judged(plain, features, targets), {}
    for orders, counts in (("all", ~new), ("new", torch.ones_like(new))) if new.any() else (("all", ~new),):
        start = Mixer(parts, space.mixed_keys, torch.from_numpy(space.popularity), only_new=orders == "new")
        start.temper.copy_(plain.temper)
        mixed, mixers = torch.zeros_like(before), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(space.recipe.seed)
            for one in range(FOLDS):
                mixers.append(_fitted(copy.deepcopy(start), features[part != one], targets[part != one]))
                mixed[:, part == one] = _judged(mixers[-1], features[part == one], targets[part == one])
        of = int(orders == "new")  # N@10 or log-likelihood
        result[orders] = gain = _gain(before[of, counts], mixed[of, counts], cases[counts.numpy()])
        log.info("mixer of %s items: %s", orders, gain)
        if gain["gain"] > SURE * gain["error"]:
            break
    else:
        orders, start, mixers = None, None, [copy.deepcopy(plain) for _ in range(FOLDS)]
    prices = None
    if space.newcomers is not None:
        prices = _prices(space, backbone, mixers, of_case, found)
        for one, mixer in enumerate(mixers):
            mixer.entry.fill_(prices.of(torch.from_numpy(of_case != one)).entry(space.recipe.mix.price))
            log.info("mixer of part %d: new items enter with %.2f nats", one, mixer.entry)
    return CrossFit(start, features, targets, of_case, mixers, prices, {"orders": orders, **result})


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
    real = real[real[:, 2] > 0] if mixer.only_new else real
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
    """N@10 among known items and log-likelihood of the targets int64 [M] in their lists [M, C, F], float32 [2, M]."""
    logits = _logits(mixer.eval(), features)
    known = features[:, :, 2] == 0
    place = (known & (logits > logits.gather(1, targets[:, None]))).sum(1)
    nats = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return torch.stack([torch.where(place < 10, 1 / (place + 2).log2(), 0.0), nats])


def _known(space: Workspace, backbone: Backbone, cases: Cases) -> Ranked:
    """What a search among known items finds for cases."""
    return search_cases(
        backbone, space.prompter, cases, available=space.catalogue.available & ~space.split.cold,
        exclude_seen=space.recipe.data.exclude_seen, beams=space.recipe.evaluate.beams,
    )  # fmt: skip


def _said(space: Workspace, backbone: Backbone, cases: Cases, known_only: bool = False) -> tuple[Likely | None, Tensor]:
    """Item scores of B cases on the CPU, None where there are none; and what their lists may hold, bool [B, N]."""
    likely = backbone.likely(cases.histories, apart=True)
    available = space.catalogue.available & ~space.split.cold if known_only else space.catalogue.available
    allowed = allowed_items(torch.from_numpy(available), cases, space.recipe.data.exclude_seen)
    return None if likely is None else likely.cpu(), allowed


def _pools(space: Workspace, plain: Mixer) -> list[Pool]:
    """Parts of the known items; a single one of none where new items do not join."""
    known, relatives = torch.from_numpy(~space.split.cold), space.recipe.new_items.relatives
    keys = {name: plain.keys(name) for name in plain.modalities}
    if not relatives or not space.features:
        return [Pool(known.new_zeros(0, dtype=torch.int64), None, keys)]
    shuffled = np.random.default_rng(space.recipe.seed).permutation(np.flatnonzero(known))
    pools = []
    for rows in torch.from_numpy(shuffled[: len(shuffled) // POOLS * POOLS]).view(POOLS, -1):
        others = known.index_fill(0, rows, False)
        kin, fame = space.kinship_of(others).of(space.content_keys, space.stated)  # it never saw these items either
        newcomers = Newcomers.nearest(kin, fame, others, relatives, 0.0)
        pools.append(Pool(rows, newcomers, {name: kin if name == KIN else of for name, of in keys.items()}))
    return pools


@torch.inference_mode()
def _temper(space: Workspace, backbone: Backbone, pools: list[Pool]) -> float:
    """Which of `TEMPERS` tells best what was taken of a pool, on the cases that fine-tuning chose by."""
    cases = space.chooses
    found, nats = _known(space, backbone, cases), torch.zeros(len(TEMPERS))
    for start in range(0, len(cases), USERS_AT_ONCE):
        batch = cases[start : start + USERS_AT_ONCE]
        wanted = torch.from_numpy(batch.targets).long()
        likely, allowed = _said(space, backbone, batch, known_only=True)
        may = allowed.gather(1, wanted[:, None])[:, 0]
        for pool in pools:
            assert pool.newcomers is not None
            mine = (may & torch.isin(wanted, pool.rows)).nonzero()[:, 0]
            left = pool.hidden_from(Ranked(found.items[start + mine], found.scores[start + mine]))
            shares = known_shares(None if likely is None else likely.total[mine], allowed[mine], pool.newcomers)
            place = (pool.newcomers.rows == wanted[mine, None]).float().argmax(1, keepdim=True)
            for one, temper in enumerate(TEMPERS):
                inherited = pool.newcomers.inherited(left.items, left.scores, shares, allowed[mine], temper)
                nats[one] += inherited.log_softmax(1).gather(1, place).sum()
    return TEMPERS[int(nats.argmax())]


@torch.inference_mode()
def _prices(space: Workspace, backbone: Backbone, mixers: list[Mixer], part: np.ndarray, found: Ranked) -> Prices:
    """Of all cases, by the mixer of their part; beside a known item's place they know its list's tenth score, its best
    one and the history's length.

    Args:
        space, backbone, mixers, part: see `CrossFit`.
        found: known items of all cases.
    """
    rows_of, parts = [], []
    for one, mixer in enumerate(mixers):
        for rows in torch.from_numpy(np.flatnonzero(part == one)).split(USERS_AT_ONCE):
            batch = space.mixes[rows.numpy()]
            likely, allowed = _said(space, backbone, batch)
            of = Ranked(found.items[rows], found.scores[rows])
            items, scores = mixer.candidates(of, likely, allowed, space.newcomers)
            read = mixer.features(batch.histories, items, scores, likely)
            logits = mixer(read).masked_fill(items < 0, -torch.inf).log_softmax(1)
            new = read[:, :, 2] > 0
            hit = items == torch.from_numpy(batch.targets).long()[:, None]
            known, at = logits.masked_fill(new, -torch.inf).topk(min(LOOKED_AT, logits.shape[1]), dim=1)
            best = logits.masked_fill(~new, -torch.inf).topk(min(TOP, logits.shape[1]), dim=1).values
            plain = scores.masked_fill(new, -torch.inf).topk(min(TOP, scores.shape[1]), dim=1).indices
            about = torch.stack([read[:, 0, 4], read[:, 0, 0], read[:, 0, 5]], 1)
            rows_of.append(rows)
            parts.append((known, hit.gather(1, at), best, about, hit.gather(1, plain).any(1)))
    order = torch.cat(rows_of).argsort()
    return Prices(*(torch.cat(of)[order] for of in zip(*parts, strict=True)))


@torch.inference_mode()
def _lists(
    space: Workspace, backbone: Backbone, plain: Mixer, pools: list[Pool], found: Ranked
) -> tuple[Tensor, Tensor, np.ndarray, Tensor]:
    """The lists that hold their target: features float32 [M, C, F] with a score of -inf where a list has ended, the
    target's place int64 [M], the case that each list is of int64 [M], and whether its target plays a new item bool [M].

    Of known items that were `found` for all cases.
    """
    cases = space.mixes
    features, targets, users, new = [], [], [], []
    for start in range(0, len(cases), USERS_AT_ONCE):
        rows = slice(start, start + USERS_AT_ONCE)
        batch, wanted = cases[rows], torch.from_numpy(cases.targets[rows]).long()
        likely, allowed = _said(space, backbone, batch, known_only=True)
        for pool in pools:
            left = pool.hidden_from(Ranked(found.items[rows], found.scores[rows]))
            judge = plain.with_items(pool.keys, plain.popularity.index_fill(0, pool.rows, 0))
            items, scores = judge.candidates(left, likely, allowed, pool.newcomers)
            holds = (items == wanted[:, None]).any(1)
            of = judge.features(batch.histories, items, scores, likely)
            of[:, :, 0].masked_fill_(items < 0, -torch.inf)
            features.append(of[holds])
            targets.append((items == wanted[:, None]).float().argmax(1)[holds])
            users.append(start + holds.nonzero()[:, 0].numpy())
            new.append(torch.isin(wanted, pool.rows)[holds])
    return torch.cat(features), torch.cat(targets), np.concatenate(users), torch.cat(new)
