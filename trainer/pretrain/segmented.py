"""How well a segmenter reads canvases whose instances are known."""

import torch

from trainer.pretrain.canvases import Canvases
from trainer.rewards.structure import Found, InstanceLoss, Instances

OVERLAP = 0.5
"""From which intersection over union a mask counts as that instance's, as in COCO's AP50."""


def iou(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each of `masks` bool [n, H, W] with each of `others` bool [m, H, W]: [n, m]; 0 where
    both are empty."""
    a, b = masks.flatten(1).double(), others.flatten(1).double()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def found_figures(found: Found, truth: list[Instances]) -> dict[str, float]:
    """Over all instances: how many there are; the mean of their best overlap with a proposal that is more likely
    something than nothing (0 where there is none); of those with an overlap of a half, the share whose best proposal
    says the right class; and the average precision at an overlap of a half, all classes in one list."""
    overlaps, right, hits, scores = [], [], [], []
    proposals = zip(found.masks, found.classes, found.present, found.scores, truth, strict=True)
    for masks, classes, present, score, known in proposals:
        overlap = iou(known.masks, masks)
        best, place = torch.where(present > 0.5, overlap, -1.0).max(1)
        overlaps.append(best.clamp(min=0))
        right.append(classes[place] == known.classes)
        hits.append(_hits(overlap, classes, score, known.classes))
        scores.append(score)
    covered = torch.cat(overlaps) >= OVERLAP
    return {
        "instances": float(len(covered)), "mask IoU": float(torch.cat(overlaps).mean()),
        "class right": float((torch.cat(right) & covered).sum() / covered.sum().clamp(min=1)),
        "AP50": average_precision(torch.cat(scores), torch.cat(hits), len(covered)),
    }  # fmt: skip


def _hits(overlap: torch.Tensor, classes: torch.Tensor, score: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """bool [Q]: proposals that are an instance's first, from the surest on, with its class and enough of its mask."""
    fits = (overlap >= OVERLAP) & (known[:, None] == classes)
    free, hits = torch.ones(len(known), dtype=torch.bool), torch.zeros(len(classes), dtype=torch.bool)
    for number in score.argsort(descending=True).tolist():
        open_ = torch.where(fits[:, number] & free, overlap[:, number], -1.0)
        if float(open_.max()) > 0:
            hits[number], free[open_.argmax()] = True, False
    return hits


def average_precision(scores: torch.Tensor, hits: torch.Tensor, instances: int) -> float:
    """The area under precision over recall, precision being the best at this recall or beyond (as in VOC 2010)."""
    ranked = hits[scores.argsort(descending=True, stable=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * ranked).sum() / max(1, instances))


@torch.no_grad()
def mean_loss(loss: InstanceLoss, canvases: Canvases) -> float:
    """The mean of the segmenter's own loss over these pictures."""
    return float(loss(canvases.pictures, canvases.truth, range(len(canvases.truth))).mean())
