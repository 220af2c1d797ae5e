"""Whole numbers and dtypes among arguments: Python's, numpy's and torch's; never a bool, never a float."""

import operator
from typing import Any

import numpy as np

_FLOATS = ("float32", "float64", "float16", "bfloat16")


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
    if isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    if getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def plain_float(value: float, name: str = "") -> float:
    """Return a float that Dynamo takes for a constant: it traces arguments, defaults too, as symbols otherwise.

    Raises:
        ValueError: for what is no number, if the argument's `name` is given.
    """
    if not name:
        return float(value).__float__()
    try:
        return float(value).__float__()
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def float_name(dtype: Any, name: str = "dtype", among: tuple[str, ...] = _FLOATS) -> str:
    """Return the name of a floating-point dtype of torch or numpy, or of its name.

    Raises:
        ValueError: for any other.
    """
    if type(dtype) is str and dtype in among:
        return dtype
    found = str(dtype) if isinstance(dtype, str) or str(dtype).startswith("torch.") else ""
    if isinstance(dtype, (type, np.dtype)):
        found = np.dtype(dtype).name
    found = found.removeprefix("torch.")
    if found not in among:
        wanted = ", ".join(f"torch.{n}" if i == 0 else n for i, n in enumerate(among[:-1]))
        raise ValueError(f"{name} must be {wanted} or {'torch.' if len(among) == 2 else ''}{among[-1]}, got {dtype}")
    return found
