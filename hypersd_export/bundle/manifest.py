"""manifest.json: what a bundle is made of, how, with which proof, and the sha256 of every file in it.

The bundle's identity ("bundle digest") is the sha256 of manifest.json, which is why the manifest does not list itself.
Hidden files and folders (a name that begins with a dot) are outside the manifest: nothing reads them, and file
managers and download tools leave such files behind.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypersd_export.bundle.digest import is_outside, sha256_file
from hypersd_export.errors import BundleError

FORMAT = "hypersd-bundle/1"
FILE_NAME = "manifest.json"
NOT_VERIFIED = "not verified"

# Below this size threads cost more than they gain.
_PARALLEL_BYTES = 32_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Digest and size of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of manifest.json; each field is plain JSON data (see schemas/manifest.schema.json)."""

    created: str
    hypersd: str
    base: Mapping[str, Any]
    loras: Sequence[Mapping[str, Any]]
    targets: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    stages: Sequence[Mapping[str, Any]]
    parity: Mapping[str, Any] | str
    """Numbers by component, or "not verified"."""
    files: Mapping[str, FileEntry]
    """By path relative to the bundle, with forward slashes."""

    def to_json(self) -> dict[str, Any]:
        """The dict that manifest.json holds."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: Path) -> "Manifest":
        """Read a manifest's dict.

        Raises:
            BundleError: another format or version, a missing key, or a value of the wrong type.
        """
        if not isinstance(data, dict):
            raise BundleError(f"{where} is not a manifest: it holds no JSON object; export the bundle again")
        if data.get("format") != FORMAT:
            found = str(data.get("format"))[:60]
            raise BundleError(f"{where} is of format {found!r}, and this version reads {FORMAT!r}: export it again")
        kinds: dict[str, type | tuple[type, ...]] = {
            "created": str, "hypersd": str, "base": dict, "loras": list, "targets": dict, "options": dict,
            "versions": dict, "stages": list, "parity": (dict, str), "files": dict,
        }  # fmt: skip
        wrong = [key for key, kind in kinds.items() if not isinstance(data.get(key), kind)]
        if wrong:
            raise BundleError(f"{where} has no usable {', '.join(wrong)}: export the bundle again")
        values = {key: data[key] for key in kinds if key != "files"}
        return cls(**values, files={name: _file_entry(name, entry, where) for name, entry in data["files"].items()})


def _file_entry(name: str, entry: Any, where: Path) -> FileEntry:
    if is_outside(name):
        raise BundleError(f"{where} lists {name[:80]!r}, which is outside the bundle: do not trust this bundle")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("sha256"), str)
        or not isinstance(entry.get("bytes"), int)
    ):
        raise BundleError(f"{where} has no sha256 and bytes for {name[:80]!r}: export the bundle again")
    return FileEntry(sha256=entry["sha256"], bytes=entry["bytes"])


def bundle_files(bundle: Path) -> dict[str, Path]:
    """Every file that belongs in the manifest, by its name there, sorted: all but manifest.json and hidden ones."""
    found = {}
    for folder, folders, names in os.walk(bundle):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(bundle).as_posix()
            if not name.startswith(".") and relative != FILE_NAME and path.is_file():
                found[relative] = path
    return dict(sorted(found.items()))


def _digest_all(paths: Sequence[Path]) -> list[str]:
    if len(paths) < 2 or sum(path.stat().st_size for path in paths) < _PARALLEL_BYTES:
        return [sha256_file(path) for path in paths]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_file, paths))


def write_manifest(
    bundle: Path,
    *,
    hypersd: str,
    base: Mapping[str, Any],
    loras: Sequence[Mapping[str, Any]],
    targets: Mapping[str, Any],
    options: Mapping[str, Any],
    versions: Mapping[str, str],
    stages: Sequence[Mapping[str, Any]],
    parity: Mapping[str, Any] | str,
    created: str | None = None,
    noted: Mapping[str, str] = MappingProxyType({}),
) -> Manifest:
    """Hash every file under `bundle` and write manifest.json there; the last thing that is written into a bundle.

    Args:
        bundle: the finished folder.
        hypersd: the version of this package.
        base: name, family, digest.
        loras: for each, file, digest, scale, format, plan_source.
        targets: what was built, by target.
        options: the resolved options of the export.
        versions: the tools that took part.
        stages: for each, name, seconds, peak_mb, cached.
        parity: by component (psnr_db, max_abs, …), or "not verified".
        created: an ISO 8601 time; now, in UTC, if None.
        noted: the SHA-256 of files that are known already, by name; they are not hashed again.
    """
    files = bundle_files(bundle)
    new = [name for name in files if name not in noted]
    digests = {**noted, **dict(zip(new, _digest_all([files[name] for name in new]), strict=True))}
    manifest = Manifest(
        created=created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hypersd=hypersd,
        base=base,
        loras=loras,
        targets=targets,
        options=options,
        versions=versions,
        stages=stages,
        parity=parity,
        files={name: FileEntry(sha256=digests[name], bytes=path.stat().st_size) for name, path in files.items()},
    )
    text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (bundle / FILE_NAME).write_text(text, encoding="utf-8")
    return manifest


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle folder; its files are not looked at.

    Raises:
        BundleError: no such folder, no manifest.json, one that cannot be read, or one of another version.
    """
    path = bundle / FILE_NAME
    if not bundle.is_dir():
        raise BundleError(f"no bundle at {bundle}: give the folder that hypersd-export wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{bundle} is not a bundle (it has no manifest.json): export one there") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error
    return Manifest.from_json(data, path)


def bundle_digest(bundle: Path) -> str:
    """The bundle's identity: sha256 of its manifest.json."""
    return sha256_file(bundle / FILE_NAME)


def verify_files(bundle: Path, manifest: Manifest | None = None) -> Manifest:
    """Compare every file of the bundle with its manifest: none changed, none missing, none too many.

    Returns:
        The manifest.

    Raises:
        BundleError: with all the files that differ, at most four by name; or a file cannot be read.
    """
    manifest = manifest or read_manifest(bundle)
    files = bundle_files(bundle)
    problems = [f"{name} is missing" for name in manifest.files if name not in files]
    problems += [f"{name} is not in the manifest" for name in files if name not in manifest.files]
    same_size = []
    for name, entry in manifest.files.items():
        if name in files:
            if files[name].stat().st_size == entry.bytes:
                same_size.append(name)
            else:
                problems.append(f"{name} was changed")
    try:
        digests = _digest_all([files[name] for name in same_size])
    except OSError as error:
        raise BundleError(
            f"cannot read {error.filename or bundle} ({error.strerror}): check its permissions"
        ) from error
    for name, digest in zip(same_size, digests, strict=True):
        if digest != manifest.files[name].sha256:
            problems.append(f"{name} was changed")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        listed = ", ".join(problems[:4])
        raise BundleError(f"the bundle {bundle} is not what was exported: {listed}{more}; export it again")
    return manifest
