"""API keys: a file of hashes, each with a tenant, scopes and the tenant's limits.

A key reads ``genrec_ID_SECRET``. The secret is 256 random bits, so its plain SHA-256 cannot be searched: the slow
hashes that guard passwords would only slow every request down. The file never holds a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genrec.artefacts import write_text
from genrec.errors import ConfigError

log = logging.getLogger(__name__)
Scope = Literal["recommend", "read", "write", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("recommend", "read", "write", "admin", "metrics")
PREFIX = "genrec"
CHECK_S = 1.0  # how often the file is looked at for changes
Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Limits(_Entry):
    """What a tenant may ask for per second; None is no limit."""

    requests_per_s: Rate | None = None
    beams_per_s: Rate | None = None
    tokens_per_s: Rate | None = None


class Key(_Entry):
    """One key without its secret."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    tenant: Tenant
    scopes: list[Scope] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str


class KeyFile(_Entry):
    """What the file holds."""

    keys: list[Key] = []
    tenants: dict[Tenant, Limits] = {}


class Keys:
    """Looks keys up; a changed file is read again within `CHECK_S` seconds, a broken one is not taken over."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: the file is missing, broken, or readable by everyone.
        """
        self.path = path
        self._seen = _stamp(path)
        self._take(read_keys(path))
        self._checked = time.monotonic()

    def find(self, token: str) -> tuple[Key, Limits] | None:
        """The key whose secret this is, and its tenant's limits; None for any other text."""
        self._reload()
        prefix, _, rest = token.partition("_")
        name, _, secret = rest.partition("_")
        key = self._keys.get(name) if prefix == PREFIX else None
        found = hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
        if key is None or not hmac.compare_digest(found, key.sha256):
            return None
        return key, self._limits.get(key.tenant, Limits())

    def _take(self, found: KeyFile) -> None:
        self._keys = {key.id: key for key in found.keys}
        self._limits = found.tenants

    def _reload(self) -> None:
        if time.monotonic() - self._checked < CHECK_S:
            return
        self._checked = time.monotonic()
        try:
            stamp = _stamp(self.path)
            if stamp != self._seen:
                self._seen = stamp
                self._take(read_keys(self.path))
                log.info("API keys: %d, read again", len(self._keys))
        except ConfigError as err:
            log.error("API keys stay as they were: %s", err)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_keys(path: Path) -> KeyFile:
    """Read and check a file of keys.

    Raises:
        ConfigError: the file is missing, broken, or readable by everyone.
    """
    advice = "make one with `genrec keys add FILE --tenant NAME --scope recommend`"
    try:
        mode = os.stat(path).st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: no file of API keys ({type(err).__name__}); {advice}") from err
    if mode & 0o007:
        raise ConfigError(f"{path}: mode {mode & 0o777:o} lets every user of this machine in; run `chmod 600 {path}`")
    try:
        found = KeyFile.model_validate_json(text)
    except ValidationError as err:
        first = err.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: no file of API keys: {where}: {first['msg']}; {advice}") from err
    if len({key.id for key in found.keys}) != len(found.keys):
        raise ConfigError(f"{path}: two keys have the same id; remove one")
    return found


def add_key(path: Path, tenant: str, scopes: list[str], limits: Mapping[str, float | None]) -> str:
    """Add a key, and set the tenant's limits that are given.

    Returns:
        The key with its secret; it is stored nowhere.

    Raises:
        ConfigError: a bad tenant, scope, limit or file.
    """
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ConfigError(f"no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
    file = read_keys(path) if path.exists() else KeyFile()
    name, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    before = file.tenants.get(tenant, Limits()).model_dump()
    given = {kind: rate for kind, rate in limits.items() if rate is not None}
    try:
        key = {
            "id": name,
            "tenant": tenant,
            "scopes": sorted(set(scopes)),
            "sha256": hashlib.sha256(secret.encode()).hexdigest(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        tenants = {**file.model_dump()["tenants"], tenant: {**before, **given}}
        file = KeyFile.model_validate({"keys": [*file.model_dump()["keys"], key], "tenants": tenants})
    except ValidationError as err:
        first = err.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; found {first['input']!r}") from err
    _write(path, file)
    return f"{PREFIX}_{name}_{secret}"


def revoke_key(path: Path, name: str) -> None:
    """Remove a key; running gateways refuse it within `CHECK_S` seconds.

    Raises:
        ConfigError: no such key.
    """
    file = read_keys(path)
    left = [key for key in file.keys if key.id != name]
    if len(left) == len(file.keys):
        raise ConfigError(f"{path}: no key with the id {name!r}; see `genrec keys list {path}`")
    _write(path, file.model_copy(update={"keys": left}))


def _write(path: Path, file: KeyFile) -> None:
    old = os.umask(0o077)
    try:
        write_text(path, file.model_dump_json(indent=2) + "\n")
    finally:
        os.umask(old)
