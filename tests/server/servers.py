"""Servers in processes of their own, as a user starts them, and clients that speak to them over sockets."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import openai

# Little is kept exact, so that short chats are packed too.
KV = ["--kv", "turbo4", "--kv-ring", "16"]
STARTED = re.compile(r"(http://\S+/v1): ")


@dataclass
class Running:
    url: str
    line: str
    process: subprocess.Popen
    said: list[str]

    @property
    def root(self):
        return self.url.removesuffix("/v1")

    @property
    def client(self):
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)


@contextlib.contextmanager
def running(*flags, module=("-m", "mlx_rotor.server"), level="WARNING"):
    """A server on a free port, stopped by Ctrl-C at the end; `module` is how Python is told to start it."""
    argv = [sys.executable, *module, "--port", "0", "--log-level", level, *map(str, flags)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said = []
    for text in process.stdout:
        said.append(text)
        if STARTED.search(text):
            break
    else:
        raise AssertionError(f"the server did not start: {process.wait(60)} {''.join(said)}")
    drain = threading.Thread(target=lambda: said.extend(process.stdout))
    drain.start()
    try:
        yield Running(STARTED.search(said[-1])[1], said[-1], process, said)
        assert process.poll() is None, f"the server died: {''.join(said)}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            drain.join()
