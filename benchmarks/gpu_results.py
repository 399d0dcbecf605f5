"""How results of `gpu.py` are kept, and the tables that the docs make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from record import Record, git, said

MIB = 2**20
LONGEST = 200  # characters of a failure that are kept


class Results(Record):
    """A file of cases. Each has rows by name and checks that were passed or not; what has been tried is not repeated.

    commit: what to write where the code is a copy without its repository.
    """

    def __init__(self, path: Path, device: torch.device, seed: int, dry: bool, commit: str = ""):
        facts: dict[str, Any] = {"dry": True} if dry else {}
        if commit and not git("rev-parse", "HEAD"):
            facts["commit"] = commit
        super().__init__(path, device.type, seed=seed, **facts, **about(device))

    def case(self, name: str, **settings: Any) -> dict[str, Any]:
        """The case of this name, as far as it is known."""
        for case in self.content["cases"]:
            if case["case"] == name:
                return case
        case = {"case": name, **settings, "rows": [], "checks": [], "seconds": 0.0, "finished": False}
        self.content["cases"].append(case)
        return case

    def row(self, case: dict[str, Any], row: dict[str, Any]) -> None:
        """Write down a row, in the place of one of the same name."""
        case["rows"] = [one for one in case["rows"] if one["name"] != row["name"]] + [row]
        self.write()

    def check(self, case: dict[str, Any], name: str, passed: bool, told: str = "") -> bool:
        """Write down whether a check was passed; returns it."""
        entry = {"check": name, "passed": bool(passed), **({"told": told[:LONGEST]} if told else {})}
        case["checks"] = [one for one in case["checks"] if one["check"] != name] + [entry]
        self.write()
        if not passed:
            print(f"  CHECK FAILED: {name}{': ' + told[:LONGEST] if told else ''}", flush=True)
        return passed

    def failed(self) -> list[str]:
        """The checks that were not passed."""
        cases = self.content["cases"]
        return [f"{case['case']}: {one['check']}" for case in cases for one in case["checks"] if not one["passed"]]

    def forget_failures(self) -> None:
        """Let what failed be tried again."""
        for case in self.content["cases"]:
            if any(not one["passed"] for one in case["checks"]):
                case["rows"] = [row for row in case["rows"] if "failed" not in row]
                case["checks"], case["finished"] = [one for one in case["checks"] if one["passed"]], False
        self.write()


def about(device: torch.device) -> dict[str, Any]:
    """What decides a GPU's figures beside its name."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1],
        "power_limit": said("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader").splitlines()[:1],
        "float32_products": torch.get_float32_matmul_precision(),
    }


Rows = list[list[str]]


def table(results: dict[str, Any]) -> str:
    """All tables of a file of results."""
    driver = ", ".join(results.get("driver", []))
    head = f"{results['machine']}, torch {results['torch']}, CUDA {results.get('cuda')}, driver {driver or 'unknown'}, "
    head += f"commit {results['commit']}: `{results.get('command', 'python benchmarks/gpu.py')}`."
    parts = [head, checks(results)]
    for case in results["cases"]:
        show = SHOWN.get(case["case"].partition(":")[0])
        if show is not None and case["rows"]:
            parts.append(show(case))
    return "\n\n".join(parts)


def checks(results: dict[str, Any]) -> str:
    """How many checks were passed, and each that was not."""
    every = [(case["case"], one) for case in results["cases"] for one in case["checks"]]
    bad = [f"- **failed**: {name}: {one['check']}: {one.get('told', '')}" for name, one in every if not one["passed"]]
    return "\n".join([f"{len(every) - len(bad)} of {len(every)} checks passed.", *([""] if bad else []), *bad])


def steps(case: dict[str, Any]) -> str:
    """Times, waits and memory of every contender beside SGD's."""
    size = f"{case['batch']} {case['unit']}, bfloat16 by autocast"
    head = ["", "ms", "over SGD", "quartiles", "longest, ms", "host, ms", "in `step()`, ms", "waits", "peak, MiB"]
    rows, missing = Rows(), dict[str, list[str]]()
    for row in case["rows"]:
        if "ms" not in row:
            missing.setdefault(row.get("absent") or f"**failed**: {row.get('failed')}", []).append(row["name"])
            continue
        name = row["name"] + ("" if row["batch"] == case["batch"] else f" (at {row['batch']}: memory)")
        low, high = row["ratio_quartiles"]
        numbers = [f"{row['ms']:.2f}", f"**{row['ratio']:.3f}**", f"{low:.3f}-{high:.3f}", f"{row['longest_ms']:.2f}"]
        numbers += [f"{row['host_ms']:.2f}", f"{row['inside_ms']:.2f}", str(row.get("waits", ""))]
        peak = f"{row['peak_bytes'] / MIB:,.0f}" if "peak_bytes" in row else ""
        rows.append([name, *numbers, peak, f"{row['state_bytes'] / MIB:,.0f}"])
    told = [f"\n\nWithout {'; '.join(names)}: {why}." for why, names in missing.items()]
    return f"{case['network']}, {size}:\n\n{lines([*head, 'state, MiB'], rows)}{''.join(told)}"


def traces(case: dict[str, Any]) -> str:
    """Kernels, waits, copies and pauses of single steps; of the optimizer's part and of the whole step."""
    head = ["a step of", "part", "kernels", "launches", "waits", "copies to host", "device busy, ms", "of ms", "pauses"]
    rows = []
    for row in case["rows"]:
        for name in ("optimizer.step", "one step"):
            one = row.get(name)
            if one:
                counts = [f"{one[key]:,}" for key in ("kernels", "launches")]
                counts += [str(sum(one["waits"].values())), str(one["copies_to_host"])]
                times = [f"{one[key]:.2f}" if key in one else "" for key in ("busy_ms", "device_ms")]
                rows.append([row["name"], name, *counts, *times, str(one.get("gaps", ""))])
    return f"Traces, {case['network']}, {case['batch']} {case['unit']}:\n\n{lines(head, rows)}"


def training(case: dict[str, Any]) -> str:
    """What was learnt in the time, and how fast."""
    head = ["", "data", "batch", "epochs", "seconds", "images a second", "ms a step", "measured", "accuracy"]
    rows = []
    for row in case["rows"]:
        if "seconds" not in row:
            continue
        epochs = f"{row['epochs']}{'' if row['whole_schedule'] else ', cut'}"
        accuracy = f"{row['test_accuracy']:.2%}" if row["data"] == "CIFAR-100" else "-"
        numbers = [f"{row['seconds']:.0f}", f"{row['images_per_second']:,}", f"{row['step_ms']:.0f}"]
        size = f"{row['batch']:,}"
        rows.append(
            [row["name"], row["data"].partition(",")[0], size, epochs, *numbers, f"{row['measured']:.1%}", accuracy]
        )
    return f"{case['network']}:\n\n{lines(head, rows)}"


def tested(case: dict[str, Any]) -> str:
    """How the marked tests ended."""
    row = case["rows"][0]
    if "absent" in row:
        return f"Marked tests: {row['absent']}."
    return f"Marked tests: {row['passed']} passed, {row['failures']} failed, {row['skipped']} skipped."


SHOWN = {"tests": tested, "steps": steps, "trace": traces, "training": training}


def lines(head: list[str], rows: Rows) -> str:
    """A table in Markdown, numbers to the right."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])
