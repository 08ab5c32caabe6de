"""Keep the log lines that torchao and bitsandbytes print at import away from the user's terminal."""

import logging
import re

__all__ = ["silence_import_notices"]

CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers that report at every start which kernels cannot be loaded."""


def silence_import_notices() -> None:
    """Drop log lines about kernels that cannot be loaded and that nothing here calls; others still show.

    Call it before an import that may bring in these packages: torchao, bitsandbytes, transformers or peft.
    """
    for name in CHATTY:
        logging.getLogger(name).addFilter(_is_worth_logging)  # the same filter is added only once


def _is_worth_logging(record: logging.LogRecord) -> bool:
    return not re.match(r"Failed to load |<enum '\w+'> is an Enum subclass", record.getMessage())
