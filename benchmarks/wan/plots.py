"""`python -m benchmarks.wan.plots`: draw the kept results of clubs, lanes and bulk as PNGs.

Each is drawn from the `wan_<question>.json` of that question alone, by one function that returns a
matplotlib figure; what hasn't been measured isn't drawn. The medians are those of the tables.
"""

# matplotlib annotates its functions, but not what they pass on.
# pyright: reportUnknownMemberType=false

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.wan import clubs
from benchmarks.wan.links import Link

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
IMAGES = HERE.parent.parent / "docs" / "images"
# Colours that are told apart in print and by the colour-blind (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#666666"
PEERS = {"druvarpc": BLUE, "grpc.aio": ORANGE}
# Of the best rate: the smallest club that reaches it is where larger ones stop to pay.
NEARLY = 0.9

Kept = Mapping[str, Any]


def draw_clubs(results: Kept) -> Figure:
    """Calls per second by the size of a club: a panel for each cost, a line for each link."""
    links = results["Calls in a club"]
    figure, grid = plt.subplots(
        2, 2, figsize=(8, 6), sharex=True, sharey=True, layout="constrained"
    )
    for cost, axes in zip(clubs.COSTS, grid.flat, strict=True):
        for found, colour in zip(links.values(), (BLUE, ORANGE, GREEN, PURPLE), strict=False):
            rates = [size / clubs.point(found, cost, size) for size in clubs.SIZES]
            rtt = Link(**found["link"]).rtt
            axes.plot(clubs.SIZES, rates, marker=".", color=colour, label=f"{rtt * 1e3:g} ms")
            enough = next(i for i, rate in enumerate(rates) if rate >= NEARLY * max(rates))
            axes.plot(
                clubs.SIZES[enough], rates[enough], "o", color=colour, fillstyle="none", ms=10
            )
        axes.set(title=f"handler: {cost}", xscale="log", yscale="log")
        axes.set_xticks(clubs.SIZES, [str(size) for size in clubs.SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("calls in a club")
    for axes in grid[:, 0]:
        axes.set_ylabel("calls per second")
    grid[0, 0].legend(title="round trip", fontsize="small")
    figure.suptitle(
        f"Clubs, one after the other; circled: the smallest within {1 - NEARLY:.0%} of the best",
        fontsize="medium",
    )
    return figure


def draw_lanes(results: Kept) -> Figure:
    """The distribution of a small call's latency beside bulk: a panel for each way and link."""
    parts = [name for name, links in results.items() if links]
    figure, grid = plt.subplots(
        len(parts),
        len(results[parts[0]]),
        figsize=(8, 5.5),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, part in zip(grid, parts, strict=True):
        for axes, found in zip(row, results[part].values(), strict=True):
            for peer, colour in (PEERS | {"druvarpc, auto": GREEN}).items():
                rounds = [one[peer] for one in found["rounds"] if peer in one]
                distribution(axes, [one["loaded"] for one in rounds], colour, peer, "-")
                distribution(axes, [one["idle"] for one in rounds], colour, f"{peer}, idle", ":")
            link = Link(**found["link"])
            axes.axvline(link.rtt * 1e3, color=GREY, lw=0.8, label="round trip")
            axes.set(title=f"{part.lower()}: {link.rtt * 1e3:g} ms, {link.rate / 1e6:g} Mbit/s")
            axes.set(xscale="log")
            axes.set_xticks(ticks := [40, 80, 160, 320, 640], [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("time of a small call, ms")
    for axes in grid[:, 0]:
        axes.set_ylabel("calls that were as quick, %")
    legend(figure, grid[0, 0])
    return figure


def distribution(axes: Axes, rounds: list[list[float]], colour: str, label: str, line: str) -> None:
    """Draw the medians, over the rounds, of each hundredth."""
    if rounds:
        hundredths = [statistics.median(values) * 1e3 for values in zip(*rounds, strict=True)]
        axes.plot(hundredths, range(len(hundredths)), line, color=colour, label=label)


def draw_bulk(results: Kept) -> Figure:
    """What bulk gets of what bare TCP gets: a panel for each way, a group of bars for each link."""
    parts = [part for part in results if "one connection" in part]
    figure, grid = plt.subplots(1, len(parts), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, part in zip(grid, parts, strict=True):
        links = results[part]
        names = [name for name in next(iter(links.values()))["rounds"][0] if name in entries(links)]
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            bars: list[tuple[float, float, float]] = []
            for found in links.values():
                ratios = [
                    one[name]["rate"] / one["iperf3"]["rate"]
                    for one in found["rounds"]
                    if name in one
                ] or [0.0]
                bars.append((statistics.median(ratios), min(ratios), max(ratios)))
            places = [group + (number - (len(names) - 1) / 2) * width for group in range(len(bars))]
            middles = [middle for middle, _, _ in bars]
            reach = [[m - low for m, low, _ in bars], [high - m for m, _, high in bars]]
            colour = next(colour for peer, colour in PEERS.items() if name.startswith(peer))
            shade = 0.5 if "streams" in name else 1.0
            axes.bar(
                places, middles, width, yerr=reach, color=colour, alpha=shade, label=name, capsize=2
            )
        axes.axhline(1, color=GREY, lw=0.8)
        axes.set(title=part, xticks=range(len(links)))
        axes.set_xticklabels(
            [str(Link(**found["link"])).replace(": ", "\n", 1) for found in links.values()],
            fontsize="small",
        )
        axes.grid(axis="y", alpha=0.3)
    grid[0].set_ylabel("rate, as a multiple of iperf3's")
    legend(figure, grid[0])
    return figure


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of one panel, which is that of all, above the panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize="small")


def entries(links: Kept) -> set[str]:
    """Return the peers that any round over any link has figures of."""
    return {
        name
        for found in links.values()
        for one in found["rounds"]
        for name in one
        if name.startswith(tuple(PEERS))
    }


DRAWN = {"clubs": draw_clubs, "lanes": draw_lanes, "bulk": draw_bulk}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wan.plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of wan_*.json")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder to draw into")
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        source = options.results / f"wan_{name}.json"
        if not source.exists():
            print(f"{source.name}: not measured yet")
            continue
        figure = draw(json.loads(source.read_text())["results"])
        path = options.images / f"wan_{name}.png"
        # No version or date inside, so that the same results draw the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)
        print(path.name)


if __name__ == "__main__":
    main()
