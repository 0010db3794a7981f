"""Peak memory over the process tree, and seconds."""

import subprocess
import sys
import time

import numpy as np
import pytest

from hypersd_export.usage import INTERVAL_S, LISTED_EVERY, measure, tree_rss_mb

ONE_MB = 1_000_000


def test_a_peak_that_is_gone_at_the_end_is_seen():
    before = tree_rss_mb()
    with measure() as usage:
        block = np.ones(200 * ONE_MB, dtype=np.uint8)
        time.sleep(4 * INTERVAL_S)
        del block
    assert usage.peak_mb > before + 150
    assert usage.seconds >= 4 * INTERVAL_S


def test_children_count():
    before = tree_rss_mb()
    code = "import time; block = bytearray(b'x') * 150_000_000; print(len(block), flush=True); time.sleep(60)"
    with measure() as usage, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        time.sleep((LISTED_EVERY + 2) * INTERVAL_S)
        child.kill()
    assert usage.peak_mb > before + 120


def test_the_figures_are_there_after_an_error_too():
    with pytest.raises(KeyboardInterrupt), measure() as usage:
        raise KeyboardInterrupt
    assert usage.peak_mb > 0
