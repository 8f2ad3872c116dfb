"""The handler that TorchServe 0.12 calls. What depends on TorchServe is here and in `seq2serve.py`,
the module that it loads.

It runs with `continuousBatching: true` and one worker: TorchServe calls `handle` again and again
with every request that is live. A request that is left out of `ctx.request_ids` gets no reply in
this call and comes again in the next; one that no longer comes was dropped by its client.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from handler import buffered_reader, costs
from handler.admission import Incoming
from handler.authorization import ANYBODY, Tokens
from handler.coding import ACCEPTED, decoded
from handler.decoding import Engine, native
from handler.decoding.cuda_runner import CudaOptions, rows_for
from handler.decoding.failures import DeviceLost
from handler.decoding.model import load, weight_type
from handler.decoding.scheduler import ENCODED_AHEAD
from handler.departures import HEADER, Departures
from handler.doors import Native
from handler.fields import read
from handler.integrity import verify_digests
from handler.logs import set_up
from handler.reporting import Calls, report
from handler.request import Refusal, door_of
from handler.service import Reply, Service, departed, internal_error, refused
from handler.service_options import ServiceOptions
from handler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# "true" here refuses a CPU as `require_gpu` does: a cluster says so of nodes, an archive of models.
REQUIRE_GPU = "SEQ2SERVE_REQUIRE_GPU"
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class Seq2SeqHandler:
    """TorchServe's handler."""

    def initialize(self, ctx: Any) -> None:
        """Load and check the archive, and warm up; the worker is READY when this returns.

        Raises:
            IntegrityError, ValueError, RuntimeError: the archive, its configuration or the device
                is not as it should be; TorchServe then never reports the worker ready.
        """
        set_up()
        buffered_reader.install()
        self.tokens = Tokens.named()
        show_devices()
        folder = Path(ctx.system_properties["model_dir"])
        times = [time.perf_counter()]
        verify_digests(folder)
        times.append(time.perf_counter())
        config = ctx.model_yaml_config or {}
        options = read(ServiceOptions, config.get("handler") or {}, "handler")
        gpu = ctx.system_properties.get("gpu_id")
        device = torch.device("cpu")
        if torch.cuda.is_available() and gpu is not None and int(gpu) >= 0:
            device = torch.device("cuda", int(gpu))
        elif options.require_gpu or os.environ.get(REQUIRE_GPU) == "true":
            raise RuntimeError(
                f"handler.require_gpu or {REQUIRE_GPU} is true, but the worker was given gpu_id "
                f"{gpu} and torch sees {torch.cuda.device_count()} GPUs"
            )
        torch.set_num_threads(options.threads or max(1, usable_cpus() - 1))
        described = ctx.manifest["model"]
        model = load(
            str(folder / described["serializedFile"]), device, options.weights,
            options.batch_invariance,
        )  # fmt: skip
        source, target = (Tokenizer(folder / f"{side}.model") for side in ("source", "target"))
        sizes = (source.size, target.size)
        if sizes != (model.source_vocabulary, model.target_vocabulary):
            raise ValueError(
                f"source.model and target.model have {sizes} pieces, but the model was trained "
                f"with {(model.source_vocabulary, model.target_vocabulary)}: train, export and "
                "build the archive again"
            )
        rows = options.rows or rows_for(model, device, options.beams)
        cuda = CudaOptions(options.beams, options.batch_invariance)
        engine = Engine(model, rows, device, cuda=cuda)
        weights = number_format(model.card, weight_type(model), device)
        self.service = Service(
            engine,
            source,
            target,
            described["modelName"],
            described["modelVersion"],
            options,
            serving={
                "device": str(device), "weights": weights, "rows": rows,
                "batch_invariant": engine.invariant,
            },
        )
        if missing := self.service.admission.splitter.missing:
            logger.warning(
                "texts of several sentences are refused unless split is false: splitting %s",
                missing,
            )
        warn_of_few_requests(int(ctx.system_properties.get("batch_size") or 0), rows)
        times.append(time.perf_counter())
        self.service.warm_up()
        times.append(time.perf_counter())
        self.departures = Departures.named()
        self.calls = Calls()
        threading.Thread(
            target=report, args=(self.service, self.calls, ctx.metrics), daemon=True
        ).start()
        decoding = engine.largest_memory() / 1e6
        live = int(config.get("batchSize", 1))
        requests = costs.largest(
            options.request_memory, options.max_response_bytes, live, buffered_reader.DECODED
        )
        logger.info(
            "ready on %s, %s, with %d rows: at most %.0f MB for decoding and %.0f MB for requests; "
            "digests %.2f s, model %.2f s, warm-up %.2f s",
            device, weights, rows, decoding, requests / 1e6,
            *(b - a for a, b in pairwise(times)),
        )

    def handle(self, data: list[dict[str, Any]], ctx: Any) -> list[str]:
        """One round; see `Service.round`. Never raises: that would reset every client."""
        try:
            with self.calls:
                return self.answered(data, ctx)
        except DeviceLost as error:
            # TorchServe starts another worker, and until then nothing is ready.
            logger.critical("the device is lost, and this worker ends: %s", error)
            logging.shutdown()
            os._exit(1)

    def answered(self, data: list[dict[str, Any]], ctx: Any) -> list[str]:
        for left in self.departures.read():
            self.service.leave(left)
        live = [self.incoming(i, one, ctx) for i, one in enumerate(data)]
        told = [self.told(i, one, ctx) for i, one in enumerate(self.service.round(live))]
        ctx.stopping_criteria = [criterion(reply) for reply in told]
        return ["" if reply is None else reply.body for reply in told]

    def told(self, i: int, reply: Reply | None, ctx: Any) -> Reply | None:
        """Tell TorchServe what becomes of request `i`. Where that fails, it becomes an error."""
        try:
            if reply is None:
                del ctx.request_ids[i]
            else:
                tell(i, reply, ctx)
            return reply
        except Exception:
            logger.exception("TorchServe could not be told of a reply")
        if reply is not None and reply.kind != "whole":
            return reply  # of a stream, for which TorchServe's own status is right
        error = refused(internal_error(), Native())
        with contextlib.suppress(Exception):
            tell(i, error, ctx)
        return error

    def incoming(self, i: int, one: dict[str, Any], ctx: Any) -> Incoming:
        """Request `i`; TorchServe repeats it at every call, and it is read at the first. One that
        cannot be read is refused."""
        name = f"request {i}, whose id could not be read"
        try:
            name = ctx.get_request_id(i)
            return self.service.known.get(name) or self.new(i, name, one, ctx)
        except Exception:
            logger.exception("a request could not be read")
            return Incoming(name, refusal=internal_error())

    def new(self, i: int, name: str, one: dict[str, Any], ctx: Any) -> Incoming:
        body = one.get("body", one.get("data"))
        if not self.departures.arrived(header(ctx, i, HEADER), name, self.service.known):
            return Incoming(name, refusal=departed())
        client = ANYBODY
        if self.tokens is not None:
            found = self.tokens.admit(headers(ctx, i, "authorization"))
            if found is None:
                return Incoming(name, refusal=unauthorized(body))
            client = found
        try:
            most = self.service.options.max_request_bytes
            body = decoded(body, header(ctx, i, "content-encoding"), most)
        except Refusal as refusal:
            return Incoming(name, refusal=refusal)
        return Incoming(
            name,
            header(ctx, i, "url_path"),
            header(ctx, i, "content-type"),
            body,
            header(ctx, i, "explain").lower() == "true",
            client=client,
        )


def tell(i: int, reply: Reply, ctx: Any) -> None:
    """Status and headers of the reply to request `i`."""
    ctx.set_response_status(reply.status, HTTPStatus(reply.status).phrase, i)
    ctx.set_response_content_type(i, reply.content_type)
    if reply.status == HTTPStatus.UNAUTHORIZED:
        ctx.set_response_header(i, "WWW-Authenticate", "Bearer")
    if reply.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        ctx.set_response_header(i, "Accept-Encoding", ACCEPTED)
    if reply.retry_after is not None:
        ctx.set_response_header(i, "Retry-After", str(reply.retry_after))


def unauthorized(body: object) -> Refusal:
    """In the shape of errors that the body, where TorchServe has parsed it, shows at a glance."""
    message = "Authorization: no valid token; allowed: one header 'Bearer TOKEN'"
    return Refusal(HTTPStatus.UNAUTHORIZED, "Unauthorized", message).at(door_of(body)())


def warn_of_few_requests(batch: int, rows: int) -> None:
    """Warn where TorchServe sends fewer requests at once than fill the rows, as after a change from
    a CPU's 64 rows to a GPU's. It reads `batchSize` before the handler can know the rows."""
    if batch < rows:
        logger.warning(
            "TorchServe sends %d requests at once, which do not fill %d rows if each has one "
            "sentence: set batchSize in the archive's model-config.yaml to %d, and see "
            "docs/operations.md, Requests at once",
            batch, rows, rows + ENCODED_AHEAD,
        )


def show_devices() -> None:
    """Show CUDA the devices that server/devices.py hid from TorchServe's frontend."""
    devices = os.environ.get("SEQ2SERVE_CUDA_VISIBLE_DEVICES")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices


def number_format(card: str, dtype: torch.dtype, device: torch.device) -> str:
    """What the weights are in, by a model's card and as it was loaded; a warning where that is much
    slower than it could be."""
    if json.loads(card).get("weights") != "int8":
        return str(dtype).removeprefix("torch.")
    kernels = native.enabled() if device.type == "cpu" else ""
    if not kernels:
        logger.warning(
            "int8 weights without their operators, several times slower than with them: %s",
            f"export for this machine, for which the archive has no {native.library()} that works"
            if device.type == "cpu" else "for a GPU export with float32 weights",
        )
    return f"int8 ({kernels or 'plain'})"


def usable_cpus() -> int:
    """CPUs that this process may use: those it may run on (macOS does not tell, and has them all),
    and no more than a container's limit, which would stop too many threads again and again."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # of control groups 2; no limit is "max"
        quota, period = CPU_LIMIT.read_text().split()
        count = min(count, max(1, -(-int(quota) // int(period))))
    return count


def criterion(reply: Reply | None) -> Callable[[object], bool | None]:
    """What TorchServe asks whether a stream has ended: None stands for a plain response."""
    ended = {"whole": None, "more": False, "last": True}["whole" if reply is None else reply.kind]
    return lambda _: ended


def headers(ctx: Any, i: int, name: str) -> list[str]:
    """The values of a header of request `i`; names keep the client's case, so all are compared in
    lower case."""
    given = ctx.request_processor[i].get_request_properties()
    return [v for k, v in given.items() if k.lower() == name and isinstance(v, str)]


def header(ctx: Any, i: int, name: str) -> str:
    """The first of them, empty where there is none."""
    return next(iter(headers(ctx, i, name)), "")
