"""The report: what it says of invented figures, one page without a network, and what is wrong in one line."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.bench import layout, plot
from benchmarks.bench.cli import app
from benchmarks.bench.parts import write_part
from benchmarks.bench.report import html, markdown, read_parts, write_report
from hypersd_export.errors import DataError
from tests.bench.reports import candidate, entrant, latency, not_run, quality


def data():
    return {
        "latency": latency(
            entrant("onnx-4", 50.0, 1.0), entrant("onnx-1", 20.0, 0.4, steps=1),
            entrant("optimum", 100.0, 2.0, kind="optimum", picture_psnr_db=200.0),
            entrant("teacher", 1000.0, 20.0, kind="teacher", steps=25, picture_psnr_db=12.0),
            not_run("openvino", "not installed: make peer-openvino", "openvino"),
        ),
        "quality": quality(
            candidate("onnx-4", 76.6), candidate("onnx-1", 70.0, steps=1, differences={
                "clip_score": {"value": -6.6, "low": -7.0, "high": -6.0, "apart": True},
                "fd_t": {"value": 0.1, "low": -0.1, "high": 0.3, "apart": False},
            }),
            candidate("teacher", 77.6, kind="teacher", steps=25), not_run("trt-4", "no GPU <here> & now"),
        ),
    }  # fmt: skip


def test_cards_say_what_was_measured_and_no_more():
    found = {card.label: (card.value, card.note) for card in layout.cards(data())}
    assert found["Best CLIP score of a bundle"] == ("76.6", "onnx-4; teacher, 25 steps: 77.6")
    assert found["Fastest bundle, p50"] == ("20.0 ms", "onnx-1; 50 times as fast as the teacher in torch")
    assert found["optimum, time over ours"][0] == "2.00 ×"
    assert found["Least parity with torch"] == ("146 dB", "unet of onnx-4")
    assert "openvino, time over ours" not in found
    only = layout.cards({"latency": None, "quality": quality(candidate("a", 1.0))})
    assert [card.label for card in only] == ["Best CLIP score of a bundle", "Least parity with torch"]


def test_of_equals_the_first_is_named_and_integers_are_a_group_of_their_own():
    equals = quality(candidate("onnx-4", 76.08), candidate("int8-4", 76.09), candidate("onnx-1", 75.0))
    assert layout.cards({"latency": None, "quality": equals})[0].note == "onnx-4"
    assert layout.group_of(entrant("int8-4", 20.0, 1.0, quantize="int8")) == "ONNX int8"
    assert layout.group_of(entrant("one", 20.0, 1.0, quantize=None, single_graph=True)) == "ONNX fp32, one graph"


def test_points_are_those_who_have_both_and_those_who_draw_the_first_ones_picture():
    found = {point.name: point for point in layout.points(data())}
    assert set(found) == {"onnx-4", "onnx-1", "optimum", "teacher"}
    assert found["optimum"].hollow
    assert found["optimum"].score == 76.6
    assert not found["teacher"].hollow
    assert (found["onnx-1"].group, found["onnx-1"].label) == ("ONNX fp32", "1")
    bare = data() | {"quality": quality(candidate("onnx-4", 76.6))}
    assert {point.name for point in layout.points(bare)} == {"onnx-4", "optimum"}  # the teacher's picture is another


def test_tables():
    tables = {table.title: table for table in layout.all_tables(data())}
    latency_table = tables["Latency"]
    assert "joule" not in latency_table.head  # nobody has any
    row = dict(zip(latency_table.head, latency_table.rows[2], strict=True))
    assert (row[""], row["p50 ms"], row["time over the first's"]) == ("optimum", "100.0", "2.00 [1.90, 2.10]")
    assert tables["Paired differences"].rows == (("onnx-1", "-6.60 [-7.00, -6.00] *", "0.100 [-0.100, 0.300]"),)
    assert tables["Parity"].rows[0] == ("onnx-4", "146 dB (90)", "equal (50)")
    assert tables["Not measured"].rows == (
        ("openvino", "latency", "not installed: make peer-openvino"), ("trt-4", "quality", "no GPU <here> & now"),
    )  # fmt: skip
    assert "Pictures a second" not in tables
    assert "CLIP score by category" not in tables


# the plot


def test_plot_places_values_and_keeps_inside():
    points = layout.points(data())
    for width, height in ((960, 420), (366, 340)):
        drawn = plot.svg(points, width=width, height=height, title="a & b")
        assert 'aria-label="a &amp; b"' in drawn
        numbers = [float(x) for x in re.findall(r'[^e]x[12]?="([\d.-]+)"', drawn)]
        assert min(numbers) >= 0
        assert max(numbers) <= width
        assert drawn.count("<title>") == 4
        assert drawn.count('class="bar"') == 3  # none for the hollow one
    frame = plot._Frame(points, 960, 420)
    assert frame.left < frame.x(20.0) < frame.x(50.0) < frame.x(1000.0) < frame.right
    assert frame.top < frame.y(77.6) < frame.y(70.0) < frame.bottom
    middle = (frame.x(20.0) + frame.x(500.0)) / 2
    assert frame.x(100.0) == pytest.approx(middle)  # logarithmic
    assert plot.svg([], width=1, height=1, title="") == ""


def test_ticks_are_round_and_inside():
    assert plot.ticks(69.5, 78.9) == [70.0, 72.0, 74.0, 76.0, 78.0]
    assert plot.ticks(0.12, 0.33) == [0.15, 0.2, 0.25, 0.3]
    assert plot.log_ticks(15, 1300) == [20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]
    assert plot.log_ticks(0.5, 200000) == [1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]
    for low, high in ((3.0, 3.001), (1e-7, 2e-7), (70, 79)):
        found = plot.ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low <= min(found)
        assert max(found) <= high


# the page


VOID = ("meta", "img", "br", "circle", "rect", "line", "polygon", "polyline")


class Page(HTMLParser):
    """Collects tags, sources and text, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


@pytest.fixture
def folder(tmp_path):
    shown = {"prompts": ["a <b>", "c"], "files": {"onnx-4": ["pictures/0.png", "pictures/1.png"]}}
    (tmp_path / "pictures").mkdir()
    for name, size in (("0", 32), ("1", 600)):
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    write_part(tmp_path, "latency.json", data()["latency"])
    write_part(tmp_path, "quality.json", data()["quality"] | {"shown": shown})
    return tmp_path


def test_one_page_that_needs_no_network(folder):
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    text = " ".join("".join(page.text).split())
    assert [source.partition(";")[0] for source in page.sources] == ["data:image/png", "data:image/webp"]
    assert not re.search(r"https?://|@import|url\(", (folder / "report.html").read_text())
    for words in (
        "Quality against latency", "2.00 [1.90, 2.10]", "no GPU <here> & now", "hypersd-bench latency 'a b'",
        "optimum: lib 1", "2000 to 3000 MHz", "a <b>",
    ):  # fmt: skip
        assert words in text, words
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text()
    assert (folder / "report.html").stat().st_size < 200_000


def test_markdown_and_json_of_the_same(folder):
    found = write_report(folder)
    text = (folder / "report.md").read_text()
    assert "- Fastest bundle, p50: **20.0 ms**" in text
    assert "| onnx-4 | ![](pictures/0.png) | ![](pictures/1.png) |" in text
    assert "| onnx-1 | -6.60 [-7.00, -6.00] * | 0.100 [-0.100, 0.300] |" in text
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert min(widths) >= 1
    assert json.loads((folder / "report.json").read_text()) == found
    assert found["latency"] == data()["latency"]


def test_half_a_report_is_a_report(folder):
    (folder / "quality.json").unlink()
    found = read_parts(folder)
    page = Page(html(found, folder))
    assert "Quality against latency" not in "".join(page.text)
    assert "## Latency" in markdown(found)
    (folder / "latency.json").unlink()
    write_part(folder, "quality.json", data()["quality"])
    assert "## Paired differences" in markdown(read_parts(folder))


def test_what_is_wrong_is_one_line(folder):
    (folder / "pictures" / "0.png").write_bytes(b"x")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 1
    assert "0.png: cannot be read" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for content, message in (("{", "latency.json: cannot be read"), ('{"format": "x/2"}', "is of format 'x/2'")):
        (folder / "latency.json").write_text(content)
        with pytest.raises(DataError, match=message):
            read_parts(folder)
    with pytest.raises(DataError, match=r"has neither latency.json nor quality.json"):
        read_parts(folder / "pictures")


def test_the_command_prints_where_the_page_is(folder):
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {"report": str(folder / "report.html")}
