"""What a network is made of."""

from dataclasses import dataclass, field
from typing import Literal

SIZE = {"minimum": 1, "maximum": 65536}
FRACTION = {"minimum": 0.0, "maximum": 0.9}


@dataclass(frozen=True)
class ModelOptions:
    """Sizes and switches of a network; `kind` decides which combinations make sense.

    `sutskever` is the model of arXiv 1409.3215: deep one-directional LSTMs on both sides, the
    decoder started from the encoder's last state layer by layer, the source read backwards.
    `attention` adds a bidirectional encoder, a learned bridge and attention without input
    feeding, so that the decoder's recurrence never waits for the attention.

    embedding_dropout, output_dropout: of embeddings and of what the generator reads; null for
        `dropout`, which is between layers (Zaremba et al. 2014, arXiv 1409.2329, section 3.1).
    recurrent_dropout: see `LSTMStack`. word_dropout, variational_dropout: see `model/dropout.py`.
    residual: around layers whose input is as wide as their output (Wu et al. 2016, arXiv
        1609.08144, section 3.1).
    tie_embeddings: target embeddings are the generator's weights, `all`: the source's too (Press
        and Wolf 2017, arXiv 1608.05859).
    init_range: of `uniform`, in which weights begin (arXiv 1409.3215, section 3.4).

    Raises:
        ValueError: a combination that cannot work; the message names the fields.
    """

    kind: Literal["sutskever", "attention"] = "attention"
    embedding_size: int = field(default=256, metadata=SIZE)
    encoder_layers: int = field(default=1, metadata={"minimum": 1, "maximum": 32})
    encoder_hidden_size: int = field(default=256, metadata=SIZE)  # of each direction
    bidirectional: bool = True
    decoder_layers: int = field(default=1, metadata={"minimum": 1, "maximum": 32})
    decoder_hidden_size: int = field(default=256, metadata=SIZE)
    attention: Literal["dot", "additive"] = "dot"
    attention_size: int = field(default=256, metadata=SIZE)  # of all heads together
    attention_heads: int = field(default=1, metadata={"minimum": 1, "maximum": 64})
    reverse_source: bool = False
    dropout: float = field(default=0.0, metadata=FRACTION)
    embedding_dropout: float | None = field(default=None, metadata=FRACTION)
    output_dropout: float | None = field(default=None, metadata=FRACTION)
    recurrent_dropout: float = field(default=0.0, metadata=FRACTION)
    word_dropout: float = field(default=0.0, metadata=FRACTION)
    variational_dropout: bool = False
    layer_norm: bool = False
    residual: bool = False
    tie_embeddings: Literal["none", "decoder", "all"] = "none"
    initialisation: Literal["glorot", "uniform"] = "glorot"
    init_range: float = field(default=0.08, metadata={"minimum": 0.0001, "maximum": 1.0})

    def __post_init__(self) -> None:
        if self.kind == "sutskever":
            if self.bidirectional:
                raise ValueError("bidirectional: got true; kind 'sutskever' allows only false")
            if (self.encoder_layers, self.encoder_hidden_size) != (
                self.decoder_layers,
                self.decoder_hidden_size,
            ):
                raise ValueError(
                    "encoder_layers, encoder_hidden_size: got "
                    f"{self.encoder_layers} x {self.encoder_hidden_size}; kind 'sutskever' hands "
                    "the encoder's last state to the decoder as it is and needs the decoder's "
                    f"{self.decoder_layers} x {self.decoder_hidden_size}"
                )
        if self.attention_size % self.attention_heads:
            raise ValueError(
                f"attention_heads: got {self.attention_heads}; allowed: a divisor of "
                f"attention_size, {self.attention_size}"
            )
        if self.tie_embeddings != "none" and self.feature_size != self.embedding_size:
            raise ValueError(
                f"tie_embeddings: got {self.tie_embeddings!r} with embedding_size "
                f"{self.embedding_size} and decoder_hidden_size {self.decoder_hidden_size}; "
                "kind 'sutskever' can tie only where the two are equal"
            )

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def feature_size(self) -> int:
        """Width of what the generator reads: the decoder's own state, or the readout of
        attention, which is as wide as an embedding so that the two may be tied."""
        return self.embedding_size if self.kind == "attention" else self.decoder_hidden_size
