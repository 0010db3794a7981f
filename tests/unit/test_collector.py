"""collector.py: the cyclic collector waits, and then looks at what is new."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from hypersd_export import collector


class Ring:
    """An object that holds itself: only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_off() -> Iterator[None]:
    """No collection but those of the test, and nothing frozen."""
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.unfreeze()
    yield
    gc.unfreeze()
    if frozen:
        gc.freeze()
    if was_on:
        gc.enable()


def test_nothing_is_collected_in_the_body_and_the_collector_is_as_before():
    gc.enable()
    with collector.paused():
        assert not gc.isenabled()
        with collector.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="body"), collector.paused():
        raise ValueError("body")
    assert gc.isenabled()
    gc.disable()
    with collector.paused():
        pass
    assert not gc.isenabled()


def test_what_the_body_made_is_collected_and_nothing_older_is_looked_at():
    older = weakref.ref(Ring())
    with collector.collected_after():
        new = weakref.ref(Ring())
        assert new() is not None
    assert new() is None
    assert older() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert older() is None


def test_a_program_that_froze_its_objects_finds_them_frozen():
    old = weakref.ref(Ring())
    gc.freeze()
    with collector.collected_after():
        new = weakref.ref(Ring())
    assert new() is None
    assert gc.get_freeze_count() > 0
    gc.collect()
    assert old() is not None  # frozen still; a count would fall with whatever else dies meanwhile
    gc.unfreeze()
    gc.collect()
    assert old() is None


def test_an_error_in_the_body_leaves_nothing_frozen():
    with pytest.raises(ValueError, match="body"), collector.collected_after():
        raise ValueError("body")
    assert gc.get_freeze_count() == 0


def test_the_interpreter_ends_without_a_last_look(monkeypatch):
    asked = []
    monkeypatch.setattr(collector.atexit, "register", asked.append)
    collector.none_at_exit()
    assert asked == [gc.freeze]
