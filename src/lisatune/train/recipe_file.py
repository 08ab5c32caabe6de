"""Read a recipe file and overrides into a `Recipe`.

A recipe is YAML with the sections of `lisatune.recipe.Recipe`. An override is `section.key=value` and wins
over the file. cyclopts turns each value that is given into what its field takes. Three faults are checked
here because cyclopts accepts them: a section that is not a mapping, 1.5 for a whole number (cyclopts rounds
it), and a bare number for a text (YAML reads `revision: 1.10` as 1.1).
"""

import dataclasses
import difflib
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, NoReturn

from cyclopts import CycloptsError, convert

from lisatune.console import expand_home, split_override
from lisatune.files import yaml
from lisatune.methods import METHODS, Method
from lisatune.methods.optimizers import check_name
from lisatune.recipe import DataConfig, LossConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig
from lisatune.recipe.values import unknown

__all__ = [
    "SECTIONS",
    "Sections",
    "build_recipe",
    "is_required",
    "list_keys",
    "load_recipe",
    "read_sections",
    "recipe_without_file",
]

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": METHODS["lisa"],
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
}
"""The sections in the order of the help. For `method`, the default; `method.name` picks the class."""

MAPPINGS = (("data", "fields"), ("optimizer", "options"))
"""Keys that hold keys and values of the user's own, which cyclopts cannot know."""

Sections = dict[str, dict[str, Any]]
"""The content of a recipe file: {section: {key: value}}."""

PATHS = (
    ("model", "name"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "cache"),
    ("method", "adapter"),
    ("method", "sampler_file"),
    ("run", "output"),
)
"""Keys that may hold a path."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file. Without `run.output` the run folder is named after it: runs/STEM.
        overrides: `section.key=value`; a list is written `[1, 2]`, no value `null`.

    Returns:
        The recipe with all defaults filled in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or value in the file or the overrides is unknown, of the wrong type or out of
            range; the message is one sentence with file, key and value.
    """
    recipe = build_recipe(str(path), read_sections(Path(path)), overrides)
    output = recipe.run.output or f"runs/{Path(path).stem}"
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output=output))


def recipe_without_file(overrides: Sequence[str]) -> Recipe:
    """Build a recipe from overrides alone, for a caller that reads no data; errors as in `load_recipe`."""
    return build_recipe("command line", {"data": {"train": "none"}}, overrides)


def build_recipe(path: str, from_file: Sections, overrides: Sequence[str]) -> Recipe:
    """Build a recipe from a file's content and overrides; errors as in `load_recipe`, naming `path`.

    If the overrides pick another method, a warning says that the file's keys of `method` are left out.
    """
    from_overrides = _read_overrides(overrides)
    from_file = _leave_out_other_method(path, from_file, from_overrides)
    given = {name: from_file.get(name, {}) | from_overrides.get(name, {}) for name in SECTIONS}
    for section, key in PATHS:
        if key in given[section]:
            given[section][key] = _expand_paths(f"{section}.{key}", given[section][key])

    def where(section: str, key: str) -> str:
        return "command line" if key in from_overrides.get(section, {}) else path

    method = given["method"].get("name", "lisa")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{where('method', 'name')}: {unknown('method', method, METHODS)}")
    sections = SECTIONS | {"method": METHODS[method]}
    converted: Sections = {section: {} for section in sections}
    for section, values in given.items():
        hints = typing.get_type_hints(sections[section])
        for key, value in values.items():
            if key not in list_keys(sections[section]):
                raise ValueError(f"{where(section, key)}: {_explain_unknown_key(section, key, sections)}")
            if isinstance(value, dict) != ((section, key) in MAPPINGS):
                _refuse(where(section, key), sections, section, key, value)
            if (section, key) == ("method", "name"):  # no field
                continue
            if isinstance(value, dict) or (key in ("train", "loss_on") and isinstance(value, list)):
                converted[section][key] = value  # the user's own keys, or checked by their section
                continue
            try:
                converted[section][key] = _convert(hints[key], value)
            except (CycloptsError, ValueError):
                _refuse(where(section, key), sections, section, key, value)
        for field in dataclasses.fields(sections[section]):
            if is_required(field) and field.name not in values:
                raise ValueError(f"{path}: {section}.{field.name} is missing; add it")
    try:
        recipe = Recipe(**{name: section(**converted[name]) for name, section in sections.items()})
    except ValueError as error:  # out of range, from a section's __post_init__
        named = re.search(rf"\b({'|'.join(SECTIONS)})\.(\w+)", str(error))
        raise ValueError(f"{where(*named.groups()) if named else path}: {error}") from None
    try:
        check_name(recipe.optimizer.name)
    except ValueError as error:
        raise ValueError(f"{where('optimizer', 'name')}: {error}") from None
    return recipe


def read_sections(path: Path, *, also: Sequence[str] = ()) -> Sections:
    """Read a recipe file; errors as in `load_recipe`. `also` names further sections that it may have."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a recipe file, such as {path}/recipe.yaml")
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{path} is data; give a recipe, such as `lisatune init --data {path}` writes")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not UTF-8 text (byte {error.start})") from None
    try:
        root = yaml.load(text)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    if root is None:
        raise ValueError(f"recipe {path} is empty; it needs at least model.name and data.train")
    if not isinstance(root, dict):
        raise ValueError(f"recipe {path} must be sections of keys, got a {type(root).__name__}")
    for section, values in root.items():
        if section == "compare" and section not in also:
            raise ValueError(f"{path} describes a comparison; give it to `lisatune compare`")
        if section not in (*SECTIONS, *also):
            raise ValueError(f"{path}: {unknown('section', section, SECTIONS)}")
        if not isinstance(values, dict | None):
            raise ValueError(f"{path}: section {section} must hold lines of `key: value`, got {values!r}")
    return {section: values or {} for section, values in root.items()}


def _read_overrides(overrides: Iterable[str]) -> Sections:
    values: Sections = {}
    for override in overrides:
        section, key, text = split_override(override) or ("", "", None)
        if text is None:
            raise ValueError(f"override {override!r} must look like section.key=value, such as run.steps=100")
        if section not in SECTIONS:
            raise ValueError(f"command line: {unknown('section', section, SECTIONS)}")
        value: Any = text
        if text.startswith(("[", "{")) or text in ("null", "~"):
            try:
                value = yaml.load(text)
            except ValueError:
                how = "a list is written [a, b]" if text.startswith("[") else "keys are written {key: value}"
                raise ValueError(f"override {override!r}: {how}") from None
        values.setdefault(section, {})[key] = value
    return values


def _expand_paths(key: str, value: Any) -> Any:
    """Write out `~` in a path, or in those of a mixture's sources, and check them."""
    if isinstance(value, list):
        return [_expand_paths(key, each) for each in value]
    if isinstance(value, dict):
        return value | {name: _expand_paths(key, each) for name, each in value.items() if name == "path"}
    return _expand_path(key, value) if isinstance(value, str) else value


def _expand_path(key: str, value: str) -> str:
    """Refuse a Windows path that YAML has changed, or that is not there. Any other name may be of the hub."""
    if re.search(r"[\0-\x1f]", value):
        raise ValueError(
            f"{key} has a control character in it, {value!r}; put the path in single quotes, because YAML "
            r"reads \n and \t in double quotes as line break and tab"
        )
    if re.match(r"[A-Za-z]:[\\/]", value) and key != "run.output" and not Path(value).exists():
        here = "" if os.name == "nt" else "; on this machine paths begin with /"
        raise FileNotFoundError(f"{key}: there is no file or folder {value}{here}")
    return expand_home(value)


def _leave_out_other_method(path: str, from_file: Sections, from_overrides: Sections) -> Sections:
    """Return the file's sections without keys of a method that the overrides replace."""
    own = from_file.get("method", {})
    name, other = own.get("name", "lisa"), from_overrides.get("method", {}).get("name")
    if other == name or not isinstance(other, str) or other not in METHODS:
        return from_file
    if keys := [f"method.{key}" for key in own if key != "name"]:
        warnings.warn(
            f"{path}: {', '.join(keys)} left out: keys of method {name}. "
            f"Method {other} starts from its own defaults",
            stacklevel=4,
        )
    return from_file | {"method": {}}


def _convert(hint: Any, value: Any) -> Any:
    """Turn a value of YAML or of the command line into what a field takes; an error where it is not of it."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    lists = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if value is None and type(None) in kinds:
        return None
    if value == [] and any(Ellipsis in typing.get_args(kind) for kind in lists):
        return ()
    items = value if isinstance(value, list) and lists else [value]
    if any(item is None or isinstance(item, list | dict) for item in items):
        raise ValueError
    parsed = convert(hint, [str(item) for item in items])
    if not _is_faithful(value, parsed):
        raise ValueError
    return parsed


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a recipe must give a field, because it has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def list_keys(section: type) -> list[str]:
    """List the keys of a section's class; `name` of a method, which is no field, comes first."""
    name = ["name"] if issubclass(section, Method) else []
    return [*name, *(field.name for field in dataclasses.fields(section))]


def _explain_unknown_key(section: str, key: object, sections: Mapping[str, Any]) -> str:
    known = list_keys(sections[section])
    close = difflib.get_close_matches(str(key), known, n=1)
    elsewhere = [other for other in sections if key in list_keys(sections[other])]
    owner = f" of method {sections[section].name}" if section == "method" else ""
    if not close and not elsewhere:
        return f"unknown key '{section}.{key}'{owner}. Known: {', '.join(known)}"
    nearest = f"{section}.{close[0]}" if close else f"{elsewhere[0]}.{key}"
    return f"unknown key '{section}.{key}'{owner}. Did you mean {nearest!r}?"


def _refuse(where: str, sections: Mapping[str, type], section: str, key: str, value: Any) -> NoReturn:
    hint = str if key == "train" else typing.get_type_hints(sections[section])[key]  # or a list
    shown = "nothing" if value in ("", "null") else "null" if value is None else repr(value)
    literals = [each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is Literal]
    choices = [str(item) for each in literals for item in typing.get_args(each)]
    close = difflib.get_close_matches(str(value), choices, n=1)
    tail = f". Did you mean {close[0]!r}?" if close else ""
    if hint in (str, str | None) and not isinstance(value, str | list | dict | None):
        tail = "; put it in quotes"
    raise ValueError(f"{where}: {section}.{key} must be {_describe(hint)}, got {shown}{tail}")


def _describe(hint: Any) -> str:
    """Describe the values that a field takes, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(arguments) if len(arguments) < 3 else f"one of {', '.join(arguments)}"
    if typing.get_origin(hint) is dict:
        example = "{question: problem}" if arguments[-1] is str else "{momentum: 0.9}"
        return f"keys and values, such as {example}"
    if typing.get_origin(hint) is tuple:
        length = "" if Ellipsis in arguments else f" of {len(arguments)}"
        return f"a list{length} (each {_describe(arguments[0])})"
    assert typing.get_origin(hint) in (types.UnionType, typing.Union)
    return " or ".join(_describe(item) for item in arguments)


def _is_faithful(given: Any, parsed: Any) -> bool:
    """Whether the parsed value still means what was written."""
    if isinstance(parsed, tuple):
        items = given if isinstance(given, list) else [given]
        return all(_is_faithful(*pair) for pair in zip(items, parsed, strict=True))
    if isinstance(parsed, bool):
        return isinstance(given, bool | str)
    if isinstance(parsed, int):
        try:
            return Decimal(str(given)) == parsed
        except InvalidOperation:
            return False
    if isinstance(parsed, str):
        return isinstance(given, str) and given != ""
    return True
