"""Sessions: the provider that was asked for or an error, fresh outputs, one-line failures."""

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime.onnx import OPTIONS, PROVIDERS, OnnxRuntime, open_graph, resolve_provider
from hypersd_export.runtime.onnx_binding import can_bind
from tests.bundles import CHANNELS, HEIGHT, TOKENS, WIDTH, write_text_encoder, write_unet


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_unet(folder / "unet", 2)
    write_unet(folder / "half", "rows", half=True)
    return folder


def feeds(rows: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((rows, CHANNELS, HEIGHT, WIDTH)),
        "timestep": np.float64(500.0),
        "encoder_hidden_states": rng.standard_normal((rows, TOKENS, CHANNELS)),
    }


def expected(sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray) -> np.ndarray:
    return 0.9 * sample + 0.0005 * timestep + 0.3 * encoder_hidden_states.mean(1)[:, :, None, None]


def test_runs_and_casts(unet: Path) -> None:
    graph = open_graph(unet / "unet" / "model.onnx", threads=1)
    assert graph.inputs["sample"].shape == (2, CHANNELS, HEIGHT, WIDTH)
    assert graph.inputs["timestep"].shape == ()
    out = graph.run(**feeds())["out_sample"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected(**feeds()), rtol=0, atol=1e-6)


def test_half_precision_and_free_sizes(unet: Path) -> None:
    graph = open_graph(unet / "half" / "model.onnx")
    assert graph.inputs["sample"].shape[0] is None
    out = graph.run(**feeds(3))["out_sample"]
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, expected(**feeds(3)), rtol=0, atol=5e-3)


def test_outputs_are_fresh_and_inputs_untouched(unet: Path) -> None:
    graph = open_graph(unet / "unet" / "model.onnx")
    given = {name: np.asarray(value, dtype=np.float32) for name, value in feeds().items()}
    before = given["sample"].copy()
    first = graph.run(**given)["out_sample"]
    kept = first.copy()
    second = graph.run(**{**given, "sample": first})["out_sample"]
    np.testing.assert_array_equal(given["sample"], before)
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)
    assert not np.shares_memory(first, given["sample"])


def test_providers_are_refused_and_never_replaced(unet: Path) -> None:
    with pytest.raises(OptionError, match=r"provider 'gpu' is not known: choose one of cpu, cuda"):
        resolve_provider("gpu")
    with pytest.raises(MissingBackend, match=r"provider 'cuda' needs onnxruntime-gpu.*hypersd\[gpu\]"):
        open_graph(unet / "unet" / "model.onnx", provider="cuda")
    with pytest.raises(OptionError, match=r"'directml' is not in this build of onnxruntime: it has .*cpu"):
        resolve_provider("directml")
    assert resolve_provider("cpu") == "CPUExecutionProvider"
    assert set(PROVIDERS.values()) <= set(onnxruntime.get_all_providers())


def test_a_provider_that_does_not_start_is_an_error(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime leaves a provider out that it cannot load, with a log message only."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["cuda"], PROVIDERS["cpu"]])
    real, seen = onnxruntime.InferenceSession, []

    def without_cuda(path: str, options: Any, providers: list[str], **more: Any) -> Any:
        seen.append((providers, more))
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(OptionError, match="provider 'cuda' does not start on this machine"):
        open_graph(unet / "unet" / "model.onnx", provider="cuda")
    assert seen == [([(PROVIDERS["cuda"], OPTIONS[PROVIDERS["cuda"]])], {"enable_fallback": 0})]
    assert OPTIONS[PROVIDERS["cuda"]]["use_tf32"] == "0"


def test_cudas_libraries_are_loaded_from_their_packages(
    unet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For CUDA alone, and what onnxruntime prints about those it does not find stays out of our output."""
    calls: list[str] = []

    def preload() -> None:
        print("Failed to load libcublas.so")
        calls.append("preload")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    open_graph(unet / "unet" / "model.onnx")
    assert calls == []
    monkeypatch.setattr("hypersd_export.runtime.onnx.resolve_provider", lambda name: "CPUExecutionProvider")
    open_graph(unet / "unet" / "model.onnx", provider="cuda")
    assert calls == ["preload"]
    assert capsys.readouterr().out == ""


def test_threads_do_not_spin(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = onnxruntime.InferenceSession, []

    def spy(path: str, options: Any, **more: Any) -> Any:
        seen.append(options)
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    open_graph(unet / "unet" / "model.onnx", threads=3)
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert seen[0].intra_op_num_threads == 3


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingBackend, match=r"the runtime needs onnxruntime.*hypersd\[cpu\]"):
        resolve_provider("cpu")


def test_unusable_files(tmp_path: Path, unet: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        open_graph(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"<html>not a graph</html>")
    with pytest.raises(BundleError, match="cannot load") as caught:
        open_graph(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="--threads 0: must be at least 1"):
        open_graph(unet / "unet" / "model.onnx", threads=0)


def test_inputs_that_do_not_fit(unet: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx failed") as caught:
        open_graph(unet / "unet" / "model.onnx").run(**feeds(5))
    assert "\n" not in str(caught.value)


def test_an_input_type_that_is_not_fed(tmp_path: Path) -> None:
    from onnx import helper

    from tests.bundles import save_graph, value_info

    node = helper.make_node("Not", ["flag"], ["out"])
    save_graph(tmp_path / "model.onnx", [node], [value_info("flag", [1], "BOOL")], [value_info("out", [1], "BOOL")], {})
    with pytest.raises(BundleError, match=r"'flag' of type tensor\(bool\)"):
        open_graph(tmp_path / "model.onnx")


def test_integer_inputs(tmp_path: Path) -> None:
    write_text_encoder(tmp_path, 1)
    out = open_graph(tmp_path / "model.onnx").run(input_ids=np.zeros((1, TOKENS), dtype=np.int32))
    assert list(out) == ["last_hidden_state", "pooler_output"]


def test_a_graph_can_be_evaluated_as_it_stands(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = onnxruntime.InferenceSession, []

    def spy(path: str, options: Any, **more: Any) -> Any:
        seen.append(options.graph_optimization_level)
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    outputs = [open_graph(unet / "unet" / "model.onnx", optimise=o).run(**feeds())["out_sample"] for o in (True, False)]
    levels = onnxruntime.GraphOptimizationLevel
    assert seen == [levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-6)


def test_bound_buffers_are_apart_and_results_are_copies(unet: Path) -> None:
    graph = open_graph(unet / "unet" / "model.onnx", threads=1)
    given = feeds()
    bound = graph.bound(encoder_hidden_states=given["encoder_hidden_states"])
    addresses = [value.data_ptr() for value in bound.values.values()]
    assert len(set(addresses)) == len(graph.inputs) + len(graph.outputs)
    sample = given["sample"].astype(np.float32)
    first = bound(sample=sample, timestep=given["timestep"])["out_sample"]
    np.testing.assert_allclose(first, expected(**given), rtol=0, atol=1e-6)
    kept = first.copy()
    second = bound(sample=first, timestep=given["timestep"])["out_sample"]  # as a step without guidance does
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_allclose(second, expected(**{**given, "sample": first}), rtol=0, atol=1e-6)
    assert [value.data_ptr() for value in bound.values.values()] == addresses
    bound.set({"encoder_hidden_states": 2 * given["encoder_hidden_states"]})
    changed = {**given, "encoder_hidden_states": 2 * given["encoder_hidden_states"]}
    again = bound(sample=sample, timestep=given["timestep"])["out_sample"]
    np.testing.assert_allclose(again, expected(**changed), rtol=0, atol=1e-6)


def test_bound_inputs_that_do_not_fit(unet: Path) -> None:
    bound = open_graph(unet / "unet" / "model.onnx").bound()
    with pytest.raises(BundleError, match=r"has no input 'x'"):
        bound(x=1)
    with pytest.raises(BundleError, match=r"sample of shape \[1, .*wanted \[2, "):
        bound(sample=feeds(1)["sample"])


def test_what_is_bound(unet: Path) -> None:
    """A device with a memory of its own, and fixed shapes; on the CPU there is nothing to copy."""
    whole, free = (open_graph(unet / name / "model.onnx") for name in ("unet", "half"))
    assert can_bind(whole.inputs, whole.results, "cuda")
    assert not can_bind(whole.inputs, whole.results, "openvino")
    assert not can_bind(free.inputs, free.results, "cuda")
    states = feeds()["encoder_hidden_states"]
    assert isinstance(whole.fixed(encoder_hidden_states=states), functools.partial)
    device = replace(whole, provider="cuda")
    with pytest.raises(RuntimeError):  # this build has no CUDA, which is asked for and not replaced
        device.fixed(encoder_hidden_states=states)


def test_cuda_graphs_are_cudas(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="--cuda-graph with provider 'cpu'"):
        OnnxRuntime(path=unet, cuda_graph=True)
    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def spy(path: str, options: Any, *, providers: list[Any], **more: Any) -> Any:
        seen.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    monkeypatch.setattr("hypersd_export.runtime.onnx.resolve_provider", lambda name: "CPUExecutionProvider")
    runtime = OnnxRuntime(path=unet, provider="cuda", cuda_graph=True)
    runtime.graph("unet")
    runtime.graph("half")
    assert seen == [[("CPUExecutionProvider", {"enable_cuda_graph": "1"})], [("CPUExecutionProvider", {})]]
    (unet / "pipeline.onnx").touch()
    with pytest.raises(OptionError, match="cannot capture this bundle's Loop"):
        OnnxRuntime(path=unet, provider="cuda", cuda_graph=True)
    (unet / "pipeline.onnx").unlink()
