"""Runs on 2 and 4 ranks over gloo: the same result as on one, less on each, and an end when one dies.

Losses of 2 ranks and 1 rank are sums of the same numbers in another order, so they differ by float32's
rounding, and Adam divides by a gradient's own size: where that is next to zero, its rounding error decides a
whole step. `optimizer.eps: 1e-3` keeps such steps small; then weights agree to 1e-5, a hundredth of a step.
"""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rank_worker
import tiny_run
import tiny_tasks
from forks import ended, forked
from lisatune.cli import app
from lisatune.evaluate import evaluate_tasks
from lisatune.files.parts import open_tensors
from lisatune.memory.plan import plan_memory
from lisatune.models.load import load_model, load_tokenizer, stored_dtype
from lisatune.train.benchmarks import main_scores
from lisatune.train.loop import train
from lisatune.train.recipe_file import load_recipe
from rank_launcher import launch, start, wait_for_all

PLAIN = ["optimizer.eps=1e-3", "run.samples=0", "run.check_memory=false"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


METHODS = {
    "full": "full",
    "badam": "badam, switch_every: 2",
    "ends": "ends",
    "freezeout": "freezeout, period: 1",
    "greedy": "greedy",
    "smartfrz": "smartfrz, intervals: 4, confidence: 0.01",
}


class Runs:
    """A folder with a recipe, and what came of it on one rank, on two, and on four."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_run.write_model(folder / "model")
        self.recipe = tiny_run.write_recipe(
            folder, self.model, tiny_run.write_rows(folder / "rows.jsonl", 13)
        )
        pairs = tiny_run.write_pairs(folder / "pairs.jsonl", 13)
        self.paths = {"data.train=pairs": f"data.train={pairs}"}
        self.untied = tiny_run.write_model(folder / "untied", is_tied=False)
        self.paths["model.name=untied"] = f"model.name={self.untied}"

        self.recipes = {f"method.name={name}": folder / f"{name}.yaml" for name in METHODS}
        for name, method in METHODS.items():
            text = self.recipe.read_text().replace("{active: 2, period: 2}", f"{{name: {method}}}")
            (folder / f"{name}.yaml").write_text(text)

    def job(self, output: str, *overrides: str, **flags: bool) -> dict[str, Any]:
        keys = [*PLAIN, f"run.output={self.folder / output}", *overrides]
        recipe = next((path for key, path in self.recipes.items() if key in keys), self.recipe)
        keys = [self.paths.get(key, key) for key in keys if key not in self.recipes]
        return {"recipe": str(recipe), "overrides": keys, "flags": flags}

    def alone(self, output: str, *overrides: str, **flags: bool) -> Any:
        job = self.job(output, *overrides, **flags)
        return train(load_recipe(Path(job["recipe"]), job["overrides"]), **flags)

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / output / "model" / "model.safetensors")

    def metrics(self, output: str) -> list[dict[str, Any]]:
        lines = (self.folder / output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"]
SGD = ["optimizer.name=sgd", "optimizer.eps=1e-8", "optimizer.lr=0.1"]
UNTIED_ROWS = ["model.name=untied", "method.ends=every:2+rows"]
FACTORED = [*IN_BACKWARD, "optimizer.moments=factored"]
LEAST = ["run.precision=bf16", "optimizer.moments=8bit", "optimizer.rounding=stochastic"]
REWARD = ["data.train=pairs", "loss.name=reward", "loss.center=0.1", "run.accumulation=2"]
WAYS = {
    "fsdp": [],
    "replicate": ["run.sharding=replicate"],
    "accumulation": ["run.accumulation=2", "run.activation_checkpointing=true"],
    "mixed": ["run.precision=bf16-mixed"],
    "bf16": ["run.precision=bf16"],
    "head": ["method.ends=head", "optimizer.moments=factored"],
    "every": ["method.ends=every:2", "run.activation_checkpointing=frozen"],
    "modules": ["method.unit=module", "method.sampler=spectrum"],
    **{name: [f"method.name={name}"] for name in METHODS},
    "stochastic": ["run.precision=bf16", "optimizer.rounding=stochastic"],
    "8bit": ["optimizer.moments=8bit"],
    "ends-cpu": ["method.ends=every:2+8bit+cpu", "run.report_to=[tensorboard]"],
    "in-backward": IN_BACKWARD,
    "rows": [*UNTIED_ROWS, "run.accumulation=2"],
    "rows-copied": [*UNTIED_ROWS, *IN_BACKWARD, "run.sharding=replicate"],
    "span": ["method.ends=rows:40-200", "run.accumulation=2"],
    "least": [*LEAST, *IN_BACKWARD, "optimizer.state_device=cpu", "run.sharding=replicate"],
    "new-tokens": ["model.new_tokens=[<call>,<result>]", "method.ends=frozen"],
    "dpo": ["data.train=pairs", "loss.name=dpo", "run.accumulation=2"],
    "reward": REWARD,
    "reward-head": [*REWARD, "method.ends=head", "optimizer.moments=factored"],
    "reward-least": [*REWARD, "method.name=full", "run.sharding=replicate", *LEAST],
    "sgd": [*SGD, "optimizer.options={momentum: 0.9}"],
    "compiled": ["run.activation_checkpointing=frozen", "run.compile=true"],
}
NARROW = ("mixed", "bf16", "stochastic", "least", "reward-least")
WORSE = "and its step on them is not that on the whole"
REFUSED = {
    "muon": (["optimizer.name=muon"], WORSE),
    "lamb": (["optimizer.name=lamb"], WORSE),
    "lars": (["optimizer.name=lars", "optimizer.eps=1e-8"], WORSE),
    "adafactor": (["optimizer.name=adafactor", "optimizer.eps=1e-8"], WORSE),
    "sophia": (["optimizer.name=sophia", "optimizer.eps=1e-8"], "reads logits of the whole model"),
    "lion": (
        ["optimizer.name=lion", "optimizer.eps=1e-8", "optimizer.moments=8bit"],
        "optimizer.name lion runs in one process only, because a checkpoint cannot cut its moments in 8bit",
    ),
    "int8": (["method.frozen_weights=int8"], "that fully_shard has not divided, because codes are"),
    "corrected": (["method.correction=lora"], "that fully_shard has not divided, because adapters are"),
}
BEST = ["run.steps=6", "run.eval_every=1", "run.keep_best=true", "run.stop_after=2"]
BEST += ["optimizer.lr=0.2", "optimizer.schedule=constant"]  # falls for two steps, then rises
HALF = "run.batch_size=1"
FOUR = "run.batch_size=4"
MORE = ["run.steps=6", "optimizer.schedule=constant", "run.save_every=3"]
HSDP = ["run.sharding=hsdp", "run.copies=2"]
LATER = ["run.accumulation=2", "optimizer.schedule=constant", "run.save_every=2"]
RESUMED = ("rows", "factored", "torch.optim.NAdam")
CHECKS = ("draws", "statistics", "seeds", "updates")


@pytest.fixture(scope="module")
def two(runs: Runs) -> dict[str, list[Any]]:
    """Results of each rank by name, in processes that have planned for two ranks before."""
    plan_memory(load_recipe(runs.recipe, runs.job("planned")["overrides"]), ranks=2)
    jobs = {name: runs.job(f"two-{name}", HALF, *keys) for name, keys in WAYS.items()}
    jobs["compiled"]["backend"] = "eager"
    jobs |= {name: runs.job(f"no-{name}", *keys) for name, (keys, _) in REFUSED.items()}
    jobs |= {name: {"check": name} for name in CHECKS}
    jobs["best"] = runs.job("two-best", HALF, *BEST)
    jobs["saved"] = runs.job(
        "saved", "run.batch_size=2", "run.steps=3", "run.save_every=3", "optimizer.schedule=constant"
    )
    data = tiny_tasks.write_data(runs.folder / "questions")
    evaluate = ["run.evaluate=arc_easy,winogrande", f"run.evaluate_data={data}"]
    jobs["evaluate"] = runs.job("two-evaluate", HALF, *(evaluate if find_spec("lm_eval") else []))
    jobs["broken"] = runs.job("broken", HALF, *IN_BACKWARD, "run.on_nonfinite=skip") | {"breaks": True}
    small = ["run.batch_size=2", "optimizer.schedule=constant", "run.save_every=3", *LEAST]
    for name, is_async in (("small", "false"), ("small-resumed", "true")):
        jobs[name] = runs.job(name, *small, "run.steps=3", f"run.save_async={is_async}")
    jobs["resumed"] = runs.job("small-resumed", *small, "run.steps=6", resume=True)
    jobs["small-straight"] = runs.job("small-straight", *small, "run.steps=6")
    for name in RESUMED:
        for few in (128, 12):
            job = {"resumed": str(runs.folder / f"{name}-{few}"), "few": few, "name": name}
            jobs |= {f"{name}-{few}": job, f"{name}-{few}-again": job}
    jobs["narrow"] = runs.job("narrow", HALF, "run.save_dtype=bf16")
    return dict(
        zip(jobs, map(list, zip(*launch(2, runs.folder, list(jobs.values())), strict=True)), strict=True)
    )


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.filterwarnings("ignore:.*will never train:UserWarning")
def test_two_ranks_are_one_rank_on_the_same_global_batch(runs: Runs, two: dict[str, Any], name: str) -> None:
    assert "error" not in two[name][0], two[name][0]
    one = runs.alone(f"one-{name}", *(key for key in WAYS[name] if key != "run.compile=true"))
    # bf16 products and weights round at 2^-9; one spacing of a weight of 0.06 is 2.4e-4.
    close = {"atol": 5e-4, "rtol": 1e-2} if name in NARROW else CLOSE
    rel = 1e-2 if name in NARROW else 1e-4
    if name in ("8bit", "ends-cpu"):  # the second half of the embedding begins inside one rank's block of 256
        close = {"atol": 2e-4, "rtol": 1e-2}
    expected, got = runs.weights(f"one-{name}"), runs.weights(f"two-{name}")
    assert expected.keys() == got.keys()
    for key, weight in expected.items():
        assert weight.dtype == got[key].dtype
        torch.testing.assert_close(got[key], weight, **close, msg=lambda text, key=key: f"{key}: {text}")
    first, second = runs.metrics(f"one-{name}"), runs.metrics(f"two-{name}")
    assert [line.get("active_blocks") for line in first] == [line.get("active_blocks") for line in second]
    assert [line.get("tokens") for line in first] == [line.get("tokens") for line in second]
    for key in ("loss", "grad_norm", "held_out_loss", "held_out_accuracy"):
        pairs = [(a[key], b[key]) for a, b in zip(first, second, strict=True) if key in a]
        assert [b for _, b in pairs] == pytest.approx([a for a, _ in pairs], rel=rel)
    before = load_file((runs.untied if UNTIED_ROWS[0] in WAYS[name] else runs.model) / "model.safetensors")
    assert not all(torch.equal(weight.to(got[key].dtype), got[key]) for key, weight in before.items())
    assert one["steps"] == two[name][0]["steps"]


def test_an_update_of_parts_is_that_of_the_whole_bit_for_bit(two: dict[str, Any]) -> None:
    """Random numbers follow from the place in the whole matrix, and parts begin at a multiple of 256 here."""
    for apart in two["updates"]:
        assert apart.keys() == rank_worker.UPDATES.keys()
        assert {name: size for name, size in apart.items() if size} == {}


def test_no_draw_compiles_a_block_anew_on_several_ranks(two: dict[str, Any]) -> None:
    for rank in two["compiled"]:
        assert rank["graphs"][0] > 0
        assert rank["graphs"] == rank["graphs"][:1] * 4


def test_no_rank_updates_in_backward_if_the_loss_of_one_is_not_finite(
    runs: Runs, two: dict[str, Any]
) -> None:
    assert [each.get("skipped_steps") for each in two["broken"]] == [1, 1], two["broken"]
    norms = [line["grad_norm"] for line in runs.metrics("broken") if "grad_norm" in line]
    assert norms[1] == 0 < min(norms[0], *norms[2:])


def test_the_first_rank_alone_reports_to_trackers(runs: Runs, two: dict[str, Any]) -> None:
    assert "error" not in two["ends-cpu"][0]
    folder = runs.folder / "two-ends-cpu" / "trackers" / "two-ends-cpu"
    assert len(list(folder.glob("events*"))) == 1


def test_ranks_agree_on_the_best_step_and_on_ending_early(runs: Runs, two: dict[str, Any]) -> None:
    one = runs.alone("one-best", *BEST)
    assert (one["best_step"], one["steps"]) == (2, 4)
    assert [(each["best_step"], each["steps"]) for each in two["best"]] == [(2, 4)] * 2
    expected, got = runs.weights("one-best"), runs.weights("two-best")
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, atol=1e-3, rtol=1e-2)  # of steps of 0.2


def test_each_rank_holds_half_the_state(runs: Runs, two: dict[str, Any]) -> None:
    one = runs.alone("one-state")
    shares = [rank["peak_state_elements"] / one["peak_state_elements"] for rank in two["fsdp"]]
    assert shares == pytest.approx([0.5, 0.5], abs=0.01)
    copies = [rank["peak_state_bytes"] / one["peak_state_bytes"] for rank in two["replicate"]]
    assert copies == pytest.approx([1, 1], abs=0.01)
    assert [rank["parts"] / rank["whole"] for rank in two["draws"]] == pytest.approx([0.5, 0.5], abs=0.01)


def test_draws_are_equal_though_global_generators_differ(two: dict[str, Any]) -> None:
    first, second = two["draws"]
    assert first["drawn"] == second["drawn"]
    assert len({tuple(blocks) for blocks in first["drawn"]}) > 1


def test_statistics_of_divided_blocks_are_those_of_whole_ones_on_every_rank(two: dict[str, Any]) -> None:
    first, second = two["statistics"]
    assert first == second
    alone = rank_worker.statistics()
    assert first["drawn"] == [list(blocks) for blocks in alone["drawn"]]
    for name, norms in alone["norms"].items():
        assert first["norms"][name] == pytest.approx(norms, rel=1e-5, nan_ok=True)
    assert first["history"].keys() == alone["history"].keys() == set(map(str, alone["drawn"][-1]))
    for block, records in alone["history"].items():
        for got, expected in zip(first["history"][block], records, strict=True):
            assert got == pytest.approx(expected, abs=2e-5, nan_ok=True)


def test_frozen_blocks_hold_no_gradient_and_no_state_on_any_rank(two: dict[str, Any]) -> None:
    assert [rank["strangers"] for rank in two["draws"]] == [[], []]


def test_ranks_that_draw_other_blocks_are_told_so(two: dict[str, Any]) -> None:
    for result in two["seeds"]:
        assert "the blocks drawn for period 0 differ between ranks: rank 1 not as rank 0" in result["error"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_on_several_ranks_is_refused(runs: Runs, two: dict[str, Any], name: str) -> None:
    for result in two[name]:
        assert REFUSED[name][1] in result["error"]
    assert not (runs.folder / f"no-{name}").exists()


@pytest.fixture(scope="module")
def four(runs: Runs, two: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Results of each of four ranks by name."""
    assert "error" not in two["saved"][0]
    for name in ("on-one", "on-four"):
        shutil.copytree(runs.folder / "saved", runs.folder / name)
        shutil.copytree(runs.folder / "small", runs.folder / f"small-{name}")
    jobs = {
        "wrong": runs.job("on-four", "run.batch_size=2", *MORE, resume=True),
        "right": runs.job("on-four", HALF, *MORE, resume=True),
        "small": runs.job("small-on-four", HALF, *MORE, *LEAST, resume=True),
        **{name: {"resumed": str(runs.folder / f"{name}-12"), "few": 12, "name": name} for name in RESUMED},
        "hsdp": runs.job("four-hsdp", HALF, *HSDP, *LATER),
        "hsdp-rows": runs.job("four-rows", HALF, *HSDP, *UNTIED_ROWS),
        "hsdp-factored": runs.job("four-factored", HALF, *HSDP, *FACTORED),
        "thirds": runs.job("no-thirds", HALF, "run.sharding=hsdp", "run.copies=3"),
        "one-machine": runs.job("no-machine", HALF, "run.sharding=hsdp"),
    }
    done = launch(4, runs.folder, list(jobs.values()))
    return dict(zip(jobs, map(list, zip(*done, strict=True)), strict=True))


def test_a_run_saved_on_two_ranks_goes_on_with_one_and_with_four(runs: Runs, four: dict[str, Any]) -> None:
    runs.alone("straight", *MORE, FOUR)
    runs.alone("on-one", *MORE, FOUR, resume=True)
    runs.alone("small-on-one", *MORE, FOUR, *LEAST, resume=True)
    for first, *others in zip(four["wrong"], four["right"], four["small"], strict=True):
        assert "began with 4 sequences in a micro-step and would continue with 8" in first["error"]
        assert [each.get("steps") for each in others] == [6, 6], others
    for name in ("on-one", "on-four"):
        for key, weight in runs.weights("straight").items():
            torch.testing.assert_close(runs.weights(name)[key], weight, **CLOSE)
        # A spacing of bf16. Blocks of 256 that ranks cut elsewhere are quantised once more.
        for key, weight in runs.weights("small-straight").items():
            torch.testing.assert_close(runs.weights(f"small-{name}")[key], weight, atol=5e-4, rtol=1e-2)


def test_compact_state_resumes_bit_for_bit_on_as_many_ranks(runs: Runs, two: dict[str, Any]) -> None:
    assert two["resumed"][0].get("steps") == 6, two["resumed"][0]
    with open_tensors(runs.folder / "small/checkpoints/step-000003", "optimizer") as saved:
        assert "model.embed_tokens.weight//block_starts" in set(saved.keys())
    got = runs.weights("small-resumed")
    for key, weight in runs.weights("small-straight").items():
        assert torch.equal(got[key], weight), key


@pytest.mark.parametrize("name", RESUMED)
def test_other_state_resumes_on_any_number_of_ranks(
    runs: Runs, two: dict[str, Any], four: dict[str, Any], name: str
) -> None:
    """On as many ranks bit for bit, also if tables of rows have dropped entries and will drop more."""
    for few in (128, 12):
        assert two[f"{name}-{few}"] == two[f"{name}-{few}-again"]
    alone = torch.tensor(rank_worker.resumed(str(runs.folder / f"{name}-12"), 12, name))
    for weights in (*two[f"{name}-12"], *four[name]):
        torch.testing.assert_close(torch.tensor(weights), alone, **CLOSE)


def test_copies_of_a_divided_embedding_train_the_same_rows(runs: Runs, four: dict[str, Any]) -> None:
    assert "error" not in four["hsdp-rows"][0], four["hsdp-rows"][0]
    runs.alone("one-hsdp-rows", FOUR, *UNTIED_ROWS)
    for key, weight in runs.weights("one-hsdp-rows").items():
        torch.testing.assert_close(runs.weights("four-rows")[key], weight, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ranks_ask_benchmark_tasks_together(runs: Runs, two: dict[str, Any]) -> None:
    pytest.importorskip("lm_eval")
    assert "error" not in two["evaluate"][0], two["evaluate"][0]
    scores = [each["scores"] for each in two["evaluate"]]
    assert scores[0] == scores[1]
    folder = runs.folder / "two-evaluate"
    assert json.loads((folder / "summary.json").read_text())["scores"] == scores[0]
    model, data = str(folder / "model"), str(runs.folder / "questions")
    alone = evaluate_tasks(load_model(model), load_tokenizer(model), "arc_easy,winogrande", data=data)
    assert main_scores(alone) == scores[0]
    assert any(score["value"] > 0 for score in scores[0].values())
    written = json.loads((folder / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert {name: written[name]["metrics"] for name in written} == {n: alone[n]["metrics"] for n in alone}


def test_what_ranks_write_while_they_train_has_the_same_bytes(runs: Runs, two: dict[str, Any]) -> None:
    assert [each.get("steps") for each in two["small-resumed"]] == [3, 3], two["small-resumed"]
    folders = [runs.folder / name / "checkpoints" / "step-000003" for name in ("small", "small-resumed")]
    files = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    for name in files[0]:
        if name not in ("state.json", "manifest.json"):  # which tell the time
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_two_copies_on_two_ranks_each_are_one_rank(runs: Runs, four: dict[str, Any]) -> None:
    assert "error" not in four["hsdp"][0], four["hsdp"][0]
    one = runs.alone("one-hsdp", FOUR, *LATER)
    for key, weight in runs.weights("one-hsdp").items():
        torch.testing.assert_close(runs.weights("four-hsdp")[key], weight, **CLOSE)
    norms = [[m["grad_norm"] for m in runs.metrics(f"{n}-hsdp") if "loss" in m] for n in ("one", "four")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    shares = [rank["peak_state_elements"] / one["peak_state_elements"] for rank in four["hsdp"]]
    assert shares == pytest.approx([0.5] * 4, abs=0.01)


def test_copies_add_up_factored_moments_in_backward(runs: Runs, four: dict[str, Any]) -> None:
    assert "error" not in four["hsdp-factored"][0], four["hsdp-factored"][0]
    runs.alone("one-factored", FOUR, *FACTORED)
    for key, weight in runs.weights("one-factored").items():
        torch.testing.assert_close(runs.weights("four-factored")[key], weight, **CLOSE)


def test_ranks_of_one_copy_write_a_checkpoint_that_one_rank_continues(
    runs: Runs, four: dict[str, Any]
) -> None:
    written = sorted(file.name for file in (runs.folder / "four-hsdp/checkpoints/step-000002").iterdir())
    parts = [
        f"{name}-0000{part}-of-00002.safetensors" for name in ("optimizer", "weights") for part in (1, 2)
    ]
    assert written == sorted([*parts, "index.json", "manifest.json", "other.safetensors", "state.json"])
    shutil.copytree(runs.folder / "four-hsdp", runs.folder / "from-hsdp")
    runs.alone("from-hsdp", FOUR, *LATER, "run.steps=6", resume=True)
    runs.alone("one-later", FOUR, *LATER, "run.steps=6")
    for key, weight in runs.weights("one-later").items():
        torch.testing.assert_close(runs.weights("from-hsdp")[key], weight, **CLOSE)


def test_copies_that_the_ranks_cannot_hold_are_refused(runs: Runs, four: dict[str, Any]) -> None:
    for thirds, machine in zip(four["thirds"], four["one-machine"], strict=True):
        assert "run.copies 3 does not divide 4 ranks" in thirds["error"]
        assert "all 4 ranks are on one; set run.copies" in machine["error"]
    assert not list(runs.folder.glob("no-*"))


def test_divided_weights_are_written_in_the_dtype_asked_for(runs: Runs, two: dict[str, Any]) -> None:
    assert "error" not in two["narrow"][0], two["narrow"][0]
    narrow, wide = runs.weights("narrow"), runs.weights("two-fsdp")
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[key], weight.bfloat16()) for key, weight in wide.items())
    assert stored_dtype(str(runs.folder / "narrow" / "model")) == torch.bfloat16


def test_the_written_model_is_a_plain_folder(runs: Runs, two: dict[str, Any]) -> None:
    assert two["fsdp"][0]["model"]
    folder = runs.folder / "two-fsdp" / "model"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(folder)


def test_ranks_that_accelerate_starts_train_the_same(runs: Runs, two: dict[str, Any]) -> None:
    """Accelerate, and torchrun in it, starts processes that note their environment; our ranks get it."""
    job, folder = runs.job("accelerate", HALF), runs.folder / "accelerated"
    folder.mkdir()
    note = folder / "note.py"
    note.write_text(
        "import json, os, pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1], os.environ['RANK'] + '.json')\n"
        "file.write_text(json.dumps(dict(os.environ)))\n"
    )
    command = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", str(note), str(folder)]

    def accelerate() -> int:
        launch_command(launch_command_parser().parse_args(command))
        return 0

    log = folder / "accelerate.log"
    assert ended(forked(accelerate, log), within=120) == 0, log.read_text()
    noted = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for each in noted:
        assert each["WORLD_SIZE"] == "2"
        each["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher's store ended with it
    pids = start(2, lambda: app.main(["train", job["recipe"], *job["overrides"]]), folder, noted)
    wait_for_all(pids, folder, within=120)
    summary = json.loads((runs.folder / "accelerate" / "summary.json").read_text())
    assert summary["peak_state_elements"] == two["fsdp"][0]["peak_state_elements"]
    for key, weight in runs.weights("two-fsdp").items():
        assert torch.equal(runs.weights("accelerate")[key], weight), key


def test_a_rank_that_dies_ends_the_run_with_a_message(runs: Runs) -> None:
    job, folder = runs.job("dies", HALF, "run.steps=100000"), runs.folder / "dying"
    folder.mkdir()
    pids = start(2, lambda: app.main(["train", job["recipe"], *job["overrides"]]), folder)
    try:
        metrics = runs.folder / "dies" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline, (folder / "rank-0.log").read_text()
            time.sleep(0.05)
        os.kill(pids[1], signal.SIGKILL)
        assert ended(pids.pop(), within=45) == -signal.SIGKILL
        code = ended(pids[0], within=45)
        assert code is not None, "rank 0 hangs"
        pids.clear()
        assert code != 0
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
    assert "rank 0 lost another rank and cannot continue alone" in (folder / "rank-0.log").read_text()
