"""The losses that training minimises."""

from lisatune.losses.base import Loss as Loss
from lisatune.losses.causal_lm import CausalLMLoss as CausalLMLoss
from lisatune.losses.dpo import DPOLoss as DPOLoss
from lisatune.losses.in_forward import use_chunked_loss as use_chunked_loss
from lisatune.losses.reward import RewardLoss as RewardLoss
