from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.number_answers import answer_number

NUMBERS = st.decimals(
    min_value=-(10**12), max_value=10**12, places=2, allow_nan=False, allow_infinity=False
)
WORDS = st.text(alphabet="abc xyz.,:;!?()*\n", max_size=40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 left.", "3"),
        ("3 + 4 = 7.", "7"),
        ("It costs $1,234,567.80!", "1234567.80"),
        ("He owes -$5", "-5"),
        ("He owes $-5", "-5"),
        ("minus \u221212", "-12"),
        ("10-7", "7"),
        ("(10)-7", "7"),
        ("x=-7", "-7"),
        ("a list: 1,2,3", "3"),
        ("1,2345", "2345"),
        ("half is .5", "0.5"),
        ("That is 25%.", "25"),
        ("**42**", "42"),
        ("\\boxed{42}", "42"),
        ("<<3*8=24>>24 apples", "24"),
        ("12km", "12"),
        ("7 of H2O", "7"),
        ("work 1 2 3\n#### 1,000", "1000"),
        ("#### 12\n\nQuestion: what is 3 + 4? #### 7", "12"),
        ("The answer is 12 apples, so 3 are left.", "12"),
        ("so THE FINAL ANSWER IS: $9", "9"),
        ("The answer is not clear.\nIt may be 4", "4"),
        ("The answer is\n8", "8"),
        ("2 and ####", "2"),
        ("0.10", "0.1"),
    ],
)
def test_numbers_are_read_as_arithmetic_writes_them(text: str, expected: str) -> None:
    assert answer_number(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "none", "twelve", "####", "The answer is", "H2O", "\u0663"])
def test_a_text_without_a_number_has_none(text: str) -> None:
    assert answer_number(text) is None


@given(NUMBERS, st.sampled_from(["", "$", "\u20ac"]), st.booleans(), WORDS)
def test_the_last_number_is_found_however_it_is_written(
    number: Decimal, currency: str, grouped: bool, before: str
) -> None:
    digits = f"{abs(number):,f}" if grouped else f"{abs(number):f}"
    written = ("-" if number < 0 else "") + currency + digits
    assert answer_number(f"{before} 17 {before} = {written}.") == number


@given(NUMBERS, NUMBERS, WORDS)
def test_what_follows_the_mark_beats_what_comes_later(
    number: Decimal, later: Decimal, before: str
) -> None:
    text = f"{before} 17 \n#### {number:,f}\n{before} {later:f}"
    assert answer_number(text) == number


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    found = answer_number(text)
    assert found is None or found.is_finite()
    assert found is None or any(character in text for character in "0123456789")
