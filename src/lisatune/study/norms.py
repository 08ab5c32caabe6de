r"""How far LoRA and full fine-tuning move each layer: Fig. 2 of the LISA paper, and the p_l of section 3.2.

Both train with the recipe's data. After every update, or every few, the study takes for each matrix W, with
LoRA's factors A and B of scale s:

    LoRA    raw = √(‖A‖² + ‖B‖²)     ‖sBA‖     ‖W + sBA‖
    full    ‖W_t‖                    ‖W_t - W_0‖

and averages over the steps. Norms are Frobenius norms; that of a layer is the root of the sum of its
matrices' squares, as if they were one vector. The RMS is the norm over √(number of elements). BA is never
formed:

    ‖BA‖² = tr((BᵀB)(AAᵀ)),      ‖W + sBA‖² = ‖W‖² + 2s·Σ (BᵀW) ∘ A + ‖sBA‖².

From these follows how often a block should train (section 3.2, p = w̃/w) with the change of the weights in
place of the weights, because the norm of W itself says little about what was learned:

    p_l = ‖ΔW_LoRA,l‖ / ‖ΔW_full,l‖,     ΔW_LoRA = sBA,  ΔW_full = W_t - W_0.

The raw norm is what the paper's figure most likely shows. At the start PEFT gives linear layers A with
‖A‖ ≈ √(r/3) and B = 0, but an embedding A = 0 and B ~ N(0, 1), so ‖B‖ ≈ √(d·r): the embedding's raw norm is
about √(3d) times that of a matrix before any training. So the study reports the raw norms before the first
step too.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lisatune.methods.build import weight_dtype
from lisatune.methods.full import Full
from lisatune.methods.lora import Lora
from lisatune.models.load import meta_model
from lisatune.recipe import Recipe
from lisatune.study.layers import StudiedLayers, Unit, find_studied_layers, refuse_ranks
from lisatune.train.assemble import Parts, assemble

__all__ = ["QUANTITIES", "describe_skew", "measure_adapter", "study_norms"]

QUANTITIES = {
    "raw": "‖A‖, ‖B‖ of the adapter",
    "lora_change": "‖sBA‖",
    "lora_weight": "‖W + sBA‖",
    "full_weight": "‖W_t‖",
    "full_change": "‖W_t - W_0‖",
}
"""What is measured of each layer, and how it is written."""

Norms = dict[str, dict[str, float]]
"""Quantity, then layer."""

PrintLine = Callable[[str], None]


def study_norms(
    recipe: Recipe,
    *,
    rank: int = 128,
    lora_lr: float | None = None,
    every: int = 1,
    unit: Unit = "block",
    print_line: PrintLine = lambda line: None,
) -> dict[str, Any]:
    """Train LoRA and full fine-tuning, and measure each layer.

    Args:
        recipe: model, data, steps and optimizer. Of its method only the keys of `lora` matter, such as alpha.
        rank: of the adapters, on all linear layers, the embedding and the head.
        lora_lr: learning rate of LoRA. Default: `optimizer.lr`, that of full fine-tuning.
        every: optimizer steps between two measurements, >= 1.
        unit: what gets a probability: blocks, or modules of blocks.
        print_line: is called with a line of progress.

    Returns:
        What the JSON file holds: `norms` and `rms` by quantity and layer, averaged over the measured steps;
        `probabilities` of the blocks; `ends` relative to their mean; `initial_raw`; what it was made with.

    Raises:
        ValueError: as in `train`; or `every` or `rank` is below 1, `lora_lr` is not above 0, or there are
            several ranks.
        RuntimeError: a loss is not finite.
    """
    refuse_ranks(recipe)
    if every < 1:
        raise ValueError(f"--every must be >= 1, got {every}")
    if rank < 1:
        raise ValueError(f"--rank must be >= 1, got {rank}")
    if lora_lr is not None and not 0 < lora_lr < math.inf:
        raise ValueError(f"--lora-lr must be a positive number, got {lora_lr}")
    own = recipe.method if isinstance(recipe.method, Lora) else Lora()
    lora = replace(own, rank=rank, ends=True, targets=(), adapter=None)
    optimizer = replace(recipe.optimizer, ends_lr=None, in_backward=False)
    recipe = replace(
        recipe,
        method=Full(),
        optimizer=optimizer,
        run=replace(recipe.run, samples=0, check_memory=False, compile=False),
    )
    layers = find_studied_layers(meta_model(**recipe.model_source, dtype=weight_dtype(recipe)), unit)
    full = _train(recipe, layers, every, print_line)
    for layer, change in full.mean["full_change"].items():
        if change == 0:
            raise ValueError(
                f"full fine-tuning has not changed {layer} in any measured step, so its ratio is not "
                "defined; raise optimizer.lr or run.steps, or set run.precision: fp32"
            )
    lora_lr = optimizer.lr if lora_lr is None else lora_lr
    recipe_of_lora = replace(recipe, method=lora, optimizer=replace(optimizer, lr=lora_lr))
    adapters = _train(recipe_of_lora, layers, every, print_line)
    made_with = {"rank": rank, "lr": optimizer.lr, "lora_lr": lora_lr, "every": every}
    return _summarize(recipe, layers, adapters, full, made_with) | {"unit": unit}


@dataclass
class _Arm:
    """What one training gave: norms by quantity and layer."""

    initial: Norms
    """Before the first step."""

    mean: Norms
    """Averaged over the measured steps."""

    elements: dict[str, int]
    """Numbers in the matrices of each layer."""

    steps: int
    losses: list[float]
    seconds: float


def _train(recipe: Recipe, layers: StudiedLayers, every: int, print_line: PrintLine) -> _Arm:
    """Train a recipe, and measure after every `every`-th update."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # the study says what ties mean
        parts = assemble(recipe)
    model: Any = parts.built.model
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    modules = {path: model.get_submodule(path) for paths in layers.named.values() for path in paths}
    weights = {path: getattr(each, "base_layer", each).weight for path, each in modules.items()}
    is_full = isinstance(recipe.method, Full)
    before = {path: weight.detach().clone() for path, weight in weights.items()} if is_full else {}

    def measure() -> Norms:
        found: Norms = {}
        for layer, paths in layers.named.items():
            squares: dict[str, float] = {}
            for path in paths:
                each = (
                    _measure_weight(weights[path], before[path])
                    if is_full
                    else measure_adapter(modules[path])
                )
                for name, value in each.items():
                    squares[name] = squares.get(name, 0.0) + value
            for name, value in squares.items():
                found.setdefault(name, {})[layer] = math.sqrt(max(value, 0.0))
        return found

    initial, seen, losses = measure(), [], []
    for step in range(parts.data.steps):
        losses.append(_step(parts, step))
        if (step + 1) % every == 0 or step + 1 == parts.data.steps:
            seen.append(measure())
            print_line(f"{recipe.method.name}: step {step + 1}/{parts.data.steps}, loss {losses[-1]:.3f}")
    mean = {
        name: {layer: sum(each[name][layer] for each in seen) / len(seen) for layer in values}
        for name, values in initial.items()
    }
    elements = {layer: sum(weights[path].numel() for path in paths) for layer, paths in layers.named.items()}
    return _Arm(initial, mean, elements, len(seen), losses, time.perf_counter() - started)


def _step(parts: Parts, step: int) -> float:
    """Make an optimizer step and return its loss.

    Raises:
        RuntimeError: loss or gradients are not finite.
    """
    size, training = parts.recipe.run.accumulation, parts.built.step
    batches = [parts.collate(parts.data.batch(step * size + i)) for i in range(size)]
    loss = training.backward(batches)
    norm = training.clip()
    if not bool(torch.isfinite(loss + norm)):
        raise RuntimeError(f"the loss of step {step + 1} is {float(loss):g}; lower optimizer.lr")
    training.update()
    parts.advance_learning_rates()
    return float(loss)


def _measure_weight(weight: Tensor, before: Tensor) -> dict[str, float]:
    """Return the squared norms of a weight, and of how far it is from where it began."""
    with torch.no_grad():
        return {"full_weight": _square(weight), "full_change": _square(weight.float() - before.float())}


def measure_adapter(module: Any) -> dict[str, float]:
    """Return the squared norms of a layer of PEFT's LoRA: raw, ‖sBA‖² and ‖W + sBA‖².

    Args:
        module: a linear layer, a Conv1D of GPT-2, or an embedding, with one adapter named "default".
    """
    with torch.no_grad():
        weight, scale = module.base_layer.weight.float(), float(module.scaling["default"])
        if "default" in module.lora_embedding_A:  # its weight is [V, d], the transpose of a linear layer's
            a_rI, b_Or = (
                module.lora_embedding_A["default"].float(),
                module.lora_embedding_B["default"].float(),
            )
            weight = weight.T
        else:
            a_rI, b_Or = module.lora_A["default"].weight.float(), module.lora_B["default"].weight.float()
            weight = weight.T if getattr(module, "fan_in_fan_out", False) else weight
        change = scale**2 * float(((b_Or.T @ b_Or) * (a_rI @ a_rI.T)).sum(dtype=torch.float64))
        cross = float(((b_Or.T @ weight) * a_rI).sum(dtype=torch.float64))
        return {
            "raw": _square(a_rI) + _square(b_Or),
            "lora_change": change,
            "lora_weight": _square(weight) + 2 * scale * cross + change,
        }


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2


def _summarize(
    recipe: Recipe, layers: StudiedLayers, lora: _Arm, full: _Arm, made_with: dict[str, Any]
) -> dict[str, Any]:
    """Put both arms together, and compute the probabilities."""
    norms = lora.mean | full.mean
    ratios = {layer: norms["lora_change"][layer] / norms["full_change"][layer] for layer in layers.named}
    probabilities = [ratios[path] for path, _ in layers.described]
    mean = sum(probabilities) / len(probabilities)
    ends = {name: ratios[name] / mean for name in ("embedding", "head") if name in ratios}
    return {
        "study": "norms",
        "model": recipe.model.name,
        "data": recipe.data.train_name,
        "steps": len(full.losses),
        "measured_steps": full.steps,
        **made_with,
        "is_tied": layers.is_tied,
        "layers": layers.described,
        "probabilities": probabilities,
        "ends": ends,
        "norms": norms,
        "rms": {
            name: {layer: value / math.sqrt(full.elements[layer]) for layer, value in values.items()}
            for name, values in norms.items()
        },
        "initial_raw": lora.initial["raw"],
        "losses": {"lora": lora.losses, "full": full.losses},
        "seconds": {"lora": round(lora.seconds, 1), "full": round(full.seconds, 1)},
    }


def describe_skew(study: Mapping[str, Any]) -> list[str]:
    """Say in sentences how skewed norms are towards the ends, and how much of it is PEFT's initialisation.

    Args:
        study: what `study_norms` returned.
    """
    blocks = [path for path, _ in study["layers"]]

    def skew(values: Mapping[str, float], end: str) -> float:
        return values[end] / (sum(values[path] for path in blocks) / len(blocks))

    raw, change = study["norms"]["raw"], study["norms"]["lora_change"]
    lines = []
    for end in study["ends"]:
        now, first = skew(raw, end), skew(study["initial_raw"], end)
        lines.append(
            f"{end}: the raw norm of its adapter is {now:.3g} times the mean of the blocks', and was "
            f"{first:.3g} times before the first step; its change ‖sBA‖ is {skew(change, end):.3g} times the "
            f"blocks', and under full fine-tuning {skew(study['norms']['full_change'], end):.3g} times."
        )
    lines.append(
        "PEFT begins an embedding's adapter with B ~ N(0, 1) and a matrix's with B = 0, so raw norms are "
        "skewed before anything is learned; only the changes say what training did."
    )
    if study["is_tied"]:
        lines.append(
            "Embedding and head are one matrix in this model. LoRA adapts it twice, apart; full fine-tuning "
            "changes it once, so both ends show the same change of it, and each one's ratio is to that."
        )
    return lines
