"""Users' names where others may read along: a keyed hash, the same for the same user as long as the salt is."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

SALT_VARIABLE = "GENREC_LOG_SALT"


def salt_of_environment() -> bytes | None:
    """The salt that the environment gives (`SALT_VARIABLE`), if any."""
    return os.environ.get(SALT_VARIABLE, "").encode() or None


class UserHash:
    """Hashes of users' names.

    The salt is given, or comes from the environment, else it is drawn anew.
    """

    def __init__(self, salt: bytes | None = None) -> None:
        self._salt = salt or salt_of_environment() or secrets.token_bytes(32)

    def __call__(self, tenant: str, user_id: str) -> str:
        """16 hexadecimal digits."""
        text = f"{tenant}\0{user_id}".encode()
        return hmac.new(self._salt, text, hashlib.sha256).hexdigest()[:16]
