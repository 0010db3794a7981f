"""The judge: a second, independent CLIP that scores pictures of the built-in model, and is never a training signal.

It shares nothing with the pipeline but the tokenizer: another seed, other widths, and it also sees the combinations
that are held out from the pipeline's training. Its picture features have 96 dimensions, so that a Fréchet distance
over a thousand pictures is well conditioned.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import unit
from trainer.ema import Ema
from trainer.pretrain.clip import new_clip, tokenize, train_clip
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.loop import Schedule, StepResult
from trainer.pretrain.scenes import COMBINATIONS, SceneRenderer

SEED = 4711
TEXT: dict[str, Any] = {
    "hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 32, "hidden_act": "gelu", "projection_dim": 96,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 208, "intermediate_size": 624, "num_hidden_layers": 5, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "hidden_act": "gelu", "projection_dim": 96,
}  # fmt: skip
SCHEDULE = Schedule(steps=2200, lr=1e-3, warmup=100, cooldown=800, weight_decay=0.1, ema_decay=0.995)
BATCH = 192
WEIGHTS = Path(__file__).parent / "judge_weights"


def train_judge(tokenizer: Any, out: Path, schedule: Schedule = SCHEDULE) -> Iterator[StepResult]:
    """Train on every combination and write the judge (fp16) to `out` when the iterator is exhausted."""
    torch.manual_seed(SEED)
    model = new_clip(tokenizer, text=TEXT, vision=VISION)
    ema = Ema(model, schedule.ema_decay)
    renderer = SceneRenderer(read_drawings(), 32)
    everything = np.ones(COMBINATIONS, bool)
    state = out / "state.safetensors"
    yield from train_clip(
        model, tokenizer, renderer, everything, schedule, batch=BATCH, seed=SEED, state=state, ema=ema
    )
    average: Any = ema.module
    average.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


class Judge:
    """Features of pictures and captions, float64 [N, 96], every row of length √96.

    Cosines do not see the length; FD and KID do, and at this one x·y/D, KID's argument, is the cosine.
    """

    def __init__(self, folder: Path = WEIGHTS) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder).float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def pictures(self, pictures: torch.Tensor) -> np.ndarray:
        """Features of pictures in [-1, 1], float32 [N, 3, 32, 32]."""
        parts = [self.model.get_image_features(pixel_values=p).pooler_output for p in torch.split(pictures, 256)]
        return _scaled(parts)

    @torch.no_grad()
    def captions(self, captions: list[str]) -> np.ndarray:
        """Features of captions."""
        ids = tokenize(self.tokenizer, captions)
        return _scaled([self.model.get_text_features(input_ids=p).pooler_output for p in torch.split(ids, 256)])


def _scaled(parts: list[torch.Tensor]) -> np.ndarray:
    features: np.ndarray = torch.cat(parts).double().numpy()
    return unit(features) * np.sqrt(features.shape[1])


def candidates(concept: int, style: int, background: int, rng: np.random.Generator) -> list[str]:
    """100 captions of which the first alone is true: 32 of the same concept with another style or background (all that
    there are, with parts left unsaid), and 67 of other concepts, drawn like training captions."""
    styles, backgrounds = [*STYLES, None], [*BACKGROUNDS, None]
    right_style, right_background = {STYLES[style], None}, {list(BACKGROUNDS)[background], None}
    same = [
        caption(CONCEPTS[concept], s, b)
        for s in styles
        for b in backgrounds
        if s not in right_style or b not in right_background
    ]
    others = rng.choice([i for i in range(len(CONCEPTS)) if i != concept], 67, replace=False)
    rest = [caption(CONCEPTS[i], styles[rng.integers(4)], backgrounds[rng.integers(9)]) for i in others]
    return [caption(CONCEPTS[concept], STYLES[style], list(BACKGROUNDS)[background]), *same, *rest]


def main() -> None:
    """Train the judge with the built-in model's tokenizer: `python -m benchmarks.judge`."""
    from transformers import CLIPTokenizer

    from hypersd_export.builtin import model_dir

    tokenizer = CLIPTokenizer.from_pretrained(model_dir() / "tokenizer")
    smooth = 0.0
    for result in train_judge(tokenizer, WEIGHTS):
        smooth = 0.98 * smooth + 0.02 * result.losses["top1"]
        if result.step % 50 == 49:
            print(json.dumps({"step": result.step + 1, "top1": round(smooth, 4), "seconds": round(result.seconds)}))


if __name__ == "__main__":
    main()
