"""What a stage may change of a system's parts: nothing, everything, the last layers, or something small put in.

| tune | what learns |
|---|---|
| full | every weight of the part |
| frozen | none |
| last | the last layer |
| bottleneck | two small layers after each block (Houlsby et al. 2019, arXiv:1902.00751) |
| lora | peft's LoRA on the part's linear layers |
| prompt | learned vectors that stand before the history |
"""

from __future__ import annotations

from torch import nn

from genrec.adapters.small_parts import put_in
from genrec.adapters.system import System
from genrec.errors import ConfigError
from genrec.system_recipe import SMALL

PARTS = ("readers", "fusion", "ids", "fields", "graph", "user", "head")
KINDS = ("full", "frozen", "last", *SMALL)


def set_tuning(system: System, tune: dict[str, str], where: str, tune_from: int = 0) -> list[nn.Parameter]:
    """Freeze and free the parts as a stage says; parts that it does not name learn in full.

    Args:
        system: changed in place; earlier stages' small parts stay in it.
        tune: part -> kind.
        where: the recipe's line, for errors.
        tune_from: first block of the user model that a bottleneck or LoRA is put into.

    Returns:
        what learns.

    Raises:
        ConfigError: unknown part or kind, or one that the part cannot take.
    """
    for part, kind in tune.items():
        if part not in PARTS or kind not in KINDS:
            raise ConfigError(f"{where}: {part}: {kind}; parts are {', '.join(PARTS)}, kinds are {', '.join(KINDS)}")
        if getattr(system, part) is None:
            raise ConfigError(f"{where}: the recipe has no {part} to tune")
    for part in PARTS:
        module, kind = getattr(system, part), tune.get(part, "full")
        if module is None:
            continue
        module.requires_grad_(kind == "full")
        if kind == "last":
            _last_layer(module).requires_grad_(True)
        elif kind in SMALL:
            layers = getattr(module, "layers", None)
            if not isinstance(layers, nn.ModuleList):
                raise ConfigError(f"{where}: {part}: {kind} needs a part of blocks, such as user: transformer")
            if tune_from >= len(layers):
                raise ConfigError(f"{where}_from: {tune_from}: {part} has {len(layers)} blocks, so none would learn")
            put_in(module, kind, system.sizes.width, tune_from)
    return [p for p in system.parameters() if p.requires_grad]


def _last_layer(module: nn.Module) -> nn.Module:
    """The last thing in a part that has weights."""
    return [child for child in module.modules() if any(True for _ in child.parameters(recurse=False))][-1]
