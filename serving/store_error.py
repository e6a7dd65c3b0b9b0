"""What went wrong with the user store, in words that say what to do."""

from __future__ import annotations

import sqlite3
from typing import Literal

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from genrec.errors import GenrecError

Kind = Literal["locked", "full", "gone"]
ADVICE: dict[Kind, str] = {
    "locked": "another transaction holds its lock; send the request again",
    "full": "its disk is full; free some space, then send the request again",
    "gone": "it cannot be reached or written; see that it runs and that this process may write it",
}
LOCKED_STATES = ("55P03", "57014", "40001", "40P01")  # lock and statement timeouts, serialisation, deadlock
FULL_STATES = ("53100",)


class StoreError(GenrecError, RuntimeError):
    """The user store did not answer.

    Attributes:
        kind: why: "locked", "full" or "gone".
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def explain(err: SQLAlchemyError, shown: str) -> StoreError:
    """The database's error without its statement and values.

    Args:
        err: of SQLAlchemy or of a driver below it.
        shown: the store's address without a password.
    """
    cause = err.orig if isinstance(err, DBAPIError) else None
    kind: Kind = "gone"
    detail = type(cause or err).__name__
    if isinstance(err, PoolTimeout):
        kind = "locked"
    elif isinstance(cause, sqlite3.Error):
        detail = getattr(cause, "sqlite_errorname", detail)
        if detail.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            kind = "locked"
        elif detail.startswith("SQLITE_FULL"):
            kind = "full"
    elif (state := getattr(cause, "sqlstate", None)) is not None:
        detail = f"{detail}, SQLSTATE {state}"
        if state in LOCKED_STATES:
            kind = "locked"
        elif state in FULL_STATES:
            kind = "full"
    return StoreError(kind, f"store {shown} is {kind} ({detail}): {ADVICE[kind]}")
