"""In what two recipes differ, for a run that is resumed and for a comparison.

A key that is new has, in a recipe from before, the value that says what older versions did.
"""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["differences"]

MAY_CHANGE = frozenset(
    (
        "data.cache",
        "data.date",
        "run.activation_checkpointing",
        "run.batch_size",
        "run.check_memory",
        "run.copies",
        "run.epochs",
        "run.eval_every",
        "run.evaluate",
        "run.evaluate_data",
        "run.keep_checkpoints",
        "run.log_every",
        "run.max_skipped_steps",
        "run.on_nonfinite",
        "run.on_save_error",
        "run.output",
        "run.report_to",
        "run.sample_tokens",
        "run.samples",
        "run.save_async",
        "run.save_dtype",
        "run.save_every",
        "run.sharding",
        "run.steps",
        "run.stop_after",
    )
)
"""Keys that may differ on resume: lengths, intervals, outputs, and what a stopped run may need to change.

Other steps or epochs stretch the learning-rate schedule. Another date that changes the data is refused later.
"""

BEFORE_IT_EXISTED: dict[str, Any] = {
    "loss.name": "causal_lm",
    "loss.beta": 0.1,
    "loss.center": 0.0,
    "optimizer.name": "adamw",
    "optimizer.options": {},
    "data.long": "auto",
    "data.deduplicate": False,
    "data.streaming": False,
    "data.window": 8192,
    "data.fields": {},
    "data.text_only": False,
    "model.new_tokens": [],
    "optimizer.warmup_share": 0.0,
    "optimizer.min_lr_share": 0.0,
    "run.keep_best": False,
    "method.compute_dtype": "fp32",
    "method.frozen_weights": "exact",
    "method.frozen_scales": "8bit",
    "method.master": "auto",
    "method.unit": "block",
    "method.correction": "none",
    "method.correction_rank": 8,
    "method.correction_lr": 1e-3,
    "method.correction_lr_ratio": 1.0,
    "method.correction_blocks": "all",
    "method.correction_matrices": [],
    "method.correction_share": 0.1,
}
"""Keys that older versions lack, with the value that says what these did, if that is not null."""


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], may_change: Collection[str] = MAY_CHANGE
) -> list[str]:
    """List the keys in which two recipes differ as `section.key: before → after`, without `may_change`.

    A missing key counts as its value in `BEFORE_IT_EXISTED`, or else as null, so a run from before a key
    existed can be resumed.
    """
    flat = [
        BEFORE_IT_EXISTED
        | {f"{section}.{key}": value for section, values in recipe.items() for key, value in values.items()}
        for recipe in (before, after)
    ]
    return [
        f"{key}: {' → '.join(_as_written(keys[key]) if key in keys else 'not set' for keys in flat)}"
        for key in sorted(flat[0] | flat[1])
        if key not in may_change and flat[0].get(key) != flat[1].get(key)
    ]


def _as_written(value: Any) -> str:
    """Write a value as a recipe has it, in one line: null, true, [{path: a.jsonl, weight: 2}]."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_written, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
