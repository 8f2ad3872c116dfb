"""The encoder-decoder as it is trained: whole sequences in, logits of every position out."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model.blocks import BlockLinear
from model.dropout import Dropout, WordDropout
from model.lstm import LSTMStack
from model.options import ModelOptions

PAD = 0  # id of padding, in every vocabulary


class Embedded(nn.Module):
    """What learning drops of embeddings [N, steps, E]: whole words, then elements."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.words = WordDropout(options.word_dropout)
        self.elements = Dropout(
            or_else(options.embedding_dropout, options.dropout), options.variational_dropout
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.elements(self.words(x))


def or_else(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def between_layers(options: ModelOptions) -> dict[str, Any]:
    """The arguments of `LSTMStack` that are the same on both sides."""
    return {
        "dropout": options.dropout,
        "variational": options.variational_dropout,
        "recurrent_dropout": options.recurrent_dropout,
        "residual": options.residual,
        "layer_norm": options.layer_norm,
    }


class Encoder(nn.Module):
    """h_t = RNN(emb(x_t), h_{t-1}), h_0 = 0; optionally over the reversed source, or both ways."""

    def __init__(self, options: ModelOptions, vocabulary: int) -> None:
        super().__init__()
        self.reverse = options.reverse_source
        self.embedding = nn.Embedding(vocabulary, options.embedding_size, padding_idx=PAD)
        self.embedded = Embedded(options)
        self.stack = LSTMStack(
            options.embedding_size,
            options.encoder_hidden_size,
            options.encoder_layers,
            bidirectional=options.bidirectional,
            **between_layers(options),
        )

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
            source: int64 [N, S], padded with 0.
            lengths: int64 [N], each 1..S.

        Returns:
            Outputs [N, S, directions*H], in the order of reading; the last states of all layers,
            h and c, each [N, L*directions*H].
        """
        if self.reverse:
            source = reversed_within(source, lengths)
        x = self.embedded(self.embedding(source))  # [N, S, E]
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, h, c = self.stack(packed, None, None)
        y, _ = pad_packed_sequence(output, batch_first=True, total_length=source.size(1))
        return y, h.transpose(0, 1).flatten(1), c.transpose(0, 1).flatten(1)


def reversed_within(x: Tensor, lengths: Tensor) -> Tensor:
    """Each row of x [N, S, ...] read backwards within its length (1409.3215, section 3.3)."""
    place = torch.arange(x.size(1), device=x.device)  # [S]
    mirrored = lengths.unsqueeze(1) - 1 - place  # [N, S], negative in the padding
    index = torch.where(mirrored < 0, place, mirrored)
    for _ in range(x.dim() - 2):
        index = index.unsqueeze(-1)
    return x.gather(1, index.expand_as(x))


class Bridge(nn.Module):
    """The decoder's first state from the encoder's last, whatever their depths and widths."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.layers = options.decoder_layers
        last = options.encoder_layers * options.directions * options.encoder_hidden_size
        first = options.decoder_layers * options.decoder_hidden_size
        self.learned = options.kind == "attention"
        self.h = BlockLinear(last, first) if self.learned else nn.Identity()
        self.c = BlockLinear(last, first) if self.learned else nn.Identity()

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """[N, L_enc*directions*H_enc] twice -> h_0 and c_0 [N, L, H] of the decoder."""
        h, c = self.h(h), self.c(c)
        if self.learned:
            h = torch.tanh(h)
        return h.view(h.size(0), self.layers, -1), c.view(c.size(0), self.layers, -1)


class Attention(nn.Module):
    """Attention of decoder states over the encoder's outputs, and the readout of Luong et al. 2015
    (arXiv 1508.04025, equation 5), which is not fed back: the decoder never waits for it.

    dot: scores are query . key / sqrt(A / heads) (equation 8, 'general'; the scale is 1706.03762's)
    additive: scores are v . tanh(query + key) (Bahdanau et al. 2015, arXiv 1409.0473, A.1.2)
    heads: as many attentions of A / heads each, side by side (1706.03762, section 3.2.2)
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        memory = options.directions * options.encoder_hidden_size
        self.heads = options.attention_heads
        head = options.attention_size // options.attention_heads
        additive = options.attention == "additive"
        self.scale = 1.0 if additive else head**-0.5
        self.score = nn.Parameter(torch.empty(self.heads, head)) if additive else None
        self.key = BlockLinear(memory, options.attention_size, bias=False)
        self.value = BlockLinear(memory, options.attention_size, bias=False)
        self.query = BlockLinear(options.decoder_hidden_size, options.attention_size, bias=False)
        self.readout = BlockLinear(
            options.decoder_hidden_size + options.attention_size, options.feature_size
        )

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """h [N, K, H], keys and values [N, S, A], mask bool [N, S] -> features [N, K, E]."""
        query = self.query(h) * self.scale
        with torch.autocast("cpu", enabled=False):  # small, and of ever new shapes
            context, _ = attend(query, keys, values, mask, self.heads, self.score)
        return torch.tanh(self.readout(torch.cat([h, context], 2)))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, score: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries [N, K, A], keys and values [N, S, A], mask bool [N, S], and for additive attention
    v [heads, A / heads] -> context [N, K, A] and the mean over heads of the weights that made it,
    [N, K, S], which sum to 1 and are 0 where the mask is false."""
    n, k, s = query.size(0), query.size(1), keys.size(1)
    if heads > 1:
        query = query.view(n, k, heads, -1).transpose(1, 2)  # [N, heads, K, A/heads]
        keys = keys.view(n, s, heads, -1).transpose(1, 2)  # [N, heads, S, A/heads]
        values = values.view(n, s, heads, -1).transpose(1, 2)
        mask = mask.view(n, 1, 1, s)
    else:
        mask = mask.view(n, 1, s)
    if score is None:
        scores = torch.matmul(query, keys.transpose(-1, -2))  # [N, (heads,) K, S]
    else:
        energy = torch.tanh(query.unsqueeze(-2) + keys.unsqueeze(-3))  # [N, (heads,) K, S, A/heads]
        v = score.view(heads, 1, -1, 1) if heads > 1 else score.view(-1, 1)
        scores = torch.matmul(energy, v.to(energy.dtype)).squeeze(-1)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    context = torch.matmul(weights, values)
    if heads > 1:
        return context.transpose(1, 2).reshape(n, k, -1), weights.mean(1)
    return context, weights


class Network(nn.Module):
    """Encoder, bridge, decoder, attention (where the kind has it) and generator.

    Args:
        options: sizes and switches.
        source_vocabulary, target_vocabulary: V of each side, padding (id 0) included.
    """

    def __init__(
        self, options: ModelOptions, source_vocabulary: int, target_vocabulary: int
    ) -> None:
        super().__init__()
        self.options = options
        self.encoder = Encoder(options, source_vocabulary)
        self.bridge = Bridge(options)
        self.embedding = nn.Embedding(target_vocabulary, options.embedding_size, padding_idx=PAD)
        self.embedded = Embedded(options)
        self.decoder = LSTMStack(
            options.embedding_size,
            options.decoder_hidden_size,
            options.decoder_layers,
            bidirectional=False,
            **between_layers(options),
        )
        self.attention = Attention(options) if options.kind == "attention" else None
        self.dropout = Dropout(options.dropout, options.variational_dropout)
        self.output_dropout = Dropout(
            or_else(options.output_dropout, options.dropout), options.variational_dropout
        )
        self.generator = nn.Linear(options.feature_size, target_vocabulary)
        self.initialise()
        if options.tie_embeddings != "none":
            self.generator.weight = self.embedding.weight
        if options.tie_embeddings == "all":
            if source_vocabulary != target_vocabulary:
                raise ValueError(
                    "tie_embeddings: got 'all' with vocabularies of "
                    f"{source_vocabulary} and {target_vocabulary}; it needs a joint vocabulary"
                )
            self.encoder.embedding.weight = self.embedding.weight

    def initialise(self) -> None:
        """First weights, by `options.initialisation`; layer normalisation starts as identity.

        uniform: everything from U(-r, r), r = init_range (1409.3215, section 3.4).
        glorot: matrices from U(-r, r), r = sqrt(6 / (fan in + fan out)), gate by gate (Glorot and
            Bengio 2010, equation 16); embeddings from N(0, 1/E); biases 0, but 1 for the forget
            gate (Jozefowicz et al. 2015, section 2.2). Small networks start to learn only so.
        """
        r = self.options.init_range
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.LayerNorm):
                    continue
                if self.options.initialisation == "uniform":
                    nn.init.uniform_(parameter, -r, r)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
                elif parameter.dim() == 1:
                    nn.init.zeros_(parameter)
                    if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                        nn.init.ones_(parameter.data.chunk(4)[1])  # gates: i, f, g, o
                else:
                    for gate in parameter.data.chunk(4 if isinstance(module, nn.LSTM) else 1):
                        nn.init.xavier_uniform_(gate)
            if isinstance(module, nn.Embedding):
                nn.init.zeros_(module.weight[PAD])

    def features(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """What the generator reads at each target position [N, T, feature size].

        The generator is left to the caller, who need not pay for it at padded positions.

        Args:
            source: int64 [N, S]; target: int64 [N, T], beginning with BOS; both padded with 0.
            source_lengths, target_lengths: int64 [N], each at least 1.
        """
        memory, h, c = self.encoder(source, source_lengths)
        h0, c0 = self.bridge(h, c)  # [N, L, H]
        x = self.embedded(self.embedding(target))  # [N, T, E]
        packed = pack_padded_sequence(
            x, target_lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        output, _, _ = self.decoder(
            packed, h0.transpose(0, 1).contiguous(), c0.transpose(0, 1).contiguous()
        )
        y, _ = pad_packed_sequence(output, batch_first=True, total_length=target.size(1))
        if self.attention is not None:
            keys, values = self.attention.key(memory), self.attention.value(memory)
            y = self.attention(self.dropout(y), keys, values, positions(source, source_lengths))
        return self.output_dropout(y)

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Logits of the token after each target position, float [N, T, V]; see `features`."""
        return self.generator(self.features(source, source_lengths, target, target_lengths))


def positions(padded: Tensor, lengths: Tensor) -> Tensor:
    """bool [N, S]: true where a row of `padded` [N, S] is within its length."""
    return torch.arange(padded.size(1), device=padded.device) < lengths.unsqueeze(1)
