r"""MeZO (Malladi et al., arXiv 2305.17333): fine-tuning by two forward passes, in the memory of inference.

With z ~ N(0, 1) of the shape of the weights θ, the perturbation scale ε and the loss L of a step's batch,
the projected gradient g stands for the gradient (SPSA, definition 1), and a step goes along z by it
(algorithm 1):

    g  =  (L(θ + εz) - L(θ - εz)) / 2ε
    θ  ←  θ - lr λ θ - lr g z                                    (λ: weight decay; none on norms and biases)

z is never stored. It is made in chunks, from (seed, step, place of the parameter, chunk), whenever it is
needed: for each of the two passes, and for the update. E[g z] is the gradient, and the root mean square of g
is the gradient's norm; so |g| is what `optimizer.max_grad_norm` clips.

The paper's code adds εz to the weights, subtracts 2εz and adds εz again. In bf16 these do not cancel, and
the weights drift. Here no weight is touched: while a block runs, its parameters stand at θ ± εz, in new
tensors that are dropped when it has run; the ends (embedding, final norm, head) do for a whole pass. So the
weights are exact in every dtype, for a copy of the ends and of one block. θ ± εz is rounded to bf16
stochastically, because to nearest most weights of a norm, which are near 1, would not move at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.lisa.groups import param_groups
from lisatune.losses.base import Loss
from lisatune.losses.causal_lm import evaluation_mode
from lisatune.methods.base import Alternatives, Method
from lisatune.methods.lora import Lora
from lisatune.methods.prefix import Prefix
from lisatune.methods.step import TrainingStep
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.optim import codecs
from lisatune.optim.chunks import cut, flatten
from lisatune.recipe import DataConfig, OptimizerConfig, RunConfig

__all__ = ["MeZO"]

CHUNK = 1 << 20
"""Numbers of z that exist at once. Other chunks would give another z."""

EPSILON = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-1}
"""ε of the paper by what trains (appendix D, tables 15 and 16)."""

ROUNDS = 1
"""Sets the random bits apart that round θ ± εz from those that round an update."""


@final
@dataclass(frozen=True, kw_only=True)
class MeZO(Method):
    """No gradients: two forward passes and a step along random noise, in the memory of inference."""

    name = "mezo"
    num_moments = 0
    lr_scale = 0.1

    over: Literal["full", "lora", "prefix"] = "full"
    """What trains: every parameter, LoRA's adapters, or prefix tuning's keys and values."""

    epsilon: float | None = None
    """ε, how far the weights move for a forward pass. Default: 1e-3 of full, 1e-2 of lora, 1e-1 of prefix."""

    ends: Literal["train", "frozen"] = "train"
    """Whether embedding, head and final norm train, with `over: full`. frozen needs no copy of them."""

    rank: int | None = None
    """Rank of LoRA's adapters, with `over: lora`. Default: 16."""

    tokens: int | None = None
    """Virtual tokens of the prefix, with `over: prefix`. Default: 20."""

    seed: int = 0
    """Seed of the noise z."""

    def __post_init__(self) -> None:
        if self.over not in EPSILON:
            raise ValueError(f"method.over must be full, lora or prefix, got {self.over!r}")
        if self.ends not in ("train", "frozen"):
            raise ValueError(f"method.ends of method mezo must be train or frozen, got {self.ends!r}")
        if self.epsilon is not None and not 0 < self.epsilon < float("inf"):
            raise ValueError(f"method.epsilon must be a positive number, got {self.epsilon}")
        for key, plain, owner in (
            ("ends", "train", "full"),
            ("rank", None, "lora"),
            ("tokens", None, "prefix"),
        ):
            if getattr(self, key) != plain and self.over != owner:
                raise ValueError(
                    f"method.{key} belongs to method.over: {owner}, and over is {self.over}; leave it out"
                )
        self._inner()

    @property
    def perturbation_scale(self) -> float:
        """ε, given or by default."""
        return EPSILON[self.over] if self.epsilon is None else self.epsilon

    def _inner(self) -> Method | None:
        """Return the method whose adapters train; None trains the model's own weights."""
        if self.over == "lora":
            return Lora() if self.rank is None else Lora(rank=self.rank)
        if self.over == "prefix":
            return Prefix() if self.tokens is None else Prefix(tokens=self.tokens)
        return None

    def check_mix(self, data: DataConfig, run: RunConfig) -> None:
        """Refuse what only helps backward, and what the adapters cannot work with."""
        if run.activation_checkpointing:
            raise ValueError(
                "run.activation_checkpointing cannot work with method mezo: there is no backward, so no "
                "activations are kept; set it to false"
            )
        if run.compile is True:
            raise ValueError(
                "run.compile cannot work with method mezo: blocks are compiled for passes with gradients, "
                "and mezo has none; set it to false"
            )
        if (inner := self._inner()) is not None:
            inner.check_mix(data, run)

    def check_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Refuse another optimizer, and keys of AdamW that do nothing here."""
        if optimizer.name not in ("adamw", "sgd"):
            raise ValueError(
                f"optimizer.name {optimizer.name} cannot work with method mezo, whose steps are those of SGD "
                "along noise that is made anew; leave it out"
            )
        for key in ("options", "betas", "eps", "moments", "state_device", "in_backward"):
            plain = {} if key == "options" else getattr(OptimizerConfig, key)
            if getattr(optimizer, key) != plain:
                raise ValueError(f"method mezo does not read optimizer.{key}; leave it out")
        if optimizer.ends_lr is not None and (self.over != "full" or self.ends == "frozen"):
            raise ValueError(
                f"optimizer.ends_lr={optimizer.ends_lr:g} does nothing with method mezo unless embedding, "
                "head and final norm train (over: full, ends: train); set it to null"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Add the adapters, or freeze the ends if they do not train."""
        if (inner := self._inner()) is not None:
            return inner.prepare(model)
        if self.ends == "frozen":
            for p in find_layers(model).end_parameters(model).values():
                p.requires_grad_(False)
        return model

    def build_optimizer(self, model: nn.Module, layers: LayerMap, config: OptimizerConfig) -> Optimizer:
        """Build SGD along noise, over everything that trains: a group per layer, or one of all adapters."""
        if self.over == "full":
            groups = param_groups(model, layers, weight_decay=config.weight_decay, ends_lr=config.ends_lr)
        else:
            groups = [{"params": list(model.named_parameters()), "layer": "adapters"}]
        for group in groups:
            group["params"] = [(name, p) for name, p in group["params"] if p.requires_grad]
        return NoiseSGD(
            [group for group in groups if group["params"]],
            config.lr,
            weight_decay=config.weight_decay,
            rounding=config.rounding,
            seed=self.seed,
        )

    def build_step(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        max_grad_norm: float | None,
    ) -> TrainingStep:
        """Build the step of two forward passes."""
        assert isinstance(optimizer, NoiseSGD)
        return MeZOStep(
            model=model,
            loss=loss,
            optimizer=optimizer,
            device=device,
            autocast=autocast,
            max_grad_norm=max_grad_norm,
            epsilon=self.perturbation_scale,
            layers=find_layers(model),
        )

    def alternatives(self, num_blocks: int) -> Alternatives:
        """Frozen ends, which need no copy."""
        can_freeze = self.over == "full" and self.ends == "train"
        return Alternatives(cheaper_ends=({"ends": "frozen"},) if can_freeze else ())


class NoiseSGD(Optimizer):
    """Steps along the noise z of a step: θ ← θ - lr λ θ - lr g z. Gradients are not read.

    Args:
        params: parameters or param groups, which may have `lr` and `weight_decay` of their own.
        lr: learning rate.
        weight_decay: λ.
        rounding: how an update goes into bf16 weights, as in `lisatune.AdamW`. "exact" keeps a remainder of
            2 bytes for each; the others keep no state at all.
        seed: names the noise, together with the number of steps.
    """

    lasting_state: tuple[str, ...] = ("remainder",)
    """State that is part of the weights."""

    def __init__(
        self, params: Any, lr: float, *, weight_decay: float = 0.0, rounding: str = "exact", seed: int = 0
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "rounding": rounding, "seed": seed, "steps_done": 0},
        )
        self.projected_grad: Tensor | None = None
        """g of the step that is being made, a float32 scalar; None makes no step."""

    def keys(self) -> dict[nn.Parameter, int]:
        """Return the number that names the noise of each parameter in this step."""
        group = self.param_groups[0]
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {
            p: codecs.key_of(group["seed"], group["steps_done"], place) for place, p in enumerate(parameters)
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Go along the noise by `projected_grad`, and count the step."""
        keys = self.keys()
        for group in self.param_groups:
            for p in group["params"]:
                remainder = self._remainder(p, group["rounding"])
                if self.projected_grad is not None:
                    self._update(p, remainder, group, self.projected_grad, keys[p])
            group["steps_done"] += self.projected_grad is not None
        self.projected_grad = None

    def _remainder(self, p: nn.Parameter, rounding: str) -> Tensor | None:
        if p.dtype != torch.bfloat16 or rounding != "exact":
            return None
        if "remainder" not in self.state[p]:
            self.state[p]["remainder"] = torch.zeros(p.shape, dtype=torch.int16, device=p.device)
        kept: Tensor = self.state[p]["remainder"]
        return kept

    def _update(
        self,
        p: nn.Parameter,
        remainder: Tensor | None,
        group: dict[str, Any],
        projected_grad: Tensor,
        key: int,
    ) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        with flatten(p) as weight:
            for at, number, noise in make_noise(p, key):
                part = None if remainder is None else remainder.view(-1)[at]
                with codecs.in_float32(weight[at], part, group["rounding"], number) as exact:
                    exact.mul_(1 - lr * decay).add_(noise.mul_(-lr * projected_grad))


def make_noise(p: Tensor, key: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield z of a parameter in chunks: where in its elements, the chunk's own key, and z in float32."""
    generator = torch.Generator(p.device)
    for at in cut(p.numel(), CHUNK, like=p):
        number = codecs.key_of(key, at.start // CHUNK)
        generator.manual_seed(number >> 1)  # torch takes 63 bits
        yield at, number, torch.randn(at.stop - at.start, generator=generator, device=p.device)


def perturb(p: nn.Parameter, key: int, scale: float) -> Tensor:
    """Return θ + scale·z of a parameter, in a new tensor of its dtype."""
    perturbed = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    weight, out = p.detach().reshape(-1), perturbed.view(-1)
    for at, number, noise in make_noise(p, key):
        noise.mul_(scale).add_(weight[at])
        if p.dtype == torch.bfloat16:
            bits = codecs.random_bits(noise.numel(), codecs.key_of(number, ROUNDS), p.device)
            codecs.round_stochastically(noise, out[at], bits)
        else:
            out[at] = noise
    return perturbed


@dataclass(frozen=True, kw_only=True)
class MeZOStep(TrainingStep):
    """Two forward passes, and a step along the noise by their difference."""

    optimizer: NoiseSGD
    epsilon: float
    """ε, the perturbation scale."""

    layers: LayerMap

    @torch.no_grad()
    def backward(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Measure the projected gradient in evaluation mode, for the optimizer. No gradient is made.

        Args:
            batches: as in `TrainingStep.backward`.

        Returns:
            Mean loss per token of the two passes, a float32 scalar on the device.
        """
        num_labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        with evaluation_mode(self.model):
            above, below = (self._loss_at(sign * self.epsilon, batches) / num_labels for sign in (1, -1))
        self.optimizer.projected_grad = (above - below) / (2 * self.epsilon)
        return (above + below) / 2

    def _loss_at(self, scale: float, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """Sum the losses at θ + scale·z."""
        total = torch.zeros((), device=self.device)
        with perturbed_layers(self.model, self.layers, self.optimizer.keys(), scale):
            for batch in batches:
                # Without its cache, autocast holds the narrow copy of one weight at a time.
                with torch.autocast(
                    self.device.type,
                    dtype=self.autocast,
                    enabled=self.autocast is not None,
                    cache_enabled=False,
                ):
                    loss_sum, _ = self.loss({name: ids.to(self.device) for name, ids in batch.items()})
                total += loss_sum
        return total

    def clip(self) -> Tensor:
        """Clip |g| to `max_grad_norm`, and return |g| before that: an estimate of the gradient's norm."""
        projected_grad = self.optimizer.projected_grad
        assert projected_grad is not None
        if self.max_grad_norm is not None:
            self.optimizer.projected_grad = projected_grad.clamp(-self.max_grad_norm, self.max_grad_norm)
        return projected_grad.abs()

    def skip(self) -> None:
        """Forget the projected gradient."""
        self.optimizer.projected_grad = None
        super().skip()


@contextmanager
def perturbed_layers(
    model: nn.Module, layers: LayerMap, keys: Mapping[nn.Parameter, int], scale: float
) -> Iterator[None]:
    """Let a model compute at θ + scale·z inside: each block while it runs, all else throughout.

    Args:
        model: the model.
        layers: its blocks.
        keys: names the noise of each parameter that trains.
        scale: ±ε.
    """
    homes: dict[nn.Parameter, Tensor] = {}

    def enter(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            homes[p] = p.data
            p.data = perturb(p, keys[p], scale)

    def leave(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            p.data = homes.pop(p)

    blocks = [[p for p in block.values() if p in keys] for block in layers.block_parameters(model)]
    inside = {p for block in blocks for p in block}
    hooks = []
    for path, parameters in zip(layers.blocks, blocks, strict=True):
        block = model.get_submodule(path)
        hooks.append(block.register_forward_pre_hook(partial(_call, enter, parameters)))
        hooks.append(block.register_forward_hook(partial(_call, leave, parameters)))
    try:
        enter([p for p in keys if p not in inside])
        yield
    finally:
        leave(list(homes))  # a block's too, if it has raised
        for hook in hooks:
            hook.remove()


def _call(change: Any, parameters: Sequence[nn.Parameter], *_: Any) -> None:
    """Run as a hook of a block."""
    change(parameters)
