"""The tiny dataset."""

from __future__ import annotations

import pytest

from tests.nanogpt.training.reference import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tiny"))
