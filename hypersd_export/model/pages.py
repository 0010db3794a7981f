"""Memory that a process keeps and need not: pages of mapped weight files, which can be read again; what was freed."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Protocol

SMAPS = Path("/proc/self/smaps")
MADV_DONTNEED = 4
"""Of Linux, for madvise(2): drop a mapping's pages; they are read from the file again when they are touched."""

RELIEF_BYTES = 400_000_000
"""So much of mapped weights at most is resident while they are read one by one."""


class Sized(Protocol):
    """A tensor, of torch's or of a graph's."""

    @property
    def nbytes(self) -> int:
        """Its size."""


class Relief:
    """Told of each weight that is read next: gives back the memory of those that were read from mapped files."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, tensor: Sized) -> None:
        """Before `tensor` is read."""
        self.read += tensor.nbytes
        if self.read > RELIEF_BYTES:
            drop_pages()
            self.read = 0


def drop_pages() -> int:
    """Give the memory of all mapped weight files back to the system; returns the bytes that were resident.

    A mapping that was written to (weights that a LoRA was added to in place) is left alone, as Linux would read that
    from the file again too: nothing may write to mapped weights in another thread meanwhile. Elsewhere than on Linux
    nothing happens.
    """
    if sys.platform != "linux" or not SMAPS.is_file():
        return 0
    system = ctypes.CDLL(None)
    dropped = 0
    for start, end, resident in clean_mappings(SMAPS.read_text(encoding="utf-8", errors="replace")):
        if system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED) == 0:
            dropped += resident
    return dropped


def release() -> None:
    """Have a network gone that nothing names any more: out of cycles, and back to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Give freed memory back that the C library keeps for the next one (glibc's; others do as they do): of SDXL's UNet
    2.4 GB, as weights below 32 MB come from its heap."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        give_back(0)


def clean_mappings(smaps: str) -> list[tuple[int, int, int]]:
    """(start, end, resident bytes) of the files that are mapped as weights are, private and writable, and that have no
    page of this process's own; from the text of /proc/self/smaps."""
    found = []
    span: tuple[int, int] | None = None
    resident = 0
    for line in smaps.splitlines():
        word, *values = line.split()
        if not word.endswith(":"):  # 7f…-7f… rw-p offset device inode path
            start, _, end = word.partition("-")
            span = (int(start, 16), int(end, 16)) if values[0] == "rw-p" and values[3] != "0" else None
        elif span is not None and word == "Rss:":
            resident = int(values[0]) * 1024
        elif span is not None and word == "Anonymous:" and values[0] == "0" and resident:
            found.append((*span, resident))
    return found
