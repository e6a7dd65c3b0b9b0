"""A published system as a recipe: what it makes items and users of, how it is trained, and what proves it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from genrec.config import Settings, read_yaml, validated
from genrec.errors import ConfigError
from genrec.planted import Planted

FOLDER = Path(__file__).resolve().parent / "training" / "recipes" / "systems"
SMALL = ("bottleneck", "lora", "prompt")  # put into a part, and stay there
ALIASES = {"dcim": "dicm", "marn": "amrl"}  # other names that they go by
TERM = re.compile(r"(\w+)(?:\((\w+(?:, ?\w+)*)\))?")


class ItemPart(Settings):
    """What an item's vector is made of."""

    modalities: list[str] | None = Field(None, description="of the data's; null: all it has")
    reader: dict[str, str] = Field({}, description="modality -> its reader, where that is not linear")
    fusion: str = Field("concat_mlp", description="modality tokens to one content vector")
    ids: bool = Field(False, description="a learned vector per item too")
    mix: Literal["content", "ids", "sum", "swap", "fields"] = Field(
        "content",
        description="the final vector; swap: ids if known, else content; fields: a map of content and features",
    )
    graph: str | None = Field(None, description="items and users through the user-item graph")
    neighbours: int = Field(0, ge=0, description="likest items by content whose ids are averaged in; 0: no item graph")
    width: int = Field(32, ge=2, description="of every vector, W")


class Stage(Settings):
    """One stage of training; the next starts from what it leaves."""

    pairs: str = Field(description="what a batch is made of")
    objectives: dict[str, float] = Field(description="loss on named views -> its weight")
    tune: dict[str, str] = Field({}, description="part -> frozen, full, last, bottleneck, lora, prompt; default full")
    tune_from: int = Field(
        0, ge=0, description="first block of the user model for a bottleneck or LoRA; below, states are computed once"
    )
    steps: int = Field(300, ge=1, description="batches")
    batch_size: int = Field(256, ge=2, description="pairs in a batch")
    learning_rate: float = Field(0.005, gt=0, description="of AdamW, warmed up, then to zero along a line")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    negatives: int = Field(0, ge=0, description="random items per pair")
    swap: float = Field(0.0, ge=0, le=1, description="share of items whose id gives way to their content")
    drop_modality: float = Field(0.0, ge=0, lt=1, description="chance that a modality of an item is hidden")
    cache: bool = Field(False, description="read every item once, before the stage: where nothing of an item learns")
    users: Literal["all", "first", "second"] = Field("all", description="half of the users to learn from")
    share: float = Field(1.0, gt=0, le=1, description="of the users' histories, to learn from")

    @field_validator("objectives")
    @classmethod
    def _terms(cls, objectives: dict[str, float]) -> dict[str, float]:
        for term in objectives:
            if not TERM.fullmatch(term):
                raise ValueError(f"objective {term!r}: expected NAME or NAME(view, view)")
        return objectives


class Proof(Settings):
    """What shows that the system's own idea works, and where its gain has to vanish."""

    claim: str = Field(description="in words")
    world: Planted = Field(Planted(), description="planted data that needs the idea")
    metric: Literal["recall", "cold", "masked", "gauc"] = Field("recall", description="what is compared")
    without: dict[str, Any] = Field(description="dotted setting -> value: the same system without its idea")
    control: dict[str, Any] = Field(description="setting of the world -> value: nothing there for the idea to find")


class SystemRecipe(Settings):
    """One system."""

    name: str = Field(description="also the file's name")
    family: Literal["alignment", "aggregation", "adaptation"] = Field(description="which problem it is about")
    source: str = Field(description="authors, title, venue")
    item: ItemPart = Field(ItemPart(), description="items")
    user: str = Field("mean", description="user model")
    head: str = Field("dot", description="score of a user and an item")
    stages: list[Stage] = Field([], description="in order; none: features as they are")
    prove: Proof = Field(description="the proof")

    @model_validator(mode="after")
    def _consistent(self) -> SystemRecipe:
        if self.item.mix in ("ids", "sum", "swap") and not self.item.ids:
            raise ValueError(f"item.mix {self.item.mix} needs item.ids: true")
        if self.item.fusion == "difference" and not self.item.ids:
            raise ValueError("item.fusion difference takes off what ids say: it needs item.ids: true")
        put_in: dict[str, int] = {}
        for at, stage in enumerate(self.stages):
            for part, kind in stage.tune.items():
                if kind in SMALL and part in put_in:
                    raise ValueError(
                        f"stages.{at}.tune.{part}: {kind}: stages.{put_in[part]} has put something small into {part} "
                        "already, and it stays; make them one stage"
                    )
                if kind in SMALL:
                    put_in[part] = at
            if stage.cache:
                self._fresh_all_along(at, stage, "cache")
            if stage.tune_from:
                if stage.tune.get("user") not in ("bottleneck", "lora"):
                    raise ValueError(f"stages.{at}.tune_from needs stages.{at}.tune.user: bottleneck or lora")
                self._fresh_all_along(at, stage, "tune_from")
            if stage.swap and self.item.mix != "swap":
                raise ValueError(f"stages.{at}.swap needs item.mix: swap, found {self.item.mix}")
        return self

    def _fresh_all_along(self, at: int, stage: Stage, setting: Literal["cache", "tune_from"]) -> None:
        held = {"cache": "item table", "tune_from": "states of histories"}[setting]
        parts = ["readers", "fusion", *(["ids"] if self.item.ids else []), *(["graph"] if self.item.graph else [])]
        learning = [part for part in parts if stage.tune.get(part) != "frozen"]
        if learning:
            raise ValueError(
                f"stages.{at}.{setting}: the cached {held} would be stale after one step, for {', '.join(learning)} "
                f"learn; set stages.{at}.tune to frozen for them, or leave stages.{at}.{setting} out"
            )
        changing = [name for name in ("swap", "drop_modality") if getattr(stage, name)]
        if changing:
            raise ValueError(
                f"stages.{at}.{setting}: {' and '.join(changing)} shows an item another way in every batch, so the "
                f"cached {held} would be stale; set it to 0, or leave stages.{at}.{setting} out"
            )

    def changed(self, changes: dict[str, Any]) -> SystemRecipe:
        """The recipe with dotted settings changed, such as ``{"stages.0.swap": 0}``; a null drops a stage."""
        raw = copy.deepcopy(self.model_dump())
        for path, value in changes.items():
            *way, last = path.split(".")
            place: Any = raw
            for name in way:
                place = place[int(name)] if isinstance(place, list) else place[name]
            if isinstance(place, list):
                place[int(last)] = value
            elif place is None:
                raise ConfigError(f"{self.name}: prove.without drops a stage and then names {path} in it")
            elif last not in place and way[-1:] not in (["tune"], ["reader"], ["objectives"]):
                raise ConfigError(f"{self.name}: prove.without names {path}, which no setting is called")
            else:
                place[last] = value
        raw["stages"] = [stage for stage in raw["stages"] if stage is not None]
        return validated(SystemRecipe, raw, f"{self.name} with {changes}")


def system_names() -> list[str]:
    """The systems that come with genrec."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_system(name: str) -> SystemRecipe:
    """A system by its name or alias, or from a YAML file.

    Raises:
        ConfigError: no such system or file, or a setting that none takes.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{ALIASES.get(name, name)}.yaml"
    if not path.is_file():
        raise ConfigError(f"system {name!r}: there are {', '.join(system_names())}, or give a YAML file")
    return validated(SystemRecipe, read_yaml(path), str(path))
