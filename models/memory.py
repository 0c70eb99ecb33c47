"""Gives memory back to the system between the stages of a conversion, so that its peak is one stage's."""

import ctypes
import gc


def release() -> None:
    """Collect cycles, as captures leave, and hand the allocator's free pages back where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
