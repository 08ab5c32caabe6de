"""LISA, the algorithm: which layers train when, and the proof that they did."""

from lisatune.lisa.correction import Correction as Correction
from lisatune.lisa.ends import EndsPolicy as EndsPolicy
from lisatune.lisa.groups import build_adamw as build_adamw
from lisatune.lisa.groups import param_groups as param_groups
from lisatune.lisa.lisa import LISA as LISA
from lisatune.lisa.proof import ProofError as ProofError
from lisatune.lisa.rates import scale_block_lr as scale_block_lr
from lisatune.lisa.samplers import Cyclic as Cyclic
from lisatune.lisa.samplers import Independent as Independent
from lisatune.lisa.samplers import Permutation as Permutation
from lisatune.lisa.samplers import Sampler as Sampler
from lisatune.lisa.samplers import Uniform as Uniform
from lisatune.lisa.samplers import Weighted as Weighted
from lisatune.lisa.samplers import Window as Window
from lisatune.lisa.schedule import BlockSchedule as BlockSchedule
from lisatune.lisa.statistics import BlockStatistics as BlockStatistics
