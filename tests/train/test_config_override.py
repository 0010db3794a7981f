import pytest

from hypersd_export.errors import HypersdError, OptionError
from trainer.config import as_json, flat, override
from trainer.distill.config import StageConfig, builtin, sd15
from trainer.losses.tscd import Distance, End


def test_entries_of_a_list_of_groups_are_named_by_number():
    config = override(builtin(), ["stages.0.steps=100", "stages.3.w_adv=0.5", "stages.1.teacher=previous"])
    assert (config.stages[0].steps, config.stages[1].teacher.value) == (100, "previous")
    assert config.stages[3].w_adv == 0.5
    assert config.stages[2] == builtin().stages[2]


def test_a_whole_list_of_groups_is_given_as_json():
    text = '[{"segments": 2, "points": 50, "steps": 3, "lr": 1e-4}, {"segments": 1, "points": 50, "steps": 4, "lr": 1}]'
    stages = override(builtin(), [f"stages={text}", "stages.1.lr=0.5"]).stages
    assert stages == (
        StageConfig(segments=2, points=50, steps=3, lr=1e-4), StageConfig(segments=1, points=50, steps=4, lr=0.5),
    )  # fmt: skip


def test_enums_and_tuples():
    config = override(
        builtin(), ["guidance=[3,5]", "end=edge", "distance=huber", 'validation_prompts=["a fox", "12"]', "betas=[0,1]"]
    )
    assert config.guidance == (3.0, 5.0)
    assert all(isinstance(value, float) for value in config.guidance)
    assert config.end is End.EDGE
    assert config.distance is Distance.HUBER
    assert config.validation_prompts == ("a fox", "12")


def test_assignments_that_are_valid_only_together_come_in_any_order():
    for pair in (["batch=6", "micro_batch=3"], ["micro_batch=3", "batch=6"]):
        config = override(sd15(), pair)
        assert (config.batch, config.micro_batch) == (6, 3)


def test_the_later_of_two_holds_and_text_stays_text():
    config = override(builtin(), ["seed=1", "seed=2", "data.source=2024", "data.cache=null", "base=a=b"])
    assert (config.seed, config.data.source, config.data.cache, config.base) == (2, "2024", "null", "a=b")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.9.steps=1", "unknown key '9'; there are: 0, 1, 2, 3"), ("stages.0.stepz=1", "unknown key 'stepz'"),
        ("stages.0=1", "is a group"), ("stages=4", "not a list of JSON objects"),
        ('stages=[{"segmentz": 1}]', "unknown key 'segmentz'"), ('stages=[{"segments": 1}]', "missing 3 required"),
        ('stages=[{"segments": 1.5}]', "not a int"), ("stages=[]", "needs at least one"),
        ("end=middle", "not one of random, edge"), ("guidance=3", "not a list"), ("guidance=[3]", "has 1 entries"),
        ("guidance=[3,x]", "not a list"), ('guidance=[3,"x"]', "not a float"), ("ema_decay=NaN", "not a float"),
        ("adversarial=1", "is a group"), ("guidance.0=1", "has no parts"), ("seed.x=1", "has no parts"),
        ("lora.modules=[1, [2]]", "not a str"), ("gradient_checkpointing=1", "not a bool"), ("=1", "unknown key ''"),
        ("stages.0.segments=7", "7 segments"), ("seed=1" + "0" * 5000, "not a int"),
        ("offset_noise=1" + "0" * 400, "too large"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(assignment, message):
    with pytest.raises(HypersdError) as caught:
        override(builtin(), [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_equals_sign():
    with pytest.raises(OptionError, match="no '='"):
        override(builtin(), ["seed"])


def test_flat_names_every_value():
    data = flat(as_json(builtin()))
    assert data["stages.2.segments"] == 2
    assert data["guidance"] == [3.0, 3.0]
    assert data["adversarial.backend"] == str(builtin().adversarial.backend)
    assert data["validation_prompts"] == []
