"""What a long benchmark measured, one file of arrays: it grows with every run, and all tables are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.results import machine
from genrec.artefacts import git_commit


class Kept:
    """Arrays under names such as ``lists/amazon-scientific/0/genrec``, each part with the run that it comes from."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: an .npz file; made by the first `put`.
        """
        self._path = path
        self._arrays = self._read()

    def _read(self) -> dict[str, np.ndarray]:
        if not self._path.is_file():
            return {}
        with np.load(self._path) as stored:
            return {name: stored[name] for name in stored.files}

    def put(self, part: str, arrays: Mapping[str, np.ndarray], seconds: float) -> None:
        """Replace what is kept under a part, and write the file; `seconds`: what measuring it took."""
        self._arrays = {name: of for name, of in self._read().items() if not name.startswith(f"{part}/")}
        self._arrays |= {f"{part}/{name}": np.asarray(of) for name, of in arrays.items()}
        self._arrays[f"{part}/about"] = np.array(f"{str(git_commit())[:12]} | {machine()} | {seconds:.0f}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **self._arrays)  # type: ignore[arg-type]
        temporary.replace(self._path)

    def get(self, part: str) -> dict[str, np.ndarray]:
        """The arrays under a part, without what says where they come from."""
        start = f"{part}/"
        return {
            name.removeprefix(start): of
            for name, of in self._arrays.items()
            if name.startswith(start) and name.rsplit("/", 1)[1] != "about"
        }

    def below(self, part: str) -> list[str]:
        """Names one level below a part, sorted; numbers by their size."""
        found = {name.removeprefix(f"{part}/").split("/")[0] for name in self._arrays if name.startswith(f"{part}/")}
        return sorted(found - {"about"}, key=lambda name: (int(name) if name.isdigit() else -1, name))

    @property
    def seconds(self) -> float:
        """What measuring all of it took."""
        return sum(float(seconds) for _, _, seconds in self._abouts().values())

    def _abouts(self) -> dict[str, list[str]]:
        """Part -> commit, machine, seconds."""
        names = sorted(name for name in self._arrays if name.endswith("/about"))
        return {name.removesuffix("/about"): str(self._arrays[name]).split(" | ") for name in names}

    def runs(self) -> str:
        """Markdown: which run each part comes from; neighbours of one folder, commit and machine stand in one line."""
        rows: list[list[str]] = []
        for part, (commit, machine_, _) in self._abouts().items():
            folder, _, name = part.rpartition("/")
            if rows and rows[-1][0] == folder and rows[-1][2:] == [commit, machine_]:
                rows[-1][1] += f", {name}"
            else:
                rows.append([folder, name, commit, machine_])
        lines = ["| part | what | commit | machine |", "|---|---|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
