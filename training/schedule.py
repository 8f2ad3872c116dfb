"""The learning rate at each step: pure functions of the options and of how far training is."""

import math

from training.recipe import TrainingOptions

CLIMB, LOWEST = 0.3, 1 / 25  # of one_cycle: the rising part of all epochs; the first rate


def learning_rate(
    options: TrainingOptions, step: int, epoch: float, disappointments: int = 0
) -> float:
    """Rate of update number `step` (from 0) at `epoch` (fractional).

    Args:
        disappointments: how often validation has not improved so far.

    one_cycle rises from r / 25 to r over the first 30 % of the epochs and falls to zero over the
    others, each along half a cosine (Smith and Topin 2017, arXiv 1708.07120). Under every other
    schedule the first warmup_steps updates climb to r: r * (step + 1) / warmup_steps. After them:
        constant      r
        linear        r * (1 - epoch / epochs), which ends at zero
        inverse_sqrt  r * sqrt(warmup_steps / (step + 1))   (arXiv 1706.03762, section 5.3)
        plateau       r * 0.5^disappointments
        halving       r * 0.5^n; n = 0 before halve_after_epoch, and from there on
                      n = 1 + floor((epoch - halve_after_epoch) / halve_every_epochs): the
                      paper's, 0.7 for five epochs, then halved every half epoch until 7.5
                      (arXiv 1409.3215, section 3.4)
    """
    rate = options.learning_rate
    if options.schedule == "one_cycle":
        done = min(1.0, epoch / options.epochs)
        if done < CLIMB:
            return rate * (LOWEST + (1 - LOWEST) * (1 - math.cos(math.pi * done / CLIMB)) / 2)
        return rate * (1 + math.cos(math.pi * (done - CLIMB) / (1 - CLIMB))) / 2
    if step < options.warmup_steps:
        return rate * (step + 1) / options.warmup_steps
    if options.schedule == "linear":
        return rate * max(0.0, 1 - epoch / options.epochs)
    if options.schedule == "inverse_sqrt":
        return rate * math.sqrt(options.warmup_steps / (step + 1))
    if options.schedule == "plateau":
        return rate * 0.5**disappointments
    if options.schedule == "halving" and epoch >= options.halve_after_epoch:
        past = (epoch - options.halve_after_epoch) / options.halve_every_epochs
        return rate * 0.5 ** (1 + math.floor(past))
    return rate
