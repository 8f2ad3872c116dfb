"""A network that learns: one update of the weights, and the average of the weights so far."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import Network, SpecialTokens
from training.batches import Batch, mixed
from training.distributed import Processes
from training.loss import batch_loss
from training.recipe import TrainingOptions

BF16_WEIGHTS = 1_000_000  # of a network, from which bf16 pays on a CPU


class NotFinite(ArithmeticError):
    """The loss, or the gradient, of an update is no number; no weight has been changed.

    batches: those whose loss is none, as numbers among all of the update, which the processes take
        in turn; empty where the gradient alone is none.
    """

    def __init__(self, problem: str, batches: list[int]) -> None:
        super().__init__(problem)
        self.batches = batches


class Objective(nn.Module):
    """A network and its loss in one module, as distributed training wants it."""

    def __init__(self, network: Network, options: TrainingOptions) -> None:
        super().__init__()
        self.network, self.options = network, options

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `batch_loss`."""
        options = self.options
        return batch_loss(self.network, Batch(*batch), options.label_smoothing, options.r_drop)


class Learner:
    """A network, its optimiser and its average.

    Args:
        network: on the device where it learns.
    """

    def __init__(
        self, network: Network, options: TrainingOptions, processes: Processes = Processes()
    ) -> None:
        self.network, self.options, self.processes = network, options, processes
        self.device = next(network.parameters()).device
        self.precision = precision(options, self.device, network)
        self.optimizer = make_optimizer(options, network)
        self.objective: nn.Module = Objective(network, options)
        if processes.count > 1:
            gpus = [self.device.index] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(self.objective, gpus)
        self.parameters: list[Tensor] = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters] if options.average else []

    def update(self, batches: Sequence[Batch], step: int, rate: float) -> dict[str, float]:
        """One update of the weights, from the batches that this process has of it.

        Returns:
            Of all processes: the loss as it is minimised and the sum of -log P(y_j), each over
            all target tokens; their number and that of source tokens; the gradient's norm.

        Raises:
            NotFinite: nothing has been changed.
        """
        options, processes = self.options, self.processes
        self.network.train()
        # Masks depend on the step and the process alone, so a resumed run draws the same.
        torch.manual_seed(mixed(options.seed, step, processes.rank))
        counts = zip((0, 0, 0), *map(sizes, batches))
        tokens, source_tokens, sentences = processes.total(*(float(sum(one)) for one in counts))
        whole = tokens if options.loss_per == "token" else sentences
        # All processes take part in every update: one without a batch lends a gradient of 0.
        share = (1.0 if batches else 0.0) / copies(options)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        losses: list[Tensor] = []
        batches = batches or [self.stand_in()]
        for i, batch in enumerate(batches):
            meet = processes.count == 1 or i == len(batches) - 1
            with nullcontext() if meet else self.objective.no_sync():  # type: ignore[operator]
                with self.autocast():
                    loss, surprise = self.objective(*batch)
                # Distributed training averages the gradients of the processes; here they add up.
                (loss * (share * processes.count / whole)).backward()
            losses.append(loss.detach())
            sums += torch.stack([losses[-1], surprise]).double() * share
        # s = ||g||; where s > clip_norm, g <- clip_norm * g / s (1409.3215, section 3.4)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, options.clip_norm))
        loss_sum, surprise_sum = processes.total(*sums.tolist())
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise NotFinite(
                f"the loss is {loss_sum:g} and the gradient's norm {norm:g}",
                self.not_finite(losses),
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            # Early weights are soon forgotten: the average would be theirs for 1 / (1 - d) steps.
            decay = min(options.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return {
            "loss": loss_sum, "surprise": surprise_sum, "tokens": tokens,
            "source_tokens": source_tokens, "norm": norm,
        }

    def not_finite(self, losses: list[Tensor]) -> list[int]:
        """See `NotFinite.batches`.

        Args:
            losses: of the batches that this process has of the update.
        """
        wrong = self.processes.gathered([not math.isfinite(float(one)) for one in losses])
        return sorted(
            i * self.processes.count + rank
            for rank, flags in enumerate(wrong) for i, flag in enumerate(flags) if flag
        )  # fmt: skip

    @property
    def precision_name(self) -> str:
        return str(self.precision).removeprefix("torch.")

    def stand_in(self) -> Batch:
        special, one = SpecialTokens(), torch.ones(1, dtype=torch.int64, device=self.device)
        ids = [(one * i).unsqueeze(0) for i in (special.eos, special.bos, special.eos)]
        return Batch(ids[0], one, ids[1], ids[2], one)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.precision, self.precision == torch.bfloat16)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the place of the weights, where there is one."""
        if not self.average:
            yield
            return
        learnt = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, learnt)


def sizes(batch: Batch) -> tuple[int, int, int]:
    """Target tokens, source tokens and sentences."""
    return int(batch.target_lengths.sum()), int(batch.source_lengths.sum()), batch.source.size(0)


def copies(options: TrainingOptions) -> int:
    """How often the loss of a batch counts each token."""
    return 2 if options.r_drop else 1


def precision(options: TrainingOptions, device: torch.device, network: Network) -> torch.dtype:
    """The dtype of products. bf16 pays where a processor multiplies it: GPUs since Ampere, and
    CPUs with AVX512_BF16 (all that have AMX, and AMD's since Zen 4). On these an update of five
    million weights takes two thirds of the time, while one of the demo's network takes longer:
    what it saves in products it spends on compiling kernels."""
    if options.precision == "auto":
        if device.type == "cuda":
            half = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            count = sum(p.numel() for p in network.parameters())
            half = torch.cpu._is_avx512_bf16_supported() and count >= BF16_WEIGHTS
    else:
        half = options.precision == "bf16"
    return torch.bfloat16 if half else torch.float32


def make_optimizer(options: TrainingOptions, network: nn.Module) -> torch.optim.Optimizer:
    """Adam (arXiv 1412.6980) with the second decay of 1706.03762, or SGD without momentum."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=options.learning_rate, fused=True)
    return torch.optim.Adam(
        network.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-9, fused=True
    )
