"""What a run leaves on disk."""

from lisatune.runs.checkpoint import load_checkpoint as load_checkpoint
from lisatune.runs.checkpoint import save_checkpoint as save_checkpoint
from lisatune.runs.folder import RunFolder as RunFolder
