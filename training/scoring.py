"""How good a network is: perplexity under teacher forcing, and scores of what it decodes."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sacrebleu
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from handler.request import RequestOptions
from handler.tokenizer import Tokenizer
from model import Network
from training.batches import Batch
from training.lines import translations


@dataclass(frozen=True)
class Scores:
    """Scores of decoded text, cased and detokenised; BLEU and chrF in 0..100."""

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


def token_losses(network: Network, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Sum over all target tokens of -log P(y_j | x, y_<j), a scalar.

    The generator is applied to real positions only, never to padding.
    """
    features = network.features(
        batch.source, batch.source_lengths, batch.target_in, batch.target_lengths
    )  # [N, T, feature size]
    real = batch.target_out != 0  # [N, T]
    logits = network.generator(features[real])  # [tokens, V]
    return functional.cross_entropy(
        logits.float(), batch.target_out[real], label_smoothing=label_smoothing, reduction="sum"
    )


@torch.inference_mode()
def perplexity(network: Network, batches: Iterator[Batch]) -> float:
    """exp of the mean loss per target token, EOS counted; dropout off, no smoothing."""
    network.eval()
    loss, tokens = 0.0, 0
    for batch in batches:
        loss += float(token_losses(network, batch))
        tokens += int(batch.target_lengths.sum())
    return math.exp(min(loss / max(tokens, 1), 700.0))


def decoded_scores(hypotheses: list[str], references: list[str]) -> Scores:
    """sacreBLEU (arXiv 1804.08771) and chrF of `hypotheses`, and how many are exactly right."""
    bleu = sacrebleu.BLEU()
    return Scores(
        sentences=len(references),
        bleu=bleu.corpus_score(hypotheses, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf=sacrebleu.CHRF().corpus_score(hypotheses, [references]).score,
        exact_match=sum(h == r for h, r in zip(hypotheses, references)) / max(len(references), 1),
    )


def score_text(
    model: Any,
    source: Tokenizer,
    target: Tokenizer,
    lines: list[str],
    references: list[str],
    device: torch.device,
    show: bool = False,
) -> tuple[Scores, list[str]]:
    """Decode `lines` greedily, each as one sentence, as they were in training, and score against
    `references`; the scores and the text."""
    options = RequestOptions(split=False)
    decoded = translations(model, source, target, lines, options, device)
    hidden = not (show and sys.stderr.isatty())
    shown = tqdm(decoded, total=len(lines), unit="sentence", disable=hidden, leave=False)
    hypotheses = [told[0]["text"] for told in shown]
    return decoded_scores(hypotheses, references), hypotheses
