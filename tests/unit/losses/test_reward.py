"""The loss of reward models: loss, gradients and figures equal those of TRL's RewardTrainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from trl import RewardConfig, RewardTrainer

import tiny
import tiny_run
from lisatune.data.batches import collate
from lisatune.data.prepare import prepare_data
from lisatune.losses.reward import RewardLoss
from lisatune.models.load import load_model
from lisatune.train.recipe_file import load_recipe
from pair_runs import TRL_OPTIONS, assert_gradients_are_theirs, make_pairs
from tiny_text import CHATML, byte_tokenizer

KINDS = ("text", "chat", "no prompt")


def make_rows(kind: str) -> list[dict[str, Any]]:
    rows = make_pairs(is_chat=kind == "chat")
    if kind == "no prompt":
        return [{"chosen": row["prompt"] + row["chosen"], "rejected": row["rejected"]} for row in rows]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> nn.Module:
    found: nn.Module = load_model(str(folder), score_seed=3)
    return found


def read_batch(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> dict[str, Tensor]:
    """Make the batch of a run from all rows, in their order."""
    file = tmp_path / "pairs.jsonl"
    Dataset.from_list(rows).to_json(file)
    recipe = tiny_run.write_recipe(tmp_path, folder, file, "method: {name: full}\nloss: {name: reward}\n")
    tokenizer = byte_tokenizer(CHATML, extra=["<|im_start|>"])
    data = prepare_data(load_recipe(recipe, ["data.validation_share=0", "run.samples=0"]), tokenizer)
    return collate(data._take(data.train, range(len(rows))))


# TRL asks for checkpointing under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "center"), [*((kind, 0.0) for kind in KINDS), ("text", 0.3)])
def test_loss_and_gradients_equal_trls(
    folder: Path, model: nn.Module, tmp_path: Path, kind: str, center: float
) -> None:
    rows, theirs = make_rows(kind), copy.deepcopy(model)
    trainer = RewardTrainer(
        theirs,
        args=RewardConfig(str(tmp_path), center_rewards_coefficient=center or None, **TRL_OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(CHATML, extra=["<|im_start|>"]),
    )
    expected = trainer.compute_loss(theirs, next(iter(trainer.get_train_dataloader())))
    expected.backward()

    loss, batch = RewardLoss(model, center=center), read_batch(folder, rows, tmp_path)
    loss_sum, num_pairs = loss(batch)
    (loss_sum / num_pairs).backward()

    assert num_pairs == len(rows) == loss.count(batch)
    torch.testing.assert_close(loss_sum / num_pairs, expected, rtol=1e-6, atol=1e-6)
    assert_gradients_are_theirs(model, theirs)
    figures = trainer._metrics["train" if theirs.training else "eval"]
    _, _, more = loss.evaluate(batch)
    assert float(more["accuracy"] / 4) == figures["accuracy"][-1]
    torch.testing.assert_close(float(more["margin"] / 4), figures["margin"][-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewards_are_the_models_own_whatever_is_padded(
    folder: Path, model: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    batch = read_batch(folder, make_rows("chat"), tmp_path)
    rewards = RewardLoss(model).rewards(batch)
    for reward, ids, last in zip(rewards, batch["input_ids"], batch["last"], strict=True):
        own = model(input_ids=ids[None, : last + 1]).logits[0, 0]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(reward, own.float(), rtol=tolerance, atol=tolerance)


def test_a_pair_without_labels_does_not_count(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    loss, rows = RewardLoss(model, center=0.3), make_rows("text")
    batch = read_batch(folder, rows, tmp_path)
    (wanted, _), without = loss({name: each[:6] for name, each in batch.items()}), batch["labels"].clone()
    without[6:] = -100
    found, num_pairs = loss(batch | {"labels": without})
    assert num_pairs == loss.count(batch | {"labels": without}) == 3
    torch.testing.assert_close(found, wanted)


def test_only_the_last_token_of_a_row_is_scored(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    batch, shapes = read_batch(folder, make_rows("text"), tmp_path), []
    loss = RewardLoss(model)
    score: Any = model.score
    score.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    loss(batch)
    assert shapes == [(8, 1)]


def test_a_model_without_a_score_of_the_last_token_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score"):
        RewardLoss(tiny.llama())
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification: its score is not a linear layer of"):
        RewardLoss(BertForSequenceClassification(config))
