"""LISA, Layerwise Importance Sampled AdamW (Pan et al., arXiv 2403.17919), for PyTorch models.

Each name is imported when it is first used, because all of them need torch, which takes a second to import:
`lisatune --help` takes 0.1 s instead of 1.3 s.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lisatune.files.masters import DiskMasters as DiskMasters
    from lisatune.lisa.correction import Correction as Correction
    from lisatune.lisa.ends import EndsPolicy as EndsPolicy
    from lisatune.lisa.groups import build_adamw as build_adamw
    from lisatune.lisa.groups import param_groups as param_groups
    from lisatune.lisa.lisa import LISA as LISA
    from lisatune.lisa.proof import ProofError as ProofError
    from lisatune.lisa.rates import scale_block_lr as scale_block_lr
    from lisatune.lisa.samplers import Independent as Independent
    from lisatune.lisa.samplers import Sampler as Sampler
    from lisatune.losses.in_forward import use_chunked_loss as use_chunked_loss
    from lisatune.nn.blocks import compile_blocks as compile_blocks
    from lisatune.nn.layers import LayerMap as LayerMap
    from lisatune.nn.layers import find_layers as find_layers
    from lisatune.optim.adamw import AdamW as AdamW

__version__ = "0.2.0"

__all__ = [
    "LISA",
    "AdamW",
    "Correction",
    "DiskMasters",
    "EndsPolicy",
    "Independent",
    "LayerMap",
    "ProofError",
    "Sampler",
    "build_adamw",
    "compile_blocks",
    "find_layers",
    "param_groups",
    "scale_block_lr",
    "use_chunked_loss",
]

_PACKAGES = ("distributed", "lisa", "losses", "nn", "optim")
"""The packages that hold the names above."""


if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        """Import a public name, or one of the packages, on first use."""
        if name in _PACKAGES:
            return import_module(f"lisatune.{name}")
        if name == "DiskMasters":
            return import_module("lisatune.files.masters").DiskMasters
        if name in __all__:
            packages = [import_module(f"lisatune.{package}") for package in _PACKAGES]
            return next(vars(package)[name] for package in packages if name in vars(package))
        raise AttributeError(f"module 'lisatune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_PACKAGES]
