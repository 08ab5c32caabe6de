"""AdamW that computes in float32, in whatever precision weights and moments are stored.

A parameter is updated in chunks. Each chunk of weight, gradient and moments is converted to float32, updated
by torch's fused AdamW kernel, and stored again in its own format (see `codecs`). On CUDA one kernel does all
of that, for many small parameters in one launch (`lisatune.optim.adamw_triton`):

    rounding, for bf16 weights      bytes   the weight after a step is
        exact                         2     the float32 weight rounded to nearest; a remainder holds the rest
        stochastic                    0     up or down by chance, right on average
        nearest                       0     rounded to nearest: updates below half a spacing are lost
    moments
        fp32                          8     float32
        bf16                          4     bf16, the second moment rounded stochastically
        8bit                        2.03    dynamic 8-bit codes with a scale for each 256 of them
        factored                     ~0     second moment as means of rows and columns, no first moment

Why a remainder and no master copy: a bf16 weight is the upper half of its float32 number, so the lower half
is all that a master copy adds, at half its bytes. TransformerEngine (store_param_remainders) and apex do the
same.

Why the bf16 second moment is rounded stochastically: beta2 = 0.999 changes it by 0.1 % at a step, which is
less than half a spacing of bf16 (0.2 to 0.4 %), so that rounding to nearest would hold it where it is.

Factored moments (Adafactor: Shazeer & Stern, arXiv 1804.04235, sections 3 and 6). With R_i and C_j the
running means of g² over row i and over column j of a matrix,

    v_ij = R_i C_j / mean(R),     u = g / (sqrt(v̂) + eps),     w ← w - lr·u / max(1, RMS(u))

v̂ is v / (1 - beta2^t), as in Adam. A first moment would cost what factoring saves. Without one the sum of
all steps is the same, because beta1 only spreads a gradient over the steps that follow; single steps are
rougher, which the clipping at RMS 1 bounds. Parameters of one dimension keep a whole second moment.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed.shards import Part, part_of, part_to_update, row_bounds
from lisatune.optim import codecs
from lisatune.optim.adamw_triton import Chunk, can_update, is_small, kind_of, update_chunk, update_together
from lisatune.optim.chunks import flatten, on_device
from lisatune.optim.factored import update_factored
from lisatune.optim.group import Group, Moments, Rounding, StateDevice
from lisatune.optim.in_backward import UpdateInBackward
from lisatune.optim.loss_scaler import refuse_scaled_step, tell_of_scaler
from lisatune.optim.rows import RowGradients, update_rows
from lisatune.optim.state import (
    CHUNKED,
    check_group,
    fused_adamw,
    home_of,
    layout_of,
    prepare,
    read_moments,
    write_moments,
)

__all__ = ["AdamW", "default_chunk_size"]

CHUNK = {"cpu": 1 << 17}
"""Elements of a chunk by device. On a CPU a chunk fits in the cache."""

CHUNK_ELSEWHERE = 1 << 22
"""Elements of a chunk on all other devices."""

CHUNK_OF_KERNEL = 1 << 24
"""Elements of a chunk if one kernel does it all: it takes no temporary memory, so only the launch counts."""


def default_chunk_size(kind: str) -> int:
    """Return the elements that are brought to float32 at a time on a kind of device, such as "cuda"."""
    return CHUNK.get(kind, CHUNK_ELSEWHERE)


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with a choice of how weights and moments are stored.

    With float32 weights and moments it is `torch.optim.AdamW(fused=True)` bit for bit.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; all but `params` per param group.
        rounding: "exact", "stochastic" or "nearest", how an update goes into bf16 weights. Wider weights
            ignore it. Per param group.
        moments: "fp32", "bf16", "8bit" (needs bitsandbytes) or "factored". Per param group. float64 weights
            have float64 moments in place of fp32.
        state_device: None, where the weight is; or "cpu": moments and remainder in host memory, pinned where
            the weight is on CUDA, brought over chunk by chunk while other chunks are computed. Factored
            moments stay with the weight. Per param group.
        rows: True for the weight of an `nn.Embedding(sparse=True)`: gradient and moments of the rows that a
            step reads, see `lisatune.optim.rows`. Per param group.
        seed: names the random numbers of stochastic rounding. They follow from it, the number of steps, the
            parameter's place in the optimizer, and the place in the parameter, however many ranks divide it.
            No global generator is touched, and resume is exact.
        chunk_size: elements brought to float32 at a time, a multiple of 256. Default: 2^17 on a CPU, 2^22
            elsewhere, which are 8 bytes each of temporary memory, or 16 with compact moments; 2^24 and none
            where one kernel does it all.

    Raises:
        ValueError: an argument is out of range; at the first step, a weight of another dtype than bf16,
            float32 and float64, or a gradient that is sparse without `rows`, or dense with it; a param group
            or a loaded state has torch's `amsgrad` or `maximize`.

    Example:
        >>> weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, rounding="exact", moments="bf16")
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight[0, 0].item(), optimizer.state[weight]["exp_avg"].dtype
        (0.8984375, torch.bfloat16)

    State of a parameter: `step` (float32 scalar), `exp_avg` and `exp_avg_sq`, with 8bit `exp_avg_codes`,
    `exp_avg_scales` and the same of `exp_avg_sq`, with factored `exp_avg_sq_rows` and `exp_avg_sq_columns`;
    with exact rounding `remainder` (int16); with rows a table instead of all these. State that is
    missing starts anew: moments and remainder as zeros.
    """

    lasting_state: tuple[str, ...] = ("remainder",)
    """State that is part of the weights: code that releases state must keep these keys."""

    param_groups: list[Group]  # type: ignore[assignment]  # torch says dict[str, Any]

    _incoming: dict[int, Any] | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "exact",
        moments: Moments = "fp32",
        state_device: StateDevice | None = None,
        rows: bool = False,
        seed: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None and (chunk_size < 1 or chunk_size % codecs.BLOCK):
            raise ValueError(f"chunk_size must be a positive multiple of {codecs.BLOCK}, got {chunk_size}")
        self.chunk_size = chunk_size
        self.in_backward: UpdateInBackward | None = None
        self._row_gradients = RowGradients()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "moments": moments,
            "state_device": state_device,
            "rows": rows,
            "seed": seed,
            "steps_done": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own options override those of the optimizer."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._watch_rows(self.param_groups[-1])

    def _watch_rows(self, group: Group) -> None:
        for p in group["params"] if group["rows"] else ():
            self._row_gradients.watch(p, group.get("span"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        After `update_in_backward()` no parameter has one; the call then only counts the step.

        Raises:
            ValueError: updates are made in backward, and a loss scaler makes the step.
        """
        loss = None
        if self.in_backward is not None:
            refuse_scaled_step(self, "the gradients that an update in backward has used")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            ready = [(place + i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            self._update(group, ready)
            place += len(group["params"])
            group["steps_done"] += 1
        if self.in_backward is not None:
            self.in_backward.end_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the gradients."""
        super().zero_grad(set_to_none)
        self._row_gradients.forget()

    def update_in_backward(self) -> UpdateInBackward:
        """From now on update each parameter in backward, as soon as its gradient is complete.

        Gradients are released as they are used; `step()` counts, and must be called after every backward.
        `lisatune.optim.in_backward` says what this cannot be combined with.

        Raises:
            ValueError: a parameter is frozen already.
        """
        if self.in_backward is None:
            self.in_backward = UpdateInBackward(self, self._update_one)
            tell_of_scaler(self)
        return self.in_backward

    def _update_one(self, place: int, p: nn.Parameter) -> None:
        first = 0
        for group in self.param_groups:
            if place < first + len(group["params"]):
                self._update(group, [(place, p)])
                return
            first += len(group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; every tensor gets the dtype and the device that its layout asks for.

        Torch alone would cast moments to their weight's dtype.
        """
        self._incoming = state_dict["state"]
        try:
            super().load_state_dict(state_dict)
        finally:
            self._incoming = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what `copy.deepcopy` and pickle keep; hooks of LISA and others are left out, as by torch."""
        copied = {"chunk_size": self.chunk_size, "updates_in_backward": self.in_backward is not None}
        return {**super().__getstate__(), **copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up state; torch calls this in `load_state_dict`, before hooks such as LISA's look at it."""
        updates_in_backward = state.pop("updates_in_backward", None)
        defaults = state.get("defaults") or self.defaults
        for options in state["param_groups"]:
            for key, value in defaults.items():
                if key in Group.__required_keys__:
                    options.setdefault(key, value)  # a state saved by another AdamW
            check_group(options)
        super().__setstate__(state)
        if updates_in_backward is not None:
            self._restore_hooks(updates_in_backward)
        if self._incoming is not None:
            self._take_incoming(self._incoming)

    def _restore_hooks(self, updates_in_backward: bool) -> None:
        """Give a copy hooks of its own on its parameters; frozen ones need them too, for when they thaw."""
        self.in_backward, self._row_gradients = None, RowGradients()
        frozen = [p for group in self.param_groups for p in group["params"] if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        for group in self.param_groups:
            self._watch_rows(group)
        if updates_in_backward:
            self.update_in_backward()
        for p in frozen:
            p.requires_grad_(False)

    def _take_incoming(self, states: dict[int, Any]) -> None:
        """Store loaded state as its layout asks for, where torch has cast it to its weight's dtype."""
        numbered = [(group, p) for group in self.param_groups for p in group["params"]]
        for number, (group, p) in enumerate(numbered):
            layout = layout_of(group, p)
            for key, saved in states.get(number, {}).items():
                if key in layout and isinstance(saved, Tensor | int | float):  # `step` may be a number
                    value = torch.as_tensor(saved).to(dtype=layout[key][1]).contiguous()
                    self.state[p][key] = home_of(group, p, key).take(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, after every transfer to host memory has ended."""
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            if device.type == "cuda" and any(group["state_device"] for group in self.param_groups):
                torch.cuda.synchronize(device)
        return super().state_dict()

    # ---- one group

    def _update(self, group: Group, ready: Sequence[tuple[int, nn.Parameter]]) -> None:
        """Update parameters of a group, each given with its place in the optimizer."""
        whole: list[Tensor] = []
        states: list[dict[str, Any]] = []
        small: dict[tuple[Any, ...], list[Chunk]] = {}
        for place, parameter in ready:
            state, p, part = self.state[parameter], part_to_update(parameter), part_of(parameter)
            ids = self._row_gradients.take(parameter) if group["rows"] else None
            prepare(group, p, state, size=part.size, ids=ids)
            key = codecs.key_of(group["seed"], group["steps_done"], place)
            if group["rows"]:
                first = row_bounds(parameter)[part.index]
                update_rows(group, p, state, key, self._chunk(p), first)
            elif _is_whole(group, p, state):
                whole.append(p)
                states.append(state)
            elif can_update(group, p) and is_small(group, p, self.chunk_size):
                weight, gradient, stored = p.detach().view(-1), _flat_gradient(p), _flat_state(state)
                chunk = weight, gradient, stored, state["step"], key, part.start
                small.setdefault(kind_of(weight, gradient, stored), []).append(chunk)
            else:
                self._update_alone(group, p, state, key, part)
        for chunks in small.values():
            torch._foreach_add_([step for _, _, _, step, _, _ in chunks], 1)
            update_together(group, chunks)
        if whole:
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            fused_adamw(group, whole, [p.grad for p in whole], exp_avgs, exp_avg_sqs, steps)

    def _update_alone(self, group: Group, p: Tensor, state: dict[str, Any], key: int, part: Part) -> None:
        if group["moments"] == "factored":
            update_factored(group, p, state, key, self._chunk(p), part)
        else:
            self._update_in_chunks(group, p, state, key, part.start)

    def _update_in_chunks(self, group: Group, p: Tensor, state: dict[str, Any], key: int, start: int) -> None:
        state["step"].add_(1)
        gradient, stored = _flat_gradient(p), _flat_state(state)
        is_one_kernel, chunk_size = can_update(group, p), self._chunk(p)
        if is_one_kernel and group["state_device"] is None:
            chunk_size = self.chunk_size or CHUNK_OF_KERNEL
        update = update_chunk if is_one_kernel else _update_chunk
        with flatten(p) as weight:
            for at, chunk in on_device(stored, p.numel(), chunk_size, p.device):
                update(group, weight[at], gradient[at], chunk, state["step"], key, start + at.start)

    def _chunk(self, p: Tensor) -> int:
        return self.chunk_size or default_chunk_size(p.device.type)


def _flat_gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.contiguous().view(-1)


def _flat_state(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.view(-1) for name, value in state.items() if name in CHUNKED}


def _update_chunk(
    group: Group,
    weight: Tensor,
    gradient: Tensor,
    chunk: dict[str, Tensor],
    step: Tensor,
    key: int,
    start: int,
) -> None:
    """Make a step of a chunk in place; `adamw_triton.update_chunk` does the same in one kernel."""
    # The bf16 second moment takes the upper half of the random bits, the weight the lower.
    noise = None
    if group["moments"] == "bf16":
        noise = codecs.random_bits(weight.numel(), key, weight.device, start=start)
    remainder, rounding = chunk.get("remainder"), group["rounding"]
    with codecs.in_float32(weight, remainder, rounding, key, start=start, noise=noise) as exact:
        exp_avg, exp_avg_sq = read_moments(chunk, exact.dtype)
        fused_adamw(group, [exact], [gradient.to(exact.dtype)], [exp_avg], [exp_avg_sq], [step])
        write_moments(chunk, exp_avg, exp_avg_sq, noise)


def _is_whole(group: Group, p: Tensor, state: dict[str, Any]) -> bool:
    """Whether the kernel can take weight, gradient and moments as they are stored."""
    assert p.grad is not None
    is_flat = p.is_contiguous() and p.grad.is_contiguous() and p.grad.dtype == p.dtype
    moment = state.get("exp_avg")
    is_ready = moment is not None and moment.dtype == p.dtype and moment.device == p.device
    return is_flat and is_ready and p.dtype != torch.bfloat16
