"""Which share of SmolLM2-135M's bf16 weights MeZO's published loop does not bring back in a step.

    python benchmarks/mezo_drift.py

The loop adds εz to the weights, subtracts 2εz and adds εz again; z is normal noise and ε = 1e-3.
"""

import torch

from lisatune.models import load_model

DISTANCE = 1e-3


@torch.no_grad()
def main() -> None:
    """Print the share."""
    model = load_model("smollm2-135m", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    changed = number = 0
    for p in model.parameters():
        before, z = p.clone(), torch.randn(p.shape, generator=generator).to(p.dtype)
        for way in (1, -2, 1):
            p += way * DISTANCE * z
        changed, number = changed + int((p != before).sum()), number + p.numel()
    print(f"{changed / number:.1%} of {number:,} weights are not as before")


if __name__ == "__main__":
    main()
