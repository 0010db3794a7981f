"""The one type alias of this leaf: whatever adds and multiplies."""

from typing import Any, TypeAlias

Array: TypeAlias = Any
"""A NumPy array, a torch tensor or a float. The functions of this package act on samples with operators only, so that
one function serves the runtime (NumPy), the trainer and the tests (torch) and the table builder (plain floats)."""
