"""The export: the folder that serving loads, and that needs nothing of the run that made it.

manifest.json          layout of the vocabulary, versions, hash of the catalogue, settings
model/                 merged weights with the semantic-id rows inside, and the tokenizer
item_scores.safetensors  what a history says of every item: weights, keys, tables; absent without
newcomers.safetensors  new items and their nearest relatives; absent where new items are like all others
mixer.safetensors      what orders the lists; absent where the scores do
reranker.safetensors   a published system behind the beams; absent without
keys.safetensors       all items' word keys, where the mixer reads them, and kinship, by which new items find relatives;
                       absent without both
soft.safetensors       "items" [N, K, D]: the adapter's output; "prompt" [P, D]
adapter.safetensors    the adapter's weights and settings, for new items
intake/                what items that come later need, see `genrec.serving.intake`; absent: none can come
items/                 catalog.parquet, codes.npy int32 [N, L], popularity.npy int64 [N]
README.md              model card
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec.adapters.item_scores import ItemScores
from genrec.adapters.mixer import Mixer
from genrec.adapters.newcomers import Newcomers
from genrec.adapters.reranker import Reranker
from genrec.artefacts import MANIFEST, file_hash, key_of, read_manifest
from genrec.catalog import Catalogue
from genrec.errors import ArtefactError
from genrec.likeness import Likeness
from genrec.mentions import MentionFinder
from genrec.prompts import Layout, Prompt, Prompter
from genrec.serving.intake import INTAKE, Intake

log = logging.getLogger(__name__)
FORMAT = 10
MIXER = "mixer.safetensors"
RERANKER = "reranker.safetensors"
REFUSED = "refused.txt"  # in a quantised copy that agreed too little with the original: why


@dataclass(frozen=True)
class Export:
    """A loaded export, without the language model's weights."""

    folder: Path
    manifest: dict[str, Any]
    layout: Layout
    catalogue: Catalogue
    codes: np.ndarray  # int32 [N, L]
    popularity: np.ndarray  # int64 [N] training events per item
    items: Tensor  # [N, K, D] soft tokens
    prompt: Tensor  # [P, D] soft prompt
    item_scores: ItemScores | None = None  # what a history says of every item, before the model speaks
    newcomers: Newcomers | None = None  # how new items get into the lists; None: like all others
    mixer: Mixer | None = None  # orders the lists; None: the items' scores do
    reranker: Reranker | None = None  # orders what the beams find; None: their scores do
    keys: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # modality, KIN, WORDS -> [N, E_m], the run's
    renewed: frozenset[int] = frozenset()  # rows whose soft tokens are not the folder's any more

    @property
    def tasks(self) -> list[str]:
        """The texts that were trained, by their names in `genrec.config.Mixture`; any other is written blindly."""
        return list(self.manifest["result"]["tasks"])

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_dir)

    @property
    def _likeness(self) -> Likeness | None:
        profile = None if self.item_scores is None else self.item_scores.profile
        return None if profile is None else Likeness({name: profile.keys(name) for name in profile.names})

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.tokenizer, self.layout, self.codes, catalogue=self.catalogue, likeness=self._likeness)

    @cached_property
    def mention_finder(self) -> MentionFinder:
        return MentionFinder(self.catalogue)

    def with_items(self, **items: Any) -> Export:
        """The same model with other items: fields by name, rows of old items in their places."""
        more = dataclasses.replace(self, **items)
        more.__dict__["tokenizer"] = self.tokenizer  # the folder may hold another export by now
        more.__dict__["prompter"] = self.prompter.with_items(more.codes, more.catalogue, more._likeness)
        return more

    def splice(self, prompt: Prompt, embedding: Tensor) -> Tensor:
        """Vectors [T, D] of a prompt: the model's own rows, with soft tokens in their slots.

        Args:
            prompt: the encoded prompt.
            embedding: [V, D] the exported model's input embedding.
        """
        slots = torch.from_numpy(prompt.slots)
        vectors = embedding[torch.from_numpy(prompt.input_ids)].clone()
        soft, soft_prompt = slots >= 0, slots < -1
        if soft.any():
            vectors[soft] = self.items.flatten(0, 1)[slots[soft]].to(vectors)
        if soft_prompt.any():
            vectors[soft_prompt] = self.prompt[-2 - slots[soft_prompt]].to(vectors)
        return vectors

    def replaced(self) -> bool:
        """Whether the folder holds another export by now; one that is gone or unreadable is not another.

        What is loaded stays right. What is read from the folder later would not fit to it.
        """
        try:
            return read_manifest(self.folder) != self.manifest
        except (ArtefactError, OSError):
            return False

    def check_unchanged(self) -> None:
        """To call after reading from the folder: what was read belongs to this export if nothing is raised.

        Raises:
            ArtefactError: the folder holds another export by now.
        """
        if self.replaced():
            raise ArtefactError(
                f"{self.folder}: holds another export now than when it was loaded (key {self.manifest['key'][:12]}); "
                "load it again: restart what serves it"
            )

    @classmethod
    def load(cls, folder: Path | str) -> Export:
        """Load an export folder.

        Raises:
            ArtefactError: the folder is no whole export, its items are not those it was made with, or it was replaced
                meanwhile.
        """
        folder = Path(folder)
        if (folder / REFUSED).is_file():
            raise ArtefactError(f"{folder}: {(folder / REFUSED).read_text(encoding='utf-8')}")
        manifest = read_manifest(folder)
        result = manifest.get("result", {})
        if result.get("format") != FORMAT:
            raise ArtefactError(
                f"{folder}: export format {result.get('format')!r}, this version reads {FORMAT}; export the run again"
            )
        catalogue_file = folder / "items" / "catalog.parquet"
        if file_hash(catalogue_file) != result["catalogue_sha256"]:
            raise ArtefactError(
                f"{catalogue_file}: not the catalogue that this export was made with "
                f"(SHA-256 {file_hash(catalogue_file)[:12]}, expected {result['catalogue_sha256'][:12]}); "
                "run `genrec run` on the new catalogue and export again"
            )
        catalogue = Catalogue.load(folder / "items")
        try:
            soft = load_file(folder / "soft.safetensors")
            codes = np.load(folder / "items" / "codes.npy")
            popularity = np.load(folder / "items" / "popularity.npy")
            item_scores = ItemScores.load(folder / "item_scores.safetensors") if result["item_scores"] else None
            newcomers = Newcomers.load(folder / "newcomers.safetensors") if result["newcomers"] else None
            reranker = Reranker.load(folder / RERANKER) if result["reranker"] else None
            keys = load_file(folder / "keys.safetensors") if result["keys"] else {}
            if item_scores is not None and (profile := item_scores.profile) is not None:
                keys |= {name: profile.keys(name) for name in profile.names}
            mixer = Mixer.load(folder / MIXER, keys, torch.from_numpy(popularity)) if result["mixer"] else None
        except (OSError, TypeError, ValueError, EOFError, KeyError, RuntimeError, SafetensorError) as err:
            raise ArtefactError(
                f"{folder}: expected soft.safetensors, items/codes.npy, items/popularity.npy and, where the manifest "
                "says so, item_scores.safetensors, newcomers.safetensors, mixer.safetensors, reranker.safetensors and "
                f"keys.safetensors; found one missing or broken ({err}); export the run again"
            ) from err
        if len(codes) != len(catalogue.item_ids) or len(codes) != len(soft["items"]):
            raise ArtefactError(
                f"{folder}: {len(catalogue.item_ids)} items, {len(codes)} ids and {len(soft['items'])} soft tokens; "
                "expected the same number of each; export the run again"
            )
        export = cls(
            folder=folder,
            manifest=manifest,
            layout=Layout(**result["layout"]),
            catalogue=catalogue,
            codes=codes,
            popularity=popularity,
            items=soft["items"],
            prompt=soft["prompt"],
            item_scores=item_scores,
            newcomers=newcomers,
            mixer=mixer,
            reranker=reranker,
            keys=keys,
        )
        export.check_unchanged()
        return export


def copy_around_weights(source: Export, work: Path) -> None:
    """Copy what a copy of an export has in common with it: all but its weights and what ``work/model/`` holds already.

    Args:
        source: the export.
        work: a stage's working folder, with the copy's weights in ``model/``.
    """
    for path in source.model_dir.iterdir():  # the tokenizer
        if not (work / "model" / path.name).exists() and ".safetensors" not in path.name:
            shutil.copy2(path, work / "model")
    (work / "model" / "generation_config.json").unlink(missing_ok=True)
    for path in source.folder.iterdir():
        if path.is_dir() and path.name != "model":
            shutil.copytree(path, work / path.name)
        elif path.is_file() and path.name != MANIFEST:
            shutil.copy2(path, work)


def write_export(
    folder: Path,
    *,
    model: Any,
    tokenizer: Any,
    layout: Layout,
    catalogue: Catalogue,
    codes: np.ndarray,
    popularity: np.ndarray,
    soft_items: Tensor,
    soft_prompt: Tensor,
    item_scores: ItemScores | None,
    newcomers: Newcomers | None,
    adapter_state: dict[str, Tensor],
    adapter_settings: dict[str, Any],
    tasks: Sequence[str],
    card: str,
    mixer: Mixer | None = None,
    reranker: Reranker | None = None,
    keys: dict[str, Tensor] | None = None,
    intake: Intake | None = None,
) -> dict[str, Any]:
    """Write everything but manifest.json into an empty folder; returns what the manifest's "result" must hold.

    Args:
        folder: empty folder (a stage's working folder).
        model: merged transformers causal LM whose vocabulary holds ``layout.size`` tokens or more.
        tokenizer: the base's tokenizer with the added tokens.
        layout: where the added tokens are.
        catalogue: the items.
        codes: int32 [N, L].
        popularity: int64 [N] training events.
        soft_items: [N, K, D]; soft_prompt: [P, D].
        item_scores: what a history says of every item, if anything.
        newcomers: how new items get into the lists, if not like all others.
        adapter_state: the adapter's weights.
        adapter_settings: arguments of `genrec.adapters.build_adapter` but K, D and rms (JSON-able).
        tasks: the texts that were trained, by their names in `genrec.config.Mixture`.
        card: the model card in Markdown.
        mixer: what orders the lists, if not the items' scores; it reads the profile's keys, if any, and word keys.
        reranker: what orders the beams' items, if not their scores.
        keys: float32 [N, E] by `KIN`, where new items look for relatives, and by `WORDS`, where the mixer reads words.
        intake: what items that come later need; None: none can come.
    """
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # a base's sampling defaults must never reach item decoding
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {"items": soft_items.detach().contiguous(), "prompt": soft_prompt.detach().contiguous()},
        folder / "soft.safetensors",
    )
    save_file({k: v.detach().contiguous() for k, v in adapter_state.items()}, folder / "adapter.safetensors")
    if item_scores is not None:
        item_scores.float().save(folder / "item_scores.safetensors")
    if newcomers is not None:
        newcomers.save(folder / "newcomers.safetensors")
    if mixer is not None:
        mixer.save(folder / MIXER)
    if reranker is not None:
        reranker.save(folder / RERANKER)
    if keys:
        save_file({name: of.contiguous() for name, of in keys.items()}, folder / "keys.safetensors")
    (folder / "items").mkdir()
    catalogue.save(folder / "items")
    np.save(folder / "items" / "codes.npy", codes)
    np.save(folder / "items" / "popularity.npy", popularity)
    if intake is not None:
        intake.save(folder / INTAKE)
    places = [*(folder / "items").iterdir(), *(folder / INTAKE).rglob("*")]
    hashes = {str(path.relative_to(folder)): file_hash(path) for path in sorted(places) if path.is_file()}
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {
        "format": FORMAT,
        "layout": dataclasses.asdict(layout),
        "catalogue_sha256": file_hash(folder / "items" / "catalog.parquet"),
        "adapter": adapter_settings,
        "item_scores": item_scores is not None,
        "newcomers": newcomers is not None,
        "mixer": mixer is not None,
        "reranker": reranker is not None,
        "keys": bool(keys),
        "intake": intake is not None,
        "items_key": key_of(hashes),  # equal where ids and features of a later item are
        "tasks": list(tasks),
        "soft_dtype": str(soft_items.dtype).removeprefix("torch."),
    }
