"""Which snapshots a rule keeps: the newest of each of the last days, weeks, months and years.

A rule looks at the snapshots of one name at a time. Going from the newest to the oldest, each
period takes the newest snapshot of each of its days (weeks, ...) that has one, until it has as many
as the rule says: so a machine that was off for a month still has as many dailies. What no period
takes is not kept. Days are those of UTC; weeks begin on Monday.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from .snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class Rule:
    """How many snapshots of each kind are kept, of each name. 0 keeps none for that reason.

    Attributes:
        last: The newest ones, whenever they were made.
        daily: The newest of each day that has one.
        weekly: The newest of each week.
        monthly: The newest of each month.
        yearly: The newest of each year.
    """

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __post_init__(self) -> None:
        counts = (self.last, self.daily, self.weekly, self.monthly, self.yearly)
        if min(counts) < 0:
            raise ValueError("a rule keeps no negative number of snapshots")
        if not any(counts):
            raise ValueError("a rule that keeps nothing: forget snapshots by their ids instead")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of a snapshot.

    Attributes:
        snapshot: The snapshot.
        reasons: Why it is kept: "last", "daily", ...; empty if it is not.
    """

    snapshot: Snapshot
    reasons: tuple[str, ...]


def judge(snapshots: Iterable[Snapshot], rule: Rule) -> list[Verdict]:
    """Returns the verdict on each snapshot, in the order of the snapshots.

    Args:
        snapshots: The oldest first, of any names.
        rule: Applied to each name by itself.
    """
    found = list(snapshots)
    by_name: defaultdict[str, list[Snapshot]] = defaultdict(list)
    for snapshot in reversed(found):
        by_name[snapshot.name].append(snapshot)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for newest_first in by_name.values():
        for reason, count, period in _periods(rule):
            taken: set[object] = set()
            for snapshot in newest_first:
                if len(taken) == count:
                    break
                if (of := period(snapshot)) not in taken:
                    taken.add(of)
                    reasons[snapshot.id].append(reason)
    return [Verdict(snapshot, tuple(reasons[snapshot.id])) for snapshot in found]


def _periods(rule: Rule) -> list[tuple[str, int, Callable[[Snapshot], object]]]:
    return [
        ("last", rule.last, lambda snapshot: snapshot.id),
        ("daily", rule.daily, lambda snapshot: _made(snapshot).date()),
        ("weekly", rule.weekly, lambda snapshot: _made(snapshot).isocalendar()[:2]),
        ("monthly", rule.monthly, lambda snapshot: (_made(snapshot).year, _made(snapshot).month)),
        ("yearly", rule.yearly, lambda snapshot: _made(snapshot).year),
    ]


def _made(snapshot: Snapshot) -> datetime:
    return datetime.fromtimestamp(snapshot.created_ns // 1_000_000_000, UTC)
