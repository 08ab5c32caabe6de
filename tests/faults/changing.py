"""Random changes of bytes, of JSON by its structure, and of safetensors headers."""

import json
import math
import random
from typing import Any

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        -0.0,
        1e308,
        10**30,
        2**63,
        math.nan,
        math.inf,
        [],
        {},
        "",
        " ",
        "null",
    ),
    *("../../../etc/passwd", "/etc/passwd", "\0", "\ud800", "é" * 300, "a\nb", "${HOME}", "{{7*7}}", "1e400"),
    *([None], [[[[]]]], {"__tensor__": "x"}, {"__tuple__": 5}, {"__items__": [1]}, {"a": {"a": {"a": 1}}}),
    *("auto", "cpu", "cuda:99", "meta", "python-docs", "all", "F64", "I8", [0, 2**62], [8, 4], ["a", 1]),
]
BYTES = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[" * 2000,
    b'"',
    b"\\u",
    b"\r",
    b"\n\n",
    b": ",
    b"!!python/object",
    b"&a",
]


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Change one to four places in some bytes."""
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(data) + 1)
        end = min(len(data), at + generator.choice([1, 1, 2, 8, 64]))
        act = generator.randrange(6)
        if act == 0 and at < len(data):
            middle = bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 : end]
        elif act == 1:
            middle = data[at:end] * 2
        elif act == 2:
            middle = b""
        elif act == 3:
            middle = generator.choice(BYTES)
        elif act == 4:
            middle = generator.randbytes(4)
        else:
            middle = str(generator.choice(VALUES)).encode(errors="surrogatepass")
        data = data[:at] + middle + data[end:]
        if generator.random() < 0.1:
            data = data[: generator.randrange(len(data) + 1)]
    return data


def mutate_value(value: Any, generator: random.Random) -> Any:
    """Change one to four places in dicts and lists: another value, or a key removed, added or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(generator.randint(1, 4)):
        if not value or not isinstance(value, dict | list):
            return generator.choice(VALUES)
        holder, key = _place(value, generator)
        act = generator.randrange(6)
        if act == 0:
            del holder[key]
        elif act == 1 and isinstance(holder, dict):
            holder[str(generator.choice(VALUES))[:40]] = holder.pop(key)
        elif act == 2:
            other, name = _place(value, generator)
            holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = generator.choice(VALUES)
    return value


def _place(value: Any, generator: random.Random) -> tuple[Any, Any]:
    """A place in nested dicts and lists that are not empty: the upper ones as likely as the many below."""
    while True:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[key]
        if not inner or not isinstance(inner, dict | list) or generator.random() < 0.3:
            return value, key
        value = inner


def mutate_json(text: bytes, generator: random.Random) -> bytes:
    """Change JSON by its structure or by its bytes."""
    if generator.random() < 0.4:
        return mutate(text, generator)
    return json.dumps(mutate_value(json.loads(text), generator)).encode()


def mutate_safetensors(data: bytes, generator: random.Random) -> bytes:
    """Change the header of a safetensors file, its length, or the file."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if generator.random() < 0.2:
        claimed = generator.choice([0, 1, size - 1, size + 1, 2**31, 2**63, generator.randrange(2 * size)])
        return claimed.to_bytes(8, "little") + header + rest
    header = mutate_json(header, generator)
    if generator.random() < 0.1:
        rest = mutate(rest, generator)
    return len(header).to_bytes(8, "little") + header + rest
