"""From a request's item ids to catalogue rows, beam widths and prompts: the same for every engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from genrec.catalog import Catalogue
from genrec.errors import DataError
from genrec.prompts import Prompt
from genrec.serving.engine import JsonRequest, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.writer import STYLES, TASKS, evidence_of

DEFAULT_BEAMS = 50
MAX_POSITIONS = 4096  # of a prompt and its answer, in every engine; vLLM reserves cache for as many
SHOWN = 5


def item_rows(catalogue: Catalogue, item_ids: Sequence[str]) -> list[int]:
    """Catalogue rows of item ids, in the same order.

    Raises:
        DataError: names the ids that the catalogue does not hold.
    """
    unknown = [item for item in item_ids if item not in catalogue.index]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        shown = ", ".join(repr(item[:100]) for item in unknown[:SHOWN])
        raise DataError(
            f"item ids not in this export's catalogue of {len(catalogue.item_ids)} items: {shown}{more}; "
            "leave them out, or export a run on a catalogue that holds them"
        )
    return [catalogue.index[item] for item in item_ids]


def beam_width(request: RecommendRequest, n_items: int) -> int:
    """Beams for a request: at least `k`, so that a narrow beam never shortens the list; at most the catalogue.

    Raises:
        DataError: `k` or `beams` is below 1.
    """
    if request.k < 1 or (request.beams is not None and request.beams < 1):
        raise DataError(f"k and beams are 1 or more; found k={request.k}, beams={request.beams}")
    return min(n_items, max(request.k, DEFAULT_BEAMS if request.beams is None else request.beams))


def max_positions(export: Export, most: int = MAX_POSITIONS) -> int:
    """Tokens of a prompt and its answer: what the model's config allows, and at most `most`."""
    config = json.loads((export.model_dir / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    return min(most, int(config.get("max_position_embeddings", most)))


def _fitting(
    export: Export, history: list[int], write: Callable[[list[int]], Prompt], answer: int, positions: int
) -> Prompt:
    """The prompt of the newest events that leave room for an answer of so many tokens."""
    fixed = len(write([]).input_ids)
    room = positions - fixed - answer
    if room < 0:
        raise DataError(
            f"an answer of {answer} tokens and a prompt of {fixed} exceed the model's {positions} positions; "
            "ask for fewer (max_tokens), or serve with more (max_model_len)"
        )
    events = room // (export.layout.levels + export.layout.soft_tokens)
    return write(history[max(0, len(history) - events) :])


def recommend_prompt(export: Export, history: list[int], positions: int) -> Prompt:
    """The prompt for the next item; the oldest events give way where positions end.

    Args:
        export: the export.
        history: catalogue rows, oldest first.
        positions: see `max_positions`; the L tokens of the answer are included.

    Raises:
        DataError: not even an empty history fits.
    """
    return _fitting(export, history, export.prompter.next_item, export.layout.levels, positions)


def text_prompt(export: Export, request: TextRequest | JsonRequest, positions: int) -> Prompt:
    """The prompt for text about an item, for the user with this history; the oldest events give way.

    Or for the JSON of a message.

    Raises:
        DataError: an unknown item, task or style, `max_tokens` below 1 or beyond the model, a negative temperature.
    """
    if request.max_tokens < 1 or request.temperature < 0:
        raise DataError(
            f"max_tokens is 1 or more and temperature 0 or more; found max_tokens={request.max_tokens}, "
            f"temperature={request.temperature}"
        )
    if isinstance(request, JsonRequest):
        prompt = export.prompter.chat_query(request.message)
        return _fitting(export, [], lambda _: prompt, request.max_tokens, positions)
    if request.task not in TASKS or request.style not in STYLES:
        raise DataError(
            f"no text of task {request.task!r} and style {request.style!r}; tasks: {', '.join(TASKS)}; "
            f"styles: {', '.join(STYLES)}"
        )
    (row,) = item_rows(export.catalogue, [request.item_id])
    history = item_rows(export.catalogue, request.history)
    # of the whole history, whatever part of it fits
    named = {"evidence": evidence_of(export.catalogue, history, row)} if request.task == "explain" else {}

    def write(events: list[int]) -> Prompt:
        return export.prompter.write(request.task, events, row, style=request.style, **named)

    return _fitting(export, history, write, request.max_tokens, positions)
