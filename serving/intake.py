"""What an export needs to take items that came after its run: encoders, quantiser and statistics, all frozen.

intake/semantic_ids/         the quantiser, without any item's codes
intake/MODALITY.safetensors  what a built-in encoder learned; absent for others
intake/keys.safetensors      the `KeySpace`
intake/kinship.safetensors   the `Kinship`; absent where new items have no relatives
intake/facts.json            the `FactSpace` that it reads; absent with it
intake/words.safetensors     the `WordSpace`; absent where nothing reads words
intake/settings.json         each encoder's settings and shape; relatives that a new item inherits from, lift
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from genrec.adapters.facts import FactSpace
from genrec.adapters.kinship import KIN, Kinship
from genrec.adapters.profile import KeySpace
from genrec.adapters.words import WORDS, WordSpace
from genrec.artefacts import write_json
from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.features import Features
from genrec.encoders.frozen import FrozenEncoder
from genrec.errors import ArtefactError
from genrec.semantic_ids import SemanticIds

INTAKE = "intake"


@dataclass(frozen=True)
class Intake:
    """How an item that came later gets its features, id and keys: as one that the run held out of training."""

    encoders: dict[str, FrozenEncoder]  # modality ->
    quantiser: SemanticIds  # its codes are those of no item
    space: KeySpace
    relatives: int  # known items that a new one inherits from; 0: it is like all others
    lift: float  # nats, see `genrec.adapters.newcomers`
    words: WordSpace | None = None
    facts: FactSpace | None = None
    kinship: Kinship | None = None  # comes with facts

    def features(self, items: Catalogue) -> dict[str, Features]:
        """Modality -> features of items.

        Raises:
            ConfigError: an encoder cannot run here.
            DataError: a picture cannot be read.
        """
        return {modality: encoder.encode(items) for modality, encoder in self.encoders.items()}

    def codes(self, features: dict[str, Features], taken: np.ndarray) -> np.ndarray:
        """Ids int32 [M, L] of new items beside those that are taken, int32 [N, L].

        Raises:
            ConfigError: fewer free ids than new items.
        """
        read = {modality: features[modality] for modality in self.quantiser.space.means}
        return replace(self.quantiser, codes=taken).extend(read).codes[len(taken) :]

    def keys(self, features: dict[str, Features], items: Catalogue) -> tuple[dict[str, Tensor], Tensor]:
        """What M items are compared by, float32 [M, E] by name, content keys and kinship's; and fame, float32 [M]."""
        content = self.space.keys(features)
        if self.kinship is None or self.facts is None:
            return content, torch.zeros(len(items))
        kin, fame = self.kinship.of(content, self.facts.keys(items))
        return content | {KIN: kin}, fame

    def word_keys(self, items: Catalogue) -> dict[str, Tensor]:
        """What a mixer reads of M items beside these: float32 [M, E] by name, where it reads words."""
        return {} if self.words is None else {WORDS: self.words.keys(items.texts())}

    def save(self, folder: Path) -> None:
        """Write all of it into a new folder."""
        replace(self.quantiser, codes=self.quantiser.codes[:0]).save(folder / "semantic_ids")
        for modality, encoder in self.encoders.items():
            if encoder.fitted:
                save_file(encoder.fitted, folder / f"{modality}.safetensors")
        arrays = {name: np.ascontiguousarray(of) for name, of in self.space.arrays.items()}
        save_file(arrays, folder / "keys.safetensors")
        if self.kinship is not None:
            save_file({"weights": self.kinship.weights.numpy()}, folder / "kinship.safetensors")
        if self.facts is not None:
            write_json(folder / "facts.json", self.facts.weights)
        if self.words is not None:
            save_file({"idf": self.words.idf}, folder / "words.safetensors")
        settings = {
            "encoders": {
                modality: {"settings": json.loads(of.settings.model_dump_json()), "shape": list(of.shape)}
                for modality, of in self.encoders.items()
            },
            "relatives": self.relatives,
            "lift": self.lift,
        }
        write_json(folder / "settings.json", settings)

    @classmethod
    def load(cls, folder: Path) -> Intake:
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing or damaged.
        """
        quantiser = SemanticIds.load(folder / "semantic_ids")
        try:
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            encoders = {}
            for modality, of in settings["encoders"].items():
                file = folder / f"{modality}.safetensors"
                fitted = load_file(file) if file.is_file() else {}
                shape = (int(of["shape"][0]), int(of["shape"][1]))
                encoders[modality] = FrozenEncoder(modality, Encoder.model_validate(of["settings"]), fitted, shape)
            space = KeySpace(load_file(folder / "keys.safetensors"))
            file = folder / "words.safetensors"
            words = WordSpace(load_file(file)["idf"]) if file.is_file() else None
            file = folder / "kinship.safetensors"
            kinship = Kinship(torch.from_numpy(load_file(file)["weights"])) if file.is_file() else None
            file = folder / "facts.json"
            facts = FactSpace(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
            relatives, lift = int(settings["relatives"]), float(settings["lift"])
            return cls(encoders, quantiser, space, relatives, lift, words, facts, kinship)
        except (OSError, ValueError, KeyError, SafetensorError) as err:
            raise ArtefactError(f"{folder}: missing or broken ({err}); export the run again") from err
