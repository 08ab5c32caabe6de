"""Shared by several benchmarks: model shapes, the peak in torch's allocation log, and where time goes."""

from typing import Any

__all__ = ["SHAPES", "peak_of_allocations", "where_time_goes"]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def peak_of_allocations(log: Any) -> int:
    """Find the highest sum of live bytes in torch's allocation log, relative to its start."""
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::"),
    "attention": ("aten::_scaled_dot_product", "lisatune::causal", "aten::bmm", "aten::_softmax"),
    "elementwise work of compiled blocks": ("## Call CompiledFxGraph", "Torch-Compiled Region"),
    "AdamW's kernel": ("aten::_fused_adamw",),
}


def where_time_goes(log: Any) -> str:
    """Format the shares of time by phase and kind of work as Markdown, then the longest operators."""
    events = log.key_averages()
    kinds = dict.fromkeys([*KINDS, "all else"], 0.0)
    phases = {e.key: e.cpu_time_total for e in events if e.key.startswith("phase: ")}
    total = sum(phases.values())
    for event in events:
        found = [kind for kind, names in KINDS.items() if event.key.startswith(names)]
        kinds[found[0] if found else "all else"] += event.self_cpu_time_total
    lines = ["| part | share |", "|---|---|"]
    lines += [f"| {key} | {each / total:.1%} |" for key, each in [*phases.items(), *kinds.items()]]
    return "\n".join(lines) + "\n\n" + log.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
