"""Where a model's layers are, and how they compute."""

from lisatune.nn.attention import use_cpu_attention as use_cpu_attention
from lisatune.nn.blocks import BlockForward as BlockForward
from lisatune.nn.blocks import compile_blocks as compile_blocks
from lisatune.nn.layers import LayerMap as LayerMap
from lisatune.nn.layers import find_layers as find_layers
