"""HF Trainer trains the same weights with the chunked loss as without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import tiny
from lisatune import use_chunked_loss


def rows() -> Dataset:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tiny.VOCABULARY, (16, 12), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 1 / 3, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def fit(folder: Path, *, chunked: bool, bf16: bool) -> tuple[LlamaForCausalLM, list[dict[str, Any]], float]:
    model = tiny.llama()
    if chunked:
        use_chunked_loss(model)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,  # micro-batches of different token counts: num_items_in_batch
        learning_rate=1e-3,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
        optim="sgd",
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(), data_collator=default_data_collator
    )
    trainer.train()
    return model, trainer.state.log_history, trainer.evaluate()["eval_loss"]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 1e-4)], ids=["fp32", "bf16"])
def test_trainer_gets_the_same_losses_weights_and_evaluation(
    tmp_path: Path, bf16: bool, tolerance: float
) -> None:
    plain, plain_log, plain_eval = fit(tmp_path, chunked=False, bf16=bf16)
    ours, our_log, our_eval = fit(tmp_path, chunked=True, bf16=bf16)
    assert len(our_log) == 6  # four steps, the whole training, the evaluation
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (our_log, plain_log)]
    torch.testing.assert_close(*losses, rtol=2e-4, atol=0)  # Trainer logs four digits
    assert our_eval == pytest.approx(plain_eval, rel=max(tolerance, 1e-5))
    moved = tiny.moved(tiny.weights(tiny.llama()), ours)
    assert moved == set(dict(ours.named_parameters()))
    torch.testing.assert_close(tiny.weights(ours), tiny.weights(plain), rtol=0, atol=tolerance)
