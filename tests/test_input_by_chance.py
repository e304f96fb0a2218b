"""A sample of mutated inputs, in process; ``python -m tests.bench.fuzz`` tries many more."""

from sos_dask.surveys.definition import load_survey
from tests.bench.fuzz import CODES, KINDS, attempts, run, table_of, write_whole
from tests.survey_files import read


def test_the_undamaged_files_are_read_alike(tmp_path):
    write_whole(tmp_path)
    definition = load_survey(str(tmp_path / "survey.toml"))
    kinds = [kind for kind in KINDS if not kind.endswith("toml")]
    found = [read(tmp_path / f"whole.{kind}", definition).rows for kind in kinds]
    names = ("obs_id", "ra", "teff", "gaia_dr3_source_id", "class", "flag", "quality")
    for kind, rows in zip(kinds, found, strict=True):
        assert rows.select(names).equals(found[0].select(names)), kind
    assert found[0].num_rows == 60 and found[0]["teff"].null_count == 9
    assert run(["rebuild", str(tmp_path / "whole.job.toml"), "--dry-run"])[0] == 0


def test_mutated_files_end_as_documented(tmp_path):
    write_whole(tmp_path)
    tried = list(attempts(tmp_path, 0, 0, 100))
    # Memory is that of all tests of the process: the command measures it.
    assert [item for item in tried if item.code not in CODES or item.seconds > 30] == []
    codes = {item.code for item in tried}
    assert {0, 3, 4} <= codes and len({item.error for item in tried}) > 40, table_of(tried)
