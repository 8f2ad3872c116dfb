"""int8 weights: rounding and layout by hand, torch's way against whole numbers, and the native
operators against torch's way, on every kind of processor that this one can pass for."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import KINDS, build, read, sentences

from handler.decoding import native
from handler.decoding.model import load, packed
from model.int8 import Int8Embedding, Int8Projection, activations, by_unit, rounded
from model.native import NoCompiler
from model.native.build import COMMON, FLAGS, SOURCES
from model.native.build import build as compiled
from model.quantized import quantized
from model.serving import scripted

CPU = torch.device("cpu")
ops = torch.ops.seq2serve


def test_each_channel_is_rounded_by_its_own_scale() -> None:
    weights, scale = rounded(torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [0.5, -1.0, 0.0]]))
    assert weights.tolist() == [[127, -64, 0], [0, 0, 0], [64, -127, 0]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.0, 1 / 127]))


def test_each_row_is_rounded_by_its_own_scale_and_halves_to_even() -> None:
    x = torch.tensor([[127.0, 2.5, -3.5], [0.0, 0.0, 0.0], [1.0, 0.5, -1.0]])
    q, scale = activations(x)
    assert q.tolist() == [[127, 2, -4], [0, 0, 0], [127, 64, -127]]
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.0], [1 / 127]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="weights: got NaN or infinity; allowed: finite"):
        rounded(torch.tensor([[1.0, value]]))


def test_gates_are_laid_out_unit_by_unit() -> None:
    gates = torch.arange(4 * 18).float().unsqueeze(1)  # of 18 units, which fill two panels of 16
    laid = by_unit(gates, 18).view(2, 4, 16)  # unit block, gate, unit
    assert laid[0, 1].tolist() == list(range(18, 34))
    assert laid[1, 3, :2].tolist() == [70, 71]
    assert laid[1, :, 2:].eq(0).all()


def projection(inputs: int, outputs: int, seed: int) -> tuple[Int8Projection, Int8Projection]:
    """The same weights twice: for torch's operators and for the native ones."""
    torch.manual_seed(seed)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    plain, fused = Int8Projection(weight, bias), Int8Projection(weight, bias)
    plain.pack(False)
    fused.pack(True)
    return plain, fused


def test_a_product_is_that_of_whole_numbers() -> None:
    plain = Int8Projection(torch.randn(9, 33), torch.randn(9))
    x = torch.randn(4, 33)
    q, scale = activations(x)
    whole = q.long() @ plain.weight.long().t()
    expected = whole.float() * (scale * plain.scale) + plain.bias
    plain.pack(False)
    assert torch.equal(plain(x), expected)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 200), outputs=st.integers(1, 200),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_every_processor_gives_the_same_bits_for_any_shape(
    native_library, rows, inputs, outputs, seed
) -> None:
    if native_library is None:
        pytest.skip("no native operators on this machine")
    plain, fused = projection(inputs, outputs, seed)
    x = torch.randn(rows, inputs) * 10.0 ** torch.randint(-3, 3, (rows, 1))
    x[seed % rows] *= 10.0 ** -(seed % 50)  # down to what single precision cannot tell from zero
    fastest = native.enabled()
    found = [one for one in ("avx2", "avx512", "amx") if ops.use(one)]
    try:
        results = [(ops.use(one), fused(x), fused(x, True)) for one in found]
    finally:
        ops.use(fastest)
    for _, y, tanh in results:
        assert torch.equal(y, plain(x))
        assert torch.equal(tanh, results[0][2])
        torch.testing.assert_close(tanh, plain(x, True), rtol=0, atol=1e-6)


def test_a_row_that_is_not_finite_spoils_itself_alone(kernels: str) -> None:
    _, fused = projection(40, 70, 1)
    x = torch.randn(9, 40)
    clean = fused(x)
    x[3, 7], x[5, 0] = float("nan"), float("inf")
    y = fused(x)
    assert y[[3, 5]].isnan().all()
    others = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(y[others], clean[others])
    values, _, normaliser = ops.best(x, fused.packed, 3, True)
    assert values[[3, 5]].isnan().all()
    assert values[others].isfinite().all()
    assert normaliser[others].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_best_are_those_of_all_logits(kernels: str, threads: int) -> None:
    torch.manual_seed(3)
    generator = Int8Projection(torch.randn(333, 50), torch.randn(333))
    generator.bias[[0, 1, 2]] = float("-inf")
    generator.pack(True, float("-inf"))
    x = torch.randn(13, 50)
    logits = generator(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values, tokens, normaliser = ops.best(x, generator.packed, 10, True)
    finally:
        torch.set_num_threads(before)
    expected = logits.topk(10, 1)
    assert torch.equal(values, expected.values)
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(normaliser, logits.logsumexp(1), rtol=0, atol=1e-5)


def test_of_equal_logits_the_smaller_id_comes_first(kernels: str) -> None:
    generator = Int8Projection(torch.zeros(200, 5), torch.ones(200))
    generator.pack(True, float("-inf"))
    _, tokens, _ = ops.best(torch.randn(2, 5), generator.packed, 4, False)
    assert tokens.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("kind", [*KINDS, "ensemble"])
def test_the_native_model_gives_what_torch_gives(kernels: str, kind: str, tmp_path: Path) -> None:
    """Logits, states and attention of every kind of model, over sentences of all lengths."""
    single = build(kind).float()
    plain = quantized(single)
    plain.pack(False, False)
    path = tmp_path / "model.pt"
    scripted(quantized(single)).save(str(path))
    fused = load(str(path), CPU)
    source, lengths = sentences(1, 7, 11)
    choices = torch.randint(4, 20, (5, 7, 3))
    logits, paid = read(plain, source, lengths, choices)
    got, shares = read(fused, source, lengths, choices)
    able = logits > float("-inf")
    torch.testing.assert_close(got[able], logits[able], rtol=0, atol=2e-2)
    torch.testing.assert_close(shares, paid, rtol=0, atol=1e-2)
    exact, _ = read(packed(single, CPU), source, lengths, choices)
    assert (got[able] - exact[able]).abs().mean() < 0.1 * exact[able].abs().mean()


def test_the_operators_may_come_after_a_model_that_did_without(
    native_library, tmp_path: Path
) -> None:
    """In a process of its own: a library stays."""
    if native_library is None:
        pytest.skip("no native operators on this machine")
    path = tmp_path / "model.pt"
    scripted(quantized(build("attention").float())).save(str(path))
    program = f"""
import shutil, sys, torch
from handler.decoding import native
from handler.decoding.model import load
cpu = torch.device("cpu")
load({str(path)!r}, cpu)
assert not native.enabled()
shutil.copy({str(native_library)!r}, {str(tmp_path)!r})
load({str(path)!r}, cpu).save({str(tmp_path / "again.pt")!r})
print(native.enabled())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == native.enabled()


def test_what_does_not_fit_is_refused_before_memory_is_touched(kernels: str) -> None:
    _, fused = projection(40, 70, 1)
    with pytest.raises(RuntimeError, match=r"packed weights .* for 200 inputs"):
        ops.linear(torch.randn(2, 200), torch.empty(2, 0), fused.packed, 70, False)
    none = torch.empty(0, 20)
    assert ops.linear(none, none, fused.packed, 70, False).shape == (0, 70)
    with pytest.raises(RuntimeError, match="200 outputs of 2 groups"):
        ops.linear(torch.randn(2, 40), torch.empty(2, 0), fused.packed, 200, False)
    with pytest.raises(RuntimeError, match="x: expected contiguous float32"):
        ops.linear(torch.randn(2, 40).double(), torch.empty(2, 0), fused.packed, 70, False)
    cell = Int8Projection(torch.randn(4 * 6, 6), None, 6)
    cell.pack(True)
    table, h = torch.randn(9, 64), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match="token 9 is not in a vocabulary of 9"):
        ops.cell(h[:, :0], torch.tensor([1, 9]), table, h, h, cell.packed)
    with pytest.raises(RuntimeError, match="layer: length 4"):
        ops.layer(torch.empty(0), torch.ones(1, 3, dtype=torch.long), table,
                  torch.tensor([4]), cell.packed, 6, False)  # fmt: skip


def test_threads_at_work_at_once_do_not_disturb_each_other(kernels: str) -> None:
    work = [(projection(60, 90, i)[1], torch.randn(12, 60)) for i in range(4)]
    expected = [fused(x) for fused, x in work]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        fused, x = work[i]
        wrong.extend(i for _ in range(200) if not torch.equal(fused(x), expected[i]))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_an_embedding_is_its_rounded_row() -> None:
    weight = torch.randn(5, 8)
    words = Int8Embedding(weight)
    torch.testing.assert_close(words(torch.tensor([3])), weight[3:4], rtol=0, atol=0.02)
    assert torch.equal(words.whole()[3:4], words(torch.tensor([3])))


def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(NoCompiler, match=r"no C\+\+ compiler|no kernels for"):
        compiled(tmp_path, native.library())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("emulated", [False, True])
def test_kernels_stay_within_their_buffers_and_agree(
    native_library, tmp_path: Path, emulated: bool
) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, without torch; where the processor
    has no AMX, also with its instructions in plain C++."""
    compiler = shutil.which("g++")
    if native_library is None or compiler is None:
        pytest.skip("no g++ for x86-64 on this machine")
    here = Path(__file__).parent
    checked = [*COMMON, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = dict(FLAGS)
    if emulated:
        checked.append("-DAMX_EMULATED")
        flags["amx"] = (*FLAGS["avx512"], "-include", str(here / "amx_emulated.h"))
    objects = []
    for name in ("avx2", "avx512", "amx", "dispatch", "float32_avx2", "float32_avx512"):
        objects.append(str(tmp_path / f"{name}.o"))
        subprocess.run(
            [compiler, *checked, *flags[name], "-c", str(SOURCES / f"{name}.cpp"), "-o",
             objects[-1]], check=True,
        )  # fmt: skip
    program = tmp_path / "check"
    source = here / "native_check.cpp"
    subprocess.run([compiler, *checked, str(source), *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(": ") for line in done.stdout.splitlines())
    assert "avx2" in told
    floats = {told.pop(name) for name in list(told) if name.startswith("float ")}
    assert len(floats) == 1
    assert len(set(told.values())) == 1, told
    if emulated:
        assert ("amx" in told) == ("avx512" in told)
