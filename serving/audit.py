"""Which model and prompt wrote a text: from what travels with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genrec.errors import DataError
from genrec.prompts import prompt_version
from genrec.serving.batch import ledger_lines
from genrec.serving.export import Export

MOST = 20  # texts shown


def find_origin(
    where: Path, *, row: int | None = None, text: str | None = None, export: Path | None = None
) -> list[dict[str, Any]]:
    """The provenance of some texts.

    Args:
        where: a folder of `genrec.serving.batch.describe_pairs`, or an answer of /v1/describe as a JSON file.
        row: of the folder's pairs file.
        text: words that the text holds.
        export: an export's folder; adds whether it wrote the text.

    Returns:
        text and provenance of at most `MOST` texts, each with `template_here`: whether this installation's template
        for the task is the one that was used ("same", "another"); and with the template itself where it is kept.

    Raises:
        DataError: nothing there, nothing found, or text without provenance.
    """
    if where.is_dir():
        lines = ledger_lines(where)
        if not lines:
            raise DataError(f"{where}: no ledger there; give the --out folder of genrec describe")
        if row is None and text is None:
            raise DataError("a folder holds many texts; say which with --row or --text")
        found = _rows(where, lines[1:], row, text)
        for one in found:
            one["template"] = lines[0]["template"]
    else:
        found = [_answer(where)]
    if not found:
        raise DataError(f"{where}: no text of {f'row {row}' if row is not None else f'the words {text!r}'} there")
    key = None if export is None else str(Export.load(export).manifest["key"])[:12]
    for one in found:
        task = str(one["prompt"]).rsplit("-", 1)[0]
        one["template_here"] = "same" if prompt_version(task) == one["prompt"] else "another"
        if key is not None:
            one["export_given"] = "same" if key == one["export"] else f"another ({key})"
    return found


def _rows(out: Path, chunks: list[dict[str, Any]], row: int | None, text: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for chunk in chunks:
        span = range(chunk["first_row"], chunk["first_row"] + chunk["written"] + chunk["rejected"])
        if row is not None and row not in span:
            continue
        path = out / f"part-{chunk['chunk']}.parquet"
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as err:
            raise DataError(f"{path}: cannot be read ({err}); the ledger says it was written whole") from err
        for one in table.to_pylist():
            if row in (None, one["row"]) and (text is None or text in one["text"]):
                found.append(one)
                if len(found) == MOST:
                    return found
        if row is not None and not found:
            rejected = pq.read_table(out / f"rejected-{chunk['chunk']}.parquet").to_pylist()
            for one in rejected:
                if one["row"] == row:
                    raise DataError(f"{out}: row {row} was rejected: {one['reason']}")
    return found


def _answer(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"{path}: no JSON answer of /v1/describe ({err})") from err
    origin = answer.get("provenance") if isinstance(answer, dict) else None
    if not isinstance(origin, dict) or not origin.get("generated") or "prompt" not in origin or "export" not in origin:
        raise DataError(f"{path}: the answer holds no provenance; only texts of this version and later carry one")
    return {"text": answer.get("text"), **origin}
