"""QLoRA: 4-bit weights are bitsandbytes' own, counted as they are stored, and what can't work is refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
import tiny_run
from lisatune import memory
from lisatune.cli.app import main
from lisatune.memory.plan import plan_memory
from lisatune.methods import QLora
from lisatune.models.load import load_model
from lisatune.nn.nf4 import Linear4, check_nf4
from lisatune.optim import meter
from lisatune.train.assemble import assemble
from lisatune.train.recipe_file import load_recipe


def write_recipe(folder: Path) -> Path:
    model = tiny_run.write_model(folder / "tiny")
    rows = tiny_run.write_rows(folder / "rows.jsonl")
    return tiny_run.write_recipe(folder, model, rows, "method: {name: qlora, rank: 2}\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_and_its_input_gradient_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    plain = nn.Linear(128, 40, dtype=dtype)
    codes, state = quantize_4bit(plain.weight.data, blocksize=64, quant_type="nf4")
    weight = dequantize_4bit(codes, state)
    x = torch.randn(3, 128, dtype=dtype, requires_grad=True)
    out = Linear4(plain)(x)
    torch.testing.assert_close(out, linear(x, weight, plain.bias))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(out) @ weight)
    assert float((weight - plain.weight).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("columns", [64, 96, 100, 160, 192])
def test_every_width_of_a_weight_is_read_as_it_was_stored(columns: int) -> None:
    check_nf4(torch.device("cpu"))
    torch.manual_seed(0)
    plain = nn.Linear(columns, 40, bias=False)
    nn.init.normal_(plain.weight)
    stored = Linear4(plain)(torch.eye(columns)).T
    error = float(((stored - plain.weight).norm() / plain.weight.norm()).detach())
    assert error < 0.12, "0.25 where a kernel reads wrong scales"


def test_linear_layers_of_blocks_alone_are_stored_in_4_bits() -> None:
    model = QLora(rank=2).prepare(tiny.llama(blocks=2))
    stored = [path for path, module in model.named_modules() if isinstance(module, Linear4)]
    assert len(stored) == 2 * 7
    bytes_of = {
        path: meter.tensors_bytes([model.get_submodule(path).weight, model.get_submodule(path).absmax])
        for path in stored
    }
    numbers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert sum(bytes_of.values()) == numbers // 2 + numbers // 64 * 4


@pytest.mark.filterwarnings("ignore:.*keys of method qlora:UserWarning")
def test_plan_counts_4_bits_and_what_was_measured_agrees(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = load_recipe(path, ["run.batch_size=1"])
    parts = assemble(recipe)
    batch = parts.collate([max(parts.data.train.rows, key=lambda row: len(row["input_ids"]))])
    length = batch["input_ids"].shape[1]
    with memory.measure(parts.built.model, parts.built.step.optimizer) as measured:
        for _ in range(2):
            parts.built.step.backward([batch])
            parts.built.step.clip()
            parts.built.step.update()
            real = measured.end_step()
    planned = plan_memory(recipe, length=length)
    assert planned.kind == "traced"
    for category in ("weights", "gradients", "optimizer state"):
        assert planned.at_peak[category] == real.at_peak[category]
    assert (
        0.8 * planned.peak_bytes < real.peak_bytes <= planned.peak_bytes
    )  # the plan has loss on every token
    lora = plan_memory(
        load_recipe(path, ["run.batch_size=1", "method.name=lora", "method.rank=2"]), length=length
    )
    blocks = tiny_run.BLOCKS * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    saved = blocks * 4 - (blocks // 2 + blocks // 64 * 4)
    assert lora.static_bytes - planned.static_bytes == saved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by a name of old
def test_adapters_load_with_plain_peft_on_the_plain_model(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["train", str(write_recipe(tmp_path)), "optimizer.lr=1e-2"]) == 0
    folder = str(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    ids_BT = torch.arange(24).view(2, 12)
    with torch.no_grad():
        without = base(input_ids=ids_BT).logits
        plain = PeftModel.from_pretrained(base, folder).eval()(input_ids=ids_BT).logits
        ours = load_model(folder)(input_ids=ids_BT).logits
    rounding = float((plain - ours).abs().max())
    assert 0 < rounding < float((plain - without).abs().max())


def test_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no torch.nn.Linear in its blocks to store"):
        QLora().prepare(model)


def test_device_on_which_bitsandbytes_fails_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Linear4, input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel\nlong text")

    monkeypatch.setattr(Linear4, "forward", fail)
    with pytest.raises(
        ValueError, match=r"4-bit weights do not work on cpu .*\(no kernel\); use method lora"
    ):
        check_nf4(torch.device("cpu"))


def test_missing_bitsandbytes_is_said_by_check_and_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = str(write_recipe(tmp_path))
    for command in ("check", "train"):
        assert main([command, recipe]) == 2
        seen = capsys.readouterr()
        assert "4-bit weights need bitsandbytes: pip install" in seen.out + seen.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.compile=true", "run.compile cannot work with method qlora yet"),
        ("method.adapter_dtype=weights", "method.adapter_dtype weights cannot work with method qlora"),
        ("method.rank=0", "method.rank must be >= 1, got 0"),
        ("method.name=qlorra", "Did you mean 'qlora'?"),
    ],
)
def test_bad_input_is_one_sentence(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(tmp_path)), override]) == 2
    assert message in capsys.readouterr().err
