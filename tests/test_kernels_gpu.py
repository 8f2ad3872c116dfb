"""What only a GPU can show of the kernels: they compile, and compute what a CPU does."""

import pytest
import torch
from test_advance import Game
from test_kernels import INFINITY, NAN, TYPES, attention, close, rand, same_bits

from handler.decoding import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def device():
    one = torch.device("cuda", 0)
    assert kernels.compile_for(one) < 60
    assert kernels.compile_for(one) < 0.1
    return one


def on(device, given):
    return [one.to(device) if isinstance(one, torch.Tensor) else one for one in given]


def cases(dtype):
    """Each operator, its form in plain torch and what to give it; several rows."""
    gates = rand(9, 4 * 300, dtype=dtype, scale=3)
    pointwise = (gates, gates.flip(0), rand(1200, dtype=dtype), rand(9, 300, dtype=dtype))
    yield "lstm_pointwise", kernels.plain_lstm_pointwise, pointwise
    for width, heads in ((512, 1), (64, 4), (30, 2), (2200, 1)):
        query, *memory = attention(dtype, 9, 3, 37, width)
        query = query * (width // heads) ** -0.5
        yield "attend", kernels.plain_attend, (query, *memory, heads)
    for vocabulary, count in ((31, 20), (32_001, 1), (50_000, 129)):
        logits = rand(9, vocabulary, dtype=dtype, scale=4)
        logits[1], logits[2], logits[3, 7] = -INFINITY, 0, NAN
        logits[4, torch.arange(vocabulary) % kernels.THREADS < 20] += 100  # more than are kept
        yield "choose", kernels.plain_choose, (logits, torch.tensor([0, 1, 2]), count, True)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_gpu_computes_what_a_cpu_does(device, dtype):
    """Also in a graph, and each row as it is alone."""
    for name, plain, given in cases(dtype):
        operator = getattr(torch.ops.seq2serve, name)
        there = on(device, given)
        found = operator(*there)
        wide = given if name == "choose" or dtype.itemsize > 2 else [
            one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
            for one in given
        ]  # fmt: skip
        for one, other in zip(found, plain(*wide)):
            close(one.cpu(), other.to(one.dtype), 2e-5)
        shared = {"lstm_pointwise": [2], "choose": [1]}.get(name, [])
        for row in (0, 8):
            alone = operator(*(
                one[row : row + 1]
                if isinstance(one, torch.Tensor) and i not in shared else one
                for i, one in enumerate(there)
            ))  # fmt: skip
            assert all(same_bits(one, other[row : row + 1]) for one, other in zip(alone, found))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = operator(*there)
        graph.replay()
        assert all(same_bits(one, other) for one, other in zip(recorded, found))


def test_a_gpu_gathers_rows(device):
    tables = [rand(6, 8), rand(6, 5, dtype=torch.float16), rand(6, 3) > 0, rand(6, 1024)]
    origin = torch.tensor([5, 0, 0, 3, 2, 5, 1, 4])
    found = torch.ops.seq2serve.gather_rows(on(device, tables), origin.to(device))
    for one, table in zip(found, tables, strict=True):
        assert torch.equal(one.cpu(), table[origin])


@pytest.mark.parametrize(("k", "room"), [(1, 12), (2, 12), (5, 40), (17, 400), (64, 150)])
def test_a_gpu_searches_as_a_cpu_does(device, k, room):
    """Step by step, the later ones from a graph."""
    game = Game(k, 9, room, seed=k, device=device, odd=0.1)
    game.step(3 * k + 5)
    offered = on(device, game.offered(3 * k + 5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.seq2serve.advance(*offered, 3, game.board)

    def replayed(*given):
        for one, new in zip(offered, given):
            one.copy_(new)
        graph.replay()

    for _ in range(12):
        for i in range(game.n):
            if game.plain[3][i] and int(game.draw(3, 1)):
                game.begin(i, int(game.draw(room, 1)))
        game.step(3 * k + 5, replayed)
