"""Class names in a picture of matplotlib, with fonts that have their letters and without."""

from __future__ import annotations

import warnings

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from cascade_det.report.confusion_plot import plot_confusion
from cascade_det.report.fonts import with_fonts

CAT, DOG, THAI = "\u732b", "\u72ac", "\u0e41"


@pytest.fixture
def only_own_fonts(monkeypatch):
    """As where no further font is installed; gives the list of those that are known."""
    of_matplotlib = matplotlib.get_data_path()
    known = [
        entry for entry in font_manager.fontManager.ttflist if entry.fname.startswith(of_matplotlib)
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    return known


def make_font(path, family, letters):
    """A font whose letters are squares."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"g{ord(letter):x}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): f"g{ord(letter):x}" for letter in letters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_letters_that_no_font_has_are_escaped(only_own_fonts):
    texts, families = with_fonts(["na\u00efve", f"{CAT} 2", "\U00020000", "a\nb\udcf6\u202e"])
    assert texts == ["na\u00efve", "\\u732b 2", "\\U00020000", "a\\x0ab\\udcf6\\u202e"]
    assert families == matplotlib.rcParams["font.family"]


def test_an_installed_font_is_taken(only_own_fonts, tmp_path):
    make_font(tmp_path / "cats.ttf", "Cats-and:dogs", CAT + DOG)
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    texts, families = with_fonts([CAT + DOG, THAI, "cat"])
    assert texts == [CAT + DOG, "\\u0e41", "cat"]
    assert families == [*matplotlib.rcParams["font.family"], "Cats-and:dogs"]
    # No other image gets it.
    assert with_fonts(["cat"])[1] == families[:-1]


def test_families_without_a_regular_font_are_no_remark(tmp_path, monkeypatch, caplog):
    make_font(tmp_path / "light.ttf", "Light Cats", DOG)
    entry = font_manager.FontEntry(fname=str(tmp_path / "light.ttf"), name="Light Cats", weight=200)
    known = [*font_manager.fontManager.ttflist, entry]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    with_fonts([THAI])
    assert not caplog.records


@pytest.mark.parametrize("installed", [False, True])
def test_the_confusion_matrix_has_no_boxes_for_letters(only_own_fonts, tmp_path, installed):
    if installed:
        make_font(tmp_path / "cats.ttf", "Cats", CAT)
        font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's about a missing glyph
        plot_confusion(
            [CAT * 3, "\udcf6\x1b[31m", "$x$" * 10_000, "background"],
            np.eye(4, dtype=np.int64),
            tmp_path / "matrix.png",
        )
    assert (tmp_path / "matrix.png").stat().st_size > 5000
