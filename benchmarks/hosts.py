"""Two hosts that lose each other: network namespaces on one machine, with a link that is slow, lossy, or cut.

    python benchmarks/hosts.py             (as root; some minutes; writes to the results of benchmarks/faults.py)
    python benchmarks/hosts.py --only "one host gone for good"

Each host is a namespace with a network device of its own. The link between them is this script, which hands packets on
from one device to the other: late, not all of them, or none. On both hosts runs what a user types:

    torchrun --nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 \\
        -m natgrad_lab train RECIPE --out SHARED --auto-resume

Where namespaces or devices are not permitted the script says so and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults_table import hosts_table
from record import Record

from natgrad_lab.train.log import whole_lines

RESULTS = Path(__file__).parent / "results" / "faults.json"
RECIPES = Path(__file__).parent / "faults_recipes.py"
ADDRESSES = "192.0.2.1", "192.0.2.2"  # of documentation (RFC 5737); they exist in the namespaces alone
PORT, LIMIT, PATIENCE = 29500, 10.0, 240.0
OPTIONS = (
    "--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id natgrad --monitor-interval 0.2"
)
# seconds until a host that is silent is left out, and until one that may come is no longer waited for
RENDEZVOUS = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4,read_timeout=15"


REFRESH = 3
"""Steps from one measurement to the next: most checkpoints, at every fourth step, are not followed by one."""


class Link(threading.Thread):
    """Hands packets on between two devices.

    delay: seconds one way. loss: share of the packets that are dropped. cut: whether none gets through.
    """

    def __init__(self, devices: tuple[int, int]):
        super().__init__(daemon=True)
        self.devices, self.delay, self.loss, self.cut = devices, 0.0, 0.0, False
        self.packets = self.dropped = 0
        self.ended, self._draw = threading.Event(), random.Random(0)

    def run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        for number in itertools.count():
            if self.ended.is_set():
                return
            left = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else 0.1
            ready, _, _ = select.select(self.devices, [], [], min(left, 0.1))
            for device in ready:
                packet, other = os.read(device, 65536), self.devices[self.devices[0] == device]
                self.packets += 1
                if self.cut or self._draw.random() < self.loss:
                    self.dropped += 1
                    continue
                heapq.heappush(waiting, (time.monotonic() + self.delay, number, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, device, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # a host that has gone
                    os.write(device, packet)


def words(*command: str) -> None:
    """Run a command of the system."""
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Link, tuple[str, str]]]:
    """A link, and the names of the namespaces that it joins.

    Raises:
        PermissionError: where they cannot be made, with the reason.

    """
    mark = f"ng{os.getpid() % 10000}"
    names, devices = (f"{mark}a", f"{mark}b"), list[int]()
    try:
        for name, address in zip(names, ADDRESSES):
            words("ip", "netns", "add", name)
            device = os.open("/dev/net/tun", os.O_RDWR)
            devices.append(device)
            fcntl.ioctl(device, 0x400454CA, struct.pack("16sH", name.encode(), 0x1001))  # TUNSETIFF: IFF_TUN, IFF_NO_PI
            words("ip", "link", "set", name, "netns", name)
            for command in (f"addr add {address}/24 dev {name}", f"link set {name} up", "link set lo up"):
                words("ip", "-n", name, *command.split())
            # torchrun's launcher has no limit of its own for a store that is cut off: it waits until TCP gives up,
            # a quarter of an hour where Linux is not told otherwise
            words("ip", "netns", "exec", name, "sysctl", "-w", "net.ipv4.tcp_retries2=6")
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        _forget(names, devices)
        raise PermissionError(f"no network namespaces here: {said}") from None
    link = Link((devices[0], devices[1]))
    link.start()
    try:
        yield link, names
    finally:
        link.ended.set()
        link.join()
        _forget(names, devices)


def _forget(names: tuple[str, str], devices: list[int]) -> None:
    for device in devices:
        os.close(device)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@dataclass
class Pair:
    """A run on two hosts."""

    link: Link
    names: tuple[str, str]
    folder: Path
    steps: int = 40
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def command(self, host: int, first: int) -> list[str]:
        """What is typed on a host, where ranks meet on the `first` (is_host: the namespaces have one host name)."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", *OPTIONS.split()]
        torchrun += ["--rdzv-endpoint", f"{ADDRESSES[first]}:{PORT}"]
        torchrun += ["--rdzv-conf", f"{RENDEZVOUS},is_host={int(host == first)}"]
        torchrun += ["--local-addr", ADDRESSES[host]]
        run = ["--out", str(self.out), "--steps", str(self.steps), "--save-every", "4", "--check", "1"]
        run += ["--optimizer.refresh", str(REFRESH)]
        return [
            *torchrun,
            *("-m", "natgrad_lab", "train", f"{RECIPES}:kfac", *run, "--timeout", f"{LIMIT:g}", "--auto-resume"),
        ]

    def start(self, host: int, alone: bool = False) -> None:
        """Start a host's launcher. alone: as the first host of a new run."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.names[host]}
        env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "NATGRAD_LAUNCHED": "1"}
        command = self.command(host, host if alone else 0)
        said = (self.folder / f"host-{host}.txt").open("ab")
        self.processes[host] = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            stdout=said,
            stderr=said,
            env=env,
            start_new_session=True,
        )

    def kill(self, host: int) -> None:
        """A host loses its power."""
        for pid in [self.processes[host].pid, *below(self.processes[host].pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[host].wait()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """What the run has told of a kind."""
        return [told for _, told in whole_lines(self.out / "metrics.jsonl") if told.get("kind") == kind]

    def until(self, step: int) -> None:
        """Wait until a step has been made, and a checkpoint is there."""
        deadline = time.monotonic() + PATIENCE
        while not any(told["step"] >= step for told in self.lines("step")) or not self.lines("checkpoint"):
            if time.monotonic() > deadline or all(p.poll() is not None for p in self.processes.values()):
                raise RuntimeError(f"step {step} was not made: {self.said(0)[-2000:]}")
            time.sleep(0.05)

    def ends(self, host: int, seconds: float = PATIENCE) -> int | None:
        """A launcher's exit code; None where it has not ended in time, and is killed."""
        try:
            return self.processes[host].wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill(host)
            return None

    def said(self, host: int) -> str:
        path = self.folder / f"host-{host}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def line(self, host: int) -> str:
        """The first line of natgrad's on a host."""
        return next((line for line in self.said(host).splitlines() if line.startswith("natgrad: ")), "")


def below(pid: int) -> list[int]:
    """All processes that a process and its own have started."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(deep for child in own for deep in below(child))]


def equal(pair: Pair, whole: bytes) -> dict[str, Any]:
    """Both hosts end, with the undisturbed run's weights."""
    codes = [pair.ends(host) for host in (0, 1)]
    if codes != [0, 0]:
        return {"right": False, "ended": f"exit codes {codes}", "hung": None in codes, "said": pair.said(0)[-2000:]}
    good = digest_of(pair.out) == whole
    return {"right": good, "ended": "equal" if good else "other weights", "hung": False, "said": ""}


def digest_of(out: Path) -> bytes:
    """The weights that a run has left, as bytes."""
    import torch

    found = torch.load(out / "model.pt", weights_only=True)
    return b"".join(found[name].numpy().tobytes() for name in sorted(found))


def goes_on(pair: Pair, host: int, ranks: int, said: str = "") -> dict[str, Any]:
    """The host that is left ends the run on its rank, from the last checkpoint, with the curvature of before.

    said: the line of a host that has ended before.
    """
    code = pair.ends(host)
    said = said or pair.line(host)
    resumed, steps = pair.lines("resumed"), pair.lines("step")
    told = {"hung": code is None, "said": said}
    if code != 0 or not resumed or [one["step"] for one in steps] != list(range(1, pair.steps + 1)):
        what = f"exit code {code}, resumed {[one['step'] for one in resumed]}, {len(steps)} steps"
        return {**told, "right": False, "ended": what, "said": pair.said(host)[-3000:]}
    first = next(one for one in steps if one["step"] == resumed[-1]["step"] + 1)
    due = first["step"] % REFRESH == 1
    before = next(one for one in steps if one["step"] == resumed[-1]["step"])
    kept = first["preconditioned"] == before["preconditioned"] > 0 and (due or first["refreshed"] == 0.0)
    good = resumed[-1]["ranks"] == ranks and kept and bool(said)
    where = f"on {ranks} rank{'s' if ranks > 1 else ''} from step {resumed[-1]['step']}"
    missing = "" if kept else ", curvature measured anew"
    ended = f"goes on {where}{missing}{'' if said else ', no line'}"
    return {**told, "right": good, "ended": ended, "said": said if good else pair.said(host)[-3000:]}


def slow(pair: Pair, whole: bytes) -> dict[str, Any]:
    """300 ms one way, from the first packet on, in a shorter run."""
    pair.steps = 6  # of which each waits for some 16 messages
    pair.start(0)
    pair.start(1)
    if [pair.ends(host) for host in (0, 1)] != [0, 0]:
        return equal(pair, whole)
    whole = digest_of(pair.out)
    shutil.rmtree(pair.out)
    pair.link.delay = 0.3
    pair.start(0)
    pair.start(1)
    return equal(pair, whole)


def lossy(pair: Pair, whole: bytes) -> dict[str, Any]:
    """1 % of the packets are lost."""
    pair.link.loss = 0.01
    pair.start(0)
    pair.start(1)
    told = equal(pair, whole)
    return {**told, "packets": pair.link.packets, "dropped": pair.link.dropped}


def cut_shortly(pair: Pair, whole: bytes) -> dict[str, Any]:
    """The link is cut for 4 s, less than the limit."""
    pair.start(0)
    pair.start(1)
    pair.until(4)
    pair.link.cut = True
    time.sleep(4)
    pair.link.cut = False
    return equal(pair, whole)


def cut(pair: Pair, whole: bytes) -> dict[str, Any]:
    """The link is cut for good: the host of the rendezvous goes on alone, the other one ends."""
    pair.start(0)
    pair.start(1)
    pair.until(5)
    pair.link.cut = True
    other = pair.ends(1)
    told = goes_on(pair, 0, 1)
    if other in (None, 0):
        return {**told, "right": False, "ended": f"{told['ended']}; the other host: {other}", "hung": other is None}
    return told


def gone(pair: Pair, whole: bytes) -> dict[str, Any]:
    """The second host loses its power: the first goes on alone."""
    pair.start(0)
    pair.start(1)
    pair.until(5)
    pair.kill(1)
    return goes_on(pair, 0, 1)


def first_gone(pair: Pair, whole: bytes) -> dict[str, Any]:
    """The host of the rendezvous loses its power: the other one ends with a line, and goes on when started as first."""
    pair.start(0)
    pair.start(1)
    pair.until(5)
    pair.kill(0)
    code, said = pair.ends(1), pair.line(1)
    if code in (None, 0):
        return {"right": False, "ended": f"the host that is left: {code}", "hung": code is None, "said": said}
    pair.start(1, alone=True)
    return goes_on(pair, 1, 1, said)


CASES: dict[str, Callable[[Pair, bytes], dict[str, Any]]] = {
    "latency of 300 ms": slow,
    "1 % of packets lost": lossy,
    "link cut for 4 s": cut_shortly,
    "link cut for good": cut,
    "one host gone for good": gone,
    "the first host gone": first_gone,
}


def undisturbed(link: Link, names: tuple[str, str]) -> bytes:
    """The weights of a run to which nothing happens."""
    folder = Path(tempfile.mkdtemp(prefix="natgrad-hosts-"))
    try:
        pair = Pair(link, names, folder)
        pair.start(0)
        pair.start(1)
        codes = [pair.ends(host) for host in (0, 1)]
        if codes != [0, 0]:
            raise SystemExit(f"an undisturbed run on two hosts has ended with {codes}: {pair.said(0)[-3000:]}")
        return digest_of(pair.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def suffer(name: str, link: Link, names: tuple[str, str], whole: bytes) -> dict[str, Any]:
    """One case, with a link as it was."""
    folder = Path(tempfile.mkdtemp(prefix="natgrad-hosts-"))
    link.delay, link.loss, link.cut, link.packets, link.dropped = 0.0, 0.0, False, 0, 0
    pair, began = Pair(link, names, folder), time.monotonic()
    try:
        told = CASES[name](pair, whole)
        told["said"] = told["said"].replace(str(folder), "").strip()
        return {**told, "seconds": round(time.monotonic() - began, 1)}
    finally:
        for host in pair.processes:
            pair.kill(host)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CASES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the namespaces away
    record = Record(given.out, "cpu", outcomes=True, seed=0)
    record.content["cases"] = [c for c in record.content["cases"] if c["rows"][0]["right"]]  # the others are mended
    command = f"torchrun {OPTIONS} --rdzv-conf {RENDEZVOUS} ... --timeout {LIMIT:g} --save-every 4 --auto-resume"
    try:
        with two_hosts() as (link, names):
            whole: bytes | None = None
            for name in CASES if given.only is None else [given.only]:
                case = {"hosts": name, "command": command}
                if record.find(case) is not None:
                    continue
                whole = whole or undisturbed(link, names)
                row = suffer(name, link, names, whole)
                record.add(case, [row])
                print(f"{name}: {'' if row['right'] else 'WRONG '}{row['ended']} ({row['seconds']} s) {row['said']}")
                sys.stdout.flush()
    except PermissionError as error:
        print(f"skipped: {error}")
        return 0
    print(hosts_table(record.content))
    return 0 if all(c["rows"][0]["right"] for c in record.content["cases"] if "hosts" in c) else 1


if __name__ == "__main__":
    sys.exit(main())
