"""Commands that show the products of a build, or make one of them and show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sos_dask.cli.options import (
    Key,
    OptionalOut,
    StepOptions,
    Store,
    find_store,
    open_catalogs,
    with_settings,
)
from sos_dask.cli.output import (
    LABEL_UNITS,
    digits_of,
    is_wide,
    print_json,
    reporting,
    say,
    show_table,
    with_unit,
)
from sos_dask.errors import ConfigError
from sos_dask.schema import nearest
from sos_dask.stages.compare import CompareSettings
from sos_dask.stages.coverage import CoverageSettings
from sos_dask.stages.evidence import OnEvidence, on_pairs

_SAMPLES = {"test": "held-out", "train": "training"}
_MARK = " +"

Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="PAIRS MODEL",
        help="Pairs and models trained on them; without: the current build of the store.",
        show_default=False,
    ),
]
Label = Annotated[
    str | None, typer.Option("--label", metavar="NAME", help="Only this label, such as feh.")
]


@with_settings
def compare(
    inputs: Inputs = None,
    out: OptionalOut = None,
    store: Store = None,
    label: Label = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="NAME",
            help="test (held out) or train. Default: test; with --json both.",
            show_default=False,
        ),
    ] = None,
    *,
    settings: type[CompareSettings],
    options: StepOptions,
) -> None:
    """Show how the methods compare: scatter, trends left, artifacts, and which is chosen and why.

    Example: sos-dask compare --store store --label feh
    """
    from sos_dask.stages.compare import Compare
    from sos_dask.storage.store import costs

    _one_of("label", label, LABEL_UNITS)
    _one_of("sample", sample, _SAMPLES)
    if inputs:
        options.refuse(("store",), "with PAIRS")
        directory = _on_pairs(Compare, settings(), inputs[0], inputs[1:], {}, out, options)
        taken = None
    else:
        options.refuse_all_but("label", "sample")
        place = find_store(store)
        directory = _current(place, "comparison")
        taken = _training_costs(place, costs(place))
    found = Compare.load(directory)
    del found["metrics"]
    for name in ("figures", "artifacts", "outside"):
        found[name] = [row for row in found[name] if label in (None, row["label"])]
    if options.as_json:
        found["figures"] = [row for row in found["figures"] if sample in (None, row["sample"])]
        print_json({"path": directory, **found, "costs": taken})
        return
    sample = sample or "test"
    for name in dict.fromkeys(row["label"] for row in found["figures"]):
        rows = [r for r in found["figures"] if (r["label"], r["sample"]) == (name, sample)]
        _show_figures(name, sample, rows, found["method"])
        _show_subsets(name, sample, rows)
    _show_smoothness(found)
    if taken is not None:
        rows = [(method, *map(_seconds, cost.values())) for method, cost in taken.items()]
        show_table("Cost of training when it was run", ["method", ">CPU s", ">wall s"], rows)
    say(f"Rule '{found['rule']}' chose {found['why']}.")


def _show_smoothness(found: Mapping[str, Any]) -> None:
    """Print artifacts, and what corrections do outside the overlap."""
    show_table(
        "Artifacts: second differences over the noise, largest step, with 95 % intervals",
        ["label", "method", ">roughness", ">jump", ">noise", ">cells"],
        [
            (
                with_unit(row["label"]),
                row["method"],
                _interval(row, "roughness", digits=4),
                _interval(row, "jump"),
                _number(row["noise"], row["label"]),
                str(row["n_cells"]),
            )
            for row in found["artifacts"]
        ],
    )
    if found["outside"]:
        show_table(
            "Outside the overlap: how far past the values inside, and the step at the edge",
            ["label", "method", "where", ">exceeds", ">of cells", ">step"],
            [
                (
                    with_unit(row["label"]),
                    row["method"],
                    row["where"],
                    _interval(row, "exceeds", narrow=False),
                    "-" if row["share"] is None else f"{100 * row['share']:.0f} %",
                    _interval(row, "step", narrow=False),
                )
                for row in found["outside"]
            ],
        )


def _training_costs(store: Path, known: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """CPU and wall seconds that training took, as far as they are known, by method."""
    from sos_dask.storage.store import published

    found = {}
    for product, fingerprint in published(store).items():
        if product.startswith("model."):
            cost = known.get(fingerprint)
            found[product.removeprefix("model.")] = {
                "train_cpu_s": cost["cpu_s"] if cost else None,
                "train_wall_s": cost["wall_s"] if cost else None,
            }
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _one_of(what: str, value: str | None, known: Iterable[str]) -> None:
    """Refuse a value that is not among those there are."""
    known = list(known)
    if value is not None and value not in known:
        raise ConfigError(
            f"--{what} '{value}' is not one of {', '.join(known)}", nearest(value, known)
        )


def _current(store: Path, product: str) -> Path:
    from sos_dask.storage.store import current_product

    return current_product(store, product)


def _on_pairs(
    stage: type[OnEvidence[Any]],
    settings: Any,
    pairs: Path,
    models: Sequence[Path],
    more: Mapping[str, Any],
    out: Path | None,
    options: StepOptions,
) -> Path:
    """Run a stage on pairs and models given by path; where its output is."""
    from sos_dask.storage.catalog import Catalog
    from sos_dask.storage.manifest import Manifest

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
    inputs |= more
    with reporting() as report, options.start() as cluster:
        given: dict[str, Any] = {"overwrite": options.overwrite, "cluster": cluster}
        on_pairs(
            stage, Catalog.open(pairs), by_method, out, settings, inputs, report=report, **given
        )
    return out


def _number(value: float | None, label: str, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits_of(label)}f}"


def _interval(
    row: Mapping[str, Any], name: str = "", narrow: bool = True, digits: int | None = None
) -> str:
    """Format a figure with its interval on the line below, where there is room for it."""
    prefix = f"{name}_" if name else ""
    value, low, high = row[name or "value"], row[f"{prefix}low"], row[f"{prefix}high"]
    if value is None:
        return "-"
    digits = digits or digits_of(row["label"])
    mark = _MARK if row.get("behind_low") is not None and row["behind_low"] > 0 else ""
    if not (narrow or is_wide()):
        return f"{value:.{digits}f}{mark}"
    interval = f"{low:.{digits}f}, {high:.{digits}f}"
    if not is_wide() and digits == 4:
        interval = interval.replace("-0.", "-.").replace(" 0.", " .").removeprefix("0")
    return f"{value:.{digits}f}{mark}\n{interval}"


def _show_figures(label: str, sample: str, rows: Sequence[dict[str, Any]], chosen: str) -> None:
    whole = {(r["method"], r["statistic"]): r for r in rows if r["subset"] == "all"}
    statistics = {"median": ">median", "mad": ">scatter", "width": ">half-width"}
    statistics |= {"rms_binned": ">rms of bins"}
    if not is_wide():
        del statistics["width"]
    table = []
    for method in dict.fromkeys(method for method, _ in whole):
        worst = whole[method, "worst_bin"]
        place = "-"
        if worst["value"] is not None:
            value, error = (_number(worst[name], label) for name in ("value", "error"))
            low, high = (f"{worst[name]:g}" for name in ("bin_low", "bin_high"))
            place = f"{value} ± {error}\n{worst['against']} {low}..{high}"
        name = method + (" *" if method == chosen else "")
        table.append([name, *(_interval(whole[method, one]) for one in statistics), place])
    n = next(iter(whole.values()))["n"]
    title = f"{with_unit(label)}: target - reference of {n:,} {_SAMPLES[sample]} pairs"
    headers = ["method", *statistics.values(), ">worst bin"]
    show_table(f"{title}, with 95 % intervals", headers, table)


def _show_subsets(label: str, sample: str, rows: Sequence[dict[str, Any]]) -> None:
    found = {(r["subset"], r["method"]): r for r in rows if r["statistic"] == "mad"}
    methods = list(dict.fromkeys(method for _, method in found))
    table = []
    for subset in dict.fromkeys(subset for subset, _ in found):
        ours = [found[subset, method] for method in methods]
        cells = (_interval(row, narrow=False) for row in ours)
        table.append([subset, f"{ours[0]['n']:,}", *cells])
    show_table(
        f"{with_unit(label)}: scatter (1.4826 MAD) of {_SAMPLES[sample]} pairs",
        ["subset", ">pairs", *(f">{method}" for method in methods)],
        table,
    )
    say("+ larger than the best correction: the interval of the difference excludes 0")
    if any(row["value"] is None for row in found.values()):
        say("- too few pairs")
    say("")


@with_settings
def trends(
    inputs: Inputs = None,
    out: OptionalOut = None,
    store: Store = None,
    label: Label = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="Only bins of this quantity: teff, logg, feh, snr, ...",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="Only after this correction.")
    ] = None,
    *,
    options: StepOptions,
) -> None:
    """Show the trends of target - reference before and after each correction.

    Without --label and --against a summary; with either the medians of the bins.

    Example: sos-dask trends --store store --label feh --against logg
    """
    from sos_dask.stages.compare import Trends

    if inputs:
        options.refuse(("store",), "with PAIRS")
        directory = _on_pairs(Trends, None, inputs[0], inputs[1:], {}, out, options)
    else:
        options.refuse_all_but("label", "against", "method")
        directory = _current(find_store(store), "trends")
    _one_of("label", label, LABEL_UNITS)
    found = Trends.load(directory)
    rows = found["trends"]
    _one_of("against", against, dict.fromkeys(row["against"] for row in rows))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name]
    _one_of("method", method, methods)
    wanted = {"label": label, "against": against}
    rows = [
        row
        for row in rows
        if all(value in (None, row[key]) for key, value in wanted.items())
        and (method is None or row["method"] in (None, method))
    ]
    if options.as_json:
        print_json({"path": directory, "trends": rows, "agreements": found["agreements"]})
        return
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if (row["subset"], row["binning"]) == ("all", "equal-width"):
            tables.setdefault((row["label"], row["against"]), []).append(row)
    shown_methods = [method] if method else methods
    if label is None and against is None:
        _show_summary(tables, shown_methods)
        return
    for (name, quantity), bins in tables.items():
        _show_bins(name, quantity, bins, shown_methods)


def _show_summary(
    tables: Mapping[tuple[str, str], Sequence[dict[str, Any]]], methods: Sequence[str]
) -> None:
    from sos_dask.stats.numbers import rms_of_medians

    table = []
    for (label, against), bins in tables.items():
        found = []
        for method in (None, *methods):
            some = [row for row in bins if row["method"] == method]
            found.append(rms_of_medians([b["n"] for b in some], [b["median"] for b in some]))
        cells = [_number(rms, label) for rms, _ in found]
        table.append([label, against, *([str(found[0][1])] if is_wide() else []), *cells])
    show_table(
        "Target - reference: rms of the medians of bins, before and after each correction",
        [
            "label",
            "against",
            *([">bins"] if is_wide() else []),
            ">before",
            *(f">{method}" for method in methods),
        ],
        table,
    )
    say("K for teff, dex otherwise. After: of held-out pairs. Bins with 20 pairs or more count.")
    say("Give --label and --against to see the bins.")


def _show_bins(
    label: str, against: str, bins: Sequence[dict[str, Any]], methods: Sequence[str]
) -> None:
    by_bin: dict[int, dict[str | None, dict[str, Any]]] = {}
    for row in bins:
        by_bin.setdefault(row["bin"], {})[row["method"]] = row
    table = []
    for found in by_bin.values():
        before = found[None]
        if not before["n"]:
            continue
        cells = []
        for method in (None, *methods):
            one = found.get(method, {"median": None, "error": None})
            error = f" ± {_number(one['error'], label)}" if one["error"] is not None else ""
            cells.append(_number(one["median"], label, "+") + (error if is_wide() else ""))
        place = f"{before['low']:g}..{before['high']:g}"
        table.append([place, f"{before['n']:,}", *cells])
    after = (f">{'after' if number == 0 else ''}\n{name}" for number, name in enumerate(methods))
    show_table(
        f"{with_unit(label)} against {against}: median of target - reference",
        [against, ">pairs", ">before", *after],
        table,
    )


@with_settings
def coverage(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PAIRS MODEL CATALOG STARS",
            help="Pairs, a model trained on them, the catalog to score and its stars; without: "
            "the current build of the store.",
            show_default=False,
        ),
    ] = None,
    out: OptionalOut = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="DIRECTORY",
            help="With PAIRS: product 'uncertainty' of this model, which apply is to widen.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="LABEL=LOW,HIGH",
            help="With PAIRS: limits of the grid of the survey's pipeline; repeatable. Default: "
            "smallest and largest value.",
        ),
    ] = None,
    key: Key = None,
    store: Store = None,
    *,
    settings: type[CoverageSettings],
    options: StepOptions,
) -> None:
    """Show which part of the catalog the pairs cover, and where more references would help most.

    Example: sos-dask coverage --store store --json
    """
    from sos_dask.stages.coverage import Coverage

    figure = None
    if inputs:
        options.refuse(("store",), "with PAIRS")
        if out is None:
            raise ConfigError("--out is missing", "Give a directory for the output: -o DIR.")
        directory = out
        chosen = settings(grid=dict(_limits(text) for text in grid or []))
        _score(inputs, out, chosen, errors, key, options)
    else:
        options.refuse_all_but()
        place = find_store(store)
        directory = _current(place, "coverage")
        figure = place / "current" / "report" / "figures" / "coverage.png"
    found = Coverage.load(directory)
    if options.as_json:
        print_json(found)
        return
    _show_coverage(found, figure)


def _show_coverage(found: Mapping[str, Any], figure: Path | None) -> None:
    """Print shares, flags, the sky and where follow-up would gain most."""
    from sos_dask.correct import COVERAGE_MEANINGS

    stars = found["stars"]
    unknown = "a label is missing: no coverage"
    show_table(
        f"Share of the rows, and of {stars['sampled']:,} stars",
        ["", ">rows %", ">stars %", "meaning"],
        [
            (
                name,
                f"{100 * found[name]:.2f}",
                f"{100 * stars[name]:.2f}",
                found["meaning"].get(name, unknown),
            )
            for name in ("inside", "sparse", "outside", "unknown")
        ],
    )
    for text in found["warnings"]:
        say(f"Warning: {text}")
    say(f"Measure: {found['measure']}, of {', '.join(found['parameters'])}")
    if found["parameters_without_column"]:
        say(f"Not in the catalog: {', '.join(found['parameters_without_column'])}")
    for kind, text in found["intervals"].items():
        say(f"Width of intervals, {kind}: {text}")
    flags = sorted(found["flags"].items(), key=lambda item: int(item[0]))
    show_table(
        "Bits of flag_sos",
        [">bit", ">rows", ""],
        [(bit, f"{n:,}", COVERAGE_MEANINGS[int(bit)]) for bit, n in flags],
    )
    if figure is not None and figure.is_file():
        say(f"The maps as a figure: {figure}")
    show_table(
        "On the sky: share outside by HEALPix base pixel",
        [">pixel", ">rows", ">outside %"],
        [
            (str(row["pixel"]), f"{row['rows']:,}", f"{100 * row['outside'] / row['rows']:.1f}")
            for row in found["sky"]
        ],
    )
    show_table(
        "Where follow-up would gain most: cells with most rows outside",
        [">Teff K", ">log g", ">[Fe/H]", ">outside", ">rows", ">mean G"],
        [
            (
                f"{row['teff']:.0f}",
                f"{row['logg']:.2f}",
                f"{row['feh']:+.2f}",
                f"{row['outside']:,}",
                f"{row['rows']:,}",
                "" if row["phot_g_mean_mag"] is None else f"{row['phot_g_mean_mag']:.1f}",
            )
            for row in found["follow_up"]
        ],
    )


def _score(
    inputs: list[Path],
    out: Path,
    settings: CoverageSettings,
    errors: Path | None,
    key: list[str] | None,
    options: StepOptions,
) -> None:
    """Run the stage on inputs given by path."""
    from sos_dask.stages.coverage import Coverage

    if len(inputs) != 4:
        raise ConfigError(
            f"{len(inputs)} paths are not PAIRS MODEL CATALOG STARS",
            "For example: sos-dask coverage pairs model lamost lamost.stars -o coverage.",
        )
    pairs, model, catalog, stars = inputs
    [scored] = open_catalogs([catalog], key, "obs_id")
    more: dict[str, Any] = {"model": model, "pairs": pairs, "observations": scored}
    more |= {"stars": stars} | ({"errors": errors} if errors else {})
    _on_pairs(Coverage, settings, pairs, [model], more, out, options)


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
