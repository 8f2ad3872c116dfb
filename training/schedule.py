"""The learning rate at each step: pure functions of the options and of how far training is."""

import math

from training.recipe import TrainingOptions


def learning_rate(options: TrainingOptions, step: int, epoch: float) -> float:
    """Rate of update number `step` (from 0) at `epoch` (fractional).

    The first warmup_steps updates climb to r, whatever the schedule: r * (step + 1) / warmup_steps.
    After them:
        constant      r
        linear        r * (1 - epoch / epochs), which ends at zero
        inverse_sqrt  r * sqrt(warmup_steps / (step + 1))   (arXiv 1706.03762, section 5.3)
        halving       r * 0.5^n; n = 0 before halve_after_epoch, and from there on
                      n = 1 + floor((epoch - halve_after_epoch) / halve_every_epochs): the
                      paper's, 0.7 for five epochs, then halved every half epoch until 7.5
                      (arXiv 1409.3215, section 3.4)
    """
    rate = options.learning_rate
    if step < options.warmup_steps:
        return rate * (step + 1) / options.warmup_steps
    if options.schedule == "linear":
        return rate * max(0.0, 1 - epoch / options.epochs)
    if options.schedule == "inverse_sqrt":
        return rate * math.sqrt(options.warmup_steps / (step + 1))
    if options.schedule == "halving" and epoch >= options.halve_after_epoch:
        past = (epoch - options.halve_after_epoch) / options.halve_every_epochs
        return rate * 0.5 ** (1 + math.floor(past))
    return rate
