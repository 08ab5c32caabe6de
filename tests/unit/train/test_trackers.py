"""What trackers get of a step's figures."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lisatune.train.trackers import open_trackers


def test_trackers_get_the_numbers_of_a_step_and_no_tables(tmp_path: Path) -> None:
    figures = {"held_out_loss": 2.5, "held_out_loss_by_source": {"a.jsonl": 2.0}, "active_blocks": [1, 2]}
    with open_trackers(["tensorboard"], tmp_path / "run", {"run": {"seed": 0}}) as log:
        log(figures, 4)
    folder = tmp_path / "run" / "trackers"
    found = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    tags: set[str] = set()
    for each in found:
        events = EventAccumulator(str(each))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert tags == {"held_out_loss"}
