"""Laws of the network: eager == scripted, step by step == teacher forced, batch independence."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.decoding.model import packed
from handler.decoding.native import declare
from model import Ensemble, ModelOptions, Network, ServingModel
from model.network import reversed_within
from model.projection import Projection
from model.serving import scripted

VOCABULARY = 23
KINDS = {
    "sutskever": ModelOptions(
        kind="sutskever", bidirectional=False, reverse_source=True, embedding_size=6,
        encoder_layers=3, decoder_layers=3, encoder_hidden_size=7, decoder_hidden_size=7,
    ),
    "sutskever with every option": ModelOptions(
        kind="sutskever", bidirectional=False, embedding_size=8, encoder_layers=2,
        decoder_layers=2, encoder_hidden_size=8, decoder_hidden_size=8, dropout=0.3,
        layer_norm=True, residual=True, tie_embeddings="all",
    ),
    "attention": ModelOptions(
        embedding_size=6, encoder_layers=2, encoder_hidden_size=5, decoder_layers=1,
        decoder_hidden_size=9, attention_size=4,
    ),
    "attention with every option": ModelOptions(
        embedding_size=10, encoder_layers=3, encoder_hidden_size=5, decoder_layers=2,
        decoder_hidden_size=10, attention_size=7, dropout=0.3, layer_norm=True, residual=True,
        tie_embeddings="all", reverse_source=True,
    ),
    "additive attention of 2 heads": ModelOptions(
        embedding_size=6, encoder_hidden_size=5, decoder_layers=2, decoder_hidden_size=9,
        attention="additive", attention_size=6, attention_heads=2, embedding_dropout=0.3,
        output_dropout=0.3, word_dropout=0.3,
    ),
    "dot attention of 4 heads": ModelOptions(
        embedding_size=8, encoder_hidden_size=4, encoder_layers=2, decoder_hidden_size=8,
        decoder_layers=2, attention_size=8, attention_heads=4, dropout=0.3, residual=True,
        recurrent_dropout=0.3, variational_dropout=True,
    ),
}
RATES = (
    "dropout", "embedding_dropout", "output_dropout", "recurrent_dropout", "word_dropout",
)


def serving(name: str, seed: int = 0, **changed: object) -> tuple[Network, ServingModel]:
    torch.manual_seed(seed)
    network = Network(replace(KINDS[name], **changed), VOCABULARY, VOCABULARY)
    for parameter in network.parameters():  # far from zero, so that differences show
        parameter.data.mul_(3)
    # In double precision, or rounding that such weights magnify would pass for a broken law.
    network = network.double().eval()
    return network, ServingModel(network, 50, 50, '{"name": "test"}')


ENSEMBLES = {
    "ensemble": ("attention", "attention with every option"),
    "mixed ensemble": ("attention", "sutskever", "attention with every option"),
}


def build(name: str, **changed: object) -> ServingModel | Ensemble:
    """The model of that name in double precision; the same weights every time."""
    if name in ENSEMBLES:
        return Ensemble([serving(one, i, **changed)[1] for i, one in enumerate(ENSEMBLES[name], 1)])
    return serving(name, 1, **changed)[1]


def sentences(seed: int, n: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator)
    tokens = torch.randint(4, VOCABULARY, (n, int(lengths.max())), generator=generator)
    return tokens * (torch.arange(tokens.size(1)) < lengths.unsqueeze(1)), lengths


@pytest.fixture(scope="module", params=[*KINDS, *ENSEMBLES])
def both_forms(request):
    """(eager, scripted) serving forms of one model."""
    eager = build(request.param)
    return eager, scripted(eager)


@torch.no_grad()
def read(model, source, lengths, choices):
    """Logits [T, N, K, V] and attention [T, N, K, S] of feeding `choices` [T, N, K]."""
    memory = model.encode(source, lengths)
    state = [rows.repeat_interleave(choices.size(2), 0) for rows in model.start(memory)]
    logits, paid = [], []
    for previous in choices:
        seen, state, weights = model.step(previous, state, memory)
        logits.append(seen)
        paid.append(weights)
    return torch.stack(logits), torch.stack(paid)


def run_steps(model, source, lengths, choices):
    return read(model, source, lengths, choices)[0]


def paid(model, source, lengths, choices):
    return read(model, source, lengths, choices)[1]


@settings(max_examples=15)
@given(seed=st.integers(0, 999), n=st.integers(1, 5), longest=st.integers(1, 9),
       k=st.integers(1, 3), t=st.integers(1, 4))
def test_eager_equals_scripted(both_forms, seed, n, longest, k, t):
    source, lengths = sentences(seed, n, longest)
    choices = torch.randint(0, VOCABULARY, (t, n, k))
    with torch.inference_mode():
        eager, script = (run_steps(m, source, lengths, choices) for m in both_forms)
    torch.testing.assert_close(eager, script)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15)
@given(seed=st.integers(0, 999), n=st.integers(1, 5), longest=st.integers(1, 9))
def test_steps_equal_teacher_forcing(name, seed, n, longest):
    network, model = serving(name)
    source, source_lengths = sentences(seed, n, longest)
    target, target_lengths = sentences(seed + 1, n, longest)
    with torch.inference_mode():
        whole = network(source, source_lengths, target, target_lengths)
        steps = run_steps(model, source, source_lengths, target.t().unsqueeze(2))
    for i, length in enumerate(target_lengths):
        torch.testing.assert_close(whole[i, :length], steps[:length, i, 0])


def test_a_sentence_does_not_depend_on_its_neighbours(both_forms):
    source, lengths = sentences(3, 6, 9)
    choices = torch.randint(4, VOCABULARY, (4, 6, 2))
    for model in both_forms:
        together = run_steps(model, source, lengths, choices)
        for i in range(6):
            alone = run_steps(
                model, source[i : i + 1, : lengths[i]], lengths[i : i + 1], choices[:, i : i + 1]
            )
            torch.testing.assert_close(together[:, i], alone[:, 0])


def test_state_rows_can_be_selected_and_reordered(both_forms):
    model = both_forms[0]
    source, lengths = sentences(5, 4, 6)
    memory = model.encode(source, lengths)
    state = model.start(memory)
    order = torch.tensor([2, 0])
    picked = type(memory)([m[order] for m in memory.attended], [])
    previous = torch.tensor([[4], [5]])
    some, _, _ = model.step(previous, [rows[order] for rows in state], picked)
    both = torch.tensor([[5], [9], [4], [9]])
    every, _, _ = model.step(both, state, memory)
    torch.testing.assert_close(some, every[order])


def test_saved_and_loaded_model_is_the_same(both_forms, tmp_path):
    eager, script = both_forms
    script.save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    source, lengths = sentences(7, 3, 5)
    choices = torch.randint(4, VOCABULARY, (3, 3, 2))
    torch.testing.assert_close(
        run_steps(eager, source, lengths, choices), run_steps(loaded, source, lengths, choices)
    )
    for name in ("format_version", "pad_id", "bos_id", "eos_id", "card", "has_attention",
                 "source_vocabulary", "target_vocabulary", "max_source_length",
                 "max_target_length"):
        assert getattr(loaded, name) == getattr(eager, name)


def test_reversal_stays_within_each_length():
    source = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 0, 0, 0]])
    assert reversed_within(source, torch.tensor([4, 2, 1])).tolist() == [
        [8, 7, 6, 5], [6, 5, 0, 0], [9, 0, 0, 0],
    ]


def test_ensemble_is_the_mean_of_probabilities():
    members = [serving("attention", seed)[1] for seed in (1, 2)]
    source, lengths = sentences(1, 3, 6)
    choices = torch.randint(4, VOCABULARY, (2, 3, 1))
    each = [run_steps(m, source, lengths, choices).softmax(-1) for m in members]
    mean = run_steps(Ensemble(members), source, lengths, choices).exp()
    torch.testing.assert_close(mean, (each[0] + each[1]) / 2)


def test_a_large_ensemble_needs_one_vocabulary():
    other = ServingModel(Network(KINDS["attention"], VOCABULARY, VOCABULARY + 1), 9, 9)
    with pytest.raises(ValueError, match="one vocabulary"):
        Ensemble([serving("attention")[1], other])


def test_paper_preset_has_the_papers_size():
    """384M parameters, of which 64M recurrent (1409.3215, section 3.4)."""
    with torch.device("meta"):
        network = Network(
            ModelOptions(
                kind="sutskever", bidirectional=False, reverse_source=True, embedding_size=1000,
                encoder_layers=4, decoder_layers=4, encoder_hidden_size=1000,
                decoder_hidden_size=1000,
            ),
            160_000,
            80_000,
        )
    count = sum(p.numel() for p in network.parameters())
    recurrent = sum(
        p.numel() for side in (network.encoder.stack, network.decoder) for p in side.parameters()
    )
    assert round(count / 1e6) == 384
    assert round(recurrent / 1e6) == 64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "sutskever"}, "bidirectional"),
        ({"kind": "sutskever", "bidirectional": False, "encoder_layers": 2}, "encoder_layers"),
        (
            {"kind": "sutskever", "bidirectional": False, "tie_embeddings": "decoder",
             "embedding_size": 8},
            "tie_embeddings",
        ),
    ],
)
def test_impossible_combinations_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        ModelOptions(**change)


def test_joint_embeddings_need_a_joint_vocabulary():
    with pytest.raises(ValueError, match="joint vocabulary"):
        Network(ModelOptions(tie_embeddings="all"), 10, 11)


@pytest.mark.parametrize("name", KINDS)
def test_dropout_changes_training_only(name):
    """Every switch is felt: with dropout, training differs from evaluation; without, it does
    not."""
    source, lengths = sentences(2, 3, 6)
    given = KINDS[name]
    without = dict.fromkeys(RATES, 0.0)
    for changed in ({}, without):
        network, _ = serving(name, **changed)
        evaluated = network(source, lengths, source, lengths)
        trained = network.train()(source, lengths, source, lengths)
        drops = not changed and any(getattr(given, rate) for rate in RATES)
        assert torch.allclose(evaluated, trained) == (not drops)


def test_attention_is_shared_out_among_the_tokens_of_the_source(both_forms):
    source, lengths = sentences(11, 5, 9)
    choices = torch.randint(4, VOCABULARY, (3, 5, 2))
    for model in both_forms:
        weights = paid(model, source, lengths, choices)
        if not model.has_attention:
            assert weights.shape == (3, 5, 2, 0)
            continue
        assert weights.shape == (3, 5, 2, source.size(1))
        torch.testing.assert_close(weights.sum(3), torch.ones_like(weights[..., 0]))
        padding = torch.arange(source.size(1)) >= lengths.unsqueeze(1)  # [N, S]
        assert (weights[:, padding.unsqueeze(1).expand(-1, 2, -1)] == 0).all()
        assert (weights[:, ~padding.unsqueeze(1).expand(-1, 2, -1)] > 0).all()


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("name", [*KINDS, *ENSEMBLES])
def test_packed_weights_change_nothing_and_may_be_packed_twice(name, tmp_path):
    plain, model = build(name).float(), build(name).float()
    path = str(tmp_path / "model.pt")
    scripted(model).save(path)
    scripted_again = torch.jit.load(path)
    source, lengths = sentences(8, 4, 6)
    choices = torch.randint(4, VOCABULARY, (3, 4, 2))
    with torch.inference_mode():
        expected = run_steps(plain, source, lengths, choices)
        model.pack(False, True)
        packed_once = run_steps(model, source, lengths, choices)
        torch.testing.assert_close(packed_once, expected, rtol=1e-3, atol=1e-3)
        for again in (model, scripted_again):
            again.pack(False, True)
            assert torch.equal(run_steps(again, source, lengths, choices), packed_once)
    for one in (model, scripted_again):
        assert one.invariant
        one = next(one.members.children()) if name in ENSEMBLES else one
        assert one.generator.blocked[0].is_mkldnn
        assert one.generator.weight.numel() == 0
    doubled = packed(build(name), torch.device("cpu"))
    assert run_steps(doubled, source, lengths, choices).dtype == torch.double


@needs_onednn
@settings(max_examples=20)
@given(seed=st.integers(0, 999), rows=st.integers(2, 300), wide=st.sampled_from([7, 64, 257, 512]),
       out=st.sampled_from([3, 96, 1000]))
def test_a_packed_product_is_row_by_row(seed, rows, wide, out):
    torch.manual_seed(seed)
    projection = Projection(torch.randn(out, wide), torch.randn(out))
    x = torch.randn(rows, wide)
    expected = projection(x)
    assert projection.pack(False, True, True)
    together = projection(x)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    for some in (slice(0, 1), slice(rows - 1, rows), slice(rows // 3, rows // 2 + 1)):
        assert torch.equal(projection(x[some]), together[some])


ELSEWHERE = """
import sys
import torch
from handler.decoding.native import declare

path = sys.argv[1]
try:
    torch.jit.load(path)
except RuntimeError as error:
    assert "made_up::twice" in str(error), error
else:
    raise AssertionError("loaded without knowing the operator")
for _ in range(2):
    declare({"made_up::twice": "(Tensor x, int? n=None) -> Tensor"})
declare({"aten::relu": "(Tensor nonsense) -> Tensor"})
model = torch.jit.load(path)
assert model(torch.ones(2), False).tolist() == [1.0, 1.0]
"""


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor, twice: bool) -> torch.Tensor:
        if twice:
            return torch.ops.made_up.twice(x, 3)
        return x


def test_an_operator_that_is_not_built_in_can_be_named_by_a_model_that_never_calls_it(tmp_path):
    declare({"made_up::twice": "(Tensor x, int? n=None) -> Tensor"})
    path = str(tmp_path / "model.pt")
    torch.jit.script(Twice()).save(path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", ELSEWHERE, path], check=True)
