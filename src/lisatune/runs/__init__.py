"""The files that a run leaves on disk: its folder and its checkpoints."""

from lisatune.runs.checkpoint import load_checkpoint as load_checkpoint
from lisatune.runs.checkpoint import save_checkpoint as save_checkpoint
from lisatune.runs.folder import RunFolder as RunFolder
