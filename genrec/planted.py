"""Planted worlds: item features, users and logs whose true preferences are known, to prove what a system does.

Every item has an *image* latent, one per patch, and a *text* latent; features are these latents behind a random
rotation, beside nuisance directions that say nothing. A user's utility of an item is a known function of the latents,
and logs and impressions are drawn from it, so the utility itself is the oracle. Each knob of `Planted` plants one
effect that a published system claims to use; at its default the effect is not there, which is that system's control.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator
from scipy.stats import ortho_group

from genrec.config import Settings
from genrec.encoders.features import Features
from genrec.splits import Cases, Split

LATENT = 8  # values of a latent
PATCH_NOISE = 0.1
STEEPNESS = 3.0  # of choices: a utility has a standard deviation of about one


class Planted(Settings):
    """What is planted in a world; at the defaults users choose by image and text alike, and nothing else is there."""

    n_items: int = Field(400, ge=40, description="items")
    n_users: int = Field(600, ge=20, description="users")
    events: int = Field(12, ge=3, description="training events per user")
    impressions: int = Field(0, ge=0, description="labelled impressions per user to learn from, and as many to test on")
    nuisance: float = Field(1.0, ge=0, description="size of the directions that say nothing, beside a latent's one")
    noise: float = Field(0.0, ge=0, description="noise on the latents' own directions")
    patches: int = Field(1, ge=1, le=8, description="vectors per picture")
    categories: int = Field(8, ge=1, description="categories; an item's is random")
    interests: int = Field(
        1, ge=1, le=8, description="visual interests per user; the one that fits an item best counts"
    )
    kinds: int = Field(0, ge=0, description="visual interests that there are at all; 0: each user's are its own")
    interest_by_category: bool = Field(False, description="an item's category says which interest counts")
    patch_by_category: bool = Field(False, description="an item's category says which patch counts, not their mean")
    modality_by_category: bool = Field(False, description="even categories are chosen by picture, odd ones by text")
    modality_by_user: bool = Field(False, description="each user goes by picture alone or by text alone")
    joint: bool = Field(False, description="utility is of the product of both latents, not of their sum")
    across: bool = Field(False, description="the pictures of a history say which texts are liked")
    duplicated: float = Field(0.0, ge=0, le=1, description="share of the text's latent that repeats the picture's")
    audio: bool = Field(False, description="a third modality, frames whose frequencies tell the image latent")
    popularity: float = Field(0.0, ge=0, description="size of a liking that all users share")
    even: bool = Field(False, description="latents of one length, so that no item is liked more than others by chance")
    order: float = Field(0.0, ge=0, description="how far the last event decides the next")
    groups: int = Field(1, ge=1, le=2, description="2: the second half of the users alone is tested on")
    fashion: float = Field(
        0.0, ge=0, description="size of a liking of pictures that the second half of the users share"
    )
    drift: bool = Field(False, description="what follows an event is another thing for the second half of the users")
    attributes: bool = Field(False, description="categories follow the text latent instead of chance")
    domains: int = Field(1, ge=1, le=4, description="domains of items; every user is in all of them")
    rotated: bool = Field(False, description="each domain shows its latents through a rotation of its own")
    cold_share: float = Field(0.0, ge=0, lt=1, description="items that nobody had while training")
    missing: float = Field(0.0, ge=0, lt=1, description="items without a picture")
    missing_new: float = Field(0.0, ge=0, lt=1, description="items without a picture, of those that nobody had")
    one_each: bool = Field(False, description="an item has either a picture or a text, not both")
    shuffled: bool = Field(False, description="features belong to other items: content says nothing")
    words: bool = Field(False, description="items have texts, a word for the range of each value of the text's latent")
    wrong_words: bool = Field(False, description="those texts belong to other items")

    @model_validator(mode="after")
    def _possible(self) -> Planted:
        if self.patch_by_category and self.patches == 1:
            raise ValueError("patch_by_category needs patches above 1")
        if self.interest_by_category and self.interests == 1:
            raise ValueError("interest_by_category needs interests above 1")
        if 0 < self.kinds < self.interests:
            raise ValueError("kinds is how many interests there are at all: it cannot be below interests")
        if self.drift and not self.order:
            raise ValueError("drift needs order above 0: it is the order that drifts")
        if self.missing_new and not self.cold_share:
            raise ValueError("missing_new needs cold_share above 0: without it no item is new")
        if self.wrong_words and not self.words:
            raise ValueError("wrong_words needs words: true")
        return self


@dataclass(frozen=True)
class Impressions:
    """Who saw what, and whether they took it: users and items int64 [n], labels float32 [n]."""

    users: np.ndarray
    items: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Table:
    """What a system learns from, planted or real.

    Attributes:
        features: modality -> features of all items.
        categories: int64 [N], 0 where there are none.
        domains: int64 [N].
        split: histories and cases; `Cases.users` and `Split.train_users` index users.
        n_users: U.
        train_impressions, test_impressions: labelled, or None.
        oracle: float32 [U, N], true utilities; None for real data.
        texts: one per item, or None.
    """

    features: dict[str, Features]
    categories: np.ndarray
    domains: np.ndarray
    split: Split
    n_users: int
    train_impressions: Impressions | None = None
    test_impressions: Impressions | None = None
    oracle: np.ndarray | None = None
    texts: list[str] | None = None

    @property
    def n_items(self) -> int:
        return len(self.categories)

    def sha256(self) -> str:
        """Of all that is learned from: features, categories, domains, histories, impressions, texts."""
        digest = hashlib.sha256("\n".join(self.texts or []).encode())
        shown = self.train_impressions
        for array in (
            *(of.values for of in self.features.values()),
            *(of.present for of in self.features.values()),
            self.categories,
            self.domains,
            self.split.train_users,
            *self.split.train,
            *(() if shown is None else (shown.users, shown.items, shown.labels)),
        ):
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _seen(latents: np.ndarray, domains: np.ndarray, knobs: Planted, rng: np.random.Generator) -> np.ndarray:
    """What an encoder would give for latents [N, T, LATENT]: float32 [N, T, 3 * LATENT]."""
    n, patches, _ = latents.shape
    nuisance = rng.normal(size=(n, patches, 2 * LATENT)) * knobs.nuisance
    own = latents + rng.normal(size=latents.shape) * (PATCH_NOISE + knobs.noise)
    mixes = [ortho_group.rvs(3 * LATENT, random_state=rng) for _ in range(knobs.domains if knobs.rotated else 1)]
    both = np.concatenate([own, nuisance], 2)
    which = domains % len(mixes)
    return np.einsum("ntd,nde->nte", both, np.stack(mixes)[which]).astype(np.float32)


def _frames(latents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sounds of latents [N, LATENT]: one wave per value whose frequency tells it, float32 [N, 24, LATENT].

    The mean over time says nothing: a model has to look at neighbouring frames.
    """
    at = np.arange(24)[None, :, None]
    speed = 0.9 + 0.5 * np.tanh(latents)[:, None, :]
    phase = rng.uniform(0, 2 * np.pi, size=(len(latents), 1, latents.shape[1]))
    waves = np.sin(speed * at + phase) + 0.1 * rng.normal(size=(len(latents), 24, latents.shape[1]))
    return waves.astype(np.float32)


def _utility(
    image: np.ndarray, text: np.ndarray, categories: np.ndarray, knobs: Planted, rng: np.random.Generator
) -> np.ndarray:
    """How much every user likes every item: float64 [U, N], about one in size."""
    n_users, scale = knobs.n_users, LATENT**0.5
    tastes = rng.normal(size=(n_users, knobs.interests, LATENT))
    if knobs.kinds:
        which = np.stack([rng.permutation(knobs.kinds)[: knobs.interests] for _ in range(n_users)])
        tastes = rng.normal(size=(knobs.kinds, LATENT))[which]
    words = rng.normal(size=(n_users, LATENT))
    picture = image[np.arange(len(image)), categories % knobs.patches] if knobs.patch_by_category else image.mean(1)
    by_interest = (
        np.einsum("ukd,nd->ukn", tastes, picture) / scale * (1 if knobs.patch_by_category else knobs.patches**0.5)
    )
    if knobs.interest_by_category:
        visual = by_interest[:, categories % knobs.interests, np.arange(len(categories))]
    else:
        visual = by_interest.max(1)
    if knobs.across:
        words = tastes[:, 0] @ ortho_group.rvs(LATENT, random_state=rng)
    verbal = words @ text.T / scale
    if knobs.fashion:
        visual[n_users // 2 :] += knobs.fashion * (picture @ rng.normal(size=LATENT)) / scale
        return visual
    if knobs.joint:
        return np.einsum("ud,nd->un", words, picture * text) / scale
    if knobs.modality_by_category:
        return np.where(categories % 2 == 0, visual, verbal)
    if knobs.modality_by_user:
        return np.where(rng.random((n_users, 1)) < 0.5, visual, verbal)
    if knobs.patch_by_category or knobs.interests > 1 or knobs.audio:
        return visual
    return (visual + verbal) / 2**0.5


def plant(knobs: Planted, seed: int) -> Table:
    """One world; the same knobs and seed give the same arrays."""
    rng = np.random.default_rng(seed)
    n = knobs.n_items
    image = rng.normal(size=(n, knobs.patches, LATENT))
    text = rng.normal(size=(n, LATENT))
    text = (1 - knobs.duplicated) ** 0.5 * text + knobs.duplicated**0.5 * image.mean(1) * knobs.patches**0.5
    if knobs.even:
        image *= LATENT**0.5 / np.linalg.norm(image, axis=2, keepdims=True)
        text *= LATENT**0.5 / np.linalg.norm(text, axis=1, keepdims=True)
    domains = rng.integers(knobs.domains, size=n)
    categories = rng.integers(knobs.categories, size=n)
    if knobs.attributes:
        categories = (text @ rng.normal(size=(LATENT, knobs.categories))).argmax(1)
    utility = STEEPNESS * _utility(image, text, categories, knobs, rng)
    utility += knobs.popularity * rng.normal(size=n)
    split = _histories(utility, image.mean(1), knobs, rng)
    shown = {"image": _seen(image, domains, knobs, rng), "text": _seen(text[:, None], domains, knobs, rng)}
    if knobs.audio:
        shown["audio"] = _frames(image.mean(1), rng)
    present = {m: np.ones(n, bool) for m in shown}
    present["image"] = rng.random(n) >= (0.5 if knobs.one_each else knobs.missing)
    if knobs.missing_new:
        present["image"] &= ~split.cold | (rng.random(n) >= knobs.missing_new)
    if knobs.one_each:
        present["text"] = ~present["image"]
    for m, there in present.items():
        shown[m][~there] = 0
    if knobs.shuffled:
        other = rng.permutation(n)
        shown, present = {m: x[other] for m, x in shown.items()}, {m: x[other] for m, x in present.items()}
    impressions = [_impressions(utility, knobs.impressions, rng) for _ in range(2)] if knobs.impressions else [None] * 2
    return Table(
        features={m: Features(shown[m], present[m]) for m in shown},
        categories=categories,
        domains=domains,
        split=split,
        n_users=knobs.n_users,
        train_impressions=impressions[0],
        test_impressions=impressions[1],
        oracle=utility.astype(np.float32),
        texts=_texts(text, knobs, rng) if knobs.words else None,
    )


def _texts(latents: np.ndarray, knobs: Planted, rng: np.random.Generator) -> list[str]:
    """One line per item of LATENT words; word d says in which quarter latents [N, LATENT] lie in dimension d."""
    spoken = np.array([[start + end for end in ("ana", "elo", "iru", "uti")] for start in "bcdfghjk"])
    quarter = np.digitize(latents, [-0.674, 0, 0.674])  # of a normal distribution
    lines = [" ".join(spoken[np.arange(LATENT), of]) for of in quarter]
    return [lines[i] for i in rng.permutation(len(lines))] if knobs.wrong_words else lines


def _histories(utility: np.ndarray, latents: np.ndarray, knobs: Planted, rng: np.random.Generator) -> Split:
    """Draw every user's events, no item twice; the last two are asked for, and one cold item where there are any."""
    n_users, n = utility.shape
    cold = np.zeros(n, bool)
    cold[rng.permutation(n)[: round(knobs.cold_share * n)]] = True
    left = utility + rng.gumbel(size=utility.shape)
    cold_targets = np.where(cold, left, -np.inf).argmax(1)
    left[:, cold] = -np.inf
    steps = knobs.events + 2
    if knobs.order:
        turns = [ortho_group.rvs(LATENT, random_state=rng) for _ in range(1 + knobs.drift)]
        follows = knobs.order * STEEPNESS * np.stack([latents @ t @ latents.T for t in turns]) / LATENT**0.5
        which = (np.arange(n_users) >= n_users // 2) * int(knobs.drift)
        events = np.empty((n_users, steps), np.int32)
        events[:, 0] = left.argmax(1)
        for at in range(1, steps):
            left[np.arange(n_users), events[:, at - 1]] = -np.inf
            noise = rng.gumbel(size=utility.shape)
            events[:, at] = (
                np.where(np.isinf(left), left, utility + follows[which, events[:, at - 1]] + noise)
            ).argmax(1)
    else:
        events = rng.permuted(np.argsort(-left, 1)[:, :steps], axis=1).astype(np.int32)
    users = np.arange(n_users)
    test = Cases(users, list(events[:, :-1]), events[:, -1])
    if cold.any():
        test = Cases(
            np.tile(users, 2), test.histories * 2, np.concatenate([test.targets, cold_targets.astype(np.int32)])
        )
    if knobs.groups == 2:
        keep = np.flatnonzero(test.users >= n_users // 2)
        test = test[keep]
    valid = Cases(users, list(events[:, :-2]), events[:, -2])
    return Split("planted", list(events[:, :-2]), users, valid, test, cold)


def _impressions(utility: np.ndarray, each: int, rng: np.random.Generator) -> Impressions:
    """Random items shown to every user; they take what they like more than their middle, by a steep coin."""
    n_users, n = utility.shape
    users = np.repeat(np.arange(n_users), each)
    items = rng.integers(n, size=len(users))
    chance = 1 / (1 + np.exp(-(utility - np.median(utility, 1, keepdims=True))[users, items]))
    return Impressions(users, items, (rng.random(len(users)) < chance).astype(np.float32))
