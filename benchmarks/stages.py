"""Where the time of a measuring step goes: by stage, and by operation beside SGD's.

    python benchmarks/stages.py                 (a minute; ResNet-20, batch 128, one thread)

Stages are natgrad's own clocks. Operations are what torch.profiler counts for a step in which everything is measured,
less what it counts for SGD's: convolution_backward is A by correlations, mm and bmm are products of rows, and so on.
"""

from __future__ import annotations

import statistics
from collections import Counter

import torch
from batches import Data
from overhead import Case, Contender, sgd, spngd
from torch.profiler import ProfilerActivity, profile

CASES = {"all stale": {"refresh": 1}, "all stale, every row": {"refresh": 1, "rows_per_dim": None}}
STEPS = 7


def stages(case: Case, contender: Contender, data: Data) -> dict[str, float]:
    """Median milliseconds a step of every stage, and of the whole."""
    taken: list[dict[str, float]] = []
    for _ in range(STEPS):
        before = dict(getattr(contender.optimizer, "seconds", {}))
        spent = contender.step(*data())
        after = getattr(contender.optimizer, "seconds", {})
        taken.append({"whole": spent.wall, **{k: v - before.get(k, 0.0) for k, v in after.items()}})
    return {k: 1e3 * statistics.median(one[k] for one in taken) for k in taken[-1]}


def operations(contender: Contender, data: Data) -> Counter[str]:
    """Milliseconds a step of every operation, without those it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(STEPS):
            contender.step(*data())
    return Counter({e.key: e.self_cpu_time_total / 1e3 / STEPS for e in run.key_averages()})


def main() -> None:
    case = Case()
    torch.set_num_threads(case.threads)
    data, base = Data(case), Contender(case, sgd)
    base.step(*data())
    whole, ops = stages(case, base, data)["whole"], operations(base, data)
    print(f"SGD: {whole:.0f} ms a step")
    for name, options in CASES.items():
        contender = Contender(case, spngd(**options))
        contender.step(*data())
        told = stages(case, contender, data)
        print(f"\n{name}: {told.pop('whole'):.0f} ms a step; inside natgrad")
        print("  " + ", ".join(f"{stage} {ms:.0f} ms ({ms / whole:.3f})" for stage, ms in told.items()))
        more = operations(contender, data)
        more.subtract(ops)
        print("  more than SGD: " + ", ".join(f"{op} {ms:.0f} ms" for op, ms in more.most_common(9)))


if __name__ == "__main__":
    main()
