"""8-bit moments that were saved in parts are cut again: exactly where blocks stay whole, else anew."""

import pytest
import torch

from lisatune.distributed.shards import Part
from lisatune.files.states import _count_blocks, _cut_blocks
from lisatune.optim import codecs

pytest.importorskip("bitsandbytes")
SIZE = 2000


def save(bounds: tuple[int, ...], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each part on its own, and join codes and scales."""
    joined: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for index, size in enumerate(_count_blocks(Part(bounds, 0, None))):
        part = values[bounds[index] : bounds[index + 1]]
        pair = torch.empty(len(part), dtype=torch.uint8), torch.empty(size)
        codecs.quantize(part, *pair, signed=True)
        for all_parts, one in zip(joined, pair, strict=True):
            all_parts.append(one)
    return torch.cat(joined[0]), torch.cat(joined[1])


CUTS = [(0, SIZE), (0, 1000, SIZE), (0, 512, 1024, SIZE, SIZE)]


@pytest.mark.parametrize("now", CUTS)
@pytest.mark.parametrize("saved", CUTS)
def test_saved_blocks_are_cut_as_the_ranks_are_now(saved: tuple[int, ...], now: tuple[int, ...]) -> None:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    codes, scales = save(saved, values)
    got = []
    for index in range(len(now) - 1):
        here = codes[now[index] : now[index + 1]]
        got.append(_cut_blocks(here, scales, list(saved[:-1]), Part(now, index, None), signed=True))
    if saved == now or 1000 not in (*saved, *now):  # the other bounds are multiples of 256
        assert torch.equal(torch.cat([each for each, _ in got]), codes)
        assert torch.equal(torch.cat([each for _, each in got]), scales)
    restored = torch.cat([codecs.dequantize(*each, signed=True) for each in got])
    # Twice half the widest gap of two codes, 1.4 % of the largest number, and twice bf16's half spacing.
    torch.testing.assert_close(restored, values, atol=0.02 * float(values.abs().max()), rtol=0)
