"""Latency and quality reports with invented figures, for tests of what is made of them."""

from benchmarks.bench.parts import LATENCY_FORMAT, QUALITY_FORMAT

MACHINE = {
    "cpu": "Fast 9000", "architecture": "x86_64", "cores": 8, "usable_cores": 8, "threads": 4, "memory_gb": 16.0,
    "system": "Linux 6", "python": "3.11", "versions": {"torch": "2.13.0"}, "load": [0.1, 0.2, 0.3],
    "clocks": {"mhz": [2000, 3000], "governor": None}, "load_after": [1.0, 0.5, 0.3],
}  # fmt: skip
PARITY = {"unet": {"psnr_db": 146.0, "least_db": 90.0}, "image": {"psnr_db": 200.0, "least_db": 50.0}}


def times(p50):
    return {"count": 100, "p50": p50, "p90": 1.1 * p50, "p99": 1.2 * p50, "mean": p50, "min": p50, "max": 2 * p50}


def entrant(name, p50, ratio, *, kind="bundle", steps=4, half=0.05, **more):
    return {
        "name": name, "kind": kind, "target": "onnx" if kind == "bundle" else kind, "precision": "fp32", "steps": steps,
        "status": "measured", "image_ms": times(p50), "components_ms": {"unet": times(0.8 * p50)},
        "cold_start_s": {"median": 1.0, "all": [1.0]}, "load_s": {"median": 0.5, "all": [0.5]},
        "first_image_s": {"median": 0.5, "all": [0.5]}, "peak_mb": 200.0, "size_mb": 63.7, "versions": {"lib": "1"},
        "images_per_s": {"1": {"value": 1000 / p50, "low": 900 / p50, "high": 1100 / p50, "count": 100}},
        "ratio": {"value": ratio, "low": ratio * (1 - half), "high": ratio * (1 + half)}, **more,
    }  # fmt: skip


def latency(*entrants, reference="onnx-4"):
    return {
        "format": LATENCY_FORMAT, "created": "2026-01-01T00:00:00+00:00", "reference": reference, "prompt": "a fox",
        "machine": MACHINE, "energy": "no /sys/class/powercap", "command": ["hypersd-bench", "latency", "a b"],
        "options": {"rounds": 100, "sessions": 5, "warmup": 3, "batches": [1], "threads": 4},
        "peak": {"gemm_gflop_per_s": 100.0, "copy_gb_per_s": 10.0, "side": 1024, "threads": 4, "count": 100},
        "entrants": list(entrants),
    }  # fmt: skip


def candidate(name, score, *, kind="bundle", half=1.0, fd=0.5, steps=4, **more):
    def figure(value, half):
        return {"value": value, "low": value - half, "high": value + half, "count": 64}

    return {
        "name": name, "kind": kind, "target": "onnx", "precision": "fp32", "steps": steps, "status": "measured",
        "parity": PARITY, "categories": {},
        "figures": {
            "clip_score": figure(score, half), "fd_t": figure(fd, 0.1), "precision": {"value": 0.9, "count": 64},
        },
        **more,
    }  # fmt: skip


def quality(*candidates, **more):
    return {
        "format": QUALITY_FORMAT, "created": "2026-01-01T00:00:00+00:00", "command": ["hypersd-bench", "quality"],
        "machine": MACHINE, "processes": 1, "first": candidates[0]["name"], "candidates": list(candidates),
        "eye": {"name": "builtin", "model": "m", "size_px": 32, "crop": "none", "prefix": ""},
        "prompts": {"file": "p.tsv", "count": 64, "digest": "d", "first_seed": 0, "diversity": {}},
        "reference": {"name": "teacher at 25 steps"}, **more,
    }  # fmt: skip


def not_run(name, why, kind="bundle"):
    return {"name": name, "kind": kind, "status": "not run", "why": why}
