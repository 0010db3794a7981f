"""The discriminator and its losses: hand values, gradient signs, diffusers' own features, a toy game."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hypersd_export.diffusion import NoiseSchedule
from hypersd_export.errors import DataError, ModelError, OptionError
from trainer.batch import Conditioning
from trainer.discriminator import GROUP, Discriminator, MapHead, ScalarHead, base_weights, encoder_copy
from trainer.distill.config import AdversarialConfig, Backend
from trainer.losses.adversarial import critic_loss, draw_critic_timesteps, generator_loss, renoise
from trainer.losses.tscd import Grid, Indices

BACKENDS = list(Backend)
TINY = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 2, "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
XL = {
    **TINY, "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 10 + 6 * 4, "transformer_layers_per_block": (1, 2),
}  # fmt: skip
FOUR = {
    **TINY, "block_out_channels": (16, 16, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}  # fmt: skip


def _unet(seed=0, **changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**TINY, **changes})


def _discriminator(unet, seed=1, **changes):
    torch.manual_seed(seed)
    return Discriminator(unet, AdversarialConfig(head_channels=16, **changes))


def _awake(discriminator):
    """Heads with a random last layer: a new one's is zero, which hides everything before it."""
    torch.manual_seed(3)
    for head in discriminator.heads:
        nn.init.normal_(head.out.weight)
    return discriminator


def _inputs(count=2, size=8, seed=2, xl=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, size, size, generator=generator)
    states = torch.randn(count, 5, 12, generator=generator)
    t = torch.randint(1000, (count,), generator=generator)
    if not xl:
        return x, t, Conditioning(states=states)
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(count, 6)
    return x, t, Conditioning(states=states, pooled=torch.randn(count, 10, generator=generator), time_ids=ids)


@pytest.fixture(scope="module")
def unet():
    return _unet()


# Losses.


def test_hinge_known_answers():
    real, fake = [torch.tensor([[0.25], [3.0]])], [torch.tensor([[-0.5], [2.0]])]
    assert critic_loss(Backend.FROZEN, real, fake).tolist() == [0.75 + 0.5, 0.0 + 3.0]
    assert generator_loss(Backend.FROZEN, fake).tolist() == [1.5, 0.0]


def test_non_saturating_is_binary_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(7, 1, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, one, reduction="none") + bce(fake, zero, reduction="none")
    loss = critic_loss(Backend.TRAINABLE, [real], [fake])
    torch.testing.assert_close(loss, expected[:, 0], rtol=1e-14, atol=1e-14)
    expected = bce(fake, one, reduction="none")[:, 0]
    torch.testing.assert_close(generator_loss(Backend.TRAINABLE, [fake]), expected, rtol=1e-14, atol=1e-14)
    large = generator_loss(Backend.TRAINABLE, [torch.tensor([[-1e4]])])
    assert large.tolist() == [1e4]  # −log sigmoid would be infinite


def test_heads_count_alike_whatever_the_size_of_their_maps():
    small, large = torch.full((3, 1, 1, 1), 0.5), torch.full((3, 1, 8, 8), -0.25)
    expected = torch.full((3,), (0.5 + 1.25) / 2)
    torch.testing.assert_close(generator_loss(Backend.FROZEN, [small, large]), expected)
    torch.testing.assert_close(critic_loss(Backend.FROZEN, [small, large], [small, large]), torch.full((3,), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pull_the_right_way(backend):
    real, fake = (torch.zeros(4, 1, 2, 2, requires_grad=True) for _ in range(2))
    critic_loss(backend, [real], [fake]).sum().backward()
    assert (real.grad < 0).all()  # the critic raises real logits
    assert (fake.grad > 0).all()  # and lowers fake ones
    fake.grad = None
    generator_loss(backend, [fake]).sum().backward()
    assert (fake.grad < 0).all()  # the student raises fake ones
    at_rest = critic_loss(backend, [torch.zeros(1, 1)], [torch.zeros(1, 1)]).item()
    assert at_rest == pytest.approx({Backend.FROZEN: 2.0, Backend.TRAINABLE: 2 * math.log(2)}[backend])


# Where the critic looks.


def _alphas():
    return torch.tensor(NoiseSchedule().alphas_cumprod())


def _coefficients(a, b):
    """(of x, of the noise) of renoise a → b, read off it."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return renoise(one, a, b, zero), renoise(zero, a, b, one)


def test_renoise_composes_and_keeps_the_marginal():
    alphas = _alphas()
    for t in (0, 17, 499, 800):
        for s in (t, t + 1, t + 150, 999):
            x, n = _coefficients(alphas[t, None], alphas[s, None])
            # x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, so x_s must have mean sqrt(a_s) x0 and variance 1 - a_s.
            torch.testing.assert_close(x * alphas[t].sqrt(), alphas[s, None].sqrt(), rtol=1e-14, atol=0)
            torch.testing.assert_close(x**2 * (1 - alphas[t]) + n**2, 1 - alphas[s, None], rtol=1e-13, atol=1e-15)
            for u in (s, min(999, s + 333), 999):
                x2, n2 = _coefficients(alphas[s, None], alphas[u, None])
                whole_x, whole_n = _coefficients(alphas[t, None], alphas[u, None])
                torch.testing.assert_close(x2 * x, whole_x, rtol=1e-14, atol=0)
                torch.testing.assert_close((x2 * n) ** 2 + n2**2, whole_n**2, rtol=1e-12, atol=1e-15)


def test_renoise_to_the_same_level_is_the_identity_and_to_zero_signal_is_the_noise():
    x, noise = (torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    a = _alphas()[torch.tensor([0, 9, 499, 800, 998])]
    same = renoise(x, a, a, noise)
    assert same.dtype == torch.float32  # the levels are float64
    assert torch.equal(same, x)
    assert torch.equal(renoise(x, a, torch.zeros_like(a), noise), noise)
    assert torch.equal(renoise(x, a, a * 0.5, noise), renoise(x, a.view(5, 1, 1, 1), a.view(5, 1, 1, 1) * 0.5, noise))


@pytest.mark.parametrize(("points", "segments", "reach"), [(40, 8, 1.0), (50, 1, 1.0), (9, 3, 1.0), (10, 1, 0.2)])
def test_critic_timesteps_cover_a_segments_length_from_the_end_and_stop_at_the_top(points, segments, reach):
    grid = Grid.of(_alphas(), points=points, segments=segments)
    generator = torch.Generator().manual_seed(0)
    low, high = [], []
    for index in range(points):
        ends = torch.full((20_000,), index)
        s = draw_critic_timesteps(Indices(ends + 1, ends), grid, generator, reach)
        assert s.dtype == torch.int64
        low.append(int(s.min()) - int(grid.timesteps[index]))
        high.append(int(s.max()) - int(grid.timesteps[index]) + 1)
        assert int(s.max()) <= 999
        width = min(round(reach * 1000 / segments), 1000 - int(grid.timesteps[index]))
        # uniform: mean and spread of a discrete uniform of this width
        spread = math.sqrt((width**2 - 1) / 12)
        assert abs(float((s - grid.timesteps[index]).double().mean()) - (width - 1) / 2) < 5 * spread / math.sqrt(
            20_000
        )
        assert low[-1] <= width * 0.002
        assert width * 0.998 <= high[-1] <= width


# The encoder's copy.


@pytest.mark.parametrize("changes", [TINY, XL, FOUR], ids=["sd", "sdxl", "four-blocks"])
def test_features_are_those_of_diffusers_own_forward(changes):
    original = _unet(**changes)
    x, t, conditioning = _inputs(xl=changes is XL)
    seen = []
    for module in (*original.down_blocks, original.mid_block):
        module.register_forward_hook(lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        original(x, t, **conditioning.unet_kwargs())
        for backend, expected in ((Backend.FROZEN, seen), (Backend.TRAINABLE, seen[-1:])):
            discriminator = _discriminator(original, backend=backend)
            features = discriminator.features(x, t, conditioning)
            assert len(features) == len(expected)
            for mine, theirs in zip(features, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
            logits = _awake(discriminator)(x, t, conditioning)
            shapes = [(2, 1, *f.shape[2:]) for f in expected] if backend is Backend.FROZEN else [(2, 1)]
            assert [tuple(logit.shape) for logit in logits] == shapes
            assert all(torch.isfinite(logit).all() and logit.abs().max() > 0 for logit in logits)


def test_a_unet_without_a_mid_block_is_judged_by_its_last_map_once():
    original = _unet(mid_block_type=None)
    x, t, conditioning = _inputs()
    assert len(_discriminator(original)(x, t, conditioning)) == 2
    assert len(_discriminator(original, backend=Backend.TRAINABLE)(x, t, conditioning)) == 1


def _with_lora(unet):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1", "time_emb_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
        for name in ("student", "teacher"):
            unet.add_adapter(config, adapter_name=name)
    _change_lora(unet)
    return unet


def _change_lora(unet):
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.normal_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_is_the_base_alone_and_nothing_moves_it(backend):
    clean, carrying = _unet(), _with_lora(_unet())
    x, t, conditioning = _inputs()
    expected = _awake(_discriminator(clean, backend=backend))
    discriminator = _awake(_discriminator(carrying, backend=backend))
    assert not [n for n in discriminator.state_dict() if "lora" in n or "base_layer" in n]
    assert not [n for n in discriminator.state_dict() if "up_blocks" in n or "conv_out" in n]
    theirs = {p.untyped_storage().data_ptr() for p in carrying.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in discriminator.parameters()}
    with torch.no_grad():
        before = discriminator(x, t, conditioning)
        for mine, plain in zip(before, expected(x, t, conditioning), strict=True):
            assert torch.equal(mine, plain)
        _change_lora(carrying)
        for parameter in carrying.parameters():
            parameter.add_(1.0)
        for mine, old in zip(discriminator(x, t, conditioning), before, strict=True):
            assert torch.equal(mine, old)


def test_the_copy_takes_over_processors_and_checkpointing_and_leaves_the_unet_alone(unet):
    from diffusers.models.attention_processor import AttnProcessor

    original = _unet()
    original.set_attn_processor(AttnProcessor())
    original.enable_gradient_checkpointing()
    original.requires_grad_(False)
    weights = base_weights(original)
    encoder = encoder_copy(original, weights, torch.float32)
    assert {type(p) for p in encoder.attn_processors.values()} == {AttnProcessor}
    assert encoder.is_gradient_checkpointing
    assert not any(p.requires_grad for p in original.parameters())
    assert original.up_blocks
    mine, whole = (sum(p.numel() for p in m.parameters()) for m in (encoder, original))
    assert mine < 0.6 * whole
    with pytest.raises(ModelError, match=r"no weight conv_in\.bias \(1 are missing\)"):
        encoder_copy(original, {n: w for n, w in weights.items() if n != "conv_in.bias"}, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_changes_no_gradient(backend):
    x, t, conditioning = _inputs()
    grads = []
    for checkpointing in (False, True):
        original = _unet()
        if checkpointing:
            original.enable_gradient_checkpointing()
        discriminator = _awake(_discriminator(original, backend=backend))
        discriminator.learn(False)
        leaf = x.clone().requires_grad_()
        generator_loss(backend, discriminator(leaf, t, conditioning)).sum().backward()
        discriminator.learn(True)
        critic_loss(backend, discriminator(x, t, conditioning), discriminator(x + 1, t, conditioning)).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in discriminator.trainable_parameters())])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-6, atol=1e-7)


# Who gets a gradient.


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_students_loss_gives_the_discriminator_no_gradient(unet, backend):
    discriminator = _awake(_discriminator(unet, backend=backend))
    x, t, conditioning = _inputs()
    x.requires_grad_()
    discriminator.learn(False)
    generator_loss(backend, discriminator(x, t, conditioning)).mean().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad is None for p in unet.parameters())
    discriminator.learn(True)
    logits = discriminator(x.detach(), t, conditioning)
    critic_loss(backend, logits, discriminator(x.detach() + 1, t, conditioning)).mean().backward()
    trained = {id(p) for p in discriminator.trainable_parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in discriminator.parameters())
    frozen = any(not p.requires_grad for p in discriminator.encoder.parameters())
    assert frozen == (backend is Backend.FROZEN)


def test_a_frozen_encoder_takes_no_gradient_even_while_the_heads_learn(unet):
    discriminator = _awake(_discriminator(unet))
    x, t, conditioning = _inputs()
    generator_loss(Backend.FROZEN, discriminator(x.requires_grad_(), t, conditioning)).sum().backward()
    assert all(p.grad is None for p in discriminator.encoder.parameters())
    assert x.grad.abs().max() > 0
    discriminator.train()
    assert not any(m.training for m in discriminator.encoder.modules())
    assert discriminator.heads.training


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_begins_undecided_without_a_push_and_wakes_with_the_first_step(unet, backend):
    discriminator = _discriminator(unet, backend=backend)
    x, t, conditioning = _inputs()
    x.requires_grad_()
    logits = discriminator(x, t, conditioning)
    assert all(torch.equal(logit, torch.zeros_like(logit)) for logit in logits)
    generator_loss(backend, logits).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    optimizer = torch.optim.SGD(discriminator.trainable_parameters(), lr=0.1)
    critic_loss(backend, discriminator(x, t, conditioning), discriminator(x + 1, t, conditioning)).sum().backward()
    optimizer.step()
    x.grad = None
    generator_loss(backend, discriminator(x, t, conditioning)).sum().backward()
    assert x.grad.abs().max() > 0


def test_construction_is_seeded_by_the_caller(unet):
    one, two, other = (_discriminator(unet, seed=seed) for seed in (5, 5, 6))
    for name, tensor in one.state().items():
        assert torch.equal(tensor, two.state()[name])
    assert any(not torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())


# Forms and sizes.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("xl", [False, True])
def test_the_conditional_form_sees_the_origin(backend, xl):
    discriminator = _awake(_discriminator(_unet(**(XL if xl else TINY)), backend=backend, conditional=True))
    x, t, conditioning = _inputs(xl=xl)
    here, there = (_inputs(seed=seed, xl=xl)[:2] for seed in (8, 9))
    with torch.no_grad():
        logits, others = (discriminator(x, t, conditioning, origin) for origin in (here, there))
        parts = discriminator.logits(
            discriminator.features(x, t, conditioning), discriminator.features(*here, conditioning)
        )
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(logits, others, strict=True))
    assert all(torch.equal(one, same) for one, same in zip(logits, parts, strict=True))
    with pytest.raises(ValueError, match="conditional is True"):
        discriminator(x, t, conditioning)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("conditional", [False, True])
def test_what_was_seen_need_not_be_encoded_again(unet, backend, conditional):
    """Real and fake of the same jumps, judged with B origin rows, the fake's features and one pass over the real."""
    discriminator = _awake(_discriminator(unet, backend=backend, conditional=conditional))
    real, t, conditioning = _inputs()
    fake, here = _inputs(seed=8)[0], _inputs(seed=9)[:2]
    twice = conditioning.rows(torch.tensor([0, 1, 0, 1]))
    with torch.no_grad():
        doubled = (torch.cat([here[0]] * 2), torch.cat([here[1]] * 2)) if conditional else None
        expected = discriminator(torch.cat([real, fake]), torch.cat([t, t]), twice, doubled)
        passes = []
        discriminator.encoder.register_forward_hook(lambda _m, args, _out: passes.append(len(args[0])))
        parts = [discriminator.features(x, t, conditioning) for x in (real, fake)]
        seen = tuple(torch.cat(pair) for pair in zip(*parts, strict=True))
        both = torch.cat([real, fake]), torch.cat([t, t])
        logits = discriminator(*both, twice, here if conditional else None, seen=seen)
    assert passes == [2] * (3 if conditional else 2)
    for one, other in zip(logits, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_origin_without_the_conditional_form(unet):
    x, t, conditioning = _inputs()
    with pytest.raises(ValueError, match="conditional is False"):
        _discriminator(unet)(x, t, conditioning, (x, t))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (3, 5), (8, 8)])
def test_heads_take_any_map_and_tell_inputs_apart(size):
    torch.manual_seed(0)
    for head, shape in ((MapHead(24, 32), (4, 1, *size)), (ScalarHead(24, 32, 3), (4, 1))):
        nn.init.normal_(head.out.weight)
        logits = head(torch.randn(4, 24, *size))
        assert logits.shape == shape
        assert logits.flatten(1).mean(1).std() > 1e-2


@pytest.mark.parametrize("width", [16, 24, 48, 64, 320, 640, 1280, 17])
def test_normalisation_groups_divide_and_are_never_sign_functions(width):
    norm = MapHead(8, width).lift[1]
    assert width % norm.num_groups == 0
    assert width // norm.num_groups >= min(GROUP, width)
    assert norm.num_groups <= 32


def test_too_narrow_heads_are_refused(unet):
    with pytest.raises(OptionError, match=r"^adversarial\.head_channels 8: must be at least 16$"):
        Discriminator(unet, AdversarialConfig(head_channels=8))


@pytest.mark.parametrize(("sample_size", "halvings"), [(8, 2), (64, 5), (None, 5), ((8, 16), 3), (2, 1)])
def test_the_scalar_head_ends_at_one_by_one(sample_size, halvings):
    discriminator = _discriminator(_unet(sample_size=sample_size), backend=Backend.TRAINABLE)
    blocks = discriminator.heads[0].blocks
    assert len(blocks) == halvings
    normed = [any(isinstance(layer, nn.GroupNorm) for layer in block) for block in blocks]
    assert normed == [True] * (halvings - 1) + [False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_weights_and_float32_heads(backend):
    original = _unet()
    x, t, conditioning = _inputs()
    whole = _awake(_discriminator(original, backend=backend))(x, t, conditioning)
    discriminator = _awake(_discriminator(original.to(torch.bfloat16), backend=backend))
    trained = backend is Backend.TRAINABLE
    assert {p.dtype for p in discriminator.encoder.parameters()} == {torch.float32 if trained else torch.bfloat16}
    assert {p.dtype for p in discriminator.trainable_parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):  # the heads stay float32 within the caller's autocast too
        logits = discriminator(x.requires_grad_(), t, conditioning)
    for half, full in zip(logits, whole, strict=True):
        assert half.dtype == torch.float32
        assert (half - full).abs().mean() < 0.1 * full.abs().mean().clamp(min=1)
    generator_loss(backend, logits).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None for p in discriminator.trainable_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_goes_back_and_holds_what_training_changes(unet, backend):
    one, two = (_discriminator(unet, seed=seed, backend=backend) for seed in (5, 6))
    assert {id(p) for p in one.trainable_parameters()} == {id(p) for n, p in one.named_parameters() if n in one.state()}
    two.load_state(_awake(one).state())
    x, t, conditioning = _inputs()
    for mine, theirs in zip(one(x, t, conditioning), two(x, t, conditioning), strict=True):
        assert torch.equal(mine, theirs)
    partial = dict(one.state())
    name = min(partial)
    partial[name] = partial[name][:1]
    with pytest.raises(DataError, match=f"1 tensors are of another model or configuration, as {name}"):
        two.load_state(partial)


# The game.


@pytest.mark.parametrize("backend", BACKENDS)
def test_toy_game(unet, backend):
    """Real is N(+0.5, 1), fake N(−0.5 + shift, 1): the critic learns to tell them, the shift then moves to real."""
    discriminator = _discriminator(unet, backend=backend)
    lr = 1e-2 if backend is Backend.FROZEN else 2e-3
    optimizer = torch.optim.Adam(discriminator.trainable_parameters(), lr=lr, betas=(0.0, 0.99))
    generator = torch.Generator().manual_seed(0)
    _, t, conditioning = _inputs(count=8)

    def draw(mean):
        return torch.randn(8, 4, 8, 8, generator=generator) + mean

    def gap():
        with torch.no_grad():
            real, fake = (discriminator(draw(mean), t, conditioning) for mean in (0.5, -0.5))
        return [float(r.mean() - f.mean()) for r, f in zip(real, fake, strict=True)], critic_loss(backend, real, fake)

    before = gap()[1].mean()
    for _ in range(40):
        real, fake = (discriminator(draw(mean), t, conditioning) for mean in (0.5, -0.5))
        optimizer.zero_grad()
        critic_loss(backend, real, fake).mean().backward()
        optimizer.step()
    gaps, after = gap()
    assert min(gaps) > 0.5
    assert after.mean() < 0.6 * before

    shift = torch.zeros((), requires_grad=True)
    mover = torch.optim.Adam([shift], lr=0.02)
    discriminator.learn(False)
    losses = []
    for _ in range(10):
        loss = generator_loss(backend, discriminator(draw(-0.5) + shift, t, conditioning)).mean()
        mover.zero_grad()
        loss.backward()
        mover.step()
        losses.append(loss.item())
    assert shift.item() > 0.1
    assert losses[-1] < losses[0]
