"""The plan as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from natgrad_lab.plan.stages import STAGES

SHORT = dict(zip(STAGES, ("forward", "backw.", "measure", "messg.", "factor", "precond", "update", "gather")))


def show(plan: dict[str, Any]) -> None:
    """Print every optimizer's rows, all of them beside each other, the dearest layers, and the advice."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(f"[bold]{plan['name']}[/]: {plan['about']}, {plan['parameters']:,} parameters", highlight=False)
    console.print(f"on {plan['machine']['name']}: {source(plan['machine'])}", highlight=False)
    if plan["replicas"] is not None:
        said = "" if plan["replicas"] == 1 else f" in {plan['replicas']} replicas"
        console.print(f"models are cut over ranks{said} (fully_shard)", highlight=False)
    first, *_ = plan["optimizers"]
    for optimizer in plan["optimizers"]:
        if optimizer is first or optimizer["name"] != "SGD":
            console.print(stages(optimizer))
    console.print(beside(plan))
    console.print(carried(plan))
    for ranks, layers in plan["layers"].items():
        console.print(dearest(first["name"], int(ranks), layers))
    if plan["remedies"] is not None:
        console.print(holding(plan["remedies"]))
        console.print(helping(plan["remedies"]))
        for sentence in plan["remedies"]["words"]:
            console.print(sentence, highlight=False, soft_wrap=True)
    if plan["advice"] is not None:
        advise(console, plan["name"], plan["advice"])


def source(machine: dict[str, Any]) -> str:
    """What kind of machine it is, in its own words."""
    sources = machine["sources"]
    return sources.get("machine") or sources.get("rates, launch, layer, refresh") or machine["device"]


def table(title: str, left: tuple[str, ...], right: tuple[str, ...], last: tuple[str, ...] = ()) -> Table:
    """An empty table with columns to the left, to the right, and to the left again."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for headings, side in ((left, "left"), (right, "right"), (last, "left")):
        for heading in headings:
            made.add_column(heading, justify=side)  # type: ignore[arg-type]
    return made


def stages(optimizer: dict[str, Any]) -> Table:
    """An average step by stage, by ranks; whole steps with nothing and with everything measured."""
    share = optimizer["rows"][0]["share"]
    said = f", {share:.1%} of the statistics measured a step" if share else ""
    heads = tuple(SHORT.get(stage, stage) for stage in STAGES)
    title = f"{optimizer['name']}: milliseconds of an average step{said}"
    made = table(title, (), ("ranks", *heads, "step", "stale", "fresh"))
    for row in optimizer["rows"]:
        step = [row["step"][kind] for kind in ("average", "stale", "fresh")]
        parts = [row["stages"]["average"][stage] for stage in STAGES]
        made.add_row(f"{row['ranks']:,}", *map(ms, (*parts, *step)))
    return made


TRAVELS = "What a rank passes on in a step and holds (with weights, activations: an estimate), and the whole run"


def carried(plan: dict[str, Any]) -> Table:
    """What every optimizer sends and holds, and how long its run is."""
    heads = ("ranks", "batch", "MB sent: stale", "mean", "fresh", "state MB: mean", "most", "all, GB", "run")
    made = table(TRAVELS, ("optimizer",), heads)
    for optimizer in plan["optimizers"]:
        for row in optimizer["rows"]:
            state = row["memory"]["state"]
            sent = [row["wire"][kind] / 1e6 for kind in ("stale", "average", "fresh")]
            made.add_row(
                optimizer["name"] if row is optimizer["rows"][0] else "",
                f"{row['ranks']:,}",
                f"{row['batch']:,}",
                *(f"{mb:,.1f}" for mb in sent),
                f"{sum(state) / len(state) / 1e6:,.1f}",
                f"{max(state) / 1e6:,.1f}",
                f"{row['memory']['total'] / 1e9:.1f}",
                "-" if row["run"] is None else duration(row["run"]["seconds"]),
            )
    return made


def beside(plan: dict[str, Any]) -> Table:
    """The average step of every optimizer, and over SGD's."""
    names = [optimizer["name"] for optimizer in plan["optimizers"]]
    longest = f"{names[0]}, all fresh, waits for"
    made = table("Average step in milliseconds (and over SGD's)", (), ("ranks", "batch", *names), (longest,))
    base = next((o for o in plan["optimizers"] if o["name"] == "SGD"), None)
    for place, row in enumerate(plan["optimizers"][0]["rows"]):
        cells = []
        for optimizer in plan["optimizers"]:
            step = optimizer["rows"][place]["step"]["average"]
            over = "" if base is None else f" ({step / base['rows'][place]['step']['average']:.2f})"
            cells.append(ms(step) + over)
        made.add_row(f"{row['ranks']:,}", f"{row['batch']:,}", *cells, row["holds"])
    return made


def dearest(name: str, ranks: int, layers: list[dict[str, Any]]) -> Table:
    """The layers that take most."""
    heads = ("passes", "measure", "factor", "precond.", "all")
    title = (
        f"{name} on {ranks:,} rank{'s' * (ranks > 1)}: the dearest layers, milliseconds where everything is measured"
    )
    made = table(title, ("layer", "shape", "curvature"), (*heads, "owner"))
    for row in layers:
        parts = [row[key] for key in ("passes", "statistics", "factorisation", "preconditioning", "seconds")]
        made.add_row(row["layer"], row["shape"], row["curvature"], *map(ms, parts), str(row["owner"]))
    return made


def holding(remedies: dict[str, Any]) -> Table:
    """What an average step waits for longer than SGD's."""
    title = f"On {remedies['ranks']:,} ranks: what an average step waits for, and SGD's does not or not as long"
    made = table(title, ("stage", "waits for"), ("ms", "more than SGD, ms"))
    for row in remedies["holds"]:
        made.add_row(row["stage"], row["waits for"], ms(row["seconds"]), ms(row["more"]))
    return made


def helping(remedies: dict[str, Any]) -> Table:
    """What each change alone would make of it."""
    title = f"On {remedies['ranks']:,} ranks: an average step with one change"
    made = table(title, ("change",), ("ms", "over SGD's"), ("setting",))
    for row in remedies["alone"]:
        made.add_row(
            row["words"], ms(row["seconds"]), f"{row['seconds'] / remedies['sgd']:.2f}", row["line"] or "not built"
        )
    return made


def advise(console: Console, name: str, advice: dict[str, Any]) -> None:
    """The line to paste."""
    console.print(f"Second-order work within {advice['overhead']:.1%} of SGD's step:", highlight=False)
    if advice["line"] is not None:
        console.print(f"  natgrad train {name} {advice['line']}", soft_wrap=True, highlight=False)
    console.print(f"  {advice['why']}", highlight=False)


def ms(seconds: float) -> str:
    """Milliseconds, seconds where they are many."""
    value = 1e3 * seconds
    if value >= 1e5:
        return f"{seconds:,.0f} s"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.05 else "-"


def duration(seconds: float) -> str:
    """Seconds in the unit that one would say."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"
