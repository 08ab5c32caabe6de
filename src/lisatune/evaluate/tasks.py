"""Name and open the tasks of a benchmark: presets with the LISA paper's settings, or any task of lm-eval.

The tasks are those of EleutherAI's lm-evaluation-harness (`lisatune[eval]`), which also asks and scores them
(`evaluate.benchmark`). With a folder of local data no task touches the network (`evaluate.local_tasks`).
"""

import difflib
import logging
import multiprocessing
import random
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lisatune.console import ending_signals, first_line
from lisatune.evaluate.local_tasks import check_shots, write_local_task

__all__ = ["PRESETS", "OpenTask", "Preset", "import_harness", "no_trace", "open_tasks", "split_tasks"]


@dataclass(frozen=True)
class Preset:
    """A task with the LISA paper's settings (arXiv 2403.17919), or the usual ones where it names none."""

    task: str
    """Name of the task or group in the harness."""

    shots: int
    """Examples with their answers before each question."""

    folder: str
    """Where its definition is, below lm_eval/tasks."""

    about: str
    """What a reader of the score has to know."""


PRESETS = {
    "mmlu": Preset("mmlu", 5, "mmlu/default", "57 subjects, examples from dev"),
    "agieval": Preset(
        "agieval_en",
        0,
        "agieval",
        "English tasks only; the paper's 9,316 questions count both languages (lm:agieval has both)",
    ),
    "winogrande": Preset("winogrande", 5, "winogrande", "validation questions of winogrande_xl"),
    "gsm8k": Preset("gsm8k_cot", 8, "gsm8k", "chain of thought with the 8 examples of Wei et al."),
    "pubmedqa": Preset("pubmedqa", 5, "pubmedqa", "yes, no or maybe"),
    "arc_easy": Preset("arc_easy", 0, "arc", "not in the paper; small models are above chance on it"),
}
"""Tasks by the names that `lisatune evaluate --tasks` takes."""

OWN = "lm:"
"""Before the name of a task: the harness's task with its own settings."""

SEED = 1234
"""Seed of the choice of few-shot examples: the one of the harness's command line."""


@dataclass
class OpenTask:
    """A task whose questions are read and whose model is still to come."""

    name: str
    """As it was asked for."""

    leaves: dict[str, Any]
    """The harness's tasks by name: one, or those of a group."""

    group: Any = None
    """The harness's group, which averages over its tasks; None for a single task."""

    about: str = ""

    limit: int | None = None
    """Ask only the first questions, of each task of a group; None: all of them."""

    notes: list[str] = field(default_factory=list)
    """What makes this task differ from the stock one, such as few-shot examples from another split."""

    data: str | None = None
    """Hash of the local rows; None if the questions are the hub's."""


def import_harness() -> Any:
    """Import lm_eval.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(f'{error}; benchmarks need a package: pip install "lisatune[eval]"') from None
    return lm_eval


def split_tasks(text: str) -> dict[str, int | None]:
    """Read `mmlu:limit=5,arc_easy,winogrande:limit=200`: names of tasks, and how many questions to ask.

    A limit at the end counts for all names that have none of their own.

    Raises:
        ValueError: there is no name, one twice, or a limit is below 1.
    """
    tasks: dict[str, int | None] = {}
    last = None
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, limits, limit = part.partition(":limit=")
        if "=" in name:
            raise ValueError(
                f"{part!r} sets something other than a limit; write {name.split(':')[0]}:limit=200"
            )
        if not name.isprintable() or not name:
            raise ValueError(f"{part!r} names no task; known: {', '.join(PRESETS)}, lm:NAME")
        if limits and (not limit.isdecimal() or int(limit) < 1):
            raise ValueError(f"the limit of {part!r} must be a number >= 1; write {name}:limit=200")
        if name in tasks:
            raise ValueError(f"the tasks name {name} twice; leave one out")
        last = int(limit) if limits else None
        tasks[name] = last
    if not tasks:
        raise ValueError(f"{text!r} names no task; known: {', '.join(PRESETS)}, lm:NAME")
    return {name: last if limit is None else limit for name, limit in tasks.items()}


@contextmanager
def open_tasks(
    names: str | Sequence[str] | Mapping[str, int | None],
    *,
    shots: int | None = None,
    data: str | Path | None = None,
) -> Iterator[list[OpenTask]]:
    """Open tasks and read their questions, before any model loads.

    Args:
        names: `PRESETS`, or tasks, groups or tags of the harness; `lm:NAME` takes the harness's own
            number of examples also where there is a preset of that name. A string, or a mapping, may have a
            limit for each (`split_tasks`).
        shots: examples before each question, in place of a task's own number.
        data: folder with a folder for each task; None takes the questions from the hub.

    Yields:
        The tasks in the order of `names`. They read from temporary files, which go at the end of the block.

    Raises:
        ValueError: a task is unknown (the message gives the nearest names), cannot run here, cannot show
            examples (`check_shots`), or its local rows are wrong.
        FileNotFoundError: local data of a task are missing, or the hub cannot be reached.
        ImportError: the harness is not installed.
    """
    import_harness()
    limits = split_tasks(names) if isinstance(names, str) else names
    if not isinstance(limits, Mapping):
        limits = dict.fromkeys(limits)
    if shots is not None and shots < 0:
        raise ValueError(f"shots must be >= 0, got {shots}")
    with ExitStack() as stack:
        folder = None
        if data is not None:
            folder = Path(data).expanduser()
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {data}; give one that has a folder of questions for each task"
                )
        where = Path(stack.enter_context(TemporaryDirectory(prefix="lisatune-tasks-")))
        with no_trace():
            opened = [_open_task(name, shots, folder, where / f"{i}") for i, name in enumerate(limits)]
            for task in opened:
                task.limit = limits[task.name]
        yield opened


@contextmanager
def no_trace() -> Iterator[None]:
    """Hide log lines and progress bars of harness and datasets; restore random generators at the end."""
    import datasets
    import numpy as np
    import tqdm  # type: ignore[import-untyped, unused-ignore]
    from lm_eval.api import metrics
    from lm_eval.api import task as asking

    # The harness has bars, lines and processes of its own (a bootstrap) and no options for them. A process
    # that it ends has our handler, which raises.
    replaced: list[tuple[Any, str, Any, Any]] = [
        (asking, "tqdm", asking.tqdm, partial(asking.tqdm, disable=True)),
        (tqdm, "tqdm", tqdm.tqdm, partial(tqdm.tqdm, disable=True)),
        (metrics, "print", print, lambda *unused: None),
        (
            multiprocessing,
            "Pool",
            multiprocessing.Pool,
            partial(multiprocessing.Pool, initializer=_end_quietly),
        ),
    ]
    for module, name, _, ours in replaced:
        setattr(module, name, ours)
    log, had_bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled() is False
    level, states = log.level, (random.getstate(), np.random.get_state())
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, name, theirs, _ in replaced:
            setattr(module, name, theirs)
        log.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _end_quietly() -> None:
    """Let SIGTERM and SIGHUP end a process of the harness without a traceback."""
    for signum in ending_signals():
        signal.signal(signum, signal.SIG_DFL)


def _open_task(name: str, shots: int | None, data: Path | None, where: Path) -> OpenTask:
    """Open one task; its generated files go to `where`."""
    stock = Path(str(files("lm_eval"))) / "tasks"
    preset = PRESETS.get(name)
    target = preset.task if preset else name.removeprefix(OWN)
    opened = OpenTask(name, {}, about=preset.about if preset else "")
    wanted = shots if shots is not None else preset.shots if preset else None
    if data is not None:
        definitions, group = _definitions(target, stock, preset)
        local = write_local_task(name.removeprefix(OWN), definitions, data, where, shots=wanted, group=group)
        opened.notes, opened.data = local.notes, local.sha256
        manager = _manager([where])
    else:
        manager = _manager([stock / preset.folder]) if preset else _all_tasks()
    loaded = _load(manager, name, target)
    opened.leaves = loaded["tasks"]
    opened.group = loaded["groups"].get(target)
    for leaf, task in opened.leaves.items():
        _check(leaf, task)
        if data is None and shots:
            check_shots(leaf, task.config.to_dict(), shots)
        own = task.get_config("num_fewshot")
        if wanted is not None and own != 0:
            task.set_config(key="num_fewshot", value=wanted)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return opened


def _definitions(
    target: str, stock: Path, preset: Preset | None
) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """Find the stock YAML of a task, or those of all tasks of a group, by name; and the group's own settings.

    Raises:
        ValueError: there is no such task.
    """
    manager = _manager([stock / preset.folder]) if preset else _all_tasks()
    _check_known(manager, target)
    found: dict[str, Path] = {}
    waiting = [target]
    while waiting:
        entry = manager.task_index[waiting.pop(0)]
        kind = entry.kind.name
        if kind == "TASK" and entry.yaml_path is not None:
            found[entry.name] = entry.yaml_path
        elif kind == "TAG":
            waiting += sorted(entry.tags)
        elif kind == "GROUP":
            children = (entry.cfg or {}).get("task", [])
            if not all(isinstance(child, str) for child in children):
                raise ValueError(f"the group {target} cannot take local data; name its tasks one by one")
            waiting += children
        else:
            raise ValueError(f"the task {entry.name} is written in Python and cannot take local data")
    entry = manager.task_index[target]
    if target in found:
        return found, None
    kept = ("aggregate_metric_list", "metadata")
    return found, {"group": target} | {key: (entry.cfg or {}).get(key) for key in kept}


def _manager(folders: list[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _all_tasks() -> Any:
    """Read the definitions of all tasks of the harness; that takes about ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_known(manager: Any, target: str) -> None:
    if target not in manager.all_tasks:
        begun = [name for name in PRESETS if name.startswith(target)]
        close = difflib.get_close_matches(target, dict.fromkeys([*PRESETS, *manager.all_tasks]), n=4)
        near = list(dict.fromkeys([*begun, *close]))[:4]
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"unknown task {target!r}.{hint} Presets: {', '.join(PRESETS)}; `lm-eval ls tasks` lists the rest"
        )


def _load(manager: Any, name: str, target: str) -> Any:
    """Let the harness read a task with its questions."""
    _check_known(manager, target)
    try:
        return manager.load([target])
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"the questions of task {name} are not on this machine ({first_line(error)}); connect to the "
            "hub, or give a folder of questions as data (in a recipe: run.evaluate_data)"
        ) from error
    except Exception as error:  # definitions are code and can raise anything
        raise ValueError(f"the harness cannot open task {name}: {first_line(error)}") from error


def _check(leaf: str, task: Any) -> None:
    """Refuse what a language model alone cannot answer safely."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(
            f"task {leaf} runs program code that the model writes; lisatune does not run it, "
            "`lm-eval --confirm_run_unsafe_code` does"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"task {leaf} asks about pictures or sound; lisatune evaluates text only")
