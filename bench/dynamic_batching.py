"""The peer inside TorchServe: the same archive with plain dynamic batching.

`repack` builds it. This module is then the archive's handler: the same engine, tokenizers and
requests, but every batch that TorchServe collects is decoded to its end and answered at once, as
handlers do that know nothing of continuous batching. The engine drops rows that have ended, so
the peer computes nothing in vain; what it lacks is that a newcomer can join and a finished
sentence can leave.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from handler.integrity import write_digests
from handler.seq2seq_handler import Seq2SeqHandler, header
from handler.service import Incoming

MANIFEST = "MAR-INF/MANIFEST.json"


class DynamicBatchingHandler(Seq2SeqHandler):
    """One class in this module, as TorchServe's loader demands."""

    def handle(self, data: list[dict[str, Any]], ctx: Any) -> list[str]:
        """Answer the whole batch: rounds of the service until nothing of it is left."""
        with getattr(self, "calls", nullcontext()):  # which tells its reporter that we are busy
            return self.whole(data, ctx)

    def whole(self, data: list[dict[str, Any]], ctx: Any) -> list[str]:
        left = {
            i: Incoming(
                ctx.get_request_id(i),
                header(ctx, i, "url_path"),
                header(ctx, i, "content-type"),
                one.get("body", one.get("data")),
            )
            for i, one in enumerate(data)
        }
        bodies = [""] * len(data)
        while left:
            replies = self.service.round(list(left.values()))
            for i, reply in zip(list(left), replies):
                if reply is not None:
                    ctx.set_response_status(reply.status, "", i)
                    ctx.set_response_content_type(i, reply.content_type)
                    bodies[i] = reply.body
                    del left[i]
        return bodies


def repack(archive: Path, store: Path, size: int, delay: int) -> None:
    """`archive` as `store`/seq2seq.mar, with this handler.

    Args:
        size, delay: batchSize in requests and maxBatchDelay in ms, of model-config.yaml.
    """

    def change(content: Path) -> None:
        manifest = json.loads((content / MANIFEST).read_text("utf-8"))
        described = manifest["model"]
        shutil.copy(__file__, content)
        described["handler"] = Path(__file__).name
        (content / MANIFEST).write_text(json.dumps(manifest), "utf-8")
        path = content / described["configFile"]
        config = yaml.safe_load(path.read_text("utf-8"))
        config |= {"continuousBatching": False, "batchSize": size, "maxBatchDelay": delay}
        path.write_text(yaml.safe_dump(config), "utf-8")

    rebuild(archive, store, change)


def rebuild(archive: Path, store: Path, change: Callable[[Path], None]) -> None:
    """`archive` as `store`/seq2seq.mar, its unpacked content as `change` leaves it."""
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        content = Path(folder)
        with zipfile.ZipFile(archive) as source:
            source.extractall(content)
        change(content)
        write_digests(content)
        store.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(store / "seq2seq.mar", "w") as target:
            for file in sorted(content.rglob("*")):
                target.write(file, file.relative_to(content))
