"""Merged LoRAs: a UNet with the merged file is the UNet with all of its parts, and the SVD is the best of its rank."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hypersd_export.diffusion import FewStepPlan, Solver, plans_from_metadata
from hypersd_export.errors import DestinationError, LoraError, OptionError
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import Delta, read_lora, save_kohya
from tests.train.small_unet import SHAPE, conditioning, small_unet
from tests.train.test_feedback import random_deltas, stacked
from trainer.cli import app
from trainer.distill.lora_file import Origin
from trainer.distill.networks import Role
from trainer.merge import joined, merge, truncated

X, T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 200])
PLAN = FewStepPlan(solver=Solver.TCD, num_steps=1, eta=1.0)


def origin(**changes):
    stated = {"plans": [PLAN], "base_name": "small", "base_digest": "ab", "steps": 10, "recipe": {"seed": 0}}
    return Origin(**{**stated, **changes}).metadata()


@pytest.fixture
def parts(tmp_path):
    """Two LoRAs for the small UNet: some modules in both, some in one; ranks 3 and 2, scales 0.5 and 2."""
    one = random_deltas(small_unet(), modules=("to_q", "conv1", "proj_in"))
    two = random_deltas(small_unet(), rank=2, modules=("to_q", "conv2", "conv1"), seed=9, alpha=4.0)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_kohya(paths[0], {"unet": one}, origin())
    over = read_lora(paths[0]).digest
    save_kohya(paths[1], {"unet": two}, origin(steps=14, recipe={"seed": 1}, over=over), dtype=torch.float16)
    return paths


def output(*files):
    """The small UNet's output with these LoRA files fused."""
    unet = small_unet()
    for file in files:
        fuse(unet, read_lora(file).components["unet"], scale=1.0, component="unet")
    with torch.no_grad():
        return unet(X, T, conditioning(2).states, return_dict=False)[0]


def test_one_unet_with_the_merged_lora_is_the_unet_with_both(parts, tmp_path):
    merged = merge(parts, tmp_path / "c.safetensors", dtype=torch.float32)
    assert merged.error == 0
    assert merged.ranks == (2, 3, 5)
    both = output(*parts)
    torch.testing.assert_close(output(tmp_path / "c.safetensors"), both, rtol=1e-4, atol=1e-5)
    assert float((both - output(parts[0])).abs().max()) > 0.01
    merge(parts, tmp_path / "half.safetensors")
    torch.testing.assert_close(output(tmp_path / "half.safetensors"), both, rtol=0, atol=5e-3)


def test_it_is_what_a_student_is_on_top_of_the_lora_below(tmp_path):
    """The networks of a feedback run, and the two files that they stand for."""
    networks = stacked()
    save_kohya(tmp_path / "below.safetensors", {"unet": random_deltas(small_unet())}, origin())
    top = {n: Delta(down=d, up=u, alpha=4.0) for n, (d, u) in networks.adapter(Role.STUDENT).items()}
    save_kohya(tmp_path / "top.safetensors", {"unet": top}, origin())
    merge([tmp_path / "below.safetensors", tmp_path / "top.safetensors"], tmp_path / "c.safetensors",
          dtype=torch.float32)  # fmt: skip
    expected = networks.frozen(Role.STUDENT, X, T, conditioning(2))
    torch.testing.assert_close(output(tmp_path / "c.safetensors"), expected, rtol=1e-4, atol=1e-5)


def test_with_equal_scales_the_weights_are_the_parts_own_bit_for_bit(tmp_path):
    one, two = (random_deltas(small_unet(), modules=("to_q",), seed=seed) for seed in (1, 2))
    for name, deltas in (("a", one), ("b", two)):
        save_kohya(tmp_path / f"{name}.safetensors", {"unet": deltas}, {}, dtype=torch.float16)
    merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "c.safetensors")
    made = read_lora(tmp_path / "c.safetensors").components["unet"]
    for name, delta in one.items():
        mine = made[name.replace(".", "_")]
        assert torch.equal(mine.down, torch.cat([delta.down, two[name].down]).half())
        assert torch.equal(mine.up, torch.cat([delta.up, two[name].up], 1).half())
        assert mine.multiplier == delta.multiplier == 0.5


def test_the_metadata_stays(parts, tmp_path):
    merged = merge(parts, tmp_path / "c.safetensors")
    assert merged.notes == ()
    metadata = read_lora(tmp_path / "c.safetensors").metadata
    assert list(plans_from_metadata(metadata["hypersd.plan"])) == [PLAN]
    assert (metadata["hypersd.base"], metadata["hypersd.base_name"]) == ("ab", "small")
    assert metadata["hypersd.steps"] == "14"
    assert json.loads(metadata["hypersd.recipe"]) == {"merged": [{"seed": 0}, {"seed": 1}]}
    assert json.loads(metadata["hypersd.merged"]) == [read_lora(part).digest for part in parts]
    assert "hypersd.over" not in metadata


def products(components):
    return {n: d.multiplier * d.up.flatten(1).double() @ d.down.flatten(1).double() for n, d in
            components["unet"].items()}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_lower_rank_is_the_best_there_is_and_its_error_is_said(parts, tmp_path, rank):
    exact = joined([read_lora(part).components for part in parts])
    made, error = truncated(exact, rank)
    whole, lost = 0.0, 0.0
    for name, product in products(exact).items():
        values = torch.linalg.svdvals(product)
        gap = (product - products(made)[name]).norm()
        torch.testing.assert_close(gap, values[rank:].norm(), rtol=1e-4, atol=1e-5)  # Eckart and Young
        assert made["unet"][name].rank <= rank
        whole, lost = whole + float(product.square().sum()), lost + float(gap.square())
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-4, abs=1e-6)
    merged = merge(parts, tmp_path / "c.safetensors", rank=rank, dtype=torch.float32)
    assert merged.error == error
    if rank == 8:  # more than there is: nothing is lost
        assert error < 1e-7
        torch.testing.assert_close(output(tmp_path / "c.safetensors"), output(*parts), rtol=1e-4, atol=1e-5)


def test_what_does_not_belong_together_is_refused(parts, tmp_path):
    deltas = {"unet": random_deltas(small_unet(), modules=("to_q",))}

    def other(name, metadata, given=deltas):
        save_kohya(tmp_path / name, given, metadata)
        return [parts[0], tmp_path / name]

    out = tmp_path / "c.safetensors"
    with pytest.raises(LoraError, match=r"a.safetensors and x.safetensors have different bases"):
        merge(other("x.safetensors", origin(base_digest="cd")), out)
    later = FewStepPlan(solver=Solver.DDIM, num_steps=4)
    with pytest.raises(LoraError, match="have different plans: they are not for the same model and sampler"):
        merge(other("y.safetensors", origin(plans=[later])), out)
    wide = {"unet": {name: Delta(down=d.down[:, :5], up=d.up) for name, d in deltas["unet"].items()}}
    with pytest.raises(LoraError, match=r"to_q: .* in two of the LoRAs: not for the same model"):
        merge(other("z.safetensors", {}, wide), out)
    original = {"unet": {"input_blocks.1.1.proj_in": next(iter(deltas["unet"].values()))}}
    with pytest.raises(LoraError, match="save both in one form"):
        merge(other("w.safetensors", {}, original), out)
    with pytest.raises(OptionError, match="merge of 1 LoRAs to rank 0: needs at least two"):
        merge(parts[:1], out)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="cannot be written"):
        merge(parts, tmp_path / "file" / "c.safetensors")


def test_a_lora_without_the_one_below_it_is_noted(parts, tmp_path):
    save_kohya(tmp_path / "x.safetensors", {"unet": random_deltas(small_unet())}, origin(steps=0))
    merged = merge([tmp_path / "x.safetensors", parts[1]], tmp_path / "c.safetensors")
    (note,) = merged.notes
    assert note.startswith("b.safetensors was trained on top of another LoRA (")


def test_the_command(parts, tmp_path):
    out = tmp_path / "c.safetensors"
    result = CliRunner().invoke(app, ["merge", *map(str, parts), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"wrote {out}: 28 modules of rank 2, 3, 5, exact"
    result = CliRunner().invoke(app, ["merge", *map(str, parts), "--out", str(out), "--rank", "2"])
    assert "of rank 2, relative error" in result.stdout
