"""A fine-tune as LoRA adapters: of each weight that changed, the best approximation of its change in rank r.

    ΔW = W_tuned − W_base = U S Vᵀ,    B = U_r √S_r,    A = √S_r V_rᵀ,    W_base + B A ≈ W_tuned

No other B A of rank r is nearer to ΔW in the Frobenius norm (Eckart and Young, 1936). Linear layers and the
embedding get adapters; norms and biases are left out, because servers of adapters take none, and so is what
is no linear layer: GPT-2's transposed ones, experts in one tensor.

Shapes: O = outputs, I = inputs of a weight, r = rank.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.console import first_line
from lisatune.data.batches import collate
from lisatune.data.readers import read_data
from lisatune.data.rows import TokenRow
from lisatune.data.tokens import tokenize
from lisatune.evaluate.held_out import held_out_loss
from lisatune.export.source import Source
from lisatune.files.disk import replace_file
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.models.load import load_model, load_tokenizer, save_model, stored_dtype
from lisatune.models.sharded import load_mapped
from lisatune.nn.layers import find_layers
from lisatune.recipe import Recipe

__all__ = ["RankRow", "RankTable", "extract_lora", "factor"]

SMALLEST_SHARE = 1e-7
"""Singular values below this share of the largest are rounding: eigenvalues of ΔW ΔWᵀ hold no more digits."""


@dataclass(frozen=True)
class RankRow:
    """What a rank keeps."""

    rank: int | None
    """Rank; 0 is the base, None the tuned model itself."""

    share: float
    """Share of the squared change of all weights that it keeps, 0 to 1."""

    loss: float | None = None
    """Held-out loss per token in nats; None if it was not measured."""


@dataclass
class RankTable:
    """Ranks against what they keep."""

    rank: int
    """The rank that was written."""

    rows: list[RankRow] = field(default_factory=list)
    left_out: float = 0.0
    """Share of the squared change in weights without an adapter, such as norms and biases."""

    adapted: int = 0
    """Number of adapted modules; a head that is tied to the embedding is not counted."""

    num_bytes: int = 0
    """Bytes of the adapters."""

    is_tied: bool = False
    """Whether embedding and head share an adapter. PEFT loads it, but its merging would add it twice."""

    held_out: int = 0
    """Rows that the loss was measured on."""

    reason: str | None = None
    """Why there are no losses."""


def extract_lora(
    source: Source,
    output: Path,
    rank: int,
    *,
    rows: int = 48,
    device: torch.device,
    advance: Callable[[str], None] = lambda text: None,
) -> RankTable:
    """Write the change from a base to its tuned model as a folder of PEFT adapters.

    Args:
        source: the tuned model, with its base.
        output: folder to write; an existing one is replaced once the new one is complete.
        rank: r, at least 1 and at most the smaller side of the largest changed weight. Smaller weights get
            adapters of their full rank.
        rows: most held-out rows of the run that the loss is measured on.
        device: where to compute.
        advance: is told what is being done.

    Returns:
        The table of ranks.

    Raises:
        ValueError: it is a reward model, the rank is out of range, base and model have other shapes, nothing
            changed, or PEFT cannot adapt what did.
        ImportError: PEFT is not installed.
        OSError: the folder could not be written; an existing one is as it was.
    """
    source.refuse_adapters("they are in low rank already; copy the folder")
    source.refuse_scores("its score has nothing in the base to differ from; export a delta")
    trust: dict[str, Any] = {"trust_remote_code": source.trusts_remote_code}
    where: dict[str, Any] = {"name": source.need_base(), "revision": source.revision, **trust}
    if rank < 1:
        raise ValueError(f"the rank must be >= 1, got {rank}")
    dtype = stored_dtype(**where) or torch.float32
    base = load_model(**where, dtype=dtype)
    tuned, _ = load_mapped(str(source.model), dtype=_dtype_of(source.model), **trust)
    modules = _changed_modules(base, tuned, source)
    full = max(min(weight.shape) for weight in _weights(modules).values())
    if rank > full:
        raise ValueError(
            f"rank {rank} is above the full rank of every changed weight, which is {full}; give at most "
            f"{full}, or export a delta, which keeps all"
        )
    with torch.no_grad():
        ties = _check_tied(base, modules)
        adapted, spectra, rest = _adapt(base, tuned, modules, rank, ties, device, advance)
    tokenizer = load_tokenizer(str(source.model), **trust)
    save_model(adapted, tokenizer, output, dtype=_dtype_of(source.model))
    total = sum(float(values.sum()) for values in spectra) + rest
    table = RankTable(rank, left_out=rest / total, adapted=len(modules), is_tied=ties)
    table.num_bytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    ranks = _ranks(rank, full)
    shares = {r: sum(float(values[:r].sum()) for values in spectra) / total for r in ranks}
    losses: dict[int | None, float] = {}
    try:
        held_out = _read_held_out(source.recipe(), tokenizer, rows)
        table.held_out = len(held_out)
        measure = _measure_with(source.recipe(), held_out, device)
        for r in sorted((each for each in ranks if each <= rank), reverse=True):
            _cut(adapted, r)
            advance(f"held-out loss at rank {r}")
            losses[r] = measure(adapted)
        del adapted, base
        losses[None] = measure(tuned)
    except (ValueError, OSError, LookupError, ImportError) as error:
        table.reason = first_line(error)
    table.rows = [RankRow(r, shares[r], losses.get(r)) for r in ranks] + [
        RankRow(None, 1.0, losses.get(None))
    ]
    rows_text = [vars(row) for row in table.rows]
    replace_file(output / "ranks.json", json.dumps(vars(table) | {"rows": rows_text}, indent=1) + "\n")
    source.write_card(output, "adapters", _note(table))
    return table


def factor(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factor a matrix into B A of a rank, with √S in both.

    The singular vectors are those of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW, in float64. That is far cheaper than a
    singular value decomposition of a wide matrix, and exact to 7 digits of the largest singular value.

    Args:
        delta_OI: ΔW, of shape [O, I].
        rank: r, 1 <= r <= min(O, I).

    Returns:
        B of shape [O, r] and A of shape [r, I] in float32, and all squared singular values in falling order,
        float64 of shape [min(O, I)].
    """
    is_tall = delta_OI.shape[0] > delta_OI.shape[1]
    wide_SL = (delta_OI.T if is_tall else delta_OI).double()  # S = short side, L = long side
    values_S, vectors_SS = torch.linalg.eigh(wide_SL @ wide_SL.T)
    values_S = values_S.flip(0).clamp(min=0)
    left_Sr = vectors_SS.flip(1)[:, :rank]
    sizes_r = values_S[:rank].sqrt()
    is_real_r = sizes_r > SMALLEST_SHARE * sizes_r[0]
    root_r = torch.where(is_real_r, sizes_r, 1.0).sqrt()
    right_rL = left_Sr.T @ wide_SL / root_r[:, None] * is_real_r[:, None]
    left_Sr = left_Sr * root_r * is_real_r
    b, a = (right_rL.T, left_Sr.T) if is_tall else (left_Sr, right_rL)
    return b.float(), a.float(), values_S


def _dtype_of(folder: Path) -> torch.dtype:
    return stored_dtype(str(folder)) or torch.float32


def _changed_modules(base: Any, tuned: Any, source: Source) -> dict[str, nn.Module]:
    """Find the linear layers and embeddings whose weights changed, by path; tied ones under their first.

    Raises:
        ValueError: base and tuned model differ in shape, or no such weight changed.
    """
    before = dict(base.named_parameters())
    after = dict(tuned.named_parameters())
    other = [name for name in after if name not in before or before[name].shape != after[name].shape]
    if other or before.keys() != after.keys():
        name = (other or sorted(before.keys() - after.keys()))[0]
        raise ValueError(
            f"{source.model} and its base {source.base} differ in the shape of {name}, so there is no "
            "difference to factor; give the right base, or export a delta, which takes new tokens too"
        )
    modules: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        name = f"{path}.weight"
        if type(module) not in (nn.Linear, nn.Embedding) or name not in before:
            continue
        if not torch.equal(before[name].float(), after[name].float()):
            modules[path] = module
    if not modules:
        raise ValueError(
            f"no linear layer and no embedding of {source.model} differs from {source.base}; a delta keeps "
            "whatever changed"
        )
    return modules


def _adapt(
    base: Any,
    tuned: Any,
    modules: dict[str, nn.Module],
    rank: int,
    ties: bool,
    device: torch.device,
    advance: Callable[[str], None],
) -> tuple[Any, list[Tensor], float]:
    """Put adapters into the base; with `ties` those of the embedding are the head's too.

    Returns:
        The PEFT model on `device`, the squared singular values of each adapted weight, and the squared change
        of all other weights.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f'{error}; adapters need PEFT: pip install "lisatune[train]"') from None
    full = {path: min(weight.shape) for path, weight in _weights(modules).items()}
    lower = {path: each for path, each in full.items() if each < rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_short_names(base, modules),
        rank_pattern=lower,
        alpha_pattern=lower,
        lora_dropout=0.0,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        ensure_weight_tying=ties,
    )
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    others = [name for name in after if name not in {f"{path}.weight" for path in modules}]
    changes = (after[name].float() - before[name].float() for name in others)
    rest = sum(float(delta.double().square().sum()) for delta in changes)
    deltas = {path: (before[f"{path}.weight"], after[f"{path}.weight"]) for path in modules}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT still uses an old name in transformers
        adapted = get_peft_model(base, config).to(device)
    spectra = []
    for number, (path, (old, new)) in enumerate(deltas.items()):
        if number % 32 == 0:
            advance(f"factoring {number} of {len(deltas)} weights")
        at = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
        b, a, values = factor(new.to(at).float() - old.to(at).float(), min(rank, full[path]))
        spectra.append(values.cpu())
        layer = adapted.base_model.model.get_submodule(path)
        if isinstance(modules[path], nn.Embedding):  # PEFT adapts the transpose
            layer.lora_embedding_A["default"].copy_(b.T)
            layer.lora_embedding_B["default"].copy_(a.T)
        else:
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return adapted.eval(), spectra, rest


def _weights(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {path: module.get_parameter("weight") for path, module in modules.items()}


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _check_tied(base: Any, modules: dict[str, nn.Module]) -> bool:
    """Return whether a changed embedding is the head too; PEFT then ties their adapters.

    Raises:
        ValueError: it is, and PEFT would not know it by its name.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    layers = find_layers(base)
    if not layers.is_tied or layers.embedding is None or _path(layers.embedding) not in modules:
        return False
    name = _path(layers.embedding)
    if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
        raise ValueError(
            f"embedding and head are one matrix, {name}, and PEFT ties adapters only of matrices named "
            f"{' or '.join(EMBEDDING_LAYER_NAMES)}; export a delta"
        )
    return True


def _short_names(base: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Name modules as PEFT does: by their last name where all of that name are meant, else by their path."""
    kinds = (nn.Linear, nn.Embedding)
    others = {
        path.rpartition(".")[2]
        for path, m in base.named_modules()
        if isinstance(m, kinds) and path not in modules
    }
    return sorted({path if (last := path.rpartition(".")[2]) in others else last for path in modules})


def _ranks(rank: int, full: int) -> list[int]:
    """List the ranks of the table: the base, up to four below `rank`, `rank`, and up to two above it."""
    below = [rank // part for part in (16, 8, 4, 2) if rank // part >= 1]
    above = [r for r in (2 * rank, 4 * rank) if r <= full]
    return sorted({0, *below, rank, *above})


def _cut(adapted: nn.Module, rank: int) -> None:
    """Cut all adapters to a lower rank, by zeros."""
    for name, parameter in adapted.named_parameters():
        if ".lora_embedding_A." in name or ".lora_A." in name:
            parameter.data[rank:].zero_()


def _read_held_out(recipe: Recipe, tokenizer: Any, most: int) -> list[TokenRow]:
    """Read the first held-out rows of a run, those of similar length side by side."""
    data = recipe.data
    if not data.holds_out:
        raise ValueError("the run held no data out")
    records = read_data(recipe)[1]
    rows = tokenize(
        records, tokenizer, max_length=data.max_length, loss_on=data.loss_on, long=data.long, date=data.date
    ).rows
    return sorted(rows[:most], key=lambda row: len(row["input_ids"]))


def _measure_with(
    recipe: Recipe, rows: Sequence[TokenRow], device: torch.device
) -> Callable[[nn.Module], float]:
    """Make a function that measures the held-out loss of a model."""
    size = recipe.run.batch_size
    autocast = torch.bfloat16 if recipe.run.precision == "bf16-mixed" else None

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(0, len(rows), size):
            yield collate(list(rows[i : i + size]))

    def measure(model: nn.Module) -> float:
        model.to(device)
        return held_out_loss(CausalLMLoss(model), batches(), device=device, autocast=autocast).loss

    return measure


def _note(table: RankTable) -> str:
    """Say for the card what the adapters keep."""
    row = next(row for row in table.rows if row.rank == table.rank)
    loss = "" if row.loss is None else f" Their held-out loss on {table.held_out} rows is {row.loss:.4f}."
    return (
        f"These adapters are the change of its weights in rank {table.rank}, which keeps "
        f"{100 * row.share:.0f} % of the squared change.{loss}"
    )
