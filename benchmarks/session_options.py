"""Which options of an onnxruntime session pay on a CPU? `python -m benchmarks.session_options GRAPH … --out DIR`

Every variant differs from what the runtime ships (`runtime.onnx.session_options`) in one option. Each is a process of
its own, all of them round by round in a drawn order: seconds to load the graph, seconds a call on seeded inputs, and
the peak of resident memory, mapped files included. Ratios are to what ships, of the rounds' medians, with 95 %
bootstrap intervals over the rounds. Writes session_options.json and session_options.md.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.machine import cpu_name
from benchmarks.bench.tables import interval, number
from benchmarks.gpu_report import table
from benchmarks.results import one_line_error, run_module, write_result
from benchmarks.stats import ratio
from hypersd_export.errors import HypersdError

SHIPPED = "as shipped"
Change = Callable[[Any, Any], None]


def _entry(name: str, value: str) -> Change:
    return lambda _, options: options.add_session_config_entry(name, value)


def _set(name: str, value: Any) -> Change:
    return lambda _, options: setattr(options, name, value)


def _level(name: str) -> Change:
    return lambda ort, options: setattr(
        options, "graph_optimization_level", getattr(ort.GraphOptimizationLevel, f"ORT_{name}")
    )


VARIANTS: Mapping[str, Change] = {
    SHIPPED: lambda *_: None,
    "spinning": _entry("session.intra_op.allow_spinning", "1"),
    "arena": _set("enable_cpu_mem_arena", True),
    "no memory pattern": _set("enable_mem_pattern", False),
    "no prepacking": _entry("session.disable_prepacking", "1"),
    "denormals are zero": _entry("session.set_denormal_as_zero", "1"),
    "by priority": lambda ort, options: setattr(options, "execution_order", ort.ExecutionOrder.PRIORITY_BASED),
    "basic rewriting": _level("ENABLE_BASIC"),
    "extended rewriting": _level("ENABLE_EXTENDED"),
    "one thread": _set("intra_op_num_threads", 1),
}
"""What is changed in the options of a session."""
_ABOUT = """\
# Options of onnxruntime's sessions, on a CPU

Written by `python -m benchmarks.session_options`: {rounds} rounds of one process a variant, in a drawn order, {calls}
calls each. Ratios are to what ships: above 1 is slower, or larger.

"""


def measured(path: Path, variant: str, calls: int) -> dict[str, Any]:
    """Load a graph with a variant's options and call it: seconds to load, of each call after a first one, peak MB."""
    from hypersd_export.runtime.onnx import import_onnxruntime, session_options
    from hypersd_export.usage import measure

    ort = import_onnxruntime()
    options = session_options(ort)
    VARIANTS[variant](ort, options)
    with measure() as usage:
        began = time.perf_counter()
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        loaded = time.perf_counter() - began
        feeds = inputs_of(session)
        seconds = []
        for _ in range(calls + 1):
            began = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - began)
    return {"load_s": loaded, "call_s": seconds[1:], "peak_mb": usage.peak_mb}


def inputs_of(session: Any) -> dict[str, Any]:
    """Seeded values for the inputs of a session, by name: normal noise, 499 for a timestep, small whole numbers."""
    rng = np.random.default_rng(0)
    feeds = {}
    for node in session.get_inputs():
        free = [size for size in node.shape if not isinstance(size, int)]
        if free:
            raise HypersdError(
                f"{node.name} has the free axes {', '.join(map(str, free))}: give a graph of fixed shape"
            )
        if node.type == "tensor(int64)":
            feeds[node.name] = rng.integers(0, 32, node.shape)
        elif node.name == "timestep":
            feeds[node.name] = np.full(node.shape, 499.0, np.float32)
        else:
            feeds[node.name] = rng.standard_normal(node.shape).astype(np.float32)
    return feeds


def rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By variant: the medians over the rounds of load, call and peak, and their ratios to what ships."""
    figures: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "load_s": lambda run: float(run["load_s"]),
        "call_s": lambda run: statistics.median(run["call_s"]),
        "peak_mb": lambda run: float(run["peak_mb"]),
    }
    by_round = {
        variant: {name: [figure(run) for run in each] for name, figure in figures.items()}
        for variant, each in runs.items()
    }
    return {
        variant: {
            name: {
                "median": float(np.median(values)),
                "ratio": ratio(values, by_round[SHIPPED][name]).to_json(),
            }
            for name, values in found.items()
        }
        for variant, found in by_round.items()
    }


def page(graphs: Mapping[str, Mapping[str, Mapping[str, Any]]], about: str, machine: str) -> str:
    """A table a graph."""
    text = about
    for name, found in graphs.items():
        lines = []
        for variant, figures in found.items():
            said = [variant]
            for figure, digits in (("load_s", 2), ("call_s", 3), ("peak_mb", 0)):
                said += [number(figures[figure]["median"], digits), interval(figures[figure]["ratio"])]
            lines.append(said)
        text += f"## {name}\n\n" + table(
            ["options", "load, s", "ratio", "call, s", "ratio", "peak, MB", "ratio"], lines
        )
        text += "\n"
    return f"{text}{machine}\n"


def measure_all(graphs: Sequence[Path], rounds: int, calls: int, variants: Sequence[str]) -> dict[str, Any]:
    """The figures of every variant of every graph, in turn."""
    found = {}
    for path in graphs:
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for turn in range(rounds):
            for variant in random.Random(turn).sample(variants, len(variants)):  # none is always behind the same one
                done = run_module(["benchmarks.session_options", str(path), "--one", variant, "--calls", str(calls)])
                runs[variant].append(json.loads(done))
            print(f"{path}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        found["/".join(path.parts[-3:])] = rows(runs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; `--one` is the process of one variant, which prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="+", type=Path, metavar="GRAPH", help="a model.onnx of fixed shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="of each process, after a first one")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with one_line_error(options.out) as ended:
        if min(options.rounds, options.calls) < 1:
            raise HypersdError(f"--rounds {options.rounds} --calls {options.calls}: at least 1 of each")
        if options.one:
            print(json.dumps(measured(options.graphs[0], options.one, options.calls)))
            return 0
        if options.out is None:
            raise HypersdError("--out is missing: name a folder for session_options.json and .md")
        options.out.mkdir(parents=True, exist_ok=True)
        variants = [SHIPPED, *(name for name in options.variants if name != SHIPPED)]
        graphs = measure_all(options.graphs, options.rounds, options.calls, variants)
        machine = f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, onnxruntime " + version(
            "onnxruntime"
        )
        about = _ABOUT.format(rounds=options.rounds, calls=options.calls)
        data = {"machine": machine, "rounds": options.rounds, "calls": options.calls, "graphs": graphs}
        write_result(options.out, "session_options", data, page(graphs, about, machine))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
