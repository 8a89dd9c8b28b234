"""The number that an answer comes to, as grade-school arithmetic writes it.

After `####` or "the answer is" it is the number that follows; without such a mark it is the last
number of the text. Thousands commas, currency signs, percent signs, negative signs (also U+2212)
and a full stop at the end are read for what they are; a decimal comma is not.
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]%.])[-\u2212])?"
    r"(?:[$\u20ac\u00a3\u00a5\u20b9]\s?(?P<inner>[-\u2212])?)?"
    r"(?P<digits>(?<![0-9A-Za-z_])"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
)
_MARK = re.compile(r"####|the\s+(?:final\s+)?answer\s+is", re.IGNORECASE)


def answer_number(text: str) -> Decimal | None:
    """Return the number that a text comes to, None if it has none.

    Of several marks the first that a number follows counts: a model that does not stop goes on with
    a question of its own. The number must stand before the end of the mark's line.
    """
    for mark in _MARK.finditer(text):
        end = text.find("\n", mark.end())
        found = _NUMBER.search(text, mark.end(), len(text) if end < 0 else end)
        if found is not None:
            return _value(found)
    numbers = [_value(found) for found in _NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["minus"] or found["inner"] else value
