"""Estimate memory by arithmetic, for what fake tensors cannot trace, and for answers without gradients."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.console import first_line
from lisatune.lisa.correction import find_correction
from lisatune.memory.tracker import StepMemory
from lisatune.methods.build import Built
from lisatune.nn.layers import LayerMap
from lisatune.optim.meter import host_state, state_bytes, tensors_bytes
from lisatune.recipe import Recipe

__all__ = [
    "divide_among_ranks",
    "estimate_answering",
    "estimate_step",
    "explain_untraced",
    "largest_batch",
]


def estimate_step(built: Built, recipe: Recipe, length: int, *, has_state: bool) -> StepMemory:
    """Count the bytes of the parameters and estimate the rest.

    Activations: a block keeps 34 bytes per token and hidden unit at two bytes a number, if attention scores
    are not stored (Korthikanti et al., arXiv 2205.05198, section 4.1). With checkpointing every block keeps
    its input, and one block, or each that trains, keeps everything. Loss: the logits of 128 tokens, three
    times in float32.
    Optimizer state: what the optimizer holds if `has_state`, or else two moments of each number that trains.
    """
    correction = find_correction(built.model)
    added = [] if correction is None else correction.all_parameters()
    trained = [p for p in (*built.model.parameters(), *added) if p.requires_grad]
    weights = tensors_bytes([*built.model.parameters(), *built.model.buffers(), *added])
    gradients = tensors_bytes(trained)
    state, host = recipe.method.num_moments * gradients, built.schedule.host_bytes()
    if has_state:
        own = [built.step.optimizer, *built.state.beside]
        in_host = tensors_bytes(host_state(built.step.optimizer))
        state, host = sum(map(state_bytes, own)) - in_host, host or in_host
    if built.step.in_backward is not None:
        gradients = max(p.nbytes for p in trained)
    config: Any = built.model.config
    text, tokens = config.get_text_config(), recipe.run.batch_size * recipe.loss.rows_per_record * length
    width = 2 if built.step.autocast is not None else next(iter(built.model.parameters())).element_size()
    block = 17 * width * tokens * text.hidden_size
    blocks = built.layers.num_blocks
    training = sum(
        any(p.requires_grad for p in own.values()) for own in built.layers.block_parameters(built.model)
    )
    checkpointing = recipe.run.activation_checkpointing
    whole = {False: blocks, True: 1, "frozen": max(training, 1)}[checkpointing]
    activations = whole * block + (blocks * width * tokens * text.hidden_size if checkpointing else 0)
    at_peak = {
        "weights": weights,
        "gradients": gradients,
        "optimizer state": state,
        "activations": activations,
        "loss": 3 * 4 * min(128, tokens) * text.vocab_size,
        "workspace": 0,
    }
    peak = sum(at_peak.values())
    return StepMemory(
        peak_bytes=peak,
        phase="backward",
        at_peak=at_peak,
        by_phase={"backward": peak},
        static_bytes=weights + state,
        host_bytes=host,
    )


def divide_among_ranks(memory: StepMemory, model: nn.Module, layers: LayerMap, ranks: int) -> StepMemory:
    """Divide weights, gradients and state by the number of ranks that hold a model together, as FSDP2 does.

    Gathered weights come on top: the ends, for the whole step, and two blocks, the one that computes and the
    next one.
    """
    blocks = [tensors_bytes(block.values()) for block in layers.block_parameters(model)]
    gathered = tensors_bytes(layers.end_parameters(model).values()) + 2 * max(blocks, default=0)
    shared = ("weights", "gradients", "optimizer state")
    at_peak = {name: -(-size // ranks) if name in shared else size for name, size in memory.at_peak.items()}
    at_peak["workspace"] += gathered
    saved = memory.peak_bytes - sum(at_peak.values())
    return replace(
        memory,
        peak_bytes=sum(at_peak.values()),
        at_peak=at_peak,
        by_phase={memory.phase: memory.peak_bytes - saved},
        static_bytes=-(-memory.static_bytes // ranks),
        host_bytes=-(-memory.host_bytes // ranks),
    )


def explain_untraced(built: Built, batches: list[dict[str, Tensor]], error: Exception) -> str:
    """Run the step again to say which module fails under fake tensors."""
    inside: list[str] = []
    handles = []
    for name, module in built.model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
            module.register_forward_hook(lambda *_: inside.pop() and None),
        ]
    try:
        built.step.backward(batches)
    except Exception as again:
        error = again
    finally:
        for handle in handles:
            handle.remove()
        built.step.skip()
    where = (
        f"module {inside[-1]} ({type(built.model.get_submodule(inside[-1])).__name__})"
        if inside
        else "the step"
    )
    return f"{where} cannot be traced ({first_line(error)}); the figures are estimates, rough for activations"


def estimate_answering(model: Any, length: int) -> int:
    """Estimate the bytes on top of the weights that a forward pass on one sequence takes, without gradients.

    Counted are the logits of every token twice, as the lm-evaluation-harness keeps them, the keys and values
    of all blocks, and what one block computes (34 bytes per token and hidden unit at two bytes a number, as
    in `estimate_step`). Attention is assumed not to store its scores, except `eager`, which does.

    Args:
        model: a transformers model or one without weights, in the dtype that it will have.
        length: tokens of the sequence.
    """
    config: Any = model.config
    text = config.get_text_config()
    width = next(iter(model.parameters())).element_size()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    per_token = 2 * text.vocab_size + 17 * text.hidden_size
    per_token += 2 * text.num_hidden_layers * kv_heads * head_dim
    if getattr(config, "_attn_implementation", None) == "eager":
        per_token += 2 * heads * length
    return int(length * per_token * width)


def largest_batch(model: Any, length: int, free_bytes: int | None, device: torch.device) -> int:
    """Return how many sequences fit into half of the free memory by `estimate_answering`.

    Args:
        model, length: as in `estimate_answering`.
        free_bytes: free memory of the device; None if it is unknown.
        device: where the model is. More than 64 sequences, on a CPU 16, are not worth it.
    """
    most = 16 if device.type == "cpu" else 64
    if free_bytes is None:
        return min(8, most)
    return max(1, min(most, free_bytes // (2 * estimate_answering(model, length))))
