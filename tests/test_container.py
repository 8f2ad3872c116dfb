"""What Java and the worker of a container are given, and what is refused before either starts."""

import argparse
import contextlib
import math
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from handler import costs
from handler.buffered_reader import DECODED
from handler.service_options import ServiceOptions
from server import memory
from server.devices import VISIBLE, WORKER_VISIBLE, device_environment
from server.errors import ServerError
from server.memory import HEAP, MIB, FrontLimits, Shares, memory_limit, shares
from server.options import ServerOptions
from server.supervisor import SupervisorOptions, add_flags, options_of

MIG = "MIG-41b36014-28af-5f1c-9b43-21ea9c2b2a35"


# Devices


@pytest.mark.parametrize(
    ("given", "java", "worker"),
    [
        (None, None, None), ("", "", None), ("0", "0", None), ("2,0", "2,0", None),
        ("-1", "-1", None), (MIG, "0", MIG), ("GPU-8932f937", "0", "GPU-8932f937"),
        (f"{MIG},{MIG}x", "0,1", f"{MIG},{MIG}x"), ("0, 1", "0,1", "0, 1"),
        ("NoDevFiles", "0", "NoDevFiles"),
    ],
)
def test_java_gets_devices_that_it_can_read_and_the_worker_those_that_were_given(
    tmp_path, given, java, worker
):
    before = {"A": "b", WORKER_VISIBLE: "stale"} | ({VISIBLE: given} if given is not None else {})
    after = device_environment(before, tmp_path)
    assert (after.get(VISIBLE), after.get(WORKER_VISIBLE)) == (java, worker)
    assert after["A"] == "b"
    assert "PATH" not in after


def test_the_driver_comes_last_on_both_paths_where_it_is(tmp_path):
    for folder in ("bin", "lib64"):
        (tmp_path / folder).mkdir()
    found = device_environment({"PATH": "/usr/bin:/bin"}, tmp_path)
    assert found == {
        "PATH": f"/usr/bin:/bin:{tmp_path}/bin", "LD_LIBRARY_PATH": f"{tmp_path}/lib64"
    }
    assert device_environment(found, tmp_path) == found


# Memory


def test_java_gets_what_the_others_leave(tmp_path):
    archive = 20 * MIB
    assert shares(None, archive) == shares(64 << 30, archive) == Shares(HEAP, HEAP * 5 // 8)
    assert shares(None, archive).front == FrontLimits(uploads=400, answers=29)
    least = next(n for n in range(4096) if fits(n * MIB, archive))
    sizes = [shares(n * MIB, archive).heap for n in range(least, 4096, 64)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == HEAP
    for n in (least, 1500, 2048):
        found = shares(n * MIB, archive)
        uploads = found.front.uploads * 288 / 1024
        assert found.heap + found.direct + uploads + 128 + 48 + 32 + 384 + 60 <= n
        assert found.front.answers > 0
        # Weights take the place of heap, in several copies.
        assert shares((n + 300) * MIB, archive + 100 * MIB) == found
    with pytest.raises(ServerError, match=rf"{least - 1} MiB: allowed is {least} MiB"):
        shares((least - 1) * MIB, archive)


def test_what_requests_take_is_reckoned_with():
    """By the archive's own configuration, and the server's."""
    config = yaml.safe_load((ROOT / "handler/model-config.yaml").read_text())
    handler, lines = config["handler"], (ROOT / "config.properties").read_text().splitlines()
    assert f"max_request_size={costs.BODY}" in lines
    most = costs.largest(
        handler["request_memory"], handler["max_response_bytes"], config["batchSize"], DECODED
    )
    assert most <= memory._REQUESTS * MIB < most + MIB
    options = ServiceOptions()
    assert options.request_memory == handler["request_memory"]
    assert options.request_memory / 4 > 2 * options.max_response_bytes


def fits(limit: int, archive: int) -> bool:
    with contextlib.suppress(ServerError):
        return shares(limit, archive).heap > 0
    return False


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1073741824"}, 1 << 30),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/a/b\n", {"a/memory.max": "5000", "a/b/memory.max": "max"}, 5000),
        ("0::/a/b\n", {"a/memory.max": "5000", "a/b/memory.max": "4000"}, 4000),
        ("0::/a/b\n", {"a/memory.max": "4000", "a/b/memory.max": "5000"}, 4000),
        ("0::/../..\n", {"memory.max": "7000"}, 7000),
        ("4:memory:/x\n1:cpu:/y\n0::/\n", {"memory/memory.limit_in_bytes": "6000"}, 6000),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("1:cpu:/y\n", {"memory/memory.limit_in_bytes": "6000"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_is_that_of_the_narrowest_group(tmp_path, groups, files, limit):
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert memory_limit(tmp_path, own) == limit
    assert memory_limit(tmp_path, tmp_path / "missing") is None


# Flags


def parsed(environment, *arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser, environment)
    return options_of(parser.parse_args(arguments))


def test_flags_have_variables_and_win_over_them():
    plain = parsed({})
    server = plain.server
    assert (server.port, server.management_port, server.metrics_port) == (8080, 8081, 8082)
    assert (plain.health_port, plain.settle_seconds, plain.drain_seconds) == (8083, 15, 60)
    assert (server.host, server.metrics_host, server.model_store) == (
        "0.0.0.0", "0.0.0.0", Path("/models")
    )
    assert server.require_digest
    given = {"SEQ2SERVE_DRAIN_SECONDS": "8", "SEQ2SERVE_PORT": "9000", "SEQ2SERVE_SHA256": "a" * 64}
    found = parsed(given, "--drain-seconds", "9.5")
    assert (found.drain_seconds, found.server.port) == (9.5, 9000)
    assert found.server.sha256 == "a" * 64


def test_variables_that_kubernetes_makes_of_a_service_are_no_ports():
    links = {
        "SEQ2SERVE_PORT": "tcp://10.0.0.1:8080", "SEQ2SERVE_METRICS_PORT": "tcp://10.0.0.2:8082"
    }
    assert parsed(links) == parsed({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settle_seconds": -1.0}, "settle_seconds is -1.0: allowed is"),
        ({"drain_seconds": math.nan}, "drain_seconds is nan: allowed is"),
        ({"stop_seconds": math.inf}, "stop_seconds is inf: allowed is"),
        ({"health_port": 65536}, "health_port is 65536: allowed is 0 to 65535"),
        ({"health_port": 8081}, "health_port is 8081, which is another port too"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ServerError, match=message):
        SupervisorOptions(**change)
    with pytest.raises(ServerError, match="sha256 is 'x': allowed are 64 hexadecimal digits"):
        ServerOptions(sha256="x")
