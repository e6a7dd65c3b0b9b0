"""Item features: what a frozen encoder says about every item of a catalogue."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from genrec.errors import ArtefactError

FITTED = "fitted.safetensors"


@dataclass(frozen=True)
class Features:
    """One modality's vectors, in catalogue order.

    Attributes:
        values: float32 [N, T_m, D_m]; T_m is 1 for a pooled vector. Rows of absent items are zeros.
        present: bool [N], False where the item has no such modality; every reader has to mask by it.
        fitted: what a built-in encoder learned from this catalogue, to encode a later item alike; else empty.
    """

    values: np.ndarray
    present: np.ndarray
    fitted: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `values.npy`, `present.npy` and, where something was fitted, `fitted.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "values.npy", self.values)
        np.save(folder / "present.npy", self.present)
        if self.fitted:
            save_file(self.fitted, folder / FITTED)

    @classmethod
    def load(cls, folder: Path) -> Features:
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing, damaged, or the two do not belong together.
        """
        try:
            values = np.load(folder / "values.npy", allow_pickle=False)
            present = np.load(folder / "present.npy", allow_pickle=False)
            fitted = load_file(folder / FITTED) if (folder / FITTED).is_file() else {}
        except (OSError, ValueError, EOFError, SafetensorError) as err:
            raise ArtefactError(f"{folder}: no readable features there ({err}); run the encode stage again") from err
        if values.ndim != 3 or present.shape != values.shape[:1]:
            raise ArtefactError(
                f"{folder}: values {values.shape} and present {present.shape}, expected [N, T, D] and [N]; "
                "run the encode stage again"
            )
        return cls(values, present, fitted)
