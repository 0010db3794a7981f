"""What can be asked of the Core ML target, and what is refused before anything is loaded."""

import pytest

from hypersd_export.errors import OptionError
from hypersd_export.targets.coreml import GENERATIONS, PALETTES, check_options

USUAL = {
    "deployment_target": "iOS17", "attention": "original", "palettize": None, "quantize": None, "size_budget": None,
    "chunk_unet": False, "compute_units": "all", "layout": "plain", "single_graph": False, "batch": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"deployment_target": "macOS13", "palettize": 6, "layout": "apple", "chunk_unet": True},
        {"deployment_target": "iOS18", "palettize": 3, "single_graph": True},
        {"deployment_target": "macOS13", "quantize": "int8", "single_graph": False},
        {"deployment_target": "iOS18", "quantize": "int4", "chunk_unet": True},
        {"size_budget": 0.3, "layout": "apple", "chunk_unet": True},
        {"attention": "split-einsum-v2", "compute_units": "cpu-and-ne", "batch": 4},
    ],
)
def test_what_goes_together(asked):
    check_options(**{**USUAL, **asked})


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"deployment_target": "iOS15"}, "--deployment-target iOS15: choose iOS16, iOS17, iOS18, macOS13, macOS14 or"),
        ({"deployment_target": "ios17"}, "--deployment-target ios17: choose iOS16"),
        ({"attention": "flash"}, "--attention flash: choose original, split-einsum or split-einsum-v2"),
        ({"compute_units": "gpu"}, "--compute-units gpu: choose all, cpu-only, cpu-and-gpu or cpu-and-ne"),
        ({"layout": "diffusers"}, "--layout diffusers: choose plain or apple"),
        ({"palettize": 5}, r"--palettize 5: iOS17 stores 8, 6, 4, 2 bits a weight$"),
        ({"palettize": 3}, r"--palettize 3: iOS17 stores 8, 6, 4, 2 bits a weight \(iOS18 and macOS15 store 3 too\)"),
        ({"quantize": "int5"}, "--quantize int5: choose int8 or int4"),
        ({"quantize": "int4"}, r"--quantize int4: iOS17 stores int8 \(iOS18 and macOS15 int4 too\)"),
        (
            {"quantize": "int8", "palettize": 6},
            "--palettize 6 with --quantize int8: weights are stored in one of these",
        ),
        ({"size_budget": 0.3, "quantize": "int8"}, "--quantize int8 with --size-budget 0.3: weights are stored in one"),
        ({"size_budget": 30.0}, "--size-budget 30: a share of the UNet package's size between 0 and 1, such as 0.3"),
        ({"size_budget": 0.0}, "--size-budget 0: a share"),
        ({"size_budget": float("nan")}, "--size-budget nan: a share"),
        (
            {"single_graph": True, "size_budget": 0.5},
            "--single-graph with --size-budget: that is about a package of the",
        ),
        ({"single_graph": True, "deployment_target": "macOS13"}, "it needs iOS17 or macOS14, or later"),
        ({"single_graph": True, "chunk_unet": True}, "--single-graph with --chunk-unet: that is about a package"),
        ({"single_graph": True, "layout": "apple"}, "--single-graph with --layout apple"),
        ({"single_graph": True, "batch": 2}, "--batch 2 with --single-graph to Core ML: such packages make one"),
        ({"layout": "apple", "batch": 2}, "--batch 2 with --layout apple"),
    ],
)
def test_what_is_refused(asked, said):
    with pytest.raises(OptionError, match=f"^{said}" if said.startswith("--") else said):
        check_options(**{**USUAL, **asked})


def test_the_names_are_those_of_coremltools():
    coremltools = pytest.importorskip("coremltools")
    for name, generation in GENERATIONS.items():
        assert getattr(coremltools.target, name) is getattr(coremltools.target, f"iOS{generation}")
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    assert set(PALETTES) <= set(palettize_weights._SUPPORTED_NBITS)
