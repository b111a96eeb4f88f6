import os
import shutil
import tempfile

import numpy as np
import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quality import score as module
from mlx_rotor.quality.score import LogProbFile


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(-8, 3, (10, 33)).astype(np.float32)


def test_float32_comes_back_to_the_bit(folder, rows):
    with LogProbFile() as log_probs:
        log_probs.reserve(10, 33)
        assert log_probs.bytes == 10 * 33 * 4
        log_probs.append(rows[:4])
        log_probs.append(rows[4:])
        np.testing.assert_array_equal(log_probs.read(0, 10), rows)
        np.testing.assert_array_equal(log_probs.read(3, 7), rows[3:7])
        assert os.listdir(folder) == [], "a named file would outlive a killed process"


def test_float16_above_the_limit(folder, rows, monkeypatch):
    monkeypatch.setattr(module, "FLOAT32_LIMIT", 10 * 33 * 4 - 1)
    with LogProbFile() as log_probs:
        log_probs.reserve(10, 33)
        assert (log_probs.dtype, log_probs.bytes) == (np.float16, 10 * 33 * 2)
        log_probs.append(rows)
        np.testing.assert_array_equal(log_probs.read(2, 5), rows[2:5].astype(np.float16))


def test_a_disk_too_small_is_refused_before_writing(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with (
        LogProbFile() as log_probs,
        pytest.raises(RotorError, match=r"need 0\.80 GB .* 0\.00 GB are free; use fewer --windows"),
    ):
        log_probs.reserve(1000, 200_000)
