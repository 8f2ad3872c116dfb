"""What KServe's two protocols ask of a server beside inference: its health and its models.

Answered here, because TorchServe 0.12's own say ready while a model loads and after it failed. The
front sends these paths to a small server of process 1's on loopback. Paths and fields are those of
the Open Inference Protocol (docs/predict-api/v2 of kserve/open-inference-protocol) and of KServe's
V1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from server.health import Page

_JSON = "application/json"
# One tensor of texts; [-1]: as many as a request has. The answer has one for each thing told.
_INPUTS = [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
_OUTPUTS = [
    {"name": name, "datatype": "BYTES", "shape": [-1, -1]}
    for name in ("translation", "finish_reason")
]


def protocol_pages(
    models: Mapping[str, Sequence[str]], ready: Callable[[], bool]
) -> dict[str, Page]:
    """Return the pages of a server.

    Args:
        models: the versions of each.
        ready: says whether requests are answered now.
    """
    pages: dict[str, Page] = {
        "/v2": partial(_told, {"name": "seq2serve", "version": "2", "extensions": []}),
        "/v2/health/live": partial(_told, {"live": True}),
        "/v2/health/ready": lambda: _state({"ready": ready()}),
        "/v1/models": partial(_told, {"models": list(models)}),
    }
    for name, versions in models.items():
        described = {
            "name": name, "versions": list(versions), "platform": "pytorch_torchscript",
            "inputs": _INPUTS, "outputs": _OUTPUTS,
        }
        pages[f"/v1/models/{name}"] = partial(_named, name, ready)
        for one in (name, *(f"{name}/versions/{version}" for version in versions)):
            pages[f"/v2/models/{one}"] = partial(_told, described)
            pages[f"/v2/models/{one}/ready"] = partial(_named, name, ready)
    return pages


def _named(name: str, ready: Callable[[], bool]) -> tuple[int, str, str]:
    return _state({"name": name, "ready": ready()})


def _told(value: object) -> tuple[int, str, str]:
    return 200, _JSON, json.dumps(value)


def _state(value: Mapping[str, object]) -> tuple[int, str, str]:
    # 503 where the protocol has any 4xx: what KServe's own server says, and what proxies know.
    return (200 if value["ready"] else 503), _JSON, json.dumps(value)
