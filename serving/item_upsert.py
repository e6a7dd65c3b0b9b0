"""From one state of the items to the next, without touching the first: what answers from it goes on meanwhile.

Rows of old items keep their numbers, new ones stand behind them. An old item keeps its id, which the model learned, and
gets the rest from its new content; a new one is treated as the run treated items that it held out of training.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from genrec.adapters import build_adapter
from genrec.adapters.kinship import KIN
from genrec.adapters.newcomers import Newcomers
from genrec.catalog import Catalogue
from genrec.encoders.features import Features
from genrec.errors import ArtefactError
from genrec.serving.export import Export
from genrec.serving.intake import Intake


def load_adapter(export: Export) -> nn.Module | None:
    """The adapter of an export, on the CPU; None where it has no soft tokens.

    Raises:
        ArtefactError: adapter.safetensors is missing, damaged or another adapter's.
    """
    layout, settings = export.layout, dict(export.manifest["result"]["adapter"])
    if not layout.soft_tokens:
        return None
    file = export.folder / "adapter.safetensors"
    try:
        kind, dims = settings.pop("kind"), settings.pop("dims")
        adapter = build_adapter(kind, dims, layout.soft_tokens, export.items.shape[2], rms=1.0, **settings)
        adapter.load_state_dict(load_file(file))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as err:
        raise ArtefactError(f"{file}: no adapter of this export ({err}); export the run again") from err
    return adapter.eval().requires_grad_(False)


def new_codes(export: Export, intake: Intake, items: Catalogue, features: dict[str, Features]) -> np.ndarray:
    """Ids int32 [M, L] of items: their own where the export holds them, else of those that are free.

    Raises:
        ConfigError: fewer free ids than new items.
    """
    rows = np.array([export.catalogue.index.get(item_id, -1) for item_id in items.item_ids], np.int64)
    codes = export.codes[rows]
    new = rows < 0
    if new.any():
        read = {name: Features(one.values[new], one.present[new]) for name, one in features.items()}
        codes[new] = intake.codes(read, export.codes)
    return codes


def with_items(
    export: Export,
    intake: Intake,
    adapter: nn.Module | None,
    items: Catalogue,
    features: dict[str, Features],
    codes: np.ndarray,
) -> Export:
    """The export that holds items as well, or holds them as they are now.

    Args:
        export: stays as it is.
        intake: of the export.
        adapter: of the export.
        items: M items.
        features: modality -> features of the M items.
        codes: int32 [M, L], from `new_codes`.
    """
    catalogue = export.catalogue.merged(items)
    before, after = len(export.catalogue), len(catalogue)
    rows = torch.tensor([catalogue.index[item_id] for item_id in items.item_ids])
    new = rows >= before
    popularity = np.concatenate([export.popularity, np.zeros(after - before, export.popularity.dtype)])
    (keys, fame), scores, mixer = intake.keys(features, items), export.item_scores, export.mixer
    if mixer is not None:
        theirs = keys | intake.word_keys(items)
        read = {name: _put(mixer.keys(name).cpu(), rows, theirs[name]) for name in mixer.modalities}
        mixer = mixer.with_items(read, torch.from_numpy(popularity))
    if scores is not None:
        profile = scores.profile
        whole = {} if profile is None else {name: _put(profile.keys(name).cpu(), rows, keys[name]) for name in features}
        scores = scores.grown(after, whole, torch.from_numpy(export.popularity == 0))
    return export.with_items(
        catalogue=catalogue,
        codes=np.concatenate([export.codes, codes[new.numpy()]]),
        popularity=popularity,
        items=_put(export.items, rows, _soft_tokens(export, adapter, features)),
        item_scores=scores,
        newcomers=_newcomers(export, intake, rows, keys, fame, popularity),
        mixer=mixer,
        renewed=export.renewed | frozenset(rows[~new].tolist()),
    )


def _put(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of a table [N, ...] with values [M, ...] at rows int64 [M], which may lie behind its end, without gaps."""
    grown = torch.cat([table, table.new_zeros(max(0, int(rows.max()) + 1 - len(table)), *table.shape[1:])])
    grown[rows] = values.to(grown)
    return grown


@torch.inference_mode()
def _soft_tokens(export: Export, adapter: nn.Module | None, features: dict[str, Features]) -> Tensor:
    """[M, K, D] of M items."""
    n_items = len(next(iter(features.values())).present)
    if adapter is None:
        return export.items.new_zeros(n_items, *export.items.shape[1:])
    values = {name: torch.from_numpy(one.values) for name, one in features.items()}
    found: Tensor = adapter(values, {name: torch.from_numpy(one.present) for name, one in features.items()})
    return found


def _newcomers(
    export: Export, intake: Intake, rows: Tensor, keys: dict[str, Tensor], fame: Tensor, popularity: np.ndarray
) -> Newcomers | None:
    """The export's newcomers, and those of the rows int64 [M] that no history holds.

    Relatives are found by what the run knew of them: so nobody else's change with an item's, and it does not matter in
    which order items came.

    Args:
        export: before the items came.
        intake: of the export.
        rows: where the items are now.
        keys, fame: [M, E_m] by name and [M], theirs, see `Intake.keys`.
        popularity: int64 [N], of all items now.
    """
    known = torch.from_numpy(np.flatnonzero(export.popularity > 0))
    unseen = torch.from_numpy(popularity)[rows] == 0
    if not intake.relatives or not len(known) or not unseen.any():
        return export.newcomers
    at = torch.cat([known, rows[unseen]])
    is_known = torch.arange(len(at)) < len(known)
    both = torch.cat([export.keys[KIN][known], keys[KIN][unseen]])
    theirs = torch.cat([torch.zeros(len(known)), fame[unseen]])  # of known items nobody asks
    found = Newcomers.nearest(both, theirs, is_known, intake.relatives, intake.lift)
    more = Newcomers(at[found.rows], at[found.relatives], found.weights, found.lift)
    return more if export.newcomers is None else export.newcomers.joined_by(more)
