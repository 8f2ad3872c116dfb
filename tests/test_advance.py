"""The search of a step on a GPU, without one: search.cu as C++, compared step by step with
static_search.py."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_kernels import CPU, INFINITY, NAN, Launches, driver, emulated  # noqa: F401

from handler.decoding import kernels, static_search
from handler.decoding.columns import Fact

EOS = 3
NAMES = ["facts", "longest", "made", "over", "previous", "scores", "parents", "said",
         "ended scores", "ended sums", "ended made", "ended said"]  # fmt: skip


def stable(self, count, dim=-1):
    """Tensor.topk with an order among equals: as they lie."""
    values, place = self.sort(dim=dim, descending=True, stable=True)
    return values.narrow(dim, 0, count), place.narrow(dim, 0, count)


class Game:
    """Sentences that are searched twice: by the operator on a device, and in plain torch."""

    def __init__(self, k, n, room, seed, device=CPU, equal=False, odd=0.0):
        self.k, self.n, self.room, self.device = k, n, room, device
        self.equal, self.odd, self.kernel = equal, odd, True
        self.random = torch.Generator().manual_seed(seed)
        whole = torch.long
        said = self.draw(99, n, k, room)
        self.plain = [
            torch.zeros(n, len(Fact), dtype=torch.double), torch.ones(n, dtype=whole),
            torch.zeros(n, dtype=whole), torch.ones(n, dtype=torch.bool), self.draw(99, n, k),
            torch.full((n, k), -INFINITY), torch.arange(k).repeat(n, 1), said,
        ]  # fmt: skip
        self.plain[0][:, [Fact.N_BEST, Fact.SCALE]] = 1.0
        if k > 1:
            self.plain += [torch.full((n, k), -INFINITY, dtype=torch.double),
                           torch.full((n, k), -INFINITY), torch.zeros(n, k, dtype=whole),
                           said.flip(0)]  # fmt: skip
        self.board = [one.to(device, copy=True) for one in self.plain]

    def draw(self, most, *shape):
        return torch.randint(0, most, shape, generator=self.random)

    def begin(self, i, made=0):
        """A sentence at place i, which has been made so far already."""
        made = min(made, self.room - 1)
        penalty = [0.0, 1.0] if self.equal else [0.0, 1.0, 0.6, 2.5]
        fact = dict.fromkeys(Fact, 0.0)
        fact |= {Fact.MAY_END: made + int(self.draw(4, 1)),
                 Fact.N_BEST: 1 + int(self.draw(self.k, 1)),
                 Fact.SHIFT: 5, Fact.SCALE: 6, Fact.HOPELESS: -INFINITY,
                 Fact.PENALTY: penalty[int(self.draw(len(penalty), 1))]}  # fmt: skip
        if int(self.draw(2, 1)):
            fact |= {Fact.SHIFT: 0, Fact.SCALE: 1}
        longest = made + 1 + int(self.draw(self.room - made, 1))
        lp = ((fact[Fact.SHIFT] + longest + 1) / fact[Fact.SCALE]) ** fact[Fact.PENALTY]
        fact[Fact.MAX_NORMALISER] = lp
        said = self.draw(99, self.k, self.room)
        for table in (self.plain, self.board):
            table[0][i] = torch.tensor([float(fact[one]) for one in Fact])
            table[1][i], table[2][i], table[3][i] = longest, made, False
            table[5][i], table[5][i, 1:], table[7][i] = 0.0, -INFINITY, said
            if self.k > 1:
                table[8][i] = -INFINITY

    def offered(self, vocabulary):
        """What a model says, as `choose` leaves it."""
        logits = torch.randn(self.n * self.k, vocabulary, generator=self.random) * 2
        if self.equal:
            logits = logits.round()
        logits[:, EOS] += torch.randn(self.n * self.k, generator=self.random)
        for what in (NAN, INFINITY, -INFINITY, -INFINITY):
            odd = torch.rand(logits.shape, generator=self.random) < self.odd / vocabulary
            logits = logits.masked_fill(odd, what)
        count = min(2 if self.k == 1 else 2 * self.k + 1, vocabulary)
        values, tokens, normaliser = kernels.plain_choose(logits, torch.tensor([0]), count, True)
        if self.equal:  # what is added up stays equal where it was
            normaliser = normaliser.round()
        return values, tokens, normaliser

    def step(self, vocabulary=9, advance=kernels.advance):
        offered = self.offered(vocabulary)
        before = [one.cpu().clone() for one in self.board]
        there = [one.to(self.device) for one in offered]
        with mock.patch.object(torch.Tensor, "topk", stable):
            static_search.advance(*offered, EOS, self.plain)
            advance(*there, EOS, self.board)
        self.compare(before)

    def compare(self, before):
        over, made = before[3], self.plain[2]
        for name, plain, mine, old in zip(NAMES, self.plain, self.board, before):
            mine = mine.cpu()
            if name in ("facts", "ended scores"):  # of two `pow`
                torch.testing.assert_close(mine[~over], plain[~over], rtol=1e-13, atol=0)
            elif "said" not in name:
                assert same(mine[~over], plain[~over]), (name, mine, plain)
            if name == "parents":
                old = torch.arange(self.k).expand_as(old)
            if self.kernel:  # plain torch writes where nobody reads
                assert same(mine[over], old[over]), name
        for i in (~over).nonzero().flatten().tolist():
            assert same(self.board[7][i, :, : made[i]].cpu(), self.plain[7][i, :, : made[i]])
            for j in range(self.k if self.k > 1 else 0):
                if self.plain[8][i, j] > -INFINITY:
                    length = self.plain[10][i, j]
                    mine = self.board[11][i, j, :length].cpu()
                    assert same(mine, self.plain[11][i, j, :length])


def same(mine, plain):
    if not mine.is_floating_point():
        return torch.equal(mine, plain)
    return torch.equal(mine.isnan(), plain.isnan()) and torch.equal(
        mine.nan_to_num(7.0, INFINITY, -INFINITY), plain.nan_to_num(7.0, INFINITY, -INFINITY)
    )


def games(test):
    """Of any size, equal scores and odd ones among them."""
    test = given(
        k=st.integers(1, 8), n=st.integers(1, 3), room=st.integers(1, 12),
        vocabulary=st.sampled_from([5, 9, 30]), equal=st.booleans(),
        odd=st.sampled_from([0.0, 0.0, 0.2]), seed=st.integers(0, 2**31),
    )(test)  # fmt: skip
    test = example(k=4, n=2, room=12, vocabulary=30, equal=True, odd=0.0, seed=1)(test)
    return example(k=1, n=3, room=12, vocabulary=9, equal=False, odd=0.2, seed=2)(test)


@games
@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@pytest.mark.usefixtures("emulated")
def test_a_search_is_that_of_plain_torch(k, n, room, vocabulary, equal, odd, seed):
    """Sentences that begin and end at different times, with places that nobody has."""
    game = Game(k, n, room, seed, equal=equal, odd=odd)
    for _ in range(12):
        for i in range(n):
            if game.plain[3][i] and int(game.draw(3, 1)):
                game.begin(i, int(game.draw(room, 1)) * int(game.draw(2, 1)))
        game.step(vocabulary)


@pytest.mark.parametrize(("k", "room"), [(64, 150), (17, 300), (33, 20), (3, 3000), (1, 3000)])
@pytest.mark.usefixtures("emulated")
def test_wide_beams_and_long_sentences(k, room):
    game = Game(k, 1, room, seed=k)
    game.begin(0, room - 4)
    game.plain[1][:] = game.board[1][:] = room
    for _ in range(4):
        game.step(3 * k + 5)


@pytest.mark.usefixtures("emulated")
def test_sentences_that_are_not_finite_end():
    for k in (1, 3):
        for what, rows, bad in [(NAN, k, 1), (INFINITY, 1, 1), (-INFINITY, k, 12)]:
            game = Game(k, 2, 9, seed=5)
            game.begin(0)
            game.begin(1)
            game.plain[1][:] = game.board[1][:] = 9
            values = torch.randn(2 * k, 2 * k + 1 if k > 1 else 2).sort(1, descending=True).values
            values[:rows, :bad] = what
            tokens = torch.arange(4, 5 + 2 * k).repeat(2 * k, 1)[:, : values.size(1)]
            normaliser = torch.zeros(2 * k)
            offered = values, tokens, normaliser
            with mock.patch.object(game, "offered", lambda _, given=offered: given):
                game.step()
            assert game.board[3].tolist() == [True, False]


@pytest.mark.parametrize("k", [1, 4])
def test_a_search_is_one_kernel(emulated, k):  # noqa: F811
    game = Game(k, 130, 5, seed=1)
    for i in range(130):
        game.begin(i)
    offered = game.offered(9)
    before = [one.clone() for one in game.board]
    with Launches() as launches:
        kernels.advance(*offered, EOS, game.board)
    assert (sum(launches.seen.values()), emulated.launched) == (0, 1)
    with mock.patch.object(torch.Tensor, "topk", stable):
        static_search.advance(*offered, EOS, game.plain)
    game.compare(before)


@pytest.mark.parametrize("k", [1, 2])
def test_what_the_kernel_does_not_know_is_plain(emulated, k):  # noqa: F811
    game = Game(k, 2, 5, seed=1)
    game.begin(0)
    game.kernel = False
    game.plain[5], game.board[5] = game.plain[5].double(), game.board[5].double()
    game.step()
    apart = torch.zeros(2, k, 10, dtype=torch.long)[:, :, ::2]
    game.plain[5], game.board[5] = game.plain[5].float(), game.board[5].float()
    game.board[7] = apart.copy_(game.board[7])
    game.step()
    assert emulated.launched == 0


@pytest.mark.parametrize("k", [1, 4])
def test_on_a_cpu_it_is_plain_torch(k):
    game = Game(k, 2, 5, seed=1)
    game.begin(1)
    game.kernel = False
    for _ in range(5):
        game.step(advance=torch.ops.seq2serve.advance)
