"""The server's flags and its run loop, which are mlx_lm.server's with compressed caches, also under its own `main`."""

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
from .choices import ChoicesHandler
from .generator import Generator, PromptCache
from .provider import Provider
from .reader import OpenAIReader

log = logging.getLogger(__name__)
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class _Reached(Exception):
    """Carries the parser that mlx_lm's `main` made out of it."""

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
    """Opens the port; nothing is answered yet. Port 0 takes a free one.

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
        return kind(address, ChoicesHandler)
    except OSError as e:
        why = e.strerror or str(e)
        raise RotorError(f"can't listen on {host or '*'} port {port}: {why}; give another --host or --port") from e


def serve(host: str, port: int, provider: Provider, announce: Callable[[str], None] = log.info) -> None:
    """Loads the default model and answers requests until Ctrl-C.

    Args:
        announce: called with the line that says what is served, once it is.

    Raises:
        RotorError: the port can't be opened or the default model can't be loaded.
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
            ChoicesHandler, generator, OpenAIReader(args.model), system_fingerprint=stock.get_system_fingerprint()
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


def start(args: argparse.Namespace, scheme: Scheme | None, announce: Callable[[str], None]) -> None:
    """Does with the flags of `stock_parser` what mlx_lm.server's `main` does, then serves; see `serve`."""
    stock.maybe_set_recommended_wired_limit()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s")
    serve(args.host, args.port, provider_class(scheme, args.experts)(args), announce)


def provider_class(scheme: Scheme | None, experts: str = AUTO) -> type[Provider]:
    """The class of model providers that attach `scheme` and `experts`; mlx_lm's server makes the provider itself."""
    return type("Provider", (Provider,), {"scheme": scheme, "experts": experts})


class Patch:
    """Replaced parts of mlx_lm.server; `undo`, or the end of a `with` block, puts the originals back."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._before = {name: getattr(stock, name) for name in names}
        for name, value in names.items():
            setattr(stock, name, value)

    def undo(self) -> None:
        """Puts the originals back; a second call does nothing."""
        for name, value in self._before.items():
            setattr(stock, name, value)
        self._before = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch(scheme: Scheme | None, experts: str = AUTO) -> Patch:
    """Puts compressed caches under `mlx_lm.server.main`; None leaves mlx_lm's own. See `patch_server`.

    Raises:
        RotorError: an unknown mode of experts.
    """
    check_mode(experts)

    def run(host: str, port: int, model_provider: Provider, *args: Any, **kwargs: Any) -> None:
        serve(host, port, model_provider)

    return Patch({"ModelProvider": provider_class(scheme, experts), "run": run})
