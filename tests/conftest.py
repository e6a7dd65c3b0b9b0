"""Shared fixtures: a tiny run, prepared once, and a tiny whole path, run once."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genrec.config import resolve_recipe
from genrec.pipeline import Run
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.whole_path import whole_path
from tests.engines import FaultyEngine
from tests.export_fixture import make_export
from tests.postgres_fixture import Cluster, cluster

# widths in multiples of 64, so that NF4 has layers to work on; short rows, so that an epoch has several steps
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"synthetic": {"n_items": 60, "n_users": 120}},
    "semantic_ids": {"codes": 8},
    "backbone": {
        "scratch": {"hidden": 64, "layers": 1, "heads": 2, "ffn": 64, "vocab": 400, "steps": 3},
        "lora": {"r": 4, "alpha": 8},
        "soft_tokens": 2,
    },
    "adapter": {"width": 16, "dropout": 0.0},
    "align": {"steps": 3, "batch_size": 16, "max_text_tokens": 16},
    "finetune": {"epochs": 2, "batch_rows": 8, "pack_tokens": 128, "evals": 2, "valid_users": 30},
    "evaluate": {"sasrec_epochs": 2, "bootstrap": 100, "beams": 20},
}

WITH_ABLATIONS = {"ablations": ["genrec-no-image", "genrec-no-soft"]}


def tiny_recipe(**sections: dict[str, Any]) -> dict[str, Any]:
    """`RECIPE` with some settings of some sections changed."""
    return {**RECIPE, **{name: {**RECIPE.get(name, {}), **changes} for name, changes in sections.items()}}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything before fine-tuning."""
    run = Run.create(resolve_recipe(RECIPE), tmp_path_factory.mktemp("prepared"))
    run.prepare()
    run.encode()
    run.base()
    run.semantic_ids()
    run.align()
    return run


@pytest.fixture(scope="module")
def torch_engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """A real engine on a tiny random export."""
    return TorchEngine(Export.load(make_export(tmp_path_factory.mktemp("e"))), "cpu")


@pytest.fixture
def faulty_engine(torch_engine: TorchEngine) -> Iterator[FaultyEngine]:
    """The same behind a switch; whatever hangs in it goes on after the test."""
    made = FaultyEngine(torch_engine)
    yield made
    made.hang.set()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], list[str]]:
    """The whole path with ablations and quantised copies: the run, metrics.json as returned, and the log."""
    recipe = resolve_recipe(tiny_recipe(evaluate=WITH_ABLATIONS))
    run = Run.create(recipe, tmp_path_factory.mktemp("whole"))
    metrics, lines = logged(run)
    return run, metrics, lines


def logged(run: Run) -> tuple[dict[str, Any], list[str]]:
    """`whole_path` of a fresh view of the run's folder, and what it logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("genrec")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        metrics = whole_path(Run(run.folder, run.recipe, run.folder))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return metrics, lines


def ran(lines: list[str]) -> list[str]:
    """The stages that the log says were run."""
    return [line.removesuffix(": running") for line in lines if line.endswith(": running")]


def manifest_times(folder: Path) -> dict[str, int]:
    """When every artefact below a folder was finished."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL of one test file, which may stop it."""
    with cluster() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A user store's address, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/users.sqlite3"
    return str(request.getfixturevalue("postgres").url)
