"""Text to token ids and back, with a SentencePiece model (arXiv 1808.06226)."""

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from handler.blank import SIGN, SPACE, blank


class Tokenizer:
    """One vocabulary. Ids 0 to 3 are padding, unknown, BOS and EOS in every vocabulary.

    Reading is all it does, so one instance may serve several threads.

    Args:
        model: a SentencePiece model: its bytes, or the path of its file.

    Raises:
        ValueError: no such file, not a SentencePiece model, or other special ids.
    """

    PAD, UNK, BOS, EOS = 0, 1, 2, 3

    def __init__(self, model: bytes | str | os.PathLike[str]) -> None:
        name, content = "the tokenizer", model
        if not isinstance(content, bytes):
            name = os.fspath(content)
            try:
                content = Path(content).read_bytes()
            except OSError as error:
                raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
        if not content:  # SentencePiece would take it, and log an error at every call
            raise ValueError(f"{name}: is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(f"{name}: not a SentencePiece model") from None
        p = self._processor
        ids = p.pad_id(), p.unk_id(), p.bos_id(), p.eos_id()
        if ids != (self.PAD, self.UNK, self.BOS, self.EOS):
            raise ValueError(
                f"{name}: ids of padding, unknown, BOS and EOS: got {ids}; allowed: (0, 1, 2, 3)"
            )

    @property
    def size(self) -> int:
        """Pieces in the vocabulary, special ones included; ids are 0 to size - 1."""
        return int(self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS; none where nothing in it can be seen, or where it
        normalises to nothing. White space at both ends is no part of it.

        Raises:
            ValueError: `text` is no Unicode text: it has a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} is a lone surrogate, U+{ord(text[error.start]):04X}; "
                "allowed: Unicode text"
            ) from None
        return [] if blank(text) else list(self._processor.encode(text.strip(SPACE)))

    def normalised(self, text: str) -> str:
        """What `encode` reads of `text`, and so all that can be decoded again: normalised as this
        vocabulary was learnt, which may change nothing."""
        read = str(self._processor.normalize(text.strip(SPACE)))
        return read.replace(SIGN, " ").lstrip(" ")

    def sample(self, ids: list[int], alpha: float) -> list[int]:
        """The ids of the text of `ids`, cut into pieces at random: by a unigram model among all
        segmentations, `alpha` being the exponent of their probabilities (Kudo 2018, equation 9);
        by BPE, leaving each merge out with probability `alpha`. Draws from SentencePiece's one
        random generator: not for several threads at once.
        """
        p = self._processor
        return list(
            p.encode(p.decode(ids), enable_sampling=True, alpha=alpha, nbest_size=-1)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without spaces before it; padding, BOS and EOS are skipped wherever
        they are, and byte pieces that form no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        skipped = (self.PAD, self.BOS, self.EOS)
        said = [i for i in self._known(ids) if i not in skipped]
        return str(self._processor.decode(said)).lstrip(" ")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id; U+2581 stands for a space, <0xE4> for a byte.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        return list(self._processor.id_to_piece(self._known(ids)))

    def settled(self, ids: list[int]) -> int:
        """How many ids at the beginning of `ids` have a text that no further id can change: all
        but bytes at the end that do not form a whole character yet.

        Law: for any ids and n, decode(ids[: settled(ids[:n])]) is a beginning of decode(ids).
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        bytes_from = len(ids)
        while bytes_from and self._processor.is_byte(ids[bytes_from - 1]):
            bytes_from -= 1
        for piece in self.pieces(ids[bytes_from:]):
            decoder.decode(bytes([int(piece[3:-1], 16)]))  # <0xE4>
        pending, _ = decoder.getstate()
        return len(ids) - len(pending)

    def _known(self, ids: Iterable[int]) -> list[int]:
        known = list(ids)
        if known and not (min(known) >= 0 and max(known) < self.size):
            wrong = next(i for i in known if not 0 <= i < self.size)
            raise ValueError(f"token id: got {wrong}; allowed: 0 to {self.size - 1}")
        return known
