"""The peers outside TorchServe: model.pt behind LitServe's own batching, and behind FastAPI.

    PYTHON plain_server.py litserve FOLDER --port 8000 --batch 64 --delay 20
    PYTHON plain_server.py fastapi FOLDER --port 8000

What a user would write who has model.pt and the two tokenizers (FOLDER holds them, out of the
archive) and neither our engine nor our handler: it imports torch, sentencepiece and litserve, which
brings FastAPI, and of this repository the operators that model.pt names and no more; torch's own
forms of them, that is, since nobody compiles ours. A batch is padded, decoded by one scripted loop
until its last sentence has ended, and answered; FastAPI has batches of one, in its threads, one
after the other. `POST /predict {"text": "..."}` -> `{"translation": "..."}`.
"""

import argparse
import sys
import threading
from pathlib import Path
from typing import Any

import fastapi  # type: ignore[import-not-found]
import litserve  # type: ignore[import-not-found]
import sentencepiece
import torch
import uvicorn  # type: ignore[import-not-found]
from torch import Tensor, nn

# This file is run by its path, in an environment that does not have this repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from handler.decoding import native
from handler.decoding.model import ONEDNN  # brings the module that declares the others

native.declare(ONEDNN)
EOS = 3


class Search(nn.Module):
    """Decodes a batch with model.pt: N sentences, K hypotheses each, V words, T steps."""

    def __init__(self, model: Any, beam: int) -> None:
        super().__init__()
        self.model = model
        self.beam = beam
        self.longest = int(model.max_target_length)
        self.pad, self.bos, self.eos = 0, 2, 3
        self.never = float("-inf")

    def forward(self, source: Tensor, lengths: Tensor) -> Tensor:
        """Args:
            source: int64 [N, S], EOS included, padded with 0; lengths: int64 [N].

        Returns:
            Target tokens, int64 [N, T]; what follows the first EOS of a row has no meaning.
        """
        limits = torch.clamp(3 * lengths + 10, max=self.longest)  # [N]
        if self.beam == 1:
            return self.greedy(source, lengths, limits)
        return self.best(source, lengths, limits)

    def greedy(self, source: Tensor, lengths: Tensor, limits: Tensor) -> Tensor:
        memory = self.model.encode(source, lengths)
        state = self.model.start(memory)
        last = torch.full_like(lengths, self.bos).unsqueeze(1)  # [N, 1]
        ended = torch.zeros_like(last, dtype=torch.bool)
        chosen: list[Tensor] = []
        for t in range(int(limits.max())):
            out = self.model.step(last, state, memory)
            logits, state = out[0], out[1]  # [N, 1, V]
            logits[:, :, : self.bos + 1] = self.never
            last = logits.argmax(2)  # [N, 1]
            chosen.append(last)
            ended = ended | (last == self.eos) | (limits.unsqueeze(1) <= t + 1)
            if bool(ended.all()):
                break
        return torch.cat(chosen, 1)

    def best(self, source: Tensor, lengths: Tensor, limits: Tensor) -> Tensor:
        """Beam search over sums of log probabilities; a hypothesis that has ended stays in its
        beam, padded for nothing. As sums only fall, one that has ended and leads has won."""
        n, k = source.size(0), self.beam
        memory = self.model.encode(source, lengths)
        state = self.model.start(memory)
        first = torch.arange(n, device=source.device).unsqueeze(1)  # [N, 1]
        last = torch.full_like(lengths, self.bos).unsqueeze(1)  # [N, 1], later [N, K]
        scores = torch.zeros([n, 1], device=source.device)
        ended = torch.zeros_like(last, dtype=torch.bool)
        history = torch.zeros([n, 1, 0], dtype=torch.long, device=source.device)  # [N, K, T]
        for t in range(int(limits.max())):
            out = self.model.step(last, state, memory)
            logits, state = out[0], out[1]  # [N, K, V]
            v = logits.size(2)
            steps = torch.log_softmax(logits, 2)
            steps[:, :, : self.bos + 1] = self.never
            steps = steps.masked_fill(ended.unsqueeze(2), self.never)
            steps[:, :, self.pad] = torch.where(ended, 0.0, self.never)
            width = last.size(1)
            scores, place = (scores.unsqueeze(2) + steps).flatten(1).topk(k, 1)  # [N, K]
            parents = torch.div(place, v, rounding_mode="floor")
            last = place % v
            rows = (first * width + parents).flatten()  # [N*K]
            state = [one.index_select(0, rows) for one in state]
            kept = history.gather(1, parents.unsqueeze(2).expand(n, k, history.size(2)))
            history = torch.cat([kept, last.unsqueeze(2)], 2)
            ended = ended.gather(1, parents) | (last == self.eos)
            if bool((ended[:, 0] | (limits <= t + 1)).all()):
                break
        return history[:, 0]


class Translator:
    """From texts to texts, a batch at a time."""

    def __init__(self, folder: Path, beam: int, device: str) -> None:
        self.device = device
        model = torch.jit.load(str(folder / "model.pt"), map_location=device).eval()
        if device == "cpu" and hasattr(model, "pack") and torch.backends.mkldnn.is_available():
            model.pack(False, True)
        self.search = torch.jit.script(Search(model, beam).eval())
        self.source, self.target = (
            sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.model"))
            for side in ("source", "target")
        )

    def translate(self, texts: list[str]) -> list[str]:
        encoded = [torch.tensor([*ids, EOS]) for ids in self.source.encode(texts)]
        lengths = torch.tensor([len(one) for one in encoded])  # [N]
        source = nn.utils.rnn.pad_sequence(encoded, batch_first=True)  # [N, S]
        with torch.inference_mode():
            found = self.search(source.to(self.device), lengths.to(self.device)).tolist()
        limits = [3 * len(one) + 10 for one in encoded]
        cut = [row[:most] for row, most in zip(found, limits)]
        return list(self.target.decode([r[: r.index(EOS)] if EOS in r else r for r in cut]))


class Batches(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(max_batch_size=a.batch, batch_timeout=a.delay / 1000)
        self.asked = a

    def setup(self, device: str) -> None:
        if self.asked.threads:
            torch.set_num_threads(self.asked.threads)
        self.translator = Translator(self.asked.folder, self.asked.beam, device)

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["text"])

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, texts: list[str] | str) -> list[str] | str:
        if isinstance(texts, str):  # LitServe batches nothing where a batch has one request
            return self.translator.translate([texts])[0]
        return self.translator.translate(texts)

    def unbatch(self, output: list[str]) -> list[str]:
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        return {"translation": output}


def serve_litserve(a: argparse.Namespace) -> None:
    # fast_queue is what LitServe's documentation advises from 100 requests a second on.
    server = litserve.LitServer(Batches(a), accelerator="auto", devices=1, fast_queue=True)
    server.run(
        host="127.0.0.1", port=a.port, log_level="warning", generate_client_file=False,
        access_log=False,
    )


def serve_fastapi(a: argparse.Namespace) -> None:
    if a.threads:
        torch.set_num_threads(a.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    translator, turn = Translator(a.folder, a.beam, device), threading.Lock()
    app = fastapi.FastAPI()

    @app.post("/predict")
    def predict(request: dict[str, str]) -> dict[str, str]:
        with turn:
            return {"translation": translator.translate([request["text"]])[0]}

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=a.port, log_level="warning", access_log=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    servers = {"litserve": serve_litserve, "fastapi": serve_fastapi}
    parser.add_argument("server", choices=servers)
    parser.add_argument("folder", type=Path, help="of model.pt, source.model and target.model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64, help="max_batch_size, requests")
    parser.add_argument("--delay", type=float, default=20, help="batch_timeout, here in ms")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as torch has it")
    a = parser.parse_args()
    servers[a.server](a)


if __name__ == "__main__":
    main()
