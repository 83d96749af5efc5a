"""`mara-serve`: bundles behind OpenAI's HTTP interface, without PyTorch."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_deploy.commands.decoding import EngineOptions
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded
from mara_deploy.serve.settings import ServeSettings
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.options import Options, option, required

EPILOG = """\
A client of OpenAI's API talks to it under http://HOST:PORT/v1. Its models are the bundles, by the name of their
folder, and each of their agents as BUNDLE:AGENT. SIGTERM and Ctrl-C end it when its answers are complete.

examples:
  mara-serve qwen2-aligned
  mara-serve qwen2-aligned llama-aligned --port 8080 --api-keys keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"model": "qwen2-aligned", "messages": [{"role": "user", "content": "How do I keep bread fresh?"}]}'
"""


@dataclass(frozen=True)
class ServeArguments(Options):
    """What to serve, and where."""

    bundles: tuple[str, ...] = required("bundle folders made by mara-export", metavar="BUNDLE", positional=True)
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0: all of this machine's")
    port: int = option(8000, "port to listen at; 0: any that is free", least=0, most=65535)
    api_keys: Path | None = option(
        None, "file with a key per line, one of which requests under /v1 must have", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = [name for name, count in Counter(map(_name, self.bundles)).items() if count > 1]
        if twice:
            raise OptionError(f"two bundles have the name {twice[0]}, by which clients ask for them: rename a folder")


def parser() -> Parser:
    """The command's options."""
    options = Parser("mara-serve", "Serve bundles to clients of OpenAI's API; requests share forward passes.", EPILOG)
    add_options(options, ServeArguments)
    add_options(options.add_argument_group("server"), ServeSettings)
    add_options(options.add_argument_group("engine"), EngineOptions)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    options, settings = from_args(ServeArguments, args), from_args(ServeSettings, args)
    engine = from_args(EngineOptions, args)
    try:
        from mara_deploy.serve import http
        from mara_deploy.serve.app import Server
        from mara_deploy.serve.keys import Keys
        from mara_deploy.serve.worker import Worker
    except ModuleNotFoundError as error:
        raise MaraError(
            f"mara-serve needs packages that are not installed ({error}): pip install 'mara-deploy[serve]'"
        ) from None
    keys = None if options.api_keys is None else Keys.read(options.api_keys)  # before bundles are opened for minutes
    listener = _bound(options.host, options.port)
    with listener:
        workers = []
        for folder in options.bundles:
            _say(f"opening {folder} …")
            decoder = engine.open(folder, _say)
            workers.append(Worker(_name(folder), decoder, settings, _report_defect))
        server = Server(workers, settings, _log, keys)
        host, port = listener.getsockname()[:2]
        for model in server.models:
            _say(f"model {model}")
        listener.listen()  # who reads the next line may come at once
        _say(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        http.serve(server, listener)
    _say("ended")


def _name(folder: str) -> str:
    return Path(folder).resolve().name


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address. Raises OptionError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(f"--host is {host!r}, not an address of this machine: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OptionError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None
    return listener


def _say(message: str) -> None:
    print(f"mara-serve: {message}", file=sys.stderr, flush=True)


def _log(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.stderr, flush=True)


def _report_defect(error: Exception) -> None:
    traceback.print_exception(error)


if __name__ == "__main__":
    sys.exit(main())
