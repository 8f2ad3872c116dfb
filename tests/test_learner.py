"""One update of the weights against what it should be by hand, and the average of the weights."""

import dataclasses
import random
from contextlib import suppress
from typing import Any

import pytest
import torch
from tiny_run import Tiny, assert_equal
from torch import Tensor

import training.learner
import training.train
from model import ModelOptions, Network, SpecialTokens
from training import checkpoint
from training.batches import Batch, collate
from training.distributed import Processes
from training.learner import Learner, NotFinite, precision
from training.loss import batch_loss
from training.recipe import TrainingOptions
from training.tokens import TokenPairs

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = SpecialTokens()
VOCABULARY = 30
MODELS = {
    "attention": ModelOptions(
        embedding_size=8, encoder_hidden_size=6, decoder_hidden_size=10, attention_size=8
    ),
    "sutskever": ModelOptions(
        kind="sutskever", bidirectional=False, embedding_size=8, encoder_layers=2,
        encoder_hidden_size=8, decoder_layers=2, decoder_hidden_size=8, reverse_source=True,
    ),
}  # fmt: skip


def drawn(*sizes: int) -> list[Batch]:
    """Batches of so many random pairs, and last one of all of them."""
    draw = random.Random(1)

    def ids() -> list[int]:
        return [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, 9))]

    pairs = TokenPairs.of([(ids(), ids()) for _ in range(sum(sizes))], SPECIAL)
    parts = [*torch.arange(sum(sizes)).split(list(sizes)), torch.arange(sum(sizes))]
    return [collate(pairs, index, SPECIAL) for index in parts]


def learner(
    kind: str = "attention", dropout: float = 0.0, processes: Processes = Processes(),
    **options: Any,
) -> Learner:  # fmt: skip
    torch.manual_seed(1)
    chosen = {"precision": "fp32", "clip_norm": 1e6, "optimizer": "sgd", **options}
    model = dataclasses.replace(MODELS[kind], dropout=dropout)
    return Learner(Network(model, VOCABULARY, VOCABULARY), TrainingOptions(**chosen), processes)


def weights(of: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in of.parameters]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.stack([(x - y).norm() for x, y in zip(a, b)]).norm())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("per", ["token", "sentence"])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "r_drop": 2.0}])
def test_accumulated_batches_are_one_batch(kind: str, per: str, more: dict[str, float]) -> None:
    *parts, whole = drawn(3, 9, 1)
    one, other = (learner(kind, loss_per=per, **more) for _ in range(2))
    before = weights(one)
    given = [one.update(parts, 0, 0.5), other.update([whole], 0, 0.5)]
    assert given[0] == pytest.approx(given[1], rel=1e-5)
    moved = distance(weights(one), before)
    assert moved == pytest.approx(0.5 * given[0]["norm"], rel=1e-4)
    assert distance(weights(one), weights(other)) < 1e-5 * moved


def test_an_update_tells_what_it_cost() -> None:
    *parts, whole = drawn(3, 9)
    one = learner(label_smoothing=0.1)
    with torch.no_grad():
        smoothed, alone = map(float, batch_loss(one.network.train(), whole, 0.1))
    assert one.update(parts, 0, 0.1) == {
        "loss": pytest.approx(smoothed, rel=1e-5),
        "surprise": pytest.approx(alone, rel=1e-5),
        "tokens": int(whole.target_lengths.sum()),
        "source_tokens": int(whole.source_lengths.sum()),
        "norm": pytest.approx(1, rel=10),
    }


@pytest.mark.parametrize("r_drop", [0.0, 1.0])
def test_the_loss_is_per_token_or_per_sentence(r_drop: float) -> None:
    [batch, _] = drawn(7)
    loss, _ = batch_loss((one := learner(r_drop=r_drop)).network.train(), batch)
    gradients = torch.autograd.grad(loss, one.parameters)
    whole = float(torch.stack([g.norm() for g in gradients]).norm())
    for per, count in (("token", int(batch.target_lengths.sum())), ("sentence", 7)):
        norm = learner(loss_per=per, r_drop=r_drop).update([batch], 0, 0.0)["norm"]
        assert norm == pytest.approx(whole / count, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_the_gradient_is_scaled_down_only_where_it_is_larger(kind: str, clip_norm: float) -> None:
    [batch, _] = drawn(9)
    one = learner(kind, clip_norm=clip_norm)
    before = weights(one)
    norm = one.update([batch], 0, 1.0)["norm"]
    assert distance(weights(one), before) == pytest.approx(min(norm, clip_norm), rel=1e-2)
    assert 1e-3 < norm < 1e6


def test_masks_depend_on_step_and_process_alone() -> None:
    [batch, _] = drawn(9)

    def after(step: int, rank: int = 0, drawn_before: int = 0) -> list[Tensor]:
        # Processes(rank, 1): alone, but for its number
        one = learner(dropout=0.5, processes=Processes(rank, 1))
        torch.manual_seed(drawn_before)
        one.update([batch], step, 0.1)
        return weights(one)

    assert distance(after(3), after(3, drawn_before=9)) == 0
    assert distance(after(3), after(4)) > 0
    assert distance(after(3), after(3, rank=1)) > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_without_a_number_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    [batch, _] = drawn(5)
    one = learner(optimizer="adam", average=0.9)
    one.update([batch], 0, 0.1)
    before = weights(one), [a.clone() for a in one.average], str(one.optimizer.state_dict())

    def spoilt(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, surprise = batch_loss(*arguments)
        if where == "loss":
            return loss * float("nan"), surprise
        # sqrt has no slope at 0: 0 of loss, and no number of a gradient
        return loss + (loss * 0).sqrt(), surprise

    monkeypatch.setattr(training.learner, "batch_loss", spoilt)
    with pytest.raises(NotFinite, match=r"the loss is .* and the gradient's norm nan") as caught:
        one.update([batch], 1, 0.1)
    assert caught.value.batches == ([0] if where == "loss" else [])
    after = weights(one), list(one.average), str(one.optimizer.state_dict())
    assert_equal(list(after), list(before))


# Precision


@pytest.mark.parametrize(
    ("asked", "able", "expected"),
    [
        ("auto", True, torch.bfloat16), ("auto", False, torch.float32),
        ("bf16", False, torch.bfloat16), ("fp32", True, torch.float32),
    ],
)  # fmt: skip
def test_precision_is_what_pays_or_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, asked: Any, able: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    options = TrainingOptions(precision=asked)
    with torch.device("meta"):
        large = Network(ModelOptions(embedding_size=256), 4000, 4000)
        small = Network(ModelOptions(encoder_hidden_size=16, decoder_hidden_size=16), 300, 300)
    for device in ("cpu", "cuda"):
        assert precision(options, torch.device(device), large) == expected
    assert precision(options, torch.device("cuda"), small) == expected
    on_cpu = torch.float32 if asked == "auto" else expected
    assert precision(options, torch.device("cpu"), small) == on_cpu


@pytest.mark.parametrize(("asked", "expected"), [("bf16", torch.bfloat16), ("fp32", None)])
def test_products_are_in_that_precision_and_weights_are_not(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: torch.dtype | None
) -> None:
    seen = []

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        on = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if on else None)
        return batch_loss(*arguments)

    monkeypatch.setattr(training.learner, "batch_loss", watched)
    [batch, _] = drawn(9)
    one, exact = learner(precision=asked), learner()
    one.update([batch], 0, 0.1)
    assert seen == [expected]
    assert {p.dtype for p in one.parameters} == {torch.float32}
    exact.update([batch], 0, 0.1)
    assert (distance(weights(one), weights(exact)) > 0) == (expected is not None)
    assert distance(weights(one), weights(exact)) < 0.1


# The average


def test_the_average_by_hand() -> None:
    [batch, _] = drawn(9)
    one = learner(average=0.2)
    expected = [w.double() for w in weights(one)]
    for step, decay in enumerate((1 / 10, 2 / 11, 0.2)):  # (1 + t) / (10 + t), at most 0.2
        one.update([batch], step, 0.5)
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights(one))]
        assert distance(expected, one.average) < 1e-6
        assert distance(one.average, weights(one)) > 1e-3
    assert learner().average == []


def test_the_average_is_lent_and_taken_back() -> None:
    [batch, _] = drawn(9)
    one = learner(average=0.9)
    one.update([batch], 5, 0.5)
    learnt = weights(one)
    with suppress(ZeroDivisionError), one.averaged():
        assert_equal(weights(one), one.average)
        raise ZeroDivisionError
    assert_equal(weights(one), learnt)
    assert distance(one.average, learnt) > 0


def test_the_average_is_validated_and_kept_as_the_best(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.of_kind("everything").trainer()
    validated = []

    def watched(network: Network, _: Any) -> float:
        validated.append([p.detach().clone() for p in network.parameters()])
        return 10.0 / len(validated)

    monkeypatch.setattr(training.train, "perplexity", watched)
    trainer.train()
    assert len(validated) == 3  # at steps 9, 18 and the last
    network = Network(trainer.recipe.model, trainer.source.size, trainer.target.size)
    held = checkpoint.load(tiny.run.best)
    checkpoint.weights(held, network)
    assert_equal([p.detach() for p in network.parameters()], validated[-1])
    network.load_state_dict(held["network"])
    raw = [p.detach() for p in network.parameters()]
    assert_equal(raw, weights(trainer.learner))  # it went on from these
    assert distance(raw, validated[-1]) > 1e-3


# The loss


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_losses_by_hand(kind: str) -> None:
    [batch, _] = drawn(9)
    network = learner(kind).network.eval()
    network.generator.weight.mul_(50)  # far from uniform, so that smoothing shows
    alone, spread = 0.0, 0.0
    for source, s, target, wanted, t in zip(*batch):
        logits = network(
            source[:s].unsqueeze(0), s.unsqueeze(0), target[:t].unsqueeze(0), t.unsqueeze(0)
        )
        log_p = torch.log_softmax(logits[0].double(), 1)
        for j, token in enumerate(wanted[:t].tolist()):
            alone -= float(log_p[j, token])
            spread -= float(log_p[j].mean())
    assert [float(one) for one in batch_loss(network, batch)] == pytest.approx(
        [alone, alone], rel=1e-5
    )
    smoothed = 0.9 * alone + 0.1 * spread
    assert smoothed != pytest.approx(alone, rel=1e-3)
    assert [float(one) for one in batch_loss(network, batch, 0.1)] == pytest.approx(
        [smoothed, alone], rel=1e-5
    )
