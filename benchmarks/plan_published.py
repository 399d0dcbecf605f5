"""What the plan's model says of SP-NGD's own machine and program, beside the seconds per step that its paper shows.

    python benchmarks/plan_published.py         (a minute or two)

Published: Osawa et al. 2020, figure 5: ResNet-50, 32 images a V100, five variants on 1 to 1,024 GPUs of ABCI. The model
(plan_paper.py) is calibrated on the column of one GPU alone. Writes results/plan-published.json and
docs/plan-published.svg.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plan_paper import GPUS, PUBLISHED, Assumed, calibrated, errors, total, variants

from natgrad_lab.models.imagenet import ImageResNet
from natgrad_lab.plan.machines import named
from natgrad_lab.plan.scaling import Network, Planner
from natgrad_lab.report.style import COLOURS, look

RESULTS = Path(__file__).parent / "results" / "plan-published.json"
PLOT = Path(__file__).parents[1] / "docs" / "plan-published.svg"
FEW, MANY = GPUS[1:7], GPUS[7:]
OTHERS = {
    "as assumed": Assumed(),
    "products of rows at a fifth of Tensor Cores' peak": Assumed(achieved=0.2),
    "products of rows at three fifths": Assumed(achieved=0.6),
    "inverses as fast at every size": Assumed(half=0.0),
    "inverses at half of their best rate at 2,000": Assumed(half=2000.0),
    "inverses at half of their best rate at 20,000": Assumed(half=20_000.0),
    "1mc's extra pass without weights' gradients": Assumed(weights_too=False),
}
STAGES = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "sampled labels": "#8C6D00",
    "statistics": "#E69F00",
    "factorisation": "#D55E00",
    "preconditioning": "#009E73",
    "messages": "#CC79A7",
    "gather": "#7A7A7A",
}


def planner() -> Planner:
    network = ImageResNet(50)
    make = Network("ResNet-50", lambda: network.build((3, 224, 224), 1000), (3, 224, 224))
    return Planner(make, named("v100-ib"))


def told(predicted: dict[str, Any]) -> dict[str, float]:
    """Median and largest relative errors in the columns of 2 to 64 and of 128 to 1,024 GPUs."""
    few, many = errors(predicted, FEW), errors(predicted, MANY)
    return {"2-64": statistics.median(few), "2-64 most": max(few), "128-1024": statistics.median(many)}


def show(predicted: dict[str, Any]) -> None:
    print(f"{'GPUs':>6}" + "".join(f"{name:>25}" for name in PUBLISHED))
    for place, gpus in enumerate(GPUS):
        cells = []
        for name in PUBLISHED:
            theirs, ours = PUBLISHED[name][place], total(predicted[name][place])
            shown = "-" if theirs is None or ours is None else f"{theirs:.3f} {ours:.3f} {ours / theirs - 1:+5.0%}"
            cells.append(f"{shown:>25}")
        print(f"{gpus:6}" + "".join(cells))
    print("(published, predicted, difference)")


def draw(predicted: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in zip(PUBLISHED, COLOURS):
        points = [(g, v) for g, v in zip(GPUS, PUBLISHED[name]) if v is not None]
        left.plot(*zip(*points), "o", color=colour, markersize=4.5)
        lines = [(g, v) for g, s in zip(GPUS, predicted[name]) if (v := total(s)) is not None]
        left.plot(*zip(*lines), "-", color=colour, label=name)
    left.set_title("Seconds per step: published (points), predicted (lines)")
    left.legend(title="calibrated on 1 GPU")
    stacked(right, predicted["emp+unitBN"])
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [f"{g:,}" for g in GPUS], fontsize=8)
        axes.set_xlabel("V100 GPUs, 32 images each")
        axes.set_ylim(bottom=0)
    return figure


def stacked(axes: Axes, rows: list[dict[str, float]]) -> None:
    values = [[row.get(stage, 0.0) for row in rows] for stage in STAGES]
    axes.stackplot(GPUS, values, labels=list(STAGES), colors=list(STAGES.values()), linewidth=0)
    axes.set_title("emp+unitBN: predicted, by stage")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8)


def main() -> None:
    one = planner()
    content: dict[str, Any] = {"published": PUBLISHED, "gpus": GPUS, "assumptions": {}}
    for name, assumed in OTHERS.items():
        constants = calibrated(one, assumed)
        predicted = variants(one, constants, assumed)
        found = told(predicted)
        if name == "as assumed":
            show(predicted)
            content |= {"constants": asdict(constants), "assumed": asdict(assumed), "predicted": predicted}
            with look():
                draw(predicted).savefig(PLOT, metadata={"Date": None})
        content["assumptions"][name] = {**found, **asdict(constants)}
        print(f"{name:52}" + ", ".join(f"{k}: {v:.1%}" for k, v in found.items()), flush=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
