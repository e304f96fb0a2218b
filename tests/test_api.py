import inspect

import pyarrow as pa

from sos_dask import api


def test_every_function_is_documented_and_works_on_paths(tmp_path):
    """From survey files to corrected labels, by functions alone, without cluster or store."""
    for name in api.__all__:
        assert inspect.getdoc(getattr(api, name)), name
    files = api.simulate(
        api.SkySettings(n_lamost=4000, n_apogee=1500, n_galah=1500), tmp_path / "sky"
    )
    stars = {}
    for name, survey in (
        ("lamost", "lamost-dr11-lrs"),
        ("apogee", "apogee-dr17"),
        ("galah", "galah-dr4"),
    ):
        api.ingest(api.load_survey(survey), [files[name]], tmp_path / name)
        observations = api.Catalog.open(tmp_path / name)
        api.dedupe(observations, tmp_path / f"{name}.stars", api.DedupeSettings())
        stars[name] = api.Catalog.open(tmp_path / f"{name}.stars")
    target = stars.pop("lamost")
    united = api.ReferenceSettings(order=("apogee", "galah"), offsets={})
    api.reference(stars, tmp_path / "reference", united)
    reference = api.Catalog.open(tmp_path / "reference")
    settings = api.CrossmatchSettings(radius_arcsec=1.0)
    api.crossmatch(target, reference, tmp_path / "pairs", settings)
    pairs = api.Catalog.open(tmp_path / "pairs")
    api.train(
        pairs, tmp_path / "model", api.TrainSettings(method="polynomial", params={"order": 2})
    )
    observations = api.Catalog.open(tmp_path / "lamost")
    manifest = api.apply(tmp_path / "model", observations, tmp_path / "corrected")
    assert manifest is not None
    assert manifest.rows.n_in == manifest.rows.n_out == observations.n_rows
    for name in ("lamost", "lamost.stars", "reference", "pairs", "corrected"):
        assert api.verify(tmp_path / name) == []
    corrected = api.Catalog.open(tmp_path / "corrected")
    table = pa.concat_tables([corrected.read(pixel) for pixel in corrected.pixels])
    assert table["feh_sos"].null_count < table.num_rows / 10
