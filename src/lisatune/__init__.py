"""LISA, Layerwise Importance Sampled AdamW (Pan et al., arXiv 2403.17919), for PyTorch models."""

from lisatune.adamw import AdamW as AdamW
from lisatune.block_lr import scale_block_lr as scale_block_lr
from lisatune.chunked_loss import use_chunked_loss as use_chunked_loss
from lisatune.ends import EndsPolicy as EndsPolicy
from lisatune.layers import LayerMap as LayerMap
from lisatune.layers import find_layers as find_layers
from lisatune.lisa import LISA as LISA
from lisatune.optim import build_adamw as build_adamw
from lisatune.optim import param_groups as param_groups
from lisatune.proof import ProofError as ProofError
from lisatune.samplers import Independent as Independent
from lisatune.samplers import Sampler as Sampler

__version__ = "0.1.0"
