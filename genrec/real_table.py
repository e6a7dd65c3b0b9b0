"""A run's catalogue and log as the table that systems learn from."""

from __future__ import annotations

import logging

import numpy as np

from genrec.encoders.features import Features
from genrec.planted import Table
from genrec.workspace import Workspace

log = logging.getLogger(__name__)
MODALITIES = ("image", "text")


def real_table(space: Workspace) -> Table:
    """Features, first categories and histories of a prepared and encoded run; says which modality nothing has."""
    catalogue = space.catalogue
    names = sorted({of[0] for of in catalogue.categories if of})
    place = {name: at for at, name in enumerate(names)}
    n_items, features = len(catalogue.item_ids), {}
    for m in MODALITIES:
        of = space.features.get(m) or Features(np.zeros((n_items, 1, 2), np.float32), np.zeros(n_items, bool))
        if of.present.any():
            log.info("%s: %d of %d items have it", m, of.present.sum(), n_items)
        else:
            log.warning("%s: no item has it, so it is masked everywhere; parts that read it learn nothing", m)
        features[m] = of
    return Table(
        features=features,
        categories=np.array([place[of[0]] if of else 0 for of in catalogue.categories], np.int64),
        domains=np.zeros(n_items, np.int64),
        split=space.split,
        n_users=len(space.user_ids),
        texts=catalogue.texts(),
    )
