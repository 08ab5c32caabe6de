import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

import tiny
from lisatune import LISA, AdamW, build_adamw, find_layers, scale_block_lr
from lisatune.files.tensors import write_stream
from lisatune.lisa.frozen_state import StatePolicy
from lisatune.runs.checkpoint import (
    begin_checkpoint,
    copied_bytes,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from lisatune.runs.manifest import FILES, DamagedCheckpointError, newest_checkpoint, prune


class Tiny(nn.Module):
    """Tied ends, dropout, a buffer, and blocks of which only some train: what a fine-tuned decoder has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + self.drop(torch.tanh(block(hidden)))
        return self.head(self.norm(hidden))


class Run:
    """A training run that draws from every RNG, with block 1 frozen."""

    def __init__(self, seed: int = 0, *, model: nn.Module | None = None, groups: int = 2) -> None:
        torch.manual_seed(seed)
        self.model = Tiny() if model is None else model
        parameters = list(self.model.parameters())
        split = [parameters] if groups == 1 else [parameters[:1], parameters[1:]]
        self.optimizer = torch.optim.AdamW([{"params": part} for part in split], lr=1e-2, betas=(0.8, 0.9))
        self.model.blocks[1].requires_grad_(False)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            ids = torch.tensor(
                [[random.randrange(11) for _ in range(6)], np.random.randint(0, 11, 6).tolist()]
            )
            loss = nn.functional.cross_entropy(self.model(ids.flatten()), ids.flatten().roll(-1))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    def save(self, folder: Path, step: int, **extra: Any) -> Path:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return save_checkpoint(folder, step=step, **parts, extra=extra)

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)

    def everything(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    run = Run().train(4)
    path = run.save(tmp_path, 4, micro_step=8, order=("a", 1))
    straight = run.train(5)

    random.seed(99)
    np.random.seed(99)
    resumed = Run(seed=1).train(2)
    assert resumed.load(path) == {"micro_step": 8, "order": ("a", 1)}
    assert_equal(resumed.train(5).everything(), straight.everything())
    assert resumed.scheduler.state_dict() == straight.scheduler.state_dict()
    assert resumed.optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_state_of_frozen_parameters_stays_absent(tmp_path: Path) -> None:
    run = Run().train(2)
    path = run.save(tmp_path, 2)
    resumed = Run(seed=1)
    resumed.load(path)
    names = dict(resumed.model.named_parameters())
    with_state = {name for name, parameter in names.items() if parameter in resumed.optimizer.state}
    assert with_state == set(names) - {"blocks.1.weight", "blocks.1.bias"}


def test_files_hold_tied_weights_once_and_no_pickle(tmp_path: Path) -> None:
    path = Run().train(1).save(tmp_path, 12)
    assert path.name == "step-000012"
    assert {file.name for file in path.iterdir()} == {*FILES, "manifest.json"}
    weights = safetensors.torch.load_file(path / "weights.safetensors")
    assert "embedding.weight" in weights
    assert "norm.running_mean" in weights
    assert not {"head.weight", "scratch"} & set(weights)
    optimizer = safetensors.torch.load_file(path / "optimizer.safetensors")
    assert "blocks.0.weight//exp_avg_sq" in optimizer


def test_what_hooks_add_to_the_optimizer_state_goes_through_its_load_hooks(tmp_path: Path) -> None:
    def hooked(run: Run) -> list[Any]:
        seen: list[Any] = []
        added = {"active_blocks": [0, 2], "settings": {"period": 3}, "norms": torch.arange(3.0)}
        run.optimizer.register_state_dict_post_hook(lambda _, state: state.update(lisa=added))
        run.optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["lisa"]))
        return seen

    run, resumed = Run().train(1), Run(seed=1)
    hooked(run)
    seen = hooked(resumed)
    resumed.load(run.save(tmp_path, 1))
    assert_equal(seen[0]["norms"], torch.arange(3.0))
    assert (seen[0]["active_blocks"], seen[0]["settings"]) == ([0, 2], {"period": 3})


def test_float32_state_of_bf16_weights_stays_float32(tmp_path: Path) -> None:
    model = Tiny(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters())
    moments = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        optimizer.state[parameter]["exp_avg"] = moments[name]
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    other = Tiny(torch.bfloat16)
    resumed = torch.optim.SGD(other.parameters())
    load_checkpoint(path, model=other, optimizer=resumed)
    assert_equal({n: resumed.state[p]["exp_avg"] for n, p in other.named_parameters()}, moments)


@pytest.mark.filterwarnings("ignore:the weights are bfloat16 and Adafactor rounds:UserWarning")
def test_float32_state_that_lisa_keeps_on_the_host_stays_float32(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, LISA]:
        model = tiny.llama().bfloat16()
        optimizer = Adafactor(model.parameters(), lr=1e-2, beta1=0.9, relative_step=False)
        return model, optimizer, LISA(model, optimizer, period=2, state="cpu")

    model, optimizer, _ = start()
    tiny.fit(model, optimizer, 3)
    path = save_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer)
    tiny.fit(model, optimizer, range(3, 8))
    other, resumed, _ = start()
    load_checkpoint(path, model=other, optimizer=resumed)
    tiny.fit(other, resumed, range(3, 8))
    assert_equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert {entry["exp_avg"].dtype for entry in resumed.state_dict()["state"].values()} == {torch.float32}
    tiny.assert_same_weights(other, model)


def test_checkpoint_of_scaled_rates_that_nothing_marked_yet_goes_on_with_them(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, LISA]:
        model = tiny.llama()
        optimizer = build_adamw(model, find_layers(model), lr=1e-2)
        scale_block_lr(optimizer, [1 / 3] * 6)
        return model, optimizer, LISA(model, optimizer, period=2)

    def as_older_versions_did(_: Any, state: dict[str, Any]) -> None:
        del state["lisa"]["settings"]["lr_scaling"]
        for group in state["param_groups"]:
            group.pop("lr_scaling", None)

    model, optimizer, _ = start()
    tiny.fit(model, optimizer, 3)
    hook = optimizer.register_state_dict_post_hook(as_older_versions_did)
    path = save_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer)
    hook.remove()
    tiny.fit(model, optimizer, range(3, 6))
    other, resumed, lisa = start()
    load_checkpoint(path, model=other, optimizer=resumed)
    assert lisa.lr_factor(-1) == 1.0
    tiny.fit(other, resumed, range(3, 6))
    tiny.assert_same_weights(other, model)


def test_torchs_moments_of_bf16_weights_become_those_of_our_adamw(tmp_path: Path) -> None:
    model = tiny.llama().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tiny.fit(model, optimizer, 2)
    path = save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer)
    ours = AdamW(model.parameters(), lr=1e-2, moments="fp32")
    load_checkpoint(path, model=model, optimizer=ours)
    assert {entry["exp_avg"].dtype for entry in ours.state.values()} == {torch.float32}
    tiny.fit(model, ours, range(2, 4))


def damage(path: Path, kind: str) -> None:
    weights = path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    if kind == "flipped bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif kind == "torn file":
        weights.write_bytes(content[: len(content) // 2])
    elif kind == "missing file":
        weights.unlink()
    elif kind == "torn manifest":
        (path / "manifest.json").write_text('{"format": 1, "fi')
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
    else:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 4}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped bit", "damaged: weights.safetensors changed after it was written"),
        ("torn file", "damaged: weights.safetensors has another size"),
        ("missing file", "no complete checkpoint in .*weights.safetensors"),
        ("torn manifest", "no complete checkpoint in"),
        ("no manifest", "no complete checkpoint in .*manifest.json"),
        ("other format", "has format 4, and this version reads 1 to 3"),
    ],
)
def test_damage_is_detected_before_anything_changes(tmp_path: Path, kind: str, message: str) -> None:
    older = Run().train(1).save(tmp_path, 9)
    path = Run().train(2).save(tmp_path, 10)
    damage(path, kind)
    run = Run(seed=1).train(1)
    before = copy.deepcopy(run.everything())
    with pytest.raises(ValueError, match=message):
        run.load(path)
    assert_equal(run.everything(), before)
    assert newest_checkpoint(tmp_path) == (path if kind == "flipped bit" else older)  # hashing waits for load


def test_other_files_in_the_folder_are_never_opened(tmp_path: Path) -> None:
    path = Run().train(1).save(tmp_path, 1)
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save(Malicious(), path / "optimizer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../optimizer.pt"] = manifest["files"]["optimizer.pt"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    Run(seed=1).load(path)
    assert not marker.exists()


def test_a_pickle_under_the_name_of_a_weights_file_is_refused(tmp_path: Path) -> None:
    path = Run().train(1).save(tmp_path, 1)
    torch.save({}, path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"damaged: weights.safetensors"):
        Run().load(path)


class Wider(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: Run(model=Tiny(torch.bfloat16)),
            r"embedding.weight was torch.float32 \[11, 8\] and is torch.bfloat16",
        ),
        (lambda: Run(model=Wider()), r"blocks.2.bias was torch.float32 \[8\] and is not there"),
        (lambda: Run(groups=1), "blocks.0.weight was in group 1 and is in group 0"),
    ],
)
def test_another_model_or_optimizer_is_refused_by_name_and_left_alone(
    tmp_path: Path, other: Any, message: str
) -> None:
    path = Run().train(1).save(tmp_path, 1)
    run = other()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"step-000001 does not fit: .*{message}"):
        run.load(path)
    assert_equal(run.model.state_dict(), before)


def test_a_missing_scheduler_is_refused(tmp_path: Path) -> None:
    run = Run().train(1)
    path = run.save(tmp_path, 1)
    with pytest.raises(ValueError, match="saved with a scheduler"):
        load_checkpoint(path, model=run.model, optimizer=run.optimizer)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")]
)
def test_a_full_disk_leaves_earlier_checkpoints_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    run = Run().train(1)
    path = run.save(tmp_path, 1)

    def failing(file: Path, *rest: Any) -> None:
        write_stream(file, *rest)
        if file.name == "optimizer.safetensors":
            raise error

    monkeypatch.setattr("lisatune.files.parts.write_stream", failing)
    for step in (1, 2):
        with pytest.raises(OSError, match=f"could not write .*step-00000{step} .*{error.strerror}"):
            run.save(tmp_path, step)
    assert list(tmp_path.iterdir()) == [path]
    Run(seed=1).load(path)


def test_values_that_are_not_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot save extra.when: object"):
        Run().train(1).save(tmp_path / "checkpoints", 1, when=object())
    assert not (tmp_path / "checkpoints").exists()


def test_newest_and_prune_go_by_number_and_completeness(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    run = Run().train(1)
    paths = {step: run.save(tmp_path, step) for step in (999_999, 1_000_000, 1_000_001, 2)}
    damage(paths[1_000_001], "torn file")
    shutil.copytree(paths[2], tmp_path / ".step-000003.tmp-0123abcd")
    (tmp_path / "step-x").mkdir()
    assert newest_checkpoint(tmp_path) == paths[1_000_000]
    prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-1000000",
        "step-999999",
        "step-1000001",
        "step-x",
    }
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        prune(tmp_path, 0)


def test_prune_keeps_the_best_step_of_every_checkpoint_that_it_keeps(tmp_path: Path) -> None:
    run = Run().train(1)
    for step in range(1, 8):
        run.save(tmp_path, step)
    prune(tmp_path, 2, best=(1, 3, 7))  # 3 is the best that step 6 knows, 7 is its own
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:06d}" for step in (3, 6, 7)}
    prune(tmp_path, 1, best=(1, 3, 7))
    assert {path.name for path in tmp_path.iterdir()} == {"step-000007"}


def test_weights_are_restored_alone(tmp_path: Path) -> None:
    run = Run().train(1)
    path = run.save(tmp_path, 1)
    before = tiny.weights(run.model)
    run.train(1)
    state = copy.deepcopy(run.optimizer.state_dict()["state"])
    load_weights(path, model=run.model)
    assert not tiny.moved(before, run.model)
    for number, entry in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[number][key]) for key, value in entry.items())
    damage(path, "torn file")
    with pytest.raises(DamagedCheckpointError, match="is damaged"):
        load_weights(path, model=run.model)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = Run().train(1)
    run.save(tmp_path, 1, note="first")
    path = run.save(tmp_path, 1, note="second")
    assert run.load(path) == {"note": "second"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*units will never train:UserWarning")
@pytest.mark.parametrize("kept", ["keep", "cpu"])
def test_copies_hold_what_was_there_although_training_goes_on(kept: StatePolicy, tmp_path: Path) -> None:
    model = tiny.llama()
    base = model.model.embed_tokens.weight
    optimizer = build_adamw(model, find_layers(model), lr=1e-2)
    LISA(model, optimizer, active=2, period=2, state=kept)
    tiny.fit(model, optimizer, 3)
    path = save_checkpoint(tmp_path / "now", step=3, model=model, optimizer=optimizer)
    writer = begin_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer, copies=True)
    before = base.detach().clone()
    tiny.fit(model, optimizer, range(3, 8))
    assert not torch.equal(base, before)
    writer.write()
    writer.finish()
    for file in path.iterdir():
        assert file.read_bytes() == (writer.target / file.name).read_bytes(), file.name
    assert copied_bytes(model, optimizer, "cpu") < copied_bytes(model, optimizer, "cuda")


def test_what_the_optimizer_does_not_hold_is_not_copied(tmp_path: Path) -> None:
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    assert copied_bytes(model, optimizer, "cpu") == model.lm_head.weight.nbytes
    writer = begin_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer, copies=True)
    writer.write()
    writer.finish()
    other = tiny.llama(seed=1)
    load_weights(writer.target, model=other)
    tiny.assert_same_weights(other, model)
