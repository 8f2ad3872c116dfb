"""Learning rates against figures worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.recipe import TrainingOptions
from training.schedule import learning_rate

PAPER = TrainingOptions(
    optimizer="sgd", learning_rate=0.7, schedule="halving", warmup_steps=0, epochs=7.5,
    halve_after_epoch=5.0, halve_every_epochs=0.5,
)  # fmt: skip


def options(schedule: str, warmup_steps: int = 0, epochs: float = 10.0) -> TrainingOptions:
    return TrainingOptions(
        learning_rate=0.1, schedule=schedule, warmup_steps=warmup_steps, epochs=epochs
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0.0, 0.7),
        (4.999, 0.7),
        (5.0, 0.35),
        (5.499, 0.35),
        (5.5, 0.175),
        (6.0, 0.0875),
        (6.5, 0.04375),
        (7.0, 0.021875),
        (7.499, 0.021875),
    ],
)
def test_the_papers_halving(epoch: float, rate: float) -> None:
    assert learning_rate(PAPER, 12345, epoch) == pytest.approx(rate, rel=1e-12)


def test_constant() -> None:
    assert {learning_rate(options("constant"), 7 * k, 0.9 * k) for k in range(11)} == {0.1}


@pytest.mark.parametrize(("epoch", "rate"), [(0.0, 0.1), (2.5, 0.075), (5.0, 0.05), (9.5, 0.005)])
def test_linear(epoch: float, rate: float) -> None:
    assert learning_rate(options("linear"), 3, epoch) == pytest.approx(rate)


def test_linear_ends_at_zero_and_stays_there() -> None:
    assert learning_rate(options("linear"), 3, 10.0) == 0.0
    assert learning_rate(options("linear"), 3, 11.0) == 0.0


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.001), (49, 0.05), (99, 0.1), (399, 0.05), (899, 0.1 / 3)]
)
def test_inverse_square_root(step: int, rate: float) -> None:
    assert learning_rate(options("inverse_sqrt", 100), step, 1.0) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0.0, 0.1 / 25),
        (1.0, 0.1 / 25 + 0.1 * 24 / 25 / 4),  # a third of the way up: (1 - cos 60 deg) / 2 = 1/4
        (1.5, 0.1 * (1 + 1 / 25) / 2),  # half the way up
        (3.0, 0.1),
        (6.5, 0.05),  # half the way down
        (3 + 7 * 2 / 3, 0.025),
        (10.0, 0.0),
        (11.0, 0.0),  # and stays there
    ],
)
def test_one_cycle(epoch: float, rate: float) -> None:
    assert learning_rate(options("one_cycle", 1000), 7, epoch) == pytest.approx(rate, abs=1e-15)


@given(epochs=st.floats(0.01, 1e4), one=st.floats(0, 1), other=st.floats(0, 1),
       step=st.integers(0, 10**6))  # fmt: skip
def test_one_cycle_rises_to_its_peak_and_falls_to_zero(
    epochs: float, one: float, other: float, step: int
) -> None:
    """Whatever the number of epochs, of which `one` and `other` are fractions; its climb is its
    own, so the number of steps plays no part."""
    cycle = options("one_cycle", 1000, epochs)
    first, second = sorted((one, other))
    early, late = (learning_rate(cycle, step, epochs * part) for part in (first, second))
    assert 0 <= early <= 0.1
    assert 0 <= late <= 0.1
    near = 1e-12
    if second <= 0.3:
        assert 0.1 / 25 - near <= early <= late + near
    if first >= 0.3:
        assert late <= early + near
    peak = learning_rate(cycle, step, 0.3 * epochs)
    assert peak == pytest.approx(0.1)
    for beside in (0.2999, 0.3001):  # without a jump
        assert learning_rate(cycle, step, beside * epochs) == pytest.approx(peak, rel=1e-5)


@given(step=st.integers(0, 10**6), epoch=st.floats(0, 20), disappointments=st.integers(0, 50))
def test_plateau_halves_at_every_disappointment(
    step: int, epoch: float, disappointments: int
) -> None:
    rate = learning_rate(options("plateau", 0), step, epoch, disappointments)
    assert rate == 0.1 * 0.5**disappointments


@given(
    schedule=st.sampled_from(["constant", "linear", "inverse_sqrt", "one_cycle", "halving"]),
    step=st.integers(0, 10**6), epoch=st.floats(0, 20), disappointments=st.integers(0, 50),
)  # fmt: skip
def test_only_plateau_is_disappointed(
    schedule: str, step: int, epoch: float, disappointments: int
) -> None:
    one, other = (
        learning_rate(options(schedule, 10), step, epoch, n) for n in (0, disappointments)
    )
    assert one == other
    assert math.isfinite(one)


@pytest.mark.parametrize("schedule", ["constant", "linear", "inverse_sqrt", "plateau", "halving"])
def test_warm_up_climbs_in_equal_steps(schedule: str) -> None:
    rates = [learning_rate(options(schedule, 4), step, 0.0) for step in range(5)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] <= 0.1
