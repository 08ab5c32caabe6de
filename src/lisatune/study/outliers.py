r"""How many outliers the weights of each block have under the model's own activations: OwLore's score.

OwLore (arXiv 2405.18380, code pixeli99/OwLore) draws blocks in proportion to their share of outliers. With X
the inputs of a linear layer W over calibration rows, one column per input feature j:

    A_ij = |W_ij| · ‖X_j‖₂
    D(W) = share of the entries with A_ij > M · mean(A),     M = 13
    p_l  = mean of D over the linear layers of block l.

The published code has the numbers of one model in a file; they are measured here, in one pass over 128 rows.
A block without an outlier would never train, so p is at least a tenth of the mean.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.data.batches import collate
from lisatune.data.prepare import prepare_data
from lisatune.distributed.ranks import pick_device
from lisatune.methods.build import weight_dtype
from lisatune.models.load import load_model, load_tokenizer
from lisatune.recipe import Recipe
from lisatune.study.layers import Unit, find_studied_layers, refuse_ranks

__all__ = ["measure_outliers", "outlier_share", "study_outliers"]

LEAST = 0.1
"""Least p of a block, as a share of the mean."""


def outlier_share(weight_OI: Tensor, norm_I: Tensor, threshold: float) -> float:
    """Return D(W), 0 to 1.

    Args:
        weight_OI: [out, in].
        norm_I: ‖X_j‖₂ of each input feature.
        threshold: M.
    """
    score_OI = weight_OI.float().abs() * norm_I.float()
    return float((score_OI > threshold * score_OI.mean()).double().mean())


def measure_outliers(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Tensor], threshold: float
) -> dict[str, float]:
    """Return D(W) of linear layers by path; one that no token reaches, such as an idle expert's, is missing.

    Args:
        model: in evaluation mode.
        paths: linear layers; GPT-2's, with a transposed weight, too.
        batches: input_ids, int64 [B, T], without padding.
        threshold: M.
    """
    squares: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].detach().float().flatten(0, -2).square().sum(dim=0).double()
            squares[path] = squares[path] + found if path in squares else found

        return add

    hooks = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    try:
        with torch.no_grad():
            for ids_BT in batches:
                model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    shares = {}
    for path in paths:
        module: Any = model.get_submodule(path)
        weight = module.weight.detach()
        if path in squares:
            weight_OI = weight if isinstance(module, nn.Linear) else weight.T
            shares[path] = outlier_share(weight_OI, squares[path].sqrt(), threshold)
    return shares


def study_outliers(
    recipe: Recipe, *, rows: int = 128, threshold: float = 13.0, unit: Unit = "block"
) -> dict[str, Any]:
    """Measure the share of outliers of each block.

    Args:
        recipe: model and data; its first training rows are read.
        rows: number of calibration rows, >= 1.
        threshold: M, > 0.
        unit: what gets a probability: blocks, or modules of blocks.

    Returns:
        What the JSON file holds: `probabilities` of the blocks, `shares` of outliers by layer.

    Raises:
        ValueError: as in `train`; a value is out of range; or no weight has an outlier.
    """
    refuse_ranks(recipe)
    if rows < 1 or not threshold > 0:
        raise ValueError(f"--rows must be >= 1 and --threshold > 0, got {rows} and {threshold}")
    tokenizer = load_tokenizer(**recipe.model.tokenizer)
    examples = prepare_data(recipe, tokenizer).train.rows[:rows]
    model = load_model(**recipe.model_source, dtype=weight_dtype(recipe))
    layers = find_studied_layers(model, unit)
    device = pick_device(recipe.run.device)
    model.to(device).eval()
    batches = (collate([row], length=len(row["input_ids"]))["input_ids"].to(device) for row in examples)
    shares = measure_outliers(model, [path for block in layers.blocks for path in block], batches, threshold)
    found = [[shares[path] for path in block if path in shares] for block in layers.blocks]
    scores = [sum(each) / len(each) if each else 0.0 for each in found]
    mean = sum(scores) / len(scores)
    if mean == 0:
        raise ValueError(
            f"no weight of {recipe.model.name} is {threshold:g} times the mean of its layer, so there is "
            "nothing to draw by; lower --threshold"
        )
    return {
        "study": "outliers",
        "model": recipe.model.name,
        "data": recipe.data.train_name,
        "rows": len(examples),
        "threshold": threshold,
        "unit": unit,
        "layers": layers.described,
        "probabilities": [max(score, LEAST * mean) for score in scores],
        "shares": shares,
    }
