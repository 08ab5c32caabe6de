"""The ways to fine-tune a model. To add one: its file, its class in `METHODS`, its page in docs/methods."""

from lisatune.methods.autofreeze import AutoFreeze
from lisatune.methods.badam import BAdam
from lisatune.methods.base import Method
from lisatune.methods.bottleneck import Bottleneck
from lisatune.methods.dora import Dora
from lisatune.methods.ends import EndsOnly
from lisatune.methods.freezeout import FreezeOut
from lisatune.methods.full import Full
from lisatune.methods.galore import GaLore
from lisatune.methods.greedy import Greedy
from lisatune.methods.ia3 import Ia3
from lisatune.methods.lisa import Lisa
from lisatune.methods.lora import Lora
from lisatune.methods.mezo import MeZO
from lisatune.methods.optimizers import OPTIMIZERS
from lisatune.methods.prefix import Prefix
from lisatune.methods.prompt import Prompt
from lisatune.methods.qlora import QLora
from lisatune.methods.smartfrz import SmartFRZ
from lisatune.methods.step import TrainingStep

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AutoFreeze",
    "BAdam",
    "Bottleneck",
    "Dora",
    "EndsOnly",
    "FreezeOut",
    "Full",
    "GaLore",
    "Greedy",
    "Ia3",
    "Lisa",
    "Lora",
    "MeZO",
    "Method",
    "Prefix",
    "Prompt",
    "QLora",
    "SmartFRZ",
    "TrainingStep",
]

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        *(Full, Lisa, EndsOnly, BAdam, FreezeOut, AutoFreeze, SmartFRZ, Greedy),
        *(Lora, Dora, QLora, Ia3, Bottleneck, Prompt, Prefix, GaLore, MeZO),
    )
}
"""Every method by its name, in the order of the help."""
