"""Which target tokens a sentence may need: a few common ones, and those that its source tokens may
become. A generator then multiplies by a few hundred channels in place of the vocabulary.

A sentence's candidates are its own, so what it becomes does not depend on its neighbours.
"""

import torch
from torch import Tensor, nn


class Shortlist(nn.Module):
    """Args:
        lexicon: int [V source, C]: what each source token may become, filled up with 0.
        common: ids that every sentence may need, EOS among them.
        vocabulary: target tokens, V.

    Raises:
        ValueError: ids that are no target tokens; 0 is none, but padding.
    """

    def __init__(self, lexicon: Tensor, common: Tensor, vocabulary: int) -> None:
        super().__init__()
        common = common.unique()
        for ids in (lexicon.flatten(), common):
            if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
                raise ValueError(
                    f"shortlist: allowed: ids from 0 to {vocabulary - 1}, at least one"
                )
        if int(common[0]) == 0:
            raise ValueError("shortlist: got 0 among the common ids; allowed: not padding")
        self.vocabulary = vocabulary
        others = lexicon.masked_fill(torch.isin(lexicon, common), 0)
        self.register_buffer("lexicon", others.to(torch.int32))
        self.register_buffer("common", common.to(torch.int32))

    lexicon: Tensor  # int32 [V source, C], without the common ones
    common: Tensor  # int32 [F], ascending

    def forward(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The candidates of N sentences beside the common ones, ascending, then zeros.

        They have the shape of attended memory, int32 [N, S, C], so that they travel as that: a
        sentence of n tokens has at most n * C, which are all in its first n rows.
        """
        n, s = source.size(0), source.size(1)
        padding = torch.arange(s, device=source.device) >= lengths.unsqueeze(1)
        found = self.lexicon[source].masked_fill(padding.unsqueeze(2), 0).flatten(1)  # [N, S*C]
        found = found.sort(1).values
        found[:, 1:].masked_fill_(found[:, 1:] == found[:, :-1], 0)
        # Zeros go last: behind every id.
        found = found.masked_fill(found == 0, self.vocabulary).sort(1).values
        return found.masked_fill(found == self.vocabulary, 0).view(n, s, -1)

    @torch.jit.export
    def allowed(self, candidates: Tensor) -> Tensor:
        """bool [N, V]: which tokens are candidates [N, S, C] or common."""
        n = candidates.size(0)
        among = torch.zeros([n, self.vocabulary], dtype=torch.bool, device=candidates.device)
        among.scatter_(1, candidates.flatten(1).long(), True)
        among.index_fill_(1, self.common.long(), True)
        among[:, :1].fill_(False)
        return among
