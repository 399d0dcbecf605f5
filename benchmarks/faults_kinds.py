"""The kinds of faults: what is done to a run, and what should come of it.

A kind is a function of a Trial. It gives an Outcome, whose `right` says whether the run has ended as it should:
with the undisturbed run's weights to the last bit, or with one line that names what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import faults_loop
import faults_recipes
import faults_run
import torch
from faults_run import PATIENCE, TIMEOUT, Attempt, Ended, Harm, Setting, far, run, same, small_disk, weights

from natgrad.parallel.transport import Processes
from natgrad_lab.train import checkpoint, loop

WAYS_OUT = re.compile(r"--[a-z]|World\(|start all|make room|name another|begin anew|use the command")
"""What a line says that names what to do."""


@dataclass
class Outcome:
    """right: whether the run has ended as it should. how: "equal", "line", "close", or what is wrong."""

    right: bool
    how: str
    said: str = ""


@dataclass
class Trial:
    """One fault: the setting, what is drawn, a folder, and the undisturbed run's weights, and its loss on the test."""

    setting: Setting
    draw: Random
    folder: Path
    whole: dict[str, torch.Tensor]
    loss: float | None = None
    hung: bool = False
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def victim(self) -> int:
        """The rank that is hurt."""
        return self.told.setdefault("rank", self.draw.randrange(self.setting.ranks))

    @property
    def step(self) -> int:
        """The step in which it is: some checkpoints lie before it, and steps after it."""
        return self.told.setdefault("step", self.draw.randint(3, faults_recipes.STEPS - 2))

    def start(self, words: Sequence[str] = (), number: int = 0, harm: Harm | None = None) -> list[Ended]:
        """Start all ranks and wait until they have ended."""
        return self.watched(run_of(self, words, number, harm))

    def watched(self, ended: list[Ended]) -> list[Ended]:
        """Note whether a rank has hung."""
        self.hung |= any(one.hung for one in ended)
        return ended

    def again(self, number: int = 1) -> list[Ended]:
        """Start all ranks again, as a launcher does, or as a job that is queued anew."""
        requeued = self.setting.how == "plain" and self.told.setdefault("requeued", self.draw.random() < 0.5)
        return self.start(("--auto-resume",) if requeued else (), 0 if requeued else number)

    def equal(self, ended: Sequence[Ended], before: str = "") -> Outcome:
        """The outcome of a run that should have ended as the undisturbed one."""
        if self.hung:
            return Outcome(False, "hung", before)
        if any(one.code for one in ended):
            wrong = next(one for one in ended if one.code)
            return Outcome(False, f"rank {wrong.rank} ended with {wrong.code}", wrong.said[-2000:])
        good = same(weights(self.out), self.whole)
        return Outcome(good, "equal" if good else "other weights", before)

    def refused(self, ended: Sequence[Ended], *words: str) -> Outcome:
        """The outcome of a run that should have ended with one line that has these words."""
        lines = [one.line for one in ended if one.line.startswith("natgrad: ")]
        said = "\n".join(one.said for one in ended)
        if self.hung:
            return Outcome(False, "hung", said[-2000:])
        if not lines or "Traceback" in said or not any(one.code for one in ended):
            return Outcome(False, "no line", said[-2000:])
        good = bool(WAYS_OUT.search(lines[0])) and all(word in lines[0] for word in words)
        return Outcome(good, "line" if good else "another line", lines[0])

    def survivors(self, ended: Sequence[Ended], dead: Sequence[int]) -> str | None:
        """The line of those that were left; what is wrong with it is told by an exclamation mark before."""
        if len(dead) == self.setting.ranks or self.setting.how != "plain":
            return ""
        lines = [one.line for one in ended if one.rank not in dead and one.line.startswith("natgrad: ")]
        said = " ".join(one.said for one in ended if one.rank not in dead)
        good = bool(lines) and all(re.search(rf"\b{rank}\b", lines[0]) for rank in dead) and "Traceback" not in said
        return lines[0] if good else f"! {said[-1500:]}"


def run_of(trial: Trial, words: Sequence[str], number: int, harm: Harm | None) -> list[Ended]:
    return Attempt(trial.setting, trial.out, words, number, harm).wait()


# --- processes ---


def die(number: int = signal.SIGKILL) -> None:
    """End this process by a signal, here."""
    os.kill(os.getpid(), number)
    time.sleep(60)


def before_call(where: Any, name: str, nth: int, act: Callable[[], Any]) -> None:
    """Do something before the n-th call of a function."""
    real, count = getattr(where, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == nth:
            act()
        return real(*args, **kwargs)

    setattr(where, name, counted)


def in_training(trial: Trial, act: Callable[[], Any]) -> Callable[[], None]:
    """A hook at a random place of a random step: before it, or at one of its messages."""
    place = trial.told.setdefault("place", trial.draw.choice(["step", "message", "any time"]))
    step, messages = trial.step, trial.draw.randint(2, 6) * trial.step
    seconds = trial.draw.random() * 1.5
    if place == "any time":
        trial.told["seconds"] = round(seconds, 2)

    def install() -> None:
        if place == "step" or (place == "message" and trial.setting.ranks == 1):
            where, name = (loop, "descend") if trial.setting.how == "plain" else (faults_loop.Loop, "step")
            before_call(where, name, step, act)
        elif place == "message":
            before_call(Processes, "all_reduce", messages, act)
        else:
            threading.Timer(seconds, act).start()

    return install


def on(ranks: Sequence[int], install: Callable[[], None]) -> Harm:
    """A hook on some ranks."""
    return lambda rank: install() if rank in ranks else None


def killed_and_again(trial: Trial, victims: Sequence[int], install: Callable[[], None]) -> Outcome:
    """Kill ranks, hear what the others say, and start all again."""
    ended = trial.start(harm=on(victims, install))
    if all(one.code == 0 for one in ended):
        return trial.equal(ended, "it had ended before")
    told = trial.survivors(ended, victims)
    outcome = trial.equal(trial.again(), told or "")
    if told is not None and told.startswith("!"):
        return Outcome(False, "no line of the others", told)
    return outcome


def kill_one(trial: Trial) -> Outcome:
    """kill -9 of one rank, at a random place."""
    return killed_and_again(trial, [trial.victim], in_training(trial, die))


def kill_all(trial: Trial) -> Outcome:
    """kill -9 of all ranks."""
    return killed_and_again(trial, range(trial.setting.ranks), in_training(trial, die))


def terminate_one(trial: Trial) -> Outcome:
    """SIGTERM to one rank: the run ends after its step, with a checkpoint."""
    ended = trial.start(harm=on([trial.victim], in_training(trial, lambda: os.kill(os.getpid(), signal.SIGTERM))))
    if all(one.code == 0 for one in ended):
        return trial.equal(ended, "it had ended before")
    return trial.equal(trial.again(), ended[0].line)


def kill_twice(trial: Trial) -> Outcome:
    """kill -9 of one rank, and of another one after the restart: before, while or after it reads the checkpoint."""
    first, second = trial.victim, trial.draw.randrange(trial.setting.ranks)
    trial.told["second"] = second
    trial.start(harm=on([first], in_training(trial, die)))
    nth, place = trial.draw.randint(1, 4), trial.draw.choice(["reading", "step"])
    trial.told |= {"then": place}

    def install() -> None:
        if trial.setting.how != "plain":
            before_call(faults_loop.Loop, "load" if place == "reading" else "step", 1, die)
        elif place == "reading":
            before_call(checkpoint, "load", min(nth, 2), die)
        else:
            before_call(loop, "descend", 1, die)

    trial.start(number=1, harm=on([second], install))
    return trial.equal(trial.again(2))


def kill_in_checkpoint(trial: Trial) -> Outcome:
    """kill -9 of one rank while a checkpoint is being written, at one of the places where that matters."""
    if trial.setting.how == "plain":
        places = {"write_safely": checkpoint, "flush": checkpoint, "digest": checkpoint, "sync_folder": checkpoint}
        places |= {"rename": Path, "rmtree": shutil}
        name = trial.told.setdefault("place", trial.draw.choice([*places]))
        where, nth = places[name], trial.draw.randint(1, 3)
        victim = 0 if name in ("rename", "rmtree") else trial.victim
    else:
        in_parts = trial.setting.how == "sharded" and trial.setting.optimizer != "seng"
        name, where, nth = "save", faults_loop.dcp if in_parts else torch, trial.draw.randint(1, 3)
        victim = trial.victim if in_parts else 0
    trial.told |= {"place": name, "nth": nth, "rank": victim}
    return killed_and_again(trial, [victim], lambda: before_call(where, name, nth, die))


def stop_shortly(trial: Trial) -> Outcome:
    """SIGSTOP of one rank for some seconds, less than the limit: nothing is lost."""
    ended = stopped(trial, trial.victim, 3.0)
    return trial.equal(ended)


def stop_for_good(trial: Trial) -> Outcome:
    """SIGSTOP of one rank for longer than the limit: the others name it and end; started again, the run goes on."""
    ended = stopped(trial, trial.victim, PATIENCE / 2)
    if all(one.code == 0 for one in ended):
        return trial.equal(ended, "it had ended before")
    told = trial.survivors(ended, [trial.victim]) if trial.setting.ranks > 1 else ""
    outcome = trial.equal(trial.again(), told or "")
    return Outcome(False, "no line of the others", told) if told and told.startswith("!") else outcome


def stopped(trial: Trial, victim: int, seconds: float) -> list[Ended]:
    """Stop a rank in a random step; let it go on after so many seconds, or kill it where the others have ended."""
    nth, mark = trial.step, trial.folder / "stopped"
    where, name = (loop, "descend") if trial.setting.how == "plain" else (faults_loop.Loop, "step")
    attempt = Attempt(
        trial.setting, trial.out, harm=on([victim], lambda: before_call(where, name, nth, lambda: halt(mark)))
    )
    others = [pid for rank, pid in enumerate(attempt.pids) if rank != victim]
    began = time.monotonic()
    while not mark.exists() and attempt.running() and time.monotonic() - began < PATIENCE:
        time.sleep(0.01)
    began = time.monotonic()
    while time.monotonic() - began < seconds and (not others or any(faults_run.state_of(p) != "Z" for p in others)):
        time.sleep(0.05)
    over = bool(others) and time.monotonic() - began < seconds
    os.kill(attempt.pids[victim], signal.SIGKILL if over else signal.SIGCONT)
    return trial.watched(attempt.wait())


def halt(mark: Path) -> None:
    """Stop this process as if it hung."""
    mark.touch()
    os.kill(os.getpid(), signal.SIGSTOP)


def jump_clock(trial: Trial) -> Outcome:
    """The wall clock jumps by hours or years, forwards or back, in a random step, on one rank or on all."""
    jump = trial.draw.choice([-1, 1]) * 10 ** trial.draw.uniform(2, 9)
    ranks = [trial.victim] if trial.draw.random() < 0.5 else range(trial.setting.ranks)
    trial.told |= {"jump": round(jump), "ranks": len(ranks)}
    real = time.time

    def install() -> None:
        def jumped() -> None:
            time.time = lambda: max(real() + jump, 0.0)

        where, name = (loop, "descend") if trial.setting.how == "plain" else (faults_loop.Loop, "step")
        before_call(where, name, trial.step, jumped)

    outcome = trial.equal(trial.start(harm=on(ranks, install)))
    if outcome.right and trial.setting.how == "plain":
        lines = [json.loads(line) for line in (trial.out / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["elapsed"] for line in lines if line["kind"] == "step"]
        if seconds != sorted(seconds) or not 0 <= seconds[-1] < 3600:
            return Outcome(False, "seconds of training that cannot be", str(seconds))
    return outcome


def command(trial: Trial, *more: str) -> list[str]:
    """`natgrad train` as a user types it."""
    recipe = f"{faults_run.RECIPES}:{trial.setting.optimizer}"
    words = ["--out", str(trial.out), "--ranks", str(trial.setting.ranks), "--save-every", "2", "--check", "1", *more]
    return [sys.executable, "-m", "natgrad_lab", "train", recipe, "--timeout", "60", *words]


def launched(trial: Trial, *more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(trial, *more), stdout=subprocess.DEVNULL, stderr=pipe, text=True, env=env, start_new_session=True
    )


def ended(trial: Trial, process: subprocess.Popen[str]) -> Ended:
    """Wait for a launcher."""
    try:
        _, said = process.communicate(timeout=2 * PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
        trial.hung = True
    return Ended(0, process.returncode, said, trial.hung)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def until_step(trial: Trial, process: subprocess.Popen[str]) -> None:
    """Wait until the drawn step has been made."""
    path, deadline = trial.out / "metrics.jsonl", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b'"kind": "step"') >= trial.step:
            return
        time.sleep(0.005)


def kill_launcher(trial: Trial) -> Outcome:
    """kill -9 of the launcher: its ranks end with it, and --resume takes the run up."""
    process = launched(trial)
    until_step(trial, process)
    ranks = children(process.pid) if trial.setting.ranks > 1 else []
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(faults_run.state_of(pid) != "Z" for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    if any(faults_run.state_of(pid) != "Z" for pid in ranks):
        return Outcome(False, "ranks have outlived the launcher")
    there = (trial.out / "checkpoints").is_dir() and checkpoint.found(trial.out / "checkpoints")
    return trial.equal([ended(trial, launched(trial, "--resume" if there else "--auto-resume"))])


def kill_under_launcher(trial: Trial) -> Outcome:
    """kill -9 of a rank under natgrad's launcher, which starts all again."""
    process = launched(trial, "--max-restarts", "2")
    until_step(trial, process)
    ranks = children(process.pid)
    if len(ranks) > trial.victim:
        os.kill(sorted(ranks)[trial.victim], signal.SIGKILL)
    return trial.equal([ended(trial, process)])


# --- disks ---


def disk_full(trial: Trial) -> Outcome:
    """The results' disk is full at some time: room is made after, and --resume ends the run."""
    size = trial.draw.choice(["300k", "700k", "1200k"])
    trial.told["size"] = size
    with small_disk(trial.out, size) as change:
        first = trial.start()
        change("size=100m")
        return over_again(trial, first)


def over_again(trial: Trial, first: Sequence[Ended]) -> Outcome:
    """A run that has gone on without checkpoints is equal; one that has ended with a line goes on when told to."""
    if all(one.code == 0 for one in first):
        return trial.equal(first)
    line = trial.refused(first)
    if not line.right:
        return line
    return trial.equal(trial.start(("--auto-resume",)), line.said)


def file_limit(trial: Trial) -> Outcome:
    """No file may grow beyond some size (a quota)."""
    size = trial.draw.choice([2_000, 20_000, 60_000])
    trial.told["size"] = size
    return over_again(trial, trial.start(harm=lambda rank: faults_run.limit_files(size)))


def read_only(trial: Trial) -> Outcome:
    """The results' folder cannot be written to."""
    with small_disk(trial.out, "10m") as change:
        change("ro")
        line = trial.refused(trial.start(), str(trial.out))
        change("rw")
        return trial.equal(trial.start(), line.said) if line.right else line


def read_only_later(trial: Trial) -> Outcome:
    """One rank's disk turns read-only in the middle of a run."""
    nth = trial.draw.randint(1, 5)

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    def install() -> None:
        before_call(checkpoint, "write_part", nth, lambda: setattr(checkpoint, "flush", refuse))

    return over_again(trial, trial.start(harm=on([trial.victim], install)))


def slow_disk(trial: Trial) -> Outcome:
    """Every flush of one rank's disk takes a while."""
    seconds = trial.draw.choice([0.05, 0.3])
    real = checkpoint.flush

    def slowly(stream: Any) -> None:
        time.sleep(seconds)
        real(stream)

    return trial.equal(trial.start(harm=on([trial.victim], lambda: setattr(checkpoint, "flush", slowly))))


def hanging_disk(trial: Trial) -> Outcome:
    """A flush of one rank's disk never ends: the checkpoint is given up, and the run goes on."""
    nth = trial.draw.randint(1, 3)

    def install() -> None:
        before_call(checkpoint, "flush", nth, lambda: time.sleep(3600))

    first = trial.start(harm=on([trial.victim], install))
    if all(one.code == 0 for one in first) and trial.setting.how == "plain":
        told = (trial.out / "metrics.jsonl").read_text()
        if f"the disk of rank {trial.victim} was not done" not in told and "rank 0 was not done" not in told:
            return Outcome(False, "nothing is said of the disk", told[-500:])
    return over_again(trial, first)


# --- checkpoints ---


def half(trial: Trial, setting: Setting | None = None) -> list[Path]:
    """A run that was stopped after a random step; its checkpoints, the newest last."""

    def harm(rank: int) -> None:
        before_call(loop, "descend", trial.step, lambda: os.kill(os.getpid(), signal.SIGTERM))

    trial.watched(Attempt(setting or trial.setting, trial.out, (), 0, harm).wait())
    found = checkpoint.found(trial.out / "checkpoints")
    return [trial.out / "checkpoints" / checkpoint.name_of(step) for step in found]


def damaged(trial: Trial, hurt: Callable[[Path], None]) -> Outcome:
    """Hurt a file of the newest checkpoint. --resume refuses it and names the one before, which goes on; or a job
    that is queued again passes over it by itself.
    """
    *before, last = half(trial)
    files = sorted(path for path in last.rglob("*") if path.is_file())
    file = files[trial.draw.randrange(len(files))]
    trial.told["file"] = str(file.relative_to(last))
    hurt(file)
    if trial.draw.random() < 0.5:
        return trial.equal(trial.start(("--auto-resume",)))
    line = trial.refused(trial.start(("--resume",)), last.name)
    if not line.right:
        return line
    found = re.search(r"--checkpoint (\d+)", line.said)
    if not found or not before:
        return line
    return trial.equal(trial.start(("--resume", "--checkpoint", found[1])), line.said)


def flipped_bit(trial: Trial) -> Outcome:
    """A bit of a checkpoint's file is flipped."""

    def hurt(file: Path) -> None:
        content = bytearray(file.read_bytes())
        place = trial.draw.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)

    return damaged(trial, hurt)


def cut_file(trial: Trial) -> Outcome:
    """A checkpoint's file is cut, perhaps to nothing."""

    def hurt(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(trial.draw.random() * len(content))])

    return damaged(trial, hurt)


def missing_file(trial: Trial) -> Outcome:
    """A checkpoint's file is gone."""
    return damaged(trial, lambda file: file.unlink())


def other_model(trial: Trial) -> Outcome:
    """--resume with another network, another optimizer, or other numbers."""
    half(trial)
    words = trial.draw.choice(
        [
            ("--model", "mlp", "--model.hidden", "9"),
            ("--optimizer.lr", "0.01"),
            ("--optimizer", "sgd"),
            ("--model", "mlp", "--model.hidden", "9", "--accept-changes"),
            ("--optimizer", "sgd", "--accept-changes"),
        ]
    )
    trial.told["words"] = " ".join(words)
    line = trial.refused(trial.start(("--resume", *words)))
    return trial.equal(trial.start(("--resume",)), line.said) if line.right else line


def other_world(trial: Trial) -> Outcome:
    """--resume on another number of ranks: sums have another order, so weights are close and not equal."""
    others = [n for n in (1, 2, 3, 4) if n != trial.setting.ranks and not (trial.setting.how != "plain" and n == 1)]
    other = replace(trial.setting, ranks=trial.draw.choice(others))
    trial.told["first"] = other.ranks
    if trial.setting.how == "plain":
        half(trial, other)
        ended = trial.start(("--resume",))
    else:
        where = faults_loop.Loop
        trial.watched(run(other, trial.out, lambda _: before_call(where, "step", trial.step, die)))
        ended = trial.start()
    if trial.hung or any(one.code for one in ended):
        return trial.equal(ended)
    if trial.setting.how == "plain":  # mixup and erasing are drawn by each rank, so losses are compared
        assert trial.loss is not None
        apart = abs(faults_run.loss_of(trial.out) / trial.loss - 1)
        good = apart < 0.5
    else:
        apart = far(trial.whole, weights(trial.out))
        good = apart < 1e-3
    trial.told["apart"] = float(f"{apart:.1g}")
    return Outcome(good, "close" if good else "other weights")


def other_version(trial: Trial) -> Outcome:
    """A checkpoint of a format that this natgrad does not know, sealed as it should be."""
    last = half(trial)[-1]
    reseal(last, {"format": trial.draw.choice([0, 3, 99, "2", None])})
    return trial.refused(trial.start(("--resume",)), "format")


def reseal(path: Path, change: dict[str, Any]) -> None:
    """Change the values of a checkpoint, and its digests such that they fit."""
    told = json.loads((path / "state.json").read_text())
    content = {**told["content"], **change}
    for key, value in change.items():
        if value is DROPPED:
            del content[key]
    for own in path.glob("rank-*"):
        sums = {p.name: checkpoint.digest(p) for p in own.iterdir() if p.name != "sums.json"}
        (own / "sums.json").write_text(json.dumps(sums))
    content["sums"] = {name: checkpoint.digest(path / name) for name in told["content"]["sums"]}
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps({"content": content, "digest": seal}))


DROPPED = object()


class Evil:
    """What a pickle that runs code looks like: unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hostile(trial: Trial) -> Outcome:
    """A checkpoint that is sealed as it should be, and meant to do harm: code in it, files outside, sizes of terabytes,
    values that are missing or of another kind.
    """
    last, mark = half(trial)[-1], trial.folder / "ran"
    way = trial.told.setdefault("way", trial.draw.choice(["table", "tensors", "outside", "huge", "missing", "kind"]))
    change: dict[str, Any] = {}
    if way == "table":
        (last / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    elif way == "tensors":
        for file in last.glob("rank-0/*.distcp"):
            table = checkpoint.read_table(last)
            torch.save({"x": Evil(mark)}, file)
            payload = file.read_bytes()
            longest = max(p.offset + p.length for p in table.storage_data.values())
            file.write_bytes(payload * (longest // len(payload) + 2))
            for place in table.storage_data.values():
                place.offset, place.length = 0, len(payload)
            (last / ".metadata").write_bytes(pickle.dumps(table))
    elif way == "outside":
        table = checkpoint.read_table(last)
        key = next(iter(table.storage_data))
        table.storage_data[key].relative_path = trial.draw.choice(["../../secret.distcp", "/etc/passwd", "rank-0/../x"])
        (last / ".metadata").write_bytes(pickle.dumps(table))
    elif way == "huge":
        table = checkpoint.read_table(last)
        names = [n for n, e in table.state_dict_metadata.items() if hasattr(e, "size")]
        name = trial.told.setdefault("name", trial.draw.choice(sorted(names)))
        table.state_dict_metadata[name].size = torch.Size([10**7, 10**7])
        (last / ".metadata").write_bytes(pickle.dumps(table))
    else:
        keys = ["ranks", "steps", "recipe", "groups", "scaler", "step", "elapsed", "sums"]
        key = trial.told.setdefault("key", trial.draw.choice(keys[:-1]))
        change = {key: DROPPED if way == "missing" else trial.draw.choice([[], "x", {"a": 1}, -1e308])}
        trial.told["value"] = "dropped" if way == "missing" else repr(change[key])
    reseal(last, change)
    ended = trial.start(("--resume",))
    if mark.exists():
        return Outcome(False, "code has run", "")
    return trial.refused(ended, last.name)


# --- memory ---


def out_of_memory(trial: Trial) -> Outcome:
    """Out of memory at a random operation of a step that measures. The user clears the gradients and takes the step
    again: after a failure in the passes to the same weights, after one in step() to weights that are close.
    """
    alone = trial.setting.ranks == 1
    where = trial.told.setdefault("where", trial.draw.choice(["passes", "step()"] if alone else ["passes"]))
    nth, number = trial.draw.random(), trial.draw.choice([1, 2, 3, 4, 6, 7])
    trial.told |= {"step": number}
    ended = trial.start(harm=lambda rank: short_of_memory(where, number, nth))
    if where == "passes" or trial.hung or any(one.code for one in ended):
        return trial.equal(ended)
    apart = far(trial.whole, weights(trial.out))
    trial.told["apart"] = float(f"{apart:.1g}")
    return Outcome(apart < 0.5, "close" if apart < 0.5 else "other weights")


def short_of_memory(where: str, number: int, share: float) -> None:
    """Raise once, at an operation of the passes or of step() of a step of the loop, and take the step again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Short(TorchDispatchMode):
        """Counts operations, and raises at one of them."""

        def __init__(self, at: int):
            super().__init__()
            self.at, self.count, self.counts = at, 0, True

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += self.counts
            if self.counts and self.count == self.at:
                raise torch.OutOfMemoryError("out of memory (the campaign)")
            return function(*args, **(kwargs or {}))

    step = faults_loop.Loop.step
    usual = {"passes": 80, "step()": 250}[where]  # operations; where there are fewer, nothing is raised

    def short(self: faults_loop.Loop, k: int) -> None:
        if k != number:
            step(self, k)
            return
        mode, take = Short(1 + int(share * usual)), self.optimizer.step

        def limited(*args: Any) -> Any:
            mode.counts = where == "step()"
            return take(*args)

        self.optimizer.step, mode.counts = limited, where == "passes"
        try:
            with mode:
                step(self, k)
        except torch.OutOfMemoryError:
            self.optimizer.step = take
            self.optimizer.zero_grad()
            step(self, k)
        self.optimizer.step = take

    faults_loop.Loop.step = short  # type: ignore[method-assign]


@dataclass(frozen=True)
class Kind:
    """What is done, to whom, and how often a fault is drawn of this kind."""

    do: Callable[[Trial], Outcome]
    hows: tuple[str, ...]
    ranks: tuple[int, ...] = (1, 2, 4)
    weight: int = 4


EVERYONE = ("plain", "ddp", "sharded")
KINDS: dict[str, Kind] = {
    "kill one rank": Kind(kill_one, EVERYONE, weight=10),
    "kill all ranks": Kind(kill_all, EVERYONE, weight=6),
    "kill the launcher": Kind(kill_launcher, ("plain",), weight=3),
    "kill a rank under the launcher": Kind(kill_under_launcher, ("plain",), (2, 4), weight=3),
    "kill twice in a row": Kind(kill_twice, EVERYONE, weight=6),
    "kill in mid-checkpoint": Kind(kill_in_checkpoint, EVERYONE, weight=10),
    "terminate one rank": Kind(terminate_one, ("plain",), weight=3),
    "stop for 3 s": Kind(stop_shortly, EVERYONE, weight=5),
    "stop for good": Kind(stop_for_good, EVERYONE, (2, 4), weight=6),
    "clock jumps": Kind(jump_clock, EVERYONE, weight=5),
    "disk full": Kind(disk_full, ("plain",), weight=5),
    "file size limit": Kind(file_limit, ("plain",), weight=4),
    "read-only folder": Kind(read_only, ("plain",), weight=2),
    "read-only in mid-run": Kind(read_only_later, ("plain",), weight=3),
    "slow disk": Kind(slow_disk, ("plain",), weight=3),
    "hanging disk": Kind(hanging_disk, ("plain",), weight=4),
    "flipped bit": Kind(flipped_bit, ("plain",), weight=5),
    "file cut": Kind(cut_file, ("plain",), weight=4),
    "file missing": Kind(missing_file, ("plain",), weight=4),
    "another model or recipe": Kind(other_model, ("plain",), weight=4),
    "another world": Kind(other_world, EVERYONE, weight=6),
    "another version": Kind(other_version, ("plain",), weight=2),
    "hostile checkpoint": Kind(hostile, ("plain",), weight=8),
    "out of memory": Kind(out_of_memory, ("loop",), weight=7),
}
assert TIMEOUT < PATIENCE / 2
