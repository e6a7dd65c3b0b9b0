"""The embedded catalogue: a shop whose truth is known, so that every number has a ceiling and a control.

Items have a picture (shape, colour, pattern: never told in words), a text (brand, material, use, category,
price: never shown in the picture) and a popularity that follows none of them. By default one third of the
users choose by the picture, one third by the text, the rest by order (from each category to its successor on
one fixed cycle, with a brand they like). The next item is drawn from softmax(utility + log popularity) over
what is released and not yet taken.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from genrec.config import Synthetic
from genrec.errors import ArtefactError
from genrec.synthetic_pictures import COLOURS, PATTERNS, SHAPES, draw_picture

KINDS = ("picture", "text", "order")
BRANDS = (
    *("Aldermoor", "Brightwell", "Castellan", "Dovecote", "Elmhurst", "Fairholt"),
    *("Garrick", "Hollins", "Ivanhoe", "Juniper", "Kestrel", "Larkfield"),
)
MATERIALS = ("oak", "steel", "glass", "linen", "leather", "ceramic", "bamboo", "wool")
USES = ("travel", "kitchen", "garden", "office", "nursery", "sport", "bathroom", "workshop")
CATEGORIES = (
    *("lamp", "mug", "chair", "clock", "vase", "bag", "blanket", "tray", "basket", "shelf"),
    *("mirror", "bottle", "stool", "notebook", "candle", "cushion", "kettle", "bowl", "hook", "frame"),
)
SIZES = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "pattern": len(PATTERNS),
    "brand": len(BRANDS),
    "material": len(MATERIALS),
    "use": len(USES),
    "category": len(CATEGORIES),
}
TASTES = (
    ("colour", "shape", "pattern"),
    ("brand", "material", "use"),
    ("brand",),
)  # per kind; in utility's order
UTILITY = ((4.0, 4.0, 4.0), (4.0, 4.0, 4.0), (2.4,))  # nats per match; tuned for the oracle's band in the tests
STEP_UTILITY = 5.0  # nats for the successor category, order users only
ZIPF = 0.4  # popularity of the r-th item is r ** -ZIPF
EVENTS = (6, 16)  # events per user, both included
START_S = 1_704_067_200.0  # 2024-01-01 UTC
YEAR_S = 365 * 86_400.0
RELEASE = 0.85  # share of the year after which cold items can be chosen
_BLOCK = 1024  # users simulated at a time
_SENTENCES = (
    "A {material} {category} made for {use} by {brand}.",
    "{brand} designed this {category} in {material}, meant for {use}.",
    "For {use}: a well made {category} of {material}.",
    "This {category} in fine {material} is at home in {use} and comes from {brand}.",
)


@dataclass(frozen=True)
class Truth:
    """What nobody but the generator knows.

    Attributes:
        user_ids: U user ids, sorted.
        item_ids: N item ids in row order.
        kinds: int8 [U], index into `KINDS`.
        interests: int16 [U, n_interests, 3], wanted values of the kind's `TASTES` (unused places are -1).
        attributes: name -> int16 [N], each item's value of every attribute in `SIZES`.
        successor: int16 [categories], the category that follows each category.
        log_popularity: float64 [N].
        cold: bool [N], released late.
        noise: share of events drawn by popularity alone.
    """

    user_ids: list[str]
    item_ids: list[str]
    kinds: np.ndarray
    interests: np.ndarray
    attributes: dict[str, np.ndarray]
    successor: np.ndarray
    log_popularity: np.ndarray
    cold: np.ndarray
    noise: float

    def utility(self, users: np.ndarray) -> np.ndarray:
        """What each user's best-fitting interest gives each item, without popularity: float32 [B, N], nats.

        Args:
            users: int64 [B] rows of `user_ids`.
        """
        best = np.zeros((len(users), len(self.item_ids)), dtype=np.float32)
        for kind, names in enumerate(TASTES):
            mine = np.flatnonzero(self.kinds[users] == kind)
            gains = np.zeros((len(mine), self.interests.shape[1], best.shape[1]), dtype=np.float32)
            for place, name in enumerate(names):
                wanted = self.interests[users[mine], :, place, None]  # [b, n_interests, 1]
                gains += np.float32(UTILITY[kind][place]) * (wanted == self.attributes[name])
            best[mine] = gains.max(axis=1)
        return best

    def step(self, users: np.ndarray, last: np.ndarray) -> np.ndarray:
        """What the last event adds for order users: float32 [B, N], nats.

        Args:
            users: int64 [B] rows of `user_ids`.
            last: int64 [B] row of each user's last item, -1 before the first event.
        """
        category = self.attributes["category"]
        follows = self.successor[category[last]][:, None] == category
        moves = (self.kinds[users] == KINDS.index("order")) & (last >= 0)
        return np.float32(STEP_UTILITY) * (follows & moves[:, None])

    def scores(self, user_ids: list[str], histories: list[np.ndarray]) -> np.ndarray:
        """True log-probability of each user's next item: the ceiling of every table.

        It knows the taste, the order and the share of noise, not which events are noise. Probabilities are
        normalised over the items not in the history; an item of the history gets what it would have if it
        could come again.

        Args:
            user_ids: B known users.
            histories: B int arrays of item rows, oldest first, possibly empty.

        Returns:
            float32 [B, N].

        Raises:
            KeyError: a user that is not of this catalogue.
        """
        row = {user: index for index, user in enumerate(self.user_ids)}
        users = np.array([row[user] for user in user_ids], dtype=np.int64)
        last = np.array([history[-1] if len(history) else -1 for history in histories], dtype=np.int64)
        taken = np.zeros((len(users), len(self.item_ids)), dtype=bool)
        for mask, history in zip(taken, histories, strict=True):
            mask[history] = True
        popular = np.broadcast_to(np.exp(self.log_popularity), taken.shape)
        wanted = np.exp(self.utility(users) + self.step(users, last) + self.log_popularity)

        def share(weight: np.ndarray) -> np.ndarray:
            return weight / np.where(taken, 0.0, weight).sum(axis=1, keepdims=True)

        return np.log((1 - self.noise) * share(wanted) + self.noise * share(popular)).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `truth.npz`."""
        arrays = {name: np.asarray(value) for name, value in vars(self).items() if name != "attributes"}
        arrays |= {f"item_{name}": values for name, values in self.attributes.items()}
        with (folder / "truth.npz").open("wb") as handle:
            np.savez_compressed(handle, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """Read `truth.npz`.

        Raises:
            ArtefactError: there is none, so the data are not the embedded catalogue's.
        """
        path = folder / "truth.npz"
        if not path.is_file():
            raise ArtefactError(f"{path}: not found; only the embedded catalogue (data.synthetic) has one")
        with np.load(path) as held:
            plain = {field.name: held[field.name] for field in fields(cls) if field.name != "attributes"}
            plain["user_ids"], plain["item_ids"] = plain["user_ids"].tolist(), plain["item_ids"].tolist()
            plain["noise"] = float(plain["noise"])
            return cls(**plain, attributes={name: held[f"item_{name}"] for name in SIZES})


def _make_truth(settings: Synthetic, rng: np.random.Generator) -> Truth:
    n_items, n_users = settings.n_items, settings.n_users
    bounds = np.cumsum([settings.image_share, settings.text_share])
    kinds = rng.permutation(np.searchsorted(bounds, (np.arange(n_users) + 0.5) / n_users, side="right"))
    interests = np.full((n_users, settings.n_interests, 3), -1, dtype=np.int16)
    for kind, names in enumerate(TASTES):
        for place, name in enumerate(names):
            drawn = rng.integers(SIZES[name], size=(n_users, settings.n_interests))
            interests[kinds == kind, :, place] = drawn[kinds == kind]
    attributes = {  # balanced: each value is on about the same number of items
        name: rng.permutation((np.arange(n_items) % size).astype(np.int16)) for name, size in SIZES.items()
    }
    cycle = rng.permutation(SIZES["category"])
    successor = np.empty(SIZES["category"], dtype=np.int16)
    successor[cycle] = np.roll(cycle, -1)
    return Truth(
        user_ids=[f"user-{row:06d}" for row in range(n_users)],
        item_ids=[f"item-{row:06d}" for row in range(n_items)],
        kinds=kinds.astype(np.int8),
        interests=interests,
        attributes=attributes,
        successor=successor,
        log_popularity=-ZIPF * np.log(1.0 + rng.permutation(n_items)),
        cold=rng.permutation(n_items) < round(settings.cold_share * n_items),
        noise=settings.noise,
    )


def _simulate(truth: Truth, users: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some users' events, grouped by user: user rows int64 [E], item rows int64 [E], times float64 [E]."""
    most, n_items = EVENTS[1], len(truth.item_ids)
    lengths = np.minimum(rng.integers(EVENTS[0], most + 1, size=len(users)), n_items - int(truth.cold.sum()))
    happens = np.arange(most) < lengths[:, None]  # [b, most]
    year = np.sort(np.where(happens, rng.random(happens.shape), 2.0), axis=1)  # the rest goes last
    items = np.zeros(happens.shape, dtype=np.int64)
    taken = np.zeros((len(users), n_items), dtype=bool)
    taste, popularity = truth.utility(users), truth.log_popularity.astype(np.float32)
    last = np.full(len(users), -1, dtype=np.int64)
    for place in range(most):
        wanted = taste + truth.step(users, last)
        wanted[rng.random(len(users)) < truth.noise] = 0.0
        closed = taken | (truth.cold & (year[:, place, None] < RELEASE))
        # the largest of log-probability + Gumbel noise is a draw from the softmax
        draw = wanted + popularity - np.log(rng.standard_exponential(taste.shape))
        last = np.where(closed, -np.inf, draw).argmax(axis=1)
        items[:, place] = last
        taken[np.arange(len(users)), last] = True
    times = START_S + np.floor(YEAR_S * year) + np.arange(most)  # whole seconds, never two at once
    return np.repeat(users, lengths), items[happens], times[happens]


def _write_items(truth: Truth, rng: np.random.Generator, folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    prices = np.round(np.exp(rng.normal(3.0, 0.6, len(truth.item_ids))), 2)
    sentences = rng.integers(len(_SENTENCES), size=len(truth.item_ids))
    lines = []
    for row, item_id in enumerate(tqdm(truth.item_ids, desc="draw pictures", leave=False)):
        has = {name: int(values[row]) for name, values in truth.attributes.items()}
        words = {
            "brand": BRANDS[has["brand"]],
            "material": MATERIALS[has["material"]],
            "use": USES[has["use"]],
            "category": CATEGORIES[has["category"]],
        }
        item = {
            "item_id": item_id,
            "title": "{brand} {material} {category}".format_map(words),
            "description": _SENTENCES[sentences[row]].format_map(words),
            "categories": [words["category"]],
            "attributes": {name: words[name] for name in ("brand", "material", "use")},
            "price": float(prices[row]),
            "images": [f"pictures/{item_id}.png"],
        }
        lines.append(json.dumps(item) + "\n")
        png = io.BytesIO()
        draw_picture(has["shape"], has["colour"], has["pattern"], rng).save(png, "PNG", compress_level=1)
        (folder / "pictures" / f"{item_id}.png").write_bytes(png.getvalue())
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")


def make_synthetic(settings: Synthetic, seed: int, folder: Path) -> Truth:
    """Write `items.jsonl`, `pictures/`, `interactions.parquet` and `truth.npz`; same seed, same bytes.

    Args:
        settings: sizes, shares of the kinds of users, noise.
        seed: every random choice follows from it.
        folder: made when it is not there; paths of pictures in `items.jsonl` are relative to it.

    Returns:
        What was planted.
    """
    for_truth, for_items, for_log = np.random.SeedSequence(seed).spawn(3)
    truth = _make_truth(settings, np.random.default_rng(for_truth))
    _write_items(truth, np.random.default_rng(for_items), folder)
    rng = np.random.default_rng(for_log)
    blocks = [
        _simulate(truth, np.arange(start, min(start + _BLOCK, settings.n_users)), rng)
        for start in tqdm(range(0, settings.n_users, _BLOCK), desc="simulate users", leave=False)
    ]
    users, items, times = (np.concatenate(column) for column in zip(*blocks, strict=True))
    order = np.argsort(times, kind="stable")
    table = pa.table(
        {
            "user_id": pa.array(truth.user_ids).take(pa.array(users[order])),
            "item_id": pa.array(truth.item_ids).take(pa.array(items[order])),
            "timestamp": pa.array(times[order], pa.float64()),
        }
    )
    pq.write_table(table, folder / "interactions.parquet")
    truth.save(folder)
    return truth
