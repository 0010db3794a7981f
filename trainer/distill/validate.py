"""Validation while a distillation runs: the student's pictures at 1, 2, 4 and 8 steps, and their CLIP score.

Pictures are sampled by the step tables that the export ships, from the noise that the runtime draws (Philox: prompt i
has seed `first_seed` + i), so a picture here is the picture of the exported LoRA. No random generator of torch is
touched, so a run with validation and one without take the same steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hypersd_export.diffusion import FewStepPlan, GuidanceKind, initial_noise, run, start_sample, step_noise
from hypersd_export.errors import OptionError, PlanError
from hypersd_export.model.base import BUILTIN
from trainer.base import TrainingBase
from trainer.batch import Conditioning
from trainer.distill.networks import Networks, Role
from trainer.rewards import Reward

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = (1, 2, 4, 8)
BUILTIN_PROMPTS = (
    "a fox on a blue background, noto style", "a strawberry on a yellow background", "a penguin, twemoji style",
    "a tulip on a purple background", "a pizza", "a frog on a white background, noto style", "a doughnut", "an owl",
)  # fmt: skip
"""Prompts for a built-in run that names none."""
SMALLEST_PX = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """figures: `clip_score/4_steps` and so on, where a CLIP fits; grid: a row per step count, in the order of `steps`,
    a column per prompt; pictures: float32 [prompts, 3, H, W] in [-1, 1] of each step count."""

    figures: dict[str, float]
    grid: "Image"
    pictures: Mapping[int, torch.Tensor]


@torch.no_grad()
def sample(
    networks: Networks, plan: FewStepPlan, conditioning: Conditioning, seeds: Sequence[int],
    shape: tuple[int, int, int], *, empty: Conditioning | None = None, role: Role = Role.STUDENT,
    latents: torch.Tensor | None = None, start: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Latents float32 [N, C, h, w] by the plan's table, one per row of `conditioning` and seed; `shape` is (C, h, w).

    latents: of pictures to begin from, noised to row `start`, in place of noise alone. A plan with guidance needs
    `empty` (1 row). `PlanError` for embedded guidance, which these networks have no input for, and for a plan of
    another prediction type.
    """
    guidance, device = plan.guidance, networks.unet.device
    if guidance.kind is GuidanceKind.EMBEDDED or (guidance.kind is GuidanceKind.CFG and empty is None):
        raise PlanError(f"guidance {guidance.kind} {guidance.scale}: validation has none or cfg with the empty prompt")
    if plan.prediction_type is not networks.prediction_type:
        raise PlanError(f"plan of {plan.prediction_type}: the networks' prediction is {networks.prediction_type}")
    scale = None if guidance.kind is GuidanceKind.NONE else torch.full((len(seeds),), guidance.scale, device=device)

    def net(x: Any, t: float) -> Any:
        timesteps = torch.full((len(x),), int(t) if t == int(t) else t, device=device)
        return networks.frozen(role, x, timesteps, conditioning, guidance=scale, empty=empty)

    def fresh(stream: int) -> torch.Tensor:
        noise = [step_noise(seed=seed, index=0, step=stream, shape=shape) for seed in seeds]
        return torch.from_numpy(np.stack(noise)).to(device)

    table = plan.table()
    noise = np.stack([initial_noise(seed=seed, index=0, shape=shape) for seed in seeds])
    if latents is None:
        x = torch.from_numpy(np.float32(table.init_noise_sigma) * noise).to(device)
    else:
        x = start_sample(table, start=start, latents=latents, noise=torch.from_numpy(noise).to(device))
    made: torch.Tensor = run(table, net, x, step_noise=fresh, start=start)
    return made


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures float32 [N, 3, H, W], clamped to [-1, 1], of latents as the UNet sees them, with gradient to them."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    unscaled = (latents.float() / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)
    with torch.autocast(vae.device.type, enabled=False):  # SDXL's VAE overflows in float16
        pictures: torch.Tensor = vae.decode(unscaled).sample
    return pictures.float().clamp(-1, 1)


@torch.no_grad()
def draw_pictures(
    networks: Networks, vae: Any, plan: FewStepPlan, text: Conditioning, shape: tuple[int, int, int], *,
    first_seed: int, empty: Conditioning, role: Role = Role.STUDENT, batch: int = 8,
    latents: torch.Tensor | None = None, start: int = 0,
) -> torch.Tensor:  # fmt: skip
    """float32 [N, 3, H, W] in [-1, 1], one per row of `text`, `batch` at once; row i starts from the noise of seed
    `first_seed` + i, or from row i of `latents` noised to the plan's row `start`."""
    done = []
    for first in range(0, len(text), batch):
        rows = slice(first, first + batch)
        part, given = text.rows(rows), None if latents is None else latents[rows]
        seeds = range(first_seed + first, first_seed + first + len(part))
        drawn = sample(networks, plan, part, seeds, shape, empty=empty, role=role, latents=given, start=start)
        done.append(decode(vae, drawn))
    return torch.cat(done)


def picture_grid(rows: Iterable[torch.Tensor], *, columns: int) -> "Image":
    """A sheet with a row per tensor [N, 3, H, W] in [-1, 1], the first `columns` of each; small pictures enlarged by a
    whole factor, without smoothing."""
    from PIL import Image

    strips = [((row[:columns] / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8) for row in rows]
    sheet = torch.cat([torch.cat(list(strip), dim=2) for strip in strips], dim=1).permute(1, 2, 0).numpy()
    factor = max(1, SMALLEST_PX // strips[0].shape[2])
    return Image.fromarray(np.repeat(np.repeat(sheet, factor, axis=0), factor, axis=1))


def plan_for(plans: Sequence[FewStepPlan], steps: int) -> FewStepPlan:
    """The plan of so many steps, or else the first one with another step count."""
    if not plans:
        raise PlanError("validation needs at least one plan")
    return next((plan for plan in plans if plan.num_steps == steps), None) or plans[0].with_steps(steps)


class Validator:
    """Prompts, encoded once, and the VAE: call it with networks and plans, under the run's autocast.

    latent_shape: (C, h, w), the base's native size if it is not given. reward: a CLIP for the figures; the built-in one
    for the built-in base, none for others. columns: prompts that the grid shows. batch: pictures at once. `OptionError`
    without prompts or step counts.
    """

    def __init__(
        self, base: TrainingBase, prompts: Sequence[str], *, steps: Sequence[int] = STEPS, first_seed: int = 0,
        latent_shape: tuple[int, int, int] | None = None, reward: Reward | None = None, columns: int = 12,
        batch: int = 8, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if not prompts or not steps:
            raise OptionError(f"validation with {len(prompts)} prompts and {len(steps)} step counts: needs one of each")
        self.prompts, self.steps, self.first_seed = tuple(prompts), tuple(steps), first_seed
        self.latent_shape = latent_shape or base.latent_shape(base.native_size)
        self.columns, self.batch = columns, batch
        self.reward = _builtin_reward(device) if reward is None and base.name == BUILTIN else reward
        self._vae = base.load_vae(torch.float32).to(device)
        size = (self.latent_shape[1] * base.model.vae_scale_factor, self.latent_shape[2] * base.model.vae_scale_factor)
        encoder = base.prompt_encoder(torch.float32).to(device)
        self._conditioning, self._empty = encoder(self.prompts, size=size), encoder.empty(size=size)

    def __call__(self, networks: Networks, plans: Sequence[FewStepPlan]) -> Validation:
        """The student as it is now, at every step count: by its own plan where there is one (see `plan_for`)."""
        pictures = {count: self.pictures(networks, plan_for(plans, count)) for count in self.steps}
        figures = {}
        if self.reward is not None:
            for count, drawn in pictures.items():
                with torch.no_grad():
                    figures[f"clip_score/{count}_steps"] = float(self.reward(drawn, self.prompts).mean())
        return Validation(
            figures=figures, grid=picture_grid(pictures.values(), columns=self.columns), pictures=pictures
        )

    def pictures(self, networks: Networks, plan: FewStepPlan) -> torch.Tensor:
        """float32 [prompts, 3, H, W] in [-1, 1]; prompt i starts from the noise of seed `first_seed` + i."""
        device = networks.unet.device
        return draw_pictures(
            networks, self._vae, plan, self._conditioning.to(device), self.latent_shape, first_seed=self.first_seed,
            empty=self._empty.to(device), batch=self.batch,
        )  # fmt: skip


def _builtin_reward(device: torch.device | str) -> Reward:
    from trainer.rewards.clip import ClipReward

    return ClipReward(device=device)
