"""LoRA of a difference: the best of its rank, which PEFT loads, with a table that says what it keeps."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import tiny
from lisatune.export.lora import extract_lora, factor
from lisatune.export.source import Source
from lisatune.models.load import load_model, save_model
from tiny_text import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS_BT = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")


def write(model: Any, folder: Path) -> Path:
    save_model(model, byte_tokenizer(None), folder)
    return folder


def pair(folder: Path, *, tied: bool, rank: int | None = None, norms: bool = False) -> tuple[Path, Path]:
    """Write a base, and a tuned model whose weights differ from it, by matrices of a rank if one is given."""
    base = tiny.llama(tied=tied, blocks=2)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.ndim == 2 and "layers.1.mlp" not in name:
                sides = (p.shape[0], rank or p.shape[1]), (rank or p.shape[1], p.shape[1])
                b, a = (torch.randn(side, generator=generator) for side in sides)
                p += 0.05 * b @ a / (rank or p.shape[1]) ** 0.5
            elif norms:
                p += 0.01
    return write(base, folder / "base"), write(tuned, folder / "tuned")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return found


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_factors_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in (1, 3, 6):
        b, a, values = factor(delta, rank)
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close((b @ a).double(), best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, s.square())
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_a_rank_above_that_of_the_matrix_gives_zeros_and_no_nan() -> None:
    delta = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 7.0))
    b, a, _ = factor(delta, 4)
    torch.testing.assert_close(b @ a, delta)
    assert float(b[:, 1:].abs().max()) == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_adapters_of_the_rank_of_the_change_as_the_tuned_model(tied: bool, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tied=tied, rank=3)
    table = extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 3, device=CPU)
    row = next(row for row in table.rows if row.rank == 3)
    assert row.share == pytest.approx(1.0, abs=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "lora")
    want = logits(load_model(str(tuned)))
    torch.testing.assert_close(logits(loaded), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "lora"))), want, atol=2e-5, rtol=1e-4)
    assert table.is_tied == tied
    if not tied:  # PEFT merges adapters of a tied embedding twice, and warns
        torch.testing.assert_close(logits(loaded.merge_and_unload()), want, atol=2e-5, rtol=1e-4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (3, 3, None)
    assert set(config["target_modules"]) - {
        "model.embed_tokens"
    } == {  # tied: named twice by PEFT; not those of block 1's MLP, which did not change
        *("q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(() if tied else ("lm_head",)),
    }


def test_smaller_matrices_get_their_full_rank(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tied=True)
    table = extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 32, device=CPU)  # k and v have 16
    assert next(row for row in table.rows if row.rank == 32).share == pytest.approx(1.0)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(load_model(str(tuned))), atol=1e-4, rtol=1e-3)


def test_the_table_rises_with_rank_and_says_what_is_left_out(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tied=False, norms=True)
    table = extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 8, device=CPU)
    assert [row.rank for row in table.rows] == [0, 1, 2, 4, 8, 16, 32, None]
    shares = [row.share for row in table.rows]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-2] == pytest.approx(1 - table.left_out)
    assert 0 < table.left_out < 0.01
    assert table.reason == f"{tuned} is not in a run folder, so there is no recipe"
    assert json.loads((tmp_path / "lora" / "ranks.json").read_text())["rows"][-1]["share"] == 1.0


def test_changed_biases_of_adapted_layers_count_as_left_out(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = Qwen2ForCausalLM(config)
    tuned = copy.deepcopy(base)
    layer = tuned.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight[0, 0] += 1
        layer.bias[:2] += 2
    source = Source(write(tuned, tmp_path / "tuned"), None, str(write(base, tmp_path / "base")))
    table = extract_lora(source, tmp_path / "lora", 1, device=CPU)
    assert table.left_out == pytest.approx(8 / 9)
    assert next(row for row in table.rows if row.rank == 1).share == pytest.approx(1 / 9)


def test_a_rank_above_full_and_below_one_is_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, tied=False)
    with pytest.raises(
        ValueError, match="rank 33 is above the full rank of every changed weight, which is 32"
    ):
        extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 33, device=CPU)
    with pytest.raises(ValueError, match="the rank must be >= 1, got 0"):
        extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 0, device=CPU)
    with pytest.raises(ValueError, match=r"no linear layer and no embedding of .* differs from"):
        extract_lora(Source(base, None, str(base)), tmp_path / "lora", 1, device=CPU)
    write(tiny.llama(blocks=3), tmp_path / "deeper")
    with pytest.raises(ValueError, match="so there is no difference to factor; give the right base"):
        extract_lora(Source(tmp_path / "deeper", None, str(base)), tmp_path / "lora", 1, device=CPU)
    assert not (tmp_path / "lora").exists()


def test_a_tied_head_that_peft_would_not_know_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config)
    base = write(model, tmp_path / "base")
    with torch.no_grad():
        model.transformer.wte.weight[0] += 1
    tuned = write(model, tmp_path / "tuned")
    with pytest.raises(
        ValueError, match=r"are one matrix, transformer\.wte, and PEFT ties .*; export a delta"
    ):
        extract_lora(Source(tuned, None, str(base)), tmp_path / "lora", 1, device=CPU)
