"""What the integration tests share: a tokenizer, and a clean Accelerate for every test."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def words() -> tuple[str, ...]:
    """What texts for the tokenizer are made of."""
    return ("a", "block", "drawn", "ends", "every", "frozen", "in", "is", "layer", "loss", "moves", "no")


@pytest.fixture(scope="session")
def tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """One token per word; the padding and end tokens are those of `tiny_llama`."""
    ids = {word: i for i, word in enumerate(("<pad>", "<end>", "<unknown>", *words))}
    model = Tokenizer(WordLevel(ids, unk_token="<unknown>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps precision and accumulation in process-wide singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
