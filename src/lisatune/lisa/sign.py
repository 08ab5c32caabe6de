"""Frozen blocks that take a small step of equal size for every number, in backward and without state.

    w ← w - lr·c·sign(g)                    for each number w of a frozen block and its gradient g

lr is the learning rate that the optimizer has for w's param group in this step. FRUGAL (Zmushko et al.,
arXiv 2411.07837) does this with what its optimizer holds no state of; its code has c = 1 for pre-training and
0.1 for fine-tuning. The gradient is freed at once, so one gradient exists at a time. A number whose gradient
is zero or NaN stays.

bf16 weights are rounded stochastically: such a step is far below half of their spacing, so rounding to
nearest would lose it. The noise follows from the seed, the number of steps and the parameter's place, so a
resumed run makes the same steps. Weight decay is left to the optimizer, which decays blocks while they are
drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.lisa.correction import Correction, FrozenCorrection
from lisatune.lisa.frozen_weights import FrozenWeights
from lisatune.optim.adamw import AdamW, default_chunk_size
from lisatune.optim.chunks import flatten
from lisatune.optim.codecs import in_float32, key_of
from lisatune.optim.gradient_hooks import after_gradient

__all__ = ["SignCorrection"]


class SignCorrection(FrozenCorrection):
    """Hooks on the parameters of all blocks: those that are frozen move by their gradients' signs.

    Args:
        model: its blocks require grad.
        blocks: the parameters of each block that can train.
        optimizer: trains the model; its learning rates are read at each step.
        correction: c.
        seed: names the random numbers of stochastic rounding.

    Raises:
        ValueError: frozen weights are codes, the optimizer updates in backward, weights are float16, or there
            are several ranks.
    """

    moves_frozen = True
    says = "others took steps of equal size (correction sign), which are not proven"

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Sequence[nn.Parameter]],
        optimizer: Optimizer,
        correction: Correction,
        *,
        seed: int,
    ) -> None:
        if ranks.count() > 1:
            raise ValueError(
                "correction sign works in one process only, because the gradients of several ranks are added "
                "after backward; use correction none"
            )
        if FrozenWeights.of(model) is not None:
            raise ValueError(
                "correction sign moves frozen weights, and codes of frozen weights cannot take a step that "
                "is smaller than their spacing; use frozen_weights exact, or correction lora"
            )
        if isinstance(optimizer, AdamW) and optimizer.in_backward is not None:
            raise ValueError(
                "correction sign and update in backward would both use the gradients of frozen blocks; "
                "update in step(), or use correction lora"
            )
        self.blocks = [tuple(block) for block in blocks]
        self._places = {p: i for i, p in enumerate(p for block in blocks for p in block)}
        if any(p.dtype == torch.float16 for p in self._places):
            raise ValueError("correction sign cannot round float16 weights; load the model in bfloat16")
        self.seed, self.steps_done = seed, 0
        self._corrected: set[nn.Parameter] = set()
        self._moved: set[nn.Parameter] = set()
        self._group_of: dict[nn.Parameter, int] = {}
        self._hooks = [after_gradient(p, self._take) for p in self._places]
        super().__init__(model, optimizer, correction)

    def train(self, active: Sequence[int]) -> None:
        """Correct all blocks but these from now on."""
        self._corrected = {p for i, block in enumerate(self.blocks) if i not in active for p in block}
        self._group_of = {p: i for i, group in enumerate(self._follows.param_groups) for p in group["params"]}
        for p in self._corrected:
            p.requires_grad_(True)

    def is_stateless(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is one of a frozen block."""
        return parameter in self._corrected

    def step(self) -> None:
        """Count a step."""
        self.steps_done += 1
        self._moved.clear()

    def has_gradients(self) -> bool:
        """Whether a backward pass has moved frozen blocks, and no step came after it."""
        return bool(self._moved)

    def drop_gradients(self) -> None:
        """Forget which parameters have moved, because the step begins anew."""
        self._moved.clear()

    def detach(self, model: nn.Module) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        super().detach(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, which names the random numbers."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a number of steps."""
        self.steps_done = int(saved["steps_done"])
        self._moved.clear()

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """Move a parameter of a frozen block, and release its gradient."""
        assert isinstance(parameter, nn.Parameter)
        if parameter not in self._corrected:
            return
        if parameter in self._moved:
            raise RuntimeError(
                "a frozen block got a second gradient before optimizer.step(); correction sign moves weights "
                "in backward and cannot accumulate gradients, so call step() after every backward, or use "
                "correction lora"
            )
        self._moved.add(parameter)
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.contiguous().view(-1), None
        rate = self._follows.param_groups[self._group_of[parameter]]["lr"]
        step = float(rate or 0.0) * self.correction.share
        key = key_of(self.seed, self.steps_done, self._places[parameter])
        with flatten(parameter) as flat:
            at_once = default_chunk_size(flat.device.type)
            for number, start in enumerate(range(0, flat.numel(), at_once) if step else ()):
                part = slice(start, start + at_once)
                with in_float32(flat[part], None, "stochastic", key_of(key, number)) as exact:
                    exact.sub_(gradient[part].to(exact.dtype).sign_().nan_to_num_(nan=0.0), alpha=step)
