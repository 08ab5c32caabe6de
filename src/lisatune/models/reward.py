"""Reward models: a causal language model's decoder, with a score in place of its head.

They are transformers' models for sequence classification with one label. The score reads the hidden state of
the last token that is not the padding token, so the config names that of the tokenizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lisatune.models.hf import import_transformers
from lisatune.nn.layers import find_score

__all__ = ["choose_kind", "draw_score", "drawing_from", "drawn_weights", "find_classifier", "set_padding"]

SUFFIX = "ForSequenceClassification"


def choose_kind(name: str, config: Any, *, scores: bool) -> None:
    """Let a config ask for one score; or refuse a reward model where a causal language model is needed.

    Raises:
        ValueError: the model is a reward model, or another classifier, and `scores` is False.
    """
    if scores:
        config.num_labels = 1
        return
    kind = find_classifier(config)
    if kind is not None:
        raise ValueError(
            f"model {name} is a {kind}: it gives scores and writes no text; give a language model here, or "
            "train it with loss.name: reward"
        )


def find_classifier(config: Any) -> str | None:
    """Return the class of a reward model or another classifier that a config is of; None for any other."""
    return next((each for each in config.architectures or () if each.endswith(SUFFIX)), None)


@contextmanager
def drawing_from(seed: int | None) -> Iterator[None]:
    """Draw weights that the files lack from a seed, and leave the generator as it was; None: do nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def draw_score(model: Any, seed: int) -> torch.Tensor:
    """Draw a score's weight on the CPU as `load_model` does, for a model that may be on the meta device."""
    score = model.get_submodule(find_score(model))
    drawn = torch.nn.Linear(score.in_features, score.out_features, bias=False, device="meta")
    drawn = drawn.to(score.weight.dtype).to_empty(device="cpu")
    with drawing_from(seed):
        model._init_weights(drawn)
    return drawn.weight.detach()


def drawn_weights(model: Any) -> tuple[set[str], set[str]]:
    """Name the weights of the score, and those of the head that a causal language model of its kind has.

    The score is drawn where the files lack it, and the head is left out.
    """
    score = find_score(model)
    causal = import_transformers().AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    head = getattr(causal, "_tied_weights_keys", None) or ()
    return {f"{score}.weight"}, set(head)


def set_padding(name: str, model: Any, tokenizer: Any) -> None:
    """Let a model find the end of a padded row: its config names the tokenizer's padding token.

    Raises:
        ValueError: the model has no embedding for that token, so that the written config could not be used.
    """
    rows, pad = len(model.get_input_embeddings().weight), tokenizer.pad_token_id
    if pad >= rows:
        raise ValueError(
            f"the tokenizer of {name} pads with token {pad}, and the model has {rows} (from 0); a reward "
            "model finds the end of a row by that token, so set pad_token in tokenizer_config.json to one "
            "that the model has"
        )
    model.config.get_text_config().pad_token_id = pad
