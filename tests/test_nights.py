"""Nights of a scheduler: appended rows, a broken file, a biased survey."""

import pytest

from tests.bench.nights import APPENDED, BIASED, BROKEN, SAME, kinds, run


@pytest.mark.slow
def test_a_few_nights(cli, tmp_path):
    def sos(*arguments):
        ran = cli(*arguments, "--json")
        return ran.code, ran.json if ran.out else {"message": ran.err}

    nights = list(run(tmp_path, 5000, 4, 1500, keep=2, sos=sos))
    assert [night.kind for night in nights] == [APPENDED, BROKEN, BIASED, SAME]
    assert {*kinds(24)} == {APPENDED, BROKEN, BIASED, SAME}
    outcomes = [(night.outcome, night.code) for night in nights]
    assert outcomes == [("published", 0), ("refused", 10), ("refused", 10), ("unchanged", 0)]
    assert "less than" in nights[1].why and "teff" in nights[2].why
    assert all(night.problems == 0 and night.builds <= 3 for night in nights)
