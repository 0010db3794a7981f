"""What fp16 cannot hold is found by the range scan, stays in float32 and comes out right."""

import numpy as np
import onnx_ir
import torch

from hypersd_export.graphs.spec import Graph
from hypersd_export.runtime.onnx import open_graph
from hypersd_export.targets import onnx_fp16
from hypersd_export.verify.metrics import psnr
from hypersd_export.verify.range_scan import open_probe, ranges
from hypersd_export.verify.worker import rounded


class Loud(torch.nn.Module):
    """Two convolutions whose weights are scaled so that 300,000 lies between them, and ordinary values at both ends."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
        with torch.no_grad():
            for value in (self.before.weight, self.before.bias):
                value.mul_(scale)
            self.after.weight.div_(scale)

    def forward(self, sample):
        return self.after(self.before(sample))


def exported(scale, folder):
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = Loud(scale)(x).numpy()
    module = Loud(scale).half().eval()
    graph = Graph(name="loud", module=module, inputs={"sample": x.half()}, output_names=("out",))
    onnx_fp16.build(graph, folder, opset=20)
    return x.numpy(), truth, module


def scanned(folder, scratch, x):
    scratch.mkdir()
    probe = open_probe(folder / "model.onnx", scratch)
    probe.run(sample=x)
    return ranges(onnx_fp16.read(folder / "model.onnx"), probe.largest)


def drawn(path, scratch, x):
    return open_graph(rounded(path, scratch), optimise=False).run(sample=x)["out"]


def test_an_overflow_inside_is_named_kept_in_float32_and_comes_out_right(tmp_path):
    x, truth, module = exported(3e5, tmp_path / "raw")
    with torch.no_grad():
        assert not module(torch.tensor(x).half()).isfinite().all()
    assert not np.isfinite(drawn(tmp_path / "raw" / "model.onnx", tmp_path / "as-is", x)).all()
    found = scanned(tmp_path / "raw", tmp_path / "probe", x)
    assert [op.op for op in found.kept] == ["Conv", "Conv"]
    assert found.kept[0].largest > 65504
    model = onnx_fp16.read(tmp_path / "raw" / "model.onnx")
    onnx_fp16.keep_float32(model, [op.node for op in found.kept])
    kept = onnx_fp16.save_beside(model, tmp_path / "raw" / "model.onnx", tmp_path / "kept")
    assert psnr(drawn(kept, tmp_path / "mended", x), truth) > 35


def test_where_everything_fits_nothing_is_kept(tmp_path):
    x, truth, _ = exported(1.0, tmp_path / "raw")
    assert scanned(tmp_path / "raw", tmp_path / "probe", x).kept == ()
    assert psnr(drawn(tmp_path / "raw" / "model.onnx", tmp_path / "as-is", x), truth) > 55


def test_measuring_holds_neither_activations_nor_widened_weights(tmp_path):
    """In the file's order each weight is widened right before its use and each value measured right behind its node."""
    exported(1.0, tmp_path / "raw")
    open_probe(tmp_path / "raw" / "model.onnx", tmp_path / "probe")
    graph = onnx_ir.load(tmp_path / "probe" / "model.onnx").graph
    place = {node: number for number, node in enumerate(graph)}
    casts = [node for node in graph if node.op_type == "Cast" and node.inputs[0].is_initializer()]
    assert len(casts) == 4  # two weights, two biases
    assert all(min(place[user] for user in cast.outputs[0].consumers()) - place[cast] <= 2 for cast in casts)
    measured = [node for node in graph if node.op_type in ("ReduceMax", "ReduceMin")]
    assert len(measured) >= 4
    assert all(place[node] - place[node.inputs[0].producer()] <= 2 for node in measured)
