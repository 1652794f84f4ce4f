"""Durations: what is read, what is refused and with which sentence, what is shown."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemonkit.core.duration import describe, positive_seconds, seconds
from daemonkit.errors import UsageError

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (90, 90),
        (0.25, 0.25),
        (0, 0),
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 1 h 30 m ", 5400),
        ("250ms", 0.25),
        ("2d", 172_800),
        ("1w", 604_800),
        ("0.5s", 0.5),
        (".5m", 30),
        ("1.5h", 5400),
        ("30", 30),
        ("0.1", 0.1),
        ("1w2d3h4m5s6ms", 604_800 + 2 * 86_400 + 3 * 3600 + 4 * 60 + 5.006),
    ],
)
def test_numbers_and_text_are_read_as_seconds(value: float | str, expected: float) -> None:
    assert seconds(value, what="@every") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "5 parsecs",
            '@every("5 parsecs"): "parsecs" is not a unit of time; use ms, s, m, h, d or w, as in "1h30m"',
        ),
        (
            "5 minutes",
            '@every("5 minutes"): "minutes" is not a unit of time (did you mean "5m"?); '
            'use ms, s, m, h, d or w, as in "1h30m"',
        ),
        (
            "2H",
            '@every("2H"): "H" is not a unit of time (did you mean "2h"?); use ms, s, m, h, d or w, as in "1h30m"',
        ),
        ("1h30", '@every("1h30"): 30 lacks its unit; use ms, s, m, h, d or w, as in "1h30m"'),
        ("30 1h", '@every("30 1h"): 30 lacks its unit; use ms, s, m, h, d or w, as in "1h30m"'),
        ("-5s", '@every("-5s"): a duration cannot be negative'),
        (-0.5, "@every(-0.5): a duration cannot be negative"),
        (float("nan"), "@every(nan): a duration must be finite"),
        (float("inf"), "@every(inf): a duration must be finite"),
        (
            "soon",
            '@every("soon"): not a duration; write a number of seconds, or text such as "90s", "5m" or "1h30m"',
        ),
    ],
)
def test_what_is_no_duration_is_refused_with_one_sentence(value: float | str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        seconds(value, what="@every")
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", [True, False, None, [], b"5s", 1j, "", "s", "..2s", "٣s", "1s,2s", "+1"])
def test_other_things_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        seconds(value, what="@every")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [10**400, "9" * 400, "9" * 308 + "w"])
def test_a_duration_that_no_float_holds_is_refused_briefly(value: int | str) -> None:
    with pytest.raises(UsageError, match="must be finite") as caught:
        seconds(value, what="@every")
    assert len(str(caught.value)) < 110


def test_a_key_of_a_file_is_named_as_it_was_given() -> None:
    with pytest.raises(UsageError) as caught:
        seconds("5 foo", what="key graceful_timeout in /etc/x.toml")
    assert str(caught.value).startswith('key graceful_timeout in /etc/x.toml = "5 foo": "foo" is not a unit')


@pytest.mark.parametrize("value", [0, 0.0, "0", "0s", "0h0m"])
def test_zero_is_a_duration_but_not_a_positive_one(value: float | str) -> None:
    assert seconds(value, what="@every") == 0
    with pytest.raises(UsageError, match="must be longer than 0"):
        positive_seconds(value, what="@every")


def test_positive_seconds_reads_the_same_text() -> None:
    assert positive_seconds("1h30m", what="@every") == 5400


@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(sorted(UNITS))), min_size=1, max_size=6))
def test_parts_add_up(parts: list[tuple[int, str]]) -> None:
    text = " ".join(f"{number}{unit}" for number, unit in parts)
    assert seconds(text, what="x") == pytest.approx(sum(number * UNITS[unit] for number, unit in parts))


@given(st.text(max_size=12) | st.text("0123456789. -+msdhwMe\n", max_size=12))
@example("1\n")
def test_any_text_is_a_duration_or_a_usage_error(text: str) -> None:
    try:
        assert seconds(text, what="@every") >= 0
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0s"),
        (0.0001, "<1ms"),
        (0.25, "250ms"),
        (1.5, "1.5s"),
        (5, "5s"),
        (59.9996, "1m"),
        (90, "1m30s"),
        (3599.5, "59m59s"),
        (3661, "1h1m"),
        (7200, "2h"),
        (86_399, "23h59m"),
        (3 * 86_400 + 4 * 3600 + 59, "3d4h"),
        (604_800, "7d"),
        (-90, "-1m30s"),
        (float("inf"), "inf"),
    ],
)
def test_a_duration_is_described_in_two_units_at_most(value: float, text: str) -> None:
    assert describe(value) == text


@given(st.integers(1, 3_599_999))
def test_a_description_under_an_hour_is_exact_to_the_second(milliseconds: int) -> None:
    value = milliseconds / 1000
    shown = seconds(describe(value), what="x")
    assert shown == value if value < 60 else shown == int(value)
