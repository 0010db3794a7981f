"""What a discriminator looks at in a step, its judgement of the fake, and its loss: for trajectories and for scores."""

import dataclasses
from dataclasses import dataclass

import torch

from trainer.batch import Conditioning, cat
from trainer.discriminator import Discriminator
from trainer.distill.config import Backend
from trainer.losses import adversarial


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Fake and real [B, C, h, w] at timesteps t [B], and where the fake's jump began.

    real_conditioning: of the real ones, None where it is the fakes'. seen, begun: the encoder's features of `fake` and
    of `origin`, which a frozen encoder need not be asked for again.
    """

    fake: torch.Tensor
    real: torch.Tensor
    t: torch.Tensor
    conditioning: Conditioning
    real_conditioning: Conditioning | None = None
    origin: tuple[torch.Tensor, torch.Tensor] | None = None
    seen: tuple[torch.Tensor, ...] = ()
    begun: tuple[torch.Tensor, ...] | None = None


def judge(critic: Discriminator, look: Look) -> tuple[Look, tuple[torch.Tensor, ...]]:
    """The fake's logits, with gradient to it if it has one: the critic's weights take none until `critic_loss`. And
    what the critic is to look at, detached."""
    critic.learn(False)
    features = critic.features(look.fake, look.t, look.conditioning)
    begun = None if look.origin is None else critic.features(*look.origin, look.conditioning)
    look = dataclasses.replace(look, fake=look.fake.detach())
    if critic.backend is Backend.FROZEN:
        look = dataclasses.replace(look, seen=tuple(map_.detach() for map_ in features), begun=begun)
    return look, critic.logits(features, begun)


def critic_loss(critic: Discriminator, look: Look) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The discriminator's loss on real and fake: scalar, with gradient to it alone; and detached figures.

    Call it after the student's backward pass: it lets the discriminator's weights take gradients again.
    """
    critic.learn(True)
    theirs = look.conditioning if look.real_conditioning is None else look.real_conditioning
    if look.seen:
        real_features = critic.features(look.real, look.t, theirs)
        both = tuple(torch.cat(maps) for maps in zip(real_features, look.seen, strict=True))
        logits = critic.logits(both, look.begun)
    else:
        x, conditioning = torch.cat([look.real, look.fake]), cat([theirs, look.conditioning])
        logits = critic(x, look.t.repeat(2), conditioning, look.origin)
    real, fake = zip(*(part.chunk(2) for part in logits), strict=True)
    loss = adversarial.critic_loss(critic.backend, real, fake).mean()
    right = torch.stack([(r > 0).float().mean() + (f < 0).float().mean() for r, f in zip(real, fake, strict=True)])
    return loss, {"critic": loss.detach(), "critic_right": right.detach().mean() / 2}
