"""A list of prompts as a source: shuffled as the others, encoded once, and only for what begins from noise."""

from dataclasses import replace

import pytest
import torch

from hypersd_export.errors import DataError, OptionError
from tests.train.small_run import small_config
from trainer.base import open_training_base
from trainer.data import Prompts, open_source
from trainer.distill.config import DataConfig
from trainer.distill.run import Distillation


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \na cat on a dog\nein Vogel\n", encoding="utf-8")
    return path


def opened(path, tiny_base, cache, **changes):
    return open_source(
        DataConfig(source=str(path), **changes), open_training_base(str(tiny_base)), seed=3, cache=cache, device="cpu"
    )


def test_every_epoch_has_every_prompt_once_with_its_own_conditioning(listed, tiny_base, tmp_path):
    source = opened(listed, tiny_base, tmp_path / "cache")
    assert isinstance(source, Prompts)
    assert (len(source), source.skipped.names) == (4, {"empty caption": ["line 2"]})
    for epoch in range(2):
        batch = source.batch(range(4 * epoch, 4 * epoch + 4))
        assert sorted(batch.captions) == ["a cat", "a cat on a dog", "a dog", "ein Vogel"]
        encoder = open_training_base(str(tiny_base)).prompt_encoder(torch.float32)
        torch.testing.assert_close(batch.conditioning.states, encoder(batch.captions, size=(16, 16)).states)
    assert batch.latents.shape == (4, 4, 4, 4)
    assert float(batch.latents.abs().max()) == 0
    again = opened(listed, tiny_base, tmp_path / "cache").batch([5, 1])
    assert again.captions == source.batch([5, 1]).captions
    assert len(opened(listed, tiny_base, tmp_path / "cache", max_samples=2)) == 2


def test_what_is_no_list_of_prompts_is_refused(tiny_base, tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(DataError, match=r"prompts.txt: cannot be read as UTF-8 text"):
        opened(path, tiny_base, tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"cannot be read as UTF-8 text"):
        opened(path, tiny_base, tmp_path)
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"has no prompts; pass a prompt a line"):
        opened(path, tiny_base, tmp_path)


def test_methods_that_learn_from_pictures_refuse_it(listed, tiny_base, tmp_path):
    config = replace(small_config(tiny_base), data=DataConfig(source=str(listed)))
    with pytest.raises(OptionError, match=r"prompts.txt: prompts alone, and this learns from pictures; pass --data"):
        Distillation(config, tmp_path / "out")
