"""LISA attached by its hooks alone trains the same weights in a plain loop, Accelerate, Trainer and TRL.

Every host gets the same batches and the same arithmetic, so parameters are compared bit by bit:
- Trainer and SFTTrainer divide the summed token loss by the number of loss tokens of the whole accumulation
  window (`num_items_in_batch`). The plain loop and Accelerate pass the same number to the same function.
- Accelerate's `backward` divides by the accumulation steps. There are 2, so multiplying by 2 first is exact.
- SFTTrainer has a loss of its own, from TRL's fused head. Its twin is a plain loop over that function.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import tiny
from lisatune import LISA, Correction, ProofError, build_adamw, find_layers

STEPS, ACCUMULATION, BATCH, LENGTH = 12, 2, 2, 16
LR, LR_WARMUP = 1e-2, 2  # the first step has a learning rate of 0, as in most schedules
PERIOD = 5

Batch = dict[str, Tensor]
Loss = Callable[[LlamaForCausalLM, Batch, Tensor], Tensor]


@dataclass
class Run:
    """A finished training, and what was seen of it from outside."""

    model: nn.Module
    lisa: LISA
    draws: list[tuple[int, ...]]
    """Active blocks at each optimizer step."""
    rates: list[float] = field(default_factory=list)
    """Learning rates as Trainer logged them."""


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Random tokens; a third of the labels carry no loss, so micro-batches differ in their token counts."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tiny.VOCABULARY, (STEPS * ACCUMULATION * BATCH, LENGTH), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 1 / 3, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    """SFTTrainer counts tokens by the attention mask."""
    batch = default_data_collator(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def make_loader(data: Dataset) -> DataLoader:
    return DataLoader(data, batch_size=BATCH, collate_fn=collate)


def windows(data: Dataset) -> Iterator[tuple[list[Batch], Tensor]]:
    """The micro-batches of each optimizer step, and how many tokens carry loss in them."""
    batches = list(make_loader(data))
    for first in range(0, len(batches), ACCUMULATION):
        window = batches[first : first + ACCUMULATION]
        yield window, sum((batch["labels"][:, 1:] != -100).sum() for batch in window)


def model_loss(model: LlamaForCausalLM, batch: Batch, num_tokens: Tensor) -> Tensor:
    return model(**batch, num_items_in_batch=num_tokens).loss


def bf16_loss(model: LlamaForCausalLM, batch: Batch, num_tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model_loss(model, batch, num_tokens)


def fused_loss(model: LlamaForCausalLM, batch: Batch, num_tokens: Tensor) -> Tensor:
    """What `SFTTrainer.compute_loss` does."""
    return (-model(**batch, fused_lm_head=True).log_probs).sum() / num_tokens


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Run:
    draws: list[tuple[int, ...]] = []
    lisa = LISA(model, optimizer, active=2, period=PERIOD, seed=3, **options)
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.register_step_pre_hook(lambda *_: draws.append(lisa.active_blocks))
    return Run(model, lisa, draws)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """The AdamW that Trainer makes by default."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler("linear", optimizer, LR_WARMUP, STEPS)


def plain_loop(data: Dataset, loss: Loss = model_loss, **lisa_options: Any) -> Run:
    model = tiny.llama()
    if loss is fused_loss:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    optimizer = make_optimizer(model)
    scheduler = make_schedule(optimizer)
    run = attach(model, optimizer, **lisa_options)
    for window, num_tokens in windows(data):
        for batch in window:
            loss(model, batch, num_tokens).backward()
        trained = run.lisa.trainable_parameters() if lisa_options else model.parameters()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return run


def accelerate_loop(
    data: Dataset,
    *,
    prepare_first: bool = True,
    seed: int = 0,
    save_at: tuple[int, Path] | None = None,
    resume: tuple[int, Path] | None = None,
) -> Run:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    model = tiny.llama(seed=seed)
    optimizer = make_optimizer(model)
    if not prepare_first:
        run = attach(model, optimizer)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, make_loader(data), make_schedule(optimizer)
    )
    if prepare_first:
        run = attach(model, optimizer)
    num_tokens = [tokens for _, tokens in windows(data) for _ in range(ACCUMULATION)]
    if resume is not None:
        accelerator.load_state(str(resume[1]))
        loader = skip_first_batches(loader, resume[0] * ACCUMULATION)
        num_tokens = num_tokens[resume[0] * ACCUMULATION :]
    for batch, tokens in zip(loader, num_tokens, strict=True):
        with accelerator.accumulate(model):
            accelerator.backward(ACCUMULATION * model_loss(model, batch, tokens))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if save_at is not None and accelerator.sync_gradients and run.lisa.steps_done == save_at[0]:
            accelerator.save_state(str(save_at[1]))
    return run


def make_arguments(kind: type[TrainingArguments], folder: Path, **options: Any) -> TrainingArguments:
    return kind(
        str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="linear",
        warmup_steps=LR_WARMUP,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "bf16": False, **options},
    )


def make_trainer(data: Dataset, folder: Path, *, seed: int = 0, **options: Any) -> Trainer:
    arguments = make_arguments(TrainingArguments, folder, **options)
    return Trainer(tiny.llama(seed=seed), arguments, train_dataset=data, data_collator=collate)


def train(trainer: Trainer, *, resume: Path | None = None, **lisa_options: Any) -> Run:
    """The whole integration: LISA on the optimizer that Trainer makes or was given."""
    run = attach(trainer.model, trainer.create_optimizer(), **lisa_options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    run.lisa.check()
    run.rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    return run


def assert_same(run: Run, other: Run) -> None:
    """Bit-equal parameters, and the same account of the draws."""
    theirs = other.model.state_dict()
    differing = [name for name, mine in run.model.state_dict().items() if not torch.equal(mine, theirs[name])]
    assert differing == []
    assert run.lisa.visits == other.lisa.visits == [1] * 6
    assert run.lisa.steps_done == other.lisa.steps_done == STEPS


@pytest.fixture(scope="module")
def reference(data: Dataset) -> Run:
    return plain_loop(data)


def test_plain_loop_crosses_periods_and_moves_every_layer(reference: Run) -> None:
    assert len(set(reference.draws)) == 3
    before = tiny.llama().state_dict()
    unmoved = [name for name, now in reference.model.state_dict().items() if torch.equal(now, before[name])]
    assert unmoved == []
    assert reference.lisa.periods_proven == 2


@pytest.mark.parametrize("prepare_first", [True, False])
def test_accelerate_equals_plain_loop(data: Dataset, reference: Run, prepare_first: bool) -> None:
    run = accelerate_loop(data, prepare_first=prepare_first)
    assert run.draws == reference.draws
    assert_same(run, reference)


@pytest.mark.parametrize("step", [7, PERIOD], ids=["inside a period", "on a boundary"])
def test_accelerate_resumes_bit_equal(data: Dataset, reference: Run, tmp_path: Path, step: int) -> None:
    accelerate_loop(data, save_at=(step, tmp_path))
    resumed = accelerate_loop(data, seed=1, resume=(step, tmp_path))
    assert resumed.draws == reference.draws[step:]
    assert_same(resumed, reference)


def test_trainer_equals_plain_loop(data: Dataset, reference: Run, tmp_path: Path) -> None:
    run = train(make_trainer(data, tmp_path))
    assert run.draws == reference.draws
    assert_same(run, reference)


def test_trainer_with_a_given_optimizer_equals_plain_loop(
    data: Dataset, reference: Run, tmp_path: Path
) -> None:
    model = tiny.llama()
    optimizer = make_optimizer(model)
    run = attach(model, optimizer)
    arguments = make_arguments(TrainingArguments, tmp_path)
    Trainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer, None),
    ).train()
    assert run.draws == reference.draws
    assert_same(run, reference)


@pytest.fixture(scope="module")
def checkpoints(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer run that saved after every step."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train(make_trainer(data, folder, save_strategy="steps", save_steps=1))
    return folder


@pytest.mark.parametrize("step", [7, PERIOD], ids=["inside a period", "on a boundary"])
def test_trainer_resumes_bit_equal(
    data: Dataset, reference: Run, checkpoints: Path, tmp_path: Path, step: int
) -> None:
    resumed = train(make_trainer(data, tmp_path, seed=1), resume=checkpoints / f"checkpoint-{step}")
    assert resumed.draws == reference.draws[step:]
    assert_same(resumed, reference)


def test_trainer_checkpoint_holds_state_of_ends_and_active_blocks_only(checkpoints: Path) -> None:
    saved = torch.load(checkpoints / "checkpoint-7" / "optimizer.pt", weights_only=True)
    model = tiny.llama()
    layers = find_layers(model)
    blocks = layers.block_parameters(model)
    assert saved["lisa"]["steps_done"] == 7
    active = [blocks[i] for i in saved["lisa"]["active_blocks"]]
    assert len(saved["state"]) == len(layers.ends) + sum(map(len, active))


def test_trainer_saves_corrected_blocks_merged_and_resumes_from_that_bit_equal(
    data: Dataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"correction": Correction(lr=1e-2)}
    folder, step = tmp_path / "whole", f"checkpoint-{STEPS - 3}"
    whole = make_trainer(data, folder, save_strategy="steps", save_steps=STEPS - 3)
    run = train(whole, **options)
    resumed = make_trainer(data, tmp_path / "resumed", seed=1)
    assert_same(train(resumed, resume=folder / step, **options), run)

    ids_BT = tiny.tokens(0)
    whole.save_model(str(folder / "model"))
    saved = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    with torch.no_grad():
        want = whole.model.eval()(input_ids=ids_BT).logits
        base = tiny.llama()
        base.load_state_dict({name: p.detach() for name, p in whole.model.named_parameters()}, strict=False)
        assert float((base.eval()(input_ids=ids_BT).logits - want).abs().max()) > 1e-3
        torch.testing.assert_close(saved(input_ids=ids_BT).logits, want, rtol=0, atol=1e-5)


def test_a_callback_of_trainer_clips_the_adapters_of_a_correction_too(data: Dataset, tmp_path: Path) -> None:
    """The callback is that of docs/methods/correction.md."""
    norms: list[float] = []

    class Clip(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(run.lisa.trainable_parameters(), 1.0)))

    options: dict[str, Any] = {"correction": Correction(lr=1e-2)}
    trainer = make_trainer(data, tmp_path, max_grad_norm=0)
    run = attach(trainer.model, trainer.create_optimizer(), **options)
    trainer.add_callback(Clip())
    trainer.train()
    assert max(norms) > 1, "it has clipped"
    assert_same(run, plain_loop(data, **options))


def test_the_best_model_of_trainer_has_no_adapter_added_twice(data: Dataset, tmp_path: Path) -> None:
    every = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    best_is_first = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    arguments = make_arguments(TrainingArguments, tmp_path, **every, **best_is_first)
    trainer = Trainer(tiny.llama(), arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    run = attach(trainer.model, trainer.create_optimizer(), correction=Correction(lr=1e-2))
    trainer.train()
    run.lisa.check()
    assert trainer.state.best_global_step < STEPS
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint, attn_implementation="eager")
    ids_BT = tiny.tokens(0)
    with torch.no_grad():
        want, got = (each.eval()(input_ids=ids_BT).logits for each in (best, trainer.model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_activation_checkpointing_equals_plain_loop(
    data: Dataset, reference: Run, tmp_path: Path, use_reentrant: bool
) -> None:
    trainer = make_trainer(
        data,
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    run = train(trainer)
    assert trainer.model.is_activation_checkpointing
    assert_same(run, reference)


def test_trainer_in_bf16_autocast_equals_plain_loop(data: Dataset, reference: Run, tmp_path: Path) -> None:
    run = train(make_trainer(data, tmp_path, bf16=True))
    assert_same(run, plain_loop(data, bf16_loss))
    assert not torch.equal(run.model.lm_head.weight, reference.model.lm_head.weight)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def make_sft_trainer(
    data: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path, *, seed: int = 0, **options: Any
) -> SFTTrainer:
    return SFTTrainer(
        tiny.llama(seed=seed),
        make_arguments(SFTConfig, folder, **options),
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer,
    )


# SFTConfig sets checkpointing by default, under the name that transformers is giving up.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer_equals_plain_loop_over_its_loss_and_resumes_bit_equal(
    data: Dataset, tokenizer: PreTrainedTokenizerFast, reference: Run, tmp_path: Path
) -> None:
    twin = plain_loop(data, fused_loss)
    run = train(make_sft_trainer(data, tokenizer, tmp_path, save_strategy="steps", save_steps=7))
    assert run.draws == twin.draws == reference.draws
    assert_same(run, twin)
    trainer = make_sft_trainer(data, tokenizer, tmp_path / "resumed", seed=1)
    resumed = train(trainer, resume=tmp_path / "checkpoint-7")
    assert resumed.draws == twin.draws[7:]
    assert_same(resumed, twin)


# TRL's loss, like Liger's, reads the head's weight and does not call the head.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("ends", ["frozen", "every:2"])
def test_sft_trainer_with_codes_in_the_head_trains_what_a_loop_that_calls_the_head_does(
    data: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, ends: str
) -> None:
    coded: dict[str, Any] = {"frozen_weights": "int8", "ends": ends}
    run = train(make_sft_trainer(data, tokenizer, tmp_path), **coded)
    twin = plain_loop(data, **coded)
    theirs = twin.model.state_dict()
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-3, rtol=0)  # a step moves by up to 1e-2


def test_trainers_schedule_does_not_notice_lisa(data: Dataset, tmp_path: Path) -> None:
    bare = make_trainer(data, tmp_path)
    bare.train()
    expected = [line["learning_rate"] for line in bare.state.log_history if "learning_rate" in line]
    assert len(set(expected)) > 10
    assert train(make_trainer(data, tmp_path)).rates == expected

    ramped = make_trainer(data, tmp_path)
    ramped.optimizer = build_adamw(ramped.model, find_layers(ramped.model), lr=LR)
    assert train(ramped, warmup=2).rates == expected


def test_freezing_before_trainer_builds_its_optimizer_is_an_error(data: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path)
    for block in trainer.model.model.layers[2:]:
        block.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing in block 2 requires grad.*before anything"):
        LISA(trainer.model, trainer.create_optimizer(), active=2)


def test_check_reports_a_trainer_that_made_itself_another_optimizer(data: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path)
    lisa = LISA(trainer.model, make_optimizer(trainer.model), active=2)  # and not given to the Trainer
    says = r"another optimizer \(AdamW\) makes the steps: {} since .*trainer\.create_optimizer"
    with pytest.warns(UserWarning, match=says.format(2)) as caught:
        trainer.train()
    assert len(caught) == 1
    with pytest.raises(ProofError, match=says.format(STEPS)):
        lisa.check()


def test_check_reports_a_trainer_that_made_itself_another_model(data: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=lambda: tiny.llama(),
        args=make_arguments(TrainingArguments, tmp_path),
        train_dataset=data,
        data_collator=collate,
    )
    lisa = LISA(trainer.model, trainer.create_optimizer(), active=2)
    trainer.train()  # starts from model_init and a new optimizer
    with pytest.raises(ProofError, match="has made no step"):
        lisa.check()


def test_resume_from_a_checkpoint_saved_without_lisa_is_an_error(data: Dataset, tmp_path: Path) -> None:
    make_trainer(data, tmp_path, save_strategy="steps", save_steps=7).train()
    with pytest.raises(ValueError, match="saved without LISA"):
        train(make_trainer(data, tmp_path), resume=tmp_path / "checkpoint-7")
