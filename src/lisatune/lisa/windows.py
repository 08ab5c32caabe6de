"""Windows of a parameter: neighbouring elements that are read in place of all of them.

A window moves with each period, so that all elements are met.
"""

from torch import Tensor

__all__ = ["WINDOW", "locate_window", "read_window"]

WINDOW = 1024
"""Elements of a window, at most."""


def locate_window(size: int, sample: int, index: int = 0) -> slice:
    """Return where a window of `size` elements is.

    Args:
        size: elements of the parameter.
        sample: the period, which moves the window; ⌈size/1024⌉ numbers in a row meet all elements.
        index: place of the parameter in its layer; each one starts elsewhere.
    """
    windows = -(-size // WINDOW)
    start = (sample + index * 104729) % max(windows, 1) * WINDOW
    start = min(start, max(size - WINDOW, 0))
    return slice(start, min(start + WINDOW, size))


def read_window(values: Tensor, sample: int, index: int = 0) -> Tensor:
    """Return the values of a window, a view of `values` [N]; see `locate_window`."""
    return values[locate_window(values.numel(), sample, index)]
