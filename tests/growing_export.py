"""A tiny whole export that takes later items: real encoders, quantiser, adapter and newcomers, random weights.

Built from `Parts` for any number of items, so that one that grew can be compared with one that always held them all.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import sparse

from genrec.adapters import build_adapter
from genrec.adapters.facts import FactSpace
from genrec.adapters.item_scores import ItemScores
from genrec.adapters.kinship import KIN, Kinship
from genrec.adapters.mixer import Mixer
from genrec.adapters.neighbours import follower_table, neighbour_table
from genrec.adapters.newcomers import Newcomers
from genrec.adapters.profile import KeySpace, Profile
from genrec.adapters.self_attention import Network
from genrec.adapters.sequence import HEADS, SequenceScores
from genrec.adapters.words import WORDS, WordSpace
from genrec.artefacts import run_stage
from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders import encode
from genrec.encoders.features import Features
from genrec.encoders.frozen import FrozenEncoder
from genrec.item_vectors import cooccurrence_factors
from genrec.semantic_ids import SemanticIds, fit_semantic_ids
from genrec.serving.export import write_export
from genrec.serving.intake import Intake
from tests.export_fixture import CODES, LEVELS, SOFT_PROMPT, SOFT_TOKENS, make_base, make_catalogue

WIDTH, RELATIVES, LIFT = 64, 3, 0.5
ADAPTER: dict[str, Any] = {"kind": "linear", "width": 16, "dropout": 0.0}


def picture(seed: int, form: str = "PNG") -> bytes:
    """A random picture."""
    pixels = np.random.default_rng([7, seed]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


@dataclass(frozen=True)
class Parts:
    """What a run leaves, before it is an export."""

    catalogue: Catalogue
    features: dict[str, Features]
    unseen: np.ndarray  # bool [N]
    log: list[np.ndarray]
    popularity: np.ndarray
    ids: SemanticIds
    space: KeySpace
    keys: dict[str, torch.Tensor]  # of the run's items
    words: WordSpace
    facts: FactSpace
    stated: sparse.csr_matrix  # of the run's items
    kinship: Kinship
    base: tuple[Any, Any, Any]
    adapter: torch.nn.Module
    weights: dict[str, torch.Tensor]  # of the item scores
    sequence: dict[str, torch.Tensor]
    soft_prompt: torch.Tensor


def make_parts(folder: Path, *, profile: bool = True, n_items: int = 40, seed: int = 0) -> Parts:
    """Items of which every fifth is in no history and every third has no picture."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    catalogue = make_catalogue(n_items, rng)
    images: list[str | None] = [None] * n_items
    for row in range(n_items):
        if row % 3:
            file = folder / f"{row}.png"
            file.write_bytes(picture(row))
            images[row] = str(file)
    catalogue = replace(catalogue, images=images)
    settings = Encoder(dim=12)
    features = {m: encode(catalogue, m, settings, folder) for m in ("text", "image")}
    unseen = np.arange(n_items) % 5 == 4
    log = [rng.choice(np.flatnonzero(~unseen), 6).astype(np.int32) for _ in range(2 * n_items)]
    popularity = np.bincount(np.concatenate(log), minlength=n_items)
    unseen = popularity == 0
    ids = fit_semantic_ids(features, method="residual_kmeans", levels=LEVELS, codes=CODES, seed=seed, fit_on=~unseen)
    space = KeySpace.fit(features, ~unseen, 10)
    dims = {m: of.values.shape[2] for m, of in features.items()}
    adapter = build_adapter(dims=dims, soft_tokens=SOFT_TOKENS, dim=WIDTH, rms=0.1, **ADAPTER).eval()
    keys = space.keys(features)
    scores = _scores(Profile(keys) if profile else None, log, n_items)
    for weight in scores.parameters():
        weight.data += torch.randn_like(weight) * 0.1
    inputs = torch.cat([*keys.values()], 1) if profile else None
    facts = FactSpace.fit(catalogue, ~unseen)
    stated, factors = facts.keys(catalogue), cooccurrence_factors(log, n_items, 16, seed)
    kinship = Kinship.fit(keys, stated, factors, popularity, torch.from_numpy(~unseen))
    network = Network(n_items, 5, width=8, layers=1, heads=HEADS, dropout=0.0, features=inputs)
    return Parts(
        catalogue, features, unseen, log, popularity, ids, space, keys, WordSpace.fit(catalogue.texts(), ~unseen),
        facts, stated, kinship, make_base("qwen3", catalogue.texts()), adapter, scores.state_dict(),
        SequenceScores(network, 0.5).tensors(),
        torch.randn(SOFT_PROMPT, WIDTH) * 0.1,
    )  # fmt: skip


def _scores(profile: Profile | None, log: list[np.ndarray], n_items: int) -> ItemScores:
    return ItemScores(profile, neighbour_table(log, n_items, 10), follower_table(log, n_items, 10))


def write(parts: Parts, folder: Path, *, text: Encoder | None = None) -> Path:
    """The export of parts; `text`: another encoder in place of the built-in one that was used."""
    n_items = len(parts.catalogue)
    keys = parts.space.keys(parts.features)
    near = {m: of.clone() for m, of in keys.items()}
    seen = ~parts.unseen[: len(next(iter(parts.keys.values())))]
    for m, of in parts.keys.items():
        near[m][: len(of)][seen] = of[seen]  # relatives are found by what the run knew of them
    stated = parts.facts.keys(parts.catalogue)
    kin, stated = {KIN: parts.kinship.of(keys, stated)[0]}, stated.tolil()
    stated[np.flatnonzero(seen)] = parts.stated[seen]
    near_kin, fame = parts.kinship.of(near, stated.tocsr())
    profile = Profile(keys) if "gate.0.weight" in {name.removeprefix("profile.") for name in parts.weights} else None
    scores = _scores(profile, parts.log, n_items)
    scores.load_state_dict(parts.weights)
    scores.sequence = SequenceScores.of_tensors(parts.sequence)
    words = None if profile is None else {WORDS: parts.words.keys(parts.catalogue.texts())}
    mixer = Mixer(scores.names, {} if words is None else keys | kin | words, torch.from_numpy(parts.popularity))
    weights = torch.randn(mixer.plain.weight.shape, generator=torch.Generator().manual_seed(8))
    mixer.plain.weight.data += 0.3 * weights
    tokenizer, layout, model = parts.base
    settings = {"text": text or Encoder(dim=12), "image": Encoder()}
    intake = Intake(
        encoders={
            m: FrozenEncoder(m, settings[m], {} if m == "text" and text else of.fitted, of.values.shape[1:])
            for m, of in parts.features.items()
        },
        quantiser=parts.ids,
        space=parts.space,
        relatives=RELATIVES,
        lift=LIFT,
        words=None if words is None else parts.words,
        facts=parts.facts,
        kinship=parts.kinship,
    )
    with torch.inference_mode():
        soft = parts.adapter(
            {m: torch.from_numpy(of.values) for m, of in parts.features.items()},
            {m: torch.from_numpy(of.present) for m, of in parts.features.items()},
        )

    def build(work: Path) -> Mapping[str, Any]:
        return write_export(
            work,
            model=model,
            tokenizer=tokenizer,
            layout=layout,
            catalogue=parts.catalogue,
            codes=parts.ids.codes,
            popularity=parts.popularity,
            soft_items=soft.clone(),
            soft_prompt=parts.soft_prompt,
            item_scores=scores,
            newcomers=Newcomers.nearest(near_kin, fame, torch.from_numpy(~parts.unseen), RELATIVES, LIFT),
            mixer=mixer,
            keys=kin | (words or {}),
            intake=intake,
            adapter_state=parts.adapter.state_dict(),
            adapter_settings={**ADAPTER, "dims": {m: of.values.shape[2] for m, of in parts.features.items()}},
            tasks=[],
            card="# A tiny export that takes items\n",
        )

    return run_stage(folder, "export", {"n_items": n_items}, {}, build)


def grown(parts: Parts, items: Catalogue, features: dict[str, Features], codes: np.ndarray) -> Parts:
    """The parts of a run that had these items as well, in no history, or had them as they are here.

    Args:
        parts: of the run.
        items: M items.
        features: of all items, the run's and then the new ones.
        codes: int32 [N', L], of all.
    """
    catalogue = parts.catalogue.merged(items)
    more = len(catalogue) - len(parts.catalogue)
    vectors = parts.sequence["network.items.weight"]
    sequence = dict(parts.sequence)
    sequence["network.items.weight"] = torch.cat([vectors, vectors[parts.unseen].mean(0).expand(more, -1)])
    if "features" in sequence:
        sequence["features"] = torch.cat([*parts.space.keys(features).values()], 1)
    return replace(
        parts,
        catalogue=catalogue,
        features=features,
        unseen=np.concatenate([parts.unseen, np.ones(more, bool)]),
        popularity=np.concatenate([parts.popularity, np.zeros(more, np.int64)]),
        ids=replace(parts.ids, codes=codes),
        sequence=sequence,
    )
