"""Every system's proof: five paired seeds, with its idea and without it, and a control.

    make bench-systems
    python -m benchmarks.systems --systems clcrec dicm      # these two, beside what is kept

Every trial is kept in benchmarks/results/trials until its recipe changes, so a run that stops goes on where it
stopped. docs/systems.md and its pictures are written from what is kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.results import RESULTS, ROOT, Check, finish
from genrec.artefacts import write_text
from genrec.proofs import Trial, interval, kept_trial, prove
from genrec.system_recipe import SystemRecipe, load_system, system_names

log = logging.getLogger("benchmarks.systems")
SEEDS = 5
PAGE = ROOT / "docs" / "systems.md"
HEAD = """# Systems

Made by `make bench-systems`; do not edit. Every system is a recipe in `training/recipes/systems/`, proved on planted
data (`genrec/planted.py`) whose truth is known: *gain* is the system minus itself without its idea, *control* the same
difference in a world where the idea has nothing to find. A proof holds when the gain's interval over paired seeds lies
above zero and the control's holds zero. Planted data shows that a mechanism works as built, not that a paper's gain is
real. *Oracle* is
the planted utility itself, which knows nothing of order: where order counts, a system can rank better.

`genrec systems run NAME --data FOLDER` trains one on a catalogue; [adding-a-system.md](adding-a-system.md) makes one.
"""


def checks_of(recipe: SystemRecipe, trials: list[Trial]) -> list[Check]:
    """The two lines of one system."""
    gain, ends = interval([t.gain for t in trials])
    control, control_ends = interval([t.control for t in trials])
    null = control_ends[0] <= 0 <= control_ends[1]
    return [
        Check(f"{recipe.name}: gain in {recipe.prove.metric}", gain, ends, "interval above 0", ends[0] > 0),
        Check(f"{recipe.name}: control", control, control_ends, "interval holds 0", null),
    ]


def table_of(recipes: list[SystemRecipe], trials: dict[str, list[Trial]]) -> str:
    """One row per system."""
    rows = [
        "| system | claim | metric | with | without | oracle | gain | control | holds | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        mine = trials[recipe.name]
        found = checks_of(recipe, mine)
        with_, without, oracle = np.mean([(t.method, t.ablation, t.oracle) for t in mine], axis=0)
        ends = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(c.value, *(c.ci95 or [0, 0])) for c in found]
        holds = "yes" if all(c.holds for c in found) else "**no**"
        rows.append(
            f"| [{recipe.name}](../training/recipes/systems/{recipe.name}.yaml) | {recipe.prove.claim} | "
            f"{recipe.prove.metric} | {with_:.3f} | {without:.3f} | {oracle:.3f} | {ends[0]} | {ends[1]} | {holds} | "
            f"{sum(t.seconds for t in mine):.0f} |"
        )
    return "\n".join(rows)


def draw(family: str, recipes: list[SystemRecipe], trials: dict[str, list[Trial]], path: Path) -> None:
    """Gains and controls of one family, with their intervals."""
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(recipes) + 1.2), layout="constrained")
    for at, recipe in enumerate(recipes):
        for shift, colour, marker, of in (
            (0.12, "#1b6ca8", "o", [t.gain for t in trials[recipe.name]]),
            (-0.12, "#999999", "s", [t.control for t in trials[recipe.name]]),
        ):
            mean, ends = interval(of)
            axes.errorbar(
                mean, at + shift, xerr=[[mean - ends[0]], [ends[1] - mean]], fmt=marker, color=colour, capsize=3
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(recipes)), [recipe.name for recipe in recipes])
    axes.set_xlabel("blue: gain of the system's own idea; grey: control (95 % intervals over seeds)")
    axes.set_title(family)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    """Prove what is asked for, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", default=system_names(), help="to prove; none: only render what is kept")
    parser.add_argument("--trials", type=Path, default=RESULTS / "trials", help="where trials are kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for recipe in map(load_system, arguments.systems):
        for seed in range(SEEDS):
            prove(recipe, seed, arguments.trials)
    trials: dict[str, list[Trial]] = {}
    recipes = []
    for recipe in map(load_system, system_names()):
        kept = [trial for seed in range(SEEDS) if (trial := kept_trial(recipe, seed, arguments.trials)) is not None]
        if len(kept) == SEEDS:
            recipes.append(recipe)
            trials[recipe.name] = kept
    families = {family: [r for r in recipes if r.family == family] for family in sorted({r.family for r in recipes})}
    page = [HEAD]
    for family, mine in families.items():
        draw(family, mine, trials, ROOT / "docs" / f"systems-{family}.png")
        page += [
            f"## {family.capitalize()}",
            "",
            f"![gains and controls](systems-{family}.png)",
            "",
            table_of(mine, trials),
            "",
        ]
    left = [name for name in system_names() if name not in trials]
    if left:
        page += ["## Not proved", "", ", ".join(left), ""]
    write_text(PAGE, "\n".join(page))
    seconds = sum(t.seconds for of in trials.values() for t in of)
    checks = [check for recipe in recipes for check in checks_of(recipe, trials[recipe.name])]
    checks.append(Check("systems with a proof", len(trials), None, f"{len(system_names())}", not left))
    commits = sorted({trial.commit[:12] for of in trials.values() for trial in of})
    tables = {"Commits that the trials come from": ", ".join(commits)}
    return finish("systems", "make bench-systems", list(range(SEEDS)), seconds, checks, tables)


if __name__ == "__main__":
    sys.exit(main())
