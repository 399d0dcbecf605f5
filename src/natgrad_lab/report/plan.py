"""The page of a plan: step time against ranks, stages stacked, memory; from the plan's file alone."""

from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from natgrad_lab.report.style import COLOURS, look, picture

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


def write_plan(plan: dict[str, Any], out: Path) -> Path:
    """Write the page of a plan; return where."""
    out.write_text(page(plan), encoding="utf-8")
    return out


def page(plan: dict[str, Any]) -> str:
    """The page as text."""
    with look():
        figures = [
            figure(steps(plan), "Average step by ranks"),
            figure(stacked(plan), "Stages of a step by ranks"),
            f'<div class="pair">{figure(memory(plan), "Memory of a rank")}{figure(sent(plan), "Bytes sent")}</div>',
        ]
    css = files("natgrad_lab.report").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(f"{plan['name']} on {plan['machine']['name']}")
    body = "\n".join([head(plan, title), numbers(plan), remedies(plan), *figures, layers(plan), sources(plan)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>natgrad plan - {title}</title>\n<style>\n{css}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def head(plan: dict[str, Any], title: str) -> str:
    """What is planned, and the advice."""
    about = escape(f"{plan['about']}, {plan['parameters']:,} parameters. Predicted, not measured.")
    advice = plan["advice"]
    said = ""
    if advice is not None:
        line = f"<pre>natgrad train {escape(plan['name'])} {escape(advice['line'])}</pre>" if advice["line"] else ""
        said = f"<p>Second-order work within {advice['overhead']:.1%} of SGD's step: {escape(advice['why'])}.</p>{line}"
    return f"<header><h1>{title}</h1><p>{about}</p></header>{said}"


def remedies(plan: dict[str, Any]) -> str:
    """What holds the step on the most ranks, and what each change would make of it."""
    found = plan["remedies"]
    if found is None:
        return ""
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in found["words"])
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
    first = table(["stage", "waits for", "ms of an average step", "more than SGD, ms"], holds)
    second = table(["one change", "average step, ms", "over SGD's", "setting"], alone)
    return f"<h2>What holds the step on {counted(found['ranks'])}</h2>{words}{first}{second}"


def figure(drawn: Figure, alternative: str) -> str:
    """A figure of the page."""
    return f"<figure>{picture(drawn, alternative)}</figure>"


def numbers(plan: dict[str, Any]) -> str:
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
    return table(heads, lines)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A table of numbers."""
    top = "".join(f"<th>{escape(one)}</th>" for one in heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in lines)
    shown = f"<thead><tr>{top}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide"><table class="numbers">{shown}</table></div>'


def steps(plan: dict[str, Any]) -> Figure:
    """Average steps against ranks; the first optimizer also with nothing and with everything measured."""
    drawn = Figure(figsize=(10.4, 3.9), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for optimizer, colour in zip(plan["optimizers"], COLOURS):
        rows = optimizer["rows"]
        ranks = [row["ranks"] for row in rows]
        left.plot(ranks, [1e3 * r["step"]["average"] for r in rows], "o-", color=colour, label=optimizer["name"])
        if optimizer is plan["optimizers"][0]:
            for kind, dashes in (("stale", (0, (1, 2))), ("fresh", (0, (4, 2)))):
                left.plot(ranks, [1e3 * r["step"][kind] for r in rows], color=colour, linestyle=dashes, linewidth=1.2)
        speed = [row["batch"] / row["step"]["average"] for row in rows]
        right.plot(ranks, speed, "o-", color=colour, label=optimizer["name"])
    first = plan["optimizers"][0]["name"]
    left.set_title(f"Average step, ms ({first}: dotted stale, dashed all fresh)")
    right.set_title("Samples a second")
    if unlike(plan["optimizers"][0]["rows"]):
        left.set_yscale("log")
    else:
        left.set_ylim(bottom=0)
    right.set_yscale("log")
    for axes in (left, right):
        by_ranks(axes, plan)
    right.legend()
    return drawn


def by_ranks(axes: Axes, plan: dict[str, Any]) -> None:
    """Ranks along the axis, doubled from tick to tick where there are many."""
    ranks = [row["ranks"] for row in plan["optimizers"][0]["rows"]]
    if max(ranks) > 16:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{r:,}" for r in ranks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ranks")


def stacked(plan: dict[str, Any]) -> Figure:
    """A bar for each number of ranks, in stages: the first optimizer with nothing, a part and all measured.

    Where steps are of unlike lengths, as with a fixed batch, bars are shares of the step.
    """
    drawn = Figure(figsize=(10.4, 3.9), layout="constrained")
    kinds = {"stale": "nothing measured", "average": "on average", "fresh": "all measured"}
    rows, name = plan["optimizers"][0]["rows"], plan["optimizers"][0]["name"]
    shares, unit = unlike(rows), "% of the step" if unlike(rows) else "ms"
    plots = drawn.subplots(1, 3, sharey=True)
    for axes, (kind, title) in zip(plots, kinds.items()):
        bottom = [0.0] * len(rows)
        for stage, colour in STAGES.items():
            scales = [100 / row["step"][kind] if shares else 1e3 for row in rows]
            heights = [scale * row["stages"][kind][stage] for scale, row in zip(scales, rows)]
            axes.bar(range(len(rows)), heights, bottom=bottom, color=colour, label=stage, width=0.7)
            bottom = [low + high for low, high in zip(bottom, heights)]
        axes.set_xticks(range(len(rows)), [f"{row['ranks']:,}" for row in rows], fontsize=8)
        axes.set_xlabel("ranks")
        axes.set_title(f"{name}: {title}, {unit}")
    handles, labels = plots[0].get_legend_handles_labels()  # alike in all three
    drawn.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8.5)
    return drawn


def unlike(rows: list[dict[str, Any]]) -> bool:
    """Whether steps differ by so much that the short ones could not be seen beside the long ones."""
    lengths = [row["step"]["fresh"] for row in rows]
    return max(lengths) > 5 * min(lengths)


def memory(plan: dict[str, Any]) -> Figure:
    """The most that a rank holds of every optimizer's state."""
    drawn = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = drawn.subplots()
    for optimizer, colour in zip(plan["optimizers"], COLOURS):
        rows = optimizer["rows"]
        state = [max(row["memory"]["state"]) / 1e6 for row in rows]
        axes.plot([row["ranks"] for row in rows], state, "o-", color=colour, label=optimizer["name"])
    axes.set_yscale("log")
    axes.set_title("Optimizer's state on the fullest rank, MB")
    by_ranks(axes, plan)
    axes.legend(fontsize=8.5)
    return drawn


def sent(plan: dict[str, Any]) -> Figure:
    """What travels in an average step."""
    drawn = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = drawn.subplots()
    for optimizer, colour in zip(plan["optimizers"], COLOURS):
        rows = [row for row in optimizer["rows"] if row["ranks"] > 1]
        if rows:
            megabytes = [row["wire"]["average"] / 1e6 for row in rows]
            axes.plot([row["ranks"] for row in rows], megabytes, "o-", color=colour, label=optimizer["name"])
    axes.set_ylim(bottom=0)
    axes.set_title("What a rank passes on in an average step, MB")
    by_ranks(axes, plan)
    return drawn


def layers(plan: dict[str, Any]) -> str:
    """The dearest layers on the fewest and on the most ranks."""
    parts = []
    heads = ["layer", "shape", "curvature", "passes, ms", "statistics", "factorisation", "preconditioning", "owner"]
    for ranks, rows in plan["layers"].items():
        lines = [
            [row["layer"], row["shape"], row["curvature"]]
            + [f"{1e3 * row[key]:,.2f}" for key in ("passes", "statistics", "factorisation", "preconditioning")]
            + [str(row["owner"])]
            for row in rows
        ]
        parts.append(f"<h2>The dearest layers on {counted(int(ranks))}, everything measured</h2>{table(heads, lines)}")
    return "".join(parts)


def counted(ranks: int) -> str:
    """So many ranks in words."""
    return f"{ranks:,} rank{'s' * (ranks > 1)}"


def sources(plan: dict[str, Any]) -> str:
    """Where the machine's figures are from."""
    lines = plan["machine"]["sources"].items()
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(said)}</td></tr>" for name, said in lines)
    return f'<h2>Where the machine\'s figures are from</h2><table class="facts"><tbody>{rows}</tbody></table>'
