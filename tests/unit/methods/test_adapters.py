"""DoRA and IA3: what PEFT is asked to add to a model, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

import tiny
import tiny_run
from lisatune.cli.app import main
from lisatune.methods import Dora, Ia3, Lora, Method


def trained(method: Method) -> dict[str, int]:
    """Numbers that train, by module name and kind: `q_proj.lora_A`."""
    found: dict[str, int] = {}
    for name, p in method.prepare(tiny.llama(blocks=1)).named_parameters():
        if p.requires_grad:
            parts = name.replace(".default", "").removesuffix(".weight").split(".")
            found[".".join(parts[-2:])] = p.numel()
    return found


def test_dora_adds_one_magnitude_per_output_to_lora() -> None:
    lora, dora = trained(Lora(rank=4)), trained(Dora(rank=4))
    magnitudes = {name.split(".")[0]: size for name, size in (dora.items() - lora.items())}
    outputs = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    assert magnitudes == outputs | {"gate_proj": 48, "up_proj": 48, "down_proj": 32}
    assert lora.items() <= dora.items()


def test_adapters_compute_as_under_autocast_and_keep_no_copy_of_their_inputs() -> None:
    """In bf16, with the loss, gradients and dtypes of PEFT as HF Trainer and TRL run it."""

    def run(*, compute_dtype: Any, autocast: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = Lora(rank=4, compute_dtype=compute_dtype).prepare(tiny.llama(seed=1).bfloat16())
        kept: dict[int, int] = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(id(t), t.nbytes) and t, lambda t: t
            ),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            loss = model(input_ids=tiny.tokens(0), labels=tiny.tokens(0)).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}, sum(kept.values())

    want, _ = run(compute_dtype="fp32", autocast=True)
    got, kept = run(compute_dtype="weights", autocast=False)
    assert {grad.dtype for name, grad in got.items() if name != "loss"} == {torch.float32}
    assert sum(float(grad.abs().sum()) for grad in got.values()) > 0
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert kept < run(compute_dtype="fp32", autocast=False)[1]


def test_ia3_scales_keys_values_and_the_input_of_the_last_feed_forward_layer() -> None:
    chosen = {"k_proj.ia3_l": 16, "v_proj.ia3_l": 16, "down_proj.ia3_l": 48}
    assert trained(Ia3()) == chosen
    named = Ia3(targets=("q_proj", "up_proj"), feedforward=("up_proj",))
    assert trained(named) == {"q_proj.ia3_l": 32, "up_proj.ia3_l": 32}
    assert trained(Ia3(targets=("up_proj",))) == {"up_proj.ia3_l": 48}


def test_ia3_asks_for_layers_where_peft_has_no_choice() -> None:
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match=r"no choice of layers for ia3 in unheard-of.*method\.targets.*fc2"):
        Ia3().prepare(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=dora", "method.rank=0"], "method.rank must be >= 1, got 0"),
        (["method.name=dora", "method.targets=[q_poj]"], "method.targets names 'q_poj', but the blocks'"),
        (
            ["method.name=dora", "method.compute_dtype=weights"],
            "the norms of its weights need float32; use fp32",
        ),
        (
            ["method.name=lora", "method.compute_dtype=bf16"],
            "compute_dtype must be weights or fp32, got 'bf16'",
        ),
        (["method.name=ia3", "method.rank=4"], "unknown key 'method.rank' of method ia3"),
        (["method.name=ia3", "method.targets=[k_poj]"], "method.targets names 'k_poj', but the blocks'"),
        (["method.name=ia3", "method.feedforward=[down_proj]"], "method.feedforward needs method.targets"),
        (
            ["method.name=ia3", "method.targets=[k_proj]", "method.feedforward=[up_proj]"],
            "method.feedforward names 'up_proj', which is not in method.targets; add it",
        ),
        (["method.name=dorra"], "Did you mean 'dora'?"),
    ],
)
def test_bad_input_is_one_sentence(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_run.write_model(tmp_path / "tiny")
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, model, rows, "method: {}\n")
    assert main(["train", str(recipe), *overrides]) == 2
    assert message in capsys.readouterr().err


def save_adapter(method: Method, folder: Path) -> dict[str, torch.Tensor]:
    """Save a method's adapters with values of their own, and return these by name."""
    model: Any = method.prepare(tiny.llama(blocks=2))
    for number, p in enumerate(model.parameters()):
        if p.requires_grad:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(folder, save_embedding_layers=False)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


CONTINUED = {"lora": Lora, "dora": Dora, "ia3": Ia3}


@pytest.mark.parametrize("name", CONTINUED)
def test_an_adapter_is_continued_from_its_folder(name: str, tmp_path: Path) -> None:
    saved = save_adapter(CONTINUED[name](), tmp_path)
    model = CONTINUED[name](adapter=str(tmp_path)).prepare(tiny.llama(blocks=2))
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    with torch.device("meta"):  # the rehearsal, which compares names and shapes
        CONTINUED[name](adapter=str(tmp_path)).prepare(tiny.llama(blocks=2))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Lora(rank=8), "has r=16, and the recipe makes r=8; set method.rank to what it was trained with"),
        (Lora(alpha=16), "has lora_alpha=32, and the recipe makes lora_alpha=16; set method.alpha"),
        (Dora(), "has use_dora=None, and the recipe makes use_dora=True; set method.name"),
        (Ia3(), "has peft_type=LORA, and the recipe makes peft_type=IA3; set method.name"),
        (Lora(targets=("q_proj",)), "does not fit: the recipe makes no .*lora_A.weight; give the model"),
        (Lora(ends=True), r"does not fit: it has no .*lm_head.lora_A.weight"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value.name,
)
def test_an_adapter_that_the_recipe_would_not_make_is_refused(
    method: Any, message: str, tmp_path: Path
) -> None:
    save_adapter(Lora(), tmp_path)
    with pytest.raises(ValueError, match=message):
        replace(method, adapter=str(tmp_path)).prepare(tiny.llama(blocks=2))


def test_an_adapter_of_another_model_is_refused_by_shape_and_named_by_name(tmp_path: Path) -> None:
    save_adapter(Lora(), tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match=r"its .* is \[16, 48\], and the model takes"):
        Lora(adapter=str(tmp_path)).prepare(tiny.llama(blocks=2, hidden=64))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "some/other"})
    )
    with pytest.warns(UserWarning, match="was trained on some/other, and model.name is"):
        Lora(adapter=str(tmp_path)).prepare(tiny.llama(blocks=2))


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    lora = Lora(adapter=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"method.adapter {tmp_path} has no adapter_config.json"):
        lora.prepare(tiny.llama(blocks=1))
    save_adapter(Lora(), tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("[1]")
        with pytest.raises(ValueError, match=f"method.adapter: {tmp_path / name} is damaged"):
            lora.prepare(tiny.llama(blocks=2))


def test_methods_without_adapters_of_their_own_refuse_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    recipe = tiny_run.write_recipe(tmp_path, tmp_path, rows, "method: {name: full, adapter: x}\n")
    assert main(["train", str(recipe)]) == 2
    assert "unknown key 'method.adapter' of method full" in capsys.readouterr().err
