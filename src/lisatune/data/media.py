"""Images, sound and videos in records, and how the text beside them is taken alone.

They come as parts of a message's content (`{"type": "image_url", …}`) or in a field of the record or of a
message (`images`), and then the texts may hold marks such as `<image>`.
"""

import re
from typing import Any

from lisatune.data.sources import BadRowError

__all__ = ["MEDIA_FIELDS", "MEDIA_PARTS", "TAKE_TEXT", "TEXT_FIELDS", "part_type", "take_text"]

TAKE_TEXT = "set data.text_only to train on the text alone"
MEDIA_FIELDS = {
    "images": f"images, and only text can be trained on; {TAKE_TEXT}",
    "image": f"an image, and only text can be trained on; {TAKE_TEXT}",
    "videos": f"videos, and only text can be trained on; {TAKE_TEXT}",
    "video": f"a video, and only text can be trained on; {TAKE_TEXT}",
    "audios": f"sound, and only text can be trained on; {TAKE_TEXT}",
    "audio": f"sound, and only text can be trained on; {TAKE_TEXT}",
}
"""Fields of a record or a message that hold what is no text, and what they hold."""

MEDIA_PARTS = (
    *("image", "image_url", "input_image"),
    *("video", "video_url"),
    *("audio", "audio_url", "input_audio"),
)
"""Types of parts that are no text."""

MARKS = re.compile(r"<(?:image|video|audio)>\n?")
"""Where a text says that an image, a video or sound belongs."""

TEXT_FIELDS = ("content", "value", "text")
"""Fields of a message that may hold its text, or a list of parts."""

NOTHING: tuple[Any, ...] = (None, "", [], {})


def part_type(part: Any) -> str:
    """Tell the type of a part of a message's content; without one it is text, or what a key says."""
    if not isinstance(part, dict):
        return "text"
    named = next((name for name in MEDIA_PARTS if part.get(name) not in NOTHING), "text")
    return str(part.get("type") or named)


def take_text(row: Any) -> tuple[Any, bool]:
    """Leave images, sound and videos out of a record, and their marks out of its texts.

    Args:
        row: the record as it was read.

    Returns:
        The record, and whether anything was left out; if not, it is the record that was given.

    Raises:
        BadRowError: a text has nothing beside them.
    """
    if not isinstance(row, dict):
        return row, False
    kept = _leave_out_fields(row)
    has_media = len(kept) < len(row)
    for name, turns in kept.items():
        if isinstance(turns, list):
            kept[name] = [_leave_out_of_turn(turn) for turn in turns]
            has_media |= any(new is not old for new, old in zip(kept[name], turns, strict=True))
    if not has_media:
        return row, False
    joined = {
        name: [_join_texts(turn) for turn in turns] if isinstance(turns, list) else turns
        for name, turns in kept.items()
    }
    return _leave_out_marks(joined), True


def _leave_out_fields(row: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in row.items() if name not in MEDIA_FIELDS or each in NOTHING}


def _leave_out_of_turn(turn: Any) -> Any:
    """Leave out fields and parts of a message that are no text; the message itself if it has none."""
    if not isinstance(turn, dict):
        return turn
    kept = _leave_out_fields(turn)
    turn = turn if len(kept) == len(turn) else kept
    for name in TEXT_FIELDS:
        if isinstance(parts := turn.get(name), list):
            texts = [part for part in parts if part_type(part) not in MEDIA_PARTS]
            if not texts and parts:
                raise BadRowError(f"a message has no text beside its part of type {part_type(parts[0])!r}")
            turn = turn if len(texts) == len(parts) else turn | {name: texts}
    return turn


def _join_texts(turn: Any) -> Any:
    """Join the parts of a message that are all text, because a mark may be a part, or the end of one."""
    if not isinstance(turn, dict):
        return turn
    for name in TEXT_FIELDS:
        if isinstance(parts := turn.get(name), list) and parts:
            written = [part.get("text") if isinstance(part, dict) else part for part in parts]
            texts = [text for text in written if isinstance(text, str)]
            if len(texts) == len(parts) and all(part_type(part) == "text" for part in parts):
                turn = turn | {name: "".join(texts)}
    return turn


def _leave_out_marks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _leave_out_marks(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_leave_out_marks(each) for each in value]
    if not isinstance(value, str) or not MARKS.search(value):
        return value
    text = MARKS.sub("", value).strip()
    if not text:
        raise BadRowError(f"a text is nothing but {value.strip()}")
    return text
