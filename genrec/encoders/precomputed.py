"""Features that the user computed: a `.npy` file in catalogue order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.features import Features
from genrec.errors import ConfigError, DataError


def encode_precomputed(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Read [N, D] or [N, T, D] in catalogue order; a row of zeros means that the item has no such modality.

    Raises:
        ConfigError: `settings.path` is not given.
        DataError: the file is missing, not a numeric array, of another shape, or holds NaN or infinity.
    """
    path, n_items = settings.path, len(catalogue.item_ids)
    if path is None:
        raise ConfigError("encoder kind precomputed needs path: a .npy file")
    try:
        raw = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise DataError(f"{path}: cannot be read as .npy ({err}); write it with numpy.save") from err
    if not isinstance(raw, np.ndarray) or raw.dtype.kind not in "fiu":
        found = raw.dtype if isinstance(raw, np.ndarray) else "an archive of arrays"
        raise DataError(f"{path}: found {found}, expected one array of numbers; write it with numpy.save")
    if raw.ndim not in (2, 3) or len(raw) != n_items or 0 in raw.shape:
        raise DataError(
            f"{path}: found shape {list(raw.shape)}, expected [{n_items}, D] or [{n_items}, T, D]: one row "
            "per item of the catalogue, in its order, quarantined items left out"
        )
    with np.errstate(over="ignore"):
        values = np.array(raw, dtype=np.float32).reshape(n_items, -1, raw.shape[-1])
    bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} rows hold NaN or infinity as float32, first {bad[:5].tolist()} "
            f"(items {[catalogue.item_ids[row] for row in bad[:5]]}); compute them again, or set the whole "
            "row to zeros for an item without this modality"
        )
    return Features(values, np.any(values, axis=(1, 2)))
