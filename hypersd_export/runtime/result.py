"""What a call of the pipeline returns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export import __version__
from hypersd_export.diffusion.planfile import PlanEntry

if TYPE_CHECKING:
    from PIL.Image import Image

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one call made."""

    images: "list[Image]"
    latents: Float
    """The last x, float32 [N, C, h, w], before the division by scaling_factor."""
    seconds: dict[str, float]
    """Wall time by component, loading it included where this call was the first to need it."""
    plan: PlanEntry
    prompt: str
    negative_prompt: str
    guidance: float | None
    """The scale that was used; None where the plan has no unconditional branch."""
    seed: int
    bundle_digest: str

    def metadata(self, index: int) -> dict[str, Any]:
        """Provenance of image `index`, as `hypersd-generate` writes it into the PNG."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "index": index,
            "guidance": self.guidance,
            "plan": {
                "steps": self.plan.steps,
                "source": self.plan.source,
                "plan": self.plan.plan.to_json(),
                "table": self.plan.table.to_json(),
            },
            "bundle_digest": self.bundle_digest,
            "Software": f"hypersd {__version__}",
        }
