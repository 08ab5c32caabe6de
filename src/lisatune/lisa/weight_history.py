"""A few weights of each block, followed through training: `weight_history` of a sampler.

`SAMPLES` positions are drawn once in each block, by its number of parameters alone, so that they are the same
all along, after a resume and on every rank. Their values are recorded when a block begins to train and after
each of its periods. The last R records are kept, R the sampler's `records`; what a block leaves when it
freezes is released.

Memory: 4 R S bytes for each active block, S = `SAMPLES`, on the block's device.

Shapes: N blocks, R records, S samples.
"""

import math
import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.distributed.shards import has_values, local_part, part_of

__all__ = ["SAMPLES", "WeightHistory"]

SAMPLES = 256
"""S, weights that are followed in each block."""


class WeightHistory:
    """Records sampled weights of the active blocks.

    Args:
        blocks: the parameters of each block.
        records: R >= 1.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Parameter]], records: int) -> None:
        self._blocks, self._records = blocks, records
        self._kept: dict[int, Tensor] = {}

    def make_room(self, active: Iterable[int]) -> None:
        """Keep records of these blocks and no others; a block that is new begins with its weights of now."""
        known, self._kept = self._kept, {}
        for block in active:
            self._kept[block] = known[block] if block in known else self._begin(block)

    def record(self, active: Iterable[int]) -> None:
        """Record the weights that these blocks have now."""
        for block in active:
            kept = self._kept[block]
            kept.copy_(torch.cat([kept[1:], self._sample(block)[None]]))

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept: float32 [R, S] for each active block."""
        return list(self._kept.values())

    def stack(self) -> Tensor:
        """Return the records of all blocks, oldest first: float32 [N, R, S] on the CPU, NaN for none."""
        shape = (len(self._blocks), self._records, SAMPLES)
        with unset_fake_temporarily():
            stacked = torch.full(shape, math.nan)
            for block, kept in self._kept.items():
                if has_values(kept):
                    stacked[block] = kept.cpu()
        return stacked

    def state_dict(self) -> dict[str, Tensor]:
        """Return the records of each block by its number."""
        return {str(block): kept.cpu().clone() for block, kept in self._kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self._kept = {
            int(block): kept.clone().to(local_part(self._blocks[int(block)][0]).device)
            for block, kept in state.items()
        }

    def _begin(self, block: int) -> Tensor:
        now = self._sample(block)
        kept = now.new_full((self._records, SAMPLES), math.nan)
        kept[-1] = now
        return kept

    def _sample(self, block: int) -> Tensor:
        """Return the sampled weights of a block: float32 [S], on all ranks those of the whole block."""
        parameters = self._blocks[block]
        total, before = sum(p.numel() for p in parameters), 0
        rng = random.Random(total)
        places = sorted(rng.randrange(total) for _ in range(SAMPLES))
        values = []
        for p in parameters:
            inside = [place - before for place in places if before <= place < before + p.numel()]
            before += p.numel()
            part, here = part_of(p), local_part(p).flatten()
            known = [i for i, place in enumerate(inside) if 0 <= place - part.start < here.numel()]
            found = torch.zeros(len(inside), device=here.device)
            found[known] = here[[inside[i] - part.start for i in known]].float()
            values.append(part.sum(found))
        return torch.cat(values)
