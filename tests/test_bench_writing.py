"""The verdicts of make bench-writing: targets that hold, and targets that do not."""

import numpy as np

from benchmarks.writing import text_checks
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
