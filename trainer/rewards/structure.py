"""Structure feedback (PeFL: arXiv 2404.05595; paper: arXiv 2404.13686, eq. 14): an instance segmenter has to find in
the student's picture what is known to be in the picture that it began from.

The paper's segmenter is SOLO; here it is a MaskFormer or Mask2Former of transformers, which the same authors tried too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from hypersd_export.errors import MissingBackend, ModelError
from hypersd_export.model.files import read_json
from trainer.base import one_line
from trainer.rewards.preprocess import PREPROCESSOR, normalise

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What transformers' MaskFormer and Mask2Former were trained with, where their folder says nothing else."""
BUILTIN_SEGMENTER = Path(__file__).with_name("builtin_segmenter")
"""The built-in model's, from `hypersd-train segmenter`; its classes are the concepts."""
KINDS = {"maskformer": "MaskFormerForInstanceSegmentation", "mask2former": "Mask2FormerForUniversalSegmentation"}


@dataclass(frozen=True, slots=True)
class Instances:
    """What is known to be in a picture: masks bool [n, H, W] and the segmenter's classes int64 [n]; n may be 0."""

    masks: torch.Tensor
    classes: torch.Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """What a segmenter proposes, Q times a picture: masks bool [N, Q, H, W], classes int64 [N, Q], and probabilities
    float32 [N, Q] that there is something (`present`), and that it is of this class (`scores`)."""

    masks: torch.Tensor
    classes: torch.Tensor
    present: torch.Tensor
    scores: torch.Tensor


class Annotations(Protocol):
    """Where the instances of pictures come from."""

    def __call__(self, names: Sequence[str]) -> list[Instances]:
        """Of the samples of these names, in the pictures' own size, as they were cropped for training."""
        ...


class StructureLoss(Protocol):
    """A differentiable loss of pictures against what is known to be in them."""

    @property
    def classes(self) -> Mapping[str, int]:
        """The numbers of its classes by name."""
        ...

    def __call__(self, images: torch.Tensor, truth: Sequence[Instances], seeds: Sequence[int]) -> torch.Tensor:
        """float32 [B] for pictures [B, 3, H, W] in [-1, 1], with gradient to them alone; 0 where nothing is known.

        All that is drawn at random for a picture is a function of its seed.
        """
        ...


class InstanceLoss:
    """A frozen MaskFormer or Mask2Former as a `StructureLoss`: its own training loss (matching, classes, masks, dice),
    a picture at a time, in float32 whatever autocast is on.

    folder: of transformers. ModelError for another model, MissingBackend without scipy, which does the matching.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        folder = Path(folder)
        kind = str(read_json(folder / "config.json").get("model_type"))
        if kind not in KINDS:
            raise ModelError(f"{folder}: a {kind}, where structure feedback takes {' or '.join(KINDS)}; pass one")
        self.name, self._model = folder.name, _load(folder, KINDS[kind])
        self._mean, self._std = _normalisation(folder)
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; pictures must lie on the same device."""
        self._model.to(device)
        return self

    @property
    def classes(self) -> Mapping[str, int]:
        """The numbers of its classes by name."""
        return {str(name): int(number) for number, name in self._model.config.id2label.items()}

    def __call__(self, images: torch.Tensor, truth: Sequence[Instances], seeds: Sequence[int]) -> torch.Tensor:
        """The segmenter's loss of each picture: float32 [B]."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalise(images.float(), self._mean, self._std)
            rows = zip(torch.split(pixels, 1), truth, seeds, strict=True)
            return torch.stack([self._one(picture, known, seed) for picture, known, seed in rows])

    @torch.no_grad()
    def find(self, images: torch.Tensor) -> Found:
        """What it sees in pictures [N, 3, H, W] in [-1, 1], in their own size."""
        with torch.autocast(images.device.type, enabled=False):
            out = self._model(pixel_values=normalise(images.float(), self._mean, self._std))
        chances = out.class_queries_logits.softmax(2)[..., :-1]  # the last class is "nothing"
        scores, classes = chances.max(2)
        masks = torch.nn.functional.interpolate(out.masks_queries_logits, images.shape[2:], mode="bilinear")
        return Found(masks > 0, classes, chances.sum(2), scores)

    def _one(self, pixels: torch.Tensor, known: Instances, seed: int) -> torch.Tensor:
        if not len(known.classes):
            return 0 * pixels.sum()
        devices = [pixels.device] if pixels.is_cuda else []
        with torch.random.fork_rng(devices):  # Mask2Former compares masks at points that it draws
            torch.manual_seed(seed)
            out = self._model(
                pixel_values=pixels, mask_labels=[known.masks.to(pixels)],
                class_labels=[known.classes.to(pixels.device)],
            )  # fmt: skip
        loss: torch.Tensor = out.loss.reshape(())
        return loss


def _load(folder: Path, name: str) -> Any:
    import transformers

    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except ImportError as error:
        raise MissingBackend("scipy", "train", "structure feedback") from error
    except Exception as error:  # transformers raises whatever a damaged file brings about
        raise ModelError(f"{folder}: cannot be loaded as {name} ({one_line(error)}); download it again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{folder}: {len(missing)} weights are missing ({missing[0]}); it is no {name}")
    return model.float().eval().requires_grad_(False)


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] that the folder's preprocessor_config.json says, or ImageNet's."""
    if not (folder / PREPROCESSOR).is_file():
        return IMAGENET_MEAN, IMAGENET_STD
    stated = read_json(folder / PREPROCESSOR)
    mean, std = stated.get("image_mean", IMAGENET_MEAN), stated.get("image_std", IMAGENET_STD)
    return tuple(map(float, mean)), tuple(map(float, std))
