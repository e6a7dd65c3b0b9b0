"""Where a generated text comes from: it travels with every text, in answers and in files."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from typing import Any

from genrec.prompts import prompt_version
from genrec.serving.engine import TextRequest
from genrec.serving.export import Export


@dataclass(frozen=True)
class Provenance:
    """Who wrote a text, with what, when, about what, for whom.

    Attributes:
        model: the run's name.
        export: the first 12 letters of the export's key.
        genrec: the version that wrote the export.
        engine: "torch" or "vllm".
        prompt: task and hash of its template, see `genrec.prompts.prompt_version`.
        style: see `genrec.writer.STYLES`.
        temperature, seed: of the sampling.
        time: UTC, to the second.
        item_id: what the text is about.
        user: keyed hash of the user's name; None for nobody in particular.
        generated: always true: no person wrote this.
    """

    model: str
    export: str
    genrec: str
    engine: str
    prompt: str
    style: str
    temperature: float
    seed: int
    time: str
    item_id: str
    user: str | None
    generated: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON and Parquet."""
        return asdict(self)


def provenance_of(export: Export, engine: str, request: TextRequest, user: str | None = None) -> Provenance:
    """The provenance of a text that is written now.

    Args:
        export: what wrote it.
        engine: the engine's name.
        request: what was asked.
        user: hash of the user's name.
    """
    manifest = export.manifest
    return Provenance(
        model=str(manifest.get("settings", {}).get("name", "unknown")),
        export=str(manifest["key"])[:12],
        genrec=str(manifest.get("versions", {}).get("genrec", "unknown")),
        engine=engine,
        prompt=prompt_version(request.task),
        style=request.style,
        temperature=request.temperature,
        seed=request.seed,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        item_id=request.item_id,
        user=user,
    )


@dataclass(frozen=True)
class Written:
    """A generated text with where it comes from; ``str()`` is the text alone."""

    text: str
    finish_reason: str  # "stop" or "length"
    provenance: Provenance

    def __str__(self) -> str:
        return self.text
