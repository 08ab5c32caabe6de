import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from forks import ended, forked
from lisatune.files.disk import explain_write_errors, sha256_of, write_aside
from tiny_text import byte_tokenizer


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with write_aside(target) as aside:
        (aside / "part").mkdir()
        (aside / "part" / "a").write_text("new")
        assert not target.exists()
    assert (target / "part" / "a").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with write_aside(target) as aside:
            (aside / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_the_quicker_process_wins_when_not_replacing(tmp_path: Path) -> None:
    target = tmp_path / "cached"
    with write_aside(target, replace=False) as slow:
        (slow / "slow").touch()
        with write_aside(target, replace=False) as quick:
            (quick / "quick").touch()
    assert [path.name for path in target.iterdir()] == ["quick"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_failing_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    with write_aside(target) as aside:
        (aside / "old").touch()

    def fail() -> None:
        with write_aside(target) as aside:
            (aside / "half").touch()
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "model", Path.rename
    with write_aside(target) as aside:
        (aside / "old").touch()

    def failing(self: Path, to: Path) -> Path:
        if (self / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), write_aside(target) as aside:
        (aside / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_deleted_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    def die() -> int:
        with write_aside(tmp_path / "model") as aside:
            (aside / "large").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert ended(forked(die, tmp_path / "log")) == -signal.SIGKILL
    (tmp_path / "log").unlink()
    (tmp_path / ".model.tmp-mine").mkdir()
    (tmp_path / ".model.tmp-mine" / "notes").touch()
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    with write_aside(tmp_path / "model") as slow:
        (slow / "slow").touch()
        with write_aside(tmp_path / "model") as quick:
            (quick / "quick").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.tmp-mine"}
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["slow"]


def test_the_only_copy_of_a_folder_stays_after_a_kill_while_it_was_replaced(tmp_path: Path) -> None:
    target, new, old = (
        tmp_path / name for name in ("model", ".model.tmp-01234567", ".model.tmp-01234567-old")
    )
    for folder in (new, old):
        folder.mkdir()
        (folder / "weights").touch()

    def fail() -> None:
        with write_aside(target):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert list(tmp_path.iterdir()) == [old]
    for _ in range(2):
        with write_aside(target) as aside:
            (aside / "weights").touch()
    assert list(tmp_path.iterdir()) == [target]


def test_errors_name_the_folder_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"could not write .*file/model .*Not a directory.*; choose another folder"
    with pytest.raises(OSError, match=message), write_aside(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_space_is_asked_for_where_the_disk_is_full(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match="; free some space or choose"), write_aside(tmp_path / "model"):
        raise error
    with (
        pytest.raises(OSError, match="; free some space or choose"),
        write_aside(tmp_path / "model") as aside,
        explain_write_errors(aside / "card"),
    ):
        raise error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's file that is always full")
def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """tokenizers raises a bare Exception, which the command took for a defect of lisatune."""

    def save() -> None:
        with write_aside(tmp_path / "model") as aside:
            (aside / "tokenizer.json").symlink_to("/dev/full")
            byte_tokenizer(None).save_pretrained(aside)

    with pytest.raises(OSError, match=r"could not write .*model \(No space left .*; free some space or"):
        save()
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")
