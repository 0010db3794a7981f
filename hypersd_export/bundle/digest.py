"""SHA-256 of files, of folders and of plain data: what keys, manifests and bundle identities are made of."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes, read in blocks (the interpreter lock is released meanwhile)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """One text for one value: keys sorted, no spaces, UTF-8 as it is, tuples as lists.

    Raises:
        TypeError: something that JSON has no word for (a Path, an array): the caller decides how it is spelt.
        ValueError: NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_json(value: Any) -> str:
    """Hex SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def is_outside(name: str) -> bool:
    """Whether a file's name in a bundle leads out of it (or may, on another system)."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name


def digest_tree(folder: Path, pattern: str = "*") -> str:
    """Hex SHA-256 over names and contents of the files under `folder` whose name fits `pattern`.

    With `pattern="*.py"` this is the digest of a package's source, for cache keys that must change with the code.
    """
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return digest_json([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])
