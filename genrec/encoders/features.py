"""Item features: what a frozen encoder says about every item of a catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec.errors import ArtefactError


@dataclass(frozen=True)
class Features:
    """One modality's vectors, in catalogue order.

    Attributes:
        values: float32 [N, T_m, D_m]; T_m is 1 for a pooled vector. Rows of absent items are zeros.
        present: bool [N], False where the item has no such modality; every reader has to mask by it.
    """

    values: np.ndarray
    present: np.ndarray

    def save(self, folder: Path) -> None:
        """Write `values.npy` and `present.npy`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "values.npy", self.values)
        np.save(folder / "present.npy", self.present)

    @classmethod
    def load(cls, folder: Path) -> Features:
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing, damaged, or the two do not belong together.
        """
        try:
            values = np.load(folder / "values.npy", allow_pickle=False)
            present = np.load(folder / "present.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as err:
            raise ArtefactError(f"{folder}: no readable features there ({err}); run the encode stage again") from err
        if values.ndim != 3 or present.shape != values.shape[:1]:
            raise ArtefactError(
                f"{folder}: values {values.shape} and present {present.shape}, expected [N, T, D] and [N]; "
                "run the encode stage again"
            )
        return cls(values, present)
