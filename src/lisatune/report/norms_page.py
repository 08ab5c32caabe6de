"""The page of `lisatune study norms`: the norms of each layer under LoRA and under full fine-tuning."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lisatune.report import charts
from lisatune.report.figures import Figure, Table
from lisatune.report.page import Page
from lisatune.study.norms import QUANTITIES, describe_skew

__all__ = ["make_norms_page"]

GROUPS = (
    ("Raw norms of the adapters", ("raw",), "The paper's Fig. 2, most likely."),
    ("Change of the weights", ("lora_change", "full_change"), "What training did to the weights."),
    ("Norm of the weights", ("lora_weight", "full_weight"), "Mostly what the weights were before."),
)


def make_norms_page(study: Mapping[str, Any]) -> Page:
    """Make the page of a study.

    Args:
        study: what `study_norms` returned, or its JSON file.
    """
    names = list(study["norms"]["raw"])
    short = {name: _shorten(name) for name in names}
    ratios = dict(zip([path for path, _ in study["layers"]], study["probabilities"], strict=True))
    mean = sum(ratios.values()) / len(ratios)
    ratios |= {name: value * mean for name, value in study["ends"].items()}
    heads = ["layer", *QUANTITIES.values(), "p"]
    rows = [
        [short[name], *(f"{study['norms'][key][name]:.4g}" for key in QUANTITIES), f"{ratios[name]:.4g}"]
        for name in names
    ]
    figures = []
    for title, keys, note in GROUPS:
        for what, table in (("", study["norms"]), (", per element", study["rms"])):
            curves = {QUANTITIES[key]: [table[key][name] for name in names] for key in keys}
            figures.append(_show(title + what, "RMS" if what else "norm", curves, list(short.values()), note))
    figures.insert(1, _show_start(study, names, short))
    chances = {"LoRA / full": [ratios[name] for name in names]}
    note = "Ratio of the changes, which `sampler: weight-norm` reads for the blocks."
    figures.append(_show("How often a layer should train, p", "p", chances, list(short.values()), note))
    return Page(
        title=f"Norms of {study['model']}",
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        intro=[
            f"{study['model']} on {study['data']}: {study['steps']} steps, measured after the update at "
            f"{study['measured_steps']} of them and averaged. LoRA of rank {study['rank']} on all linear "
            f"layers, embedding and head at lr {study['lora_lr']:g}; full fine-tuning at lr {study['lr']:g}.",
            *describe_skew(study),
        ],
        problems=[],
        overview=Table(heads, rows),
        overview_note="Frobenius norms; of a layer the root of the sum of squares over its matrices. p: "
        "‖sBA‖ over ‖W_t - W_0‖.",
        tables=[],
        figures=figures,
        samples=[],
        texts=[("Figures", json.dumps(dict(study), indent=1, ensure_ascii=False))],
    )


def _show_start(study: Mapping[str, Any], names: Sequence[str], short: Mapping[str, str]) -> Figure:
    curves = {
        "before the first step": [study["initial_raw"][name] for name in names],
        "mean over the steps": [study["norms"]["raw"][name] for name in names],
    }
    note = "How much of the raw norm is there before training: PEFT's initialisation."
    return _show("Raw norms, before and in training", "norm", curves, list(short.values()), note)


def _show(title: str, y: str, curves: Mapping[str, list[float]], names: list[str], note: str) -> Figure:
    highest = "; ".join(
        f"{name} highest in {names[v.index(max(v))]}, {max(v):.3g}" for name, v in curves.items()
    )
    return Figure(
        title=title,
        svg=charts.draw_lines(
            [(name, [list(enumerate(values))]) for name, values in curves.items()],
            x="layer, from input to output",
            y=y,
            from_zero=True,
        ),
        alt=f"Line chart by layer: {highest}.",
        note=note,
        table=Table(
            ["layer", *curves],
            [[name, *(f"{v[i]:.4g}" for v in curves.values())] for i, name in enumerate(names)],
        ),
    )


def _shorten(path: str) -> str:
    """Return the part of a path from the block's number on."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])
