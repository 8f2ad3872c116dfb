"""JoeyNMT's recurrent model and its search, in JoeyNMT's environment."""

from importlib.metadata import version
from types import SimpleNamespace

import torch
from joeynmt.batch import Batch  # type: ignore[import-not-found]
from joeynmt.model import build_model  # type: ignore[import-not-found]
from joeynmt.search import search  # type: ignore[import-not-found]
from joeynmt.vocabulary import Vocabulary  # type: ignore[import-not-found]

from bench.peers.job import SPECIAL, Job, Sizes, batches, padded, randomise, serve

UNK, PAD, BOS, EOS = range(SPECIAL)


class JoeyNMT:
    def __init__(self, sizes: Sizes) -> None:
        special = SimpleNamespace(
            unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
            unk_id=UNK, pad_id=PAD, bos_id=BOS, eos_id=EOS, sep_token=None, lang_tags=[],
        )
        words = [f"w{i}" for i in range(sizes.vocabulary - SPECIAL)]
        vocabulary = Vocabulary(words, special)
        embeddings = {"embedding_dim": sizes.embedding_size}
        encoder = {
            "type": "recurrent", "rnn_type": "lstm", "embeddings": embeddings,
            "hidden_size": sizes.hidden_size // 2, "num_layers": sizes.layers,
            "bidirectional": True,
        }
        decoder = {
            "type": "recurrent", "rnn_type": "lstm", "embeddings": embeddings,
            "hidden_size": sizes.hidden_size, "num_layers": sizes.layers,
            "attention": "luong", "init_hidden": "bridge", "input_feeding": False,
        }
        self.model = build_model({"encoder": encoder, "decoder": decoder}, vocabulary, vocabulary)
        randomise(self.model)
        self.model.eval()
        self.system = f"JoeyNMT {version('joeynmt')}"
        self.network = (
            f"bidirectional encoder {sizes.layers} x {sizes.hidden_size // 2} each way, bridge "
            f"from its last layer, decoder {sizes.layers} x {sizes.hidden_size}, 'luong' "
            "attention, input feeding off"
        )

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        lengths = []
        for sentences in batches(sources, job.batch):
            ids, source_lengths = padded([[*one[:-1], EOS] for one in sentences], PAD)
            batch = Batch(
                src=ids, src_length=source_lengths, src_prompt_mask=None, trg=None,
                trg_prompt_mask=None, indices=torch.arange(len(sentences)),
                device=torch.device("cpu"), pad_index=PAD, eos_index=EOS, is_train=False,
            )
            batch.sort_by_src_length()
            found, _, _ = search(
                model=self.model, batch=batch, beam_size=job.beam_size, beam_alpha=-1,
                max_output_length=job.tokens, min_output_length=job.tokens,
            )
            lengths += [sum(token not in (EOS, PAD) for token in one) for one in found.tolist()]
        return lengths


if __name__ == "__main__":
    serve(JoeyNMT)
