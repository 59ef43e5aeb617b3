"""Which lengths are drawn."""

import json

import numpy as np
import pytest

from analyses.hidden_reasoning.errors import TrainingError
from analyses.hidden_reasoning.training.curriculum import Curriculum


def solve(curriculum, length, share=1.0, rows=2000):
    curriculum.update(np.full(rows, length), np.arange(rows) < share * rows)


def test_weights_follow_the_accuracy():
    c = Curriculum(6, start=3)
    np.testing.assert_allclose(c.weights, [1 / 3] * 3)
    c.accuracy[:3] = [1.0, 0.5, 0.0]
    np.testing.assert_allclose(c.weights, np.array([0.05, 0.525, 1.0]) / 1.575)
    drawn = c.draw(np.random.default_rng(0), 20_000)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4)[1:] / 20_000, c.weights, atol=0.02)


def test_the_limit_follows_the_longest_length_solved_and_never_falls():
    c = Curriculum(4, start=2, lead=1, solved=0.9)
    solve(c, 1)
    assert c.limit == 2
    solve(c, 2)
    assert c.limit == 3
    solve(c, 3, 0.8)
    assert c.limit == 3
    solve(c, 3)
    solve(c, 4)
    assert c.limit == 4
    assert c.done(0.99)
    solve(c, 2, 0.0)
    assert c.limit == 4
    assert not c.done(0.99)


def test_accuracy_is_the_running_mean_of_rows_taken_one_at_a_time():
    c = Curriculum(3, memory=50)
    c.update([1, 2, 1, 1], [True, False, True, True])
    expected = 0.0
    for right in (1, 1, 1):
        expected += (right - expected) / 50
    np.testing.assert_allclose(c.accuracy, [expected, 0, 0])
    c.update([], [])
    np.testing.assert_allclose(c.accuracy, [expected, 0, 0])


def test_a_state_goes_through_json_exactly():
    c = Curriculum(5)
    solve(c, 2, 0.957)
    other = Curriculum(5)
    other.restore(json.loads(json.dumps(c.state())))
    assert other.limit == c.limit
    assert np.array_equal(other.accuracy, c.accuracy)
    assert np.array_equal(other.draw(np.random.default_rng(1), 100), c.draw(np.random.default_rng(1), 100))


@pytest.mark.parametrize("bad", [{"max_length": 0}, {"start": 0}, {"lead": 0}, {"memory": 0}, {"solved": 1.0}])
def test_bad_sizes_raise(bad):
    with pytest.raises(TrainingError, match="give"):
        Curriculum(**{"max_length": 3, **bad})
