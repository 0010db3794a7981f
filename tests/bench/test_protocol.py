"""What painters and the one who times them say to each other."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench.conversation import Conversation
from benchmarks.bench.protocol import Clocked, answer, peak_mb
from hypersd_export.errors import HypersdError, ModelError, OptionError
from tests.bench import painters

ROOT = Path(__file__).parents[2]


def command(**request):
    return [sys.executable, "-m", "tests.bench.painters", json.dumps(request)]


def talk(painter, *questions):
    answers = io.StringIO()
    answer(lambda: painter, [json.dumps(q) for q in questions], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_answers_with_seconds_pictures_and_memory(tmp_path):
    file = tmp_path / "x.npy"
    loaded, drawn = talk(
        painters.Fake({"work_s": 0.01}), {"do": "load"}, {"do": "draw", "seed": 7, "images": 2, "file": str(file)}
    )
    assert loaded["facts"]["versions"] == {"fake": "1"}
    assert drawn["whole_s"] >= 0.02
    assert drawn["seconds"] == {"unet": 0.5}
    assert drawn["peak_mb"] > 5
    pixels = np.load(file)
    assert (pixels.shape, pixels.dtype) == ((2, 2, 4, 3), np.uint8)
    assert (pixels == 7).all()


def test_an_error_is_an_answer_and_not_the_end(capsys):
    first, second, third = talk(
        painters.Fake({"fails_at": 1}),
        {"do": "draw", "seed": 0, "images": 1},
        {"do": "draw", "seed": 0},
        {"do": "load"},
    )
    assert first["error"] == {"kind": "ZeroDivisionError", "message": "ZeroDivisionError: a bug"}
    assert second["error"]["kind"] == "KeyError"
    assert "facts" in third
    assert "Traceback" in capsys.readouterr().err

    def refuse():
        raise OptionError("x 3: at most 2")

    answers = io.StringIO()
    answer(refuse, ['{"do": "load"}'], answers)
    assert json.loads(answers.getvalue())["error"] == {"kind": "OptionError", "message": "x 3: at most 2"}


def test_a_clocked_network_is_the_same_but_for_its_time():
    class Network:
        width = 3

        def __call__(self, x, *, scale):
            return x * scale

        def decode(self, x):
            return x + 1

    seconds = {}
    network = Clocked(Network(), "unet", seconds)
    assert (network(2, scale=3), network.decode(4), network.width) == (6, 5, 3)
    first = seconds["unet"]
    network(1, scale=1)
    assert seconds["unet"] > first > 0
    waits = []
    Clocked(Network(), "unet", seconds, wait=lambda: waits.append(seconds["unet"]))(1, scale=1)
    assert waits == [seconds["unet"]] or waits[0] < seconds["unet"]  # before the clock is read


def test_peak_memory_is_the_programs_own(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    2000 kB\nVmRSS:\t 1 kB\n")
    assert peak_mb(status) == 2.048
    assert peak_mb(tmp_path / "none") > 5  # the system's other word for it


def test_a_conversation_over_pipes():
    """What the painter's libraries print does not stand between the answers; the process ends with the questions."""
    with Conversation("fake", command(), timeout=60) as painter:
        pid = painter.ask(do="load")["facts"]["pid"]
        assert painter.ask(do="draw", seed=1, images=1)["seconds"] == {"unet": 0.25}
        assert Path(f"/proc/{pid}").exists() or not Path("/proc").exists()
    assert not Path(f"/proc/{pid}").exists()
    painter.close()  # twice is once


def test_errors_of_a_painter_are_one_line_of_their_class():
    with Conversation("fake", command(refuses=True), timeout=60) as painter:
        with pytest.raises(ModelError, match=r"^fake: no such weights$"):
            painter.ask(do="load")
        assert painter.ask(do="draw", seed=1, images=1)["seconds"] == {"unet": 0.25}


def test_a_painter_that_dies_has_last_words():
    with Conversation("fake", command(dies_at=1), timeout=60) as painter:
        with pytest.raises(HypersdError, match="fake: its process ended with exit code 3: last words"):
            painter.ask(do="draw", seed=1, images=1)
        with pytest.raises(HypersdError, match="exit code 3"):
            painter.ask(do="load")


def test_a_painter_that_does_not_answer_or_start(monkeypatch):
    monkeypatch.setattr("benchmarks.bench.conversation.CLOSE_S", 0.1)
    with (
        Conversation("fake", command(work_s=30.0), timeout=0.5) as painter,
        pytest.raises(HypersdError, match=r"fake: no answer in 0\.5 s; give --timeout"),
    ):
        painter.ask(do="draw", seed=1, images=1)
    with pytest.raises(HypersdError, match=r"fake: /nowhere/python does not start \(No such file"):
        Conversation("fake", ["/nowhere/python"], timeout=1)
