"""Exit codes of the command, and the ends of a process that they stand for.

0    done
1    a defect of lisatune; --debug shows the traceback
2    the run can't start or go on as asked: bad input, a full disk, memory that ran out
130  Ctrl-C
143  SIGTERM, as schedulers send it before they take a machine back
"""

__all__ = ["BAD_INPUT", "DEFECT", "INTERRUPTED", "TERMINATED", "USER_ERRORS", "Terminated", "exit_code"]

DEFECT, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143

USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
"""What bad input and a machine that gives out raise, with a sentence for the user."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. Taken for Ctrl-C by what does not care which."""


def exit_code(error: BaseException) -> int:
    """The code of a process that this error ends."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return BAD_INPUT if isinstance(error, USER_ERRORS) else DEFECT
