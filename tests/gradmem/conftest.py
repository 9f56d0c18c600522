"""Numbers of the tests of GradMem are compared in double precision."""

import pytest

from tests.gradmem.references import exact_norms


@pytest.fixture(autouse=True)
def _exact_norms():
    with exact_norms():
        yield
