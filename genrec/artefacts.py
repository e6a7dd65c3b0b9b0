"""Stages of a run: each writes one folder atomically, and is skipped when nothing it depends on changed.

A stage's *key* is a hash over its settings, its inputs' keys and this package's version. Work happens in a hidden
folder beside the target and ends in one rename, so a killed stage leaves the last whole artefact in place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genrec.errors import ArtefactError, GenrecError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LEAST_FREE = 1 << 20  # bytes; a failed write with less than this free is counted as a full disk
VERSIONED = ("genrec", "torch", "transformers", "peft", "trl", "accelerate")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex.

    Raises:
        ArtefactError: the file cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as err:
        raise ArtefactError(f"{path}: cannot be read ({err.strerror}); check the path and its permissions") from err


def key_of(value: Any) -> str:
    """SHA-256 of a JSON-able value, as hex; dictionaries hash the same in any order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that the file is either the old one or the whole new one.

    Raises:
        ArtefactError: the disk is full or the folder is read-only; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as err:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ArtefactError(
            f"{path}: cannot be written ({err.strerror}); free some space or fix the permissions, then run again"
        ) from err


def read_manifest(folder: Path) -> dict[str, Any]:
    """A stage's manifest.

    Raises:
        ArtefactError: the folder holds no whole artefact.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder}: no {MANIFEST} there, so no whole artefact; run the stage that writes it")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ArtefactError(f"{path}: not valid JSON ({err}); delete {folder} and run again") from err
    return manifest


def peak_rss_mb(who: int = resource.RUSAGE_SELF) -> float:
    """Peak resident memory so far of this process, or of the largest of its children that ended, in MB."""
    return resource.getrusage(who).ru_maxrss / 1024


def git_commit() -> str | None:
    """The checkout's commit, or None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_problem(err: BaseException, folder: Path) -> str | None:
    """What kept an artefact from being written, or None when the error is about something else.

    Libraries hide the operating system's error in types of their own (safetensors, tokenizers, torch, pyarrow), so
    their messages and the space that is left count too.

    Args:
        err: what was raised while writing.
        folder: where, or below it.
    """
    while not folder.exists():
        folder = folder.parent
    if isinstance(err, OSError) and (err.errno not in (None, errno.ENOENT) or "written" in str(err)):
        return err.strerror or str(err)  # numpy says "1000 requested and 0 written", without a number
    if "No space left" in str(err) or "quota exceeded" in str(err) or shutil.disk_usage(folder).free < LEAST_FREE:
        return os.strerror(errno.ENOSPC)
    return None


def run_stage(
    run_dir: Path,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    build: Callable[[Path], Mapping[str, Any] | None],
    force: bool = False,
) -> Path:
    """Run one stage unless its artefact is already there, and return the artefact's folder.

    Args:
        run_dir: the run's folder.
        name: the artefact's place inside it, such as ``"semantic_ids"`` or ``"features/text"``.
        settings: the resolved settings that the result depends on (JSON-able).
        inputs: name -> key (or content hash) of everything else that the result depends on.
        build: writes the artefact into the empty folder it is given; what it returns goes into the manifest
            under ``"result"``.
        force: run even when nothing changed.

    Raises:
        ArtefactError: the artefact cannot be written (full disk, read-only folder).
    """
    target = run_dir / name
    work = target.parent / f".{target.name}.part"
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    key = key_of({"stage": name, "settings": dict(settings), "inputs": dict(inputs)})
    if not force and (target / MANIFEST).is_file() and read_manifest(target).get("key") == key:
        log.info("%s: unchanged, skipped", name)
        return target
    log.info("%s: running", name)
    started = time.monotonic()
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        result = build(work)
        write_json(
            work / MANIFEST,
            {
                "stage": name,
                "key": key,
                "settings": dict(settings),
                "inputs": dict(inputs),
                "result": dict(result or {}),
                "versions": _versions(),
                "commit": git_commit(),
                "seconds": round(time.monotonic() - started, 3),
                "peak_rss_mb": round(peak_rss_mb(), 1),
            },
        )
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        work.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except GenrecError:
        raise
    except Exception as err:
        problem = write_problem(err, run_dir)
        if problem is None:
            raise
        raise ArtefactError(
            f"{target}: cannot be written ({problem}); the last whole artefact is untouched. "
            "Free some space or fix the permissions, then run the same command again"
        ) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("%s: done in %.1f s", name, time.monotonic() - started)
    return target


def key_at(folder: Path) -> str:
    """The key of the artefact in a folder."""
    return str(read_manifest(folder)["key"])
