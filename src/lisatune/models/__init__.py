"""Open and save models and tokenizers."""

from lisatune.models.load import load_model as load_model
from lisatune.models.load import load_tokenizer as load_tokenizer
from lisatune.models.load import save_model as save_model
from lisatune.models.shapes import SHAPES as SHAPES
