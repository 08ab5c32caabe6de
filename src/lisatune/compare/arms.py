"""What a folder is one comparison by, in compare.json, and the refusal of any other.

Arms, learning rates and seeds may be added to a comparison; what all its runs share may not change.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.compare.results import Data
from lisatune.files.disk import replace_file
from lisatune.methods import METHODS
from lisatune.recipe import Recipe, unknown
from lisatune.runs.folder import differences
from lisatune.train.recipe_file import Sections, build_recipe, read_sections, split_override

__all__ = ["RUN_KEYS", "Arm", "Comparison", "check_folder", "claim", "read_comparison"]


RUN_KEYS = ("accumulation", "activation_checkpointing", "batch_size", "compile", "precision")
"""Keys of `run` that an arm may have of its own: what changes neither records nor length."""


KEYS = ("arms", "budget", "evaluations", "general", "general_limit", "lr", "reference", "seeds")
"""Keys of the section `compare`."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its keys."""

    name: str
    overrides: tuple[str, ...]
    """What it changes in the recipe, `section.key=value`, the method's name first."""

    lrs: tuple[float, ...]
    """Learning rates to choose from."""

    recipe: Recipe
    """The comparison's recipe with `overrides`; its learning rate is not used."""

    @property
    def folder(self) -> str:
        """Beginning of the names of its run folders: letters of the name, and a hash where some are lost."""
        plain = re.sub(r"[^\w.=-]+", "-", self.name, flags=re.ASCII).strip("-.")[:60]
        digest = hashlib.blake2b(self.name.encode(), digest_size=3).hexdigest()
        return plain if plain == self.name else f"{plain}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `lisatune compare` is asked for."""

    name: str
    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Values of `run.seed`; the first chooses the learning rates."""

    budget: dict[str, int]
    """`tokens` or `steps` of every run; empty: as the recipe says."""

    general: str | None = None
    """Text to measure forgetting on, given like `data.train`."""

    general_limit: int = 64
    """Use the first so many records of it."""

    evaluations: int = 8
    """Validation losses during a run, the last included."""

    reference: str | None = None
    """Arm to which others are compared."""


def read_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: str | None = None,
    lr: str | None = None,
    seeds: int | None = None,
    budget: str | None = None,
    general: str | None = None,
    reference: str | None = None,
) -> Comparison:
    """Read a recipe file with its section `compare`, and options, which win over it.

    Args:
        path: recipe file.
        overrides: `section.key=value`, for every arm.
        methods: arms, joined by commas; a name of an arm in the file stands for that arm.
        lr: learning rates, joined by commas.
        seeds: how many.
        budget: `tokens=N` or `steps=N`.
        general: text to measure forgetting on.
        reference: name of an arm.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything is unknown, of the wrong type or out of range.
    """
    sections = read_sections(Path(path), also=("compare",))
    asked: dict[str, Any] = sections.pop("compare", {})
    for key in asked:
        if key not in KEYS:
            raise ValueError(f"{path}: {unknown('key of compare', key, KEYS)}")
    recipe = build_recipe(str(path), sections, overrides)
    default_lrs = _learning_rates("--lr", lr.split(",")) if lr is not None else None
    if default_lrs is None:
        default_lrs = _learning_rates("compare.lr", asked["lr"]) if "lr" in asked else None
    named = asked.get("arms", {})
    if not isinstance(named, dict):
        raise ValueError(f"{path}: compare.arms must be `name: arm` lines, got {named!r}")
    given = {str(name): _arm(str(name), arm) for name, arm in named.items()}
    if methods is not None:
        texts = [text.strip() for text in re.split(r",(?![^\[]*\])", methods)]
        if len(set(texts)) < len(texts):
            raise ValueError(f"--methods names an arm twice: {methods}")
        given = {text: given.get(text) or _arm(text, text) for text in texts}
    if not given:
        raise ValueError("there is nothing to compare; give --methods, such as --methods full,lora,lisa")
    arms = tuple(
        _build(str(path), name, parts, sections, overrides, recipe, default_lrs)
        for name, parts in given.items()
    )
    count = _whole("compare.seeds", asked.get("seeds", 1)) if seeds is None else _whole("--seeds", seeds)
    text = general if general is not None else asked.get("general")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path}: compare.general must be text, got {text!r}; put it in quotes")
    reference = reference if reference is not None else asked.get("reference")
    if reference is not None and reference not in given:
        raise ValueError(unknown("reference", reference, given))
    return Comparison(
        name=Path(path).stem,
        recipe=recipe,
        arms=arms,
        seeds=tuple(range(recipe.run.seed, recipe.run.seed + count)),
        budget=_budget(asked.get("budget", {}) if budget is None else budget),
        general=text,
        general_limit=_whole("compare.general_limit", asked.get("general_limit", 64)),
        evaluations=_whole("compare.evaluations", asked.get("evaluations", 8)),
        reference=reference,
    )


Parts = tuple[str, dict[str, Any]]
"""A method's name and an arm's keys."""


def _arm(name: str, arm: Any) -> Parts:
    """Take an arm apart: text, or a mapping with `method`."""
    if isinstance(arm, str):
        method, _, rest = arm.partition(":")
        keys: dict[str, Any] = {}
        for part in re.split(r"\+(?=[\w.]+=)", rest) if rest else ():
            key, equals, value = part.partition("=")
            if not equals or key in keys:
                fault = "has a key twice" if key in keys else f"has {part!r}, which is no key=value"
                raise ValueError(f"arm {name!r} {fault}; write it as method:key=value+key=value")
            keys[key] = value.split("|") if key == "lr" else value
        return method, keys
    if not isinstance(arm, dict) or not isinstance(arm.get("method"), str):
        raise ValueError(
            f"arm {name!r} must be text such as lora:rank=128, or keys with `method` among them, got {arm!r}"
        )
    return arm["method"], {str(key): value for key, value in arm.items() if key != "method"}


def _build(
    path: str,
    name: str,
    parts: Parts,
    sections: Sections,
    overrides: Sequence[str],
    base: Recipe,
    default_lrs: tuple[float, ...] | None,
) -> Arm:
    method, keys = parts
    if method not in METHODS:
        raise ValueError(f"arm {name!r}: {unknown('method', method, METHODS)}")
    lrs = _learning_rates(f"lr of arm {name!r}", keys.pop("lr")) if "lr" in keys else default_lrs
    own = [f"method.name={method}"]
    for key, value in keys.items():
        dotted = key if "." in key else f"method.{key}"
        section, _, rest = dotted.partition(".")
        is_own = section == "method" or (section == "optimizer" and rest != "lr")
        if not is_own and not (section == "run" and rest in RUN_KEYS):
            raise ValueError(
                f"arm {name!r} can't have {dotted} of its own, for all arms share records and length; it may "
                f"have keys of method and optimizer, lr, and {', '.join(f'run.{key}' for key in RUN_KEYS)}"
            )
        own.append(f"{dotted}={_text(value)}")
    if method != base.method.name:
        sections = sections | {"method": {}}
        overrides = [each for each in overrides if (split_override(each) or ("",))[0] != "method"]
    try:
        recipe = build_recipe(path, sections, [*overrides, *own])
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {str(error).removeprefix('command line: ')}") from None
    return Arm(name=name, overrides=tuple(own), lrs=lrs or (recipe.optimizer.lr,), recipe=recipe)


def _text(value: Any) -> str:
    """Write a value as an override has it."""
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _learning_rates(name: str, values: Any) -> tuple[float, ...]:
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


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def _budget(budget: Any) -> dict[str, int]:
    """Read `tokens=N`, `steps=N`, or the same as a mapping."""
    if isinstance(budget, str):
        kind, _, text = budget.partition("=")
        number = re.sub(r"[_,]", "", text)
        budget = {kind: int(number) if number.isdecimal() else text}
    if not isinstance(budget, Mapping) or len(budget) > 1 or set(budget) - {"tokens", "steps"}:
        raise ValueError(f"budget must be tokens=N or steps=N, got {budget!r}")
    return {kind: _whole(f"budget {kind}", count) for kind, count in budget.items()}


def with_seed(method: Any, shift: int) -> Any:
    """The method with its own seed, if it has one, moved on by `shift`."""
    names = {field.name for field in dataclasses.fields(method)}
    return dataclasses.replace(method, seed=method.seed + shift) if "seed" in names else method


NO_MATTER = frozenset(
    ("run.output", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.report_to", "optimizer.lr")
)
"""Keys that a comparison may be gone on with changed: they change no result, or are set for each run."""


def _identity(comparison: Comparison) -> dict[str, Any]:
    """What a folder is one comparison by."""
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
        "evaluations": comparison.evaluations,
    }
    return {"shared": shared, "arms": arms}


def check_folder(output: Path, comparison: Comparison) -> None:
    """Refuse a folder that holds another comparison, or something else.

    Raises:
        ValueError: with what differs.
    """
    file = output / "compare.json"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if not file.exists():
        if output.exists() and any(entry.name not in (".lock", "data") for entry in output.iterdir()):
            raise ValueError(f"{output} has other files than a comparison's; name another --output")
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["asked"]
        changed = differences(before["shared"], _identity(comparison)["shared"], NO_MATTER)
        known = before["arms"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged; name another --output") from None
    for name, arm in _identity(comparison)["arms"].items():
        if name in known:
            changed += [f"{name}: {each}" for each in differences(known[name], arm, NO_MATTER)]
    if changed:
        raise ValueError(
            f"{output} holds another comparison: {'; '.join(dict.fromkeys(changed))}; undo that, or name "
            "another --output"
        )


def claim(output: Path, comparison: Comparison, data: Data) -> None:
    """Write down what the folder is for, and check that its data is what it was."""
    file = output / "compare.json"
    asked = _identity(comparison)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, sha256 in before["sha256"].items() if data["sha256"].get(name) != sha256]
        if changed:
            raise ValueError(f"{output / 'data' / changed[0]} was changed; name another --output")
        asked["arms"] = before["asked"]["arms"] | asked["arms"]
    replace_file(file, json.dumps({"asked": asked, "sha256": data["sha256"]}, indent=1) + "\n")
