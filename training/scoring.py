"""How good a network is: perplexity under teacher forcing, and scores of what it decodes."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sacrebleu
import torch
from tqdm import tqdm

from handler.request import RequestOptions
from handler.tokenizer import Tokenizer
from model import Network
from training.batches import Batch
from training.lines import translations
from training.loss import batch_loss
from training.normalization import written
from training.recipe import ScoringOptions


@dataclass(frozen=True)
class Scores:
    """Scores of decoded text; BLEU and chrF in 0..100, as the signature says."""

    sentences: int
    bleu: float
    bleu_signature: str
    chrf: float
    exact_match: float  # fraction of 0..1

    def __str__(self) -> str:
        return (
            f"BLEU {self.bleu:.2f}, chrF {self.chrf:.2f}, exact match {self.exact_match:.2%} "
            f"of {self.sentences} sentences"
        )


@torch.inference_mode()
def perplexity(network: Network, batches: Iterator[Batch]) -> float:
    """exp of the mean loss per target token, EOS counted; dropout off, no smoothing."""
    network.eval()
    loss, tokens = 0.0, 0
    for batch in batches:
        loss += float(batch_loss(network, batch)[1])
        tokens += int(batch.target_lengths.sum())
    return math.exp(min(loss / max(tokens, 1), 700.0))


def decoded_scores(
    hypotheses: list[str], references: list[str], options: ScoringOptions = ScoringOptions()
) -> Scores:
    """sacreBLEU (arXiv 1804.08771) and chrF of `hypotheses`, and how many are exactly right."""
    bleu = sacrebleu.BLEU(
        tokenize=options.tokenize, lowercase=options.lowercase,
        force=True,  # text that is tokenised already is meant to be
    )  # fmt: skip
    chrf = sacrebleu.CHRF(lowercase=options.lowercase)
    return Scores(
        sentences=len(references),
        bleu=bleu.corpus_score(hypotheses, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf=chrf.corpus_score(hypotheses, [references]).score,
        exact_match=sum(h == r for h, r in zip(hypotheses, references)) / max(len(references), 1),
    )


def score_text(
    model: Any,
    source: Tokenizer,
    target: Tokenizer,
    lines: list[str],
    references: list[str],
    device: torch.device,
    options: ScoringOptions,
    beam_size: int = 1,
    show: bool = False,
) -> tuple[Scores, list[str]]:
    """Decode `lines`, each as one sentence, as they were in training, and score against
    `references`, as `target` can write them; the scores and the text."""
    how = RequestOptions(split=False)
    if beam_size > 1:
        how = RequestOptions(
            split=False, beam_size=beam_size, length_penalty=options.length_penalty
        )
    decoded = translations(model, source, target, lines, how, device)
    hidden = not (show and sys.stderr.isatty())
    shown = tqdm(decoded, total=len(lines), unit="sentence", disable=hidden, leave=False)
    hypotheses = [told[0]["text"] for told in shown]
    references = [written(target, one) for one in references]
    return decoded_scores(hypotheses, references, options), hypotheses
