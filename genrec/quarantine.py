"""Rows of a user's file that could not be used, each with its reason."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from genrec.errors import DataError

log = logging.getLogger(__name__)
_SHOWN_ROWS = 5
_SHOWN_CHARS = 120


@dataclass
class Quarantine:
    """Bad rows of one file.

    Attributes:
        source: the file.
        n_rows: rows in the file, good and bad.
        rows: 1-based number of each bad row among the file's rows.
        item_ids: its item id, where it has one.
        reasons: what is wrong with it, from a small fixed set, so that it can be counted.
        raw: the row as JSON.
    """

    source: Path
    n_rows: int
    rows: list[int] = field(default_factory=list)
    item_ids: list[str | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    def add(self, row: int, item_id: str | None, reason: str, raw: Mapping[str, Any]) -> None:
        """Set one row aside; `row` counts from 1."""
        self.rows.append(row)
        self.item_ids.append(item_id)
        self.reasons.append(reason)
        self.raw.append(json.dumps(raw, ensure_ascii=False, default=str))

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of entries, the most frequent first."""
        return dict(Counter(self.reasons).most_common())

    def check(self, max_bad_share: float) -> None:
        """Log the counts, and stop when too many rows are bad.

        Raises:
            DataError: more than `max_bad_share` of the file's rows are here.
        """
        if self.rows:
            log.warning("%s: quarantined %s of %d rows", self.source, self.counts, self.n_rows)
        stop_above(self, self.counts, len(set(self.rows)), max_bad_share)

    def save(self, folder: Path) -> None:
        """Write ``quarantine.parquet`` (row int64, item_id, reason, raw) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {
                "row": pa.array(self.rows, pa.int64()),
                "item_id": pa.array(self.item_ids, pa.string()),
                "reason": pa.array(self.reasons, pa.string()),
                "raw": pa.array(self.raw, pa.string()),
            }
        )
        pa.parquet.write_table(table, folder / "quarantine.parquet")


def stop_above(first: Quarantine, counts: Mapping[str, int], n_bad: int, max_bad_share: float) -> None:
    """Stop when too many rows are bad.

    Args:
        first: the bad rows, or at least the first few.
        counts: reason -> number, over all bad rows.
        n_bad: number of bad rows.
        max_bad_share: the largest share of the file's rows that may be bad.

    Raises:
        DataError: the share is larger; the message holds the counts and the first few rows.
    """
    if n_bad <= max_bad_share * first.n_rows:
        return
    shown = "; ".join(
        f"row {row} ({reason}): {raw[:_SHOWN_CHARS]}"
        for row, reason, raw in list(zip(first.rows, first.reasons, first.raw, strict=True))[:_SHOWN_ROWS]
    )
    raise DataError(
        f"{first.source}: {n_bad} of {first.n_rows} rows are bad ({n_bad / first.n_rows:.1%}, more than "
        f"data.max_bad_share = {max_bad_share:.1%}): {dict(counts)}. First: {shown}. "
        "Mend the file, map the right columns, or raise data.max_bad_share"
    )
