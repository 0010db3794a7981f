"""The parity gates can fail, all of them together, and the worker's end is told in one line whatever it is."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hypersd_export.errors import BundleError, HypersdError, ModelError, ParityError
from hypersd_export.export import export
from hypersd_export.verify import process, worker
from hypersd_export.verify.process import run_verification
from hypersd_export.verify.request import VerifyRequest
from hypersd_export.verify.source import open_source
from tests.tiny import COMPONENTS


def perturb(path: Path) -> None:
    """Add a little to the largest weight of a graph."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda weight: len(weight.raw_data))
    values = numpy_helper.to_array(largest)
    noise = np.random.default_rng(0).standard_normal(values.shape).astype(values.dtype)
    largest.CopyFrom(numpy_helper.from_array(values + 0.02 * noise, largest.name))
    onnx.save(model, path)


def test_a_request_survives_the_way_through_a_file(request_for, tmp_path):
    request = replace(request_for, source=replace(request_for.source, loras=(("a.safetensors", 0.5),)))
    request.write(tmp_path / "request.json")
    assert VerifyRequest.read(tmp_path / "request.json") == request


def test_every_gate_fails_together(request_for):
    for component in COMPONENTS:
        perturb(request_for.bundle / component / "model.onnx")
    report = worker.verify(request_for)
    failed = {failure.split()[0] for failure in report["failures"]}
    assert failed >= {*COMPONENTS, "image"}
    assert all(report["parity"][name]["psnr_db"] < 90 for name in COMPONENTS)
    assert report["parity"]["image"]["psnr_db"] < 50
    assert any("at t = 749" in failure for failure in report["failures"])
    json.dumps(report, allow_nan=False)


def test_the_reference_feeds_an_embedded_guidance():
    import torch

    from hypersd_export.diffusion import Guidance, GuidanceKind
    from hypersd_export.graphs.components import guidance_embedding
    from hypersd_export.verify.reference import unet_output
    from tests.export.test_graphs import lcm_unet

    module = lcm_unet()
    rng = np.random.default_rng(0)
    sample, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 4, 4), (2, 16, 32)))
    guidance = Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0)
    result = unet_output(module, sample, 499.0, {"encoder_hidden_states": states}, guidance)
    with torch.no_grad():
        expected = module(
            torch.from_numpy(sample), 499, encoder_hidden_states=torch.from_numpy(states),
            timestep_cond=guidance_embedding(8.0, 16).expand(2, -1),
        ).sample  # fmt: skip
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-6)


def test_ids_that_transformers_does_not_give_are_a_failure(request_for, monkeypatch):
    from hypersd_export.runtime import tokenizer as runtime_tokenizer

    real = runtime_tokenizer.load_tokenizer

    class Other:
        def __init__(self, *arguments, **options) -> None:
            self.real = real(*arguments, **options)

        def encode(self, text):
            return self.real.encode(text + " x")

    monkeypatch.setattr(runtime_tokenizer, "load_tokenizer", Other)
    run = worker.Verification(
        request=request_for,
        source=open_source(request_for.source),
        plans=None,
        progress=lambda _: None,
        scratch=request_for.out,
    )
    worker._tokenizers(run)
    assert [failure for gate in run.gates for failure in gate.failures] == [
        "tokenizer gives other ids than transformers for 'a cat'",
        "tokenizer gives other ids than transformers for ''",
    ]


def test_without_comparison_golden_is_still_made_by_torch(request_for, exported):
    prompt = json.loads((exported.path / "golden/golden.json").read_text())["prompt"]
    seen: list[str] = []
    report = worker.verify(replace(request_for, compare=False, prompt=prompt, seed=0), seen.append)
    assert report == {"parity": {}, "failures": []}
    assert not any("cpu" in line for line in seen)
    for name in ("expected.png", "prompt_ids.npy", "initial_noise.npy"):
        assert (request_for.out / "golden" / name).read_bytes() == (exported.path / "golden" / name).read_bytes()


def test_failures_become_one_error_with_the_numbers(request_for, monkeypatch):
    report = {"parity": {}, "failures": ["unet 20.0 dB at t = 999 (needs 80)", "image 10.0 dB (needs 50)"]}
    monkeypatch.setattr(worker, "verify", lambda *_: report)
    with pytest.raises(ParityError, match=r"unet 20.0 dB at t = 999 \(needs 80\); image 10.0 dB") as error:
        run_verification(request_for, isolate=False)
    assert "\n" not in str(error.value)


def test_a_failed_gate_publishes_nothing(tiny_spec, exported, quick_build, in_process, monkeypatch, tmp_path):
    monkeypatch.setattr("hypersd_export.verify.worker.COMPONENT_DB", {"fp32": 199.0})
    spec = replace(tiny_spec, out=tmp_path / "bundle", cache_dir=tmp_path / "cache")
    with pytest.raises(ParityError, match=r"unet \d+\.\d dB at t = 999 \(needs 199\)"):
        export(spec)
    assert not spec.out.exists()


def test_a_base_that_changed_meanwhile_is_noticed(request_for):
    with pytest.raises(ParityError, match="changed on disk"):
        worker.verify(replace(request_for, digests={"base": "0" * 64, "loras": []}))


def test_the_worker_writes_its_report_or_its_error(request_for, tmp_path, monkeypatch, capsys):
    path = tmp_path / "request.json"
    request_for.write(path)
    monkeypatch.setattr(worker, "verify", lambda _, progress: progress("torch: unet") or {"parity": {}, "failures": []})
    assert worker.main([str(path)]) == 0
    assert capsys.readouterr().out == "torch: unet\n"
    assert json.loads((request_for.out / worker.REPORT).read_text()) == {"parity": {}, "failures": []}

    def fail(error):
        def verify(_, progress):
            raise error

        monkeypatch.setattr(worker, "verify", verify)

    fail(ModelError("gone"))
    assert worker.main([str(path)]) == 0
    assert json.loads((request_for.out / worker.REPORT).read_text()) == {
        "error": {"kind": "ModelError", "message": "gone"}
    }
    fail(KeyboardInterrupt())
    assert worker.main([str(path)]) == 130


def worker_script(tmp_path, monkeypatch, body: str) -> None:
    """Put a shell script in the place of Python: the worker that is started is this."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -9 $$", r"ended by signal 9 \(out of memory\?\)"),
        ("echo 'ImportError: no torch' >&2; exit 1", r"the verification failed \(ImportError: no torch\)"),
        ("exit 3", r"the verification failed \(exit code 3\)"),
        ("exit 0", r"the verification failed"),
    ],
)
def test_a_worker_that_dies_is_told_in_one_line(request_for, tmp_path, monkeypatch, body, message):
    worker_script(tmp_path, monkeypatch, body)
    with pytest.raises(ParityError, match=message) as error:
        run_verification(request_for)
    assert "\n" not in str(error.value)


def test_what_the_worker_says_arrives(request_for, tmp_path, monkeypatch):
    report = json.dumps({"parity": {"unet": {"psnr_db": 100.0}}, "failures": []})
    path = request_for.out / worker.REPORT
    worker_script(tmp_path, monkeypatch, f"echo 'torch: unet'; echo '{report}' > {path}")
    seen: list[str] = []
    assert run_verification(request_for, progress=seen.append) == {"unet": {"psnr_db": 100.0}}
    assert seen == ["torch: unet"]
    assert not path.exists()  # it is not part of the stage


@pytest.mark.parametrize(("kind", "expected"), [("BundleError", BundleError), ("MissingBackend", HypersdError)])
def test_the_workers_error_keeps_its_class(request_for, tmp_path, monkeypatch, kind, expected):
    error = json.dumps({"error": {"kind": kind, "message": "what happened"}})
    worker_script(tmp_path, monkeypatch, f"echo '{error}' > {request_for.out / worker.REPORT}")
    with pytest.raises(expected, match="what happened"):
        run_verification(request_for)


def test_ctrl_c_ends_the_worker_too(request_for, tmp_path, monkeypatch):
    worker_script(tmp_path, monkeypatch, "exit 130")
    with pytest.raises(KeyboardInterrupt):
        run_verification(request_for)
    worker_script(tmp_path, monkeypatch, "echo line; exec sleep 60")

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run_verification(request_for, progress=interrupt)
