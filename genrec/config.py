"""The recipe: one YAML file that names every stage's settings."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from genrec.errors import ConfigError

Checked = TypeVar("Checked", bound=BaseModel)


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Synthetic(Settings):
    """The embedded catalogue."""

    n_items: int = Field(600, ge=20, description="items in the catalogue")
    n_users: int = Field(3000, ge=10, description="users in the log")
    image_share: float = Field(1 / 3, ge=0, le=1, description="share of users who choose by the picture")
    text_share: float = Field(1 / 3, ge=0, le=1, description="share of users who choose by the text")
    noise: float = Field(0.1, ge=0, le=1, description="share of events chosen by popularity alone")
    cold_share: float = Field(0.0, ge=0, lt=1, description="share of items that appear only late in the log")
    n_interests: int = Field(1, ge=1, description="interests per user")


class Data(Settings):
    """Where the catalogue and the log come from, and how the log is split."""

    synthetic: Synthetic | None = Field(None, description="make the embedded catalogue instead of reading files")
    items: Path | None = Field(None, description="catalogue: JSONL, CSV or Parquet")
    interactions: Path | None = Field(None, description="log: JSONL, CSV or Parquet")
    item_columns: dict[str, str] = Field({}, description="our field -> your column, where the names differ")
    interaction_columns: dict[str, str] = Field({}, description="our field -> your column, where the names differ")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="stop when more of the rows than this are bad")
    max_text_chars: int = Field(20_000, ge=1, description="longer titles or descriptions are quarantined")
    max_pixels: int = Field(40_000_000, ge=1, description="larger pictures are refused before they are decoded")
    split: Literal["leave_one_out", "temporal", "cold_items"] = Field("leave_one_out", description="how to test")
    cold_share: float = Field(0.1, gt=0, lt=1, description="share of items held out by cold_items")
    test_share: float = Field(0.1, gt=0, lt=1, description="share of events after the cut of temporal")
    max_history: int = Field(50, ge=1, description="newest events kept per user")
    looks: list[str] = Field(
        [], description="attributes that pictures show; the embedded catalogue's are colour, shape and pattern"
    )
    max_users: int | None = Field(None, ge=1, description="train and test on a random sample of this many users")
    exclude_seen: bool = Field(True, description="never recommend what the user already had")

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        files = self.items is not None or self.interactions is not None
        if (self.synthetic is None) != files:
            raise ValueError("give either data.synthetic or both data.items and data.interactions")
        if files and (self.items is None or self.interactions is None):
            raise ValueError("data.items and data.interactions go together; one of them is missing")
        return self


class Encoder(Settings):
    """One frozen encoder of item text or pictures."""

    kind: Literal["builtin", "transformers", "sentence_transformers", "precomputed"] = Field(
        "builtin", description="built-in features need no download"
    )
    model: str | None = Field(None, description="Hugging Face name or local folder (not for builtin)")
    path: Path | None = Field(None, description="precomputed: .npy with [N, D] or [N, T, D] in catalogue order")
    dim: int = Field(64, ge=2, description="width of the built-in text features")
    patches: bool = Field(False, description="transformers pictures: one vector per patch instead of one pooled")
    batch_size: int = Field(32, ge=1, description="items per forward pass")

    @model_validator(mode="after")
    def _complete(self) -> Encoder:
        if self.kind in ("transformers", "sentence_transformers") and not self.model:
            raise ValueError(f"encoder kind {self.kind} needs model: a Hugging Face name or a local folder")
        if self.kind == "precomputed" and self.path is None:
            raise ValueError("encoder kind precomputed needs path: a .npy file")
        return self


class Encode(Settings):
    """Which modalities the model sees."""

    text: Encoder | None = Field(Encoder(), description="null leaves the modality out")
    image: Encoder | None = Field(Encoder(), description="null leaves the modality out")


class SemanticIds(Settings):
    """Discrete codes per item."""

    method: Literal["residual_kmeans", "rqvae"] = Field("residual_kmeans", description="quantiser")
    levels: int = Field(3, ge=1, le=8, description="codes per item, L")
    codes: int = Field(32, ge=2, le=65_536, description="codes per level, C")
    modalities: list[Literal["text", "image"]] | None = Field(
        None, description="what the codes are made of; null: every encoded modality"
    )
    collaborative_dim: int = Field(
        0, ge=0, description="width of the co-occurrence factors that join the content (0: content only)"
    )
    collaborative_weight: float = Field(0.5, ge=0, description="length of these factors against a modality's 1")


class Scratch(Settings):
    """A small causal LM made here, for machines without a model hub."""

    arch: Literal["qwen3", "llama"] = Field("qwen3", description="architecture")
    hidden: int = Field(128, ge=8, description="width, D")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads")
    ffn: int = Field(384, ge=8, description="width of the feed-forward part")
    vocab: int = Field(1024, ge=300, description="byte-level BPE tokens")
    steps: int = Field(300, ge=0, description="pre-training steps on the catalogue's text")

    @model_validator(mode="after")
    def _heads_that_vllm_serves(self) -> Scratch:
        if self.hidden % (32 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} / heads {self.heads} = {self.hidden / self.heads:g} per head; vLLM's CPU "
                "kernels need a multiple of 32: give fewer heads or a larger hidden"
            )
        return self


class Lora(Settings):
    """peft's LoRA."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale numerator")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A")


class Backbone(Settings):
    """The language model and what is added to it."""

    base: str = Field("scratch:", description="Hugging Face name, local folder, or scratch: for a small one")
    scratch: Scratch = Field(Scratch(), description="the small one's shape")
    tune: Literal["lora", "full"] = Field("lora", description="LoRA, or every weight")
    lora: Lora = Field(Lora(), description="LoRA's settings")
    load_in: Literal["float32", "bfloat16", "int8", "nf4"] = Field("float32", description="precision of the base")
    soft_tokens: int = Field(1, ge=0, description="soft tokens per item, K (0: ids only)")
    soft_prompt: int = Field(4, ge=0, description="soft prompt tokens, P")
    profile: int = Field(128, ge=0, description="most values per item and modality of the content profile (0: none)")
    neighbours: int = Field(0, ge=0, description="neighbours and followers kept per item from the log (0: none)")
    trust_remote_code: bool = Field(False, description="run the code inside the base's own repository")


class Adapter(Settings):
    """Item features -> soft tokens."""

    kind: Literal["qformer", "mlp", "linear"] = Field("qformer", description="which adapter")
    width: int = Field(128, ge=4, description="inner width")
    layers: int = Field(1, ge=1, description="Q-Former blocks")
    heads: int = Field(4, ge=1, description="Q-Former heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the features")


class Align(Settings):
    """Training the adapter against the frozen LLM (EASE)."""

    steps: int = Field(150, ge=0, description="optimiser steps (0 skips alignment)")
    batch_size: int = Field(64, ge=2, description="items per step")
    learning_rate: float = Field(2e-3, gt=0, description="peak of AdamW's schedule")
    contrastive_weight: float = Field(0.1, ge=0, description="weight of the contrastive term")
    max_text_tokens: int = Field(64, ge=1, description="tokens of an item's text to reconstruct")
    looks: bool = Field(False, description="reconstruct what the picture shows (data.looks) beside the text")
    tune_base: bool = Field(False, description="tune a scratch base too: it has never seen a soft token")


class Mixture(Settings):
    """Samples of text per training history: how much of the second half, writing, is trained beside the first."""

    describe: float = Field(0.0, ge=0, description="history and item -> a description for this user")
    explain: float = Field(0.0, ge=0, description="history and item -> why this item, with items of the history")
    headline: float = Field(0.0, ge=0, description="history and item -> one line")
    id_text: float = Field(0.0, ge=0, description="semantic id -> the item's text")
    text_id: float = Field(0.0, ge=0, description="the item's text -> its semantic id")
    looks: float = Field(0.0, ge=0, description="the item's soft tokens -> what its picture shows (data.looks)")
    chat: float = Field(0.0, ge=0, description="a user's messages -> the role of each mention, as JSON")


class Sequence(Settings):
    """A self-attentive ranker (SASRec) on the same histories, whose scores join the lists after fine-tuning."""

    epochs: int = Field(0, ge=0, description="most epochs; it stops early on validation (0: none)")
    width: int = Field(128, ge=8, description="width of its vectors")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in its blocks")


class Mix(Settings):
    """A small network that orders the lists by all that is known of their items; it learns from validation."""

    users: int = Field(0, ge=0, description="validation users whose next item it learns from, at most (0: no mixer)")
    price: float = Field(
        0.015, ge=0, lt=1, description="share of known items' recall@10, of the generator's, that new items may cost"
    )


class NewItems(Settings):
    """Items that no training history holds: how they get into the lists."""

    relatives: int = Field(
        0, ge=0, description="known items, nearest by kinship, that a new one inherits from (0: none)"
    )
    lift: float = Field(
        0.0, description="nats on top of what a new item inherits, or of what mix.price allows: more shows more of them"
    )


class Finetune(Settings):
    """Fine-tuning by TRL's SFTTrainer."""

    epochs: float = Field(12, gt=0, description="passes over the histories")
    batch_rows: int = Field(16, ge=1, description="packed rows per device and step")
    pack_tokens: int = Field(256, ge=16, description="tokens per packed row")
    accumulate: int = Field(1, ge=1, description="gradient accumulation")
    learning_rate: float = Field(2e-3, gt=0, description="peak of AdamW's schedule")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps for warm-up")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on the LLM's input vectors")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    mixture: Mixture = Field(Mixture(), description="samples of text beside the histories")
    mixed_precision: Literal["auto", "no", "bf16"] = Field("auto", description="auto: bf16 on a GPU that has it")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    evals: int = Field(4, ge=1, description="evaluations on validation during training")
    valid_users: int = Field(500, ge=1, description="users in each of them")
    patience: int = Field(3, ge=1, description="evaluations without a better N@10 before it stops")


Baseline = Literal["popularity", "markov", "itemknn", "contentknn", "sasrec", "sasrec-features"]
Ablation = Literal[
    "tiger",
    "genrec-no-image",
    "genrec-no-text",
    "genrec-no-soft",
    "genrec-no-profile",
    "genrec-no-neighbours",
    "genrec-no-sequence",
    "genrec-no-mix",
    "genrec-no-scores",
    "genrec-no-collaborative",
    "genrec-no-pretraining",
]


class Evaluate(Settings):
    """What is compared with what."""

    beams: int = Field(50, ge=1, description="beam width of the generator")
    baselines: list[Baseline] = Field(
        ["popularity", "markov", "itemknn", "sasrec"],
        description="fair simple rivals, trained in the same run",
    )
    systems: list[str] = Field(
        [], description="published systems, trained in the same run: names of `genrec systems list`, or YAML files"
    )
    ablations: list[Ablation] = Field([], description="the generator without a part, trained in the same run")
    sasrec_epochs: int = Field(60, ge=1, description="most epochs of SASRec; it stops early on validation")
    sasrec_search: bool = Field(False, description="search SASRec's rate, dropout and width on validation")
    bootstrap: int = Field(1000, ge=100, description="resamples behind each interval")


class MinOverlap(Settings):
    """Least share of the export's top 10 that a quantised copy's must hold; with less it is refused, and not served."""

    int8: float = Field(0.95, ge=0, le=1, description="of an int8 copy")
    nf4: float = Field(0.8, ge=0, le=1, description="of an NF4 copy")
    w8a8: float = Field(0.95, ge=0, le=1, description="of a W8A8 copy")
    w4a16: float = Field(0.8, ge=0, le=1, description="of a W4A16 copy")


class Serve(Settings):
    """Export and serving."""

    quantise: list[Literal["nf4", "int8", "w8a8", "w4a16"]] = Field(
        ["int8", "nf4"],
        description="quantised copies of the export; the last two are for vLLM, which must be installed",
    )
    min_overlap: MinOverlap = Field(MinOverlap(), description="what a copy's lists must share with the export's")
    rerank: str | None = Field(
        None, description="a published system that re-orders what the beams find, a name or YAML file; null: none"
    )


class Recipe(Settings):
    """Everything one run needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="the run's folder under runs/")
    seed: int = Field(0, ge=0, description="every random choice follows from it")
    data: Data
    encode: Encode = Encode()
    semantic_ids: SemanticIds = SemanticIds()
    backbone: Backbone = Backbone()
    adapter: Adapter = Adapter()
    align: Align = Align()
    finetune: Finetune = Finetune()
    sequence: Sequence = Sequence()
    mix: Mix = Mix()
    new_items: NewItems = NewItems()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _base_that_alignment_may_tune(self) -> Recipe:
        if self.align.tune_base and not (self.backbone.base.startswith("scratch:") and self.backbone.tune == "full"):
            raise ValueError(
                f"align.tune_base tunes every weight of a scratch base; found backbone.base {self.backbone.base!r} and "
                f'backbone.tune {self.backbone.tune!r}: use "scratch:" and full, or set it to false'
            )
        return self


def _valid_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        if isinstance(part, int):  # an item of a list: its model was found with the list
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        annotation = field.annotation if field is not None else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(model.model_fields) if model is not None else []


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, or holds something else.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror}); give the path of a recipe") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not valid YAML: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    return raw


def validated(model: type[Checked], raw: dict[str, Any], source: str) -> Checked:
    """Settings of a model from a dictionary; `source` is named in errors.

    Raises:
        ConfigError: a key or value that no setting takes; the message names it and the nearest valid key.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as err:
        lines = []
        for problem in err.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "recipe"
            if problem["type"] == "extra_forbidden":
                valid = _valid_keys(model, problem["loc"])
                near = difflib.get_close_matches(str(problem["loc"][-1]), valid, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; valid: {valid}"
                lines.append(f"{where}: unknown setting{hint}")
            else:
                lines.append(f"{where}: {problem['msg']} (found {problem.get('input')!r})")
        raise ConfigError(f"{source}: " + "; ".join(lines)) from err


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or holds a key or value that no setting takes.
    """
    return resolve_recipe(read_yaml(path), source=str(path), folder=path.parent)


def resolve_recipe(raw: dict[str, Any], source: str = "recipe", folder: Path = Path()) -> Recipe:
    """Check a recipe given as a dictionary; `source` is named in errors, relative paths start at `folder`.

    Raises:
        ConfigError: as `validated`.
    """
    recipe = validated(Recipe, raw, source)

    def absolute(path: Path | None) -> Path | None:
        return path if path is None or path.is_absolute() else (folder / path).resolve()

    data = recipe.data.model_copy(
        update={"items": absolute(recipe.data.items), "interactions": absolute(recipe.data.interactions)}
    )
    encoders = {
        name: encoder.model_copy(update={"path": absolute(encoder.path)})
        for name in ("text", "image")
        if (encoder := getattr(recipe.encode, name)) is not None
    }
    return recipe.model_copy(update={"data": data, "encode": recipe.encode.model_copy(update=encoders)})
