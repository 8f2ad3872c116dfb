"""The LSTM that learns on a CPU against `nn.LSTM`, and stacks against their formulas."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from model.lstm import LSTMStack
from model.recurrence import Recurrence, spans

LENGTHS = [3, 7, 1, 7, 4]  # as they come: not sorted
PLAIN: dict[str, Any] = {
    "bidirectional": False, "dropout": 0.0, "variational": False, "recurrent_dropout": 0.0,
    "residual": False, "layer_norm": False,
}  # fmt: skip
HALF_TOLERANCE = 0.01  # of a norm: numbers of 8 bits, off by 0.4 % each, and sums of them


def stack(inputs: int, hidden: int, layers: int, seed: int = 0, **changed: Any) -> LSTMStack:
    torch.manual_seed(seed)
    made = LSTMStack(inputs, hidden, layers, **{**PLAIN, **changed})
    for parameter in made.parameters():  # far from zero, so that gates differ
        nn.init.normal_(parameter, std=0.7)
    return made.double()


def packed(lengths: list[int], inputs: int, seed: int = 1) -> PackedSequence:
    torch.manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), inputs, dtype=torch.double)
    x.requires_grad_()
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)


def first_states(rows: int, sequences: int, hidden: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [
        torch.randn(rows, sequences, hidden, dtype=torch.double, requires_grad=True)
        for _ in range(2)
    ]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of one sum of all outputs, each number of them with a weight of its own."""
    total = sum((y * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)).sum() for y in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs))


def everything(
    model: nn.Module, read: PackedSequence, first: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and last states of a stack or an `nn.LSTM`; gradients of all that goes in."""
    if isinstance(model, nn.LSTM):
        output, (h, c) = model(read, tuple(first) if first else None)
    else:
        output, h, c = model(read, *(first or (None, None)))
    padded, lengths = pad_packed_sequence(output, batch_first=True)
    assert sorted(lengths.tolist()) == sorted(LENGTHS)
    outputs = [padded, h, c]
    return outputs, gradients(outputs, [read.data, *first, *model.parameters()])


# Recurrence


@pytest.mark.parametrize("backwards", [False, True])
def test_its_gradient_is_that_of_its_formula(backwards: bool) -> None:
    torch.manual_seed(0)
    sizes, inputs, hidden = [4, 3, 3, 1], 3, 2
    x, w_ih, w_hh, bias, h0, c0 = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True)
        for shape in (
            (sum(sizes), inputs), (4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,),
            (sizes[0], hidden), (sizes[0], hidden),
        )
    )  # fmt: skip

    def outputs(x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, h0: Tensor, c0: Tensor) -> Any:
        return Recurrence.apply(x, sizes, w_ih, w_hh, bias, h0, c0, backwards)

    assert torch.autograd.gradcheck(outputs, (x, w_ih, w_hh, bias, h0, c0))


def test_what_it_is_given_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    given = [torch.randn(*shape) for shape in ((5, 3), (8, 3), (8, 2), (8,), (3, 2), (3, 2))]
    for one in given:
        one.requires_grad_()
    x, w_ih, w_hh, bias, h0, c0 = given
    before = [one.detach().clone() for one in given]
    outputs = Recurrence.apply(x, [3, 2], w_ih, w_hh, bias, h0, c0, False)
    kept = [one.detach().clone() for one in outputs]
    upstream = [torch.ones_like(one) for one in outputs]
    torch.autograd.backward(outputs, upstream)
    kept += [torch.ones_like(one) for one in upstream]
    for now, then in zip([*given, *outputs, *upstream], [*before, *kept]):
        assert torch.equal(now, then)


def test_steps_of_packed_sequences() -> None:
    assert spans([3, 2, 2], False) == [(0, 3), (3, 5), (5, 7)]
    assert spans([3, 2, 2], True) == [(5, 7), (3, 5), (0, 3)]


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from given states"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_plain_stack_learns_as_the_fused_lstm_does(
    layers: int, bidirectional: bool, given: bool
) -> None:
    model = stack(4, 3, layers, bidirectional=bidirectional).train()
    (reference,) = model.calls
    rows = layers * (2 if bidirectional else 1)
    first = first_states(rows, len(LENGTHS), 3) if given else []
    got, wanted = (everything(one, packed(LENGTHS, 4), first) for one in (model, reference))
    for one, other in zip(itertools.chain(*got), itertools.chain(*wanted)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_half_precision_is_close_to_single_precision(bidirectional: bool) -> None:
    """More sequences than a block of a step, more rows than a block of them all."""
    lengths = [1 + i % 13 for i in range(37)]
    model = stack(24, 16, 2, bidirectional=bidirectional).float().train()
    for parameter in model.parameters():  # of the size that learning begins with
        parameter.data.mul_(0.3)
    read = packed(lengths, 24)
    first = [one.float() for one in first_states(4 if bidirectional else 2, len(lengths), 16)]
    results = []
    for half in (False, True):
        data = read.data.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, half):
            output, h, c = model(
                PackedSequence(data, read.batch_sizes, read.sorted_indices, read.unsorted_indices),
                *first,
            )
        outputs = [output.data, h, c]
        results.append(outputs + gradients(outputs, [data, *model.parameters()]))
    for single, half_ in zip(*results):
        assert half_.dtype == torch.float32
        apart = float(((single - half_).norm() / single.norm()).detach())
        assert 0 < apart < HALF_TOLERANCE


# Stacks


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_dropout_learning_and_evaluation_and_script_are_one(
    bidirectional: bool, residual: bool, variational: bool, layer_norm: bool
) -> None:
    hidden = 2 if bidirectional else 4  # outputs as wide as inputs: residual at all layers
    model = stack(
        4, hidden, 3, bidirectional=bidirectional, residual=residual, variational=variational,
        layer_norm=layer_norm,
    )  # fmt: skip
    script = torch.jit.script(model)
    for first in ([], first_states(6 if bidirectional else 3, len(LENGTHS), hidden)):
        learning = everything(model.train(), packed(LENGTHS, 4), first)
        evaluated = everything(model.eval(), packed(LENGTHS, 4), first)
        scripted = everything(script.eval(), packed(LENGTHS, 4), first)
        for one, other, third in zip(*(a + b for a, b in (learning, evaluated, scripted))):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(other, third)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_between_layers_by_its_formula(
    residual: bool, layer_norm: bool, learning: bool
) -> None:
    """y_l = norm(LSTM(y_{l-1}) + y_{l-1}), without the sum where the widths differ."""
    model = stack(3, 5, 3, residual=residual, layer_norm=layer_norm).train(learning)
    read = packed(LENGTHS, 3)
    padded, _ = pad_packed_sequence(read, batch_first=True)
    output, h, c = model(read, None, None)
    got, _ = pad_packed_sequence(output, batch_first=True)
    for row, length in enumerate(LENGTHS):
        x = padded[row, :length].detach()  # a sequence alone, [steps, 3]
        layer = 0
        for lstm, after in zip(model.calls, model.after):
            assert isinstance(lstm, nn.LSTM)
            y, (h_last, c_last) = lstm(x)
            count = lstm.num_layers
            torch.testing.assert_close(h[layer : layer + count, row], h_last)
            torch.testing.assert_close(c[layer : layer + count, row], c_last)
            layer += count
            if residual and y.shape == x.shape:
                y = y + x
            if layer_norm:
                normed = (y - y.mean(1, keepdim=True)) / (
                    y.var(1, unbiased=False, keepdim=True) + 1e-5
                ).sqrt()
                assert isinstance(after.norm, nn.LayerNorm)
                y = normed * after.norm.weight + after.norm.bias
            x = y
        torch.testing.assert_close(got[row, :length], x)
        assert (got[row, length:] == 0).all()


# Dropout of recurrent weights

P = 0.25


def masks() -> list[Tensor]:
    """All that can become of the four recurrent weights of a layer of one unit."""
    return [
        torch.tensor(kept, dtype=torch.double).view(4, 1) / (1 - P)
        for kept in itertools.product((0.0, 1.0), repeat=4)
    ]


def of_one_unit(lstm: nn.LSTM, mask: Tensor, suffix: str, read: PackedSequence) -> Tensor:
    """Outputs [P] of one direction, its recurrent weights times `mask`."""
    weights = [getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "bias_ih", "bias_hh")]
    recurrent = getattr(lstm, f"weight_hh_l0{suffix}") * mask
    return Recurrence.apply(
        read.data, read.batch_sizes.tolist(), weights[0], recurrent, weights[1] + weights[2],
        *torch.zeros(2, len(LENGTHS), 1, dtype=torch.double), suffix != "",
    )[0][:, 0]  # fmt: skip


def test_one_mask_an_update_falls_on_the_recurrent_weights() -> None:
    """All steps of all sequences must agree with one of the 16 masks of each direction, whose
    weights are then kept with probability 1 - p and divided by it."""
    model = stack(2, 1, 1, bidirectional=True, recurrent_dropout=P).train()
    (lstm,) = model.calls
    assert isinstance(lstm, nn.LSTM)
    read = packed(LENGTHS, 2)
    candidates = masks()
    possible = {s: [of_one_unit(lstm, m, s, read) for m in candidates] for s in ("", "_reverse")}
    found: list[list[int]] = []
    for seed in range(60):
        torch.manual_seed(seed)
        output, _, _ = model(read, None, None)
        found.append([])
        for direction, outputs in enumerate(possible.values()):
            (which,) = (
                i for i, one in enumerate(outputs)
                if torch.allclose(output.data[:, direction], one, rtol=1e-9, atol=1e-11)
            )  # fmt: skip
            found[-1].append(which)
    assert len({tuple(one) for one in found}) > 20  # another at every update
    assert any(one != other for one, other in found)  # and for either direction
    drawn = torch.stack([candidates[i] for one in found for i in one]).flatten()
    assert abs(float(drawn.mean()) - 1) < 3 * math.sqrt(P / (1 - P) / drawn.numel())


def test_gradients_pass_where_recurrent_weights_were_kept() -> None:
    model = stack(2, 1, 1, recurrent_dropout=P).train()
    (lstm,) = model.calls
    assert isinstance(lstm, nn.LSTM)
    read = packed(LENGTHS, 2)
    for seed in range(5):
        torch.manual_seed(seed)
        output, _, _ = model(read, None, None)
        mask = next(
            m for m in masks() if torch.allclose(output.data[:, 0], of_one_unit(lstm, m, "", read))
        )
        inputs = list(model.parameters())
        got = gradients([output.data[:, 0]], inputs)
        wanted = gradients([of_one_unit(lstm, mask, "", read)], inputs)
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one, other)
        assert torch.equal(got[1] == 0, mask == 0)  # weight_hh


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_of_recurrent_weights_leaves_the_others(
    bidirectional: bool, variational: bool
) -> None:
    """Nothing recurs where sequences have one step; and nothing is dropped in evaluation."""
    more = {"bidirectional": bidirectional, "variational": variational}
    plain, model = stack(3, 4, 2, **more).eval(), stack(3, 4, 2, **more, recurrent_dropout=0.5)
    one_step, longer = packed([1] * 5, 3), packed(LENGTHS, 3)

    def outputs(one: LSTMStack, read: PackedSequence) -> Tensor:
        return one(read, None, None)[0].data

    torch.testing.assert_close(outputs(model.train(), one_step), outputs(plain, one_step))
    assert not torch.allclose(outputs(model, longer), outputs(plain, longer))
    assert torch.equal(outputs(model.eval(), longer), outputs(plain, longer))
    script = torch.jit.script(model)
    torch.testing.assert_close(outputs(script, longer), outputs(plain, longer))
