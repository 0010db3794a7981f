"""Attention rewritten for the Neural Engine: the same numbers, by convolutions and einsums a head at a time."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from hypersd_export.errors import OptionError
from hypersd_export.graphs import attention
from hypersd_export.graphs.attention import SplitEinsum, use_attention
from hypersd_export.graphs.spec import Graph
from hypersd_export.targets.coreml import ATTENTIONS, convert
from hypersd_export.verify.metrics import max_abs


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("piece", [512, 16, 5])
@pytest.mark.parametrize("linear", [False, True])
def test_a_unet_is_the_same_to_rounding(kind, piece, linear, tiny_base, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_PIECE", piece)
    torch.manual_seed(0)
    extra = {"use_linear_projection": True, "attention_head_dim": (4, 8)} if linear else {}
    config = {**UNet2DConditionModel.load_config(tiny_base / "unet"), **extra}
    unet = UNet2DConditionModel.from_config(config).eval()
    inputs = torch.randn(2, 4, 4, 8), torch.tensor(500.0), torch.randn(2, 16, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        use_attention(unet, kind)
        after = unet(*inputs).sample
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {
        "AttnProcessor2_0" if kind == "original" else "SplitEinsum"
    }
    assert max_abs(after, before) < 1e-5  # of about 1
    assert (max_abs(after, before) > 0) or kind == "original"


def test_it_becomes_convolutions_and_einsums(tmp_path):
    pytest.importorskip("coremltools")
    from hypersd_export.verify.mil import open_package

    torch.manual_seed(0)
    layer = Attention(query_dim=12, cross_attention_dim=20, heads=3, dim_head=4, processor=SplitEinsum(6))

    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, states):
            return self.layer(x, states)

    inputs = {"x": torch.randn(1, 16, 12), "states": torch.randn(1, 5, 20)}
    graph = Graph(name="cross", module=Cross(), inputs=inputs, output_names=("y",))
    path = tmp_path / "cross.mlpackage"
    convert.build(graph, path, precision="fp32", deployment_target="iOS16")
    package = open_package(path)
    counts = package.function().op_types()
    assert counts["conv"] == 4
    assert counts["einsum"] == 2 * 3 * 3  # heads x pieces of 6, 6 and 4 queries
    assert not {"linear", "matmul"} & set(counts)
    found = package.evaluate({name: value.numpy() for name, value in inputs.items()}, rounding="fp32")["y"]
    with torch.no_grad():
        layer.set_processor(Attention(query_dim=12).get_processor())
        assert max_abs(found, layer(*inputs.values())) < 1e-5


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"norm_num_groups": 4}, "group_norm"), ({"qk_norm": "layer_norm"}, "norm_q, norm_k"),
     ({"residual_connection": True}, "residual_connection"), ({"rescale_output_factor": 2.0}, "rescale_output_factor")],
)  # fmt: skip
def test_layers_that_do_more_are_refused(extra, said):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mid = Attention(query_dim=8, heads=2, dim_head=4, **extra)

    with pytest.raises(OptionError, match=f"^--attention split-einsum: mid has {said}, which it lacks; use original$"):
        use_attention(Net(), "split-einsum")
