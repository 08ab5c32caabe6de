"""YAML as people read it: `off` is text, `1e-4` is a number, a key given twice is an error.

PyYAML follows YAML 1.1: `verify: off` is false, `lr: 1e-4` is text, `010` is 8, and if a key is given twice,
the last one wins silently. `load` and `dump` follow the core rules of YAML 1.2, so that a value that was
dumped is loaded again unchanged.
"""

import re
from typing import Any

import yaml

from lisatune.console import first_line

__all__ = ["dump", "load"]

_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"

_RULES = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
)


def load(text: str) -> Any:
    """Read one document into dicts, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: the text is not YAML, or a mapping has a key twice or one that is no word; the message
            names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        is_path = "escape character" in (error.problem or "")
        hint = "; put a Windows path in single quotes" if is_path else ""
        raise ValueError(f"{line}not valid YAML: {error.problem}{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {first_line(error)}") from None


def dump(value: Any) -> str:
    """Write dicts, lists, strings, numbers, booleans and None as YAML; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (yaml's own name for it)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a word, not a list or a mapping", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (yaml's own name for it)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        """Quote text with Unicode's line breaks, which PyYAML would write bare and then read as spaces."""
        style = '"' if set("\x85\u2028\u2029") & set(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        letter: [(tag, rule) for tag, rule in rules if tag.endswith((":null", ":merge"))]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, _rule, _letters in _RULES:
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_rule})$"), list(_letters))
