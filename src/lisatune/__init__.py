"""LISA, Layerwise Importance Sampled AdamW (Pan et al., arXiv 2403.17919), for PyTorch models."""

from lisatune.lisa.ends import EndsPolicy as EndsPolicy
from lisatune.lisa.groups import build_adamw as build_adamw
from lisatune.lisa.groups import param_groups as param_groups
from lisatune.lisa.groups import scale_block_lr as scale_block_lr
from lisatune.lisa.lisa import LISA as LISA
from lisatune.lisa.proof import ProofError as ProofError
from lisatune.lisa.samplers import Independent as Independent
from lisatune.lisa.samplers import Sampler as Sampler
from lisatune.losses.in_forward import use_chunked_loss as use_chunked_loss
from lisatune.nn.layers import LayerMap as LayerMap
from lisatune.nn.layers import find_layers as find_layers
from lisatune.optim.adamw import AdamW as AdamW

__version__ = "0.1.0"
