"""Settings that make no sense are refused with the value and what would do, whatever their type."""

from __future__ import annotations

import pytest

from expertflow.config import Settings, parse_bytes


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cache_size", float("inf"), "cache_size=inf must be a finite number above 0"),
        ("cache_size", float("nan"), "cache_size=nan must be a finite number above 0"),
        ("cache_size", "4", "cache_size='4' must be a finite number above 0"),
        ("cache_size", True, "cache_size=True must be a finite number above 0"),
        ("memory", "1e300TB", "memory='1e300TB' must be above zero and finite"),
        ("link", "1e300TB/s", "link='1e300TB/s' must be above zero and finite"),
        # From a file of settings: text would count as true.
        ("overlap", "no", "overlap='no' must be True or False"),
        ("look_ahead", "off", "look_ahead='off' must be True or False"),
        ("direct_io", "false", "direct_io='false' must be True or False or None"),
        ("direct_io", 0, "direct_io=0 must be True or False or None"),
    ],
)
def test_what_makes_no_sense_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


def test_bytes_given_as_a_number_are_exact():
    assert parse_bytes(2**53 + 1) == 2**53 + 1
