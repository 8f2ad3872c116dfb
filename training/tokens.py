"""Token pairs: written as they come, read from disk as they are needed.

A token file is, in the numbers of the machine that wrote it:

    int64 [4]                 MAGIC, N, tokens of all sources, tokens of all targets
    int64 [N + 1], [N + 1]    where each source begins, and each target; where the last ends
    int32 [...], [...]        all sources, back to back; all targets
"""

import itertools
import mmap
import shutil
import warnings
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from model import SpecialTokens
from training.corpus import CorpusError
from training.run import write_atomically

MAGIC = int.from_bytes(b"tokens 1", "little")
HEADER = 4  # numbers
CHUNK = 10_000  # pairs held while writing

IdPair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """N sentence pairs as token ids, back to back. Pair i is tokens[offsets[i] : offsets[i+1]].

    Every source ends with EOS, as the encoder reads it. Targets have neither BOS nor EOS:
    `collate` gives each the one that its use needs.
    """

    source_tokens: Tensor  # int32 [all source tokens]
    source_offsets: Tensor  # int64 [N + 1]
    target_tokens: Tensor  # int32 [all target tokens]
    target_offsets: Tensor  # int64 [N + 1]

    @classmethod
    def of(cls, pairs: Iterable[IdPair], special: SpecialTokens) -> "TokenPairs":
        """In memory, from ids as a tokenizer gives them, without BOS and EOS."""
        source, target = array("i"), array("i")
        source_offsets, target_offsets = array("q", [0]), array("q", [0])
        for source_ids, target_ids in pairs:
            source.extend(source_ids)
            source.append(special.eos)
            target.extend(target_ids)
            source_offsets.append(len(source))
            target_offsets.append(len(target))
        return cls(*map(tensor_of, (source, source_offsets, target, target_offsets)))

    @staticmethod
    def write(path: Path, pairs: Iterable[IdPair], special: SpecialTokens) -> int:
        """Writes what `of` would give as one file, whole or not at all; returns N.

        Holds 8 bytes of each pair in memory, and once, at the end, 16 more.
        """
        remaining = iter(pairs)
        source_lengths, target_lengths = array("i"), array("i")

        def assemble(temporary: Path) -> None:
            # These have no names, so that nothing is left of them, however writing ends.
            with (
                TemporaryFile(dir=path.parent) as source,
                TemporaryFile(dir=path.parent) as target,
                temporary.open("wb") as file,
            ):
                while chunk := list(itertools.islice(remaining, CHUNK)):
                    part = TokenPairs.of(chunk, special)
                    source.write(part.source_tokens.numpy().data)
                    target.write(part.target_tokens.numpy().data)
                    source_lengths.extend(part.source_offsets.diff().tolist())
                    target_lengths.extend(part.target_offsets.diff().tolist())
                offsets = [offsets_of(one) for one in (source_lengths, target_lengths)]
                totals = [int(one[-1]) for one in offsets]
                file.write(array("q", [MAGIC, len(source_lengths), *totals]))
                for one in offsets:
                    file.write(one.numpy().data)
                for side in (source, target):
                    side.seek(0)
                    shutil.copyfileobj(side, file, 1 << 20)

        write_atomically(path, assemble)
        return len(source_lengths)

    @classmethod
    def load(cls, path: Path) -> "TokenPairs":
        """From a file that `write` wrote. Its pages are read as they are needed, and may be
        forgotten again by the system, so it can be larger than memory. Nothing may write to these
        tensors.

        Raises:
            CorpusError: no such file, not a token file, one that is cut off, or offsets that do
                not fit its tokens.
        """
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CorpusError(f"{path}: no such token file; run prepare first") from None
        except OSError as error:
            raise CorpusError(
                f"{path}: cannot be read: {error.strerror}; run prepare again"
            ) from None
        except ValueError:  # an empty file cannot be mapped
            raise CorpusError(f"{path}: not a token file; run prepare again") from None
        with warnings.catch_warnings():  # torch warns of memory that cannot be written
            warnings.simplefilter("ignore")
            content = torch.frombuffer(mapped, dtype=torch.uint8)
        pairs = cls(*sections(content, path))
        pairs.check(path)
        return pairs

    def check(self, path: Path) -> None:
        """Raises CorpusError where offsets do not fit the tokens."""
        for side, tokens, offsets in (
            ("source", self.source_tokens, self.source_offsets),
            ("target", self.target_tokens, self.target_offsets),
        ):
            if not (
                offsets[0] == 0
                and offsets[-1] == len(tokens)
                and bool((offsets[1:] >= offsets[:-1]).all())
            ):
                raise CorpusError(
                    f"{path}: the {side} offsets do not fit its {len(tokens)} {side} tokens; run "
                    "prepare again"
                )

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    def source(self, i: int) -> list[int]:
        """The ids of source i, EOS included."""
        return self.source_tokens[slice(*self.source_offsets[i : i + 2].tolist())].tolist()

    def target(self, i: int) -> list[int]:
        """The ids of target i, without BOS and EOS."""
        return self.target_tokens[slice(*self.target_offsets[i : i + 2].tolist())].tolist()

    def source_lengths(self) -> Tensor:
        """int64 [N], EOS included."""
        return self.source_offsets.diff()

    def target_lengths(self) -> Tensor:
        """int64 [N], counting EOS (or BOS), as the decoder is run for it."""
        return self.target_offsets.diff() + 1


def sections(content: Tensor, path: Path) -> list[Tensor]:
    """The fields of `TokenPairs`, in their order, in the bytes of a file, uint8.

    Raises:
        CorpusError: bytes that are no token file, or more or fewer than its header tells.
    """
    header = content[: 8 * HEADER]
    if len(header) < 8 * HEADER or int(header.view(torch.int64)[0]) != MAGIC:
        raise CorpusError(f"{path}: not a token file; run prepare again")
    count, source, target = header.view(torch.int64)[1:].tolist()
    sizes = [8 * HEADER, 8 * (count + 1), 8 * (count + 1), 4 * source, 4 * target]
    if min(count, source, target) < 0 or sum(sizes) != len(content):
        raise CorpusError(
            f"{path}: cut off or damaged: got {len(content)} bytes; allowed: {sum(sizes)}, as it "
            "tells itself; run prepare again"
        )
    _, source_offsets, target_offsets, source_tokens, target_tokens = content.split(sizes)
    return [
        source_tokens.view(torch.int32),
        source_offsets.view(torch.int64),
        target_tokens.view(torch.int32),
        target_offsets.view(torch.int64),
    ]


def offsets_of(lengths: "array[int]") -> Tensor:
    """int64 [N + 1]: where each of N sequences begins, and the last ends."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(tensor_of(lengths), 0, out=offsets[1:])
    return offsets


def tensor_of(values: "array[int]") -> Tensor:
    """The same numbers in the same memory."""
    dtype = torch.int32 if values.typecode == "i" else torch.int64
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
