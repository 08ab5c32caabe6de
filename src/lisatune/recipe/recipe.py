"""A whole recipe, and what must fit between its sections."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lisatune.recipe.data import DataConfig
from lisatune.recipe.loss import LossConfig
from lisatune.recipe.model import ModelConfig
from lisatune.recipe.optimizer import OptimizerConfig
from lisatune.recipe.run import RunConfig

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run. `method` is an instance of a class in `lisatune.methods.METHODS`."""

    model: ModelConfig
    data: DataConfig
    method: Any
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self._check_ends_lr()
        if self.run.eval_every is not None and not self.data.holds_out:
            raise ValueError(
                f"run.eval_every={self.run.eval_every} needs held-out data, and data.validation_share is 0; "
                "hold out a share, give data.validation, or set run.eval_every to null"
            )
        if self.optimizer.in_backward and self.run.accumulation > 1:
            raise ValueError(
                "optimizer.in_backward frees a gradient before the next micro-step could add to it, so "
                f"run.accumulation={self.run.accumulation} is impossible; set it to 1"
            )
        if self.model.new_tokens and self.method.masters is not None:
            raise ValueError(
                "model.new_tokens cannot work with method.frozen_weights yet: exact weights come from the "
                "model's files, which lack the new rows; set frozen_weights to exact"
            )
        if self.run.save_async and self.method.masters == "disk":
            raise ValueError(
                "run.save_async copies exact weights to host memory, and method.master=disk keeps them on "
                "disk because host memory is short; set run.save_async to false, or method.master to ram"
            )
        if self.data.streaming and self.run.steps is None:
            raise ValueError("data.streaming has no end, so run.steps must say how long to train; set it")
        if self.loss.rows_per_record == 2:
            self._check_pairs()
        if self.loss.has_score:
            self._check_score()
        self.method.check_mix(self.data, self.run)
        self.method.check_loss(self.loss)
        self.method.check_optimizer(self.optimizer)

    def _check_ends_lr(self) -> None:
        """Refuse a rate of the ends where none of them trains."""
        if self.optimizer.ends_lr is None:
            return
        freezes_ends = self.method.freezes_ends and not self.model.new_tokens
        if freezes_ends or not self.method.has_ends:
            setting = " with method.ends=frozen" if freezes_ends else ""
            raise ValueError(
                f"optimizer.ends_lr={self.optimizer.ends_lr:g} does nothing with method {self.method.name}, "
                f"which trains no embedding, head or final norm{setting}; set it to null"
            )

    def _check_pairs(self) -> None:
        """Refuse settings that cannot work where records are pairs of answers."""
        data, loss_on = self.data, self.data.loss_on
        kinds = [source.kind for source in data.sources if source.kind != "auto"]
        paths = [source.path for source in data.sources]
        roles = f"[{', '.join(loss_on)}]" if isinstance(loss_on, tuple) else loss_on
        self._refuse(
            (data.streaming, "data.streaming=true", "pairs are read before training", "false"),
            (
                data.packing,
                "data.packing=true",
                "an answer is scored as a whole, in a sequence of its own",
                "false",
            ),
            (
                kinds != [],
                f"data.kind={kinds[0] if kinds else 'auto'}",
                "its records have chosen and rejected",
                "auto",
            ),
            (
                loss_on not in ("auto", "answers"),
                f"data.loss_on={roles}",
                "only answers are compared",
                "answers",
            ),
            (
                data.long == "split",
                "data.long=split",
                "a piece of an answer cannot be preferred",
                "cut or drop",
            ),
            (
                "python-docs" in paths,
                f"data.train={data.train_name}",
                "it has no pairs of answers",
                "a file that has",
            ),
            (
                self.optimizer.name == "sophia",
                "optimizer.name=sophia",
                "its curvature is that of next-token losses",
                "another optimizer",
            ),
        )

    def _check_score(self) -> None:
        """Refuse settings that cannot work where the model gives scores and writes no text."""
        run, why = self.run, "a reward model writes no text"
        self._refuse(
            (run.samples not in (0, RunConfig.samples), f"run.samples={run.samples}", why, "0"),
            (run.evaluate is not None, f"run.evaluate={run.evaluate}", why, "null"),
        )

    def _refuse(self, *reasons: tuple[bool, str, str, str]) -> None:
        """Refuse the first setting that cannot work with the loss.

        Args:
            reasons: whether it is set, key and value, why it cannot work, and what to set instead.
        """
        for is_set, setting, why, instead in reasons:
            if is_set:
                raise ValueError(
                    f"{setting} cannot work with loss.name={self.loss.name}: {why}; set it to {instead}"
                )

    @property
    def model_source(self) -> dict[str, Any]:
        """Arguments of `load_model` and `meta_model`: those of `model.source`, and `score_seed`."""
        return self.model.source | {"score_seed": self.run.seed if self.loss.has_score else None}

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe with every default filled in, as plain dicts, lists, numbers and strings."""
        sections = asdict(self)
        if not isinstance(self.data.train, str):
            keys = [
                {key: value for key, value in source.items() if value is not None}
                for source in sections["data"]["train"]
            ]
            sections["data"]["train"] = keys
        sections["method"] = {"name": self.method.name} | sections["method"]
        return {name: _plain(section) for name, section in sections.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
