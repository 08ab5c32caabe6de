"""Measure how good a model is: loss on held-out data, and sample answers."""

from lisatune.evaluate.held_out import generate_answers as generate_answers
from lisatune.evaluate.held_out import held_out_loss as held_out_loss
