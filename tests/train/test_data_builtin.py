"""The built-in scenes as a source, on a tiny random base."""

import pytest
import torch

from hypersd_export.errors import DataError
from tests.lora_files import one_line
from tests.train.tiny_sdxl import tiny_sdxl
from trainer.base import TrainingBase, encode_pictures, open_training_base
from trainer.data import BuiltinScenes, open_source
from trainer.data.builtin import CHUNK, CHUNKS, renderer
from trainer.distill.config import DataConfig
from trainer.pretrain.scenes import draw_specs, held_out_mask
from trainer.pretrain.unet import caption_index
from trainer.pretrain.vocabulary import all_captions

POSITIONS = [0, 5, 255, 256, 300]


@pytest.fixture(scope="module")
def base(tiny_base) -> TrainingBase:
    return open_training_base(str(tiny_base))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


def scenes(base, cache, *, seed: int = 0, **options) -> BuiltinScenes:
    source = open_source(DataConfig(source="builtin", **options), base, seed=seed, cache=cache, device="cpu")
    assert isinstance(source, BuiltinScenes)
    return source


def same(a, b) -> bool:
    return a.captions == b.captions and torch.equal(a.latents, b.latents) and torch.equal(
        a.conditioning.states, b.conditioning.states
    )  # fmt: skip


def test_a_position_is_a_function_of_the_seed(base, cache, tmp_path):
    first = scenes(base, cache).batch(POSITIONS)
    assert first.latents.shape == (5, 4, 4, 4)
    assert same(first, scenes(base, cache).batch(POSITIONS))  # read back
    alone = scenes(base, tmp_path)  # made again, in another order
    later = alone.batch(POSITIONS[3:])
    assert same(first, alone.batch(POSITIONS))
    assert torch.equal(later.latents, first.latents[3:])
    other = scenes(base, cache, seed=1).batch(POSITIONS)
    assert not torch.equal(other.latents, first.latents)
    assert other.captions != first.captions
    assert len(first.latents.flatten(1).unique(dim=0)) == 5


def test_the_stream_begins_again_after_the_last_chunk(base, cache):
    source = scenes(base, cache)
    assert len(source) == CHUNK * CHUNKS == 32768
    assert same(source.batch([3, 256]), source.batch([3 + 32768, 256 + 5 * 32768]))
    few = scenes(base, cache, max_samples=4)
    assert same(few.batch([0, 1, 2, 3]), few.batch([4, 5, 6, 7]))
    assert same(few.batch([1]), source.batch([1]))


def test_no_held_out_combination_is_ever_drawn(base, cache):
    source, held_out = scenes(base, cache), torch.from_numpy(held_out_mask())
    drawn = torch.zeros_like(held_out)
    for chunk in range(CHUNKS):
        spec = source.specs(chunk)
        assert not held_out[spec.concept, spec.style, spec.background].any()
        drawn[spec.concept, spec.style, spec.background] = True
    assert drawn.sum() > 0.99 * (~held_out).sum()  # and everything else is


def test_latents_and_conditioning_are_what_the_encoders_give(base, cache):
    source = scenes(base, cache)
    batch = source.batch(range(CHUNK))
    generator = source._generator(0)
    spec = draw_specs(CHUNK, ~held_out_mask(), generator)
    assert batch.captions == tuple(spec.captions())
    assert [all_captions()[i] for i in caption_index(spec)] == spec.captions()
    pictures = renderer(base.native_size)(spec, generator)
    direct = encode_pictures(base.load_vae(torch.float32), pictures)
    torch.testing.assert_close(batch.latents, direct, rtol=0, atol=2e-6)
    encoder = base.prompt_encoder(torch.float32)
    direct = encoder(batch.captions[:20], size=(16, 16))
    torch.testing.assert_close(batch.conditioning.states[:20], direct.states, rtol=0, atol=1e-5)
    torch.testing.assert_close(source.empty.states, encoder.empty().states, rtol=0, atol=0)


def test_a_second_run_loads_no_model(base, cache, monkeypatch):
    first = scenes(base, cache).batch(POSITIONS)
    monkeypatch.setattr(TrainingBase, "load_vae", lambda self, dtype: pytest.fail("loaded"))
    monkeypatch.setattr(TrainingBase, "prompt_encoder", lambda self, dtype: pytest.fail("loaded"))
    assert same(first, scenes(base, cache).batch(POSITIONS))


def test_damaged_files_are_named(base, cache, tmp_path):
    scenes(base, tmp_path).batch([0])
    chunk = next(tmp_path.glob("scenes-*/chunk-000.safetensors"))
    data = bytearray(chunk.read_bytes())
    data[-3] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DataError, match="damaged data cache") as caught:
        scenes(base, tmp_path).batch([0])
    assert f"delete {chunk.parent} " in one_line(caught.value)
    rows = next(tmp_path.glob("captions-*/rows-*.safetensors"))
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated") as caught:
        scenes(base, tmp_path)
    assert f"delete {rows.parent} " in one_line(caught.value)


def test_scenes_for_an_sdxl_base(tmp_path):
    base = open_training_base(str(tiny_sdxl(tmp_path / "sdxl")))
    batch = scenes(base, tmp_path / "cache").batch([0, 1])
    direct = base.prompt_encoder(torch.float32)(batch.captions, size=(16, 16))
    torch.testing.assert_close(batch.conditioning.pooled, direct.pooled, rtol=0, atol=1e-5)
    assert torch.equal(batch.conditioning.time_ids, direct.time_ids)
