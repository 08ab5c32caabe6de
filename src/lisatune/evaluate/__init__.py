"""Measure how good a model is: loss on held-out data, sample answers, and benchmark tasks."""

from lisatune.evaluate.benchmark import evaluate_tasks as evaluate_tasks
from lisatune.evaluate.held_out import generate_answers as generate_answers
from lisatune.evaluate.held_out import held_out_loss as held_out_loss
from lisatune.evaluate.tasks import PRESETS as PRESETS
