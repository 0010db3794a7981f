"""model/pages.py: mapped weights leave memory, and come again as they were."""

import platform
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersd_export.model import pages
from hypersd_export.model.files import read_tensors

SMAPS = """\
7fea00000000-7fea00100000 rw-p 00000000 fe:00 5441779                    /models/clean weights.safetensors
Size:               1024 kB
Rss:                 512 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
VmFlags: rd wr mr mw me ac sd
7fea00200000-7fea00300000 rw-p 00000000 fe:00 5441780                    /models/written.safetensors
Rss:                1024 kB
Anonymous:             4 kB
7fea00400000-7fea00500000 rw-p 00000000 fe:00 5441781                    /models/unread.safetensors
Rss:                   0 kB
Anonymous:             0 kB
7fea00600000-7fea00700000 r-xp 00000000 fe:00 5441782                    /lib/libtorch_cpu.so
Rss:                1024 kB
Anonymous:             0 kB
7fea00800000-7fea00900000 rw-p 00000000 00:00 0
Rss:                1024 kB
Anonymous:             0 kB
7fea00a00000-7fea00b00000 rw-p 00000000 00:00 0                          [heap]
Rss:                1024 kB
Anonymous:             0 kB
"""


def mappings(path: Path) -> list[tuple[int, int]]:
    """(resident bytes, those that were written to) of each mapping of a file."""
    found: list[tuple[int, int]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        word, *values = line.split()
        if not word.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and word == "Rss:":
            found.append((int(values[0]) * 1024, 0))
        elif inside and word == "Anonymous:":
            found[-1] = (found[-1][0], int(values[0]) * 1024)
    return found


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in memory."""
    return sum(size for size, _ in mappings(path))


def test_only_unwritten_private_mappings_of_files_are_dropped():
    assert pages.clean_mappings(SMAPS) == [(0x7FEA00000000, 0x7FEA00100000, 512 * 1024)]


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_weights_leave_memory_and_come_again(tmp_path):
    path = tmp_path / "w.safetensors"
    expected = torch.arange(2_000_000, dtype=torch.float32)
    save_file({"w": expected}, path)
    weight = read_tensors(path)["w"]
    assert torch.equal(weight, expected)
    assert resident(path) > 7_900_000
    assert pages.drop_pages() > 7_900_000
    assert resident(path) == 0
    assert torch.equal(weight, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")
def test_weights_that_were_changed_in_place_stay(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(2_000_000)}, path)
    weight = read_tensors(path)["w"]
    weight[-1] = 5.0
    float(weight.sum())
    before = resident(path)
    pages.drop_pages()
    assert resident(path) == before > 7_900_000
    assert float(weight.sum()) == 5.0


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:")) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc_trim")
def test_what_was_freed_goes_back_to_the_system():
    blocks = [bytearray(b"x" * 100_000) for _ in range(1_000)]  # below what the C library maps one by one
    last = blocks[-1]  # which keeps the heap from ending before it
    full = anonymous()
    blocks.clear()
    pages.release()
    assert full - anonymous() > 60_000_000
    assert last == b"x" * 100_000


def test_what_is_in_cycles_goes():
    class Node:
        pass

    node = Node()
    node.me, gone = node, weakref.ref(node)
    del node
    pages.release()
    assert gone() is None


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    monkeypatch.setattr(pages.ctypes, "CDLL", None)
    assert pages.drop_pages() == 0
    pages.trim()


def test_another_c_library_has_no_trim(monkeypatch):
    monkeypatch.setattr(pages.sys, "platform", "linux")
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda _: object())
    pages.trim()
