"""Learns the vocabularies of both sides with SentencePiece (arXiv 1808.06226)."""

import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from handler.tokenizer import Tokenizer
from training.corpus import CorpusError
from training.recipe import TokenizerOptions
from training.run import write_bytes

ERRORS_ONLY = 2
SAMPLED_LINES = 2_000_000  # memory and time grow with the text, the vocabulary hardly changes
LONGEST_LINE = 1 << 30  # bytes; SentencePiece would silently skip lines above 4,192


def train_tokenizers(
    options: TokenizerOptions,
    source_lines: Iterable[str],
    target_lines: Iterable[str],
    folder: Path,
) -> None:
    """Writes `source.model` and `target.model` into `folder`, made if missing.

    Equal text gives equal bytes. A joint vocabulary is learnt from both sides together and
    written twice, so that whoever reads the folder need not know. Each file appears whole or not
    at all.

    Raises:
        CorpusError: a vocabulary that is too large or too small for the text; the message names
            the option and what is allowed.
    """
    if options.joint:
        both = itertools.chain(source_lines, target_lines)
        source = target = learn(options, options.source_vocabulary, both, "source_vocabulary")
    else:
        source = learn(options, options.source_vocabulary, source_lines, "source_vocabulary")
        target = learn(options, options.target_vocabulary, target_lines, "target_vocabulary")
    write_bytes(folder / "source.model", source)
    write_bytes(folder / "target.model", target)


def learn(options: TokenizerOptions, size: int, lines: Iterable[str], option: str) -> bytes:
    """A SentencePiece model of exactly `size` pieces; `option` is what `size` is called."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample(lines, SAMPLED_LINES)),
            model_writer=model,
            model_type=options.algorithm,
            vocab_size=size,
            byte_fallback=options.byte_fallback,
            character_coverage=options.character_coverage,
            normalization_rule_name=options.normalization,
            pad_id=Tokenizer.PAD,
            unk_id=Tokenizer.UNK,
            bos_id=Tokenizer.BOS,
            eos_id=Tokenizer.EOS,
            # Numbers are copied digit by digit, so one never seen before is no harder.
            split_digits=True,
            # A word is the same piece at the start of a sentence as inside it. Where words are
            # not written apart it costs one piece a sentence.
            add_dummy_prefix=True,
            remove_extra_whitespaces=True,
            max_sentence_length=LONGEST_LINE,
            num_threads=1,  # sums of floats, and so the pieces, could depend on the threads
            minloglevel=ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise CorpusError(f"tokenizer.{option}: got {size}; {limit(str(error))}") from None
    return model.getvalue()


def sample(lines: Iterable[str], most: int) -> list[str]:
    """All lines, or between half of `most` and `most` of them, evenly spaced.

    SentencePiece can sample too, but takes other lines in every process.
    """
    sampled: list[str] = []
    step = 1
    for number, line in enumerate(lines):
        if number % step == 0:
            sampled.append(line)
        if len(sampled) > most:
            sampled = sampled[::2]
            step *= 2
    return sampled


def limit(message: str) -> str:
    """SentencePiece's complaint about a vocabulary size, in the words of a recipe."""
    if found := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return f"the training text has no more pieces; allowed: at most {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            "every character of the training text needs a piece (see character_coverage), 4 are "
            f"special and byte_fallback takes 256; allowed: at least {found[1]}"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the training text has no line to learn from"
    return f"SentencePiece cannot learn from the training text: {' '.join(message.split())}"
