"""What a terminal, an encoder and a reader are spared."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_det.text import check_name, listed, printable

ANY = st.text(st.characters(codec=None))
FINE = ["cell", "Straße 7", "細胞", "خلية", "👩‍🔬", "a b", "naïve", "x" * 255]
BAD = [
    "a\nb",
    "\x1b[31mred",
    "a\x00",
    "a\u202egnp.exe",
    "gr\udcf6\udcdfe",
    "a\u2028b",
    "\x7f",
    "\x9b",
]


@given(ANY)
def test_nothing_is_left_that_a_terminal_obeys_or_an_encoder_refuses(text):
    shown = printable(text)
    shown.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)
    assert not any(
        unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI")
        for c in shown
    )
    assert printable(shown) == shown


@given(ANY, st.integers(2, 40))
def test_a_length_is_kept_to(text, longest):
    shown = printable(text, longest=longest)
    assert len(shown) <= longest
    whole = printable(text)
    if len(whole) <= longest:
        assert shown == whole
    else:
        start, end = shown.split("…", 1) if whole.count("…") == 0 else (shown[:1], "")
        assert whole.startswith(start)
        assert whole.endswith(end)


@pytest.mark.parametrize("text", FINE)
def test_other_text_stays(text):
    assert printable(text) == text
    assert check_name(text) == text


@pytest.mark.parametrize("text", BAD)
def test_bad_text_is_escaped_and_no_name(text):
    assert printable(text).isprintable()
    assert printable(text, lines=True).replace("\n", "").isprintable()
    with pytest.raises(ValueError, match="control characters"):
        check_name(text)


def test_escapes_are_pythons():
    assert printable("\x1b\u202e\udcf6") == r"\x1b\u202e\udcf6"


def test_the_first_of_many():
    assert listed([], 2) == ""
    assert listed("ab", 2) == "a, b"
    assert listed("abcde", 2, "; ") == "a; b and 3 more"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [(None, "not text"), (7, "not text"), ([], "not text"), ("", "empty"), (" \t", "empty")],
)
def test_what_is_no_name(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_name(name)


def test_a_name_of_a_novel_is_told_in_short():
    with pytest.raises(ValueError, match="10,000 characters") as error:
        check_name("x" * 10_000)
    assert len(str(error.value)) < 200
