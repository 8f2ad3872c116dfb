"""Dropout: what one mask is of, how it is scaled, and where a network has it."""

import math
from typing import Any

import pytest
import torch
from test_model import RATES
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from model import ModelOptions, Network
from model.dropout import Dropout, WordDropout
from model.lstm import LSTMStack, repacked

P = 0.3
LENGTHS = [3, 9, 1, 9, 5]  # as they come: not sorted
SENTENCES, STEPS, WIDTH = len(LENGTHS), max(LENGTHS), 40


class Packed(nn.Module):
    """`Dropout.packed` as the forward of a module, padded again."""

    def __init__(self, p: float, variational: bool) -> None:
        super().__init__()
        self.dropout = Dropout(p, variational)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([3, 9, 1, 9, 5])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        data = self.dropout.packed(packed.data, packed.batch_sizes)
        return pad_packed_sequence(repacked(packed, data), batch_first=True)[0]


FORMS = {
    "elements": Dropout(P),
    "elements, packed": Packed(P, False),
    "sequences": Dropout(P, variational=True),
    "sequences, packed": Packed(P, True),
    "words": WordDropout(P),
}


def ones() -> Tensor:
    """[N, steps, X], what is dropped becoming 0; and 0 in the padding of what is packed."""
    return torch.ones(SENTENCES, STEPS, WIDTH)


def drawn(module: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return module(ones())


def share_kept(masks: Tensor) -> float:
    return float((masks > 0).float().mean())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_scaled_and_nothing_is_dropped_in_evaluation(form: str) -> None:
    module = FORMS[form].train()
    whole = torch.cat([drawn(module, seed) for seed in range(40)])
    real = torch.arange(STEPS) < torch.tensor(LENGTHS).unsqueeze(1) if "packed" in form else None
    seen = whole if real is None else whole.view(40, SENTENCES, STEPS, WIDTH)[:, real]
    kept = torch.tensor(1 / (1 - P))
    assert bool(((seen == 0) | torch.isclose(seen, kept)).all())
    # Masks that are independent: 40 times those of words, sequences or elements.
    masks = {"words": SENTENCES * STEPS, "sequences": SENTENCES * WIDTH}.get(form.split(",")[0])
    deviation = math.sqrt(P * (1 - P) / (40 * (masks or SENTENCES * WIDTH)))
    assert share_kept(seen) == pytest.approx(1 - P, abs=4 * deviation)
    evaluated = drawn(module.eval(), 0)
    assert torch.equal(evaluated, ones() if real is None else ones() * real.unsqueeze(2))


@pytest.mark.parametrize("form", FORMS)
def test_a_script_drops_only_where_it_learns(form: str) -> None:
    script = torch.jit.script(FORMS[form])
    for seed in range(4):  # a script is compiled anew at its second call
        for learning in (True, False):
            FORMS[form].train(learning)
            script.train(learning)
            same = torch.equal(drawn(script, seed), drawn(FORMS[form], seed))
            assert same != learning  # its draws are its own


@pytest.mark.parametrize("module", [Dropout(0.0), Dropout(0.0, True), WordDropout(0.0)])
def test_a_rate_of_zero_drops_nothing(module: nn.Module) -> None:
    module.train()
    assert torch.equal(drawn(module, 0), ones())
    if isinstance(module, Dropout):
        assert torch.equal(module.packed(ones()[0], torch.tensor([5, 4])), ones()[0])


@pytest.mark.parametrize("form", ["sequences", "sequences, packed"])
def test_a_variational_mask_is_one_for_all_steps_and_another_for_each_sequence(form: str) -> None:
    masks = drawn(FORMS[form].train(), 1)
    for row, length in enumerate(LENGTHS):
        length = length if "packed" in form else STEPS
        assert torch.equal(masks[row, :length], masks[row, :1].expand(length, -1))
    apart = [not torch.equal(masks[i, 0], masks[j, 0]) for i in range(5) for j in range(i)]
    assert all(apart)
    assert not torch.equal(masks, drawn(FORMS[form], 2))  # and at each update


@pytest.mark.parametrize("form", ["elements", "elements, packed"])
def test_without_it_every_step_has_its_own_mask(form: str) -> None:
    masks = drawn(FORMS[form].train(), 1)
    assert all(not torch.equal(masks[1, i], masks[1, j]) for i in range(9) for j in range(i))
    assert not torch.equal(masks[1], masks[3])


def test_words_are_dropped_whole() -> None:
    masks = drawn(FORMS["words"].train(), 1)
    assert torch.equal(masks, masks[:, :, :1].expand_as(masks))
    words = masks[:, :, 0]  # [N, steps]
    assert 0 < share_kept(words) < 1
    assert not torch.equal(words, words[:1].expand_as(words))  # of one sentence, not of a position
    assert not torch.equal(words, words[:, :1].expand_as(words))


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_passes_by_the_same_mask(form: str) -> None:
    x = ones().requires_grad_()
    torch.manual_seed(1)
    y = FORMS[form].train()(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())  # as x is 1 throughout


# Between layers


def of_layers(variational: bool, seed: int) -> tuple[Tensor, Tensor]:
    """What the second layer is given of the first one's outputs, and these, [N, steps, X]: the
    second is a residual connection alone."""
    torch.manual_seed(0)
    stack = LSTMStack(
        WIDTH, WIDTH, 2, bidirectional=False, dropout=P, variational=variational,
        recurrent_dropout=0.0, residual=True, layer_norm=False,
    )  # fmt: skip
    for parameter in stack.calls[1].parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(SENTENCES, STEPS, WIDTH)
    read = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)

    def padded(learning: bool) -> Tensor:
        output: PackedSequence = stack.train(learning)(read, None, None)[0]
        return pad_packed_sequence(output, batch_first=True)[0].detach()

    torch.manual_seed(seed)
    return padded(True), padded(False)


@pytest.mark.parametrize("variational", [False, True])
def test_the_second_layer_reads_what_is_left_of_the_first(variational: bool) -> None:
    (dropped, whole), (again, _) = (of_layers(variational, seed) for seed in (1, 2))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - P), rtol=1e-4, atol=1e-6)
    assert share_kept(dropped[1].abs()) == pytest.approx(1 - P, abs=0.2)
    one_mask = [
        torch.equal(kept[row, :length], kept[row, :1].expand(length, -1))
        for row, length in enumerate(LENGTHS)
        if length > 1
    ]
    assert one_mask == [variational] * 4
    assert not torch.equal(kept[1], kept[3])
    assert not torch.equal(kept, again != 0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_plain_stack_drops_between_its_layers_and_nowhere_else(bidirectional: bool) -> None:
    """By one `nn.LSTM` a layer, and the same draws."""
    stack = LSTMStack(
        6, 4, 3, bidirectional=bidirectional, dropout=P, variational=False, recurrent_dropout=0.0,
        residual=False, layer_norm=False,
    )  # fmt: skip
    (fused,) = stack.calls
    x = torch.randn(SENTENCES, STEPS, 6)
    read = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    singles = []
    for layer in range(3):
        width = 6 if layer == 0 else 8 if bidirectional else 4
        singles.append(nn.LSTM(width, 4, batch_first=True, bidirectional=bidirectional))
        for name, parameter in singles[-1].named_parameters():
            parameter.data = fused.get_parameter(name.replace("_l0", f"_l{layer}")).detach()
    torch.manual_seed(1)
    got = stack.train()(read, None, None)[0].data
    torch.manual_seed(1)
    for layer, one in enumerate(singles):
        if layer > 0:
            read = repacked(read, stack.dropout.packed(read.data, read.batch_sizes))
        read = one(read)[0]
    torch.testing.assert_close(got, read.data)


# In a network

KINDS = {
    "attention": ModelOptions(
        embedding_size=8, encoder_hidden_size=4, decoder_hidden_size=8, attention_size=8
    ),
    "sutskever": ModelOptions(
        kind="sutskever", bidirectional=False, embedding_size=8, encoder_hidden_size=8,
        decoder_hidden_size=8,
    ),
}  # fmt: skip


def network(kind: str, **rates: Any) -> Network:
    torch.manual_seed(0)
    options = KINDS[kind].__dict__ | rates
    made = Network(ModelOptions(**options), 11, 11)
    for parameter in made.parameters():
        parameter.data.mul_(3)
    return made.double()


def features(network: Network, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    source = torch.tensor([[4, 5, 6, 7, 3], [8, 9, 3, 0, 0], [5, 6, 7, 3, 0]])
    lengths = torch.tensor([5, 3, 4])
    return network.features(source, lengths, source, lengths).detach()


def felt(kind: str, **rates: Any) -> bool:
    """Whether learning differs from evaluation."""
    made = network(kind, **rates)
    return not torch.allclose(features(made.train()), features(made.eval()))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_dropout_is_felt_alone(kind: str, rate: str) -> None:
    assert not felt(kind)
    assert felt(kind, **{rate: 0.5})
    assert felt(kind, **{rate: 0.5}, variational_dropout=True)


@pytest.mark.parametrize("rate", ["embedding_dropout", "output_dropout"])
def test_what_has_no_rate_of_its_own_is_dropped_like_the_rest(rate: str) -> None:
    """A network of one layer without attention has no other place for dropout."""
    other = "output_dropout" if rate == "embedding_dropout" else "embedding_dropout"
    assert felt("sutskever", dropout=0.5, **{other: 0.0})
    assert felt("sutskever", dropout=0.5, **{other: 0.0, rate: None})
    assert not felt("sutskever", dropout=0.5, **{other: 0.0, rate: 0.0})


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_generator_reads_is_dropped_last(kind: str, variational: bool) -> None:
    made = network(kind, output_dropout=P, variational_dropout=variational)
    evaluated = features(made.eval())[:1]  # of the sentence without padding
    learning = torch.cat([features(made.train(), seed)[:1] for seed in range(20)])  # [20, T, F]
    kept = learning != 0
    torch.testing.assert_close(learning[kept], evaluated.expand_as(kept)[kept] / (1 - P))
    assert share_kept(learning.abs()) == pytest.approx(1 - P, abs=0.15)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) == variational
