"""`python -m hypersd_export.model.convert IN OUT`: a pickled checkpoint (.ckpt, .bin, .pt) as safetensors.

The pickle is read with `weights_only=True`, which unpickles tensors and plain containers and runs no code.
"""

import sys
from pathlib import Path

from hypersd_export.errors import HypersdError, ModelError
from hypersd_export.model.files import check_weights, is_pickle, read_tensors, write_tensors


def convert(source: Path, target: Path) -> int:
    """Write the tensors of `source` to `target`; returns how many. Raises ModelError in one line."""
    import torch

    if not is_pickle(source):
        raise ModelError(f"{source}: not a .ckpt, .bin, .pt or .pth file; nothing to convert (rename it if it is one)")
    check_weights(source, allow_pickle=True)
    if target.exists():
        raise ModelError(f"{target}: exists; name another file or remove it")
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in read_tensors(source).items():
        shared = tensor.untyped_storage().data_ptr() in seen  # safetensors refuses tensors that share memory
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor.contiguous()
    if not tensors:
        raise ModelError(f"{source}: holds no tensors; nothing to convert")
    write_tensors(target, tensors, {"format": "pt"})
    return len(tensors)


def main(arguments: list[str] | None = None) -> int:
    """Command line: two paths; prints one line and returns the exit code."""
    paths = sys.argv[1:] if arguments is None else arguments
    if len(paths) != 2:
        print("usage: python -m hypersd_export.model.convert IN.ckpt OUT.safetensors", file=sys.stderr)
        return 2
    try:
        count = convert(Path(paths[0]), Path(paths[1]))
    except HypersdError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"{paths[1]}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
