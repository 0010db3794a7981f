"""Small picture sources for tests: the same pictures and captions as a folder, a dataset and shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_export.errors import DataError
from tests.lora_files import one_line
from trainer.data import CachedSource, open_source
from trainer.distill.config import DataConfig

SIZE = 16


def png(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> bytes:
    """A lossless picture of smooth random colours, (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8), mode)
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def samples(count: int) -> dict[str, tuple[bytes, str]]:
    """{key: (PNG, caption)}."""
    return {f"p{i:03d}": (png(i, (24 + i % 3, 20)), f"caption {i}") for i in range(count)}


def as_folder(folder: Path, count: int) -> Path:
    """Pictures with side files."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, (picture, caption) in samples(count).items():
        (folder / f"{key}.png").write_bytes(picture)
        (folder / f"{key}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def as_shards(folder: Path, count: int, per_shard: int = 4) -> str:
    """webdataset shards; half of the captions are in .json. Returns the pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    items = list(samples(count).items())
    for start in range(0, count, per_shard):
        files = {}
        for i, (key, (picture, caption)) in enumerate(items[start : start + per_shard]):
            text = {".txt": caption.encode()} if i % 2 else {".json": json.dumps({"text": caption}).encode()}
            files |= {f"{key}{suffix}": data for suffix, data in ({".png": picture} | text).items()}
        write_tar(folder / f"{start // per_shard:03d}.tar", files)
    return f"{folder}/{{000..{(count - 1) // per_shard:03d}}}.tar"


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    """A tar of these files, in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def opened(source: object, base: object, cache: Path, *, seed: int = 0, **options: object) -> CachedSource:
    """`open_source` on the CPU at 16 px."""
    config = DataConfig(**{"source": str(source), "size_px": SIZE, **options})  # type: ignore[arg-type]
    found = open_source(config, base, seed=seed, cache=cache, device="cpu")  # type: ignore[arg-type]
    assert isinstance(found, CachedSource)
    return found


def refused(*args: object, match: str, **options: object) -> str:
    """The one line of the DataError that opening gives."""
    import pytest

    with pytest.raises(DataError, match=match) as caught:
        opened(*args, **options)  # type: ignore[arg-type]
    return one_line(caught.value)
