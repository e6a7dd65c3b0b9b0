"""From a request's item ids to catalogue rows, beam widths and prompts: the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from genrec.catalog import Catalogue
from genrec.errors import DataError
from genrec.prompts import Prompt
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export

DEFAULT_BEAMS = 50
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


def _newest(export: Export, history: list[int], empty: Prompt, reserve: int, limit: int) -> list[int]:
    layout = export.layout
    room = (limit - reserve - len(empty.input_ids)) // (layout.levels + layout.soft_tokens)
    return history[max(0, len(history) - room) :] if room > 0 else []


def recommend_prompt(export: Export, history: list[int], max_positions: int) -> Prompt:
    """The prompt for the next item; the oldest events give way where the model's positions end.

    Args:
        export: the export.
        history: catalogue rows, oldest first.
        max_positions: positions of the model, the L tokens of the answer included.
    """
    prompter = export.prompter
    return prompter.next_item(_newest(export, history, prompter.next_item([]), export.layout.levels, max_positions))


def text_prompt(export: Export, request: TextRequest, max_positions: int) -> Prompt:
    """The prompt for text about an item, for the user with this history; the oldest events give way.

    Raises:
        DataError: an unknown item, `max_tokens` below 1 or beyond the model, or a negative temperature.
    """
    if request.max_tokens < 1 or request.temperature < 0:
        raise DataError(
            f"max_tokens is 1 or more and temperature 0 or more; found max_tokens={request.max_tokens}, "
            f"temperature={request.temperature}"
        )
    (row,) = item_rows(export.catalogue, [request.item_id])
    history = item_rows(export.catalogue, request.history)
    prompter = export.prompter
    kept = _newest(export, history, prompter.describe([], row), request.max_tokens, max_positions)
    prompt = prompter.describe(kept, row)
    if len(prompt.input_ids) + request.max_tokens > max_positions:
        raise DataError(
            f"max_tokens={request.max_tokens} and a prompt of {len(prompt.input_ids)} tokens exceed the model's "
            f"{max_positions} positions; ask for fewer"
        )
    return prompt
