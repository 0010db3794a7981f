"""`--dry-run`: what a distillation would be, as plain data: parameters, passes per step, and memory on 1 and 8 GPUs.

Needs no weights and no network for the published bases of the recipes (`known_unets.json`), and only the config.json of
the UNet for any other.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hypersd_export.diffusion import target_range
from hypersd_export.model.lora import read_lora
from trainer.config import as_json
from trainer.distill.config import FEEDBACK, SCORE, Backend, DistillConfig, Real, StageConfig, Teacher
from trainer.distill.engine import DTYPES, Share
from trainer.distill.feedback import span_of
from trainer.distill.lora_file import plans_of
from trainer.distill.measure import Rehearsal, Shapes
from trainer.losses.tscd import Boundary, End

GPUS = 8
NOT_COUNTED = {
    SCORE: "the teacher's pass, which runs while the student's activations wait, is not counted",
    FEEDBACK: "the decoder is counted, the LoRA below as one of the same rank; the rewards are not",
}
WRAPPED = ("BasicTransformerBlock", "ResnetBlock2D")
"""FSDP's units, as trainer/accelerate/fsdp.yaml names them."""
KNOWN = Path(__file__).with_name("known_unets.json")
VAE_FACTOR = 8
METHOD = (
    "weights, LoRA, gradients and moments counted; passes measured by running one micro-batch forward and backward on "
    "torch's meta device with CUDA's autocast rules and fused attention, and counting live storages. Not counted: CUDA "
    "context (about 0.5 GiB), cuDNN workspaces, fragmentation (allow 10 %), and VAE and text encoders, which have left "
    "when training begins unless validate_every is set"
)


def dry_run(config: DistillConfig) -> dict[str, Any]:
    """Everything that `--dry-run` prints; ModelError if the base's UNet config cannot be had."""
    unet_config, shapes, known = unet_of(config)
    vae_config = vae_of(config) if config.method == FEEDBACK else None
    rehearsal = Rehearsal(unet_config, config, DTYPES[config.base_precision], vae_config)
    return {
        "config": as_json(config),
        "unet": known,
        "parameters": parameters(rehearsal),
        "passes_per_step": [passes(config, stage) for stage in config.stages],
        "memory_gib": {"method": METHOD, **memory(config, rehearsal, shapes)},
    }


def unet_of(config: DistillConfig) -> tuple[Mapping[str, Any], Shapes, str]:
    """(config of the UNet, what goes in, where that is known from)."""
    entry = _published(config.base)
    if entry is not None:
        unet, text, factor, source = entry["unet"], entry["text"], VAE_FACTOR, f"published: {entry['source']}"
    else:
        from trainer.base import open_training_base

        base = open_training_base(config.base)
        unet, factor, source = base.model.unet_config, base.model.vae_scale_factor, f"config.json of {base.name}"
        text = {"tokens": base.model.component_config("text_encoder").get("max_position_embeddings", 77)}
        if unet.get("addition_embed_type") == "text_time":
            ids = 6 * int(unet["addition_time_embed_dim"])
            text["pooled"] = int(unet["projection_class_embeddings_input_dim"]) - ids
    side = config.data.size_px // factor if config.data.size_px else unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    shapes = Shapes(
        latents=(unet["in_channels"], height, width), tokens=text["tokens"], width=unet["cross_attention_dim"],
        pooled=text.get("pooled", 0),
    )  # fmt: skip
    return unet, shapes, source


def vae_of(config: DistillConfig) -> Mapping[str, Any]:
    """The config of the VAE, from where the UNet's is."""
    entry = _published(config.base)
    if entry is not None:
        return dict(entry["vae"])
    from trainer.base import open_training_base

    return open_training_base(config.base).model.vae_config


def _published(base: str) -> dict[str, Any] | None:
    entries: Iterable[dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8")).values()
    return next((entry for entry in entries if base in entry["names"]), None)


def parameters(rehearsal: Rehearsal) -> dict[str, int]:
    """Counts; the LoRA is that of one adapter, of which there are three (student, target, teacher)."""
    lora = _count(rehearsal.networks.student_parameters())
    critic = rehearsal.critic
    return {
        "base": _count(rehearsal.unet.parameters()) - 3 * lora,
        "lora": lora,
        "discriminator": 0 if critic is None else _count(critic.parameters()),
        "discriminator_trained": 0 if critic is None else _count(critic.trainable_parameters()),
    }


def passes(config: DistillConfig, stage: StageConfig) -> dict[str, float | int | None]:
    """UNet passes that a step takes for every sample of the batch (a discriminator's is about half of one)."""
    plain = stage.teacher is Teacher.PREVIOUS or config.cfg_preserved or config.guidance == (1.0, 1.0)
    teacher = 1 if plain else 2
    settings = config.adversarial
    if config.method == SCORE:
        return _score_passes(config, stage, teacher)
    if config.method == FEEDBACK:
        return _feedback_passes(config)
    found: dict[str, float | int | None] = {
        "segments": stage.segments, "student_forward": 1, "student_backward": 1,
        "student_recomputed": int(config.gradient_checkpointing), "teacher": teacher,
        "target": round(target_share(config, stage), 4),
    }  # fmt: skip
    if stage.w_adv:
        # the first of its steps is the consistency target's
        solved = (settings.teacher_steps - 1) * teacher * (settings.real is Real.TEACHER_MULTISTEP)
        found |= {"teacher_multistep": solved, **_discriminator_passes(config)}
    return found


def _score_passes(config: DistillConfig, stage: StageConfig, teacher: int) -> dict[str, float | int | None]:
    """A step of score distillation, the student's part of it as a mean over the steps in which it learns and not."""
    learns = 1 / config.score.student_every
    played = sum((count - 1) / 2 for count in config.score.steps) / len(config.score.steps)
    if config.score.pairs:  # an anchored sample is of one step
        played *= 1 - config.score.pair_share
    found: dict[str, float | int | None] = {
        "student_forward": 1, "student_backward": learns, "student_played": round(played, 4),
        "student_recomputed": learns * config.gradient_checkpointing, "teacher": teacher * learns,
        "fake_forward": 1 + learns, "fake_backward": 1, "fake_recomputed": int(config.gradient_checkpointing),
    }  # fmt: skip
    return found | (_discriminator_passes(config, learns) if stage.w_adv else {})


def _discriminator_passes(config: DistillConfig, learns: float = 1) -> dict[str, float | int]:
    """learns: the share of steps in which the student does. A frozen encoder sees the fake, and where the jump began,
    once for both losses."""
    origin, trained = int(config.adversarial.conditional), config.adversarial.backend is Backend.TRAINABLE
    return {
        "discriminator_forward": 3 + 2 * origin if trained else 2 + origin,
        "discriminator_backward_to_student": learns, "discriminator_backward": 2 + origin if trained else 0,
    }  # fmt: skip


def _feedback_passes(config: DistillConfig) -> dict[str, float | int | None]:
    """A step of human feedback. The steps that are played before the one with gradient are those of the LoRA's plans:
    without one, and without `feedback.steps`, they are not known."""
    counts = list(config.feedback.steps)
    if config.init_lora:
        plans = plans_of(read_lora(Path(config.init_lora)), config.feedback.steps)
        counts = [plan.num_steps for plan in plans]
    before = [sum(span_of(count, *config.feedback.span)) / 2 - 0.5 for count in counts]
    return {
        "student_forward": 1, "student_backward": 1, "student_recomputed": int(config.gradient_checkpointing),
        "student_played": round(sum(before) / len(before), 4) if before else None,
        "decoder_forward": 1, "decoder_backward": 1, "decoder_recomputed": int(config.gradient_checkpointing),
        "rewards_forward": len(config.feedback.rewards), "rewards_backward": len(config.feedback.rewards),
    }  # fmt: skip


def target_share(config: DistillConfig, stage: StageConfig) -> float:
    """The share of samples whose jump does not end where the teacher's step does, so that the target has to move."""
    start = torch.arange(1, stage.points + 1)
    low, high = target_range(start, stage.points, stage.segments)
    if config.boundary is Boundary.LCM:
        return float((start > 1).double().mean())
    edge = 1.0 if config.end is End.EDGE else config.edge_share
    return float((edge * (low < high).double() + (1 - edge) * (1 - 1 / (high - low + 1).double())).mean())


def memory(config: DistillConfig, rehearsal: Rehearsal, shapes: Shapes) -> dict[str, Any]:
    """GiB by what it is for, on one GPU and on each of eight with DDP, FSDP2 and ZeRO-2."""
    one = _micro_batch(config, 1)
    peaks: dict[int, int] = {}
    for rows in {one, _micro_batch(config, GPUS)}:
        peaks[rows] = rehearsal.peak_bytes(
            shapes, rows, DTYPES[config.mixed_precision], checkpointing=config.gradient_checkpointing
        )
    held = _held(config, rehearsal)
    if config.method in NOT_COUNTED:
        return {"one_gpu": {**_table(held, peaks[one], one), "note": NOT_COUNTED[config.method]}}
    many = _micro_batch(config, GPUS)
    fsdp = {name: size / GPUS if name not in ("discriminator",) else size for name, size in held.items()}
    zero2 = {
        **held, "lora_gradients": held["lora_gradients"] / GPUS, "lora_moments": held["lora_moments"] / GPUS,
        "lora_float32_partition": held["lora_student"] / GPUS,
    }  # fmt: skip
    return {
        "one_gpu": _table(held, peaks[one], one),
        "each_of_eight_gpus": {
            "ddp": _table(held, peaks[many], many),
            "fsdp": _table({**fsdp, "gathered_units": _gathered(rehearsal)}, peaks[many], many),
            "zero2": _table(zero2, peaks[many], many),
        },
    }


def _held(config: DistillConfig, rehearsal: Rehearsal) -> dict[str, float]:
    """Bytes that stay for a whole stage."""
    lora = _count(rehearsal.networks.student_parameters())
    base = sum(w.nbytes for n, w in rehearsal.unet.named_parameters() if ".lora_" not in n)
    # adamw8bit: one byte for each of two moments, and a float32 scale for each block of 256
    moments = 2 * (1 + 4 / 256) if config.optimizer == "adamw8bit" else 8.0
    held = {
        "base_weights": float(base), "lora_student": 4.0 * lora, "lora_target_and_teacher": 8.0 * lora,
        "lora_gradients": 4.0 * lora, "lora_moments": moments * lora,
    }  # fmt: skip
    if config.method == SCORE:
        held["fake_gradients_and_moments"] = (4 + moments) * lora
    if rehearsal.vae is not None:
        held["vae"] = float(sum(weight.nbytes for weight in rehearsal.vae.parameters()))
    if rehearsal.critic is not None:
        trained = _count(rehearsal.critic.trainable_parameters())
        weights = sum(w.nbytes for w in rehearsal.critic.parameters())
        held["discriminator"] = weights + (4 + moments) * trained
    return held


def _gathered(rehearsal: Rehearsal) -> float:
    """FSDP2 gathers the root's own weights once and two units at a time: the one at work and the next."""
    units = [
        sum(w.nbytes for w in module.parameters())
        for module in rehearsal.unet.modules()
        if type(module).__name__ in WRAPPED
    ]
    root = sum(w.nbytes for w in rehearsal.unet.parameters()) - sum(units)
    return float(root + sum(sorted(units)[-2:]))


def _micro_batch(config: DistillConfig, processes: int) -> int:
    """Rows of a micro-batch, where the batch can be divided so; else the nearest whole number above."""
    if config.batch % processes:
        return config.micro_batch or math.ceil(config.batch / processes)
    rows = config.batch // processes
    return Share.of(config.batch, min(config.micro_batch or rows, rows), rank=0, processes=processes).micro


def _table(held: Mapping[str, float], passes_bytes: float, rows: int) -> dict[str, Any]:
    gib = {name: round(size / 2**30, 3) for name, size in held.items()}
    total = sum(held.values()) + passes_bytes
    return {
        "micro_batch": rows, **gib, "passes": round(passes_bytes / 2**30, 3), "total": round(total / 2**30, 3),
    }  # fmt: skip


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
