"""How rivals are timed: by turns, as ratios with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call, to its end on a GPU too."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(above: list[float], below: list[float]) -> tuple[float, list[float] | None]:
    """Median of the repeats' ratios, and the 95 % interval of their mean (Student's t, on logarithms)."""
    logs = np.log(np.array(above) / np.array(below))
    if len(logs) < 2:
        return float(np.exp(logs[0])), None
    reach = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return float(np.exp(np.median(logs))), [float(np.exp(logs.mean() - reach)), float(np.exp(logs.mean() + reach))]
