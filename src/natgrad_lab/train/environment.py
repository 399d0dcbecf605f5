"""What a run was made on: hardware, versions, the commit, the command; written beside the results."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from natgrad.parallel import World

PACKAGES = ("natgrad", "torch", "numpy", "scikit-learn", "datasets", "matplotlib")


def describe(world: World, device: torch.device) -> dict[str, Any]:
    """Return plain values for a run's record."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }


def command() -> str:
    """Return the command line that started this process, as a user would type it."""
    return shlex.join(["natgrad", *sys.argv[1:]])


def installed(name: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the source that runs, marked where files of it differ; None outside of git.

    Only the library and its workbench count: results that are written beside them change no other results.
    """
    folder = Path(__file__).parents[2]

    def git(*words: str) -> str:
        call = ["git", "-C", str(folder), *words]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "natgrad_lab/train/environment.py")
        differs = git("status", "--porcelain", "--untracked-files=no", "--", "natgrad", "natgrad_lab")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if differs else "")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """Return the most bytes that this process has held, on its GPU where it uses one, else resident; None: unknown."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
