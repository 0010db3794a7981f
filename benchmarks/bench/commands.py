"""What the subcommands of `hypersd-bench` do: open, measure, print tables, write the parts of the report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench import figures, layout, machine, tables
from benchmarks.bench.entrants import (
    Entrant,
    OpenBundle,
    Versus,
    bundle_entrant,
    captured,
    golden_prompt,
    open_bundles,
    speed_entrant,
)
from benchmarks.bench.latency import Options, race
from benchmarks.bench.parts import LATENCY_FILE, write_part
from benchmarks.bench.weights import Places
from benchmarks.bench.work import unet_work
from hypersd_export.bundle.cache import StageCache, default_cache_dir
from hypersd_export.errors import OptionError


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which bundles, run how, against whom."""

    bundles: tuple[Path, ...]
    versus: tuple[str, ...] = ()
    steps: int | None = None
    runtime: str | None = None
    provider: str | None = None
    places: Places = field(default_factory=Places)
    cuda_graph: bool = False
    """Time bundles whose UNet is a graph of its own with its call captured as well."""
    absent: tuple[tuple[str, str], ...] = ()
    """Bundles that could not be made, and why: they have a row that says so."""
    cache_dir: Path | None = None

    @property
    def cache(self) -> Path:
        """The folder of everything that is kept."""
        return self.cache_dir or default_cache_dir()

    def open(self) -> list[OpenBundle]:
        """See `open_bundles`."""
        if len(set(self.versus)) != len(self.versus):
            raise OptionError(f"--vs {' --vs '.join(self.versus)}: name each once")
        return open_bundles(self.bundles, runtime=self.runtime, provider=self.provider, steps=self.steps)


def run_latency(
    selection: Selection, options: Options, *, prompt: str | None, out: Path | None, command: Sequence[str]
) -> dict[str, Any]:
    """The latency report, written to `out`/latency.json and printed as a table."""
    bundles = selection.open()
    first = bundles[0]
    prompt = golden_prompt(first) if prompt is None else prompt
    described, energy = machine.describe(options.threads), machine.Energy.find()
    with tables.Progress() as progress:
        versus = Versus(
            first=first, prompt=prompt, threads=options.threads, places=selection.places,
            cache=StageCache(selection.cache), tell=progress.tell,
        )  # fmt: skip
        entrants = [bundle_entrant(bundle, prompt=prompt, threads=options.threads) for bundle in bundles]
        entrants += [
            bundle_entrant(bundle, prompt=prompt, threads=options.threads, cuda_graph=True)
            for bundle in bundles
            if selection.cuda_graph and bundle.runtime == "onnx" and not bundle.is_single_graph
        ]
        entrants += [versus.entrant(kind) for kind in selection.versus]
        entrants += [Entrant(name=name, kind="bundle", missing=why) for name, why in selection.absent]
        speed = speed_entrant(options.threads, device=first.device, precision=first.torch_precision)
        times = race([*entrants, speed], options, energy, tell=progress.tell)
        work = {bundle.name: unet_work(bundle.path, bundle.manifest) for bundle in bundles}
        work |= {captured(name): of_unet for name, of_unet in work.items()} | {"": work[first.name]}
        described["load_after"], described["clocks_after"] = machine.load(), machine.clocks()
        report = figures.report(
            entrants, times, options, speed=times.get(speed.name), work=work, energy=energy, machine=described,
            prompt=prompt, command=command,
        )  # fmt: skip
        progress.table(layout.latency_table({"latency": report}))
        progress.left_out({"latency": report})
    write_part(out, LATENCY_FILE, report)
    return report
