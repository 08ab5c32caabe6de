"""The help of a recipe's keys, in panels that cyclopts makes from the fields and their docstrings."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lisatune.console import grid
from lisatune.methods import METHODS, Method
from lisatune.recipe.values import unknown
from lisatune.train.recipe_file import SECTIONS, is_required, list_keys

__all__ = ["print_keys", "print_sections"]


def print_keys(console: Console, only: str | None = None) -> None:
    """Print keys with their help texts, in one panel per section and per method.

    Args:
        console: where to print.
        only: a section, or a method, alone. Default: all.

    Raises:
        ValueError: `only` is neither.
    """
    panels: dict[str, type] = {}
    for name, section in SECTIONS.items():
        methods = {f"method ({method})": kind for method, kind in METHODS.items()}
        panels |= methods if name == "method" else {name: section}
    if only == "method":
        only = "lisa"
    if only is not None:
        title = f"method ({only})" if only in METHODS else only
        if title not in panels:
            raise ValueError(unknown("section or method", only, (*SECTIONS, *METHODS)))
        panels = {title: panels[title]}
    _build_app(panels).help_print([], console=console)


def print_sections(console: Console) -> None:
    """Print the names of all keys, a line or two for each section."""
    rows = []
    default = METHODS["lisa"].name
    for name, section in SECTIONS.items():
        of_method = f" (of {default})" if name == "method" else ""
        rows.append((name, ", ".join(list_keys(section)) + of_method))
    console.print(grid(rows))
    others = ", ".join(name for name in METHODS if name != default)
    console.print(Padding(Text(f"Other methods: {others}"), (1, 0, 0, 0)))


def _build_app(sections: Mapping[str, type]) -> App:
    """Build a cyclopts app that takes the sections as keyword arguments, for its help alone."""
    app = App(
        usage="",
        help="",
        help_flags=[],
        version_flags=[],
        default_parameter=Parameter(negative=(), name_transform=lambda name: name),
    )

    def build(**given: Any) -> None: ...

    parameters: list[inspect.Parameter] = []
    for index, (title, section) in enumerate(sections.items()):
        group = Group(title, sort_key=index)
        if issubclass(section, Method):  # its name is a key, but no field
            name = Parameter(name="--method.name", group=group, help="Way to fine-tune.")
            parameters.append(
                inspect.Parameter(
                    f"name_{section.name}",
                    inspect.Parameter.KEYWORD_ONLY,
                    default=section.name,
                    annotation=typing.Annotated[Literal[section.name], name],
                )
            )
        has_keys = bool(dataclasses.fields(section))
        parameter = Parameter(name=f"--{title.split()[0]}", group=group, show=has_keys)
        required = any(map(is_required, dataclasses.fields(section)))
        parameters.append(
            inspect.Parameter(
                re.sub(r"\W+", "_", title),
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else section(),
                annotation=typing.Annotated[section, parameter],
            )
        )
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    build.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.default(build)
    return app
