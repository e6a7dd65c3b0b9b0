"""A run's folder seen as nouns: what the earlier stages wrote, loaded when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import sparse

from genrec.adapters import build_adapter
from genrec.adapters.facts import FactSpace
from genrec.adapters.item_scores import ItemScores
from genrec.adapters.kinship import KIN, Kinship
from genrec.adapters.kinship import WIDTH as KINSHIP
from genrec.adapters.mixer import Mixer
from genrec.adapters.neighbours import Table, follower_table, neighbour_table
from genrec.adapters.newcomers import Newcomers
from genrec.adapters.profile import KeySpace, Profile
from genrec.adapters.reranker import Reranker
from genrec.adapters.sequence import SequenceScores
from genrec.adapters.words import WORDS, WordSpace
from genrec.artefacts import MANIFEST, read_manifest
from genrec.backbone import Backbone
from genrec.bases import load_base
from genrec.catalog import Catalogue
from genrec.config import Recipe
from genrec.encoders.features import Features
from genrec.human_texts import HumanTexts
from genrec.interactions import Log
from genrec.item_vectors import cooccurrence_factors
from genrec.likeness import Likeness
from genrec.prompts import Layout, Prompter
from genrec.semantic_ids import SemanticIds
from genrec.splits import Cases, Split
from genrec.synthetic import Truth
from genrec.writer import Writer

SEQUENCE = "sequence.safetensors"
MIXER = "mixer.safetensors"
RERANKER = "reranker.safetensors"
WIDTH = 128  # most values per modality that relatives are found by, where there is no profile to say it


@dataclass(frozen=True)
class Workspace:
    """One run, or a variant of it that shares the parent's data and features."""

    recipe: Recipe
    folder: Path
    shared: Path  # where catalog/, interactions/ and features/ are: `folder`, or the parent run's

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue.load(self.shared / "catalog")

    @cached_property
    def split(self) -> Split:
        return Split.load(self.shared / "interactions")

    @cached_property
    def features(self) -> dict[str, Features]:
        """Modality -> features of all items, as the recipe wants them."""
        wanted = [m for m in ("text", "image") if getattr(self.recipe.encode, m) is not None]
        return {m: Features.load(self.shared / "features" / m) for m in wanted}

    @cached_property
    def semantic_ids(self) -> SemanticIds:
        return SemanticIds.load(self.folder / "semantic_ids")

    @property
    def base_folder(self) -> Path:
        """base/: the run's, or a variant's own where it has one."""
        own = self.folder / "base"
        return own if (own / MANIFEST).is_file() else self.shared / "base"

    @cached_property
    def base_path(self) -> str:
        """What `load_base` takes: the folder of a scratch or extracted base, or the recipe's own name."""
        return str(read_manifest(self.base_folder)["result"]["path"] or self.base_folder)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base_path, trust_remote_code=self.recipe.backbone.trust_remote_code)

    @cached_property
    def layout(self) -> Layout:
        backbone = self.recipe.backbone
        return Layout(
            base_vocab=len(self.tokenizer),
            levels=self.semantic_ids.codes.shape[1],
            n_codes=self.semantic_ids.n_codes,
            soft_tokens=backbone.soft_tokens,
            soft_prompt=backbone.soft_prompt,
            bos=self.tokenizer.bos_token_id,
            eos=self.tokenizer.eos_token_id,
        )

    @cached_property
    def prompter(self) -> Prompter:
        codes = self.semantic_ids.codes
        return Prompter(self.tokenizer, self.layout, codes, catalogue=self.catalogue, likeness=self.likeness)

    @cached_property
    def user_ids(self) -> list[str]:
        """The log's users, in the order that splits number them."""
        return Log.load(self.shared / "interactions").user_ids

    @cached_property
    def human_texts(self) -> HumanTexts:
        """What people wrote about the items, where the files have it."""
        return HumanTexts(self.catalogue, Log.load(self.shared / "interactions"))

    @cached_property
    def writer(self) -> Writer:
        """The perfect writer, with what was planted where that is known."""
        truth = Truth.load(self.shared / "source") if self.recipe.data.synthetic is not None else None
        return Writer(self.catalogue, truth, self.recipe.data.looks)

    @property
    def popularity(self) -> np.ndarray:
        """int64 [N]: training events per item."""
        events = np.concatenate([*self.split.train, np.empty(0, np.int32)])
        return np.bincount(events.astype(np.int64), minlength=len(self.catalogue.item_ids))

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """The recipe's settings that this kind of adapter takes."""
        settings = self.recipe.adapter.model_dump(exclude={"kind"})
        return settings if self.recipe.adapter.kind == "qformer" else {k: settings[k] for k in ("width", "dropout")}

    @cached_property
    def content_keys(self) -> dict[str, torch.Tensor]:
        """What the profile compares and kinship reads; made once for training, ranking and export."""
        return self.key_space.keys(self.features)

    @cached_property
    def key_space(self) -> KeySpace:
        """Fitted on what training may look at."""
        return KeySpace.fit(self.features, ~self.split.cold, self.recipe.backbone.profile or WIDTH)

    @cached_property
    def likeness(self) -> Likeness | None:
        """In what histories are alike, by the profile's keys; None where there are none."""
        return Likeness(self.content_keys) if self.recipe.backbone.profile and self.features else None

    @cached_property
    def log_tables(self) -> tuple[Table | None, Table | None]:
        """The neighbours and the followers of every item in the training histories; made once, like the keys."""
        most = self.recipe.backbone.neighbours
        if not most:
            return None, None
        histories, n_items = self.split.train, len(self.catalogue.item_ids)
        return neighbour_table(histories, n_items, most), follower_table(histories, n_items, most)

    @cached_property
    def chooses(self) -> Cases:
        """The validation cases that fine-tuning and what comes after it choose by."""
        valid, most = self.split.valid, self.recipe.finetune.valid_users
        if len(valid) <= most:
            return valid
        chosen = np.random.default_rng(self.recipe.seed).choice(len(valid), most, replace=False)
        return valid[chosen]

    @cached_property
    def mixes(self) -> Cases:
        """The validation cases that the mixer learns from."""
        valid = self.split.valid
        return valid[np.random.default_rng([self.recipe.seed, 1]).permutation(len(valid))[: self.recipe.mix.users]]

    @cached_property
    def words(self) -> WordSpace | None:
        """Of the items' texts, where the mixer may read any."""
        if not self.recipe.mix.users or not self.recipe.backbone.profile or "text" not in self.features:
            return None
        return WordSpace.fit(self.catalogue.texts(), ~self.split.cold)

    @cached_property
    def kinship(self) -> Kinship | None:
        """Where new items look for relatives: what the log would say of an item by its content."""
        if not self.recipe.new_items.relatives or not self.features:
            return None
        return self.kinship_of(torch.from_numpy(~self.split.cold))

    def kinship_of(self, known: torch.Tensor) -> Kinship:
        """The same, learned from the items `known`, bool [N], alone."""
        return Kinship.fit(self.content_keys, self.stated, self._factors, self.popularity, known)

    @cached_property
    def facts(self) -> FactSpace:
        """What the catalogue states of the items that training may look at."""
        return FactSpace.fit(self.catalogue, ~self.split.cold)

    @cached_property
    def stated(self) -> sparse.csr_matrix:
        """Every item's facts, float32 [N, F]."""
        return self.facts.keys(self.catalogue)

    @cached_property
    def _factors(self) -> np.ndarray:
        """Of the training log, float32 [N, KINSHIP]."""
        n_items = len(self.catalogue)
        return cooccurrence_factors(self.split.train, n_items, min(KINSHIP, n_items), self.recipe.seed)

    @cached_property
    def kin_keys(self) -> dict[str, torch.Tensor]:
        """Every item's, by their name; nothing where there is no kinship."""
        return {} if self._kin is None else {KIN: self._kin[0]}

    @cached_property
    def _kin(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Every item's key and fame, where there is kinship."""
        return None if self.kinship is None else self.kinship.of(self.content_keys, self.stated)

    @cached_property
    def mixed_keys(self) -> dict[str, torch.Tensor]:
        """What the mixer reads of content: nothing where nothing but the ids may."""
        keys = self.content_keys | self.kin_keys if self.recipe.backbone.profile and self.features else {}
        return keys if self.words is None else keys | {WORDS: self.words.keys(self.catalogue.texts())}

    @property
    def exported_keys(self) -> dict[str, torch.Tensor]:
        """What an export needs of content beside the profile's keys."""
        return self.kin_keys | {name: keys for name, keys in self.mixed_keys.items() if name == WORDS}

    @cached_property
    def mixer(self) -> Mixer | None:
        """Where the recipe wants one and it is trained."""
        if not self.recipe.mix.users:
            return None
        return Mixer.load(self.folder / "mix" / MIXER, self.mixed_keys, torch.from_numpy(self.popularity))

    def item_scores(self) -> ItemScores | None:
        """Fresh item scores as the recipe wants them; None where it wants none or has no features for them."""
        profile = Profile(self.content_keys) if self.recipe.backbone.profile and self.features else None
        neighbours, followers = self.log_tables
        return None if profile is None and neighbours is None else ItemScores(profile, neighbours, followers)

    @cached_property
    def newcomers(self) -> Newcomers | None:
        """New items' relatives, where the recipe asks for them and there are new items and features."""
        wanted, known = self.recipe.new_items, torch.from_numpy(~self.split.cold)
        if not wanted.relatives or not self.features or known.all():
            return None
        assert self._kin is not None
        return Newcomers.nearest(*self._kin, known, wanted.relatives, wanted.lift)

    @property
    def reranker(self) -> Reranker | None:
        """The system behind the beams, where the run has one."""
        path = self.folder / "reranker" / RERANKER
        return Reranker.load(path) if path.is_file() else None

    def backbone(self, *, tuned: bool, aligned: bool = True, load_in: str | None = None) -> Backbone:
        """A fresh backbone.

        Args:
            tuned: with LoRA or a trainable base as the recipe says; False: a frozen base without LoRA.
            aligned: with the adapter as alignment left it, where it was aligned; False: as it starts.
            load_in: another precision of the base than the recipe's.
        """
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        lm, _ = load_base(self.base_path, load_in or recipe.backbone.load_in, recipe.backbone.trust_remote_code)
        embedding = lm.get_input_embeddings().weight
        adapter = None
        if recipe.backbone.soft_tokens:
            adapter = build_adapter(
                recipe.adapter.kind,
                {m: f.values.shape[2] for m, f in self.features.items()},
                recipe.backbone.soft_tokens,
                embedding.shape[1],
                rms=embedding.float().square().mean().sqrt().item(),
                **self.adapter_settings,
            )
        backbone = Backbone(
            lm,
            self.layout,
            adapter,
            self.features if adapter is not None else {},
            self.semantic_ids.codes,
            ~self.split.cold,
            item_scores=self.item_scores() if tuned else None,
            lora=recipe.backbone.lora.model_dump() if tuned and recipe.backbone.tune == "lora" else None,
            tune_base=tuned and recipe.backbone.tune == "full",
            dropout=recipe.finetune.dropout if tuned else 0.0,
        )
        path = self.folder / "alignment" / "aligned.safetensors"
        if aligned and path.is_file() and adapter is not None:
            backbone.load_trained(load_file(path))
        return backbone

    def tuned_backbone(self, load_in: str | None = None) -> Backbone:
        """The fine-tuned backbone, in eval mode, on a GPU where there is one."""
        backbone = self.backbone(tuned=True, load_in=load_in)
        backbone.load_trained(load_file(self.folder / "lora" / "trained.safetensors"))
        sequence = self.folder / "sequence" / SEQUENCE
        if sequence.is_file() and backbone.item_scores is not None:
            backbone.item_scores.sequence = SequenceScores.load(sequence)
        return backbone.eval().to("cuda" if torch.cuda.is_available() else "cpu")
