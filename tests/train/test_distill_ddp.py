"""Two processes on the CPU (gloo) give the losses of one process: forked, so that nothing is imported twice."""

import json
import os
import socket
import traceback
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp

from hypersd_export.errors import DataError, OptionError
from tests.train.small_run import STEPS, RandomSource, finish, log, loras, opened, small_config, start
from trainer.distill.engine import Engine
from trainer.distill.snapshot import checkpoints, load_snapshot

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}  # fmt: skip


def _process(rank, environment, task, results, *arguments):
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch.set_num_threads(1)
    # accelerate offers FSDP and DeepSpeed on GPUs only, but they, and all that is ours, run on a CPU as well.
    if "ACCELERATE_USE_FSDP" in environment:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if "ACCELERATE_USE_DEEPSPEED" in environment:
        import deepspeed

        deepspeed.comm.init_distributed(dist_backend="gloo")
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    try:
        result = task(*arguments)
        failure = None
    except Exception:
        result, failure = None, traceback.format_exc()
    (results / f"{rank}.json").write_text(json.dumps([result, failure]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _on_two(results, task, *arguments, **environment):
    """`task(*arguments)` in two processes; what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "false" if "ACCELERATE_USE_DEEPSPEED" in environment else "true",
    }  # fmt: skip
    results.mkdir()
    mp.start_processes(_process, (environment, task, results, *arguments), nprocs=2, start_method="fork")
    given = [json.loads((results / f"{rank}.json").read_text()) for rank in range(2)]
    for _, failure in given:
        assert failure is None, failure
    return [result for result, _ in given]


def _train(config, out, steps):
    """Train `steps` steps (all: None) and say what this process is."""
    distillation = start(config, out)
    run = distillation.run()
    for _ in range(steps) if steps else iter(int, 1):
        if next(run, None) is None:
            break
    run.close()
    engine = distillation.engine
    return [engine.kind, engine.accelerator.num_processes, engine.is_main, engine.share.start, engine.share.count]


def _figures(lines):
    return torch.tensor([[line[name] for name in ("loss", "consistency", "grad_norm")] for line in lines])


def _same_run(config, one, two):
    """Losses equal to 1e-5, LoRAs to float16's last digits."""
    torch.testing.assert_close(_figures(log(two)), _figures(log(one)), rtol=1e-5, atol=1e-8)
    if config.stages[1].w_adv:
        mine, theirs = (torch.tensor([line["critic"] for line in log(out)[STEPS:]]) for out in (two, one))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert set(loras(one)) == set(loras(two))
    for (_, path), (_, other) in zip(checkpoints(one), checkpoints(two), strict=True):
        a, b = load_snapshot(path), load_snapshot(other)
        for name, tensor in a.tensors.items():
            if name.startswith("adapters."):  # ZeRO has moments of another shape
                torch.testing.assert_close(b.tensors[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tiny_base, tmp_path_factory):
    """Adversarial, because the critic's gradients are averaged by hand; its learning rate is small, because Adam turns
    the rounding error of a gradient near 0 into a whole step of it."""
    config = small_config(tiny_base, w_adv=0.3)
    config = replace(config, adversarial=replace(config.adversarial, lr=1e-6))
    out = tmp_path_factory.mktemp("one")
    opened(tiny_base)
    finish(config, out)
    return config, out


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_two_processes_give_the_losses_of_one_with_the_doubled_batch(one_process, tmp_path, micro_batch):
    config, one = one_process
    config = replace(config, micro_batch=micro_batch)
    count = 2 if micro_batch else 1
    said = _on_two(tmp_path / "said", _train, config, tmp_path / "two", None)
    assert said == [["MULTI_CPU", 2, True, 0, count], ["MULTI_CPU", 2, False, 2, count]]
    _same_run(config, one, tmp_path / "two")


def test_a_run_of_one_process_goes_on_with_two(one_process, tmp_path):
    config, one = one_process
    _train(config, tmp_path / "two", STEPS + 2)
    _on_two(tmp_path / "said", _train, config, tmp_path / "two", None)
    _same_run(config, one, tmp_path / "two")


def test_fsdp_gives_the_losses_of_one_process_and_resumes(one_process, tmp_path):
    config, one = one_process
    said = _on_two(tmp_path / "said", _train, config, tmp_path / "two", STEPS + 2, **FSDP)
    assert [kind for kind, *_ in said] == ["FSDP", "FSDP"]
    _on_two(tmp_path / "again", _train, config, tmp_path / "two", None, **FSDP)
    _same_run(config, one, tmp_path / "two")


def test_zero2_gives_the_losses_of_one_process_and_resumes(one_process, tmp_path):
    pytest.importorskip("deepspeed")
    config, one = one_process
    config = replace(config, micro_batch=1)
    said = _on_two(tmp_path / "said", _train, config, tmp_path / "two", STEPS + 2, **ZERO2)
    assert [kind for kind, *_ in said] == ["DEEPSPEED", "DEEPSPEED"]
    _on_two(tmp_path / "again", _train, config, tmp_path / "two", None, **ZERO2)
    _same_run(config, one, tmp_path / "two")
    assert "stage 1 (k=2), step 1" in _on_two(tmp_path / "nan", _nan, config, tmp_path / "out", **ZERO2)[0]
    with pytest.raises(DataError, match="divided among 2 DeepSpeed processes"):
        finish(replace(config, stages=(config.stages[0], replace(config.stages[1], steps=9))), tmp_path / "two")


def _nan(config, out):
    base, _ = opened(config.base)
    run = start(config, out, source=RandomSource(base, bad=(7,))).run()  # step 1, row 3: the second process's
    next(run)
    try:
        next(run)
    except DataError as error:
        return str(error)
    return ""


def test_a_nan_in_one_process_stops_both(one_process, tmp_path):
    config, _ = one_process
    first, second = _on_two(tmp_path / "said", _nan, config, tmp_path / "out")
    assert first == second
    assert "stage 1 (k=2), step 1" in first
    assert [path.name for path in (tmp_path / "out" / "bad").iterdir()] == ["stage1-step000001.safetensors"]


def _engine(config):
    try:
        Engine(config)
    except OptionError as error:
        return str(error)
    return ""


def test_a_batch_that_does_not_divide_is_refused(one_process, tmp_path):
    config, _ = one_process
    assert "multiple of the 2 processes" in _on_two(tmp_path / "said", _engine, replace(config, batch=3))[0]


def test_float16_is_refused_under_fsdp(one_process, tmp_path):
    config, _ = one_process
    said = _on_two(tmp_path / "said", _engine, replace(config, mixed_precision="fp16"), **FSDP)
    assert "mixed_precision=bf16" in said[0]
