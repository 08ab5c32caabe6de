"""DoRA and IA3: what PEFT is asked to add to a model, and what is refused."""

from pathlib import Path

import pytest
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
