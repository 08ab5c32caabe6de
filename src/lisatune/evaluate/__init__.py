"""How good a model is."""

from lisatune.evaluate.held_out import generate_answers as generate_answers
from lisatune.evaluate.held_out import held_out_loss as held_out_loss
