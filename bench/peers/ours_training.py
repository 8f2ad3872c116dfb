"""Our trainer, as the verb `train` runs it: `python -m bench.peers.ours_training < job.json`."""

import contextlib
import dataclasses
from pathlib import Path

from torch import Tensor

from bench.peers.training_job import Meter, TrainingJob
from model import ModelOptions
from training.batches import Batch
from training.learner import sizes as tokens_of
from training.recipe import Recipe, TrainingOptions, load
from training.run import Run
from training.train import Trainer


class Enough(Exception):
    """All is measured."""


class Timed(Trainer):
    meter: Meter

    def update(
        self, batches: list[Batch], rate: float, own: list[tuple[int, Tensor]]
    ) -> dict[str, float]:
        target, source, _ = (sum(one) for one in zip(*map(tokens_of, batches)))
        if not self.meter.update_begins(source, target):
            raise Enough
        return super().update(batches, rate, own)

    def save(self, best: bool = False) -> None:
        """Not measured, so not done."""


def recipe(job: TrainingJob) -> Recipe:
    """That of the prepared data, with this network and this training."""
    sizes = job.sizes
    model = ModelOptions(
        embedding_size=sizes.embedding_size,
        encoder_layers=sizes.layers,
        encoder_hidden_size=sizes.hidden_size // 2,
        decoder_layers=sizes.layers,
        decoder_hidden_size=sizes.hidden_size,
        attention_size=sizes.hidden_size,
        dropout=job.dropout,
    )
    training = TrainingOptions(
        epochs=1e6, batch_tokens=job.batch, schedule="constant", warmup_steps=0, clip_norm=1.0,
        label_smoothing=job.label_smoothing, validate_every=10**9, device="cpu",
        precision="bf16" if job.precision == "bf16" else "fp32",
    )  # fmt: skip
    prepared = load(Path(job.folder) / "recipe.yaml")
    return dataclasses.replace(prepared, model=model, training=training)


def main() -> None:
    job = TrainingJob.read()
    trainer = Timed(recipe(job), Run(Path(job.folder) / "run"), fresh=True)
    trainer.meter = Meter(job.seconds)
    with contextlib.suppress(Enough):
        trainer.train()
    network = (
        "learned bridge for every layer, 'general' attention with keys and values of its own, "
        "readout as wide as an embedding, no input feeding"
    )
    trainer.meter.tell("ours", network, trainer.network)


if __name__ == "__main__":
    main()
