"""Rules for which snapshots are kept."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.backup.memory import Memory
from examples.backup.retention import Rule, judge
from examples.backup.snapshots import Snapshot
from examples.backup.store import Store


def made(when: datetime, name: str = "name") -> Snapshot:
    nanoseconds = int(when.replace(tzinfo=UTC).timestamp()) * 1_000_000_000
    return Snapshot(f"{name} {when:%Y-%m-%d %H:%M:%S.%f}", name, nanoseconds, 0, 0, 0, 0)


def kept(snapshots: list[Snapshot], rule: Rule) -> list[str]:
    return [
        f"{datetime.fromtimestamp(verdict.snapshot.created_ns / 1e9, UTC):%m-%d %H}"
        for verdict in judge(snapshots, rule)
        if verdict.reasons
    ]


# Twice a day, from Monday 29 December to Thursday 15 January.
TWICE_A_DAY = [
    made(datetime(2025, 12, 29) + timedelta(days=day, hours=hour))
    for day in range(18)
    for hour in (3, 15)
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(last=3), ["01-14 15", "01-15 03", "01-15 15"]),
        (Rule(daily=3), ["01-13 15", "01-14 15", "01-15 15"]),
        (Rule(weekly=2), ["01-11 15", "01-15 15"]),
        (Rule(monthly=9), ["12-31 15", "01-15 15"]),
        (Rule(yearly=1), ["01-15 15"]),
        (Rule(yearly=2), ["12-31 15", "01-15 15"]),
        # The week of the new year is one week of both years.
        (Rule(weekly=3), ["01-04 15", "01-11 15", "01-15 15"]),
        (
            Rule(last=1, daily=2, weekly=2, monthly=2),
            ["12-31 15", "01-11 15", "01-14 15", "01-15 15"],
        ),
    ],
)
def test_the_newest_of_each_period_is_kept(rule, expected):
    assert kept(TWICE_A_DAY, rule) == expected


def test_a_verdict_has_all_its_reasons():
    verdicts = judge(TWICE_A_DAY, Rule(1, 1, 1, 1, 1))
    assert verdicts[-1].reasons == ("last", "daily", "weekly", "monthly", "yearly")
    assert [verdict.snapshot for verdict in verdicts] == TWICE_A_DAY


def test_days_without_a_snapshot_do_not_count():
    snapshots = [made(datetime(2025, month, 1)) for month in (1, 3, 7, 8)]
    assert kept(snapshots, Rule(daily=3)) == ["03-01 00", "07-01 00", "08-01 00"]


def test_each_name_is_judged_by_itself():
    rare = made(datetime(2020, 1, 1), "rare")
    verdicts = judge([rare, *TWICE_A_DAY], Rule(daily=1))
    assert [verdict.snapshot.name for verdict in verdicts if verdict.reasons] == ["rare", "name"]


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 0), (-1, 0, 0, 0, 5), (0, 0, 3, 0, -1)])
def test_rules_that_make_no_sense_are_refused(counts):
    with pytest.raises(ValueError, match="a rule"):
        Rule(*counts)


times = st.datetimes(datetime(2019, 12, 1), datetime(2022, 2, 1)).map(
    lambda when: when.replace(microsecond=0)
)
many = st.lists(st.tuples(times, st.sampled_from("ab")), max_size=40, unique=True).map(
    lambda found: [made(when, name) for when, name in sorted(found)]
)
rules = st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any).map(lambda n: Rule(*n))


@given(many, rules)
def test_the_newest_of_each_name_is_always_kept(snapshots, rule):
    verdicts = judge(snapshots, rule)
    newest = {verdict.snapshot.name: verdict for verdict in verdicts}
    assert all(verdict.reasons for verdict in newest.values())


@given(many, rules)
def test_no_reason_is_given_more_often_than_the_rule_says(snapshots, rule):
    given_reasons = Counter(
        (verdict.snapshot.name, reason)
        for verdict in judge(snapshots, rule)
        for reason in verdict.reasons
    )
    for (_, reason), count in given_reasons.items():
        assert count <= getattr(rule, reason)


@given(many, rules)
def test_judging_again_what_was_kept_keeps_all_of_it(snapshots, rule):
    once = [verdict.snapshot for verdict in judge(snapshots, rule) if verdict.reasons]
    assert [verdict.snapshot for verdict in judge(once, rule) if verdict.reasons] == once


@given(many, rules, st.sampled_from(["last", "daily", "weekly", "monthly", "yearly"]))
def test_a_rule_that_keeps_more_keeps_all_that_one_does_that_keeps_less(snapshots, rule, reason):
    more = replace(rule, **{reason: getattr(rule, reason) + 1})
    less_kept = {verdict.snapshot.id for verdict in judge(snapshots, rule) if verdict.reasons}
    assert less_kept <= {v.snapshot.id for v in judge(snapshots, more) if v.reasons}


def test_a_store_forgets_by_rule():
    parts = Memory()
    for snapshot in (made(datetime(2020, 1, 1), "other"), *TWICE_A_DAY):
        parts.catalogue.commit(snapshot, [])
    with Store(parts) as store:
        before = store.snapshots()
        rule = Rule(daily=2)
        trial = store.forget_by_rule(rule, dry_run=True)
        assert store.snapshots() == before
        named = store.forget_by_rule(rule, "name")
        assert trial == [*judge(before[:1], rule), *named]
        assert store.snapshots() == [v.snapshot for v in trial if v.reasons]
        assert store.forget_by_rule(rule, "nobody") == []
