"""The loss that is made chunk by chunk against torch's own, and R-Drop's two runs of a batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import training.loss
from model import ModelOptions, Network
from training.batches import Batch
from training.loss import GeneratorLoss, batch_loss

WIDTH = 5
MIXES = [  # label smoothing, r of R-Drop, whether tokens are in pairs
    (0.0, 0.0, False), (0.1, 0.0, False), (0.0, 2.0, True), (0.3, 0.7, True), (0.3, 0.0, True),
]  # fmt: skip
each_mix = pytest.mark.parametrize(("smoothing", "consistency", "pairs"), MIXES)


def drawn(tokens: int, vocabulary: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Features, weight and bias, far from a uniform softmax; targets. Of pairs, one target."""
    torch.manual_seed(seed)
    shapes = ((tokens, WIDTH), (vocabulary, WIDTH), (vocabulary,))
    given = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    half = torch.randint(0, vocabulary, (-(-tokens // 2),))
    return given, torch.cat([half, half])[:tokens]


def reference(
    features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, smoothing: float,
    consistency: float, pairs: bool,
) -> Tensor:  # fmt: skip
    logits = features @ weight.t() + bias
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    if pairs:
        one, other = functional.log_softmax(logits, 1).chunk(2)
        both = [
            functional.kl_div(a, b, reduction="sum", log_target=True)
            for a, b in ((one, other), (other, one))
        ]
        loss = loss + consistency / 2 * (both[0] + both[1])
    return loss


def compare(given: list[Tensor], targets: Tensor, mix: tuple[float, float, bool]) -> None:
    loss, surprise = GeneratorLoss.apply(*given, targets, *mix)
    wanted = reference(*given, targets, *mix)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        surprise, reference(*given, targets, 0.0, 0.0, False).detach(), rtol=1e-10, atol=1e-10
    )
    pair = (torch.autograd.grad(one, given) for one in (loss, wanted))
    for one, other in zip(*pair):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@each_mix
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 10**6])
def test_it_is_torchs_own_whatever_is_made_at_a_time(
    monkeypatch: pytest.MonkeyPatch, rows: int, smoothing: float, consistency: float, pairs: bool
) -> None:
    monkeypatch.setattr(training.loss, "chunk_rows", lambda *_: rows)
    compare(*drawn(14, 11), (smoothing, consistency, pairs))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_come_in_whole_blocks_of_which_there_is_one_at_least(device: str) -> None:
    for vocabulary in (1, 300, 8000, 160_000, 10**9):
        rows = training.loss.chunk_rows(vocabulary, device)
        most = training.loss.CHUNK_LOGITS[device]
        assert rows % 128 == 0
        assert rows == 128 or most - 128 * vocabulary < rows * vocabulary <= most


@pytest.mark.parametrize("rows", [100, 200, 300, 10**6])
@pytest.mark.parametrize("pairs", [False, True])
def test_more_rows_than_a_block(monkeypatch: pytest.MonkeyPatch, rows: int, pairs: bool) -> None:
    monkeypatch.setattr(training.loss, "chunk_rows", lambda *_: rows)
    compare(*drawn(618, 7), (0.1, 1.0 if pairs else 0.0, pairs))


@settings(max_examples=40)
@given(tokens=st.integers(0, 20), vocabulary=st.integers(2, 9), chunk=st.integers(1, 60),
       seed=st.integers(0, 99), mix=st.sampled_from(MIXES))
def test_of_any_size(
    tokens: int, vocabulary: int, chunk: int, seed: int, mix: tuple[float, float, bool]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loss, "chunk_rows", lambda *_: chunk)
        compare(*drawn(2 * tokens if mix[2] else tokens, vocabulary, seed), mix)


@each_mix
def test_its_gradient_is_that_of_its_value(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, consistency: float, pairs: bool
) -> None:
    monkeypatch.setattr(training.loss, "chunk_rows", lambda *_: 3)
    given, targets = drawn(6, 4)

    def loss(*given: Tensor) -> Tensor:
        return GeneratorLoss.apply(*given, targets, smoothing, consistency, pairs)[0]

    assert torch.autograd.gradcheck(loss, given)


def test_gradients_are_scaled_by_what_comes_after() -> None:
    given, targets = drawn(8, 6)
    plain, scaled = (
        torch.autograd.grad(factor * GeneratorLoss.apply(*given, targets, 0.1, 1.0, True)[0], given)
        for factor in (1.0, -0.25)
    )
    for one, other in zip(plain, scaled):
        torch.testing.assert_close(-0.25 * one, other)


@pytest.mark.parametrize("which", range(3))
def test_what_does_not_learn_gets_no_gradient(which: int) -> None:
    given, targets = drawn(8, 6)
    whole = torch.autograd.grad(reference(*given, targets, 0.1, 0.0, False), given)
    for i, one in enumerate(given):
        one.requires_grad_(i == which)
    loss, _ = GeneratorLoss.apply(*given, targets, 0.1, 0.0, False)
    loss.backward()
    for i, one in enumerate(given):
        if i == which:
            torch.testing.assert_close(one.grad, whole[i])
        else:
            assert one.grad is None


def test_the_sum_of_surprises_has_no_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        given, targets = drawn(8, 6)
        learnt = [one.detach().to(dtype).requires_grad_() for one in given]
        loss, surprise = GeneratorLoss.apply(*learnt, targets, 0.1, 1.0, True)
        assert loss.requires_grad
        assert not surprise.requires_grad
        assert loss.dtype == surprise.dtype == dtype


@each_mix
@pytest.mark.parametrize("rows", [50, 400])
def test_half_precision_is_close_to_single_precision(
    monkeypatch: pytest.MonkeyPatch, rows: int, smoothing: float, consistency: float, pairs: bool
) -> None:
    monkeypatch.setattr(training.loss, "chunk_rows", lambda *_: rows)
    given, targets = drawn(218, 31)
    single = [one.detach().float().requires_grad_() for one in given]
    results = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, half):
            outputs = GeneratorLoss.apply(*single, targets, smoothing, consistency, pairs)
        gradients = torch.autograd.grad(outputs[0], single)
        results.append([one.detach() for one in (*outputs, *gradients)])
    for exact, half_ in zip(*results):
        assert half_.dtype == torch.float32
        assert float((exact - half_).norm() / exact.norm()) < 0.02  # products have 8 bits: 0.4 %


# Of a network and a batch

VOCABULARY = 13
SIZES: dict[str, Any] = {
    "embedding_size": 6, "encoder_hidden_size": 4, "decoder_hidden_size": 7, "attention_size": 6,
}  # fmt: skip


def network(**changed: Any) -> Network:
    torch.manual_seed(0)
    made = Network(ModelOptions(**{**SIZES, **changed}), VOCABULARY, VOCABULARY).double()
    for parameter in made.parameters():
        parameter.data.mul_(2)
    return made.train()


def batch(padding: int = 0) -> Batch:
    source = torch.tensor([[4, 5, 6, 7, 3], [8, 3, 0, 0, 0], [9, 9, 5, 3, 0]])
    before = torch.tensor([[2, 6, 5], [2, 8, 0], [2, 7, 11]])
    after = torch.tensor([[6, 5, 3], [8, 3, 0], [7, 11, 3]])
    source, before, after = (functional.pad(one, (0, padding)) for one in (source, before, after))
    return Batch(source, torch.tensor([5, 2, 4]), before, after, torch.tensor([3, 2, 3]))


def gradients(network: Network, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def close(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.allclose(one, other) for one, other in zip(ones, others))


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_padding_is_not_counted(consistency: float) -> None:
    one = network()
    losses = [batch_loss(one, batch(padding), 0.1, consistency) for padding in (0, 4)]
    for tight, wide in zip(*losses):
        torch.testing.assert_close(tight, wide)
    assert close(*(gradients(one, loss) for loss, _ in losses))
    real = batch().target_out != 0
    log_p = torch.log_softmax(one(*(batch()[i] for i in (0, 1, 2, 4))), 2).detach()
    expected = -log_p.gather(2, batch().target_out.unsqueeze(2)).squeeze(2)[real].sum()
    torch.testing.assert_close(losses[0][1], (2 if consistency else 1) * expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_dropout_r_drop_is_the_loss_twice(smoothing: float) -> None:
    one = network()
    plain, twice = (batch_loss(one, batch(), smoothing, r) for r in (0.0, 5.0))
    for single, double in zip(plain, twice):
        torch.testing.assert_close(2 * single, double)
    assert close([2 * g for g in gradients(one, plain[0])], gradients(one, twice[0]))


@pytest.mark.parametrize(
    "rates",
    [{"dropout": 0.4}, {"dropout": 0.4, "variational_dropout": True}, {"embedding_dropout": 0.4},
     {"output_dropout": 0.4}, {"word_dropout": 0.4}],
    ids=lambda rates: ", ".join(rates),
)  # fmt: skip
def test_r_drop_runs_the_batch_under_two_masks_which_it_holds_together(
    rates: dict[str, Any],
) -> None:
    """Of one seed, the loss is plain loss + r * divergence, and the divergence is above 0."""
    one = network(**rates)

    def loss(r: float) -> float:
        torch.manual_seed(3)
        return float(batch_loss(one, batch(), 0.1, r)[0].detach())

    divergence = loss(1.0) - loss(1e-12)
    assert divergence > 1e-3
    assert loss(3.0) - loss(1e-12) == pytest.approx(3 * divergence)
    torch.manual_seed(3)
    features = one.features(
        *(torch.cat([batch()[i]] * 2) for i in (0, 1, 2, 4))
    )  # the same masks, seen from outside
    real = torch.cat([batch().target_out] * 2)
    expected = reference(
        features[real != 0], one.generator.weight, one.generator.bias, real[real != 0], 0.1, 1.0,
        True,
    )
    assert loss(1.0) == pytest.approx(float(expected.detach()))


class Shapes(TorchDispatchMode):
    """Watches the products that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.products.append(tuple(made.shape))
        return made


@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_where_nothing_learns_no_gradient_is_made(consistency: float) -> None:
    one = network().eval()
    size = tuple(one.generator.weight.shape)
    values = []
    for mode, learns in ((torch.enable_grad, True), (torch.no_grad, False),
                         (torch.inference_mode, False)):  # fmt: skip
        with Shapes() as seen, mode():
            loss, surprise = batch_loss(one, batch(), 0.1, consistency)
        assert loss.requires_grad == learns
        assert (size in seen.products) == learns
        values.append((float(loss.detach()), float(surprise)))
    assert values[0] == values[1] == values[2]
