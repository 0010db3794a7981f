"""Python's cyclic collector, kept out of an export's way.

It looks through every object that there is, of which torch, diffusers and onnxscript have a million, each time that so
many new ones were made; an export makes that many. A tenth of an export's time was the collector's.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection in the body; afterwards as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def collected_after() -> Iterator[None]:
    """Collect, when the body ends, what the body made and left in cycles, and look at nothing older.

    Where a program has frozen its own objects (`gc.freeze`), they stay so, and everything else is looked at.
    """
    apart = not gc.get_freeze_count()
    if apart:
        gc.freeze()
    try:
        with paused():
            yield
    finally:
        gc.collect()
        if apart:
            gc.unfreeze()


def none_at_exit() -> None:
    """Let the interpreter end without a last look through everything, which takes seconds behind torch."""
    atexit.register(gc.freeze)
