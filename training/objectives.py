"""The table of objectives: losses on named views of a batch.

A recipe writes ``NAME(view, view): weight``; every class is made once with the system, its data and the names between
the brackets, may own weights of its own, and is called with `Views`.
"""

from __future__ import annotations

from torch import nn

from genrec.adapters.system import System
from genrec.errors import ConfigError
from genrec.planted import Table
from genrec.system_recipe import TERM
from genrec.training.agreement import Bootstrap, CosinePull, KeepLikeness, Nce, Orthogonal, Regress
from genrec.training.guessing import Classify, FactorTarget, Masked, NextCategory, TellApart
from genrec.training.ranking_losses import Bce, Bpr, SampledSoftmax, Softmax
from genrec.training.reconstruct import Reconstruct

OBJECTIVES: dict[str, type[nn.Module]] = {
    "bpr": Bpr,
    "bce": Bce,
    "softmax": Softmax,
    "sampled_softmax": SampledSoftmax,
    "nce": Nce,
    "mse": Regress,
    "cos_pull": CosinePull,
    "bootstrap": Bootstrap,
    "keep_likeness": KeepLikeness,
    "orthogonal": Orthogonal,
    "factors": FactorTarget,
    "masked": Masked,
    "classify": Classify,
    "next_category": NextCategory,
    "tell_apart": TellApart,
    "reconstruct": Reconstruct,
}


def make_objective(term: str, system: System, table: Table) -> nn.Module:
    """The objective that a recipe's term names.

    Raises:
        ConfigError: unknown name, or views that it cannot take.
    """
    found = TERM.fullmatch(term)
    assert found is not None
    name, views = found[1], [v.strip() for v in (found[2] or "").split(",") if v]
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r}; there are {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](system, table, *views)
    except TypeError as err:
        raise ConfigError(f"objective {term!r}: wrong number of views ({err})") from err
