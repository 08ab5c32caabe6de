"""Read a comparison: its arms, learning rates, seeds and budget; and check the folder that it owns.

compare.json says which comparison a folder holds. Arms, learning rates and seeds may be added later. The
settings that all runs share may not change: a folder of another comparison is refused.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.compare.results import Slices
from lisatune.console import expand_home, split_override
from lisatune.files.disk import replace_file
from lisatune.methods import METHODS
from lisatune.recipe import Recipe
from lisatune.recipe.values import unknown
from lisatune.runs.differences import differences
from lisatune.train.recipe_file import Sections, build_recipe, read_sections

__all__ = [
    "RUN_KEYS",
    "Arm",
    "Comparison",
    "check_folder",
    "claim_folder",
    "fix_date",
    "read_comparison",
    "shift_seed",
]

RUN_KEYS = ("accumulation", "activation_checkpointing", "batch_size", "compile", "precision")
"""Keys of `run` that an arm may set for itself: they change neither the records nor the length of a run."""

KEYS = (
    *("arms", "budget", "evaluate", "evaluate_data", "evaluations", "general", "general_limit"),
    *("lr", "reference", "seeds"),
)
"""Keys of the section `compare`."""

NEUTRAL_KEYS = frozenset(
    (
        *("run.output", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.report_to"),
        *("run.stop_after", "optimizer.lr"),
    )
)
"""Keys that may change when a comparison continues: they change no result, or are set for each run."""

ArmSpec = tuple[str, dict[str, Any]]
"""An arm as it is asked for: its method's name, and its keys."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its keys: one row of the results."""

    name: str
    overrides: tuple[str, ...]
    """The arm's changes to the recipe as `section.key=value`; the method's name comes first."""

    lrs: tuple[float, ...]
    """Learning rates to choose from, in rising order."""

    recipe: Recipe
    """The comparison's recipe with `overrides`. Its learning rate is not used."""

    @property
    def folder(self) -> str:
        """Prefix of the arm's run folders: the name's letters, and a hash if characters were replaced."""
        plain = re.sub(r"[^\w.=-]+", "-", self.name, flags=re.ASCII).strip("-.")[:60]
        digest = hashlib.blake2b(self.name.encode(), digest_size=3).hexdigest()
        return plain if plain == self.name else f"{plain}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that `lisatune compare` is asked for."""

    name: str
    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Values of `run.seed`; the first chooses the learning rates."""

    budget: dict[str, int]
    """`tokens` or `steps` of every run. Empty: the recipe's length."""

    general: str | None = None
    """Text to measure forgetting on, in the forms of `data.train`."""

    general_limit: int = 64
    """Use only the first `general_limit` records of that text."""

    evaluate: str | None = None
    """Benchmark tasks for the base and each chosen run, as `run.evaluate`."""

    evaluate_data: str | None = None
    """Folder with their questions; None: the hub's."""

    evaluations: int = 8
    """Number of validation losses during a run, the final one included."""

    reference: str | None = None
    """Name of the arm that the others are compared to."""


def read_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: str | None = None,
    lr: str | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    general: str | None = None,
    evaluate: str | None = None,
    evaluate_data: str | None = None,
    reference: str | None = None,
) -> Comparison:
    """Read a recipe file with its section `compare`. The other arguments win over that section.

    Args:
        path: recipe file.
        overrides: `section.key=value`, for every arm.
        methods: arms, separated by commas: an arm's name in the file, or METHOD:key=value+key=value.
        lr: learning rates, separated by commas.
        seeds: number of seeds.
        budget: `tokens=N` or `steps=N`.
        general: text to measure forgetting on.
        evaluate: benchmark tasks, as `run.evaluate`, which is the default.
        evaluate_data: folder with their questions.
        reference: name of an arm.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or value is unknown, of the wrong type or out of range.
    """
    sections = read_sections(Path(path), also=("compare",))
    asked: dict[str, Any] = sections.pop("compare", {})
    for key in asked:
        if key not in KEYS:
            raise ValueError(f"{path}: {unknown('key of compare', key, KEYS)}")
    recipe = build_recipe(str(path), sections, overrides)
    if recipe.loss.name != "causal_lm":
        raise ValueError(
            f"{path}: `lisatune compare` compares next-token losses, and loss.name is {recipe.loss.name}; "
            "run each arm with `lisatune train`, and compare the held-out figures in their summary.json"
        )
    default_lrs = _parse_rates("--lr", lr.split(",")) if lr is not None else None
    if default_lrs is None:
        default_lrs = _parse_rates("compare.lr", asked["lr"]) if "lr" in asked else None
    given = _parse_arms(str(path), asked.get("arms", {}), methods)
    arms = tuple(
        _build_arm(str(path), name, spec, sections, overrides, recipe, default_lrs)
        for name, spec in given.items()
    )
    name, number = ("compare.seeds", asked.get("seeds", 1)) if seeds is None else ("--seeds", seeds)
    count = _check_count(name, number)
    text = general if general is not None else asked.get("general")
    evaluate = evaluate or asked.get("evaluate", recipe.run.evaluate)
    evaluate_data = evaluate_data or asked.get("evaluate_data", recipe.run.evaluate_data)
    for key, value in (("general", text), ("evaluate", evaluate), ("evaluate_data", evaluate_data)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: compare.{key} must be text, got {value!r}; put it in quotes")
    # The file's reference is one of the file's arms, of which --methods may leave it out.
    if reference is None and (methods is None or asked.get("reference") in given):
        reference = asked.get("reference")
    if reference is not None and reference not in given:
        raise ValueError(unknown("reference", reference, given))
    return Comparison(
        name=Path(path).stem,
        recipe=recipe,
        arms=arms,
        seeds=tuple(range(recipe.run.seed, recipe.run.seed + count)),
        budget=_parse_budget(asked.get("budget", {}) if budget is None else budget),
        general=None if text is None else expand_home(text),
        evaluate=evaluate,
        evaluate_data=None if evaluate_data is None else expand_home(evaluate_data),
        general_limit=_check_count("compare.general_limit", asked.get("general_limit", 64)),
        evaluations=_check_count("compare.evaluations", asked.get("evaluations", 8)),
        reference=reference,
    )


def _parse_arms(path: str, named: Any, methods: str | None) -> dict[str, ArmSpec]:
    """Read the arms of the file, or those that `--methods` names, which may be arms of the file too."""
    if not isinstance(named, dict):
        raise ValueError(f"{path}: compare.arms must be `name: arm` lines, got {named!r}")
    given = {str(name): _parse_arm(str(name), arm) for name, arm in named.items()}
    if methods is not None:
        texts = [text.strip() for text in re.split(r",(?![^\[]*\])", methods)]
        if len(set(texts)) < len(texts):
            raise ValueError(f"--methods names an arm twice: {methods}")
        given = {text: given.get(text) or _parse_arm(text, text) for text in texts}
    if not given:
        raise ValueError("there is nothing to compare; give --methods, such as --methods full,lora,lisa")
    return given


def _parse_arm(name: str, arm: Any) -> ArmSpec:
    """Read an arm: text, or a mapping with the key `method`."""
    if isinstance(arm, str):
        method, _, rest = arm.partition(":")
        keys: dict[str, Any] = {}
        for part in re.split(r"\+(?=[\w.]+=)", rest) if rest else ():
            key, equals, value = part.partition("=")
            if not equals or key in keys:
                fault = "has a key twice" if key in keys else f"has {part!r}, which is not key=value"
                raise ValueError(f"arm {name!r} {fault}; write it as method:key=value+key=value")
            keys[key] = value.split("|") if key == "lr" else value
        return method, keys
    if not isinstance(arm, dict) or not isinstance(arm.get("method"), str):
        raise ValueError(
            f"arm {name!r} must be text such as lora:rank=128, or keys that include `method`, got {arm!r}"
        )
    return arm["method"], {str(key): value for key, value in arm.items() if key != "method"}


def _build_arm(
    path: str,
    name: str,
    spec: ArmSpec,
    sections: Sections,
    overrides: Sequence[str],
    base: Recipe,
    default_lrs: tuple[float, ...] | None,
) -> Arm:
    method, keys = spec
    if method not in METHODS:
        raise ValueError(f"arm {name!r}: {unknown('method', method, METHODS)}")
    lrs = _parse_rates(f"lr of arm {name!r}", keys.pop("lr")) if "lr" in keys else default_lrs
    own = [f"method.name={method}"]
    for key, value in keys.items():
        dotted = key if "." in key else f"method.{key}"
        section, _, rest = dotted.partition(".")
        is_own = section == "method" or (section == "optimizer" and rest != "lr")
        if not is_own and not (section == "run" and rest in RUN_KEYS):
            raise ValueError(
                f"arm {name!r} cannot set {dotted}, because all arms share records and length; it may set "
                f"keys of method and optimizer, lr, and {', '.join(f'run.{key}' for key in RUN_KEYS)}"
            )
        own.append(f"{dotted}={_text(value)}")
    if method != base.method.name:
        sections = sections | {"method": {}}  # the keys of another method
        overrides = [each for each in overrides if (split_override(each) or ("",))[0] != "method"]
    try:
        recipe = build_recipe(path, sections, [*overrides, *own])
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {str(error).removeprefix('command line: ')}") from None
    return Arm(name=name, overrides=tuple(own), lrs=lrs or (recipe.optimizer.lr,), recipe=recipe)


def _text(value: Any) -> str:
    """Write a value as it stands in an override."""
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _parse_rates(name: str, values: Any) -> tuple[float, ...]:
    values = values if isinstance(values, list) else [values]
    if not [value for value in values if str(value).strip()]:
        raise ValueError(f"{name} is empty; give learning rates, such as 1e-5,1e-4")
    rates = []
    for value in values:
        try:
            rate = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            rate = math.nan
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name} must be positive numbers, got {value!r}")
        rates.append(rate)
    if len(set(rates)) < len(rates):
        raise ValueError(f"{name} has a learning rate twice: {', '.join(f'{rate:g}' for rate in rates)}")
    return tuple(sorted(rates))


def _check_count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _parse_budget(budget: Any) -> dict[str, int]:
    """Read `tokens=N`, `steps=N`, or the same as a mapping."""
    if isinstance(budget, str):
        kind, equals, text = budget.partition("=")
        if not equals:
            raise ValueError(f"budget {budget!r} has no unit; write tokens={budget} or steps={budget}")
        number = re.sub(r"[_,]", "", text)
        budget = {kind: int(number) if number.isdecimal() else text}
    if not isinstance(budget, Mapping) or len(budget) > 1 or set(budget) - {"tokens", "steps"}:
        raise ValueError(f"budget must be tokens=N or steps=N, got {budget!r}")
    return {kind: _check_count(f"budget {kind}", count) for kind, count in budget.items()}


def shift_seed(method: Any, shift: int) -> Any:
    """Return the method with `shift` added to its own seed, or unchanged if it has no seed."""
    names = {field.name for field in dataclasses.fields(method)}
    return dataclasses.replace(method, seed=method.seed + shift) if "seed" in names else method


def fix_date(comparison: Comparison, output: Path) -> Comparison:
    """Return the comparison with the day that its chat template sees: its own, the folder's, or today.

    A comparison from before the key `data.date` existed continues without one.
    """
    data = comparison.recipe.data
    if data.date is not None:
        return comparison
    date: str | None = datetime.date.today().isoformat()
    if (output / "compare.json").is_file():
        date = None
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # `check_folder` says what is wrong
            before = json.loads((output / "compare.json").read_text(encoding="utf-8"))
            date = before["asked"]["shared"]["data"].get("date")
    data = dataclasses.replace(data, date=date)
    return dataclasses.replace(comparison, recipe=dataclasses.replace(comparison.recipe, data=data))


def check_folder(output: Path, comparison: Comparison) -> None:
    """Refuse a folder that holds another comparison, or other files.

    Raises:
        ValueError: the message lists the differences.
    """
    file = output / "compare.json"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if not file.exists():
        # The last is left behind by a command that was killed.
        own = re.compile(r"\.lock|data|\.(data|compare\.json)\.tmp-.*")
        if output.exists() and not all(own.fullmatch(entry.name) for entry in output.iterdir()):
            raise ValueError(f"{output} holds files that are not a comparison's; name another --output")
        return
    try:
        before, now = json.loads(file.read_text(encoding="utf-8"))["asked"], _identify(comparison)["shared"]
        before["shared"]["compare"].setdefault("evaluate_data", now["compare"]["evaluate_data"])  # not noted
        changed = differences(before["shared"], now, NEUTRAL_KEYS)
        known = before["arms"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged; name another --output") from None
    for name, arm in _identify(comparison)["arms"].items():
        if name in known:
            changed += [f"{name}: {each}" for each in differences(known[name], arm, NEUTRAL_KEYS)]
    if changed:
        raise ValueError(
            f"{output} holds another comparison: {'; '.join(dict.fromkeys(changed))}; undo these changes, or "
            "name another --output"
        )


def claim_folder(output: Path, comparison: Comparison, slices: Slices) -> None:
    """Write compare.json, and check that the slices on disk are those of the runs made before.

    Raises:
        ValueError: the file of a slice was changed.
    """
    file = output / "compare.json"
    asked = _identify(comparison)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, sha256 in before["sha256"].items() if slices["sha256"].get(name) != sha256]
        if changed:
            raise ValueError(f"{output / 'data' / changed[0]} was changed; name another --output")
        asked["arms"] = before["asked"]["arms"] | asked["arms"]
    replace_file(file, json.dumps({"asked": asked, "sha256": slices["sha256"]}, indent=1) + "\n")


def _identify(comparison: Comparison) -> dict[str, Any]:
    """Collect the settings by which two comparisons are the same."""
    recipe = comparison.recipe.as_dict()
    arms = {
        arm.name: {
            section: values
            for section, values in arm.recipe.as_dict().items()
            if section in ("method", "optimizer", "run")
        }
        for arm in comparison.arms
    }
    shared = {section: values for section, values in recipe.items() if section != "method"}
    shared["compare"] = {
        "budget": ", ".join(f"{kind}={count}" for kind, count in comparison.budget.items()) or "the recipe's",
        "general": comparison.general,
        "general_limit": comparison.general_limit,
        "evaluate": comparison.evaluate,
        "evaluate_data": comparison.evaluate_data,
        "evaluations": comparison.evaluations,
    }
    return {"shared": shared, "arms": arms}
