"""Real sources: what is encoded, how it is read, and when it is encoded again."""

import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from hypersd_export.errors import DataError, OptionError
from tests.lora_files import one_line
from tests.train.data_files import SIZE, as_folder, as_shards, opened, png, refused, samples
from tests.train.tiny_sdxl import tiny_sdxl
from trainer.base import TrainingBase, open_training_base
from trainer.data import cache as cache_module
from trainer.data import open_source
from trainer.data.pictures import read_picture
from trainer.distill.config import DataConfig


@pytest.fixture(scope="module")
def base(tiny_base) -> TrainingBase:
    return open_training_base(str(tiny_base))


@pytest.fixture
def encodes(monkeypatch) -> list[int]:
    """The number of pictures of every call of the encoder."""
    calls: list[int] = []
    whole = cache_module.Encoder.__call__

    def counted(self, pictures, captions):
        calls.append(len(pictures))
        return whole(self, pictures, captions)

    monkeypatch.setattr(cache_module.Encoder, "__call__", counted)
    return calls


def everything(source) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{caption: (latents, states)} of an epoch."""
    batch = source.batch(range(len(source)))
    rows = zip(batch.captions, batch.latents, batch.conditioning.states, strict=True)
    return {caption: (latents, states) for caption, latents, states in rows}


def test_latents_and_states_are_what_the_encoders_give(base, tmp_path):
    source = opened(as_folder(tmp_path / "in", 7), base, tmp_path / "cache")
    assert len(source) == 7
    assert source.latent_shape == base.latent_shape(SIZE) == (4, 4, 4)
    vae, text = base.load_vae(torch.float32), base.prompt_encoder(torch.float32)
    batch = source.batch(range(7))
    assert batch.latents.dtype == batch.conditioning.states.dtype == torch.float32
    wanted = {caption: (key, picture) for key, (picture, caption) in samples(7).items()}
    assert sorted(batch.captions) == sorted(wanted)
    for i, caption in enumerate(batch.captions):
        key, picture = wanted[caption]
        assert batch.names[i] == f"{key}.png"
        pixels = torch.from_numpy(read_picture(picture, SIZE).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            direct = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(batch.latents[i], direct[0], rtol=0, atol=2e-6)
        states = text([caption], size=(SIZE, SIZE)).states.half().float()
        torch.testing.assert_close(batch.conditioning.states[i], states[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(source.empty.states, text.empty().states, rtol=0, atol=0)


def test_pictures_are_turned_resized_and_cropped():
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    out = io.BytesIO()
    exif = wide.getexif()
    exif[0x0112] = 6  # the camera was held upright: 90° clockwise to show it
    wide.save(out, "PNG", exif=exif)
    upright = wide.transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (40, 60)
    expected = np.asarray(upright.resize((20, 30), Image.Resampling.LANCZOS).crop((0, 5, 20, 25)))
    np.testing.assert_array_equal(read_picture(out.getvalue(), 20), expected)
    np.testing.assert_array_equal(
        read_picture(png(0, (20, 20)), 20), np.asarray(Image.open(io.BytesIO(png(0, (20, 20)))))
    )


def test_transparency_is_white_and_greys_are_rgb():
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    clear.paste((10, 20, 30, 255), (0, 0, 8, 16))
    out = io.BytesIO()
    clear.save(out, "PNG")
    pixels = read_picture(out.getvalue(), 16)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 15].tolist() == [255, 255, 255]
    grey = io.BytesIO()
    Image.new("L", (16, 16), 77).save(grey, "WEBP", lossless=True)
    assert (read_picture(grey.getvalue(), 16) == 77).all()


def test_folder_datasets_and_shards_give_the_same_samples(base, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    folder, cache = as_folder(tmp_path / "in", 6), tmp_path / "cache"
    rows = list(samples(6).values())
    cells = {"image": [{"bytes": p, "path": None} for p, _ in rows], "text": [c for _, c in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(cells, features=features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    data.to_parquet(tmp_path / "rows.parquet")
    lines = [json.dumps({"image": f"in/{key}.png", "text": c}) for key, (_, c) in samples(6).items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    expected = everything(opened(folder, base, cache))
    assert len(expected) == 6
    sources = ("saved", "dict", "rows.parquet", "rows.jsonl", "*.parquet")
    for given in (*(str(tmp_path / name) for name in sources), as_shards(tmp_path / "shards", 6)):
        found = everything(opened(given, base, cache))
        assert found.keys() == expected.keys()
        for caption, tensors in found.items():
            for mine, theirs in zip(tensors, expected[caption], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def test_metadata_lines_and_columns(base, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "deep/b.png", "deep/c.png", "d.jpeg")):
        (folder / name).write_bytes(png(i))
    (folder / "d.txt").write_text("from a text file")
    top = [{"file_name": "a.png", "prompt": "top a"}, {"file_name": "deep/b.png", "prompt": "top b"}]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, top)) + "\n\n", encoding="utf-8")
    near = [{"file_name": "./b.png", "prompt": "near b"}, {"file_name": "c.png", "prompt": "near c", "text": "no"}]
    (folder / "deep" / "metadata.jsonl").write_text("\n".join(map(json.dumps, near)))
    source = opened(folder, base, tmp_path / "cache", caption_column="prompt")
    batch = source.batch(range(4))
    assert dict(zip(batch.names, batch.captions, strict=True)) == {
        "a.png": "top a", "deep/b.png": "near b", "deep/c.png": "near c", "d.jpeg": "from a text file",
    }  # fmt: skip
    assert not source.skipped.total


def test_the_stream_is_a_permutation_per_epoch_and_is_read_at_any_position(base, tmp_path):
    folder = as_folder(tmp_path / "in", 9)
    source = opened(folder, base, tmp_path / "cache", seed=3)
    epochs = [[source.sample_at(p) for p in range(9 * e, 9 * e + 9)] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    run = [source.batch(range(4 * s, 4 * s + 4)) for s in range(6)]
    again = opened(folder, base, tmp_path / "cache", seed=3)  # another process, resumed at step 4
    for step in (4, 5):
        other = again.batch(range(4 * step, 4 * step + 4))
        assert other.names == run[step].names
        assert torch.equal(other.latents, run[step].latents)
    halves = [again.batch(range(8, 10)), again.batch(range(10, 12))]  # two processes
    assert torch.equal(torch.cat([half.latents for half in halves]), run[2].latents)
    other = opened(folder, base, tmp_path / "cache", seed=4)
    assert [other.sample_at(p) for p in range(9)] != epochs[0]


def test_a_second_run_encodes_nothing_and_loads_no_model(base, tmp_path, encodes, monkeypatch):
    folder = as_folder(tmp_path / "in", 5)
    first = opened(folder, base, tmp_path / "cache").batch([0, 1])
    assert sum(encodes) == 5
    monkeypatch.setattr(TrainingBase, "load_vae", lambda self, dtype: pytest.fail("loaded"))
    monkeypatch.setattr(TrainingBase, "prompt_encoder", lambda self, dtype: pytest.fail("loaded"))
    again = opened(folder, base, tmp_path / "cache").batch([0, 1])
    assert sum(encodes) == 5
    assert torch.equal(first.latents, again.latents)
    shutil.move(folder, tmp_path / "elsewhere")
    assert len(opened(tmp_path / "elsewhere", base, tmp_path / "cache")) == 5  # a source that moved is the same


def test_what_the_cache_depends_on_makes_another(base, tmp_path, encodes, tiny_base):
    folder, cache = as_folder(tmp_path / "in", 3), tmp_path / "cache"
    opened(folder, base, cache)
    changes = [
        lambda: (folder / "p001.txt").write_text("another caption"),
        lambda: (folder / "p001.png").write_bytes(png(77)),
        lambda: os.utime(folder / "p002.png", (1, 1)),
        lambda: (folder / "p002.png").rename(folder / "q.png"),
    ]
    for change in changes:
        change()
        before = sum(encodes)
        opened(folder, base, cache)
        assert sum(encodes) > before
    before = sum(encodes)
    opened(folder, base, cache, size_px=20)
    opened(folder, base, cache, max_samples=1)
    copy = shutil.copytree(tiny_base, tmp_path / "base")
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.7}))
    opened(folder, open_training_base(str(copy)), cache)
    assert sum(encodes) == before + 2 + 1 + 2
    assert not list(cache.glob("*.partial*"))


def test_max_samples_takes_the_first_that_can_be_used(base, tmp_path):
    folder = as_folder(tmp_path / "in", 6)
    (folder / "p000.txt").write_text("")
    source = opened(folder, base, tmp_path / "cache", max_samples=3)
    assert sorted(source.batch(range(3)).names) == ["p001.png", "p002.png", "p003.png"]


def test_a_run_that_was_killed_goes_on_after_the_last_whole_shard(base, tmp_path, encodes, monkeypatch):
    folder, cache = as_folder(tmp_path / "in", 10), tmp_path / "cache"
    (folder / "p001.png").write_bytes(b"damaged")
    monkeypatch.setattr(cache_module, "SHARD_SAMPLES", 3)
    monkeypatch.setattr(cache_module, "PIXELS_AT_ONCE", 2 * SIZE**2)  # two at a time
    whole = opened(folder, base, tmp_path / "whole")
    del encodes[:]

    def killed(done, total):
        assert total == 10
        if done == 8:
            raise KeyboardInterrupt

    config = DataConfig(source=str(folder), size_px=SIZE)
    with pytest.raises(KeyboardInterrupt):
        open_source(config, base, seed=0, cache=cache, progress=killed, device="cpu")
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    lost = sum(encodes)
    seen: list[int] = []
    source = open_source(
        config, base, seed=0, cache=cache, progress=lambda done, total: seen.append(done), device="cpu"
    )
    assert lost == 6
    assert seen[0] == 6  # 4 pictures of the first 5 records were written
    assert sum(encodes) == lost + 5
    assert source.skipped.names == whole.skipped.names == {"unreadable image": ["p001.png"]}
    mine, theirs = source.batch(range(9)), whole.batch(range(9))
    assert mine.names == theirs.names
    torch.testing.assert_close(mine.latents, theirs.latents, rtol=0, atol=2e-6)


def test_two_that_open_at_once_encode_once(base, tmp_path, encodes):
    folder = as_folder(tmp_path / "in", 6)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: opened(folder, base, tmp_path / "cache"), range(2)))
    assert sum(encodes) == 6
    assert found[0].batch([0, 1]).names == found[1].batch([0, 1]).names


@pytest.mark.parametrize("harm", ["cut", "flip", "index", "missing", "empty"])
def test_a_damaged_cache_is_one_clear_error(base, tmp_path, harm):
    folder, cache = as_folder(tmp_path / "in", 5), tmp_path / "cache"
    place = opened(folder, base, cache).folder
    shard = place / "shard-00000.safetensors"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif harm == "flip":
        data = bytearray(shard.read_bytes())
        data[-20] ^= 1
        shard.write_bytes(data)
    elif harm == "index":
        (place / "index.json").write_text((place / "index.json").read_text()[:-30])
    else:
        (shard if harm == "missing" else place / "empty.safetensors").unlink()
    with pytest.raises(DataError, match="damaged data cache") as caught:
        opened(folder, base, cache).batch(range(5))
    assert f"delete {place} " in one_line(caught.value)


def test_a_disk_that_is_full_leaves_no_cache_behind(base, tmp_path, monkeypatch):
    from trainer.data import store

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_tensors", full)
    refused(as_folder(tmp_path / "in", 2), base, tmp_path / "cache", match="No space left on device")
    monkeypatch.undo()
    assert len(opened(tmp_path / "in", base, tmp_path / "cache")) == 2


def test_sdxl_samples_carry_pooled_states_and_time_ids(tmp_path):
    base = open_training_base(str(tiny_sdxl(tmp_path / "sdxl")))
    source = opened(as_folder(tmp_path / "in", 3), base, tmp_path / "cache", size_px=20)
    batch = source.batch([0, 1])
    direct = base.prompt_encoder(torch.float32)(batch.captions, size=(20, 20))
    torch.testing.assert_close(batch.conditioning.states, direct.states, rtol=0, atol=2e-3)
    torch.testing.assert_close(batch.conditioning.pooled, direct.pooled, rtol=0, atol=2e-3)
    assert torch.equal(batch.conditioning.time_ids, direct.time_ids)
    assert not source.empty.states.any()
    assert torch.equal(source.empty.time_ids, direct.time_ids[:1])
    with torch.no_grad():
        out = base.load_unet(torch.float32)(batch.latents, 5, **batch.conditioning.unet_kwargs()).sample
    assert out.shape == batch.latents.shape == (2, 4, 5, 5)


def test_options_that_name_nothing(base, tmp_path):
    def tried(**changes):
        return open_source(DataConfig(**changes), base, seed=0, cache=tmp_path / "cache")

    for changes, match in (
        ({"source": ""}, "builtin, an image folder"),
        ({"on_error": "ignore"}, "must be skip or stop"),
        ({"max_samples": -1}, "max_samples -1"),
        ({"source": str(tmp_path), "size_px": 18}, "multiple of 4"),
    ):
        with pytest.raises(OptionError, match=match) as caught:
            tried(**changes)
        one_line(caught.value)
    (tmp_path / "x.bin").write_bytes(b"?")
    (tmp_path / "x.json").write_text("[")
    for source, match in (
        ("no/such/place/here", "no such file or folder"),
        (str(tmp_path / "x.bin"), "a file of no known kind"),
        (str(tmp_path / "x.json"), "datasets cannot read it"),
        (str(tmp_path / "none.parquet"), "no such file"),
        (str(tmp_path / "{000..003}.tar"), "4 of its 4 shards are not there"),
        ("pipe:touch /tmp/x.tar", "are not there"),
    ):
        with pytest.raises(DataError, match=match) as caught:
            tried(source=source)
        one_line(caught.value)


def test_a_hub_dataset_that_cannot_be_reached_is_one_line(base, tmp_path, monkeypatch):
    import datasets

    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("owner/pictures", base, tmp_path / "cache", match="owner/pictures: datasets cannot read it .Couldn't reach")


def test_columns_and_splits_are_named(base, tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"image": [png(0)], "caption": ["a"]})
    data.save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", base, tmp_path / "cache", match="'text': not a column of .* image, caption")
    assert len(opened(tmp_path / "saved", base, tmp_path / "cache", caption_column="caption")) == 1
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "dict")
    refused(tmp_path / "dict", base, tmp_path / "cache", match="no split 'train' among a, b")
