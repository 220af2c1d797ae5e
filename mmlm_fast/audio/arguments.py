"""Whole numbers among arguments: Python's, numpy's and tensors of one; never a bool, never a float."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def whole(name: str, value: Any, least: int = 1, most: int | None = None, what: str = "") -> int:
    """Return `value` as an int, a constant to Dynamo too, which traces integers as symbols.

    Args:
        name: Of the argument, for the error.
        least: Least value accepted.
        most: Greatest value accepted.
        what: What is wanted, in words; by default the range.

    Raises:
        ValueError: for anything that is not a whole number in the range.
    """
    number = operator.index(value) if type(value) is int else _index(value)
    if number is None or number < least or (most is not None and number > most):
        wanted = what or f"a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"
        got = f"{value!r} of {type(value).__name__}" if number is None else number
        raise ValueError(f"{name} must be {wanted}, got {got}")
    return number


def _index(value: Any) -> int | None:
    if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (np.dtype(bool), torch.bool):
        return None
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
