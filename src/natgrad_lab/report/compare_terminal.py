"""A comparison's tables on a terminal."""

from natgrad_lab.report.compare_read import Comparison
from natgrad_lab.report.compare_table import NARROW, at_edges, fewer_points, findings, rows, verdicts


def show(results: Comparison) -> None:
    """Print a table for each size of batch, who wins, and what they say."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for batch in results.batches:
        steps = " and ".join(str(steps) for steps in dict.fromkeys(line.steps for line in results.at(batch)))
        title = f"{results.name}, batch {batch}, {steps} steps; goal {results.text(results.goal(batch))}"
        printed = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, heading in enumerate(NARROW):
            printed.add_column(
                heading.format(metric=results.metric), justify="right" if place else "left", no_wrap=True
            )
        for row in rows(results, batch):
            printed.add_row(*(cell.replace(" (", "\n(") for cell in row.cells()))
        console.print(printed)
        if note := fewer_points(results, batch):
            console.print(note, soft_wrap=True)
    printed = Table(title="Who wins", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("batch", "by", "first-order", "matrix", "natgrad", "winner"):
        printed.add_column(heading)
    for verdict in verdicts(results):
        best = [" ".join(verdict.best.get(kind, "-")).strip() for kind in ("first-order", "matrix", "natgrad")]
        printed.add_row(verdict.batch, verdict.measure, *best, verdict.winner or "nobody")
    console.print(printed)
    for sentence in findings(results):
        console.print(sentence, soft_wrap=True)
    if edges := at_edges(results):
        console.print(f"On the edge of the declared space: {'; '.join(edges)}.", soft_wrap=True)
