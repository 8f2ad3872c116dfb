"""python -m server: run the server, here or as a container's first process; or translate."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from server.client import DEFAULT_TIMEOUT, DEFAULT_URL, address, curl, translate, translate_lines
from server.errors import ServerError
from server.lines import Line, checked, read, translated
from server.output import STDERR, STDOUT
from server.process import ending_signals
from server.supervisor import add_flags, add_verbose, options_of, supervise
from server.torchserve import ServerOptions, TorchServe

# Of `translate`: a variable, because every user of the machine sees the arguments of a command.
TOKEN_VARIABLE = "SEQ2SERVE_TOKEN"


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 after an error, or 128 + N after signal N.

    A server that the user ends with Ctrl-C has done its work: 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "serve":
            return _serve(options)
        if options.command == "supervise":
            return supervise(options_of(options))
        return _translate(options)
    except ServerError as error:
        STDERR.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python would write what is left once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    defaults = ServerOptions()
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run the server until Ctrl-C or SIGTERM")
    serve.add_argument("--model-store", type=Path, default=defaults.model_store, metavar="DIR")
    serve.add_argument("--host", default=defaults.host, help="address to serve (%(default)s)")
    for name, default in (
        ("--port", defaults.port),
        ("--management-port", defaults.management_port),
        ("--metrics-port", defaults.metrics_port),
    ):
        serve.add_argument(name, type=int, metavar="N", help=f"{default}; 0 means a free one")
    serve.add_argument(
        "--free-ports", action="store_true", help="choose every port that is not given"
    )
    add_verbose(serve, os.environ)

    first = commands.add_parser(
        "supervise", help="run the server as a container's first process, for Kubernetes"
    )
    add_flags(first, os.environ)

    client = commands.add_parser("translate", help="translate texts, or lines of standard input",
        description="A server that wants a bearer token gets that of SEQ2SERVE_TOKEN.")
    client.add_argument("text", nargs="*", metavar="TEXT")
    client.add_argument("--url", default=DEFAULT_URL, help="the server (%(default)s)")
    client.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS")
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    defaults = ServerOptions()

    def port(given: int | None, default: int) -> int:
        return given if given is not None else 0 if arguments.free_ports else default

    server = TorchServe(
        ServerOptions(
            model_store=arguments.model_store,
            host=arguments.host,
            port=port(arguments.port, defaults.port),
            management_port=port(arguments.management_port, defaults.management_port),
            metrics_port=port(arguments.metrics_port, defaults.metrics_port),
            verbose=arguments.verbose,
            access_log=arguments.verbose,
        )
    )
    numbers = ending_signals()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        # The first signal starts the end; another must not interrupt it and leave a worker behind.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    for number in numbers:
        signal.signal(number, stop)
    try:
        try:
            _run(server)
        finally:
            server.stop()
    except _Stopped as stopped:
        STDOUT.say("stopped")
        return 0 if stopped.number == signal.SIGINT else 128 + stopped.number
    return 0


def _run(server: TorchServe) -> NoReturn:
    """Serve for ever; the way out is an exception."""
    STDOUT.say(f"starting TorchServe with {server.options.model_store}")
    server.start()
    STDOUT.say("loading the model")
    server.wait_ready()
    STDOUT.say(f"ready: {address(server.url)}")
    STDOUT.say(f"metrics: {server.metrics_url}")
    STDOUT.say(f"try: {curl(server.url, 'A sentence.')}")
    STDOUT.say("stop with Ctrl-C")
    server.wait()
    raise server.failure()


def _say(line: str) -> None:
    print(line, flush=True)


def _translate(arguments: argparse.Namespace) -> int:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    url, timeout = arguments.url, arguments.timeout
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text can have any characters, whatever the terminal's locale.
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")

    def texts(sent: Sequence[bytes]) -> list[bytes]:
        # The server refuses a blank text; here it keeps its line, so that lines stay in step.
        spoken = [text.decode() for text in sent if text.strip()]
        answer = translate(url, spoken, None, timeout, token) if spoken else {}
        found = iter(answer.get("translations", []))
        said: list[str] = [next(found)[0]["text"] if text.strip() else "" for text in sent]
        return [text.replace("\n", " ").encode() for text in said]

    def lines(sent: Sequence[bytes]) -> list[bytes]:
        return translate_lines(url, sent, timeout, token)

    given: Iterable[Line]
    if arguments.text:
        named, ask = "text", texts
        given = (checked(Line(i, os.fsencode(text))) for i, text in enumerate(arguments.text, 1))
    else:
        named, ask, given = "line", lines, read(sys.stdin.buffer)
    count = failed = 0
    try:
        for line in translated(given, ask):
            count += 1
            if line.problem is not None:
                failed += 1
                print(f"{named} {line.number}: {line.problem}", file=sys.stderr, flush=True)
            _say(line.text.decode(errors="replace"))
    except (LookupError, TypeError, AttributeError) as error:
        raise ServerError(f"server {url} answered a translation without text") from error
    except ServerError as error:
        if not count:
            raise
        raise ServerError(f"{error}; {named}s up to {count} are translated") from error
    if failed:
        raise ServerError(
            f"{failed} of {count} {named}s could not be translated: an empty line is in the place "
            "of each"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
