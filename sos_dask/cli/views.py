"""Commands that show: the products of a build, surveys, what is wrong with outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from sos_dask.cli.options import (
    Name,
    Names,
    Options,
    Place,
    Places,
    Shown,
    command,
    find_store,
    open_catalogs,
)
from sos_dask.cli.output import (
    LABEL_UNITS,
    Row,
    complain,
    is_wide,
    number,
    print_json,
    reporting,
    say,
    show_table,
    shown,
    with_unit,
)
from sos_dask.correct import COVERAGE_MEANINGS
from sos_dask.errors import CatalogError, ConfigError, SosError
from sos_dask.evidence.failing import PAIRS, ROWS, RULE
from sos_dask.schema import nearest
from sos_dask.stages.compare import Compare, Trends
from sos_dask.stages.coverage import Coverage
from sos_dask.stages.evidence import OnEvidence, on_pairs
from sos_dask.stages.uncertainty import Uncertainty
from sos_dask.stats.numbers import rms_of_medians
from sos_dask.storage import store as stores
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from sos_dask.storage.objects import followed
from sos_dask.surveys import definition

_SAMPLES = {"test": "held-out", "train": "training"}


# --- outputs, surveys ---------------------------------------------------------------------------


@command()
def verify(catalogs: list[Path], *, as_json: bool = False) -> None:
    """Check every invariant of catalogs (rows, order, pixels, keys, hashes) and other outputs.

    Example: sos-dask verify store/current
    """
    problems: dict[str, list[str]] = {}
    errors: list[SosError] = []
    for given in catalogs:
        try:
            for path in stores.outputs_of(given):
                problems[str(path)] = stores.verify(path)
        except SosError as error:
            errors.append(error)
    if as_json and (problems or not errors):
        print_json({"problems": problems})
    for name, found in {} if as_json else problems.items():
        say(f"{name}: {f'{len(found)} problems' if found else 'no problem found'}")
        for problem in found:
            say(f"  {problem}")
    for refused in errors:
        complain(f"error: {shown(refused.message)}", refused.hint)
    codes = [refused.exit_code for refused in errors]
    codes += [CatalogError.exit_code] if any(problems.values()) else []
    if codes:
        raise typer.Exit(max(codes))


@command()
def surveys(survey: Name = None) -> Shown:
    """List the surveys, or explain one: columns, units, missing values, quality cuts.

    Example: sos-dask surveys lamost-dr11-lrs
    """
    if survey is None:
        all_of_them = [definition.load_survey(name) for name in definition.builtin_surveys()]
        titles = [{"name": one.name, "title": one.title} for one in all_of_them]
        yield {"surveys": titles}
        show_table("Surveys", "name title", titles)
        say("Run sos-dask surveys NAME for columns and quality cuts.")
        return
    found = definition.load_survey(survey)
    about, tests = definition.describe_columns(found), definition.describe_cuts(found)
    columns = [dict(zip(definition.COLUMN_HEADINGS, row, strict=True)) for row in about]
    cuts = [dict(zip(definition.CUT_HEADINGS, row, strict=True)) for row in tests]
    kept = ("name", "title", "reference", "missing", "missing_text", "notes")
    yield {**{key: getattr(found, key) for key in kept}, "columns": columns, "cuts": cuts}
    say(f"{found.name}: {found.title}\n{found.reference}\n")
    # Types and UCDs need a wide terminal; --json always has them.
    headings = [x for x in columns[0] if is_wide() or x not in definition.COLUMN_HEADINGS[3:5]]
    show_table("Columns", " ".join(headings), columns)
    title = "Quality cuts: a row that fails one has its bit in quality"
    show_table(title, " ".join(definition.CUT_HEADINGS), cuts)
    if found.missing:
        say(f"Missing values: {', '.join(f'{value:g}' for value in found.missing)}")
    if found.notes:
        say(found.notes.strip(), wrap=True)


# --- products of a build ------------------------------------------------------------------------


@command()
def report(job: Place = None, *, store: Place = None, out: Place = None, options: Options) -> Shown:
    """Make a page with figures of the current build, or print where it is.

    Example: sos-dask report --store store -o report
    """
    from sos_dask.stages.report import PAGE, of_build

    store = find_store(store, job)
    there = (store / "current" / "report").resolve()
    if out is None and (there / PAGE).is_file():
        options.refuse(
            ("workers", "scheduler", "memory_limit", "overwrite"),
            f": the build has its report already, {there}",
            "Give --out to make it again in another directory.",
        )
        out = there
    else:
        out = out or store / "report"
        options.run(of_build(store), out)
    summary = Manifest.checked(out).summary
    yield {"path": out, "page": out / PAGE, **summary}
    say(f"{out / PAGE}: {len(summary['figures'])} figures, also in {out / 'figures'}")


@command()
def uncertainty(job: Place = None, *, store: Place = None, correction: Name = None) -> Shown:
    """Show the errors of the current build: hit rates, correlations, factors of quoted errors, hat.

    Example: sos-dask uncertainty --store store
    """
    directory = stores.current_product(find_store(store, job), _of(correction, "uncertainty"))
    summary = Uncertainty.load(directory)
    rates = summary["hit_rates"]
    yield {"path": directory, **summary}
    show_table(
        f"Held-out pairs inside their interval, with its 95 % range (method {summary['method']})",
        "name=label subset=pairs n 68=68_% 95=95_%",
        [
            {**one, "name": one["label"]}
            | {f"{100 * x['level']:.0f}": _with_range(x, "hit_rate", 100, ".1f") for x in two}
            for one, *two in zip(rates[::2], rates[::2], rates[1::2], strict=True)
        ],
    )
    show_table(
        "Correlation of the errors of corrected labels: covariance = correlation x both errors",
        "kind=stars snr=S/N label other=and n=pairs text=correlation",
        [
            {**one, "text": f"{one['correlation']:+.2f} ± {one['error']:.2f}"}
            for one in summary["correlations"]
        ],
    )
    show_table(
        "Quoted errors by repeats: what they must be multiplied by (1 where too few are known)",
        "survey name=label kind=stars snr_low:g=from_S/N snr_high:g=to_S/N mean_snr:.0f=S/N n "
        "text=factor",
        [
            {**one, "survey": survey, "name": one["label"], "text": _with_range(one, "factor")}
            for survey, factors in summary["error_factors"].items()
            for one in factors
        ],
    )
    if summary["three_cornered_hat"]:
        show_table(
            "Errors of three surveys from their differences on common stars (!: negative variance)",
            "label survey n=stars text=error",
            [
                {**one, "text": _with_range(one, "sigma") + " !" * one["negative"]}
                for one in summary["three_cornered_hat"]
            ],
        )


@command()
def agreement(job: Place = None, *, store: Place = None, label: Name = None) -> Shown:
    """Show how the surveys of the unified catalog agree: pairs, hats, floors, stars of lists.

    Example: sos-dask agreement --store store --label feh
    """
    from sos_dask.report.unified import agreeing, validations

    place = find_store(store, job)
    directory = stores.current_product(place, "sos")
    found = Manifest.checked(directory)
    _one_of("label", label, (one["label"] for one in found.summary["errors"]))
    current = {x: (place / "current" / x).resolve() for x in stores.published(place)}
    lists = {
        name: [one for one in agreeing(rows) if label in (None, one["label"])]
        for name, rows in validations(current).items()
    }
    errors = [one for one in found.summary["errors"] if label in (None, one["label"])]
    summary = {**found.summary, "errors": errors}
    yield {"path": directory, "stars": found.rows.n_out, **summary, "validation": lists}
    n_rows, n_several = found.rows.n_in, summary["stars_in_several_surveys"]
    say(f"{n_rows:,} rows are {found.rows.n_out:,} stars, {n_several:,} in several surveys.\n")
    pairs, hats, floors = (
        [one for one in errors if key in one] for key in ("offset", "hat", "floor")
    )
    show_table(
        "Two surveys on common stars; pull: scatter over the stated errors, 1 is right",
        "label survey other n=stars offset:+ scatter width:.2f=pull correlation:.2f=corr.",
        pairs,
    )
    show_table(
        "Errors from three surveys on common stars (!: negative variance)",
        "label survey other=beside n=stars text=error",
        [{**one, "text": _with_range(one, "hat") + " !" * one["negative"]} for one in hats],
    )
    show_table("Floor of the errors of a survey", "label survey floor", floors)
    for name, rows in lists.items():
        show_table(
            f"{name}: stars that must agree, as published and unified; offset from the list's "
            "value, or of surveys",
            "label group n=rows n_after=stars scatter_before scatter_after offset_before "
            "offset_after",
            rows,
        )


def _with_range(row: Row, name: str, factor: float = 1, form: str = ".3f") -> str:
    """Text of a value with its 95 % range, as far as they are known."""
    value, *ends = (
        None if row[key] is None else f"{factor * row[key]:{form}}" for key in (name, "low", "high")
    )
    return (value or "negative") + (f" ({ends[0]} .. {ends[1]})" if ends[0] else "")


def _on_pairs(
    stage: type[OnEvidence[Any]], pairs: Path, models: Sequence[Path], out: Place,
    options: Options, settings: Any = None, more: Row | None = None,
) -> Path:  # fmt: skip
    """Run a stage on pairs and models given by path; where its output is."""
    options.refuse(("store",), " with PAIRS")
    if out is None:
        raise ConfigError("--out is missing", "Give a directory for the output: -o DIR.")
    by_method: dict[str, Path] = {}
    for path in models:
        method = Manifest.load(path).recipe.stage.removeprefix("train-")
        if method in by_method:
            raise ConfigError(f"{path} and {by_method[method]} are both models of '{method}'")
        by_method[method] = path
    takes_models = any(role.many and role.name == "model" for role in stage.roles)
    inputs = {f"model.{method}": path for method, path in by_method.items() if takes_models}
    inputs |= more or {}
    given: Any = (stage, Catalog.open(pairs), by_method, out, settings, inputs)
    with reporting() as report, options.start() as cluster:
        on_pairs(*given, overwrite=options.overwrite, cluster=cluster, report=report)
    return out


def _current(
    store: Path, product: str, options: Options, *names: str, correction: Name = None
) -> Path:
    """Product of the current build; options but ``--store``, ``--json`` and some are refused."""
    options.refuse(
        set(options.given) - {"store", "as_json", "correction", *names},
        " where no catalogs are given by path",
        "Without them the command shows the current build of --store.",
    )
    return stores.current_product(store, _of(correction, product))


def _of(correction: Name, product: str) -> str:
    """Last parts of the name of a product of a correction; of the first one where none is named."""
    return f"{correction}.{product}" if correction else product


def _one_of(what: str, value: str | None, known: Iterable[str]) -> None:
    """Refuse a value that is not among those there are."""
    known = list(dict.fromkeys(known))
    if value is not None and value not in known:
        raise ConfigError(
            f"--{what} '{value}' is not one of {', '.join(known)}", nearest(value, known)
        )


# --- compare ------------------------------------------------------------------------------------


@command(Compare)
def compare(
    inputs: Places = None, *, out: Place = None, store: Place = None, correction: Name = None,
    label: Name = None, sample: Name = None, options: Options,
) -> Shown:  # fmt: skip
    """Show how the methods compare: scatter, bins that fail, artifacts; which is chosen and why.

    Example: sos-dask compare --store store --label feh
    """
    _one_of("sample", sample, _SAMPLES)
    taken = None
    if inputs:
        directory = _on_pairs(Compare, inputs[0], inputs[1:], out, options, options.settings())
    else:
        place = find_store(store)
        wanted = "comparison", options, "label", "sample"
        directory = _current(place, *wanted, correction=correction)
        taken = _training_costs(place)
    found = Compare.load(directory)
    _one_of("label", label, (row["label"] for row in found["figures"]))
    del found["metrics"]
    for name in ("figures", "artifacts", "outside", "bins", "failing"):
        found[name] = [row for row in found[name] if label in (None, row["label"])]
    figures = [row for row in found["figures"] if sample in (None, row["sample"])]
    yield {"path": directory, **found, "figures": figures, "costs": taken}
    sample = sample or "test"
    for name in dict.fromkeys(row["label"] for row in figures):
        rows = [row for row in figures if (row["label"], row["sample"]) == (name, sample)]
        _show_figures(name, _SAMPLES[sample], rows, found["method"])
    if sample == "test":
        _show_failing(found["failing"], found["method"])
    show_table(
        "Artifacts: second differences over the noise, largest step, with 95 % intervals",
        "label method roughness:.4f jump noise n_cells=cells",
        found["artifacts"],
    )
    if found["outside"]:
        show_table(
            "Outside the overlap: how far past the values inside, and the step at the edge",
            "label method where exceeds:? share:.0%=of_cells_% step:?",
            found["outside"],
        )
    if taken is not None:
        show_table(
            "Cost of training when it was run",
            "method train_cpu_s:,.1f=CPU_s train_wall_s:,.1f=wall_s",
            [{"method": method, **cost} for method, cost in taken.items()],
        )
    say(f"Rule '{found['rule']}' chose {found['why']}.")


def _training_costs(store: Path) -> dict[str, dict[str, float | None]]:
    """CPU and wall seconds that training took, as far as they are known, by method."""
    known = stores.costs(store)
    return {
        product.split(".")[-1]: {
            f"train_{name}": known.get(fingerprint, {}).get(name) for name in ("cpu_s", "wall_s")
        }
        for product, fingerprint in stores.published(store).items()
        if ".model." in product
    }


def _show_figures(label: str, pairs: str, rows: Sequence[Row], chosen: str) -> None:
    """Print the figures of every method over all pairs, and its scatter in every subset."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["subset"] == "all":
            method = row["method"] + " *" * (row["method"] == chosen)
            value: Any = row
            if row["statistic"] == "worst_bin" and row["value"] is not None:
                value = " ± ".join(number(row[name], label) for name in ("value", "error"))
                value += f"\n{row['against']} {row['bin_low']:g}..{row['bin_high']:g}"
            table.setdefault(method, {"method": method})[row["statistic"]] = value
    n = next(iter(table.values()))["median"]["n"]
    width = "width=half-width" if is_wide() else ""
    show_table(
        f"{with_unit(label)}: target - reference of {n:,} {pairs} pairs, with 95 % intervals",
        f"method median mad=scatter {width} rms_binned=rms_of_bins worst_bin",
        table.values(),
    )
    scatters = [row for row in rows if row["statistic"] == "mad"]
    subsets: dict[str, dict[str, Any]] = {}
    for row in scatters:
        subsets.setdefault(row["subset"], dict(row))[row["method"]] = row
    methods = dict.fromkeys(f"{row['method']}:?" for row in scatters)
    show_table(
        f"{with_unit(label)}: scatter (1.4826 MAD) of {pairs} pairs",
        " ".join(["subset", "n=pairs", *methods]),
        subsets.values(),
    )
    say("+ larger than the best correction: the interval of the difference excludes 0")
    if any(row["value"] is None for row in scatters):
        say("- too few pairs")
    say("")


def _show_failing(entries: Sequence[Row], chosen: str) -> None:
    """Print for each method how many bins fail of those that are judged."""
    for method in sorted({one["method"] for one in entries}, key=lambda one: (one != chosen, one)):
        rows = [
            {"name": one["label"], "against": one["against"]}
            | {kind.replace(" ", "_"): "/".join(map(str, n)) for kind, n in one["counts"].items()}
            for one in entries
            if one["method"] == method
        ]
        kinds = [[name for name in rows[0] if name.startswith(one)] for one in (PAIRS, ROWS)]
        title = f"{method}: failing / judged bins of held-out pairs, by S/N"
        for some in [kinds[0] + kinds[1]] if is_wide() else filter(None, kinds):
            show_table(title, f"name=label against {' '.join(some)}", rows)
    say(RULE, wrap=True)
    say("Rows: a pair counts as often as it is among the nearest to a row of the catalog.\n")


# --- trends -------------------------------------------------------------------------------------


@command()
def trends(
    inputs: Places = None, *, out: Place = None, store: Place = None, correction: Name = None,
    label: Name = None, against: Name = None, method: Name = None, options: Options,
) -> Shown:  # fmt: skip
    """Show the trends of target - reference before and after each correction.

    Without --label and --against a summary; with either the medians of the bins.

    Example: sos-dask trends --store store --label feh --against logg
    """
    if inputs:
        directory = _on_pairs(Trends, inputs[0], inputs[1:], out, options)
    else:
        wanted = "trends", options, "label", "against", "method"
        directory = _current(find_store(store), *wanted, correction=correction)
    found = Trends.load(directory)
    rows = found["trends"]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"]))
    _one_of("label", label, (row["label"] for row in rows))
    _one_of("against", against, (row["against"] for row in rows))
    _one_of("method", method, methods)
    rows = [
        row
        for row in rows
        if label in (None, row["label"])
        and against in (None, row["against"])
        and (method is None or row["method"] in (None, method))
    ]
    yield {"path": directory, "trends": rows, "agreements": found["agreements"]}
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row["subset"], row["binning"]) == ("all", "equal-width"):
            tables.setdefault((row["label"], row["against"]), []).append(row)
    methods = [method] if method else methods
    if label is None and against is None:
        _show_summary(tables, methods)
    else:
        for (name, quantity), bins in tables.items():
            _show_bins(name, quantity, bins, methods)


def _show_summary(tables: Mapping[tuple[str, str], Sequence[Row]], methods: Sequence[str]) -> None:
    table = []
    for (label, against), bins in tables.items():
        line: dict[str, Any] = {"name": label, "against": against}
        for method in (*methods, None):
            some = [row for row in bins if row["method"] == method]
            rms, n = rms_of_medians([b["n"] for b in some], [b["median"] for b in some])
            line |= {method or "before": number(rms, label), "bins": n}
        table.append(line)
    show_table(
        "Target - reference: rms of the medians of bins, before and after each correction",
        " ".join(["name=label against", *(["bins"] if is_wide() else []), "before", *methods]),
        table,
    )
    labels = dict.fromkeys(label for label, _ in tables)
    units = ", ".join(f"{LABEL_UNITS[one]} for {one}" for one in labels if one in LABEL_UNITS)
    say(f"{units and f'{units}. '}After: of held-out pairs. Bins with 20 pairs or more count.")
    say("Give --label and --against to see the bins.")


def _show_bins(label: str, against: str, bins: Sequence[Row], methods: Sequence[str]) -> None:
    table: dict[str, dict[str, Any]] = {}
    for row in bins:
        place = f"{row['low']:g}..{row['high']:g}"
        has_error = is_wide() and row["error"] is not None
        error = f" ± {number(row['error'], label)}" if has_error else ""
        cell = number(row["median"], label, "+") + error
        if row["method"] is None and row["n"]:
            table[place] = {"place": place, "n": row["n"], "before": cell}
        elif place in table:
            table[place][row["method"]] = cell
    after = " ".join(f"{name}=after_{name}" for name in methods)
    title = f"{with_unit(label)} against {against}: median of target - reference"
    show_table(title, f"place={against} n=pairs before {after}", table.values())


# --- coverage -----------------------------------------------------------------------------------


@command(Coverage)
def coverage(
    inputs: Places = None, *, out: Place = None, errors: Place = None, grid: Names = None,
    key: Names = None, store: Place = None, correction: Name = None, options: Options,
) -> Shown:  # fmt: skip
    """Show which part of the catalog the pairs cover, and where more references would help most.

    Example: sos-dask coverage --store store --json
    """
    figure = None
    if not inputs:
        place = find_store(store)
        directory = _current(place, "coverage", options, correction=correction)
        figure = followed(place / "current" / "report") / "figures" / "coverage.png"
    elif len(inputs) != 4:
        hint = "For example: sos-dask coverage pairs model lamost lamost.stars -o coverage."
        raise ConfigError(f"{len(inputs)} paths are not PAIRS MODEL CATALOG STARS", hint)
    else:
        pairs, model, catalog, stars = inputs
        chosen = options.settings(grid=dict(map(_limits, grid or [])))
        [scored] = open_catalogs([catalog], key, "obs_id")
        more: dict[str, Any] = {
            "pairs": pairs,
            "observations": scored,
            "stars": Catalog.open(stars),
        }
        more |= {"model": model} | ({"errors": errors} if errors else {})
        directory = _on_pairs(Coverage, pairs, [model], out, options, chosen, more)
    found = Coverage.load(directory)
    yield found
    _show_shares(found)
    if figure is not None and figure.is_file():
        say(f"The maps as a figure: {figure}")
    show_table(
        "On the sky: share outside by HEALPix base pixel",
        "pixel rows share:.1f=outside_%",
        [{**row, "share": 100 * row["outside"] / row["rows"]} for row in found["sky"]],
    )
    show_table(
        "Where follow-up would gain most: cells with most rows outside",
        "teff:.0f=Teff_K logg:.2f=log_g feh:+.2f=[Fe/H] outside rows phot_g_mean_mag:.1f=mean_G",
        found["follow_up"],
    )


def _limits(text: str) -> tuple[str, tuple[float, float]]:
    """Parse ``LABEL=LOW,HIGH``."""
    label, _, numbers = text.partition("=")
    try:
        low, high = map(float, numbers.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if label not in LABEL_UNITS or not -math.inf < low < high < math.inf:
        raise ConfigError(
            f"--grid '{text}' is not LABEL=LOW,HIGH", "For example teff=3500,8500; also logg, feh."
        )
    return label, (low, high)


def _show_shares(found: Row) -> None:
    """Print shares of rows and stars in each class, on what they rest, and flags."""
    stars = found["stars"]
    meaning = {"unknown": "a label or an input is missing: no coverage", **found["meaning"]}
    show_table(
        f"Share of the rows, and of {stars['sampled']:,} stars",
        "name= rows:.2%=rows_% stars:.2%=stars_% meaning",
        [
            {"name": name, "rows": found[name], "stars": stars[name], "meaning": meaning[name]}
            for name in ("inside", "sparse", "outside", "unknown")
        ],
    )
    for text in found["warnings"]:
        say(f"Warning: {text}")
    say(f"Measure: {found['measure']}, of {', '.join(found['parameters'])}")
    if without := found["parameters_without_column"]:
        say(f"Not in the catalog: {', '.join(without)}")
    for kind, text in found["intervals"].items():
        say(f"Width of intervals, {kind}: {text}")
    flags = sorted((int(bit), n) for bit, n in found["flags"].items())
    rows = [{"bit": bit, "n": n, "meaning": COVERAGE_MEANINGS[bit]} for bit, n in flags]
    show_table("Bits of flag_sos", "bit n=rows meaning", rows)
