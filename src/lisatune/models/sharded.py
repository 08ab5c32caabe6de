"""A model on several ranks: each rank reads only its own rows, and no rank ever holds all weights.

The model is built without weights, divided, and then filled from its safetensors files. This needs files that
hold the weights under the model's own names. Where transformers would rename, merge or convert weights, each
rank loads the whole model into host memory before it is divided, and a warning says so.

Adapters are made before the model is divided, by every rank from the same random numbers. Meanwhile zeros
stand in for the weights (`zero_weights`). A reward model has its score by then, because LoRA trains a copy.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import (
    is_stand_in,
    local_part,
    local_rows,
    part_of,
    reshard,
    row_bounds,
    stand_in,
)
from lisatune.files.disk import write_aside
from lisatune.files.tensors import (
    DividedTensor,
    collect,
    describe_tensors,
    gather_tensors,
    named_weights,
    read_part,
    write_file,
)
from lisatune.models.hf import (
    check_loaded,
    explain_load_errors,
    import_transformers,
    silence_transformers,
)
from lisatune.models.load import LARGEST_FILE, load_model, load_tokenizer, meta_model, save_model
from lisatune.models.locate import locate
from lisatune.models.new_tokens import fill_rows
from lisatune.models.reward import draw_score, drawn_weights, set_padding
from lisatune.models.rounding import fits_range, note_dtype, round_parameters
from lisatune.models.stored import INDEX, ONE_FILE, find_weights, list_stored
from lisatune.nn.bottleneck import has_adapters
from lisatune.nn.layers import find_score
from lisatune.nn.nf4 import Linear4

__all__ = ["load_for_ranks", "load_mapped", "save_from_ranks", "zero_weights"]

Places = dict[str, tuple[Path, str]]
"""The file of each weight, and the weight's name in that file."""


def load_for_ranks(
    name: str, *, dtype: torch.dtype = torch.float32, **source: Any
) -> tuple[Any, Callable[[], None] | None]:
    """Open a model that is going to be divided among ranks.

    Args:
        name, dtype: as in `load_model`.
        source: the further arguments of `load_model`.

    Returns:
        The model, with its parameters on the meta device and its buffers and score computed, and a function
        that fills the parameters in once the model is divided and has storage. Or the whole model on the CPU,
        and None.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: as in `load_model`.
    """
    new = _number_new_tokens(name, **source)
    model, places = _open_empty(name, dtype=dtype, new=new, **source)
    if places is None:
        warnings.warn(
            f"{name} does not store its weights under the model's own names: every rank loads all of them "
            "into host memory before they are divided",
            stacklevel=2,
        )
        return load_model(name, dtype=dtype, **source), None

    def fill() -> None:
        _fill(name, model, places, dtype)
        if new:
            fill_rows(model, new)

    return model, fill


@contextmanager
def zero_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights on the meta device are zeros on the CPU, in a few bytes each.

    PEFT puts new adapters onto the device of the weights. On the meta device they would have no values.
    """
    zeros: dict[nn.Parameter, nn.Parameter] = {}
    for p in model.parameters():
        if p.is_meta:
            zeros[p] = nn.Parameter(stand_in(p.shape, p.dtype), p.requires_grad)
    if not zeros:  # weights that are codes have placeholders, which look like zeros that stand in
        yield
        return
    _swap_parameters(model, zeros)
    try:
        yield
    finally:
        back = {zero: p for p, zero in zeros.items()}
        for p in model.parameters():
            if p in back:
                back[p].requires_grad_(p.requires_grad)  # a method may have frozen it
            elif is_stand_in(p):  # a method has made it from one
                empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
                back[p] = nn.Parameter(empty, p.requires_grad)
        _swap_parameters(model, back)


def _swap_parameters(model: nn.Module, others: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of some, under all of their names."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None and each in others:
                module._parameters[name] = others[each]


def load_mapped(
    name: str, *, dtype: torch.dtype = torch.float32, **source: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Open a model whose weights stay in its safetensors files, memory-mapped, until they are read.

    Host memory then holds no weight that is stored in `dtype`; others are converted into it. Nobody may write
    into the weights, or change the files while the model is in use.

    Args:
        name, dtype: as in `load_model`.
        source: the further arguments of `load_model`, but no new tokens.

    Returns:
        The model on the CPU, in evaluation mode, and its memory-mapped weights by name. If the files hold
        other names than the model, the model is loaded as `load_model` does, and no weight is mapped.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: as in `load_model`.
    """
    from safetensors import safe_open

    model, places = _open_empty(name, dtype=dtype, **source)
    if places is None:
        return load_model(name, dtype=dtype, **source), {}
    mapped: dict[str, Tensor] = {}
    with explain_load_errors(name):
        files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path, _ in places.values()}
        for weight, parameter in list(model.named_parameters()):
            if weight not in places:  # the score
                continue
            path, key = places[weight]
            stored = files[path].get_tensor(key)
            if stored.dtype == dtype:
                mapped[weight] = stored
            _swap_parameters(model, {parameter: nn.Parameter(stored.to(dtype), parameter.requires_grad)})
        for weight, buffer in named_weights(model).items():
            if weight in places and not isinstance(buffer, nn.Parameter):
                path, key = places[weight]
                buffer.copy_(files[path].get_tensor(key))
    return model, mapped


def save_from_ranks(model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a divided model as a plain Hugging Face folder, tensor by tensor; every rank must call it.

    Of a model with adapters only these are written, as `save_model` does.

    Args:
        model: a transformers model that `distributed.shards.shard` divided, or PEFT's around it.
        tokenizer: its tokenizer.
        folder: where to write; an existing folder is replaced once the new one is complete.
        dtype: as in `save_model`.

    Raises:
        OSError: the folder could not be written; an existing folder is as it was.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    reshard(model)
    if has_adapters(model):
        _save_adapters(model, tokenizer, folder, dtype)
        return
    left_out = model._keys_to_ignore_on_save or ()
    tensors = {name: t for name, t in named_weights(model).items() if name not in left_out}
    if dtype is not None and fits_range(map(local_part, tensors.values()), dtype):
        tensors = round_parameters(model, tensors, dtype)
    else:
        dtype = None
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=LARGEST_FILE)
    divided = describe_tensors(tensors)
    files: dict[str, dict[str, DividedTensor]] = {
        file: {name: divided[name] for name in names} for file, names in split.filename_to_tensors.items()
    }

    is_converted = bool(vars(model).get("_weight_conversions"))  # transformers' record of how it was loaded

    def write(wholes: Iterator[Tensor]) -> None:
        if is_converted:  # then save_pretrained has to convert it back
            weights = {name: t.cpu() for part in files.values() for name, t in collect(part, wholes).items()}
            save_model(model, tokenizer, folder, weights=weights)
            note_dtype(folder, dtype)
            return
        with silence_transformers(), write_aside(folder) as aside:
            model.save_pretrained(aside, state_dict={})  # config, generation config and the model's own code
            (aside / ONE_FILE).unlink(missing_ok=True)
            note_dtype(aside, dtype)
            for file, parts in files.items():
                write_file(aside / file, parts, wholes, metadata={"format": "pt"})
            if split.is_sharded:
                total = {"total_parameters": sum(t.numel() for t in shapes.values()), **split.metadata}
                index = {"metadata": total, "weight_map": split.tensor_to_filename}
                (aside / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            tokenizer.save_pretrained(aside)

    ranks.consume_on_rank0(gather_tensors(*files.values()), write)


def _save_adapters(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Write the adapters of a divided model, which rank 0 holds whole meanwhile."""
    adapters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if dtype is not None and fits_range(map(local_part, adapters.values()), dtype):
        adapters = round_parameters(model, adapters, dtype)
    divided = describe_tensors(adapters)

    def write(wholes: Iterator[Tensor]) -> None:
        weights = {name: tensor.cpu() for name, tensor in collect(divided, wholes).items()}
        save_model(model, tokenizer, folder, weights=weights)

    ranks.consume_on_rank0(gather_tensors(divided), write)


def _number_new_tokens(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
    **_: Any,
) -> list[int]:
    """Return the numbers of tokens that the model's tokenizer is to learn. The rest is for the model."""
    if not new_tokens:
        return []
    tokenizer = load_tokenizer(
        name, revision=revision, trust_remote_code=trust_remote_code, new_tokens=new_tokens
    )
    numbers: list[int] = tokenizer.convert_tokens_to_ids(list(new_tokens))
    return numbers


def _open_empty(
    name: str, *, dtype: torch.dtype, new: Sequence[int] = (), **source: Any
) -> tuple[Any, Places | None]:
    """Build a model without its weights, in evaluation mode, and find where they are stored.

    A reward model gets its score at once. `new`: rows that embedding and head may have beyond those that are
    stored.
    """
    revision = source.get("revision")
    with torch.random.fork_rng(devices=[]):
        model = meta_model(name, dtype=dtype, with_buffers=True, **source)
    places = _locate_weights(find_weights(name, revision), model, new)
    if places is not None and find_score(model) is not None:
        trusts = source.get("trust_remote_code", False)
        set_padding(name, model, load_tokenizer(name, revision=revision, trust_remote_code=trusts))
        _set_score(name, model, places, source["score_seed"])
    if places is not None and model.can_generate():
        with suppress(OSError), silence_transformers():
            model.generation_config = import_transformers().GenerationConfig.from_pretrained(
                locate(name, revision=revision), revision=revision
            )
    return model.eval(), places


def _set_score(name: str, model: Any, places: Places, seed: int) -> None:
    """Give a reward model its score: read it, or draw it where the files lack it."""
    from safetensors import safe_open

    weight = f"{find_score(model)}.weight"
    parameter = model.get_parameter(weight)
    if weight in places:
        path, key = places.pop(weight)
        with explain_load_errors(name), safe_open(path, framework="pt") as file:
            value = file.get_tensor(key).to(parameter.dtype)
    else:
        value = draw_score(model, seed)
    _swap_parameters(model, {parameter: nn.Parameter(value)})


def _locate_weights(folder: Path, model: Any, new: Sequence[int]) -> Places | None:
    """Find where each weight is stored.

    None unless the files hold every weight exactly once, under the model's own name and in its shape; they
    may lack `new` rows of embedding and head, and a reward model's score.
    """
    from safetensors import SafetensorError

    if model._keep_in_fp32_modules_strict:
        return None
    try:
        stored = list_stored(folder)
    except (OSError, ValueError, LookupError, SafetensorError):
        return None  # load_model then says what is wrong
    aliases: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(tensor, []).append(name)
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {end.weight for end in both if end is not None}
    drawn, left_out = drawn_weights(model) if find_score(model) is not None else (set(), set())
    places: Places = {}
    for tensor, names in aliases.items():
        found = [name for name in names if name in stored]
        if not found and names[0] in drawn:
            continue
        if len(found) != 1 or not _has_shape(stored[found[0]][1], tensor, new if tensor in ends else ()):
            return None  # two names of one tensor may hold different numbers
        places[names[0]] = stored[found[0]][0], found[0]
    unused = stored.keys() - {key for _, key in places.values()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    unused = {key for key in unused if not any(re.search(pattern, key) for pattern in ignored)}
    info = {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": unused}
    check_loaded(str(folder), info, left_out=left_out)
    return places


def _has_shape(stored: tuple[int, ...], tensor: Tensor, new: Sequence[int]) -> bool:
    """Whether a stored tensor is a model's, but for `new` rows, which are its last ones."""
    rows, *rest = stored or (1,)
    lacks_new = bool(new) and min(new) <= rows < len(tensor) and tuple(rest) == tensor.shape[1:]
    return stored == tuple(tensor.shape) or lacks_new


def _fill(name: str, model: nn.Module, places: Places, dtype: torch.dtype) -> None:
    """Read this rank's part of every weight. PEFT moves an adapted layer to the name `base_layer`."""
    from safetensors import safe_open

    modules = {path.replace(".base_layer", ""): module for path, module in model.named_modules()}
    with explain_load_errors(name), torch.no_grad():
        for weight, (path, key) in places.items():
            owner, _, attribute = weight.rpartition(".")
            module = modules[owner]
            with safe_open(path, framework="pt") as file:
                if isinstance(module, Linear4) and attribute == "weight":
                    module.load(file.get_tensor(key).to(dtype))
                else:
                    tensor = getattr(module, attribute)
                    part, count = local_part(tensor), file.get_slice(key).get_shape()
                    if tensor.ndim and count[0] < len(tensor):  # of the others `fill_rows` makes the values
                        rows = local_rows(tensor, (0, count[0] - 1))
                        first = row_bounds(tensor)[part_of(tensor).index]
                        part[rows] = file.get_slice(key)[first : first + rows.stop].to(dtype)
                    else:
                        part.copy_(read_part(file, key, tensor))
