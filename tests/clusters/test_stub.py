"""The stub of tests/stub says, saves and leaves what a training does, so that what holds of its runs holds of others."""

import pytest

from tests.clusters.runs import SAVE_EVERY, STEPS, TRAINED

pytestmark = [pytest.mark.cluster, TRAINED]


def keys(words):
    """Those of objects in it, too."""
    return {name: keys(value) if isinstance(value, dict) else type(value) for name, value in words.items()}


def test_it_says_what_a_training_says(uninterrupted, trained):
    for process in (0, 1):
        assert keys(uninterrupted.report(process)) == keys(trained.report(process))
    assert keys(uninterrupted.result()) == keys(trained.result())
    (mine,), (others,) = uninterrupted.attempts(), trained.attempts()
    assert keys(mine) == keys(others)


def test_it_leaves_what_a_training_leaves(uninterrupted, trained):
    assert uninterrupted.checkpoint_steps() == trained.checkpoint_steps()
    saved = uninterrupted.checkpoint_steps()[-2:]
    assert saved == [STEPS - SAVE_EVERY, STEPS]
    assert [uninterrupted.data_position(s) for s in saved] == [trained.data_position(s) for s in saved]
    for run in (uninterrupted, trained):
        assert any(
            path.name.startswith("events.out.tfevents") for path in (run.path / "tensorboard").iterdir()
        )
        assert run.arrays(saved[0]).keys() == run.arrays(saved[1]).keys()
