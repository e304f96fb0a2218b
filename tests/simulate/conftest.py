"""The mock sky that the tests of this room share."""

import pytest

from tests.simulate.mock import N_LAMOST, Sky


@pytest.fixture(scope="session")
def sky(tmp_path_factory):
    return Sky(tmp_path_factory.mktemp("sky"), n_lamost=N_LAMOST, seed=7)
