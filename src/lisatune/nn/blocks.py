"""How blocks run: with activations stored or recomputed, compiled or not.

Each block gets a `forward` of its own that looks, call by call, at whether the block has a parameter that
trains. So a draw of LISA has nothing to switch, and parameter names do not change.

    checkpointing "all"     a block keeps its input only and runs again in backward
    checkpointing "frozen"  frozen blocks do so; active blocks store their activations
    compiled                the block's forward is one graph, shared by all blocks of its kind

A compiled block has at most four graphs: frozen or active, with an input that needs a gradient or not (below
the lowest active block, while the embedding is frozen). Blocks of one model share them, because parameters
are inputs of the graph. `BlockForward.warm_up` builds them all, so that no draw compiles anew. On several
ranks FSDP2 gathers a block before its forward and divides it after it, both outside of the graph. Without
gradients (evaluation, generation), and with a key-value cache that holds something, the block runs its
original forward. An empty cache is left out in training: `past_key_values` stays empty.
"""

import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lisatune.distributed.shards import reshard
from lisatune.nn.layers import LayerMap, find_layers

__all__ = [
    "BlockForward",
    "check_compiler",
    "compile_blocks",
    "enable_activation_checkpointing",
    "is_compiled_whole",
    "num_graphs",
    "watch_compiling",
]

RECOMPILE_LIMIT = 64
"""Graphs of one block class: kinds of layers × (frozen, active) × (input needs a gradient, or not)."""


class BlockForward:
    """Lets a model's blocks recompute their activations, run compiled, or both.

    Args:
        model: any model.
        layers: says which modules are its blocks (`find_layers`).
        checkpointing: which blocks recompute their activations in backward: none, all, or those frozen now.
        backend: torch.compile's backend, such as "inductor"; None does not compile.
        dynamic: True for batches of different lengths: one graph for all of them. False makes a graph for
            each length.

    Raises:
        RuntimeError: another BlockForward is in place.
        ValueError: "inductor" on a CPU without a C++ compiler; a block to compile has a `forward` of its own.

    Example:
        >>> from lisatune.nn.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with BlockForward(model, find_layers(model, blocks=""), checkpointing="all"):
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerMap,
        *,
        checkpointing: Literal["all", "frozen"] | None = None,
        backend: str | Callable[..., Any] | None = None,
        dynamic: bool = True,
    ) -> None:
        self.model, self.checkpointing = model, checkpointing
        self.blocks: list[Any] = [model.get_submodule(path) for path in layers.blocks]
        if any("_block_forward" in vars(block) for block in self.blocks):
            raise RuntimeError("the blocks already have a BlockForward; undo() it first")
        self._own = [vars(block).get("forward") for block in self.blocks]
        if backend is not None and any(self._own):
            raise ValueError(
                "a block has a forward of its own, as accelerate gives it for device_map, and compiling "
                "would leave it out; load the model onto one device, or do not compile"
            )
        if backend == "inductor" and all(p.device.type == "cpu" for p in model.parameters()):
            check_compiler()
        self.compiled: dict[type, Callable[..., Any]] = {}
        for block, own in zip(self.blocks, self._own, strict=True):
            if backend is not None and type(block) not in self.compiled:
                self.compiled[type(block)] = torch.compile(  # type: ignore[call-overload]
                    inspect.unwrap(type(block).forward),  # below transformers' own checkpointing
                    backend=backend,
                    dynamic=dynamic,
                    recompile_limit=RECOMPILE_LIMIT,
                )
            block._block_forward, block._plain_forward = self, own
            block.forward = MethodType(_forward, block)

    def compiled_for(self, block: nn.Module) -> Callable[..., Any]:
        """Return the compiled forward of a block's class, from which FSDP2 may have derived another."""
        return next(self.compiled[kind] for kind in type(block).__mro__ if kind in self.compiled)

    def undo(self) -> None:
        """Give the blocks their own forward back. A second call does nothing."""
        for block, own in zip(self.blocks, self._own, strict=True):
            if vars(block).get("_block_forward") is self:
                del block._block_forward, block._plain_forward, block.forward
                if own is not None:
                    block.forward = own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def warm_up(
        self,
        run: Callable[[], Any],
        *,
        embedding: Sequence[nn.Parameter],
        rests: bool,
        draws: bool = True,
    ) -> float:
        """Compile every graph that a draw can need.

        Freezes and thaws blocks and calls `run`, then puts flags, gradients and random numbers back.

        Args:
            run: a forward and backward pass on a batch like those of the run. With `dynamic` its length must
                differ from the hidden size and the head size, or the graphs would be for that length alone.
            embedding: parameters below the blocks, the input embedding.
            rests: whether the embedding is frozen in some periods, so that blocks run without a gradient
                below the lowest active one.
            draws: whether blocks freeze and thaw. If not, one pass with the flags as they are builds all
                graphs.

        Returns:
            Seconds it took.
        """
        started = time.perf_counter()
        if not draws:
            with _flags_kept(list(self.model.parameters())):
                run()
            return time.perf_counter() - started
        last = len(self.blocks) - 1
        even = set(range(0, last + 1, 2))
        passes = [(True, even), (True, set(range(last + 1)) - even)]
        if rests:
            # A kind of block occurs more than once in a model, so the first and last blocks show each kind.
            passes += [(False, {last}), (False, {0, last}), (False, even), (False, set(range(1, last + 1)))]
            passes += [(False, {i}) for i in self._first_of_kinds()]
        with _flags_kept(list(self.model.parameters())):
            for trains, active in passes:
                for p in embedding:
                    p.requires_grad_(trains)
                for index, block in enumerate(self.blocks):
                    block.requires_grad_(index in active)
                run()
                reshard(self.model)  # the next flags are for divided parameters
        return time.perf_counter() - started

    def _first_of_kinds(self) -> list[int]:
        """The first blocks of each attention kind (sliding, full), told by the module's plain attributes."""
        kinds: dict[str, int] = {}
        for index, block in enumerate(self.blocks):
            kinds.setdefault(str(getattr(block, "attention_type", type(block))), index)
        return list(kinds.values())


def compile_blocks(
    model: nn.Module,
    layers: LayerMap | None = None,
    *,
    backend: str | Callable[..., Any] = "inductor",
    checkpointing: Literal["all", "frozen"] | None = None,
    dynamic: bool = True,
) -> BlockForward:
    """Compile each block on its own, for any training loop, in place of `torch.compile(model)`.

    `torch.compile(model)` compiles the whole model anew at every draw of LISA, and gives up after eight
    times. Blocks share at most four graphs for each kind of block, which are built when they are first
    needed; no later draw compiles. Evaluation and generation run as they are. In training blocks keep no
    keys and values for `past_key_values`.

    Args:
        model: any model; changed in place. Parameter names stay.
        layers: its blocks and ends, if `find_layers(model)` cannot find them.
        backend: torch.compile's.
        checkpointing: which blocks recompute their activations in backward: none, all, or those frozen now.
        dynamic: True for batches of different lengths; False makes a graph for each length.

    Returns:
        What gives the blocks their own forward back: call its `undo()`.

    Raises:
        RuntimeError: the blocks are compiled or recomputed already.
        ValueError: the blocks cannot be found, or there is no C++ compiler for "inductor" on a CPU.

    Example:
        >>> from lisatune import LISA, compile_blocks
        >>> model = AutoModelForCausalLM.from_pretrained(name)  # doctest: +SKIP
        >>> compile_blocks(model)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # doctest: +SKIP
        >>> lisa = LISA(model, optimizer, active=2, period=10)  # doctest: +SKIP
    """
    layers = find_layers(model) if layers is None else layers
    return BlockForward(model, layers, checkpointing=checkpointing, backend=backend, dynamic=dynamic)


def watch_compiling(model: nn.Module) -> RemovableHandle:
    """Let a model note that `torch.compile` traces it as a whole, for `is_compiled_whole`."""
    return _unwrap_compiled(model).register_forward_pre_hook(_note_compiling)


def is_compiled_whole(model: nn.Module) -> bool:
    """Tell whether a model is wrapped by `torch.compile`, or was traced by it since `watch_compiling`."""
    inner = _unwrap_compiled(model)
    return inner is not model or inner._compiled_call_impl is not None or "_was_traced" in vars(inner)


def _note_compiling(model: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        model._was_traced = True


def _unwrap_compiled(model: nn.Module) -> nn.Module:
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before it is imported
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        inner: nn.Module = model._orig_mod
        return inner
    return model


def _forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace a block's `forward`."""
    way: BlockForward = block._block_forward
    plain = block._plain_forward or MethodType(type(block).forward, block)
    if not (torch.is_grad_enabled() and block.training):
        return plain(*args, **kwargs)
    args = tuple(None if _is_new_cache(each) else each for each in args)
    for name in [name for name, value in kwargs.items() if _is_new_cache(value)]:
        kwargs[name] = None
    if any(hasattr(each, "get_seq_length") for each in (*args, *kwargs.values())):
        return plain(*args, **kwargs)
    forward = MethodType(way.compiled_for(block), block) if way.compiled else plain
    recomputes = way.checkpointing == "all" or (
        way.checkpointing == "frozen" and not any(p.requires_grad for p in block.parameters())
    )
    if not recomputes:
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_new_cache(value: Any) -> bool:
    """Whether this is a transformers key-value cache that holds nothing yet.

    transformers makes one in every forward, unless `use_cache=False` says otherwise. In training nobody reads
    it, and a block that runs again in backward would add to it twice.
    """
    try:
        return bool(value.get_seq_length() == 0)
    except (AttributeError, ValueError):  # no cache, or one without keys and values
        return False


def check_compiler() -> None:
    """Raise ValueError if torch.compile cannot build code for the CPU."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"compiled blocks need a C++ compiler, and {' or '.join(names)} was not found; "
            "install g++, or do not compile (run.compile: false)"
        )


def enable_activation_checkpointing(model: Any) -> None:
    """Let every block recompute its activations in backward. Works with frozen blocks and a frozen embedding.

    Raises:
        ValueError: the model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} cannot recompute activations; set run.activation_checkpointing: false"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpoints need an input that requires grad. It would hold open the graph below the
    # lowest active block: frozen blocks would be recomputed and differentiated for nothing.
    model.disable_input_require_grads()


def num_graphs() -> int:
    """Count the graphs that torch.compile has built in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@contextmanager
def _flags_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put `requires_grad`, gradients and the random state back at the end."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for p, flag, grad in before:
                p.requires_grad_(flag)
                p.grad = grad
