"""Acceleration of Hugging Face objects, proved and undoable. Importing registers the attention ``"mmlm_fast"``."""

from mmlm_fast.hf.acceleration import Acceleration, NothingReplaced, accelerate
from mmlm_fast.hf.attention import register
from mmlm_fast.hf.callback import MmlmFastCallback

register()

__all__ = ["Acceleration", "MmlmFastCallback", "NothingReplaced", "accelerate", "register"]
