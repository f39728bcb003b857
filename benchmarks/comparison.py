"""A question that is put to all peers: measured round by round, peer after peer, case by case.

What is compared is compared within a round, since a shared machine is quicker in one minute than in
the next: a ratio is the median of the rounds' ratios.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import Load, Measured
from benchmarks.peers import PEERS
from benchmarks.processes import MeasurementError, describe, measure
from benchmarks.tables import DASH, TIMES, ratio, table

FIRST = PEERS[0]


@dataclass(frozen=True)
class Case:
    """A column of the table.

    Attributes:
        title: its heading.
        operation: what the peers' OPERATIONS call it.
        size: bytes of a payload or piece.
        count: calls in flight, connections, or streams.
    """

    title: str
    operation: str
    size: int = 64
    count: int = 1


@dataclass(frozen=True)
class Pace:
    """How long it may take.

    Attributes:
        rounds: measurements of each case and peer.
        warm_up: seconds before each.
        seconds: of each.
    """

    rounds: int
    warm_up: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A question.

    Attributes:
        title: of the table.
        what: what a cell says.
        cases: the columns.
        show: makes text of a figure.
        show_cost: makes text of the processor seconds that one of what is counted took; None where
            that means nothing.
        cost: what that text says.
        headline: whether the first page of the project shows the table.
        peers: who is asked; the others are compared with the first.
    """

    title: str
    what: str
    cases: tuple[Case, ...]
    show: Callable[[float], str]
    show_cost: Callable[[float], str] | None = None
    cost: str = ""
    headline: bool = False
    peers: tuple[str, ...] = PEERS

    def run(self, pace: Pace, progress: Callable[[str], None]) -> dict[str, Any]:
        """Measure, and return what is to be kept."""
        peers = {peer: describe(peer) for peer in self.peers}
        cells: dict[str, dict[str, Any]] = {
            case.title: {
                peer: {"rounds": [], "failures": []}
                for peer, description in peers.items()
                if case.operation in description.operations
            }
            for case in self.cases
        }
        for number in range(pace.rounds):
            for case in self.cases:
                for peer, cell in cells[case.title].items():
                    progress(f"{self.title}, round {number + 1}: {case.title}, {peer}")
                    load = Load(0, 0, pace.warm_up, pace.seconds, case.size, case.count)
                    try:
                        cell["rounds"].append(_kept(measure(peer, case.operation, load)))
                    except MeasurementError as error:
                        cell["rounds"].append(None)
                        cell["failures"].append(str(error))
        for row in cells.values():
            for cell in row.values():
                cell |= _summary(cell["rounds"], row[self.peers[0]]["rounds"])
        known = {peer: {"name": one.name, "failure": one.failure} for peer, one in peers.items()}
        return {"peers": known, "cases": cells}

    def tables(self, results: dict[str, Any]) -> str:
        """Return the figures as Markdown."""
        text = f"{self.what}\n\n{self.first_table(results)}"
        if self.show_cost is not None:
            text += f"\n\n{self.cost}\n\n{self._table(results, self._cost_cell)}"
        return text

    def first_table(self, results: dict[str, Any]) -> str:
        """Return the table of what the question asks for, and what failed."""
        notes = [
            f"{known['name']} was not measured: {known['failure']}."
            for known in results["peers"].values()
            if known["failure"]
        ]
        for title, row in results["cases"].items():
            notes += [
                f"{results['peers'][peer]['name']}, {title}: {len(cell['failures'])} of "
                f"{len(cell['rounds'])} rounds failed ({cell['failures'][0]})."
                for peer, cell in row.items()
                if cell["failures"]
            ]
        return "\n\n".join([self._table(results, self._figure_cell), *notes])

    def _table(self, results: dict[str, Any], show: Callable[[str, Any], str]) -> str:
        cases = {case.title: results["cases"][case.title] for case in self.cases}
        rows = []
        for peer, known in results["peers"].items():
            missing = "not measured" if known["failure"] else DASH
            cells = [show(peer, row[peer]) if peer in row else missing for row in cases.values()]
            rows.append([known["name"], *cells])
        return table(["", *cases], rows)

    def _figure_cell(self, peer: str, cell: dict[str, Any]) -> str:
        if cell["median"] is None:
            return "failed"
        figure = self.show(cell["median"])
        if peer == self.peers[0] or cell["ratio"] is None:
            return figure
        low, high = cell["ratio_range"]
        span = f"{ratio(low)}{DASH}{ratio(high)}"
        return f"{figure} · **{ratio(cell['ratio'])} {TIMES}** ({span})"

    def _cost_cell(self, peer: str, cell: dict[str, Any]) -> str:
        assert self.show_cost is not None
        if not cell.get("cost"):
            return "failed"
        return " + ".join(self.show_cost(part) for part in cell["cost"])


def _kept(measured: Measured) -> dict[str, float]:
    kept = {
        "value": measured.value,
        "client_busy": measured.client_busy,
        "server_busy": measured.server_busy,
    }
    return {key: float(f"{value:.5g}") for key, value in kept.items() if value is not None}


def _summary(rounds: list[Any], first: list[Any]) -> dict[str, Any]:
    done = [one for one in rounds if one]
    ratios = [
        ours["value"] / theirs["value"]
        for ours, theirs in zip(first, rounds, strict=True)
        if ours and theirs and theirs["value"] > 0
    ]
    summary: dict[str, Any] = {
        "median": statistics.median(one["value"] for one in done) if done else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratio_range": [min(ratios), max(ratios)] if ratios else None,
    }
    if done and all("client_busy" in one and one["value"] > 0 for one in done):
        summary["cost"] = [
            statistics.median(one[side] / one["value"] for one in done)
            for side in ("client_busy", "server_busy")
        ]
    return summary
