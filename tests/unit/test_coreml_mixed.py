"""The choice of bits a layer, against known answers and against trying everything."""

import itertools

import numpy as np
import pytest

from hypersd_export.targets.coreml.mixed import Option, blocks, choose, scaled, smallest, stored_bytes


def options(*given):
    return [Option(bits=bits, bytes=size, error=error) for bits, size, error in given]


def test_a_layer_that_does_not_matter_pays_for_one_that_does():
    layers = {
        "sensitive": options((None, 16, 0.0), (8, 8, 0.1), (4, 4, 10.0)),
        "dull": options((None, 16, 0.0), (8, 8, 0.001), (4, 4, 0.01)),
    }

    def bits(budget):
        return {name: option.bits for name, option in choose(layers, budget).items()}

    assert bits(32) == {"sensitive": None, "dull": None}
    assert bits(31) == {"sensitive": None, "dull": 8}
    assert bits(20) == {"sensitive": None, "dull": 4}
    assert bits(16) == {"sensitive": 8, "dull": 8}
    assert bits(12) == {"sensitive": 8, "dull": 4}
    assert bits(8) == {"sensitive": 4, "dull": 4}
    assert smallest(layers) == 8
    with pytest.raises(ValueError, match="7 bytes are less than the 8 of the smallest options"):
        choose(layers, 7)


def test_what_is_left_of_the_budget_is_used():
    """One large layer has to shrink, which leaves room for a small one that was shrunk first."""
    layers = {
        "small": options((None, 4, 0.0), (4, 1, 0.01)),
        "large": options((None, 100, 0.0), (4, 25, 1.0)),
    }
    assert {name: option.bits for name, option in choose(layers, 29).items()} == {"small": None, "large": 4}


def test_an_option_that_is_larger_and_worse_is_never_taken():
    layers = {"odd": options((None, 16, 0.0), (8, 8, 0.5), (6, 6, 0.2))}
    assert [choose(layers, budget)["odd"].bits for budget in (16, 10, 8, 6)] == [None, 6, 6, 6]


def test_it_is_near_the_best_of_all_choices():
    """Five layers whose errors fall fourfold with each bit, as roundings do: nowhere far from what trying all finds."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        weights, gains = rng.integers(50, 1000, 5), 10.0 ** rng.uniform(-3, 1, 5)
        layers = {
            str(n): options(*((b, int(w * b), float(g * 4.0**-b)) for b in (2, 4, 6, 8)))
            for n, (w, g) in enumerate(zip(weights, gains, strict=True))
        }
        budget = int(weights.sum() * rng.uniform(2.5, 7))
        found = choose(layers, budget).values()
        assert sum(option.bytes for option in found) <= budget
        best = min(
            sum(option.error for option in combined)
            for combined in itertools.product(*layers.values())
            if sum(option.bytes for option in combined) <= budget
        )
        assert sum(option.error for option in found) <= 2.0 * best


def test_bytes_of_weights_with_and_without_palettes():
    common = {"itemsize": 2, "deployment_target": "iOS17"}
    assert stored_bytes((96, 64), None, **common) == 64 + 96 * 64 * 2
    assert stored_bytes((96, 64), 4, **common) == 2 * 64 + 96 * 64 // 2 + 64 + 512
    grouped = stored_bytes((96, 64), 4, itemsize=2, deployment_target="iOS18")
    assert grouped == 2 * 64 + 96 * 64 // 2 + 6 * 16 * 2 + 512
    assert stored_bytes((5, 3), 6, **common) == 2 * 64 + 64 + 128 + 512  # 12 bytes of indices, 64 halves


def test_weights_by_the_part_of_the_unet():
    names = [
        "unet_conv_in_weight", "unet_down_blocks_0_resnets_1_conv1_weight", "unet_down_blocks_0_resnets_1_conv2_weight",
        "unet_down_blocks_0_attentions_1_proj_in_weight", "unet_mid_block_resnets_0_conv1_weight",
        "unet_up_blocks_10_upsamplers_0_conv_weight", "unet_conv_out_weight",
    ]  # fmt: skip
    assert blocks(names) == {
        "others": [names[0], names[6]],
        "down_blocks_0_resnets_1": names[1:3],
        "down_blocks_0_attentions_1": [names[3]],
        "mid_block_resnets_0": [names[4]],
        "up_blocks_10_upsamplers_0": [names[5]],
    }


def test_errors_between_those_that_are_measured():
    weight_errors = {8: 1.0, 6: 16.0, 4: 256.0, 3: 1024.0, 2: 4096.0}
    found = scaled({4: 0.5, 2: 3.0}, weight_errors)
    assert found == {8: 0.5 / 256, 6: 0.5 / 16, 4: 0.5, 3: 0.75, 2: 3.0}
    assert scaled({6: 1.0}, {8: 0.0, 6: 0.0, 4: 0.0}) == {8: 1.0, 6: 1.0, 4: 1.0}
