"""One server for all tests of the folder."""

import pytest
from servers import KV, running


@pytest.fixture(scope="session")
def served():
    """The bundled model, compressed."""
    with running(*KV) as server:
        yield server
