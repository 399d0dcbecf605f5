"""Traces of single steps by torch's profiler, and what they say: kernels, waits, copies to the host, idle times.

The file is what chrome://tracing and ui.perfetto.dev show. Host time and device time have one clock in it, and a
launch on the host has the same `correlation` as what it started on the device.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_steps import Runner, wait
from torch.profiler import ProfilerActivity, profile, record_function

WHOLE, INSIDE = "one step", "optimizer.step"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
ON_HOST = {"cuda_runtime", "cuda_driver"}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
GAP_US = 10.0  # a shorter pause between two kernels is the launch itself
Event = dict[str, Any]


def trace(runner: Runner, path: Path) -> dict[str, Any]:
    """Write the trace of one more step, packed by gzip, and return what it says."""
    activities = [ProfilerActivity.CPU]
    if runner.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):  # the first use of the profiler takes seconds
            torch.ones(1, device=runner.device).add_(1)
            wait(runner.device)
    wait(runner.device)
    with profile(activities=activities) as profiler:
        with record_function(WHOLE):
            loss = runner.passes()
            with record_function(INSIDE):
                runner.update(loss)
        wait(runner.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        with raw.open("rb") as source, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(source, packed)
        return analyse(json.loads(raw.read_text(errors="replace"))["traceEvents"])


def analyse(events: Sequence[Event]) -> dict[str, Any]:
    """What a trace says of the whole step, and of the optimizer's part."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    return {name: part(complete, *span) for name in (WHOLE, INSIDE) if (span := span_of(complete, name))}


def span_of(events: Iterable[Event], name: str) -> tuple[float, float] | None:
    """Begin and end of a named range on the host, in microseconds."""
    for event in events:
        if event["name"] == name and event.get("cat") == "user_annotation":
            return event["ts"], event["ts"] + event["dur"]
    return None


def part(events: Sequence[Event], begin: float, end: float) -> dict[str, Any]:
    """What the host did in [begin, end], and the device because of it."""
    host = [event for event in events if event.get("cat") in ON_HOST and begin <= event["ts"] <= end]
    launched = {correlation(event) for event in host} - {None}
    device = [event for event in events if event.get("cat") in ON_DEVICE and correlation(event) in launched]
    names = Counter(event["name"] for event in host)
    told: dict[str, Any] = {
        "host_ms": round((end - begin) / 1e3, 3),
        "operations": sum(event.get("cat") == "cpu_op" and begin <= event["ts"] <= end for event in events),
        "kernels": sum(event["cat"] == "kernel" for event in device),
        "launches": sum(count for name, count in names.items() if name.startswith(LAUNCHES)),
        "graph_launches": sum(count for name, count in names.items() if name.startswith("cudaGraphLaunch")),
        "waits": {name: count for name, count in names.items() if name.startswith(WAITS)},
        "copies_to_host": sum("DtoH" in event["name"] for event in device),
        "copies_to_device": sum("HtoD" in event["name"] for event in device),
    }
    return told | idle(device)


def correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def idle(device: Sequence[Event]) -> dict[str, Any]:
    """How long the device worked, and its pauses from the first kernel to the last; nothing where there is none."""
    if not device:
        return {}
    spans = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in device)
    busy, gaps = 0.0, list[tuple[float, float, str]]()
    begin, end, _ = spans[0]
    first = begin
    for start, stop, name in spans[1:]:
        if start > end:
            gaps.append((start - end, end - first, name))
            busy += end - begin
            begin, end = start, stop
        end = max(end, stop)
    busy += end - begin
    long = sorted((gap for gap in gaps if gap[0] > GAP_US), reverse=True)
    return {
        "device_ms": round((end - first) / 1e3, 3),
        "busy_ms": round(busy / 1e3, 3),
        "gaps": len(long),
        "gaps_ms": round(sum(gap for gap, _, _ in long) / 1e3, 3),
        "longest_gaps": [
            {"ms": round(gap / 1e3, 3), "at_ms": round(at / 1e3, 3), "before": name[:80]} for gap, at, name in long[:5]
        ],
    }
