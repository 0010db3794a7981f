"""The overhead benchmark replays what a step calls, and leaves the training as it was."""

import json

import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead import Call, needed, summary, take_turns
from tests.train.small_unet import SHAPE, conditioning, small_networks
from trainer.batch import Batch
from trainer.discriminator import Discriminator
from trainer.distill.config import AdversarialConfig, Backend, DistillConfig, LoraConfig, StageConfig
from trainer.distill.engine import Engine
from trainer.distill.loop import StageLoop
from trainer.distill.networks import Role
from trainer.distill.step import DistillStep


class Samples:
    """A `Source` of random latents and text states."""

    latent_shape = SHAPE
    empty = conditioning(1, seed=9)

    def batch(self, positions):
        generator = torch.Generator().manual_seed(min(positions))
        names = tuple(map(str, positions))
        latents = torch.randn(len(names), *SHAPE, generator=generator)
        return Batch(latents=latents, conditioning=conditioning(len(names), seed=5), captions=names, names=names)


def config_of(stage, **adversarial):
    return DistillConfig(
        method="tscd", stages=(stage,), lora=LoraConfig(rank=4, alpha=4.0), batch=4, mixed_precision="no",
        adversarial=AdversarialConfig(head_channels=16, **adversarial),
    )  # fmt: skip


def parts_of(config):
    """Engine, networks and critic; the same ones at every call."""
    engine, networks = Engine(config), small_networks()
    torch.manual_seed(0)
    critic = Discriminator(networks.unet, config.adversarial) if config.stages[0].w_adv else None
    return engine, engine.prepare(networks), critic


PLAIN = StageConfig(segments=2, points=10, steps=1, lr=1e-2)
ADVERSARIAL = StageConfig(segments=1, points=10, steps=1, lr=1e-2, w_mse=0.5, w_adv=0.5)


@pytest.mark.parametrize(
    ("stage", "backend"),
    [(PLAIN, Backend.FROZEN), (ADVERSARIAL, Backend.FROZEN), (ADVERSARIAL, Backend.TRAINABLE)],
    ids=["consistency", "frozen critic", "trained critic"],
)
def test_replays_change_nothing_in_the_training_between_them(stage, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "WARMUP", 1)
    config = config_of(stage, backend=backend, lr=1e-2)
    engine, networks, critic = parts_of(config)
    turns = take_turns(engine, networks, stage, Samples(), critic, turns=2, out=tmp_path)
    assert len(turns.real) == len(turns.bare) == len(turns.passes) == 2

    engine, plain, plain_critic = parts_of(config)
    engine.start_stage(plain_critic)
    plain.start_stage(stage.teacher)
    long = overhead.replace(stage, steps=4)
    step = DistillStep(plain, config, long, Samples.empty, plain_critic)
    list(StageLoop(engine, step, Samples(), number=1, offset=0, out=tmp_path).run(0))
    for name, weight in plain.state().items():
        assert torch.equal(weight, networks.state()[name]), name
    if critic is not None:
        assert all(torch.equal(mine, critic.state()[name]) for name, mine in plain_critic.state().items())

    step = DistillStep(plain, config, overhead.replace(stage, steps=9), Samples.empty, plain_critic)
    indices = step.draw(3, SHAPE).indices
    unfinished = int((indices.end < indices.start - 1).sum())
    seen = [(call.kind, call.rows) for call in turns.calls]
    assert seen[0] == ("base", 8)
    assert ("target", unfinished) in seen[:2]
    assert [entry for entry in seen if entry[0] == "student"] == [("student", 4)]
    data = summary(stage, config, turns)
    json.dumps(data)
    gradients = {(entry["of"], entry["gradient"]) for entry in data["passes"]}
    assert {("base", False), ("target", False), ("student", True)} <= gradients
    assert (("critic logits", True) in gradients) == (critic is not None)


def test_a_replayed_pass_gives_what_the_call_gave(tmp_path):
    engine, networks, _ = parts_of(config_of(PLAIN))
    recorder, text = overhead.Recorder(networks, None), conditioning(3)
    x, t = torch.randn(3, *SHAPE), torch.tensor([3, 500, 999])
    with recorder.watching():
        outputs = [
            networks.student(x, t, text),
            networks.frozen(Role.TARGET, x, t, text),
            networks.frozen(Role.BASE, x, t, text, guidance=torch.ones(3), empty=conditioning(1, seed=9)),
        ]
    assert [(call.kind, call.rows, call.grad) for call in recorder.calls] == [
        ("student", 3, True), ("target", 3, False), ("base", 6, False),
    ]  # fmt: skip
    bare = overhead.BarePasses(engine, networks, None)
    replayed = [bare._pass(call)[0] for call in recorder.calls]
    assert torch.equal(replayed[0], outputs[0])
    assert replayed[0].requires_grad
    assert torch.equal(replayed[1], outputs[1])
    torch.testing.assert_close(replayed[2].chunk(2)[1], outputs[2], rtol=0, atol=1e-5)  # w = 1: the conditional half
    networks.student(x, t, text)
    assert len(recorder.calls) == 3  # only while watching


def call(name, x, t, states, role=Role.BASE, grad=False):
    def network():
        raise AssertionError

    network.__name__ = name
    tensors = (torch.tensor(x).view(-1, 1), torch.tensor(t))
    return Call(network, tensors, {"encoder_hidden_states": torch.tensor(states).view(-1, 1)}, role, grad, False)


def test_rows_that_were_computed_before_are_not_needed_again():
    first = call("unet", [1.0, 2.0], [5, 6], [0.0, 0.0])
    again = call("unet", [1.0, 2.0], [5, 6], [0.0, 0.0])
    partly = call("unet", [2.0, 1.0, 7.0], [6, 6, 6], [0.0, 0.0, 0.0])
    text = call("unet", [1.0], [5], [1.0])
    target = call("unet", [1.0], [5], [0.0], Role.TARGET)
    student = call("unet", [1.0], [5], [0.0], Role.STUDENT, grad=True)
    kept = needed([first, again, partly, text, target, student, student], critic_frozen=True)
    assert kept[0] is first
    assert (kept[1].rows, kept[1].repeated) == (2, 1)
    assert kept[1].arguments[0].flatten().tolist() == [1.0, 7.0]
    assert kept[1].settings["encoder_hidden_states"].shape == (2, 1)
    assert kept[2:] == [text, target, student, student]
    looked = [call("features", [1.0], [5], [0.0]), call("features", [3.0, 1.0], [5, 5], [0.0, 0.0])]
    assert [c.rows for c in needed(looked, critic_frozen=True)] == [1, 1]
    assert [c.rows for c in needed(looked, critic_frozen=False)] == [1, 2]
    heads = [call("logits", [1.0], [5], [0.0])] * 2
    assert needed(heads, critic_frozen=True) == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "sd16"], "--recipe 'sd16' is not a distillation recipe"),
        (["--turns", "1"], "--turns 1: must be at least 2"),
        (["--set", "batch"], "--set 'batch' has no '='"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, message, capsys):
    assert overhead.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
