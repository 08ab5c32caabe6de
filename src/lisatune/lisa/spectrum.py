r"""How much signal the weights of a block have above their noise, the score of Spectrum.

Source: cognitivecomputations/spectrum, spectrum.py. For a matrix W with singular values S, S₀ the largest:

    σ = IQR(S) / 1.349                               a robust standard deviation
    θ = σ (1 + √β),   β = min(m, n) / max(m, n)      singular values below are noise
    SNR(W) = (Σ S[S > θ] / Σ S[S ≤ θ]) / S₀

This is what the published code computes. It is not the Marchenko–Pastur edge that it names: σ is the spread
of the singular values, not of the entries, and θ lacks the factor √max(m, n).

Matrices of one kind (q of all blocks, …) are compared with each other alone: a matrix counts SNR(W) over the
largest of its kind, and a block the mean over its matrices. So scores are in (0, 1].
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import full_tensor, has_values

__all__ = ["measure_spectra", "signal_to_noise"]


def signal_to_noise(weight: Tensor) -> float:
    """Return SNR(W) of a matrix, or its mean over the matrices of a stack [..., m, n].

    Where no singular value is below θ the smallest counts as noise. A matrix of zeros has 0.
    """
    stack = weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)
    stack = stack.reshape(-1, *weight.shape[-2:])
    ratios = []
    for matrix in stack:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        # Eigenvalues of W Wᵀ in float64: several times faster than svdvals, and exact enough for sums.
        values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
        upper, lower = torch.quantile(values, 0.75), torch.quantile(values, 0.25)
        edge = (upper - lower) / 1.349 * (1 + (wide.shape[0] / wide.shape[1]) ** 0.5)
        is_signal = values > edge
        noise = values[~is_signal].sum() if not bool(is_signal.all()) else values.min()
        signal = values[is_signal].sum()
        ratios.append(float(signal / noise / values.max()) if float(noise) > 0 else 0.0)
    return sum(ratios) / len(ratios)


def measure_spectra(
    blocks: Sequence[Mapping[str, nn.Parameter]],
    exact: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
) -> list[float]:
    """Return the score of each block, equal on all ranks; NaN if its weights have no values.

    Args:
        blocks: the parameters of each block or unit, by name. Names that differ in numbers alone are of a
            kind.
        exact: returns the numbers of a parameter that may be frozen.
    """
    kinds: dict[tuple[str, torch.Size], list[float]] = {}
    of_block: list[list[tuple[tuple[str, torch.Size], float]]] = []
    for block in blocks:
        found = []
        for name, parameter in block.items():
            if parameter.ndim < 2:
                continue
            weight = full_tensor(exact(parameter))
            ratio = signal_to_noise(weight) if has_values(weight) else float("nan")
            kind = (re.sub(r"\d+", "*", name), parameter.shape)
            kinds.setdefault(kind, []).append(ratio)
            found.append((kind, ratio))
        of_block.append(found)
    largest = {kind: max(ratios) or 1.0 for kind, ratios in kinds.items()}
    least = 1e-3  # a block of zeros may train too
    scores = [
        max(sum(ratio / largest[kind] for kind, ratio in found) / len(found), least) if found else least
        for found in of_block
    ]
    sent: list[float] = json.loads(ranks.broadcast_text(json.dumps(scores)))
    return sent
