"""An engine as a graph, on the device of NumPy memory: numbers, order of copies, buffers, capture and replay."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_export.errors import BundleError, OptionError
from hypersd_export.runtime.engine_graph import EngineGraph, NotCaptured, Timing
from hypersd_export.runtime.onnx import OnnxGraph, open_graph
from tests.bundles import CHANNELS, HEIGHT, TOKENS, WIDTH, write_text_encoder, write_unet
from tests.fake_device import MOST_ROWS, FakeDevice, engine_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_unet(folder / "unet", 2)
    write_unet(folder / "free", "rows")
    write_unet(folder / "half", 2, half=True, timestep_rank=1)
    write_text_encoder(folder / "text", 1)
    for name in ("unet", "free", "half", "text"):
        (folder / name / "model.engine").write_bytes(engine_of(folder / name / "model.onnx"))
    return folder


def opened(folder: Path, name: str, device: FakeDevice | None = None, **options: Any) -> EngineGraph:
    device = device or FakeDevice()
    path = folder / name / "model.engine"
    return EngineGraph(path, device, device.load(path, None), **options)


def onnx(folder: Path, name: str) -> OnnxGraph:
    return open_graph(folder / name / "model.onnx")


def feeds(rows: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, CHANNELS, HEIGHT, WIDTH)),
        "timestep": np.float64(500.0 + seed),
        "encoder_hidden_states": rng.standard_normal((rows, TOKENS, CHANNELS)),
    }


def test_it_gives_what_its_onnx_graph_gives(folder: Path) -> None:
    graph, reference = opened(folder, "unet"), onnx(folder, "unet")
    assert graph.inputs == reference.inputs
    assert graph.outputs == reference.outputs
    for seed in range(4):  # enqueued, captured, and replayed twice
        given = feeds(seed=seed)
        np.testing.assert_array_equal(graph.run(**given)["out_sample"], reference.run(**given)["out_sample"])


def test_integers_and_several_outputs(folder: Path) -> None:
    ids = np.arange(TOKENS, dtype=np.int32)[None]
    mine, theirs = opened(folder, "text").run(input_ids=ids), onnx(folder, "text").run(input_ids=ids)
    assert list(mine) == ["last_hidden_state", "pooler_output"]
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])


def test_half_precision_at_the_ends(folder: Path) -> None:
    given = {**feeds(), "timestep": np.array([500.0])}
    mine = opened(folder, "half").run(**given)["out_sample"]
    assert mine.dtype == np.float16
    np.testing.assert_array_equal(mine, onnx(folder, "half").run(**given)["out_sample"])


def test_order_of_the_work_and_one_capture(folder: Path) -> None:
    device = FakeDevice()
    graph = opened(folder, "unet", device)
    ins = [f"in float32 {list(shape)}" for shape in ([2, CHANNELS, HEIGHT, WIDTH], [], [2, TOKENS, CHANNELS])]
    out = f"out float32 {[2, CHANNELS, HEIGHT, WIDTH]}"
    assert graph.captured is None
    for seed, work in enumerate((["run unet"], ["capture", "launch"], ["launch"], ["launch"])):
        device.log.clear()
        graph.run(**feeds(seed=seed))
        assert device.log == [*ins, *work, out, "wait"]
    assert graph.captured is True
    assert device.engines[0].contexts[0].runs == 4


def test_memory_is_allocated_once_and_no_buffer_is_shared(folder: Path) -> None:
    device = FakeDevice()
    graph = opened(folder, "unet", device)
    graph.run(**feeds())
    sample, states = 2 * CHANNELS * HEIGHT * WIDTH * 4, 2 * TOKENS * CHANNELS * 4
    assert device.allocated == 2 * sample + states + 4
    for seed in range(3):
        graph.run(**feeds(seed=seed))
    assert device.allocated == 2 * sample + states + 4
    addresses = device.engines[0].contexts[0].addresses
    assert len(set(addresses.values())) == 4


def test_results_are_fresh_and_inputs_untouched(folder: Path) -> None:
    graph = opened(folder, "unet")
    given = {name: np.asarray(value, dtype=np.float32) for name, value in feeds().items()}
    before = {name: value.copy() for name, value in given.items()}
    first = graph.run(**given)["out_sample"]
    kept = first.copy()
    second = graph.run(**{**given, "sample": first})["out_sample"]
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)
    for name, value in given.items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(second, onnx(folder, "unet").run(**{**given, "sample": kept})["out_sample"])


def test_fixed_inputs_are_copied_once(folder: Path) -> None:
    device = FakeDevice()
    graph, reference = opened(folder, "unet", device), onnx(folder, "unet")
    one, two = feeds(seed=1).pop("encoder_hidden_states"), feeds(seed=2).pop("encoder_hidden_states")
    first, second = graph.fixed(encoder_hidden_states=one), graph.fixed(encoder_hidden_states=two)
    states = f"in float32 {[2, TOKENS, CHANNELS]}"

    def check(call: Any, value: np.ndarray, seed: int, copies: int) -> None:
        rest = feeds(seed=seed)
        del rest["encoder_hidden_states"]
        device.log.clear()
        out = call(**rest)["out_sample"]
        assert device.log.count(states) == copies
        np.testing.assert_array_equal(out, reference.run(**rest, encoder_hidden_states=value)["out_sample"])

    check(first, one, 3, copies=1)
    check(first, one, 4, copies=0)
    check(second, two, 5, copies=1)  # it takes the buffer over
    check(first, one, 6, copies=1)
    graph.run(**feeds(seed=7))  # so does a plain call
    check(first, one, 8, copies=1)
    check(first, one, 9, copies=0)


def test_each_set_of_shapes_has_a_context_of_its_own(folder: Path) -> None:
    device = FakeDevice()
    graph, reference = opened(folder, "free", device), onnx(folder, "free")
    assert graph.inputs["sample"].shape == (None, CHANNELS, HEIGHT, WIDTH)
    for seed, rows in enumerate((2, 3, 2, 3, 2, 3, 1)):
        given = feeds(rows, seed)
        np.testing.assert_array_equal(graph.run(**given)["out_sample"], reference.run(**given)["out_sample"])
    assert [context.runs for context in device.engines[0].contexts] == [3, 3, 1]
    assert device.log.count("capture") == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "unet",
            {"sample": np.zeros((3, CHANNELS, HEIGHT, WIDTH))},
            r"'sample' of shape \[3, 4, 4, 6\], but \[2, 4, 4",
        ),
        ("unet", {"sample": np.zeros((2, CHANNELS))}, r"'sample' of shape \[2, 4\], but"),
        ("unet", {"timestep": np.zeros(1)}, r"'timestep' of shape \[1\], but \[\]"),
        ("unet", {"other": np.zeros(1)}, "has no input other"),
        ("free", {"sample": np.zeros((5, CHANNELS, HEIGHT, WIDTH))}, r"but \[1, 4, 4, 6\] to \[4, 4, 4, 6\]"),
    ],
)
def test_what_does_not_fit(folder: Path, name: str, change: dict[str, Any], message: str) -> None:
    device = FakeDevice()
    graph = opened(folder, name, device)
    with pytest.raises(BundleError, match=message) as caught:
        graph.run(**{**feeds(MOST_ROWS if name == "free" else 2), **change})
    assert "\n" not in str(caught.value)
    assert device.log == []
    assert device.allocated == 0
    with pytest.raises(BundleError, match="also wants encoder_hidden_states, timestep"):
        graph.run(sample=feeds()["sample"])


@pytest.mark.parametrize("capturable", [False, None], ids=["the library says so", "the capture fails"])
def test_what_cannot_be_captured_is_enqueued_with_one_notice(
    folder: Path, capturable: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(capturable=capturable is None)
    if capturable is None:
        monkeypatch.setattr(device, "capture", lambda work: None)
    graph, reference = opened(folder, "unet", device), onnx(folder, "unet")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            given = feeds(seed=seed)
            np.testing.assert_array_equal(graph.run(**given)["out_sample"], reference.run(**given)["out_sample"])
    assert [warning.category for warning in caught] == [NotCaptured]
    assert graph.captured is False
    assert "launch" not in device.log


def test_timings_by_the_devices_clock(folder: Path) -> None:
    graph = opened(folder, "unet", timed=True)
    for seed in range(3):
        graph.run(**feeds(seed=seed))
    # the fake clock counts what was enqueued: three copies and an event, one run and an event, one copy and an event
    assert graph.timings == [Timing(copy_in=4.0, compute=2.0, copy_out=2.0)] * 3
    plain = opened(folder, "unet")
    plain.run(**feeds())
    assert plain.timings == []


def test_compiled_kernels_are_given_out_after_each_new_session(folder: Path) -> None:
    kept: list[bytes] = []
    graph = opened(folder, "free", on_compiled=kept.append)
    for rows in (1, 1, 2, 2):
        graph.run(**feeds(rows))
    assert kept == [b"kernels of model.engine True"] * 2
    classic = opened(folder, "free", FakeDevice(flavour="classic"), on_compiled=kept.append)
    classic.run(**feeds(1))
    assert len(kept) == 2


def test_a_full_device_is_one_line(folder: Path) -> None:
    with pytest.raises(OptionError, match="the memory of Fake RTX is full"):
        opened(folder, "unet", FakeDevice(memory_bytes=1000)).run(**feeds())
