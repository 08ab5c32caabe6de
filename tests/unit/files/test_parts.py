"""Files of several ranks read as one file does, whatever rows are asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lisatune.files.parts import INDEX, open_tensors, part_name

WHOLE = {
    "even": torch.arange(12.0).view(6, 2),
    "uneven": torch.arange(5, dtype=torch.int32),
    "few": torch.arange(3.0).view(1, 3),
}
STARTS = {"even": [0, 2, 4], "uneven": [0, 2, 4], "few": [0, 1, 1]}
ALONE = torch.tensor(7.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in range(3):
        rows = {
            name: whole[slice(STARTS[name][part], [*STARTS[name], len(whole)][part + 1])].clone()
            for name, whole in WHOLE.items()
        }
        save_file(rows | ({"alone": ALONE} if part == 0 else {}), tmp_path / part_name("weights", part, 3))
    index = {name: {"shape": list(whole.shape), "starts": STARTS[name]} for name, whole in WHOLE.items()}
    index["alone"] = {"shape": [], "starts": [0]}
    (tmp_path / INDEX).write_text(json.dumps({"parts": 3, "weights": index}))
    return tmp_path


def test_any_rows_are_those_of_the_whole_tensor(folder: Path) -> None:
    with open_tensors(folder, "weights") as file:
        assert sorted(file.keys()) == ["alone", "even", "few", "uneven"]
        assert torch.equal(file.get_tensor("alone"), ALONE)
        for name, whole in WHOLE.items():
            rows = file.get_slice(name)
            assert rows.get_shape() == list(whole.shape)
            assert torch.equal(file.get_tensor(name), whole)
            for first in range(len(whole) + 1):
                for end in range(first, len(whole) + 1):
                    got = rows[first:end]
                    assert torch.equal(got, whole[first:end]), (name, first, end)
                    assert got.dtype == whole.dtype


def test_a_folder_of_one_file_reads_the_same(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "weights.safetensors")
    with open_tensors(tmp_path, "weights") as file:
        assert torch.equal(file.get_slice("even")[1:5], WHOLE["even"][1:5])


@pytest.mark.parametrize("starts", [[0, 2, 5], [1, 2, 4], [0, 2]])
def test_an_index_that_does_not_fit_the_files_is_refused(folder: Path, starts: list[int]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weights"]["even"]["starts"] = starts
    (folder / INDEX).write_text(json.dumps(index))
    with (
        open_tensors(folder, "weights") as file,
        pytest.raises(LookupError, match="the rows of even are not"),
    ):
        file.get_tensor("even")
