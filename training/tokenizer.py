"""Learns the vocabularies of both sides with SentencePiece (arXiv 1808.06226)."""

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch

from handler.blank import SPACE, blank
from handler.tokenizer import Tokenizer
from training.corpus import CorpusError
from training.normalization import AS_IT_STANDS, Normalization, of_source, of_target
from training.recipe import TokenizerOptions
from training.run import write_bytes

ERRORS_ONLY = 2
LONGEST_LINE = 1 << 30  # bytes; SentencePiece would silently skip lines above 4,192


class Unlearnable(CorpusError):
    """Text that SentencePiece fails on, for a reason that is none of the recipe's sizes."""


def train_tokenizers(
    options: TokenizerOptions,
    source_lines: Iterable[str],
    target_lines: Iterable[str],
    count: int,
    folder: Path,
) -> None:
    """Writes `source.model` and `target.model` into `folder`, made if missing.

    Equal text gives equal bytes. A joint vocabulary is learnt from both sides together and
    written twice, with the normalisation of each side, so that whoever reads the folder need not
    know. Each file appears whole or not at all.

    Args:
        count: of the lines of each side. Of more than `training_sentences`, for one vocabulary,
            so many are learnt from.

    Raises:
        CorpusError: a vocabulary that is too small for the text; the message names the option and
            what is allowed.
        Unlearnable: any other failure.
    """
    most = options.training_sentences
    rules = of_source(options), of_target(options)
    sizes = options.source_vocabulary, options.target_vocabulary
    if options.joint:
        rule = rules[0]
        if rules[1] != rule:
            rule = AS_IT_STANDS
            source_lines, target_lines = map(rules[0], source_lines), map(rules[1], target_lines)
        both = spread(itertools.chain(source_lines, target_lines), 2 * count, most)
        model = learn(options, sizes[0], both, "source_vocabulary", rule)
        source, target = (model if one == rule else one.put_into(model) for one in rules)
    else:
        source = learn(
            options, sizes[0], spread(source_lines, count, most), "source_vocabulary", rules[0]
        )
        target = learn(
            options, sizes[1], spread(target_lines, count, most), "target_vocabulary", rules[1]
        )
    write_bytes(folder / "source.model", source)
    write_bytes(folder / "target.model", target)


def learn(
    options: TokenizerOptions,
    size: int,
    lines: Iterable[str],
    option: str,
    rule: Normalization = Normalization(),
) -> bytes:
    """A SentencePiece model of `size` pieces, or of all that the text has; `option` is what `size`
    is called."""
    model = io.BytesIO()
    stopped: list[BaseException] = []

    def watched() -> Iterator[str]:
        try:
            yield from lines
        except BaseException as error:  # Ctrl-C too: SentencePiece would tell it as its own error
            stopped.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            model_type=options.algorithm,
            vocab_size=size,
            hard_vocab_limit=False,  # fewer pieces where the text has no more
            byte_fallback=options.byte_fallback,
            character_coverage=options.character_coverage,
            normalization_rule_name=rule.rule,
            pad_id=Tokenizer.PAD,
            unk_id=Tokenizer.UNK,
            bos_id=Tokenizer.BOS,
            eos_id=Tokenizer.EOS,
            # Numbers are copied digit by digit, so one never seen before is no harder.
            split_digits=True,
            # A word is the same piece at the start of a sentence as inside it. Where words are
            # not written apart it costs one piece a sentence.
            add_dummy_prefix=True,
            remove_extra_whitespaces=rule.fold,
            max_sentence_length=LONGEST_LINE,
            num_threads=1,  # sums of floats, and so the pieces, could depend on the threads
            minloglevel=ERRORS_ONLY,
        )
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        if problem := limit(str(error)):
            raise CorpusError(f"tokenizer.{option}: got {size}; {problem}") from None
        told = " ".join(str(error).split())
        raise Unlearnable(f"SentencePiece cannot learn from the training text: {told}") from None
    return model.getvalue()


def smaller(options: TokenizerOptions, folder: Path) -> list[str]:
    """A warning for each vocabulary in `folder` that has fewer pieces than it was asked for."""
    return [
        f"tokenizer.{side}_vocabulary: {asked} pieces asked for; the training text has no more "
        f"than {size}"
        for side in ("source", "target")
        if (size := Tokenizer(folder / f"{side}.model").size)
        < (asked := getattr(options, f"{side}_vocabulary"))
    ]


def spread(lines: Iterable[str], count: int, most: int) -> Iterator[str]:
    """All of `count` lines, or `most` of them, evenly spaced.

    SentencePiece can sample too, but takes other lines in every process.
    """
    for number, line in enumerate(lines):
        if count <= most or number * most % count < most:
            yield line


def encoder(model: Path) -> Callable[[list[str]], list[list[int]]]:
    """What `handler.tokenizer.Tokenizer` encodes each of many lines to, on all of torch's
    threads."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def encode(lines: list[str]) -> list[list[int]]:
        lines = ["" if blank(line) else line.strip(SPACE) for line in lines]
        ids: list[list[int]] = processor.encode(lines, num_threads=torch.get_num_threads())
        return ids

    return encode


def limit(message: str) -> str | None:
    """SentencePiece's complaint about a vocabulary size, in the words of a recipe; None if it is
    about something else."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            "every character of the training text needs a piece (see character_coverage), 4 are "
            f"special and byte_fallback takes 256; allowed: at least {found[1]}"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the training text has no line to learn from"
    return None
