"""Several ranks on one machine: the same command again, once a rank, through torch's elastic launcher.

A process that finds RANK in its environment, ours or torchrun's, is a rank of a world and joins it. A rank
that fails on a user's mistake leaves its one line in the launcher's error file; the parent shows the first
and passes the exit code on.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from natgrad.parallel import TIMEOUT, World, join, leave
from natgrad_lab.train.warn import told_once

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

OURS = "NATGRAD_LAUNCHED"
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def in_world() -> bool:
    """Say whether this process has been started as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def spread(
    arguments: list[str],
    ranks: int,
    check: Callable[[], None],
    work: Callable[[World], str],
    restarts: int = 0,
    timeout: float = TIMEOUT,
    check_every: int | None = None,
) -> int:
    """Do `work` as the rank that this process is, on ranks started here, or alone; return the exit code.

    Only a process that is not yet a rank checks first, so that a mistake costs no launch. When a rank that was started
    here dies, all are started again, up to `restarts` times. timeout: seconds for which a rank waits for another.
    check_every: steps from one comparison of all ranks to the next.
    """
    if in_world():
        end_with_launcher()
        check_ranks(ranks)
        joined = join(timeout, check=check_every)
        with told_once(joined.rank):
            status = work(joined)
        leave()
    elif ranks > 1:
        with told_once(rank=1):  # its ranks will warn again
            check()
        return launch(ranks, arguments, restarts)
    else:
        with told_once(rank=0):
            check()
            status = work(World(check=check_every))
    return 130 if status == "interrupted" else 0


def end_with_launcher() -> None:
    """Have the kernel end this rank when the launcher that we are is killed; without, it would train on, unseen."""
    if OURS in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:  # it is gone already
            os._exit(1)


def check_ranks(asked: int) -> None:
    """Refuse --ranks beside a launcher that has started another number."""
    if in_world() and asked not in (1, int(os.environ["WORLD_SIZE"])):
        raise ValueError(f"--ranks {asked} under a launcher of {os.environ['WORLD_SIZE']} ranks; leave --ranks out")


def launch(ranks: int, arguments: list[str], restarts: int = 0) -> int:
    """Run `natgrad ARGUMENTS` on so many ranks and return the exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the launcher's table of failures says less than our line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ[OURS] = "1"
    os.environ.setdefault(GRACE, "150")  # seconds from Ctrl-C until ranks are killed; 30 may be less than a step
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "natgrad_lab", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as failed:
        return _tell(failed)
    finally:
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a rank that was killed has left hidden
    return 0


def _tell(failed: "ChildFailedError") -> int:
    """Print why the first failing rank failed and return its exit code as a shell would see it."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"natgrad: rank {rank} was killed by {name}; the other ranks were stopped", file=sys.stderr)
        return 128 - failure.exitcode
    if failure.exitcode == 2:
        print(f"natgrad: {failure.message}", file=sys.stderr)
    elif failure.exitcode != 130:
        print(f"natgrad: rank {rank} failed with exit code {failure.exitcode}; see above", file=sys.stderr)
    return failure.exitcode


def leave_message(text: str) -> bool:
    """Hand a failing rank's line to the launcher; say whether our launcher will show it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": text, "timestamp": str(int(time.time()))}))
    return bool(path) and OURS in os.environ
