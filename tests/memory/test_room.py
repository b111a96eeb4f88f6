"""Room for weights on a Mac: the GPU's share, the cache, the reserve, and what is said when it is not enough."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_rotor.cache import parse
from mlx_rotor.errors import RotorError
from mlx_rotor.memory.kv import kv_bytes
from mlx_rotor.memory.room import GIB, RESERVE, gpu_limit, missing, room
from mlx_rotor.memory.sizes import ram_size, token_count

M27 = json.loads((Path(__file__).parents[2] / "examples" / "minimax_m27" / "config.json").read_text())


@pytest.mark.parametrize(("ram", "limit"), [(16, 10.67), (24, 16), (32, 21.33), (36, 27), (64, 48), (128, 96)])
def test_the_gpus_share_is_what_macs_report(ram, limit):
    assert gpu_limit(ram * GIB) / GIB == pytest.approx(limit, abs=0.01)


def test_room_is_the_limit_less_cache_and_reserve():
    found = room(M27, ram_size("128GB"), token_count("64K"), parse("turbo4v2"))
    assert found.limit == 96 * GIB and found.reserve == RESERVE
    assert found.kv == kv_bytes(M27, 65536, parse("turbo4v2"))
    assert found.weights == 96 * GIB - found.kv - RESERVE
    assert f"{found.weights / 1e9:.2f} GB for weights" in found.text()
    exact = room(M27, ram_size("128GB"), token_count("64K"), None)
    assert exact.kv == 65536 * 253_952 and exact.weights < found.weights


def test_a_raised_limit_counts_and_more_than_the_ram_is_refused():
    assert room(M27, 128 * GIB, 1024, None, limit=112 * GIB).limit == 112 * GIB
    with pytest.raises(RotorError, match="more than"):
        room(M27, 128 * GIB, 1024, None, limit=129 * GIB)


def test_too_long_a_context_names_one_that_fits():
    with pytest.raises(RotorError, match="no room for weights") as caught:
        room(M27, 32 * GIB, 196608, None)
    fits = int(re.search(r"up to ([\d,]+) tokens", str(caught.value))[1].replace(",", ""))
    assert room(M27, 32 * GIB, fits, None).weights > 0
    with pytest.raises(RotorError):
        room(M27, 32 * GIB, fits + 256, None)  # stock caches grow by 256 tokens
    with pytest.raises(RotorError, match="no context is short enough"):
        room(M27, 3 * GIB, 1000, None)


def test_what_would_be_enough():
    found = room(M27, 64 * GIB, 65536, parse("turbo4v2"))
    text = missing(found, 67_000_000_000)
    ram = int(re.search(r"a Mac with (\d+) GiB", text)[1])
    need = 67_000_000_000 + found.kv + found.reserve
    assert gpu_limit(ram * GIB) >= need > gpu_limit((ram - 1) * GIB)
    assert "iogpu" not in text  # 64 GiB don't hold it whatever the limit
    assert "iogpu.wired_limit_mb" in missing(found, 50_000_000_000)


@pytest.mark.parametrize(("text", "value"), [("128GB", 128), ("36 gib", 36), ("192G", 192)])
def test_ram_is_binary(text, value):
    assert ram_size(text) == value * 2**30


@pytest.mark.parametrize(("text", "value"), [("65536", 65536), ("64K", 65536), ("1m", 2**20)])
def test_tokens(text, value):
    assert token_count(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "1.5GB", "128TB"])
def test_what_is_no_ram_is_refused(text):
    with pytest.raises(RotorError, match="RAM"):
        ram_size(text)
    with pytest.raises(RotorError, match="tokens"):
        token_count(text or "K")
