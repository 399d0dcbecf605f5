"""Ranks that are started as a launcher starts them, disturbed, and started again; none of them outlives the campaign.

Ranks are forked from a process that has imported everything, so that a run of several ranks takes a second. Each gets
the environment that torchrun gives, the store in which ranks meet is a process of its own as under torchrun, and
what runs is `natgrad train` or a user's loop (faults_loop.py).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import faults_loop
import faults_recipes
import torch
import torch.distributed as dist

import natgrad_lab.recipes
import natgrad_lab.train.arguments
import natgrad_lab.train.run  # noqa: F401
from natgrad_lab.__main__ import main
from natgrad_lab.data import Digits

RECIPES = Path(faults_recipes.__file__)
PATIENCE = 90.0
"""Seconds after which a run that has not ended has hung: many times what any takes."""
TIMEOUT = 15.0
"""The limit that runs are given for every wait. Ranks share a core or two, so they start some seconds apart."""
Harm = Callable[[int], None]
"""Called in every rank before it trains, with its number."""


@dataclass(frozen=True)
class Setting:
    """What is disturbed: an optimizer, so many ranks, and who trains.

    how: "plain" is natgrad's trainer. "loop", "ddp" and "sharded" are a user's loop on a plain model, under
    DistributedDataParallel, and cut by fully_shard.
    """

    optimizer: str
    ranks: int
    how: str


class Ended(NamedTuple):
    """How a rank ended: its exit code (below 0: the signal that killed it), what it said, and whether it hung."""

    rank: int
    code: int
    said: str
    hung: bool

    @property
    def line(self) -> str:
        """The last line that it said."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Attempt:
    """The ranks of one start.

    words: what the trainer's command gets beside recipe and folder. number: of starts by this launcher before.
    timeout: the limit of every wait.
    """

    def __init__(
        self,
        setting: Setting,
        out: Path,
        words: Sequence[str] = (),
        number: int = 0,
        harm: Harm | None = None,
        timeout: float = TIMEOUT,
    ):
        self.setting, self.out, self.folder = setting, out, Path(tempfile.mkdtemp(dir=out.parent))
        self.timeout = timeout
        self.began, port = time.monotonic(), free_port()
        self.store = forked(lambda: keep_store(port), self.folder / "store.txt")
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(setting.ranks),
            "TORCHELASTIC_RESTART_COUNT": str(number),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "NATGRAD_LAUNCHED": "1",
        }
        self.pids = [
            forked(lambda rank=rank: self._rank(rank, env, words, harm), self.folder / f"{rank}.txt")
            for rank in range(setting.ranks)
        ]

    def _rank(self, rank: int, env: dict[str, str], words: Sequence[str], harm: Harm | None) -> int:
        os.environ |= {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        sys.argv = ["natgrad", *self.command(words)]
        if harm is not None:
            harm(rank)
        if self.setting.how == "plain":
            return main(self.command(words))
        self.out.mkdir(exist_ok=True)
        faults_loop.Loop(self.out, self.setting.optimizer, self.setting.how, self.timeout).run()
        return 0

    def command(self, words: Sequence[str]) -> list[str]:
        """What the trainer is called with."""
        given = [*words, "--timeout", f"{self.timeout:g}"]
        recipe = f"{RECIPES}:{self.setting.optimizer}"
        return ["train", recipe, "--out", str(self.out), "--save-every", "2", "--check", "1", *given]

    def wait(self, patience: float = PATIENCE) -> list[Ended]:
        """Wait until all ranks have ended; those that do not in time have hung, and are killed."""
        deadline, codes = time.monotonic() + patience, dict[int, int]()
        hung: set[int] = set()
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline and not hung:
                hung = set(range(len(self.pids))) - codes.keys()
                for rank in hung:
                    os.kill(self.pids[rank], signal.SIGKILL)
            time.sleep(0.01)
        self.close()
        return [
            Ended(rank, codes[rank], (self.folder / f"{rank}.txt").read_text(errors="replace"), rank in hung)
            for rank in range(len(self.pids))
        ]

    def running(self) -> bool:
        """Whether no rank has ended yet."""
        return all(Path(f"/proc/{pid}").exists() and state_of(pid) != "Z" for pid in self.pids)

    def close(self) -> None:
        """End the store."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.store, signal.SIGKILL)
            os.waitpid(self.store, 0)


def run(setting: Setting, out: Path, harm: Harm | None = None, timeout: float = PATIENCE) -> list[Ended]:
    """One start, to its end, with a limit that is never reached: machines are slow at times."""
    return Attempt(setting, out, (), 0, harm, timeout).wait()


def state_of(pid: int) -> str:
    """A process's state in a letter; Z where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def forked(work: Callable[[], int | None], said: Path) -> int:
    """Do work in a process of its own, which writes to a file and ends with this one; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), write_through=True)
        end_with_parent()
        code = work() or 0
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise AssertionError


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def keep_store(port: int) -> None:
    """The store in which ranks meet, as torchrun's launcher keeps it."""
    store = dist.TCPStore("127.0.0.1", port, None, True, timedelta(seconds=60), wait_for_workers=False)
    while store:
        time.sleep(60)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of so many bytes in a folder; what it gives changes it (`size=64m`, `ro`).

    Raises:
        PermissionError: where nothing may be mounted.

    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null"):
        raise PermissionError("mount is not permitted here")
    try:
        yield lambda how: os.system(f"mount -o remount,{how} {folder}") and None
    finally:
        os.system(f"umount -l {folder}")


def limit_files(size: int) -> None:
    """Have every write beyond so many bytes of a file fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def weights(out: Path) -> dict[str, torch.Tensor] | None:
    """What a run has left; None where it has not."""
    path = out / "model.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def loss_of(out: Path) -> float:
    """The loss on the test with which a run of the trainer has ended."""
    return json.loads((out / "summary.json").read_text())["test_loss"]


def same(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> bool:
    """Whether weights are equal to the last bit."""
    if one is None or other is None or one.keys() != other.keys():
        return False
    return all(torch.equal(one[name], other[name]) for name in one)


def far(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> float:
    """How far weights are apart, as a share of their norm."""
    if one is None or other is None:
        return float("inf")
    kept = [n for n in one if one[n].is_floating_point()]
    apart = sum(float((one[n].double() - other[n].double()).square().sum()) for n in kept)
    return (apart / sum(float(one[n].double().square().sum()) for n in kept)) ** 0.5


Digits().load()  # scikit-learn's import takes two seconds, and what runs import when they first need it as many
for late in (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch.config",
    "torch.onnx",
    "kornia.augmentation",
    "fsspec",
):
    importlib.import_module(late)
