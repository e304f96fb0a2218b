"""Style: the same bytes again, words, numbers, limits."""

import numpy as np
import pytest

from sos_dask.report.style import (
    WIDTH,
    listed,
    number,
    ordered,
    percent,
    readable,
    render,
    robust_limits,
    share_of_width,
)
from sos_dask.schema import LABELS
from tests.report.made import plain_figure


def test_the_same_figure_gives_the_same_bytes_whatever_the_user_has_set():
    import matplotlib as mpl

    first = render(plain_figure)
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 20}):
        second = render(plain_figure)
        assert mpl.rcParams["font.size"] == 30, "the user's settings are left alone"
    assert first is not None
    assert first == second
    assert first.png.startswith(b"\x89PNG") and first.pdf.startswith(b"%PDF")
    for word in (b"CreationDate", b"Matplotlib", b"matplotlib"):
        assert word not in first.png and word not in first.pdf
    assert render(lambda: None) is None


def test_numbers_have_the_digits_of_their_unit():
    assert number(-37.89, "K", sign=True) == "−37.9"
    assert number(0.06941, "dex") == "0.0694"
    assert number(None, "dex") == number(float("nan"), "dex") == "–"
    assert listed(["teff"]) == "Teff" and listed(LABELS) == "Teff, log g and [Fe/H]"


def test_limits_hold_zero_and_ignore_a_few_wild_bins():
    low = np.append(np.linspace(1, 2, 99), -1e6)
    bottom, top = robust_limits(low, low + 1)
    assert -1 < bottom <= 0 and 2.8 < top < 4
    assert robust_limits(np.array([np.nan]), np.array([np.nan])) == (-1.0, 1.0)


def test_words_are_those_of_a_person_and_shares_are_never_nothing():
    assert readable("worse in feh scatter, teff_err") == "worse in [Fe/H] scatter, teff_err"
    assert percent(48, 1_000_000) == "<0.1 %"
    assert percent(0, 10) == "0.0 %" and percent(1, 8) == "12.5 %" and percent(1, 0) == "–"


def test_widths_shares_and_orders():
    assert share_of_width(1) == pytest.approx(0.4 * WIDTH)
    assert share_of_width(2) == pytest.approx(0.7 * WIDTH)
    assert share_of_width(3) == pytest.approx(WIDTH) and share_of_width(5) == WIDTH
    assert ordered(["c", "a", "d", "a"], ("b", "a")) == ["a", "c", "d"]
    assert percent(5, 10_000) != "<0.1 %" and percent(4, 10_000) == "<0.1 %"
    assert number(1.005, "km/s") == "1.00" and number(0.5, "K", True) == "+0.5"
