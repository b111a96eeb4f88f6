"""mlx_lm.server's flags and its run loop, with compressed caches underneath; and the same put under its own `main`."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm import server as stock

from ..cache import Scheme
from ..errors import RotorError
from ..host.experts import AUTO, check_mode
from .generator import Generator, PromptCache
from .handler import Handler, Reader
from .provider import Provider

log = logging.getLogger(__name__)
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class _Reached(Exception):
    """Thrown out of mlx_lm's `main` with the parser it made."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(self)


def stock_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag and default of `mlx_lm.server`, which makes it inside its `main`."""
    argparse_there: Any = stock.argparse
    stock.argparse = SimpleNamespace(ArgumentParser=_Parser)  # type: ignore[assignment]
    try:
        stock.main()
    except _Reached as e:
        e.parser.__class__ = argparse.ArgumentParser
        return e.parser
    finally:
        stock.argparse = argparse_there
    raise RuntimeError("mlx_lm.server.main returned without parsing its flags")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a burst of clients is not turned away


def _bind(host: str, port: int) -> _Server:
    """A server that listens and does not answer yet; port 0 takes a free one.

    Raises:
        RotorError: the port is in use, or can't be listened on.
    """
    if not 0 <= port < 1 << 16:
        raise RotorError(f"there is no port {port}; --port goes from 0 (a free one) to {(1 << 16) - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = type("Server", (_Server,), {"address_family": family})
        return kind(address, Handler)
    except OSError as e:
        why = e.strerror or str(e)
        raise RotorError(f"can't listen on {host or '*'} port {port}: {why}; give another --host or --port") from e


def serve(
    host: str, port: int, provider: Provider, reader: Reader, *, announce: Callable[[str], None] = log.info
) -> None:
    """Loads the default model and answers requests until Ctrl-C.

    Args:
        announce: takes the line that says what is served, when it is.

    Raises:
        RotorError: the port can't be had or the default model can't be loaded.
    """
    args = provider.cli_args
    server = _bind(host, port) if mx.distributed.init().rank() == 0 else None
    limit = 1 << 63 if args.prompt_cache_bytes is None else args.prompt_cache_bytes
    generator = Generator(provider, PromptCache(args.prompt_cache_size, limit))
    try:
        if server is None:
            generator.join()
            return
        generator.loaded.wait()
        if generator.failure is not None:
            raise generator.failure
        server.RequestHandlerClass = partial(  # type: ignore[assignment]
            Handler, generator, reader, system_fingerprint=stock.get_system_fingerprint()
        )
        if host not in LOOPBACK:
            log.warning("anyone who can reach %s can use this server: it asks for no password", host or "this machine")
        announce(_line(server, provider))
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        if server is not None:
            server.server_close()
        generator.stop_and_join()


def _line(server: ThreadingHTTPServer, provider: Provider) -> str:
    host, port = server.server_address[:2]
    url = f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"
    if provider.kv is None:
        return f"{url}: no model yet; a request names one"
    batching = "requests are batched" if provider.is_batchable else "one request at a time"
    return f"{url}: {provider.cli_args.model}; KV cache {provider.kv['scheme']}: {provider.line}; {batching}"


def start(args: argparse.Namespace, scheme: Scheme | None, reader: Reader, announce: Callable[[str], None]) -> None:
    """What mlx_lm.server's `main` does with its flags, then `serve`."""
    stock.maybe_set_recommended_wired_limit()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s")
    serve(args.host, args.port, provider_class(scheme, args.experts)(args), reader, announce=announce)


def provider_class(scheme: Scheme | None, experts: str = AUTO) -> type[Provider]:
    return type("Provider", (Provider,), {"scheme": scheme, "experts": experts})


class Patch:
    """What was put under mlx_lm.server; `undo`, or the end of a `with` block, takes it away again."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._before = {name: getattr(stock, name) for name in names}
        for name, value in names.items():
            setattr(stock, name, value)

    def undo(self) -> None:
        """Gives mlx_lm.server its own parts back; again does nothing."""
        for name, value in self._before.items():
            setattr(stock, name, value)
        self._before = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch(scheme: Scheme | None, reader_for: Callable[[str | None], Reader], experts: str = AUTO) -> Patch:
    """Makes `mlx_lm.server.main` serve compressed. `reader_for` takes the default model's name, or None.

    Raises:
        RotorError: an unknown mode of experts.
    """
    check_mode(experts)

    def run(host: str, port: int, model_provider: Provider, *args: Any, **kwargs: Any) -> None:
        serve(host, port, model_provider, reader_for(model_provider.cli_args.model))

    return Patch({"ModelProvider": provider_class(scheme, experts), "run": run})
