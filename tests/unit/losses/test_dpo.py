"""DPO's loss and gradients equal those of TRL's DPOTrainer on the same records."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

import tiny
import tiny_run
from lisatune.data.batches import collate
from lisatune.losses.dpo import DPOLoss
from lisatune.models.load import load_model
from pair_runs import TRL_OPTIONS, assert_gradients_are_theirs, make_pairs, tokenize_pairs
from tiny_text import CHATML, byte_tokenizer

BETA = 0.3
NO_LINE_BREAK = CHATML.replace(" + eos_token + '\n' }}", " + eos_token }}")
"""TRL counts what a template writes after the token that ends an answer as part of the answer."""


def shifted(model: nn.Module) -> nn.Module:
    """The model after some training, which its reference has not had."""
    moved = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return moved


def make_loss(
    reference: nn.Module, model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any
) -> tuple[DPOLoss, dict[str, Tensor]]:
    pairs = [{"prompt": r["prompt"], "completion": r["chosen"], "rejected": r["rejected"]} for r in rows]
    examples = tokenize_pairs(pairs, tokenizer, max_length=64)
    batch = collate([row | {"number": torch.tensor([number])} for number, row in enumerate(examples.rows)])
    loss = DPOLoss(model, beta=BETA)
    with torch.no_grad():
        loss.reference = DPOLoss(reference, beta=BETA).log_probs(batch)
    return loss, batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model: nn.Module = load_model(str(tiny_run.write_model(tmp_path_factory.mktemp("model"))))
    return model


# TRL asks for checkpointing under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_chat", [False, True])
def test_loss_and_gradients_equal_trls(model: nn.Module, tmp_path: Path, is_chat: bool) -> None:
    tokenizer = byte_tokenizer(NO_LINE_BREAK, extra=["<|im_start|>"])
    rows = make_pairs(is_chat=is_chat)
    theirs = shifted(model)
    trainer = DPOTrainer(
        theirs,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(str(tmp_path), beta=BETA, **TRL_OPTIONS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(theirs, batch)
    expected.backward()

    ours = shifted(model)
    loss, own_batch = make_loss(model, ours, rows, tokenizer)
    loss_sum, num_pairs = loss(own_batch)
    (loss_sum / num_pairs).backward()

    assert num_pairs == len(rows) == loss.count(own_batch)
    torch.testing.assert_close(loss_sum / num_pairs, expected, rtol=1e-6, atol=1e-6)
    assert_gradients_are_theirs(ours, theirs)
    figures = trainer._metrics["eval"]
    _, _, more = loss.evaluate(own_batch)
    assert float(more["accuracy"] / 4) == figures["rewards/accuracies"][-1]
    torch.testing.assert_close(
        float(more["margin"] / 4), figures["rewards/margins"][-1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_those_of_the_models_logits(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    ids = tiny.tokens(0, batch_size=4)
    labels = ids.masked_fill(torch.arange(8) < torch.tensor([[2], [5], [8], [0]]), -100)  # the third has none
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(8).expand(4, -1)}
    wanted_BT = (
        model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    )
    wanted = (wanted_BT * (labels[:, 1:] != -100)).sum(1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    loss = DPOLoss(model, beta=0.1)
    torch.testing.assert_close(loss.log_probs(batch), wanted, rtol=tolerance, atol=tolerance)
    model.lm_head.register_forward_hook(lambda module, args, out: out)  # no longer a plain product
    torch.testing.assert_close(loss.log_probs(batch), wanted, rtol=tolerance, atol=tolerance)


def test_before_training_every_margin_is_zero_and_the_loss_is_log_2(model: nn.Module) -> None:
    rows = make_pairs(is_chat=False)
    loss, batch = make_loss(model, model, rows, byte_tokenizer(None))
    loss_sum, num_pairs, more = loss.evaluate(batch)
    torch.testing.assert_close(loss_sum / num_pairs, torch.tensor(2.0).log())
    assert float(more["margin"]) == 0
