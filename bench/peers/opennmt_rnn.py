"""OpenNMT-py's recurrent model and its translator, in OpenNMT-py's environment."""

from importlib.metadata import version
from types import SimpleNamespace

import pyonmttok  # type: ignore[import-not-found]
from onmt.constants import DefaultTokens  # type: ignore[import-not-found]
from onmt.model_builder import build_base_model  # type: ignore[import-not-found]
from onmt.translate import GNMTGlobalScorer, Translator  # type: ignore[import-not-found]

from bench.peers.job import SPECIAL, Job, Sizes, batches, padded, randomise, serve


class OpenNMT:
    def __init__(self, sizes: Sizes) -> None:
        words = [f"w{i}" for i in range(sizes.vocabulary - SPECIAL)]
        special = [DefaultTokens.UNK, DefaultTokens.PAD, DefaultTokens.BOS, DefaultTokens.EOS]
        vocabulary = pyonmttok.build_vocab_from_tokens(words, special_tokens=special)
        vocabulary.default_id = vocabulary[DefaultTokens.UNK]
        self.pad = vocabulary[DefaultTokens.PAD]
        self.eos = vocabulary[DefaultTokens.EOS]
        self.vocabularies = {
            "src": vocabulary, "tgt": vocabulary, "decoder_start_token": DefaultTokens.BOS
        }
        options = SimpleNamespace(
            model_type="text", model_task="seq2seq", encoder_type="brnn", decoder_type="rnn",
            rnn_type="LSTM", brnn=True, bridge=False, input_feed=1,
            enc_layers=sizes.layers, dec_layers=sizes.layers,
            enc_hid_size=sizes.hidden_size, dec_hid_size=sizes.hidden_size,
            src_word_vec_size=sizes.embedding_size, tgt_word_vec_size=sizes.embedding_size,
            global_attention="general", global_attention_function="softmax",
            coverage_attn=False, copy_attn=False, reuse_copy_attn=False, copy_attn_type=None,
            context_gate=None, dropout=[0.0], attention_dropout=[0.0], position_encoding=False,
            position_encoding_type=None, feat_merge="concat", feat_vec_exponent=0.7,
            feat_vec_size=-1, freeze_word_vecs_enc=False, freeze_word_vecs_dec=False,
            share_embeddings=False, share_decoder_embeddings=False, optim="sgd",
        )
        self.model = build_base_model(options, self.vocabularies)
        randomise(self.model)
        self.model.eval()
        self.scorer = GNMTGlobalScorer(0.0, 0.0, None, None)
        self.system = f"OpenNMT-py {version('OpenNMT-py')}"
        self.network = (
            f"bidirectional encoder {sizes.layers} x {sizes.hidden_size // 2} each way, no "
            f"bridge, decoder {sizes.layers} x {sizes.hidden_size}, 'general' attention, input "
            "feeding (its decoder without steps through nn.LSTM, which is slower), sources "
            "without EOS"
        )

    def decode(self, sources: list[list[int]], job: Job) -> list[int]:
        translator = Translator(
            self.model, self.vocabularies, beam_size=job.beam_size, min_length=job.tokens,
            max_length=job.tokens, max_length_ratio=0, dump_beam="", global_scorer=self.scorer,
            # Its GreedySearch, a draw among the best 1; its BeamSearch of width 1 is slower.
            random_sampling_topk=1 if job.beam_size == 1 else 0,
        )
        lengths = []
        for sentences in batches(sources, job.batch):
            ids, source_lengths = padded(sentences, self.pad)
            batch = {"src": ids.unsqueeze(2), "srclen": source_lengths}
            found = translator.translate_batch(batch, attn_debug=False)["predictions"]
            lengths += [sum(token != self.eos for token in one[0].tolist()) for one in found]
        return lengths


if __name__ == "__main__":
    serve(OpenNMT)
