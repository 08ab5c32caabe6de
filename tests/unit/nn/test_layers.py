from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from lisatune import LISA, LayerMap, find_layers

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
    "gptj",
    "opt",
    "falcon",
    "bloom",
    "mpt",
    "starcoder2",
    "stablelm",
    "granite",
)
TEXT_AND_IMAGE = ("llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "idefics3", "mllama")


def meta(auto: Any, family: str, **changes: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **changes))


def assert_partition(model: nn.Module, layers: LayerMap) -> None:
    """Every parameter, by identity, is in exactly one of blocks, ends and frozen."""
    of_blocks = [p for block in layers.block_parameters(model) for p in block.values()]
    ends = list(layers.end_parameters(model).values())
    frozen = list(layers.frozen_parameters(model).values())
    found = [id(p) for p in (*of_blocks, *ends, *frozen)]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_decoder_is_in_one_place(family: str) -> None:
    model = meta(AutoModelForCausalLM, family)
    layers = find_layers(model)
    assert layers.num_blocks == model.config.num_hidden_layers
    assert layers.frozen == ()
    assert_partition(model, layers)
    sizes = [sum(p.numel() for p in block.values()) for block in layers.block_parameters(model)]
    assert min(sizes) > 0
    assert layers.embedding in layers.ends
    assert layers.head in layers.ends
    assert layers.is_tied == model.config.tie_word_embeddings
    assert not any(name.startswith(f"{path}.") for name in layers.ends for path in layers.blocks)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_are_listed_nearest_the_input_first(family: str) -> None:
    model = meta(AutoModelForCausalLM, family, num_hidden_layers=12)
    prefix = {"gpt2": "transformer.h", "llama": "model.layers"}[family]
    assert find_layers(model).blocks == tuple(f"{prefix}.{i}" for i in range(12))


def test_tied_embedding_and_head_are_one_end(tied_llama: PreTrainedModel) -> None:
    layers = find_layers(tied_llama)
    assert layers.ends == ("model.embed_tokens.weight", "model.norm.weight")
    assert layers.head == layers.embedding == "model.embed_tokens.weight"
    assert layers.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert layers.is_tied


def test_untied_head_is_an_end_of_its_own(untied_llama: PreTrainedModel) -> None:
    layers = find_layers(untied_llama)
    assert layers.ends == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert layers.head == "lm_head.weight"
    assert not layers.is_tied


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "gemma3_text"])
def test_classification_heads_are_ends(family: str) -> None:
    model = meta(AutoModelForSequenceClassification, family, num_hidden_layers=3)
    layers = find_layers(model)
    assert "score.weight" in layers.ends
    assert layers.head == "score.weight"
    assert layers.frozen == ()
    assert_partition(model, layers)


@pytest.mark.parametrize("family", TEXT_AND_IMAGE)
def test_vision_tower_and_projector_stay_frozen(family: str) -> None:
    model = meta(AutoModelForImageTextToText, family)
    layers = find_layers(model)
    assert_partition(model, layers)
    language = ("model.language_model.", "model.text_model.")
    assert all(path.startswith(language) for path in layers.blocks)
    assert all(name.startswith((*language, "lm_head.")) for name in layers.ends)
    assert not any(name.startswith((*language, "lm_head.")) for name in layers.frozen)
    assert len(layers.frozen) > 10
    assert {layers.embedding, layers.head} <= set(layers.ends)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_vision_tower_as_deep_as_the_language_model_is_told_apart(family: str) -> None:
    config = AutoConfig.for_model(family)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 5
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    layers = find_layers(model)
    assert layers.blocks == tuple(f"model.language_model.layers.{i}" for i in range(5))
    assert any(name.startswith("model.vision_tower.") for name in layers.frozen)
    assert_partition(model, layers)


def test_classifier_over_text_and_images_trains_its_head() -> None:
    model = meta(AutoModelForSequenceClassification, "gemma3")
    layers = find_layers(model)
    assert "score.weight" in layers.ends
    assert any("vision_tower" in name for name in layers.frozen)
    assert_partition(model, layers)


def test_ends_can_name_a_projector() -> None:
    model = meta(AutoModelForImageTextToText, "llava")
    layers = find_layers(model, ends=["model.multi_modal_projector", "lm_head", "model.language_model.norm"])
    assert {name.rpartition(".")[0] for name in layers.ends} == {
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "model.language_model.norm",
        "lm_head",
    }
    assert "model.language_model.embed_tokens.weight" in layers.frozen
    assert_partition(model, layers)


def test_ends_can_name_a_tied_parameter_by_its_alias(tied_llama: PreTrainedModel) -> None:
    layers = find_layers(tied_llama, ends=["lm_head"])
    assert layers.ends == ("model.embed_tokens.weight",)
    assert layers.frozen == ("model.norm.weight",)
    assert find_layers(tied_llama, ends="lm_head") == layers


def test_ends_can_be_empty(untied_llama: PreTrainedModel) -> None:
    layers = find_layers(untied_llama, ends=[])
    assert layers.ends == ()
    assert len(layers.frozen) == 3


@pytest.mark.parametrize("path", ["model.layers.0.mlp", "lm_hed", "model.rotary_emb"])
def test_ends_that_name_no_parameter_outside_the_blocks_are_refused(
    untied_llama: PreTrainedModel, path: str
) -> None:
    with pytest.raises(ValueError, match=f"'{path}' names no parameter outside the blocks"):
        find_layers(untied_llama, ends=["lm_head", path])


class Plain(nn.Module):
    """A model without a config: two lists of different roles, one list inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.stem = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.trunk = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]) for _ in range(3))
        self.head = nn.Linear(4, 7)


def test_plain_module_takes_the_path_of_its_blocks() -> None:
    model = Plain()
    layers = find_layers(model, blocks="trunk")
    assert layers.blocks == ("trunk.0", "trunk.1", "trunk.2")
    assert layers.embedding is None
    assert layers.head is None
    assert {name.split(".")[0] for name in layers.ends} == {"embed", "stem", "head"}
    assert_partition(model, layers)


def test_plain_module_takes_one_path_per_block() -> None:
    model = Plain()
    layers = find_layers(model, blocks=["stem.0", "stem.1", "trunk.2"])
    assert layers.blocks == ("stem.0", "stem.1", "trunk.2")
    assert "trunk.0.0.weight" in layers.ends
    assert_partition(model, layers)


def test_root_can_hold_the_blocks() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers = find_layers(model, blocks="")
    assert layers.blocks == ("0", "1")
    assert [sorted(block) for block in layers.block_parameters(model)] == [
        ["0.bias", "0.weight"],
        ["1.bias", "1.weight"],
    ]


def test_parameter_shared_by_two_blocks_is_an_end() -> None:
    model = Plain()
    model.trunk[2][0].weight = model.trunk[0][0].weight
    layers = find_layers(model, blocks="trunk", ends=["head"])
    assert layers.ends == ("trunk.0.0.weight", "head.weight", "head.bias")
    assert ("trunk.2.0.weight", "trunk.0.0.weight") in layers.tied
    assert [len(block) for block in layers.block_parameters(model)] == [3, 4, 3]
    assert_partition(model, layers)


def test_parameter_shared_by_a_block_and_the_embedding_is_an_end() -> None:
    model = Plain()
    model.embed.weight = nn.Parameter(torch.zeros(4, 4))
    model.trunk[1][0].weight = model.embed.weight
    layers = find_layers(model, blocks="trunk")
    assert "embed.weight" in layers.ends
    assert [len(block) for block in layers.block_parameters(model)] == [4, 3, 4]
    assert_partition(model, layers)


def test_module_without_config_gets_its_candidates_and_the_way_out() -> None:
    with pytest.raises(ValueError, match="a model without a config") as caught:
        find_layers(Plain())
    message = str(caught.value)
    assert "stem (2 modules), trunk (3 modules)" in message
    assert "trunk.0" not in message
    assert 'find_layers(model, blocks="PATH")' in message


def test_the_only_list_of_a_module_without_config_holds_its_blocks() -> None:
    model = nn.Module()
    model.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    model.head = nn.Linear(8, 4)
    layers = find_layers(model)
    assert layers.blocks == ("body.layers.0", "body.layers.1", "body.layers.2")
    assert layers.ends == ("head.weight", "head.bias")
    model.body.layers = model.body.layers[:1]  # one module is no choice of blocks
    with pytest.raises(ValueError, match=r"candidates: body\.layers \(1 modules\)"):
        find_layers(model)


def test_a_dict_with_numbers_as_keys_is_a_list_and_one_with_names_is_not() -> None:
    """Torchtitan's decoders keep their layers in the one, and nanoGPT its list of layers in the other."""
    numbered = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in (2, 3)})  # the second half of a pipeline
    model = nn.ModuleDict({"tokens": nn.Embedding(8, 4), "layers": numbered, "output": nn.Linear(4, 8)})
    layers = find_layers(model)
    assert layers.blocks == ("layers.2", "layers.3")
    assert layers.ends == ("tokens.weight", "output.weight", "output.bias")
    named = nn.ModuleDict({"wte": nn.Embedding(8, 4), "h": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert find_layers(nn.ModuleDict({"transformer": named})).blocks == ("transformer.h.0", "transformer.h.1")


class Wrapper(nn.Module):
    """Hugging Face's model as a part, with a head of its own; some keep its config and one of its getters."""

    def __init__(self, inner: PreTrainedModel, keeps_config: bool) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.inner = inner
        self.value = nn.Linear(4, 1)
        if keeps_config:
            self.config = inner.config
            self.get_input_embeddings = inner.get_input_embeddings


@pytest.mark.parametrize("keeps_config", [True, False])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
def test_a_wrapper_has_the_blocks_and_ends_of_its_model_and_trains_its_own_layers(
    auto: Any, keeps_config: bool
) -> None:
    inner = meta(auto, "qwen3", num_hidden_layers=3)
    within, layers = find_layers(inner), find_layers(model := Wrapper(inner, keeps_config))
    assert layers.blocks == tuple(f"inner.{path}" for path in within.blocks)
    assert layers.embedding == f"inner.{within.embedding}"
    assert layers.head == (None if within.head is None else f"inner.{within.head}")
    own = {"before.weight", "before.bias", "value.weight", "value.bias"}
    assert set(layers.ends) == {*own, *(f"inner.{name}" for name in within.ends)}
    assert_partition(model, layers)


@pytest.mark.parametrize("keeps_config", [True, False])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel, AutoModelForSequenceClassification])
def test_a_wrapper_of_a_model_with_a_vision_tower_leaves_the_tower_frozen(
    auto: Any, keeps_config: bool
) -> None:
    inner = meta(auto, "gemma3")
    within, layers = find_layers(inner), find_layers(model := Wrapper(inner, keeps_config))
    assert layers.blocks == tuple(f"inner.{path}" for path in within.blocks)
    own = {"before.weight", "before.bias", "value.weight", "value.bias"}
    assert set(layers.ends) == {*own, *(f"inner.{name}" for name in within.ends)}
    assert layers.frozen == tuple(f"inner.{name}" for name in within.frozen)
    assert_partition(model, layers)


def test_a_wrapper_with_another_large_part_is_warned_that_it_trains_in_every_step() -> None:
    model = Wrapper(meta(AutoModel, "qwen3", num_hidden_layers=2, hidden_size=8), keeps_config=False)
    model.denoiser = nn.ModuleList(nn.Linear(2048, 2048, device="meta") for _ in range(4))
    with pytest.warns(UserWarning, match=r"of what trains is in denoiser, which are ends here"):
        layers = find_layers(model)
    assert layers.blocks == ("inner.layers.0", "inner.layers.1")


def test_a_module_with_two_models_is_no_wrapper_of_either() -> None:
    model = nn.ModuleDict({"student": meta(AutoModel, "llama", num_hidden_layers=3)})
    model["teacher"] = meta(AutoModel, "llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"0 fit.*student\.layers.*teacher\.layers"):
        find_layers(model)
    layers = find_layers(model, blocks="student.layers", ends="student.norm")
    assert layers.blocks == ("student.layers.0", "student.layers.1", "student.layers.2")


@pytest.mark.parametrize("blocks", [None, "wav2vec2.encoder.layers"])
def test_models_that_cannot_tell_their_embedding_have_blocks_and_train(blocks: str | None) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(vocab_size=8, mask_time_prob=0.0, **sizes, **convolutions, **positions)
    model = Wav2Vec2ForCTC(config)
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    layers = find_layers(model, blocks=blocks)
    assert layers.blocks == tuple(f"wav2vec2.encoder.layers.{i}" for i in range(3))
    assert layers.embedding is None
    assert_partition(model, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, active=1, period=1, layers=layers)
    for _ in range(3):
        model(input_values=torch.randn(2, 400), labels=torch.tensor([[1, 2], [3, 4]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lisa.periods_proven == 3


@pytest.mark.parametrize("decoder_layers", [2, 4])
def test_encoder_decoder_is_refused_whatever_its_depths(decoder_layers: int) -> None:
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 8, "vocab_size": 16}
    with torch.device("meta"):
        models = [
            T5ForConditionalGeneration(T5Config(num_layers=4, num_decoder_layers=decoder_layers)),
            BartForConditionalGeneration(
                BartConfig(encoder_layers=4, decoder_layers=decoder_layers, **sizes)
            ),
        ]
    for model, lists in zip(models, ("encoder.block", "model.encoder.layers"), strict=True):
        with pytest.raises(ValueError, match="an encoder-decoder") as caught:
            find_layers(model)
        assert lists in str(caught.value)
        assert lists.replace("encoder", "decoder") in str(caught.value)


def test_encoder_decoder_with_named_blocks_works() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=2))
    layers = find_layers(
        model, blocks=[f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)]
    )
    assert layers.num_blocks == 4
    assert_partition(model, layers)


def test_an_encoder_decoder_is_told_how_both_lists_train_and_warned_where_one_is_an_end() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=2))
    advice = r'children of all: find_layers\(model, blocks=\["encoder\.block\.0", …, "decoder\.block\.1"\]\)'
    with pytest.raises(ValueError, match=advice):
        find_layers(model)
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        what = (
            rf"of what trains is in {other}\.block, which are ends here and train in every step; .*{advice}"
        )
        with pytest.warns(UserWarning, match=what):
            find_layers(model, blocks=f"{side}.block")


def test_unknown_path_gets_the_known_lists(untied_llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"no module 'model\.layer'; its module lists: model\.layers"):
        find_layers(untied_llama, blocks="model.layer")


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ("head", "has no children"),
        ([], "has no children"),
        (["trunk.0", "trunk.0"], "no parameter of its own"),
        (["trunk.0", "act"], "'act' has no parameter of its own"),
    ],
)
def test_blocks_that_could_never_train_are_refused(blocks: str | list[str], complaint: str) -> None:
    model = Plain()
    model.act = nn.ReLU()
    with pytest.raises(ValueError, match=complaint):
        find_layers(model, blocks=blocks)


@st.composite
def trees(draw: st.DrawFn) -> tuple[nn.Module, list[str]]:
    """A random module tree with some parameters shared, and the paths of some disjoint subtrees."""

    def grow(depth: int) -> nn.Module:
        module = nn.Module()
        for i in range(draw(st.integers(0, 2))):
            module.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
        for i in range(draw(st.integers(0, 3)) if depth else 0):
            module.add_module(f"m{i}", grow(depth - 1))
        return module

    root = grow(3)
    owners = [m for m in root.modules() if m._parameters]
    for _ in range(draw(st.integers(0, 3)) if owners else 0):
        giver, taker = draw(st.sampled_from(owners)), draw(st.sampled_from(owners))
        taker.p0 = giver.p0
    paths: list[str] = []
    for path, _ in root.named_modules():
        free = path and not any(path.startswith(f"{other}.") for other in paths)
        if free and draw(st.booleans()):
            paths.append(path)
    return root, paths


def own_parameters(model: nn.Module, path: str) -> set[str]:
    """Names of the parameters that lie below the path and nowhere else."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {own[0] for own in names.values() if all(name.startswith(f"{path}.") for name in own)}


@given(trees())
def test_any_module_tree_is_partitioned(tree: tuple[nn.Module, list[str]]) -> None:
    model, paths = tree
    try:
        layers = find_layers(model, blocks=paths)
    except ValueError:
        empty = [path for path in paths if not own_parameters(model, path)]
        assert empty or not paths
        return
    assert_partition(model, layers)
    assert layers.blocks == tuple(paths)
    for path, block in zip(paths, layers.block_parameters(model), strict=True):
        assert set(block) == own_parameters(model, path) != set()


class Flux(nn.Module):
    """As diffusers' FluxTransformer2DModel: two lists of blocks of different size, one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(2, 4)
        self.transformer_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.single_transformer_blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.proj_out = nn.Linear(4, 2)


class UNet(nn.Module):
    """As diffusers' UNet2DModel: a block between two lists, registered after them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Linear(2, 4)
        self.down_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.up_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))})
        self.conv_out = nn.Linear(4, 2)


def test_several_lists_named_blocks_are_one_sequence_in_a_model_without_a_text_config() -> None:
    layers = find_layers(Flux())
    assert layers.blocks == (
        *(f"transformer_blocks.{i}" for i in range(2)),
        *(f"single_transformer_blocks.{i}" for i in range(3)),
    )
    assert layers.ends == ("x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias")


def test_a_unet_is_refused_with_the_list_of_paths_to_give() -> None:
    paths = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    listed = ", ".join(f'"{path}"' for path in paths)
    with pytest.raises(ValueError, match=rf"UNet has mid_block beside .*blocks=\[{listed}\]"):
        find_layers(UNet())
    layers = find_layers(UNet(), blocks=paths)
    assert layers.blocks == tuple(paths)
    assert [name.split(".")[0] for name in layers.ends] == ["conv_in"] * 2 + ["conv_out"] * 2


def test_lists_that_are_no_blocks_and_hold_much_are_warned_of() -> None:
    model = Flux()
    model.adapters = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
    with pytest.warns(UserWarning, match="what trains is in adapters"):
        assert len(find_layers(model).blocks) == 5


def make_diffusion_models() -> dict[str, nn.Module]:
    """Tiny models of diffusers, where it is installed."""
    diffusers = pytest.importorskip("diffusers")
    joint = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "in_channels": 4}
    return {
        "DiT": diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            out_channels=1,
            num_layers=4,
            sample_size=8,
            norm_type="ada_norm_zero",
            num_embeds_ada_norm=11,
        ),
        "Flux": diffusers.FluxTransformer2DModel(
            patch_size=1,
            num_layers=2,
            num_single_layers=3,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            **joint,
        ),
        "UNet": diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ),
    }


def test_models_of_diffusers_have_the_structure_of_the_stand_ins() -> None:
    models = make_diffusion_models()
    assert len(find_layers(models["DiT"]).blocks) == 4
    assert find_layers(models["Flux"]).blocks == find_layers(Flux()).blocks
    with pytest.raises(ValueError, match=r'"down_blocks.1", "mid_block", "up_blocks.0"'):
        find_layers(models["UNet"])
