"""The page of a plan: step time against ranks, stages stacked, memory; from the plan's file alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from natgrad_lab.report.drawing import Key, Picture, Plot, framed, logarithmic
from natgrad_lab.report.files import replace
from natgrad_lab.report.markup import NOTHING, Markup, join, tag
from natgrad_lab.report.page import document, facts, note, numbers
from natgrad_lab.report.style import COLOURS, look

STAGES = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "statistics": "#E69F00",
    "factorisation": "#D55E00",
    "preconditioning": "#009E73",
    "update": "#444444",
    "messages": "#CC79A7",
    "gather": "#8C6D00",
}
"""A colour for each stage: blue is the network, warm is curvature, pink and brown travel."""
KINDS = {"stale": "Nothing measured", "average": "On average", "fresh": "All measured"}
DASHES = {"stale": (0, (1, 2)), "fresh": (0, (4, 2))}
TICKS = 8
"""Numbers of ranks along an axis at most."""
TERMS = (
    "Stale: a step that measures and inverts nothing. All fresh: a step that measures every statistic. Run: the "
    "recipe's whole run. State: what the fullest rank keeps of the optimizer. Longest, all fresh: the stage that takes "
    "longest then."
)


def write_plan(plan: dict[str, Any], out: Path) -> Path:
    """Write the page of a plan; return where."""
    replace(out, page(plan))
    return out


def page(plan: dict[str, Any]) -> str:
    """The page as text."""
    title = f"{plan['name']} on {plan['machine']['name']}"
    with look():
        return document(
            f"plan: {title}",
            [
                head(plan, title),
                table(plan),
                remedies(plan),
                framed(steps(plan), "Average step by ranks"),
                framed(stacked(plan), f"Where the time of a step goes: {plan['optimizers'][0]['name']}"),
                framed(costs(plan), "Memory and messages by ranks"),
                layers(plan),
                sources(plan),
            ],
        )


def head(plan: dict[str, Any], title: str) -> Markup:
    """What is planned, and the advice."""
    about = f"{plan['about']}, {plan['parameters']:,} parameters. Predicted, not measured."
    advice = plan["advice"]
    said = NOTHING
    if advice is not None:
        line = tag("pre", f"natgrad train {plan['name']} {advice['line']}") if advice["line"] else NOTHING
        why = f"Second-order work within {advice['overhead']:.1%} of SGD's step: {advice['why']}."
        said = join(tag("p", why), line)
    return join(tag("header", tag("h1", title), tag("p", about)), said)


def remedies(plan: dict[str, Any]) -> Markup:
    """What holds the step on the most ranks, and what each change would make of it."""
    found = plan["remedies"]
    if found is None:
        return NOTHING
    holds = [
        [row["stage"], row["waits for"], f"{1e3 * row['seconds']:,.1f}", f"{1e3 * row['more']:,.1f}"]
        for row in found["holds"]
    ]
    alone = [
        [
            row["words"],
            f"{1e3 * row['seconds']:,.1f}",
            f"{row['seconds'] / found['sgd']:.2f}",
            row["line"] or "not built",
        ]
        for row in found["alone"]
    ]
    return join(
        tag("h2", f"What holds the step on {counted(found['ranks'])}"),
        [tag("p", sentence) for sentence in found["words"]],
        numbers(["stage", "waits for", "ms of an average step", "more than SGD, ms"], holds),
        numbers(["one change", "average step, ms", "over SGD's", "setting"], alone),
    )


def table(plan: dict[str, Any]) -> Markup:
    """A row for each number of ranks: the average step of every optimizer, the first one's run and memory."""
    first = plan["optimizers"][0]
    names = [optimizer["name"] for optimizer in plan["optimizers"]]
    heads = ["ranks", "batch", *(f"{name}, ms" for name in names)]
    heads += [f"{first['name']}: stale, ms", "all fresh, ms", "run", "state, MB", "longest, all fresh"]
    lines = []
    for place, row in enumerate(first["rows"]):
        steps_of = [optimizer["rows"][place]["step"]["average"] for optimizer in plan["optimizers"]]
        cells = [f"{row['ranks']:,}", f"{row['batch']:,}", *(f"{1e3 * s:,.1f}" for s in steps_of)]
        cells += [f"{1e3 * row['step'][kind]:,.1f}" for kind in ("stale", "fresh")]
        run = "-" if row["run"] is None else f"{row['run']['seconds'] / 3600:,.2f} h"
        cells += [run, f"{max(row['memory']['state']) / 1e6:,.1f}", row["holds"]]
        lines.append(cells)
    return join(numbers(heads, lines), note(TERMS))


def keys(plan: dict[str, Any]) -> list[Key]:
    """The legend of all optimizers."""
    return [Key(one["name"], colour, "o") for one, colour in zip(plan["optimizers"], COLOURS)]


def steps(plan: dict[str, Any]) -> Picture:
    """Average steps against ranks; the first optimizer also with nothing and with everything measured."""
    first = plan["optimizers"][0]

    def lengths(axes: Axes) -> None:
        lines(axes, plan, lambda row: 1e3 * row["step"]["average"])
        for kind, dashes in DASHES.items():
            told = [1e3 * row["step"][kind] for row in first["rows"]]
            axes.plot(ranks_of(first), told, color=COLOURS[0], linestyle=dashes, linewidth=1.2)
        if unlike(first["rows"]):
            logarithmic(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        by_ranks(axes, plan)

    def speed(axes: Axes) -> None:
        lines(axes, plan, lambda row: row["batch"] / row["step"]["average"])
        logarithmic(axes.yaxis)
        by_ranks(axes, plan)

    dashed = {"stale": "nothing measured", "fresh": "all measured"}
    legend = [
        Key(f"{first['name']}, {said}", COLOURS[0], dash=DASHES[kind], width=1.4) for kind, said in dashed.items()
    ]
    plots = [Plot("Average step, ms", lengths), Plot("Samples a second", speed)]
    return Picture(plots, keys(plan) + legend, "half")


def lines(axes: Axes, plan: dict[str, Any], value: Callable[[dict[str, Any]], float], least: int = 1) -> None:
    """Draw one number of every optimizer by ranks, from so many ranks on."""
    for optimizer, colour in zip(plan["optimizers"], COLOURS):
        rows = [row for row in optimizer["rows"] if row["ranks"] >= least]
        if rows:
            axes.plot([row["ranks"] for row in rows], [value(row) for row in rows], "o-", color=colour, markersize=4)


def ranks_of(optimizer: dict[str, Any]) -> list[int]:
    """The numbers of ranks that are planned."""
    return [row["ranks"] for row in optimizer["rows"]]


def by_ranks(axes: Axes, plan: dict[str, Any]) -> None:
    """Ranks along the axis, doubled from tick to tick where there are many."""
    ranks = ranks_of(plan["optimizers"][0])
    if max(ranks) > 16:
        axes.set_xscale("log", base=2)
    every = -(-len(ranks) // TICKS)
    shown = [count for place, count in enumerate(ranks) if not (len(ranks) - 1 - place) % every]
    axes.set_xticks(shown, [f"{count:,}" for count in shown], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ranks")


def stacked(plan: dict[str, Any]) -> Picture:
    """A bar for each number of ranks, in stages: the first optimizer with nothing, a part and all measured.

    Where steps are of unlike lengths, as with a fixed batch, bars are shares of the step.
    """
    rows = plan["optimizers"][0]["rows"]
    shares = unlike(rows)
    most = 100.0 if shares else 1e3 * max(sum(row["stages"][kind].values()) for row in rows for kind in KINDS)
    every = -(-len(rows) // TICKS)

    def drawing(kind: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            bottom = [0.0] * len(rows)
            for stage, colour in STAGES.items():
                scales = [100 / row["step"][kind] if shares else 1e3 for row in rows]
                heights = [scale * row["stages"][kind][stage] for scale, row in zip(scales, rows)]
                axes.bar(range(len(rows)), heights, bottom=bottom, color=colour, width=0.7)
                bottom = [low + high for low, high in zip(bottom, heights)]
            shown = range(len(rows) - 1, -1, -every)
            axes.set_xticks(list(shown), [f"{rows[place]['ranks']:,}" for place in shown], fontsize=8)
            axes.set_xlabel("ranks")
            axes.set_ylabel("% of the step" if shares else "ms")
            axes.set_ylim(0, 1.05 * most)

        return draw

    legend = [Key(stage, colour, "area", line=False) for stage, colour in STAGES.items()]
    return Picture([Plot(title, drawing(kind)) for kind, title in KINDS.items()], legend)


def unlike(rows: list[dict[str, Any]]) -> bool:
    """Whether steps differ by so much that the short ones could not be seen beside the long ones."""
    lengths = [row["step"]["fresh"] for row in rows]
    return max(lengths) > 5 * min(lengths)


def costs(plan: dict[str, Any]) -> Picture:
    """The most that a rank holds of every optimizer's state, and what travels in an average step."""

    def memory(axes: Axes) -> None:
        lines(axes, plan, lambda row: max(row["memory"]["state"]) / 1e6)
        logarithmic(axes.yaxis)
        by_ranks(axes, plan)

    def sent(axes: Axes) -> None:
        lines(axes, plan, lambda row: row["wire"]["average"] / 1e6, least=2)
        axes.set_ylim(bottom=0)
        by_ranks(axes, plan)

    plots = [
        Plot("Optimizer's state on the fullest rank, MB", memory),
        Plot("Sent by a rank in an average step, MB", sent),
    ]
    return Picture(plots, keys(plan), "half")


def layers(plan: dict[str, Any]) -> Markup:
    """The most expensive layers on the fewest and on the most ranks."""
    parts = []
    heads = ["layer", "shape", "curvature", "passes, ms", "statistics", "factorisation", "preconditioning", "owner"]
    for ranks, rows in plan["layers"].items():
        listed = [
            [row["layer"], row["shape"], row["curvature"]]
            + [f"{1e3 * row[key]:,.2f}" for key in ("passes", "statistics", "factorisation", "preconditioning")]
            + [str(row["owner"])]
            for row in rows
        ]
        title = f"The most expensive layers on {counted(int(ranks))}, everything measured"
        parts.append(join(tag("h2", title), numbers(heads, listed)))
    return join(parts)


def counted(ranks: int) -> str:
    """So many ranks in words."""
    return f"{ranks:,} rank{'s' * (ranks > 1)}"


def sources(plan: dict[str, Any]) -> Markup:
    """Where the machine's figures are from."""
    listed = [(name, str(said)) for name, said in plan["machine"]["sources"].items()]
    return join(tag("h2", "Where the machine's figures are from"), facts(listed))
