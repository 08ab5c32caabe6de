"""LISA attached in `configure_optimizers` trains the same weights in PyTorch Lightning as in a plain loop.

Lightning makes every step with a closure that holds forward and backward, so hooks of the step run before it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

import tiny
from lisatune import LISA

STEPS, ACCUMULATION, PERIOD = 12, 2, 5

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "corrected": {"correction": "lora"},
    "coded": {"frozen_weights": "int8"},
}
options = pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")


class Tuning(lightning.LightningModule):
    def __init__(self, chosen: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.chosen = tiny.llama(), chosen

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.model.parameters(), lr=1e-2)
        self.lisa = LISA(self.model, optimizer, period=PERIOD, **self.chosen)
        scheduler = LinearLR(optimizer, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Batches:
    """A loader that continues where it was saved; Lightning begins the epoch of another one anew."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return STEPS * ACCUMULATION

    def __iter__(self) -> Iterator[Tensor]:
        first, self.next = self.next, 0
        for number in range(first, len(self)):
            self.next = number + 1
            yield tiny.tokens(number)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class StopAt(Callback):
    """Saves a checkpoint after `step` optimizer steps, and stops."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.should_stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class AnewTuning(Tuning):
    """May be fitted again and again."""

    def configure_optimizers(self) -> Any:
        if hasattr(self, "lisa"):
            self.lisa.detach()
        return super().configure_optimizers()


def make_trainer(folder: Path, *callbacks: Callback) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATION,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def fit(chosen: dict[str, Any], folder: Path, *callbacks: Callback, **how: Any) -> Tuning:
    tuning = Tuning(chosen)
    make_trainer(folder, *callbacks).fit(tuning, Batches(), **how)
    tuning.lisa.check()
    return tuning


def plain_loop(chosen: dict[str, Any]) -> tuple[nn.Module, LISA]:
    model = tiny.llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    lisa = LISA(model, optimizer, period=PERIOD, **chosen)
    scheduler = LinearLR(optimizer, total_iters=STEPS)
    for number, batch in enumerate(Batches(), start=1):
        (model(input_ids=batch, labels=batch).loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, lisa


@options
def test_lightning_trains_the_weights_of_a_plain_loop(chosen: dict[str, Any], tmp_path: Path) -> None:
    tuning = fit(chosen, tmp_path)
    model, lisa = plain_loop(chosen)
    assert (tuning.lisa.steps_done, tuning.lisa.periods_proven) == (STEPS, STEPS // PERIOD)
    assert tuning.lisa.visits == lisa.visits
    torch.testing.assert_close(tuning.model.state_dict(), model.state_dict(), rtol=0, atol=0)


@options
@pytest.mark.parametrize("step", [4, 5])
def test_lightning_continues_as_if_it_had_not_stopped(
    chosen: dict[str, Any], step: int, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    assert fit(chosen, tmp_path, StopAt(step, path)).lisa.steps_done == step
    continued = fit(chosen, tmp_path, ckpt_path=path, weights_only=True)
    assert continued.lisa.steps_done == STEPS
    model, lisa = plain_loop(chosen)
    assert continued.lisa.visits == lisa.visits
    torch.testing.assert_close(continued.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_rate_finder_leaves_nothing_behind_if_its_lisa_is_detached(tmp_path: Path) -> None:
    chosen = {"correction": "lora", "frozen_weights": "int8"}
    tuning, trainer = AnewTuning(chosen), make_trainer(tmp_path)
    Tuner(trainer).lr_find(tuning, Batches(), num_training=4, update_attr=False)
    trainer.fit(tuning, Batches())
    model, lisa = plain_loop(chosen)
    assert (tuning.lisa.steps_done, tuning.lisa.visits) == (STEPS, lisa.visits)
    torch.testing.assert_close(tuning.model.state_dict(), model.state_dict(), rtol=0, atol=0)
