"""The verdicts of make bench-writing: targets that hold, and targets that do not."""

from pathlib import Path

import numpy as np

from benchmarks.kept import Kept
from benchmarks.writing import SEEDS, text_checks, verdicts
from genrec.chat_replies import FITS, STRANGERS
from genrec.writer import PICTURE_ONLY, TASKS


def _values(right: float) -> dict[str, list[dict[str, np.ndarray]]]:
    """Two seeds whose figures are all `right`, give or take, and whose controls are at 0."""
    names = ["faithful", "picture right", "personal", "swapped history, swapped text", "useful"]
    controls = ["personal, item-only writer", *(f"{name} right, shuffled soft tokens" for name in PICTURE_ONLY)]
    of = {name: np.full(3, right) for name in names} | {name: np.zeros(3) for name in controls}
    chat = {"held-out values": np.full(3, right), "held-out values and phrasings": np.full(3, 0.2)}
    chat |= {FITS: np.full(3, right), STRANGERS: np.full(3, 1 - right)}
    return {task: [of, of] for task in TASKS} | {"chat": [chat, chat]}


def test_perfect_texts_hold_every_line_and_poor_ones_lose_every_target() -> None:
    assert all(check.holds for check in text_checks(_values(1.0)))
    poor = text_checks(_values(0.1))
    lost = [check.check for check in poor if not check.holds]
    assert len(lost) == 9  # three tasks' truth, pictures, reader, swap, and of the chat queries, items and mentions
    assert "chat: last query exactly right, held-out values" in lost


def test_the_verdicts_are_of_all_that_is_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "writing.npz")
    perfect = _values(1.0)
    arrays = {f"{task}/{name}": of for task, (seed, _) in perfect.items() for name, of in seed.items()}
    for seed in SEEDS:
        checks, tables = verdicts(kept)
        assert (checks[0].value, checks[0].holds) == (seed, False)
        kept.put(f"texts/{seed}", {**arrays, "tables": np.array('{"describe": "as it came"}')}, 1.0)
    checks, tables = verdicts(Kept(tmp_path / "writing.npz"))
    assert checks[0].holds
    assert checks[1:] == text_checks({task: [of, of, of, of, of] for task, (of, _) in perfect.items()})
    assert tables["Seed 0, describe"] == "as it came"
