"""AdamW in little memory."""

from lisatune.optim.adamw import AdamW as AdamW
from lisatune.optim.galore import GaLoreAdamW as GaLoreAdamW
