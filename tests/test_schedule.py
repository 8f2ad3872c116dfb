"""Learning rates against figures worked out by hand."""

import pytest

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


@pytest.mark.parametrize("schedule", ["constant", "linear", "inverse_sqrt", "halving"])
def test_warm_up_climbs_in_equal_steps(schedule: str) -> None:
    rates = [learning_rate(options(schedule, 4), step, 0.0) for step in range(5)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] <= 0.1
