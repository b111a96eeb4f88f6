"""The simulator's own tests need the machine it is written for."""

from pathlib import Path

import pytest

from . import SUPPORTED, UNSUPPORTED


def pytest_collection_modifyitems(items):
    if not SUPPORTED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=UNSUPPORTED))
