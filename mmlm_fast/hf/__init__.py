"""Acceleration of Hugging Face objects in place, proved and undoable."""

from mmlm_fast.hf.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
