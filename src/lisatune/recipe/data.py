"""The section `data` of a recipe, and the sources that it may list."""

import datetime
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lisatune.recipe.values import at_least, check_choices, is_number, unknown

__all__ = ["DataConfig", "Role", "SourceConfig", "describe_paths", "list_paths"]

Role = Literal["system", "user", "assistant", "tool"]

Kind = Literal[
    "auto",
    "messages",
    "sharegpt",
    "oasst",
    "alpaca",
    "instruction",
    "prompt-completion",
    "question-answer",
    "query-response",
    "text",
]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of training data. What it leaves out, the section `data` says."""

    path: str
    """The source, in the forms of `data.train`."""

    weight: float | None = None
    """Share of the rows that come from it, in proportion to the other weights. 0: none."""

    epochs: float | None = None
    """How often it is read in an epoch of the mixture. Default: once. For sources without `weight`."""

    kind: Kind | None = None
    """Format of the records."""

    split: str | None = None
    """Split to load if `path` is a hub id."""

    limit: int | None = None
    """Use only the first `limit` records."""

    fields: dict[str, str] | None = field(default=None, hash=False)
    """Own names of the records' fields."""

    text_only: bool | None = None
    """Leave images, sound and videos out of records."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"data.train: path must be text, got {self.path!r}")
        check_choices(f"data.train {self.path}:", self, separator=" ")
        checks: dict[str, tuple[Any, str, bool]] = {
            "weight": (self.weight, "a number >= 0", is_number(self.weight) and self.weight >= 0),
            "epochs": (self.epochs, "a number above 0", is_number(self.epochs) and self.epochs > 0),
            "split": (self.split, "text", isinstance(self.split, str)),
            "limit": (self.limit, "a whole number >= 1", type(self.limit) is int and self.limit >= 1),
            "fields": (self.fields, "keys and values, such as {question: problem}", _are_names(self.fields)),
            "text_only": (self.text_only, "true or false", isinstance(self.text_only, bool)),
        }
        for name, (value, what, is_right) in checks.items():
            if value is not None and not is_right:
                raise ValueError(f"data.train {self.path}: {name} must be {what}, got {value!r}")
        if self.weight is not None and self.epochs is not None:
            raise ValueError(
                f"data.train {self.path}: weight={self.weight:g} and epochs={self.epochs:g} both say how "
                "often it is read; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data to train and evaluate on."""

    train: str | tuple[SourceConfig, ...]
    """File (.jsonl .json .csv .parquet, also .gz .xz .zst), folder of .txt files, hub id, `python-docs`.
    Or a list of such sources: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]."""

    validation: str | None = None
    """Held-out data, in the same forms as `train`. Default: a share of `train`."""

    validation_share: float = 0.05
    """Share of `train` to hold out if `validation` is not given, at least one prompt. 0: evaluate nothing.
    With `streaming` any other share means the first `validation_limit` records."""

    kind: Kind = "auto"
    """Format of the records. auto: recognised by their keys."""

    fields: dict[str, str] = field(default_factory=dict, hash=False)
    """Own names of the records' fields, such as {question: problem, answer: solution.text}."""

    text_only: bool = False
    """Leave images, sound and videos out of records and train on the text beside them. Default: refuse."""

    split: str = "train"
    """Split to load if `train` is a hub id."""

    limit: int | None = None
    """Use only the first `limit` training records."""

    validation_limit: int | None = 500
    """Hold out at most this many records, so that an evaluation takes no longer as data grow. null: all."""

    max_length: int = 1024
    """Longest sequence in tokens. `long` says what happens to longer records."""

    long: Literal["auto", "split", "cut", "drop"] = "auto"
    """Longer records: split into pieces, cut at the end, or drop. auto: split plain text, cut all others;
    with loss.name reward drop, because the score is read at an answer's end."""

    packing: bool = False
    """Pack several records into one sequence of `max_length` tokens. Attention does not cross records."""

    loss_on: Literal["auto", "answers", "last", "all"] | tuple[Role, ...] = "auto"
    """Tokens that carry loss. last: the last answer alone. auto: the answers, or all tokens of plain text.
    Or roles whose messages carry it, such as [assistant, tool]."""

    date: str | None = None
    """Day that a chat template which writes the date sees, as YYYY-MM-DD. Default: the run's first day."""

    deduplicate: bool = False
    """Train on each record once in an epoch: leave out those with the tokens of an earlier one."""

    streaming: bool = False
    """Read `train` while the run trains: files, globs, http addresses or a hub id. Needs `run.steps`."""

    window: int = 8192
    """Records that are packed and shuffled together under `streaming`."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a record that cannot be used: stop, or skip and count it."""

    cache: str | None = None
    """Folder for prepared tokens. Default: what LISATUNE_TOKENS names, or ~/.cache/lisatune/tokens."""

    def __post_init__(self) -> None:
        if not isinstance(self.train, str):
            object.__setattr__(self, "train", _read_sources(self.train))
        if isinstance(self.loss_on, list | tuple):
            object.__setattr__(self, "loss_on", _read_roles(self.loss_on))
        check_choices("data", self)
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"data.validation_share must be >= 0 and below 1, got {self.validation_share}")
        if self.max_length < 2:
            raise ValueError(f"data.max_length must be >= 2 tokens, got {self.max_length}")
        for name in ("limit", "validation_limit", "window"):
            at_least(1, f"data.{name}", getattr(self, name))
        for ours, theirs in self.fields.items():
            if not _are_names({ours: theirs}):
                how = "nothing; put a space after the colon" if theirs is None else repr(theirs)
                raise ValueError(f"data.fields must name the records' field for {ours!r}, got {how}")
        if self.date is not None and not _is_day(self.date):
            raise ValueError(f"data.date must be a day such as 2026-01-31, got {self.date!r}")
        if self.streaming:
            self._check_stream()
        elif self.window != DataConfig.window:
            raise ValueError(f"data.window={self.window} does nothing without data.streaming; leave it out")

    def _check_stream(self) -> None:
        """Refuse settings that need all records at once."""
        reasons = {
            "data.deduplicate": (self.deduplicate, "true", "only records that are all known can be compared"),
            "data.limit": (self.limit is not None, self.limit, "run.steps says how much is read"),
            "data.validation_limit": (
                self.validation is None and self.holds_out and self.validation_limit is None,
                "null",
                "the first records are held out, so many as it says",
            ),
            "data.train": (
                not isinstance(self.train, str)
                and any(source != SourceConfig(path=source.path) for source in self.train),
                "a mixture",
                "its list may only have paths, which become one stream",
            ),
        }
        for key, (is_set, value, why) in reasons.items():
            if is_set:
                raise ValueError(f"{key}={value} cannot work with data.streaming: {why}")

    @property
    def holds_out(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.validation is not None or self.validation_share > 0

    @property
    def needs_answers(self) -> bool:
        """Whether conversations must have an answer: not if `loss_on` names other roles alone."""
        return not isinstance(self.loss_on, tuple) or "assistant" in self.loss_on

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of `train` that have a share, with what they leave out filled in."""
        given = (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train
        return tuple(
            replace(
                source,
                epochs=1.0 if source.weight is None and source.epochs is None else source.epochs,
                kind=source.kind or self.kind,
                split=source.split or self.split,
                limit=source.limit or self.limit,
                fields=self.fields if source.fields is None else source.fields,
                text_only=self.text_only if source.text_only is None else source.text_only,
            )
            for source in given
            if source.weight != 0
        )

    @property
    def train_name(self) -> str:
        """`train` for a reader: the names of its sources."""
        return describe_paths(self.train)


def _read_sources(given: Any) -> tuple[SourceConfig, ...]:
    """Read the list of a mixture: texts, keys and values, or `SourceConfig`s.

    Raises:
        ValueError: a key is unknown, a value is out of range, or the sources do not fit together.
    """
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"data.train must be a path, a hub id or a list of sources, got {given!r}")
    sources = []
    known = [each.name for each in fields(SourceConfig)]
    for number, entry in enumerate(given, 1):
        entry = asdict(entry) if isinstance(entry, SourceConfig) else entry
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise ValueError(
                f"data.train: source {number} must be a path or keys and values such as "
                f"{{path: a.jsonl, weight: 1}}, got {entry!r}"
            )
        for key in entry:
            if key not in known:
                raise ValueError(f"data.train: source {number} has an {unknown('key', key, known)}")
        if "path" not in entry:
            raise ValueError(f"data.train: source {number} has no path; add it")
        sources.append(SourceConfig(**entry))
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        other = next(source for source in sources if source.weight is None)
        raise ValueError(
            f"data.train: {weighted[0].path} has a weight and {other.path} has none; give every source a "
            "weight, or none of them"
        )
    if weighted and not any(source.weight for source in weighted):
        raise ValueError("data.train: all weights are 0, so nothing would train; give one source more")
    places = [(Path(source.path).expanduser().resolve(), source.split) for source in sources]
    for number, place in enumerate(places):
        if place in places[:number]:
            path = sources[number].path
            raise ValueError(
                f"data.train names {path} twice; name it once, with a larger weight or more epochs"
            )
    return tuple(sources)


def _read_roles(given: Sequence[Any]) -> tuple[Role, ...]:
    """Read the roles of `data.loss_on`.

    Raises:
        ValueError: there is none, or one is unknown or named twice.
    """
    for number, role in enumerate(given):
        if role not in get_args(Role):
            raise ValueError(f"data.loss_on: {unknown('role', role, get_args(Role))}")
        if role in given[:number]:
            raise ValueError(f"data.loss_on names {role} twice; leave one out")
    if not given:
        raise ValueError("data.loss_on names no role, so nothing would train; name one, such as [assistant]")
    return tuple(given)


def list_paths(train: Any) -> list[str]:
    """List the paths of `data.train`, as a `DataConfig` or `Recipe.as_dict` holds it."""
    if isinstance(train, list | tuple):
        return [each.path if isinstance(each, SourceConfig) else str(each["path"]) for each in train]
    return [str(train)]


def describe_paths(train: Any) -> str:
    """Write `list_paths` for a reader."""
    return " + ".join(list_paths(train))


def _are_names(fields: Any) -> bool:
    """Whether these are own names of fields, by ours."""
    return isinstance(fields, dict) and all(isinstance(name, str) and name for name in fields.values())


def _is_day(text: str) -> bool:
    with suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False
