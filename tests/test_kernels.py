"""The kernels of a step on a GPU, without one: kernels.cu as C++, compared with plain torch. The
search of a step is in test_advance.py."""

import ctypes
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_model import build, sentences
from torch.utils._python_dispatch import TorchDispatchMode

from handler.decoding import cuda, kernels
from model import Memory, ModelOptions, Network, ServingModel
from model.lstm import Cell
from model.network import attend as attend_in_training

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN, INFINITY = float("nan"), float("inf")
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32,
        torch.float64: torch.int64, torch.int64: torch.int64}  # fmt: skip


def compiler() -> str:
    found = shutil.which("g++")
    if found is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux")
    return found


class Emulated(cuda.Kernels):
    """Kernels of tests/cuda_emulated.h, which run on a CPU."""

    launched = 0

    @contextmanager
    def current(self):
        self.launched += 1
        yield 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    command = [compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas",
               str(HERE / "kernels_check.cpp"), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulated(driver, monkeypatch):
    """The operators are kernels, on a CPU."""
    one = Emulated(driver, None, None, CPU, {name: name for name in kernels.NAMES})
    monkeypatch.setitem(kernels._loaded, CPU, one)
    return one


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(BITS[a.dtype]),
                                              b.contiguous().view(BITS[b.dtype]))  # fmt: skip


def close(mine, plain, single=2e-6):
    """To the rounding of the type that it is in."""
    assert mine.dtype == plain.dtype
    most = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(mine.dtype, single)
    torch.testing.assert_close(mine, plain, rtol=most, atol=most, equal_nan=True)


# lstm_pointwise


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 37), (2, 300)])
@pytest.mark.parametrize("biased", [False, True])
def test_gates_are_those_of_plain_torch(emulated, dtype, rows, size, biased):
    gates, more = (rand(rows, 4 * size, dtype=dtype, seed=i, scale=3) for i in (1, 2))
    bias = rand(4 * size, dtype=dtype, seed=3) if biased else None
    c = rand(rows, 2 * size, dtype=dtype, seed=4)[:, ::2]  # not contiguous
    mine = torch.ops.seq2serve.lstm_pointwise(gates, more, bias, c)
    for one, other in zip(mine, kernels.plain_lstm_pointwise(gates, more, bias, c), strict=True):
        close(one, other)
    assert emulated.launched == 1
    alone = kernels.lstm_pointwise(gates[-1:], more[-1:], bias, c[-1:])
    assert all(same_bits(one, other[-1:]) for one, other in zip(alone, mine))


def test_gates_that_are_far_out_and_not_finite(emulated):
    gates = torch.tensor([[1e4], [-1e4], [INFINITY], [-INFINITY], [NAN]]).repeat(1, 4)
    more, c = torch.zeros(5, 4), torch.ones(5, 1)
    for one, other in zip(kernels.lstm_pointwise(gates, more, None, c),
                          kernels.plain_lstm_pointwise(gates, more, None, c)):  # fmt: skip
        close(one, other)


def test_gates_are_in_the_order_of_a_cell(emulated):
    lstm = torch.nn.LSTM(5, 7)
    cell = Cell(*(getattr(lstm, f"{name}_l0") for name in Cell.SOURCES))
    x, h, c = rand(3, 5), rand(3, 7, seed=1), rand(3, 7, seed=2)
    with torch.no_grad():
        weight = cell.gates.weight
        found = kernels.lstm_pointwise(x @ weight[:, :5].T, h @ weight[:, 5:].T, cell.gates.bias, c)
        _, expected = lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other.squeeze(0), rtol=1e-5, atol=1e-6)


# gather_rows


def test_rows_of_tables_of_any_type_and_shape(emulated):
    tables = [rand(6, 8), rand(6, 5, dtype=torch.float16), rand(6, 2, 3, dtype=torch.float64),
              rand(6, 7).to(torch.int64), rand(6, 3) > 0, rand(6, 0), rand(12, 4)[::2]]  # fmt: skip
    origin = torch.tensor([5, 0, 0, 3, 2, 5, 1, 4])
    found = torch.ops.seq2serve.gather_rows(tables, origin)
    assert emulated.launched == 1
    for one, other in zip(found, kernels.plain_gather_rows(tables, origin), strict=True):
        assert torch.equal(one, other)
    assert kernels.gather_rows(tables, origin[:0])[0].shape == (0, 8)
    assert kernels.gather_rows([], origin) == []


def test_more_tables_than_one_launch_takes(emulated):
    tables = [rand(3, 2, seed=i) for i in range(kernels.MOST_TABLES + 3)]
    origin = torch.tensor([2, 0])
    found = kernels.gather_rows(tables, origin)
    assert emulated.launched == 2
    assert all(torch.equal(one, table[origin]) for one, table in zip(found, tables, strict=True))


# attend


def attention(dtype, n, k, steps, width, seed=0):
    query, keys, values = (rand(n, size, width, dtype=dtype, seed=seed + i)
                           for i, size in enumerate((k, steps, steps)))  # fmt: skip
    lengths = torch.randint(1, steps + 1, (n,), generator=torch.Generator().manual_seed(seed))
    lengths[0] = steps
    return query, keys, values, torch.arange(steps) < lengths.unsqueeze(1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "k", "steps", "width", "heads"),
    [(1, 1, 1, 1, 1), (2, 3, 9, 48, 1), (1, 2, 40, 48, 3), (1, 1, 3, 1100, 1), (2, 1, 20, 33, 3)],
)
def test_attention_is_that_of_plain_torch(emulated, dtype, n, k, steps, width, heads):
    given = attention(dtype, n, k, steps, width)
    context, weights = kernels.attend(*given, heads)
    assert emulated.launched == 1
    assert (context.dtype, weights.dtype) == (dtype, kernels.widest(dtype))
    if dtype.itemsize > 2:
        for one, other in zip((context, weights), kernels.plain_attend(*given, heads), strict=True):
            close(one, other)
    wide = [one if one.dtype == torch.bool else one.double() for one in given]
    for one, other in zip((context, weights), attend_in_training(*wide, heads, None)):
        close(one, other.to(one.dtype))


@pytest.mark.parametrize(("width", "heads"), [(48, 1), (64, 4), (30, 2), (1100, 1)])
def test_attention_of_a_row_depends_on_nothing_beside_it(emulated, width, heads):
    """Nor on padding behind it, whatever lies there, nor on how rows lie in memory."""
    query, keys, values, mask = attention(torch.float16, 2, 3, 11, width)
    context, weights = kernels.attend(query, keys, values, mask, heads)
    room = torch.full((3, 20, width), 77.0, dtype=torch.float16)
    tables = [room.clone(), room.clone()]
    for table, one in zip(tables, (keys, values)):
        table[:2, :11] = one
    wide = torch.zeros(3, 20, dtype=torch.bool)
    wide[:2, :11] = mask
    for n in (0, 1):
        for length in (11, 20):
            part = [one[n : n + 1, :length] for one in (*tables, wide)]
            for k in range(3):
                alone = kernels.attend(query[n : n + 1, k : k + 1], *part, heads)
                assert same_bits(alone[0][0, 0], context[n, k])
                assert same_bits(alone[1][0, 0, :11], weights[n, k])
                assert not alone[1][0, 0, 11:].any()


def test_attention_that_is_masked_within_or_not_finite(emulated):
    query, keys, values, mask = attention(torch.float32, 3, 1, 6, 8)
    mask[0, 2], mask[1] = False, False
    keys[2, 0, 0] = INFINITY
    found = kernels.attend(query, keys, values, mask, 2)
    for one, other in zip(found, kernels.plain_attend(query, keys, values, mask, 2)):
        close(one[[0, 2]], other[[0, 2]])
        assert not one[1].any()  # nothing to attend to


def test_attention_over_more_than_fits_is_plain(emulated):
    given = attention(torch.float32, 1, 1, kernels.MOST_STEPS + 1, 2)
    for one, other in zip(kernels.attend(*given, 1), kernels.plain_attend(*given, 1)):
        assert torch.equal(one, other)
    assert emulated.launched == 0


# choose


def chosen(logits, count, never=(0, 1, 2), normalised=True):
    """What the kernel chooses, after a comparison with plain torch."""
    ids = torch.tensor(never, dtype=torch.int64)
    values, tokens, normaliser = torch.ops.seq2serve.choose(logits, ids, count, normalised)
    expected = kernels.plain_choose(logits, ids, count, normalised)
    assert torch.equal(tokens, expected[1])
    assert torch.equal(values.isnan(), expected[0].isnan())
    assert torch.equal(values.nan_to_num(7.0), expected[0].nan_to_num(7.0))
    assert normaliser.shape == expected[2].shape
    assert (values.dtype, tokens.dtype, normaliser.dtype) == (
        torch.float32, torch.int64, torch.float32
    )  # fmt: skip
    torch.testing.assert_close(normaliser, expected[2], rtol=1e-6, atol=1e-6, equal_nan=True)
    return values, tokens, normaliser


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "count"),
    [(1, 1, 1), (2, 67, 9), (2, 5003, 12), (1, 9001, 129), (1, 600, 512)],
)
def test_the_greatest_logits_are_those_of_plain_torch(emulated, dtype, rows, vocabulary, count):
    logits = rand(rows, vocabulary, dtype=dtype, scale=4)
    together = chosen(logits, count, (0, 2) if vocabulary > 1 else ())
    assert emulated.launched == 1
    alone = chosen(logits[-1:], count, (0, 2) if vocabulary > 1 else ())
    assert all(same_bits(one, other[-1:]) for one, other in zip(alone, together))
    assert chosen(logits, 1, normalised=False, never=())[2].numel() == 0


def test_equal_logits_are_chosen_by_id(emulated):
    _, tokens, _ = chosen(torch.zeros(1, 1500), 20, never=(0, 4, 1499))
    assert tokens.tolist() == [[i for i in range(1, 22) if i != 4]]
    few = torch.tensor([1.0, 0.5, -0.0]).repeat(400)  # a thread's best has many equals
    chosen(few.unsqueeze(0), 25)
    one_thread = torch.zeros(1, 8 * kernels.THREADS)
    one_thread[0, 5 :: kernels.THREADS] = torch.arange(8.0) + 1
    _, tokens, _ = chosen(one_thread, 9)
    assert tokens[0, :8].tolist() == [5 + i * kernels.THREADS for i in reversed(range(8))]


@pytest.mark.parametrize("rise", [-1.0, 0.0, 1.0])
def test_more_great_logits_before_few_threads_than_are_sorted_at_once(emulated, rise):
    logits = rand(60, kernels.THREADS)
    logits[:, 3::27] = 5000 + torch.arange(60.0).unsqueeze(1) * rise
    chosen(logits.view(1, -1), 20)


@pytest.mark.parametrize(
    "put",
    [{}, {3: NAN}, {9: NAN, 600: NAN}, {4: INFINITY}, {4: INFINITY, 5: INFINITY},
     {5: NAN, 6: INFINITY}, {6: INFINITY, 700: NAN}, {0: NAN, 1: INFINITY}],
)  # fmt: skip
@pytest.mark.parametrize("rest", [0.5, -INFINITY])
def test_logits_that_are_not_finite(emulated, put, rest):
    """Fewer finite ones than are asked for, none at all, and what must never be chosen."""
    logits = torch.full((2, 1030), rest)
    logits[1, 50] = 2.0
    for place, value in put.items():
        logits[0, place] = value
    chosen(logits, 5)


def test_few_tokens_all_of_which_are_chosen(emulated):
    values, _, _ = chosen(rand(2, 6), 6)
    assert (values[:, 3:] == -INFINITY).all()
    with pytest.raises(ValueError, match="count: got 7; allowed: 1 to 6"):
        kernels.choose(rand(2, 6), torch.tensor([0]), 7, False)


def test_more_ids_and_choices_than_the_kernel_knows_are_plain(emulated):
    chosen(rand(2, 30), 4, never=range(kernels.MOST_NEVER + 1))
    chosen(rand(2, 600), kernels.THREADS + 1)
    assert emulated.launched == 0


# A whole step


class Cuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = property(lambda self: True)


def as_cuda(thing):
    if isinstance(thing, torch.Tensor):
        return thing.as_subclass(Cuda)
    return type(thing)([as_cuda(one) for one in thing])


@pytest.fixture
def attend_anywhere():
    """`attend` is that of kernels.py also on a CPU and where nothing is computed."""
    library = torch.library.Library("seq2serve", "IMPL")
    library.impl("attend", kernels.attend, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("name", ["sutskever", "attention", "attention with every option"])
def test_a_step_with_the_kernels_is_a_step_without(emulated, attend_anywhere, name):
    model = build(name)
    source, lengths = sentences(1, 2, 9)
    with torch.no_grad():
        memory = model.encode(source, lengths)
        state = [one.repeat_interleave(2, 0) for one in model.start(memory)]
        previous = torch.tensor([[4, 5], [6, 7]])
        expected = model.step(previous, state, memory)
        attended = memory._replace(attended=as_cuda(memory.attended))
        found = model.step(as_cuda(previous), as_cuda(state), attended)
    assert emulated.launched >= len(model.cells)
    for one, other in zip((found[0], *found[1], found[2]), (expected[0], *expected[1], expected[2]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one.as_subclass(torch.Tensor), other, rtol=1e-9, atol=1e-9)


class Launches(TorchDispatchMode):
    """Counts the operators that are at least a kernel on a GPU: all but those that only look at
    memory in another way, or ask for some."""

    NONE = ("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.partition("::")[2]
        if not (function.is_view or name in self.NONE):
            self.seen[name] += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(("kind", "most"), [("sutskever", 15), ("attention", 20)])
@pytest.mark.parametrize("k", [1, 5])
def test_the_model_of_a_step_is_few_kernels(attend_anywhere, kind, most, k):
    """Four layers in float16; a product may be two kernels where cuBLAS splits it."""
    options = ModelOptions(kind=kind, bidirectional=kind == "attention", encoder_layers=4,
                           decoder_layers=4, embedding_size=32, encoder_hidden_size=32,
                           decoder_hidden_size=32)  # fmt: skip
    model = ServingModel(Network(options, 50, 50), 9, 9).half()
    state = [torch.zeros(3 * k, 32, dtype=torch.half) for _ in range(8)]
    keys = torch.zeros(3, 7, options.attention_size, dtype=torch.half)
    attended = [keys, keys, torch.ones(3, 7, dtype=torch.bool)] if model.has_attention else []
    memory = Memory(as_cuda(attended), [])
    previous = torch.full((3, k), 4)
    with torch.no_grad(), Launches() as launches:
        logits, state, weights = model.step(as_cuda(previous), as_cuda(state), memory)
    assert (logits.shape, logits.dtype) == ((3, k, 50), torch.float32)
    assert weights.shape == (3, k, 7 if model.has_attention else 0)
    assert launches.seen["lstm_pointwise"] == 4
    assert launches.seen["attend"] == model.has_attention
    assert sum(launches.seen.values()) == most, launches.seen


@pytest.mark.parametrize("normalised", [False, True])
def test_choice_and_reordering_are_one_kernel_each(emulated, normalised):
    logits, never, origin = rand(3, 40), torch.tensor([0]), torch.tensor([1, 1, 0])
    with Launches() as launches:
        kernels.choose(logits, never, 4, normalised)
        kernels.gather_rows([logits, logits], origin)
    assert (sum(launches.seen.values()), emulated.launched) == (0, 2)


# Compiling


@pytest.mark.parametrize("backend", ["sm_80", "sm_89", "sm_90"])
def test_a_gpu_s_compiler_takes_them(backend):
    try:
        rtc = next(cuda.nvrtc(major) for major in ("13", "12") if has(major))
    except StopIteration:
        pytest.skip("no NVRTC on this machine (PyPI: nvidia-cuda-nvrtc)")
    binary, names = cuda.compiled(rtc, kernels.SOURCES, kernels.NAMES, backend)
    assert binary[:4] == b"\x7fELF"
    assert list(names) == kernels.NAMES
    assert all(name.encode() in binary for name in names.values())
    with pytest.raises(RuntimeError, match=f"NVRTC for {backend}.*no_such"):
        cuda.compiled(rtc, kernels.SOURCES, ["no_such"], backend)


def has(major):
    try:
        return bool(cuda.nvrtc(major))
    except RuntimeError:
        return False


def test_without_cuda_the_operators_stay_plain(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    device = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="has no CUDA"):
        kernels.compile_for(device)
    assert device not in kernels._loaded
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(RuntimeError, match=r"no CUDA driver|libnvrtc\.so\.99"):
        kernels.compile_for(device)


def test_an_error_of_the_driver_is_told(driver):
    with pytest.raises(RuntimeError, match=r"CUDA: an emulated error \(500\)"):
        Emulated(driver, None, None, CPU, {"no_such": "no_such"})


def test_kernels_stay_within_their_buffers_in_any_order_of_their_threads(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, without torch."""
    program = tmp_path / "check"
    command = [compiler(), "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined",
               "-fno-sanitize-recover=all", "-Wno-unknown-pragmas",
               str(HERE / "kernels_check.cpp"), "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
