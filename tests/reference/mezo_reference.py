"""MeZO as slow and obvious as can be: the twin that `method.name: mezo` is compared with.

Algorithm 1 of the paper with every z of a step in memory and a copy of all weights, which MeZO is there to
avoid.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.optim.codecs import key_of


def train_reference(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    decays: Mapping[nn.Parameter, float],
    distance: float,
    lr: float,
    seed: int,
) -> list[float]:
    """Make a step of each batch.

    Args:
        model: float32 weights of fewer than a million numbers each.
        batches: one per step.
        decays: the weight decay of each parameter, in the optimizer's order.
        distance, lr, seed: of MeZO.

    Returns:
        The slopes.
    """
    loss, slopes = CausalLMLoss(model), []
    for step, batch in enumerate(batches):
        keys = [key_of(key_of(seed, step, place), 0) >> 1 for place in range(len(decays))]
        noise = [
            torch.randn(p.numel(), generator=torch.Generator().manual_seed(key)).view(p.shape)
            for p, key in zip(decays, keys, strict=True)
        ]
        homes = [p.detach().clone() for p in decays]
        losses = []
        for way in (1, -1):
            with torch.no_grad():
                for p, home, z in zip(decays, homes, noise, strict=True):
                    p.copy_(home + way * distance * z)
                loss_sum, num_labels = loss(batch)
            losses.append(loss_sum / num_labels)
        slope = (losses[0] - losses[1]) / (2 * distance)
        with torch.no_grad():
            for p, home, z in zip(decays, homes, noise, strict=True):
                p.copy_(home * (1 - lr * decays[p]) - z * (lr * slope))
        slopes.append(float(slope))
    return slopes
