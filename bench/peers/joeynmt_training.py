"""JoeyNMT's own trainer, in JoeyNMT's environment: `TrainManager` as its verb `train` makes it,
with its data set, sampler, model, loss and optimiser. Nothing of it is replaced; its training step
is only told when to stop."""

import contextlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from joeynmt.batch import Batch  # type: ignore[import-not-found]
from joeynmt.config import parse_global_args, set_validation_args  # type: ignore[import-not-found]
from joeynmt.prediction import prepare  # type: ignore[import-not-found]
from joeynmt.training import TrainManager  # type: ignore[import-not-found]

from bench.peers.training_job import BETAS, Meter, TrainingJob

NEVER = 10**9


class Enough(Exception):
    """All is measured."""


class Timed(TrainManager):  # type: ignore[misc]
    def __init__(self, meter: Meter, **rest: Any) -> None:
        super().__init__(**rest)
        self.meter = meter

    def _train_step(self, batch: Batch) -> tuple[float, int]:
        if not self.meter.update_begins(int(batch.src_length.sum()), int(batch.ntokens)):
            raise Enough
        step: tuple[float, int] = super()._train_step(batch)
        return step

    def _save_checkpoint(self, new_best: bool, score: float) -> None:
        """Not measured, so not done."""


def configuration(job: TrainingJob, folder: Path, models: Path) -> dict[str, Any]:
    sizes = job.sizes
    embeddings = {"embedding_dim": sizes.embedding_size, "dropout": job.dropout}
    recurrent = {
        "type": "recurrent", "rnn_type": "lstm", "embeddings": embeddings,
        "num_layers": sizes.layers, "dropout": job.dropout,
    }
    side = {"level": "word", "lowercase": False, "max_length": -1}
    return {
        "name": "bench", "model_dir": str(models), "use_cuda": False, "random_seed": 1,
        "data": {
            "train": str(folder / "ids"), "dev": str(folder / "ids-dev"),
            "dataset_type": "plain",
            "src": {"lang": "source", "voc_file": str(folder / "ids.vocabulary"), **side},
            "trg": {"lang": "target", "voc_file": str(folder / "ids.vocabulary"), **side},
        },
        "training": {
            "optimizer": "adam", "adam_betas": list(BETAS), "learning_rate": 0.001,
            "learning_rate_min": 0.0, "clip_grad_norm": 1.0, "normalization": "tokens",
            "label_smoothing": job.label_smoothing, "batch_size": job.batch,
            "batch_type": "token", "epochs": NEVER, "validation_freq": NEVER,
            "logging_freq": 20,
            # A rate that stays: it needs a schedule, and "plateau" asks too new a torch for
            # `verbose`.
            "scheduling": "exponential", "decrease_factor": 1.0,
        },
        "testing": {},
        "model": {
            "encoder": {**recurrent, "hidden_size": sizes.hidden_size // 2, "bidirectional": True},
            "decoder": {
                **recurrent, "hidden_size": sizes.hidden_size, "attention": "luong",
                "init_hidden": "bridge", "input_feeding": job.input_feeding,
                "hidden_dropout": job.dropout,
            },
        },
    }  # fmt: skip


def main() -> None:
    job = TrainingJob.read()
    meter = Meter(job.seconds)
    with tempfile.TemporaryDirectory() as models, contextlib.redirect_stdout(sys.stderr):
        arguments = parse_global_args(configuration(job, Path(job.folder), Path(models)))
        model, train_data, dev_data, _ = prepare(arguments, rank=0, mode="train")
        manager = Timed(
            meter, model=model, model_dir=arguments.model_dir, device=arguments.device,
            n_gpu=0, rank=0, num_workers=0, autocast=arguments.autocast, seed=arguments.seed,
            train_args=arguments.train, dev_args=set_validation_args(arguments.test),
        )  # fmt: skip
        with contextlib.suppress(Enough):
            manager.train_and_validate(train_data=train_data, valid_data=dev_data)
    feeding = "input feeding" if job.input_feeding else "no input feeding"
    network = f"bridge from the encoder's last layer, 'luong' attention, {feeding}"
    meter.tell(f"JoeyNMT {version('joeynmt')}", network, model)


if __name__ == "__main__":
    main()
