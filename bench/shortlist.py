"""int8 decoding with a shortlist against all tokens, where the vocabulary grows.

    python -m bench.shortlist --vocabularies 8000 32000 --candidates 400:11 400:18

Random weights and a random lexicon, sentences of 10 to 30 tokens, exactly 25 target tokens each,
one thread. FREQUENT:EACH are frequent tokens and candidates of each source token. The two take
turns; CPU time, medians.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import described
from handler.decoding import DecodingOptions, Engine, decode_in_order, native
from handler.decoding.model import load
from model import ModelOptions, Network, ServingModel
from model.native import build
from model.quantized import quantized
from model.serving import scripted
from model.shortlist import Shortlist
from training.export import LIBRARIES

CPU = torch.device("cpu")
TOKENS = 25
SENTENCES = {1: 8, 16: 64, 64: 128}  # by batch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shortlist", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--candidates", nargs="+", default=["200:11", "400:18"],
                        metavar="FREQUENT:EACH")
    parser.add_argument("--width", type=int, default=512, help="of the two layers")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is told")
    a = parser.parse_args()
    torch.set_num_threads(1)
    native.enable(build(LIBRARIES, native.library()).parent)
    print(f"{described()}; `{' '.join(['python -m bench.shortlist', *sys.argv[1:]])}`\n")
    heads = [f"{'greedy' if beam == 1 else 'beam 5'}, batch {batch}"
             for beam in (1, 5) for batch in SENTENCES]  # fmt: skip
    print(f"| vocabulary | candidates | {' | '.join(heads)} |")
    print(f"|---|---|{'---|' * len(heads)}")
    for vocabulary in a.vocabularies:
        draw = random.Random(1)
        sources = [
            [*(draw.randrange(4, vocabulary) for _ in range(draw.randint(10, 30))), 3]
            for _ in range(max(SENTENCES.values()))
        ]
        sources.sort(key=len, reverse=True)
        options = ModelOptions(
            embedding_size=a.width, encoder_layers=2, encoder_hidden_size=a.width // 2,
            decoder_layers=2, decoder_hidden_size=a.width, attention_size=a.width,
        )
        torch.manual_seed(1)
        network = Network(options, vocabulary, vocabulary)
        whole = written(network, None)
        for frequent, each in (map(int, one.split(":")) for one in a.candidates):
            lexicon = torch.randint(4, vocabulary, (vocabulary, each))
            few = written(network, Shortlist(lexicon, torch.arange(3, 3 + frequent), vocabulary))
            cells = [
                f"{ratio(whole, few, sources, beam, batch, a.rounds):.2f}"
                for beam in (1, 5) for batch in SENTENCES
            ]  # fmt: skip
            print(f"| {vocabulary:,} | {listed(few, sources):.0f} | {' | '.join(cells)} |",
                  flush=True)


def written(network: Network, shortlist: Shortlist | None) -> Any:
    """The model as it is served."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        scripted(quantized(ServingModel(network, 256, 256), shortlist)).save(str(path))
        return load(str(path), CPU)


def listed(model: Any, sources: list[list[int]]) -> float:
    """Candidates of a sentence, on average."""
    counts = []
    for source in sources:
        memory = model.encode(torch.tensor([source]), torch.tensor([len(source)]))
        counts.append(int(model.allowed(memory).sum()))
    return statistics.mean(counts)


def ratio(
    whole: Any, few: Any, sources: list[list[int]], beam: int, batch: int, rounds: int
) -> float:
    """How many times as fast `few` is as `whole`."""
    count = SENTENCES[batch]
    chosen = sources[:: len(sources) // count][:count] if batch == 1 else sources[:count]
    options = DecodingOptions(beam_size=beam, min_length=TOKENS, max_length=TOKENS)
    ratios = []
    for number in range(rounds + 1):  # the first one warms up
        spent = []
        for model in (whole, few):
            engine = Engine(model, rows=batch * beam)
            started = time.process_time()
            events = list(decode_in_order(engine, chosen, options))
            spent.append(time.process_time() - started)
            assert all(len(event.results[0].tokens) == TOKENS for event in events)
        if number:
            ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
