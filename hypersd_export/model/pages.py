"""Memory of weight files that are mapped: resident once they were read, though they could be read again."""

import ctypes
import sys
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
MADV_DONTNEED = 4
"""Of Linux, for madvise(2): drop a mapping's pages; they are read from the file again when they are touched."""


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
