"""Attention of every form: by hand, head by head, and whatever is beside a sentence."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import KINDS, VOCABULARY, build, paid, read, sentences, serving
from torch import Tensor

from model import Network, ServingModel
from model.network import Attention, attend
from model.serving import scripted

FORMS = [(form, heads) for form in ("dot", "additive") for heads in (1, 2, 4)]
each_form = pytest.mark.parametrize(("form", "heads"), FORMS)
N, K, S, A = 3, 2, 5, 8
LENGTHS = torch.tensor([5, 2, 4])
MASK = torch.arange(S) < LENGTHS.unsqueeze(1)


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [2 * torch.randn(*shape, dtype=torch.double) for shape in shapes]


def case(form: str, heads: int) -> list[Any]:
    """Arguments of `attend`."""
    query, keys, values, score = drawn((N, K, A), (N, S, A), (N, S, A), (heads, A // heads))
    return [query, keys, values, MASK, heads, score if form == "additive" else None]


def model_of(form: str, heads: int) -> tuple[Network, ServingModel]:
    return serving(
        "attention", attention=form, attention_heads=heads, attention_size=A, decoder_layers=2
    )


def by_hand(weights: list[float], values: Tensor) -> list[float]:
    return [float(sum(w * v for w, v in zip(weights, column))) for column in values.t()]


def test_dot_attention_by_hand() -> None:
    """Scores log 1, log 2 and log 3, which become 1/6, 2/6 and 3/6; without the third, 1/3 and
    2/3."""
    query = torch.tensor([[[2.0, 1.0]]])
    logs = torch.tensor([1.0, 2.0, 3.0]).log()
    keys = torch.stack([logs - 0.5, 1 - logs], 1).unsqueeze(0)  # 2 (l - 1/2) + (1 - l) = l
    values = torch.tensor([[[6.0, 0.0], [0.0, 6.0], [12.0, 12.0]]])
    for mask, expected in (
        ([True, True, True], [1 / 6, 2 / 6, 3 / 6]), ([True, True, False], [1 / 3, 2 / 3, 0.0])
    ):  # fmt: skip
        context, weights = attend(query, keys, values, torch.tensor([mask]), 1, None)
        assert weights.flatten().tolist() == pytest.approx(expected, rel=1e-6)
        assert context.flatten().tolist() == pytest.approx(by_hand(expected, values[0]), rel=1e-6)


def test_additive_attention_by_hand() -> None:
    """v . tanh(q + k) = (log 4) tanh(0.3 + k), which is 0 and log 2: weights 1/3 and 2/3."""
    query, v = torch.tensor([[[0.3, 7.0]]]), torch.tensor([[math.log(4), 0.0]])
    keys = torch.tensor([[[-0.3, 5.0], [math.atanh(0.5) - 0.3, -9.0]]])
    values = torch.tensor([[[3.0, 0.0], [0.0, 6.0]]])
    context, weights = attend(query, keys, values, torch.tensor([[True, True]]), 1, v)
    assert weights.flatten().tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-6)
    assert context.flatten().tolist() == pytest.approx([1.0, 4.0], rel=1e-6)


@each_form
def test_heads_are_attentions_side_by_side(form: str, heads: int) -> None:
    query, keys, values, mask, _, score = arguments = case(form, heads)
    context, weights = attend(*arguments)
    size = A // heads
    contexts, shares = torch.zeros(N, K, A).double(), torch.zeros(N, K, S).double()
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        for n in range(N):
            for k in range(K):
                q, at = query[n, k, own], keys[n, :, own]
                scores = at @ q if score is None else torch.tanh(q + at) @ score[head]
                paid_to = scores[mask[n]].softmax(0)
                contexts[n, k, own] = paid_to @ values[n, mask[n]][:, own]
                shares[n, k, mask[n]] += paid_to / heads
    torch.testing.assert_close(context, contexts)
    torch.testing.assert_close(weights, shares)


@each_form
def test_weights_are_shares_of_the_source_without_its_padding(form: str, heads: int) -> None:
    _, weights = attend(*case(form, heads))
    torch.testing.assert_close(weights.sum(2), torch.ones(N, K, dtype=torch.double))
    padding = ~MASK.unsqueeze(1).expand(N, K, S)
    assert (weights[padding] == 0).all()
    assert (weights[~padding] > 0).all()


@each_form
def test_the_gradient_is_that_of_the_formula_and_none_reaches_padding(
    form: str, heads: int
) -> None:
    query, keys, values, mask, _, score = case(form, heads)
    given = [query, keys, values, *([] if score is None else [score])]
    for one in given:
        one.requires_grad_()

    def context(query: Tensor, keys: Tensor, values: Tensor, score: Tensor | None = None) -> Tensor:
        return attend(query, keys, values, mask, heads, score)[0]

    assert torch.autograd.gradcheck(context, given)
    _, d_keys, d_values, *_ = torch.autograd.grad(context(*given).sum(), given)
    assert (d_keys[~mask] == 0).all()
    assert (d_values[~mask] == 0).all()


@each_form
def test_the_readout_reads_state_and_context(form: str, heads: int) -> None:
    """tanh(W [h; context] + b), scores of dot attention being divided by sqrt(A / heads)."""
    attention = model_of(form, heads)[0].attention
    assert isinstance(attention, Attention)
    width = attention.query.in_features
    h, keys, values = drawn((N, K, width), (N, S, A), (N, S, A))
    query = h @ attention.query.weight.t()
    if form == "dot":
        query = query / math.sqrt(A / heads)
    context, _ = attend(query, keys, values, MASK, heads, attention.score)
    read = torch.cat([h, context], 2) @ attention.readout.weight.t() + attention.readout.bias
    torch.testing.assert_close(attention(h, keys, values, MASK), torch.tanh(read))


# Whole models


@each_form
@settings(max_examples=10)
@given(seed=st.integers(0, 999), n=st.integers(1, 5), longest=st.integers(1, 9))
def test_steps_equal_teacher_forcing(
    form: str, heads: int, seed: int, n: int, longest: int
) -> None:
    network, model = model_of(form, heads)
    source, source_lengths = sentences(seed, n, longest)
    target, target_lengths = sentences(seed + 1, n, longest)
    with torch.inference_mode():
        whole = network(source, source_lengths, target, target_lengths)
        steps, _ = read(model, source, source_lengths, target.t().unsqueeze(2))
    for i, length in enumerate(target_lengths):
        torch.testing.assert_close(whole[i, :length], steps[:length, i, 0])


@each_form
def test_eager_equals_scripted(form: str, heads: int) -> None:
    eager = model_of(form, heads)[1]
    source, lengths = sentences(1, 4, 7)
    choices = torch.randint(4, VOCABULARY, (3, 4, 2))
    for one, other in zip(*(read(m, source, lengths, choices) for m in (eager, scripted(eager)))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_padding_and_the_order_of_sentences_change_nothing(name: str, learning: bool) -> None:
    rates = {"dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0}
    network = serving(name, **rates, word_dropout=0.0, recurrent_dropout=0.0)[0].train(learning)
    source, source_lengths = sentences(3, 6, 9)
    target, target_lengths = sentences(4, 6, 7)
    expected = network(source, source_lengths, target, target_lengths)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    wider = [torch.nn.functional.pad(one, (0, 3)) for one in (source, target)]
    moved = network(
        wider[0][order], source_lengths[order], wider[1][order], target_lengths[order]
    )
    for row, i in enumerate(order):
        t = int(target_lengths[i])
        torch.testing.assert_close(moved[row, :t], expected[i, :t])
        alone = network(
            source[i : i + 1, : source_lengths[i]], source_lengths[i : i + 1],
            target[i : i + 1, :t], target_lengths[i : i + 1],
        )  # fmt: skip
        torch.testing.assert_close(alone[0], expected[i, :t])


@each_form
@pytest.mark.parametrize("learning", [False, True])
def test_half_precision_is_close_to_single_precision(
    form: str, heads: int, learning: bool
) -> None:
    options = replace(
        KINDS["attention"], attention=form, attention_heads=heads, attention_size=A
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = Network(options, VOCABULARY, VOCABULARY).train(learning)
    source, lengths = sentences(1, 20, 9)
    with torch.no_grad():
        exact = network.features(source, lengths, source, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            half = network.features(source, lengths, source, lengths).float()
    real = source != 0
    apart = float((half - exact)[real].norm() / exact[real].norm())
    assert 0 < apart < 0.02  # products have 8 bits, that is 0.4 %, each


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["attention", "attention with every option"])
def test_attention_points_at_the_token_whichever_way_the_source_is_read(name, reverse):
    """Without memory in the encoder, each of its outputs knows one token only; so the one other
    token among equal ones is the one whose weight differs."""
    network, _ = serving(name, reverse_source=reverse)
    for parameter_name, parameter in network.encoder.stack.named_parameters():
        if "weight_hh" in parameter_name:
            parameter.data.zero_()
        elif "bias_ih" in parameter_name:
            parameter.data.chunk(4)[1].fill_(-1e3)  # the gate that would remember
    model = ServingModel(network, 50, 50)
    source, lengths = torch.full((4, 7), 5), torch.tensor([7, 7, 4, 6])
    other = [0, 5, 1, 3]
    for row, place in enumerate(other):
        source[row, place] = 9
        source[row, lengths[row] :] = 0
    weights = paid(model, source, lengths, torch.full((1, 4, 1), 2))[0, :, 0]
    for row, place in enumerate(other):
        rest = [i for i in range(int(lengths[row])) if i != place]
        torch.testing.assert_close(weights[row, rest], weights[row, rest[:1]].expand(len(rest)))
        assert not torch.isclose(weights[row, place], weights[row, rest[0]])


def test_an_ensembles_attention_is_the_mean_of_those_that_have_it():
    model = build("mixed ensemble")
    source, lengths = sentences(4, 3, 6)
    choices = torch.randint(4, VOCABULARY, (2, 3, 2))
    first, second = (paid(model.members[i], source, lengths, choices) for i in (0, 2))
    torch.testing.assert_close(paid(model, source, lengths, choices), (first + second) / 2)
