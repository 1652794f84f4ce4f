"""Due times: grids, the five fields, daylight saving, and a wall clock that is set."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from cronsim import CronSim
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from daemonkit.core.schedule import CORRECTION, MINUTE, SECOND, After, Cron, Every, Schedule, jittered
from daemonkit.errors import UsageError

HOUR = 60 * MINUTE
DAY = 24 * HOUR
ZONES = sorted(available_timezones())
THE_SCHEDULES: list[Schedule] = [Every(5), After(5), Cron("* * * * *", "UTC")]

durations = st.integers(1, 10**18)
instants = st.integers(0, 10**19)


def wall(text: str, zone: str = "UTC", fold: int = 0) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()) * SECOND


def runs(cron: Cron, after: int, until: int) -> Iterator[int]:
    upcoming = cron.next_wall(after)
    while upcoming is not None and upcoming <= until:
        yield upcoming
        upcoming = cron.next_wall(upcoming)


def shown(cron: Cron, zone: str, after: str, until: str) -> list[str]:
    """The runs in (after, until], as that zone's clocks show them."""
    found = runs(cron, wall(after, zone), wall(until, zone))
    return [datetime.fromtimestamp(run // SECOND, ZoneInfo(zone)).strftime("%d %H:%M %z") for run in found]


# --- @every, @after


def test_a_schedule_is_named_after_its_decorator() -> None:
    assert [schedule.kind for schedule in THE_SCHEDULES] == ["every", "after", "cron"]


@given(durations, st.none() | st.integers(0, 10**18), instants, st.lists(st.integers(0, 10**19), max_size=20))
def test_the_grid_never_drifts_whatever_the_interval_and_the_lateness(
    interval: int, first: int | None, start: int, delays: list[int]
) -> None:
    every = Every(interval, first)
    due = every.first(start, 0)
    origin = start + (interval if first is None else first)
    assert due == origin
    for delay in delays:
        now = due + delay
        following, missed = every.following(due, now, 0)
        assert (following - origin) % interval == 0
        assert now < following <= now + interval
        assert missed == (following - due) // interval - 1
        due = following


@given(st.integers(1, 50), st.integers(0, 1000))
def test_missed_ticks_are_counted_one_by_one(interval: int, late: int) -> None:
    _, missed = Every(interval).following(100, 100 + late, 0)
    assert missed == sum(1 for tick in range(100 + interval, 100 + late + 1, interval))


def test_a_job_that_is_woken_early_does_not_run_again_at_the_same_due_time() -> None:
    assert Every(10).following(100, 97, 0) == (110, 0)


def test_the_first_run_may_be_at_once() -> None:
    assert Every(10, first_ns=0).first(1000, 0) == 1000
    assert Every(10).first(1000, 0) == 1010


def test_the_successor_of_a_tick_may_be_past() -> None:
    assert Every(10).successor(100, 500, 0) == 110


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_that_is_no_time_is_refused(interval: int) -> None:
    with pytest.raises(UsageError, match="1 ns or more"):
        Every(interval)


def test_after_comes_once() -> None:
    after = After(5 * SECOND)
    assert after.first(100, 0) == 100 + 5 * SECOND
    assert after.following(100, 200, 0) == (None, 0)
    assert Schedule.successor(after, 100, 200, 0) is None


@given(instants, st.integers(0, 10**12), st.floats(0, 1, exclude_max=True))
def test_jitter_only_delays_and_by_no_more_than_asked(due: int, jitter: int, chance: float) -> None:
    assert due <= jittered(due, jitter, lambda: chance) <= due + jitter


def test_a_script_without_cron_jobs_imports_neither_calendar_nor_zones() -> None:
    script = """
import sys, daemonkit.errors
before = set(sys.modules)
from daemonkit.core.schedule import After, Every
Every(1).first(0, 0), After(1).first(0, 0)
print(*sorted({"cronsim", "datetime", "zoneinfo", "difflib"} & (set(sys.modules) - before)))
"""
    seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == []


# --- @cron: expressions and zones


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("61 * * * *", "Bad minute"),
        ("* 24 * * *", "Bad hour"),
        ("0 0 0 * *", "Bad day-of-month"),
        ("0 0 * 13 *", "Bad month"),
        ("0 0 * * 8", "Bad day-of-week"),
        ("*/0 * * * *", "Bad minute"),
        ("5-1 * * * *", "Bad minute"),
        ("0 0 30 2 *", "Bad day-of-month"),
        ("* * * *", "Wrong number of fields"),
        ("* * * * * *", "Wrong number of fields"),
        ("", "Wrong number of fields"),
        ("@daily", "Wrong number of fields"),
    ],
)
def test_a_wrong_expression_is_refused_with_one_sentence(expression: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cron(expression)
    fields = "the five fields are minute hour day month weekday"
    assert str(caught.value) == f'@cron("{expression}"): {why}; {fields}'


@pytest.mark.parametrize("expression", ["1 1 */100 * MON#4", "0 0 */31 2 5#5"])
def test_an_expression_that_never_comes_true_is_refused_quickly(expression: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError, match="would never run"):
        Cron(expression)
    assert time.process_time() - began < 1  # of CPU; all days of all years would take minutes


@given(st.lists(st.text("0123456789*/,-#LWMONlw²", min_size=1, max_size=6), min_size=5, max_size=5))
@settings(max_examples=200)
def test_any_five_words_are_an_expression_or_a_usage_error(fields: list[str]) -> None:
    try:
        cron = Cron(" ".join(fields), "UTC")
    except UsageError:
        return
    upcoming = cron.next_wall(0)
    assert upcoming is None or upcoming > 0


@pytest.mark.parametrize("expression", [None, 5, "9" * 5000 + " * * * *"])
def test_what_is_no_expression_at_all_is_a_usage_error(expression: object) -> None:
    with pytest.raises(UsageError):
        Cron(expression)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Europe/Berln", 'did you mean "Europe/Berlin"?'),
        ("europe/berlin", 'did you mean "Europe/Berlin"?'),
        ("America/New York", 'did you mean "America/New_York"?'),
    ],
)
def test_an_unknown_zone_is_refused_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cron("0 5 * * *", name)
    sentence = f'@cron("0 5 * * *", tz="{name}"): "{name}" is not a time zone known here; {hint}'
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "/etc/passwd", "Europe", "\0", "é\udc80", 5])
def test_what_is_no_zone_is_a_usage_error(name: object) -> None:
    with pytest.raises(UsageError, match="is not a time zone known here"):
        Cron("0 5 * * *", name)  # type: ignore[arg-type]


@pytest.fixture
def local_zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param is None:
        monkeypatch.delenv("TZ", raising=False)
    else:
        monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    "local_zone",
    [
        None,
        "",
        "UTC0",
        "EST5EDT",
        "Europe/Berlin",
        ":America/New_York",
        ":/usr/share/zoneinfo/Australia/Lord_Howe",
        "CET-1CEST,M3.5.0,M10.5.0/3",
        "<+0330>-3:30",
        "/nowhere",
    ],
    indirect=True,
)
@pytest.mark.usefixtures("local_zone")
def test_the_machines_own_zone_is_the_one_that_the_c_library_knows() -> None:
    cron = Cron("30 12 1,15 * *")
    found = list(runs(cron, wall("2024-01-01"), wall("2026-01-01")))
    assert len(found) == 48
    for run in found:
        local = time.localtime(run // SECOND)
        assert (local.tm_hour, local.tm_min, local.tm_sec) == (12, 30, 0)


@pytest.mark.parametrize("local_zone", ["Europe/Berln"], indirect=True)
@pytest.mark.usefixtures("local_zone")
def test_a_wrong_zone_in_the_environment_is_refused_by_its_name() -> None:
    with pytest.raises(UsageError) as caught:
        Cron("0 5 * * *")
    where = '@cron("0 5 * * *"), where TZ=Europe/Berln'
    why = '"Europe/Berln" is not a time zone known here; did you mean "Europe/Berlin"?'
    assert str(caught.value) == f"{where}: {why}"


# --- @cron: due times


def test_due_times_are_counted_on_the_monotonic_clock() -> None:
    cron = Cron("*/5 * * * *", "UTC")
    at = wall("2025-05-05 12:03:20")
    assert cron.first(1_000, at) == 1_000 + 100 * SECOND
    due = cron.first(1_000, at)
    assert due is not None
    assert cron.following(due, due + 7, at + 100 * SECOND + 7) == (due + 300 * SECOND, 0)


@given(st.integers(0, 3 * 1440), st.integers(0, 59))
@example(10, 0)
@settings(max_examples=40)
def test_a_job_that_was_held_up_counts_what_it_missed(minutes: int, seconds: int) -> None:
    cron = Cron("*/5 * * * *", "UTC")
    start = wall("2025-05-05 12:05")
    late = minutes * MINUTE + seconds * SECOND
    following, missed = cron.following(0, late, start + late)
    assert missed == minutes // 5
    assert following == (minutes // 5 + 1) * 5 * MINUTE
    assert cron.successor(0, late, start + late) == 5 * MINUTE


@pytest.mark.parametrize("early", [1, 50_000, 500_000_000])
def test_a_wall_clock_read_a_little_early_does_not_double_a_run(early: int) -> None:
    cron = Cron("5 12 * * *", "UTC")
    assert cron.following(0, 0, wall("2025-05-05 12:05") - early) == (DAY + early, 0)


def test_the_next_time_is_strictly_later() -> None:
    cron = Cron("5 12 * * *", "UTC")
    at = wall("2025-05-05 12:05")
    assert cron.next_wall(at - 1) == at
    assert cron.next_wall(at) == at + DAY


def test_leap_days_come_every_four_years_but_not_in_2100() -> None:
    cron = Cron("0 12 29 2 *", "UTC")
    found = islice(runs(cron, wall("2089-01-01"), wall("2110-01-01")), 4)
    years = [datetime.fromtimestamp(run // SECOND, UTC).strftime("%Y-%m-%d") for run in found]
    assert years == ["2092-02-29", "2096-02-29", "2104-02-29", "2108-02-29"]


def test_the_last_day_of_february_moves_with_the_leap_years() -> None:
    cron = Cron("0 0 L 2 *", "UTC")
    found = runs(cron, wall("2023-01-01"), wall("2025-12-31"))
    assert [datetime.fromtimestamp(run // SECOND, UTC).day for run in found] == [28, 29, 28]


# --- @cron: daylight saving, cron(8)

NIGHTS = [
    # Berlin: 02:00 -> 03:00 on 30 March 2025, 03:00 -> 02:00 on 26 October 2025
    ("30 2 * * *", "Europe/Berlin", "2025-03-29 12:00", ["30 03:00 +0200", "31 02:30 +0200"]),
    ("*/20 2 * * *", "Europe/Berlin", "2025-03-29 12:00", ["31 02:00 +0200", "31 02:20 +0200"]),
    ("30 * * * *", "Europe/Berlin", "2025-03-30 01:00", ["30 01:30 +0100", "30 03:30 +0200"]),
    ("30 2 * * *", "Europe/Berlin", "2025-10-25 12:00", ["26 02:30 +0200", "27 02:30 +0100"]),
    ("30 * * * *", "Europe/Berlin", "2025-10-26 02:00", ["26 02:30 +0200", "26 02:30 +0100"]),
    ("*/40 2 * * *", "Europe/Berlin", "2025-10-26 02:30", ["26 02:40 +0200", "26 02:00 +0100"]),
    # New York: 02:00 -> 03:00 on 9 March 2025, 02:00 -> 01:00 on 2 November 2025
    ("15 2 * * *", "America/New_York", "2025-03-08 12:00", ["09 03:00 -0400", "10 02:15 -0400"]),
    ("0,30 2,3 * * *", "America/New_York", "2025-03-09 00:00", ["09 03:00 -0400", "09 03:30 -0400"]),
    ("* * * * *", "America/New_York", "2025-03-09 01:58", ["09 01:59 -0500", "09 03:00 -0400"]),
    ("30 1 * * *", "America/New_York", "2025-11-01 12:00", ["02 01:30 -0400", "03 01:30 -0500"]),
    ("* * * * *", "America/New_York", "2025-11-02 01:58", ["02 01:59 -0400", "02 01:00 -0500"]),
    # Lord Howe: 02:00 -> 02:30 on 5 October 2025, 02:00 -> 01:30 on 6 April 2025
    ("15 2 * * *", "Australia/Lord_Howe", "2025-10-04 12:00", ["05 02:30 +1100", "06 02:15 +1100"]),
    ("45 2 * * *", "Australia/Lord_Howe", "2025-10-04 12:00", ["05 02:45 +1100", "06 02:45 +1100"]),
    ("*/15 2 * * *", "Australia/Lord_Howe", "2025-10-04 12:00", ["05 02:30 +1100", "05 02:45 +1100"]),
    ("*/15 3 * * *", "Australia/Lord_Howe", "2025-10-04 12:00", ["05 03:00 +1100", "05 03:15 +1100"]),
    ("45 1 * * *", "Australia/Lord_Howe", "2025-04-05 12:00", ["06 01:45 +1100", "07 01:45 +1030"]),
    ("45 * * * *", "Australia/Lord_Howe", "2025-04-06 01:30", ["06 01:45 +1100", "06 01:45 +1030"]),
    ("*/15 2 * * *", "Australia/Lord_Howe", "2025-04-06 00:00", ["06 02:00 +1030", "06 02:15 +1030"]),
    # Midnight itself is skipped: 00:00 -> 01:00 on 25 April 2025
    ("0 0 * * *", "Africa/Cairo", "2025-04-24 12:00", ["25 01:00 +0300", "26 00:00 +0300"]),
    ("* 0 * * *", "Africa/Cairo", "2025-04-24 12:00", ["26 00:00 +0300", "26 00:01 +0300"]),
    # A whole day is skipped, 30 December 2011: a correction of the clock
    ("0 12 * * *", "Pacific/Apia", "2011-12-29 00:00", ["29 12:00 -1000", "31 12:00 +1400"]),
]


@pytest.mark.parametrize(("expression", "zone", "after", "expected"), NIGHTS)
def test_the_nights_of_daylight_saving_are_as_debian_documents_them(
    expression: str, zone: str, after: str, expected: list[str]
) -> None:
    start = wall(after, zone)
    until = datetime.fromtimestamp(start // SECOND, UTC) + timedelta(days=4)
    seen = shown(Cron(expression, zone), zone, after, until.strftime("%Y-%m-%d %H:%M"))
    assert seen[: len(expected)] == expected


@pytest.mark.parametrize("text", ["2025-10-26 02:10", "2025-10-26 02:30", "2025-10-26 02:50"])
def test_a_daemon_started_in_the_second_pass_of_an_hour_goes_by_that_pass(text: str) -> None:
    after = wall(text, "Europe/Berlin", fold=1)
    fixed = Cron("30 2 * * *", "Europe/Berlin").next_wall(after)
    assert fixed == wall("2025-10-27 02:30", "Europe/Berlin")
    wild = Cron("*/20 * * * *", "Europe/Berlin").next_wall(after)
    assert wild == after - after % (20 * MINUTE) + 20 * MINUTE


def changes(zone: ZoneInfo, year: int) -> list[tuple[int, int]]:
    """The days (seconds since the epoch) on which the zone's offset changes, and by how many seconds."""
    day = int(datetime(year, 1, 1, tzinfo=UTC).timestamp())
    offsets = []
    for at in range(day, day + 366 * 86_400, 86_400):
        offset = datetime.fromtimestamp(at, zone).utcoffset()
        assert offset is not None
        offsets.append((at, int(offset.total_seconds())))
    return [(at, after - before) for (at, before), (_, after) in pairwise(offsets) if before != after]


MINUTES = {
    "*": range(60),
    "*/7": range(0, 60, 7),
    "0": [0],
    "30": [30],
    "5,35": [5, 35],
    "10-50/20": [10, 30, 50],
}
HOURS = {
    "*": range(24),
    "*/2": range(0, 24, 2),
    "0": [0],
    "1-3": [1, 2, 3],
    "2": [2],
    "23": [23],
    "0-23": range(24),
}


def as_debian_does(minute: str, hour: str, zone: ZoneInfo, start: int, end: int) -> list[int]:
    """What cron(8) runs in [start, end], told minute by minute, by a clock that is looked at each minute."""
    fixed = not minute.startswith("*") and not hour.startswith("*")
    found = []
    reached = datetime.fromtimestamp(start - 60, zone).replace(tzinfo=None)
    for now in range(start, end + 1, 60):
        face = datetime.fromtimestamp(now, zone).replace(tzinfo=None)
        ahead = (face - reached) // timedelta(minutes=1)
        due = [reached + timedelta(minutes=n + 1) for n in range(ahead)]
        if not fixed or abs(ahead) >= 180:
            due = [face]
        if any(at.minute in MINUTES[minute] and at.hour in HOURS[hour] for at in due):
            found.append(now * SECOND)
        reached = face if abs(ahead) >= 180 else max(reached, face)
    return found


@given(
    st.sampled_from(ZONES),
    st.integers(1975, 2037),
    st.sampled_from(sorted(MINUTES)),
    st.sampled_from(sorted(HOURS)),
    st.data(),
)
@settings(max_examples=150)
def test_every_zone_runs_its_jobs_as_a_cron_that_looks_each_minute(
    name: str, year: int, minute: str, hour: str, data: st.DataObject
) -> None:
    zone = ZoneInfo(name)
    days = [day for day, _ in changes(zone, year)]
    start = data.draw(st.sampled_from(days)) if days else int(datetime(year, 6, 1, tzinfo=UTC).timestamp())
    end = start + 36 * 3600
    found = list(runs(Cron(f"{minute} {hour} * * *", name), start * SECOND - 1, end * SECOND))
    assert found == as_debian_does(minute, hour, zone, start, end)


@given(
    st.sampled_from(ZONES),
    st.integers(1975, 2037),
    st.sampled_from(["0,30 1-4", "30 2", "15 0,23", "0 0-23"]),
)
@settings(max_examples=60)
def test_jobs_at_fixed_times_run_when_the_library_says(name: str, year: int, fields: str) -> None:
    zone = ZoneInfo(name)
    days = changes(zone, year)
    # The library makes up for any change, Debian only for those of less than 3 hours.
    assume(all(abs(by) < 3 * 3600 for _, by in days))
    expression = f"{fields} * * *"
    for day, _ in days[:3]:
        start = datetime.fromtimestamp(day - 86_400, zone)
        assume(start.utcoffset() == start.replace(fold=1).utcoffset())
        library = [int(at.timestamp()) * SECOND for at in islice(CronSim(expression, start), 60)]
        assert list(runs(Cron(expression, name), (day - 86_400) * SECOND, library[-1])) == library


LIBRARYS_OWN = [
    "0 * * * *", "*/30 * * * *", "*/15 * * * *", "0 */2 * * *", "30 */2 * * *", "0 */3 * * *",
    "0 1,2,3,4,5 * * *", "30 1,2,3,4,5 * * *", "0 2 * * *", "0 3 * * *", "0 4 * * *",
    "0 1,3,5,7,9,11,13,15,17,19,21,23 * * *",
    "0 1-5 * * *", "15 3 * * *", "* * * * *", "* 1-6 * * *",
]  # fmt: skip


@pytest.mark.parametrize("expression", LIBRARYS_OWN)
@pytest.mark.parametrize("night", [datetime(2021, 3, 27, 12), datetime(2021, 10, 30, 12)])
def test_the_librarys_own_cases_come_out_the_same(expression: str, night: datetime) -> None:
    riga = ZoneInfo("Europe/Riga")
    start = night.replace(tzinfo=riga)
    library: list[int] = []
    for at in CronSim(expression, start):
        library.append(int(at.timestamp()) * SECOND)
        if at >= start + timedelta(days=2):
            break
    found = runs(Cron(expression, "Europe/Riga"), int(start.timestamp()) * SECOND, library[-1])
    assert list(found) == library


# --- @cron: the wall clock is set

NOON = wall("2025-05-05 12:00")


def step(expression: str, before: str, after: str, waits_for: str | None = None) -> int | None:
    """The answer to a step on 5 May 2025, with ``now`` at 0, of a job that waits for its next time."""
    cron = Cron(expression, "UTC")
    expected, new = wall(f"2025-05-05 {before}"), wall(f"2025-05-05 {after}")
    due = cron.first(0, expected) if waits_for is None else wall(f"2025-05-05 {waits_for}") - expected
    return cron.stepped(due, 0, expected, new)


def test_a_job_whose_fixed_time_is_skipped_by_less_than_three_hours_runs_at_once() -> None:
    assert step("0 13 * * *", "12:30", "13:30") == 0
    assert step("0 13 * * *", "12:30", "13:00") == 0
    assert step("0 13,14,15 * * *", "12:30", "15:29:59") == 0


def test_a_job_whose_fixed_time_is_not_skipped_waits_less_after_a_step_forward() -> None:
    assert step("0 13 * * *", "11:30", "12:30") == 30 * MINUTE


def test_a_fixed_time_that_comes_back_is_not_run_again() -> None:
    assert step("0 12 * * *", "12:30", "11:30") == DAY + 30 * MINUTE
    assert step("0 12,13 * * *", "12:30", "11:30") == 90 * MINUTE


def test_two_steps_back_do_not_bring_a_fixed_time_back_either() -> None:
    assert step("30 0-23 * * *", "09:10", "08:20", waits_for="10:30") == 130 * MINUTE


def test_a_wildcard_job_goes_by_the_new_time() -> None:
    assert step("*/10 * * * *", "12:01", "13:57") == 3 * MINUTE
    assert step("*/10 * * * *", "12:01", "11:57") == 3 * MINUTE


def test_a_wildcard_job_of_the_minute_that_the_clock_is_set_to_runs_now() -> None:
    assert step("*/10 * * * *", "12:01", "13:50:20") == 0
    assert step("*/10 * * * *", "12:01", "11:50:20") == 0


def test_a_step_of_three_hours_or_more_is_a_correction_and_nothing_skipped_is_run() -> None:
    assert step("0 13 * * *", "12:30", "15:30") == 21 * HOUR + 30 * MINUTE
    assert step("0 13 * * *", "12:30", "20:00") == 17 * HOUR
    assert step("0 20 * * *", "12:30", "20:00") == 0


def test_after_a_step_back_of_three_hours_or_more_times_that_come_back_are_run() -> None:
    assert step("0 12 * * *", "13:00", "10:00") == 2 * HOUR
    assert step("0 12 * * *", "13:00", "02:00") == 10 * HOUR


@pytest.mark.parametrize("expression", ["*/5 * * * *", "0,5,10 12 * * *"])
def test_a_step_of_seconds_neither_skips_nor_repeats_a_minute(expression: str) -> None:
    assert step(expression, "12:04:59", "12:05:01") == 0
    assert step(expression, "12:05:01", "12:04:59") == 5 * MINUTE + SECOND


def test_a_step_forward_into_a_minute_that_was_served_before_a_step_back_does_not_serve_it_again() -> None:
    assert step("*/5 * * * *", "12:04:30", "12:05:31", waits_for="12:10") == 269 * SECOND
    assert step("0 12,18 * * *", "08:00", "12:00:20", waits_for="18:00") == 6 * HOUR - 20 * SECOND


@pytest.mark.parametrize("by", [SECOND, HOUR, 5 * HOUR, -5 * HOUR])
def test_a_late_job_stays_due(by: int) -> None:
    cron = Cron("0 12 * * *", "UTC")
    assert cron.stepped(-5, 0, NOON + 5, NOON + 5 + by) == -5


def test_a_late_job_whose_fixed_time_comes_back_is_run_then_and_only_then() -> None:
    cron = Cron("0 12 * * *", "UTC")
    late = 5 * SECOND
    answer = cron.stepped(-late, 0, NOON + late, NOON + late - HOUR)
    assert answer == HOUR - late
    assert cron.following(HOUR - late, HOUR - late, NOON) == (HOUR - late + DAY, 0)


def test_a_job_that_never_comes_again_does_not_come_by_a_step() -> None:
    cron = Cron("0 12 * * *", "UTC")
    assert cron.stepped(None, 0, NOON, NOON + HOUR) is None


class World:
    """A machine with one cron job, and a wall clock that somebody sets."""

    def __init__(self, cron: Cron, wall: int) -> None:
        self.cron, self.now, self.wall = cron, 0, wall
        self.due = cron.first(0, wall)
        self.ran: list[int] = []
        """The wall clock at each run."""

    def wait(self, duration: int) -> None:
        end = self.now + duration
        while self.due is not None and self.due <= end:
            self._move(max(self.due, self.now))
            self.ran.append(self.wall)
            self.due, _ = self.cron.following(self.due, self.now, self.wall)
        self._move(end)

    def set_clock(self, by: int) -> None:
        self.due = self.cron.stepped(self.due, self.now, self.wall, self.wall + by)
        self.wall += by
        self.wait(0)

    def _move(self, now: int) -> None:
        self.wall += now - self.now
        self.now = now


# Even seconds, for a job counts as run for times up to a second ahead.
waits = st.integers(1, 4 * 1800).map(lambda n: 2 * n * SECOND)


def steps(largest: int) -> st.SearchStrategy[int]:
    return st.integers(-largest // (2 * SECOND), largest // (2 * SECOND)).map(lambda n: 2 * n * SECOND)


corrections = st.integers(CORRECTION // (2 * SECOND), 4 * DAY // (2 * SECOND)).map(lambda n: 2 * n * SECOND)


def follow(world: World, events: list[tuple[int, int]]) -> list[int]:
    """Live through the events; tell when the job was to run: whenever new time, or a jump, held its time."""
    reached: int = world.wall
    expected: list[int] = []
    for wait, by in events:
        end = world.wall + wait
        if end > reached:
            expected += list(runs(world.cron, reached, end))
            reached = end
        world.wait(wait)
        if world.wall + by > reached:
            if any(runs(world.cron, reached, world.wall + by)):
                expected.append(world.wall + by)
            reached = world.wall + by
        world.set_clock(by)
    return expected


@given(
    st.sampled_from(["0 0-23 * * *", "30 9-14 * * *", "0,20,40 12,13 * * *"]),
    st.lists(st.tuples(waits, steps(CORRECTION - 2 * SECOND)), max_size=12),
)
@settings(max_examples=150)
def test_no_fixed_time_is_doubled_or_lost_by_steps_of_less_than_three_hours(
    expression: str, events: list[tuple[int, int]]
) -> None:
    world = World(Cron(expression, "UTC"), NOON)
    expected = follow(world, [*events, (8 * HOUR, 0)])
    assert world.ran == expected


@given(
    st.sampled_from(["* * * * *", "*/5 * * * *", "7 * * * *"]),
    st.lists(st.tuples(waits, steps(MINUTE - 2 * SECOND)), max_size=12),
)
@settings(max_examples=60)
def test_no_job_is_doubled_or_lost_by_steps_of_less_than_a_minute(
    expression: str, events: list[tuple[int, int]]
) -> None:
    world = World(Cron(expression, "UTC"), NOON)
    expected = follow(world, [*events, (HOUR, 0)])
    assert world.ran == expected


@given(
    st.sampled_from(["*/5 * * * *", "* 13 * * *", "0 12-20 * * *"]),
    st.lists(st.tuples(waits, corrections), max_size=6),
)
@settings(max_examples=60)
def test_after_corrections_forward_a_job_runs_once_in_each_of_its_minutes_that_the_clock_showed(
    expression: str, events: list[tuple[int, int]]
) -> None:
    cron = Cron(expression, "UTC")
    world = World(cron, NOON)
    showed: set[int] = set()
    for wait, by in [*events, (8 * HOUR, 0)]:
        showed.update(range(world.wall // MINUTE, (world.wall + wait) // MINUTE + 1))
        world.wait(wait)
        world.set_clock(by)
        showed.add(world.wall // MINUTE)
    times = [at * MINUTE for at in sorted(showed) if at * MINUTE > NOON]
    assert [at - at % MINUTE for at in world.ran] == [at for at in times if cron.next_wall(at - 1) == at]
