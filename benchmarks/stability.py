"""Do two runs of `hypersd-bench latency` say the same? `python -m benchmarks.stability FIRST SECOND [--out DIR]`

Of two latency.json (or report.json) of the same contestants: how many ratios of one run lie where it said that an equal
second run's would (`again_low`, `again_high`: 95 of 100), and which pairs of contestants change their order although
both runs hold them apart. Exit code 1 if fewer than LEAST of the ratios are inside, or an order reverses.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.results import one_line_error, write_result
from hypersd_export.errors import DataError

LEAST = 0.9

Ratios = Mapping[str, Mapping[str, float]]


def ratios(path: Path) -> Ratios:
    """The ratios to the first contestant by name, without that one's own. DataError for a file that has none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entrants = (data.get("latency") or data)["entrants"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: no report of hypersd-bench latency ({str(error)[:60]})") from error
    return {row["name"]: row["ratio"] for row in entrants if "ratio" in row and row["ratio"]["value"] != 1.0}


def compare(first: Ratios, second: Ratios) -> dict[str, Any]:
    """What lies outside and what reverses, of the contestants that both have. DataError where these are none."""
    names = [name for name in first if name in second]
    if not names:
        raise DataError("the two runs have no contestant in common")
    pairs = [(one, other, name) for one, other in ((first, second), (second, first)) for name in names]
    outside = sorted({name for one, other, name in pairs if not _holds(one[name], other[name]["value"])})
    inside = sum(_holds(one[name], other[name]["value"]) for one, other, name in pairs) / len(pairs)
    reversed_ = [
        [a, b]
        for a, b in combinations(names, 2)
        if _order(first, a, b) * _order(second, a, b) < 0  # 0: a run that does not hold them apart
    ]
    return {"ratios": len(pairs), "inside": inside, "outside": outside, "reversed": reversed_}


def _holds(ratio: Mapping[str, float], value: float) -> bool:
    return ratio["again_low"] <= value <= ratio["again_high"]


def _order(run: Ratios, a: str, b: str) -> int:
    """-1 if a is the faster one by its interval and b's, 1 if it is the slower one, 0 if the intervals meet."""
    if run[a]["again_high"] < run[b]["again_low"]:
        return -1
    return int(run[a]["again_low"] > run[b]["again_high"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print one JSON object, and write stability.json with `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with one_line_error(options.out) as ended:
        found = compare(ratios(options.first), ratios(options.second))
        print(json.dumps(found))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            write_result(options.out, "stability", found)
        if found["inside"] < LEAST or found["reversed"]:
            return 1
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
