"""Pairs of answers to one prompt, of which people prefer one: records and tokens.

A record has `chosen` and `rejected`, and the prompt in one of four ways:

    prompt, chosen, rejected: text                      plain text, without a chat template
    prompt: text or messages; chosen, rejected: the answers, as messages or text
    chosen, rejected: whole conversations as messages   the prompt is what both begin with
    chosen, rejected: text                              for a loss that scores whole texts: no prompt

It leaves as a record of prompt and completion, which is the chosen answer, with `rejected` beside them:

    {"prompt": ..., "completion": ..., "rejected": ...}      all str, or all lists of messages

So whatever reads prompts and completions reads these too.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lisatune.data.examples import Examples
from lisatune.data.kinds import REFUSED, Record, check_names
from lisatune.data.records import RecordReader
from lisatune.data.rows import Documents, Ints, Rows
from lisatune.data.sources import BadRowError
from lisatune.data.turns import EMPTY, Messages, check_messages, check_text, read_system, require_answer

__all__ = ["PairReader", "divide_pairs"]

USED = ("prompt", "chosen", "rejected", "system")
"""Fields that are read."""


class PairReader(RecordReader):
    """Pairs that are read and checked one after the other.

    Args:
        source: as for `read_records`, and so are all other arguments.
        needs_prompt: whether it must be known where answers of plain text begin.
    """

    texts_per_record = 2

    def __init__(
        self, source: str, *, needs_prompt: bool = True, fields: Mapping[str, str] | None = None, **how: Any
    ) -> None:
        super().__init__(source, **how)
        self.fields = check_names(fields, USED)
        self.asked_kind = self.kind = "pairs"
        self.needs_prompt = needs_prompt

    def _normalise(self, row: Any) -> Record:
        return _read_pair(row, self.needs_prompt)

    def _reads(self, name: str) -> bool:
        return name in USED

    @property
    def facts(self) -> list[Any]:
        """What the records depend on besides the content of the source, as JSON values."""
        return [*super().facts, self.needs_prompt]

    def texts(self, record: Record) -> tuple[Record, ...]:
        """Return the chosen answer with its prompt, and the rejected one."""
        return (record, record | {"completion": record["rejected"]})


def _read_pair(row: Any, needs_prompt: bool) -> Record:
    if not isinstance(row, dict):
        raise BadRowError("a record must be an object with the fields prompt, chosen and rejected")
    for field, holds in REFUSED.items():
        if field not in USED and row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds {holds}")
    for field in ("tools", "functions"):
        if row.get(field) not in EMPTY:
            raise BadRowError(f"{field!r} holds tools, which pairs of answers cannot be trained with yet")
    for field in ("chosen", "rejected"):
        if row.get(field) in EMPTY:
            raise BadRowError(
                f"the field {field!r} is missing or empty; a pair has chosen and rejected; the fields are: "
                f"{', '.join(map(str, row)) or 'none'}"
            )
    before = read_system(row)
    prompt, chosen, rejected = (row.get(field) for field in USED[:3])
    if prompt in EMPTY and isinstance(chosen, str) and needs_prompt:
        raise BadRowError("the field 'prompt' is missing or empty, so it is unknown where the answers begin")
    if any(isinstance(part, list) for part in (prompt, chosen, rejected)):
        prompt, chosen, rejected = _read_messages(prompt, chosen, rejected)
        if before and prompt[0]["role"] == "system":
            raise BadRowError("'system' and the first message are both a system message; keep one")
        prompt = before + prompt
    elif before:
        raise BadRowError(
            "'system' cannot stand before plain text; write it into the prompt, or use messages"
        )
    else:
        prompt = prompt if prompt not in EMPTY else ""
        texts = zip(USED, (prompt, chosen, rejected), strict=False)
        prompt, chosen, rejected = (check_text(text, field) for field, text in texts)
    if chosen == rejected:
        raise BadRowError("'chosen' and 'rejected' are equal, so there is no preference to learn")
    return {"prompt": prompt, "completion": chosen, "rejected": rejected}


def _read_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    """Bring prompt and answers into lists of messages; what both conversations begin with is the prompt."""
    sides = []
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        messages = check_messages(answer, field)
        if messages[-1]["role"] != "assistant":
            raise BadRowError(f"the last message of {field!r} must be the assistant's answer")
        sides.append(require_answer(messages))
    first, second = sides
    common = 0
    while common < min(len(first), len(second)) - 1 and first[common] == second[common]:
        common += 1
    asked = prompt
    if isinstance(prompt, str) and prompt:
        asked = [{"role": "user", "content": check_text(prompt, "prompt")}]
    if asked not in EMPTY:
        asked = check_messages(asked, "prompt")
    if first[0]["role"] == "assistant" and asked not in EMPTY:  # only the answers
        return asked, first, second
    if common == 0 or not first[common]["role"] == second[common]["role"] == "assistant":
        raise BadRowError(
            "'chosen' and 'rejected' have no common prompt: they must begin with the same messages up to an "
            "answer; or give 'prompt', and the answers alone"
        )
    if asked not in EMPTY and asked[-1]["content"] not in [each["content"] for each in first[:common]]:
        raise BadRowError("'prompt' is not part of the conversations in 'chosen' and 'rejected'; keep one")
    return first[:common], first[common:], second[common:]


def divide_pairs(
    documents: Documents, chosen: Ints, *, max_length: int, long: Literal["cut", "drop"], source: str
) -> Examples:
    """Make two rows of each pair, first the chosen answer; all counts are of pairs.

    Args:
        documents: two for each pair, of their whole length.
        chosen: indices of the pairs to use, in the order of the rows.
        max_length: length of the longest row in tokens.
        long: what happens to a pair with a longer answer. `cut`: the end of the answer is cut off, and a pair
            that is equal then is left out. `drop`: the pair is left out.
        source: name of the data for error messages.

    Raises:
        ValueError: a prompt alone fills `max_length`, or no pair is left.

    Shapes: P = pairs.
    """
    texts_P2 = 2 * chosen[:, None] + np.arange(2)
    starts_P2 = documents.offsets[texts_P2]
    whole_P2 = documents.offsets[texts_P2 + 1] - starts_P2
    lengths_P2 = np.minimum(whole_P2, max_length)
    is_long_P = (whole_P2 > max_length).any(axis=1)
    is_out_P = is_long_P if long == "drop" else np.zeros(len(chosen), bool)
    has_loss_P2 = documents.count_loss(starts_P2.ravel(), lengths_P2.ravel()).reshape(-1, 2) > 0
    if (without := ~has_loss_P2.all(axis=1) & ~is_out_P).any():
        pair = int(without.argmax())
        prompt = int(documents.first_loss(texts_P2[pair]).max())
        raise ValueError(
            f"{source}, record {chosen[pair] + 1}: the prompt has {prompt} tokens, so data.max_length="
            f"{max_length} leaves nothing of the answers; raise it, or set data.long: drop to leave such "
            "records out"
        )
    is_equal_P = documents.digests[texts_P2[:, 0]] == documents.digests[texts_P2[:, 1]]
    for pair in np.flatnonzero(is_long_P & ~is_out_P & (lengths_P2[:, 0] == lengths_P2[:, 1])).tolist():
        sides = zip(starts_P2[pair].tolist(), lengths_P2[pair].tolist(), strict=True)
        chosen_row, rejected_row = (documents.read(*side) for side in sides)
        is_equal_P[pair] = all(map(np.array_equal, chosen_row, rejected_row))
    is_equal_P &= ~is_out_P
    is_used_P = ~is_out_P & ~is_equal_P
    if not is_used_P.any():
        raise ValueError(
            f"{source}: no pair is left after data.max_length={max_length}: {is_out_P.sum()} are longer "
            f"and {is_equal_P.sum()} are equal up to there; raise it"
        )
    lengths = lengths_P2[is_used_P].ravel()
    return Examples(
        Rows(documents, starts_P2[is_used_P].ravel(), lengths.astype(np.int32)),
        num_cut=int((is_long_P & is_used_P).sum()),
        num_without_loss=int(is_equal_P.sum()),
        num_dropped=int(is_out_P.sum()),
        num_lost_tokens=int(whole_P2.sum() - lengths.sum()),
    )
