"""A sample of what ``python -m tests.bench.damage`` does with a thousand mutations."""

from tests.bench.damage import hard_linked, prepare, trials
from tests.job import contents


def test_damage_by_chance_is_noticed_or_mended(small_store, tmp_path):
    store = hard_linked(small_store, tmp_path / "store")
    base = prepare(small_store.parent / "job.toml", store, tmp_path, ("crossmatch",))
    before = contents(small_store)
    done = list(trials(base, 25, 1, tmp_path))
    assert [(str(one.mutation), one.violations) for one in done if one.violations] == []
    noticed = [one for one in done if any(text.startswith("exit") for text in one.outcomes)]
    assert len(noticed) > 12
    assert contents(small_store) == before, "copies share content: nothing is written in place"
