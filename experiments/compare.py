"""The LISA paper's comparisons on SmolLM2-135M, each a recipe for `lisatune compare`.

python experiments/compare.py table2 [--smoke] [section.key=value …] [options of lisatune compare]

table2  methods side by side            table7  sampler, state of frozen blocks, warm-up
table6  active blocks × period          draws   five seeds of the draws alone
gap     what could close the gap to full fine-tuning
methods, optimizers  all of them         qlisa, correction, units, ground  see their files
benchmarks, gsm8k, pubmedqa  scores of benchmark tasks; continual  half of Table 4, before then_sft.py
epoch  five times as many tokens, on a GPU

The data is python-docs unless `data.train=` and `data.validation=` name other data. `--general FILE` also
measures forgetting. The same command continues a stopped comparison. Results are in runs/NAME-compare, or
with --smoke in runs/NAME-smoke.

`--widen` tries further learning rates of an arm while its best one is the lowest or highest that was tried;
of an arm with one rate, half and twice of it first. With --smoke it does nothing.
`--rates-of FOLDER` gives each arm the one rate that the comparison in FOLDER found to be its best.
`--list-arms` prints the names of the arms.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lisatune.cli.app import main
from lisatune.compare import read_results
from lisatune.files import yaml

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}

SMOKE = (
    *("data.max_length=64", "data.limit=64", "data.validation_limit=16", "run.batch_size=1"),
    *("--budget", "steps=2", "--seeds", "1", "--lr", "1e-4"),
)
"""Two steps of every arm at one learning rate, or at its own ones, to see that it runs."""

WIDENINGS = 4
"""How often a list of rates is widened at most."""


def run(given: list[str]) -> int:
    """Run a comparison, widen it if asked, and return the exit code."""
    if "--list-arms" in given:
        print("\n".join(_read(RECIPES[_find_name(given)])["compare"]["arms"]))
        return 0
    known, given = _take(given, "--rates-of")
    is_wide = "--widen" in given and "--smoke" not in given
    command, recipe, *rest = make_arguments([each for each in given if each != "--widen"])
    output = _take(rest, "--output")[0] or f"runs/{Path(recipe).stem}-compare"
    asked = Path(f"{output}.yaml")
    if known is not None:
        if not (Path(known) / "results.json").exists():
            sys.exit(f"{known} has no results.json yet; run that comparison first")
        rates = {arm["name"]: [arm["chosen_lr"]] for arm in read_results(known)["arms"] if arm["chosen_lr"]}
        recipe = set_rates(Path(recipe), rates, asked)
    if "--output" not in rest:
        rest += ["--output", output]
    code = main([command, recipe, *rest])
    for _ in range(WIDENINGS if is_wide and code == 0 else 0):
        edges = [
            arm
            for arm in read_results(output)["arms"]
            if arm["lr_at_edge"] or (len(arm["lrs"]) == 1 and arm["chosen_lr"])
        ]
        if not edges:
            break
        recipe = set_rates(
            Path(recipe), {arm["name"]: widen(arm["lrs"], arm["chosen_lr"]) for arm in edges}, asked
        )
        code = main([command, recipe, *rest])
    return code


def make_arguments(given: Sequence[str]) -> list[str]:
    """Turn the arguments of this script into arguments of `lisatune`."""
    name = _find_name(given)
    rest = [each for each in given if each not in ("--smoke", name)]
    if "--smoke" in given:
        for option in ("--budget", "--seeds", "--lr"):
            rest = _take(rest, option)[1]
        rest += SMOKE
        if "--output" not in rest:
            rest += ["--output", f"runs/{name}-smoke"]
        tasks = _read(RECIPES[name])["compare"].get("evaluate")
        if tasks is not None:
            rest += ["--evaluate", re.sub(r"limit=\d+", "limit=1", tasks)]
    return ["compare", str(RECIPES[name]), *rest]


def widen(rates: Sequence[float], best: float | None) -> list[float]:
    """Add a rate beyond the best one, which is the lowest or highest in rising order; to one alone, two."""
    if len(rates) == 1:
        return [rates[0] / 2, rates[0], rates[0] * 2]
    low, high = (rates[0], rates[1]), (rates[-1], rates[-2])
    edge, next_to_it = low if best == rates[0] else high
    return sorted([*rates, float(f"{edge * edge / next_to_it:.3g}")])


def set_rates(recipe: Path, rates: Mapping[str, Sequence[float | None]], target: Path) -> str:
    """Write a copy of a recipe in which the arms named in `rates` have these learning rates."""
    sections = _read(recipe)
    arms = sections["compare"]["arms"]
    for name in rates.keys() & arms.keys():
        method, _, keys = arms[name].partition(":")
        kept = [key for key in keys.split("+") if key and not key.startswith("lr=")]
        tried = "|".join(f"{rate:g}" for rate in rates[name])
        arms[name] = f"{method}:{'+'.join([*kept, f'lr={tried}'])}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.dump(sections), encoding="utf-8")
    return str(target)


def _find_name(given: Sequence[str]) -> str:
    names = [name for name in given if name in RECIPES]
    if len(names) != 1:
        sys.exit(f"name one of {', '.join(RECIPES)}")
    return names[0]


def _take(given: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, and the arguments without both."""
    if option not in given:
        return None, list(given)
    at = given.index(option)
    if at + 1 == len(given):
        sys.exit(f"{option} needs a value")
    return given[at + 1], [*given[:at], *given[at + 2 :]]


def _read(recipe: Path) -> dict[str, Any]:
    sections: dict[str, Any] = yaml.load(recipe.read_text(encoding="utf-8"))
    return sections


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
