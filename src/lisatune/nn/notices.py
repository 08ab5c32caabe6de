"""Keeps what torchao and bitsandbytes log when they are imported away from the user's terminal."""

import logging
import re

__all__ = ["silence_import_notices"]

CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers that name kernels which can't be loaded, at every start."""


def silence_import_notices() -> None:
    """Drop log lines about kernels that cannot be loaded and that nothing here calls; others still show.

    Call it before an import that may bring in these packages: of themselves, of transformers or of peft.
    """
    for name in CHATTY:
        logging.getLogger(name).addFilter(_is_of_use)  # the same filter is added only once


def _is_of_use(record: logging.LogRecord) -> bool:
    return not re.match(r"Failed to load |<enum '\w+'> is an Enum subclass", record.getMessage())
