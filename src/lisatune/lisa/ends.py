"""Which of a model's ends train, when, and how small their optimizer state is.

At large vocabularies embedding and head are most of what LISA trains at a time. A policy is one word, or
several joined by "+":

    train       embedding, head and final norm train in every step, as in the paper
    head        head and final norm train, the input embedding is frozen
    frozen      none of them trains
    every:M     they train in every M-th period only, from the first on; in between they are frozen blocks
    8bit        moments of the ends in 8 bits; parameters below 4096 elements keep theirs in float32
    factored    second moment of the ends as means of rows and columns, no first moment
    cpu         moments of the ends in host memory
    rows        only the rows of the (untied) embedding that a step reads have a gradient and moments
                (`lisatune.optim.rows`); moments of the embedding start anew at each draw
    rows:A-B    only the rows from A to B of embedding and head train, tied or not, in every step, with
                moments for these rows alone; all else of the ends is frozen. For new tokens

In periods in which no parameter before the blocks trains, autograd records nothing below the lowest active
block: forward keeps no activations there and backward stops at it.

`head` with tied weights: embedding and head are one matrix W, whose gradient has two summands, one through
the head and one through the input. The output of the embedding is detached, so W trains by the first summand
alone. This approximates the gradient of the loss in W.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lisatune.distributed.rows import exchange_rows, exchange_span, take_gradients
from lisatune.distributed.shards import is_sharded, local_part, local_rows
from lisatune.nn.layers import LayerMap
from lisatune.optim.adamw import AdamW

__all__ = ["ROW_OPTIONS", "Ends", "EndsPolicy", "find_row_embedding"]

Trains = Literal["all", "head", "rows", "none"]

WORDS = ("train", "head", "frozen", "every:M", "8bit", "factored", "cpu", "rows", "rows:A-B")


@dataclass(frozen=True)
class EndsPolicy:
    """A policy of the ends, read from a text such as "head+8bit" or "every:5"."""

    trains: Trains = "all"
    """Which of the ends train."""

    every: int = 1
    """M: they train in periods whose number M divides."""

    moments: Literal["8bit", "factored"] | None = None
    """How their moments are stored. None: as those of the blocks."""

    state_device: Literal["cpu"] | None = None
    """Where their moments are. None: with the weights."""

    rows: bool = False
    """Whether the embedding has a gradient and moments only for rows that a step reads. `moments` and
    `state_device` then concern the other ends."""

    span: tuple[int, int] | None = None
    """First and last row of embedding and head that train, if `trains` is "rows"."""

    def __post_init__(self) -> None:
        if self.trains not in get_args(Trains) or (self.trains == "rows") != (self.span is not None):
            raise ValueError(
                f"trains of an EndsPolicy must be all, head, none, or rows with a span, got {self.trains!r} "
                f"with span {self.span}"
            )
        if self.every < 1:
            raise ValueError(f"every of an EndsPolicy must be >= 1 periods, got {self.every}")

    @classmethod
    def parse(cls, text: "str | EndsPolicy") -> "EndsPolicy":
        """Read a policy.

        Raises:
            ValueError: an unknown word, or words that contradict each other.
        """
        if isinstance(text, EndsPolicy):
            return text
        words = [word.strip() for word in str(text).split("+")]
        read = [_read(word, text) for word in words]
        for what, meaning in (
            ("which ends train", "trains"),
            ("when they train", "every"),
            ("how moments are stored", "moments"),
            ("where moments are", "state_device"),
            ("which rows of the embedding train", "rows"),
        ):
            same = [word for word, option in zip(words, read, strict=True) if meaning in option]
            if len(same) > 1:
                raise ValueError(
                    f"ends {text!r} says twice {what}: {' and '.join(same)}; keep one. {_list_words()}"
                )
        policy = cls(**{key: value for option in read for key, value in option.items()})
        if policy.trains == "none" and len(words) > 1:
            others = " and ".join(word for word in words if word != "frozen")
            raise ValueError(
                f"ends {text!r}: frozen ends have neither periods nor state, so {others} does nothing; "
                f"write frozen alone. {_list_words()}"
            )
        if policy.span is not None and len(words) > 1:
            others = " and ".join(word for word in words if not word.startswith("rows:"))
            raise ValueError(
                f"ends {text!r}: rows:A-B has a state of its own and trains in every step, so {others} does "
                f"nothing; write rows:A-B alone. {_list_words()}"
            )
        if policy.trains == "head" and policy.rows:
            raise ValueError(
                f"ends {text!r}: head freezes the embedding, and rows trains rows of it; keep one of them. "
                f"{_list_words()}"
            )
        return policy

    def __str__(self) -> str:
        if self.span is not None:
            return f"rows:{self.span[0]}-{self.span[1]}"
        words = [] if self.trains == "all" else [{"head": "head", "none": "frozen"}[self.trains]]
        words += [f"every:{self.every}"] if self.every > 1 else []
        words += [word for word in (self.moments, self.state_device, "rows" if self.rows else None) if word]
        return "+".join(words) or "train"

    def trains_in(self, period: int) -> bool:
        """Whether ends train in this period."""
        return self.trains != "none" and period % self.every == 0

    def row_options(self) -> dict[str, Any]:
        """Return the options of a `lisatune.AdamW` param group of which only rows train."""
        return ROW_OPTIONS | ({} if self.span is None else {"span": self.span})

    def state_options(self) -> dict[str, Any]:
        """Return the options of a `lisatune.AdamW` param group that store moments as the policy says."""
        options = {"moments": self.moments, "state_device": self.state_device}
        return {key: value for key, value in options.items() if value is not None}


ROW_OPTIONS = {"rows": True, "rounding": "stochastic", "moments": "fp32", "state_device": None}
"""Options of the param group of an embedding whose rows train."""


class Ends:
    """The ends of one model under a policy.

    Args:
        policy: which ends train when.
        model: the model that has them.
        layers: its blocks and ends.

    Raises:
        ValueError: `head` for a model whose embedding or head is unknown; `rows` for one whose embedding is
            unknown, frozen or tied; `rows:A-B` for one whose embedding or head has no such rows.
    """

    def __init__(self, policy: EndsPolicy, model: nn.Module, layers: LayerMap) -> None:
        self.policy = policy
        named = layers.end_parameters(model)
        resting = {name for name, p in named.items() if not p.requires_grad}
        if policy.trains == "head":
            resting |= _name_frozen_by_head(model, layers)
        if policy.span is not None:
            resting |= named.keys() - find_span_weights(policy.span, model, layers).keys()
        self.parameters = tuple(p for name, p in named.items() if name not in resting)
        """Ends that train when the policy says so. Under `frozen`: all of them, and they never do."""
        self.resting = tuple(p for name, p in named.items() if name in resting)
        """Ends that never train, while others do: the embedding under `head`, and what was frozen before."""
        needs_detach = policy.trains == "head" and layers.is_tied
        self._embedding = _find_embedding("head", model, layers) if needs_detach else None
        self._row_embedding = find_row_embedding(model, layers) if policy.rows else None
        self._rows: dict[nn.Parameter, nn.Module] = {}  # weights of which rows train, and their modules
        if self._row_embedding is not None:
            self._rows = {p: self._row_embedding for p in self.parameters if p is self._row_embedding.weight}
        if policy.span is not None:
            spanned = find_span_weights(policy.span, model, layers).items()
            self._rows = {p: model.get_submodule(name.rpartition(".")[0]) for name, p in spanned}
        self._was_sparse = False
        self._hooks: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hook into the embedding: to detach its output under `head`, for gradients of rows under `rows`.

        The first hook runs before all others, because that of reentrant checkpointing makes the output
        require grad again, and it must come last. `detach` undoes it all.
        """
        if self._embedding is not None:
            self._hooks.append(self._embedding.register_forward_hook(_detach, prepend=True))
        if self._row_embedding is not None:
            self._was_sparse, self._row_embedding.sparse = self._row_embedding.sparse, True
        divided = {p: module for p, module in self._rows.items() if is_sharded(p)}
        if divided:
            span = self.policy.span
            exchange = exchange_rows if span is None else partial(exchange_span, span=span)
            self._hooks.append(take_gradients(next(iter(divided.values())), divided, exchange))

    @property
    def rows_of(self) -> tuple[nn.Parameter, ...]:
        """The embedding's weight, if the rows that a step reads train; else empty."""
        return tuple(p for p in self.parameters if p in self._rows) if self.policy.rows else ()

    @property
    def other_rows(self) -> tuple[nn.Parameter, ...]:
        """Views of the rows that do not train, of weights of which some do; of divided ones, those here."""
        if self.policy.span is None:
            return ()
        views = []
        for p in self.parameters:
            rows, part = local_rows(p, self.policy.span), local_part(p)
            views += [part[: rows.start], part[rows.stop :]]
        return tuple(nn.Parameter(view, requires_grad=False) for view in views)

    @property
    def num_idle(self) -> int:
        """How many numbers of weights that train never move, because only some of their rows train."""
        if self.policy.span is None:
            return 0
        rows = self.policy.span[1] - self.policy.span[0] + 1
        return sum((len(p) - rows) * p.shape[1:].numel() for p in self.parameters)

    def check_state(self, optimizer: Optimizer) -> None:
        """Raise ValueError unless the optimizer stores the ends' state as the policy says."""
        mine = set(self.parameters)
        of_rows = set(self.rows_of) if self.policy.span is None else mine
        for group in optimizer.param_groups:
            if mine.isdisjoint(group["params"]):
                continue
            has_rows = of_rows.issuperset(group["params"])
            wanted: dict[str, Any] = {"rows": True} if has_rows else self.policy.state_options()
            wanted |= {"span": self.policy.span} if has_rows and self.policy.span is not None else {}
            seen = {key: group.get(key) for key in wanted}
            is_misfit = seen != wanted or (wanted and not isinstance(optimizer, AdamW))
            if is_misfit or (not has_rows and (group.get("rows") or not of_rows.isdisjoint(group["params"]))):
                seen |= {"rows": group.get("rows")} if self.policy.rows or group.get("rows") else {}
                raise ValueError(
                    f"the optimizer must store the ends' state as ends {str(self.policy)!r} says, but their "
                    f"param groups in {type(optimizer).__name__} say {_format(seen)}; build it as "
                    f"lisatune.AdamW(lisatune.param_groups(model, layers, ends={str(self.policy)!r}), lr=…)"
                )

    def detach(self) -> None:
        """Undo `attach`."""
        if self._row_embedding is not None:
            self._row_embedding.sparse = self._was_sparse
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _read(word: str, text: object) -> dict[str, Any]:
    """Return the fields that one word sets."""
    match word.partition(":"):
        case ("train", "", ""):
            return {"trains": "all", "every": 1}
        case ("head", "", ""):
            return {"trains": "head"}
        case ("frozen", "", ""):
            return {"trains": "none"}
        case ("8bit" | "factored", "", ""):
            return {"moments": word}
        case ("cpu", "", ""):
            return {"state_device": word}
        case ("rows", "", ""):
            return {"rows": True}
        case ("rows", ":", span):
            first, _, last = span.partition("-")
            if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
                raise ValueError(f"ends {text!r}: rows:A-B needs two row numbers A <= B, got {span!r}")
            return {"trains": "rows", "span": (int(first), int(last))}
        case ("every", ":", number) if number.isascii() and number.isdigit() and int(number) >= 1:
            return {"every": int(number)}
        case ("every", _, number):
            raise ValueError(f"ends {text!r}: every:M needs a number of periods M >= 1, got {number!r}")
    raise ValueError(f"ends {text!r}: there is no {word!r}. {_list_words()}")


def _list_words() -> str:
    return f"Allowed: {', '.join(WORDS)}, joined by +, such as every:5+8bit"


def _format(options: dict[str, Any]) -> str:
    return " and ".join(f"{key}={value!r}" for key, value in options.items()) or "nothing of it"


def _name_frozen_by_head(model: nn.Module, layers: LayerMap) -> set[str]:
    """Name the ends that `head` freezes: weights of embeddings, also of positions, except for a tied head."""
    if layers.embedding is None or layers.head is None:
        missing = "input embedding" if layers.embedding is None else "output head"
        raise ValueError(
            f"ends 'head' needs the {missing} of {type(model).__name__}, and the model does not name it; "
            "use every:M or frozen"
        )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = layers.end_parameters(model)
    return {name for name, p in named.items() if id(p) in embeddings and name != layers.head}


def find_span_weights(span: tuple[int, int], model: nn.Module, layers: LayerMap) -> dict[str, nn.Parameter]:
    """Return embedding and head, of which the rows from A to B train; a tied weight comes once.

    Raises:
        ValueError: the model names no embedding, or one of them is frozen or has fewer rows.
    """
    named = layers.end_parameters(model)
    wanted = {name for name in (layers.embedding, layers.head) if name is not None}
    if layers.embedding is None or not wanted <= named.keys():
        raise ValueError(
            f"ends 'rows:A-B' needs embedding and head of {type(model).__name__} among the ends that train, "
            f"and these are {', '.join(named) or 'none'}; use frozen"
        )
    for name in sorted(wanted):
        if span[1] >= len(named[name]):
            raise ValueError(f"ends 'rows:{span[0]}-{span[1]}': {name} has {len(named[name])} rows (from 0)")
    return {name: named[name] for name in wanted}


def find_row_embedding(model: nn.Module, layers: LayerMap) -> nn.Embedding:
    """Return the input embedding, if rows of its weight can train.

    Raises:
        ValueError: it is unknown, tied to the head, or frozen.
    """
    kind = type(model).__name__
    if layers.embedding is None:
        raise ValueError(
            f"ends 'rows' needs the input embedding of {kind}, and the model does not name it; use 8bit"
        )
    if layers.is_tied:
        raise ValueError(
            f"ends 'rows' needs an untied embedding, and {kind} ties it to the head, through which every row "
            "has a gradient; use 8bit, factored or every:M"
        )
    if layers.embedding not in layers.ends:
        raise ValueError(
            f"ends 'rows' trains rows of {layers.embedding!r}, which is frozen; name it in the ends"
        )
    return _find_embedding("rows", model, layers)


def _find_embedding(word: str, model: nn.Module, layers: LayerMap) -> nn.Embedding:
    """Return the module of the input embedding, under any of the names of its weight."""
    names = {layers.embedding, *(alias for alias, name in layers.tied if name == layers.embedding)}
    for path, module in model.named_modules():
        if f"{path}.weight" in names and isinstance(module, nn.Embedding):
            return module
    raise ValueError(
        f"ends {word!r} needs the input embedding of {type(model).__name__} as a torch.nn.Embedding, and "
        f"{layers.embedding!r} belongs to none; use every:M or frozen"
    )


def _detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.detach()
