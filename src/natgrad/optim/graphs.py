"""A step's work as a program that is recorded once and launched again: CUDA graphs for `graph=True`.

From clean gradients to new weights a step of the same layers is the same few hundred launches on the same memory. Only
numbers of the host change: the learning rate, what the length remembers. They are inputs, which are written into fixed
tensors before a launch. What else the host decides by is the key of a program; another key is another program. Messages
to other ranks cut a program into pieces and are sent as ever.

The first step with a key runs as it would without graphs, and shows which inputs there are. The second one is recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from natgrad.optim import validation
from natgrad.optim.segments import KNOWN
from natgrad.parallel import World
from natgrad.readings import Hear, Inputs, Readings, Source, on_the_way, to_device

PROGRAMS = KNOWN  # that are kept: a network of which now this and now that part is used has some
PATIENCE = 20  # steps in a row of which none could be launched


class Recorder(Protocol):
    """Records launches."""

    def record(self) -> AbstractContextManager[Callable[[], None]]:
        """Inside, launches are recorded and not made; what it gives makes them, from the end of the block on."""
        ...


class CudaRecorder:
    """CUDA graphs. Other threads may use the device meanwhile."""

    def __init__(self) -> None:
        self.pool: Any = None  # of the memory that all pieces share

    def record(self) -> AbstractContextManager[Callable[[], None]]:
        return _CudaPiece(self)


class _CudaPiece(AbstractContextManager):
    """One CUDA graph, in the memory of those that were recorded before."""

    def __init__(self, recorder: CudaRecorder):
        self.recorder, self.graph = recorder, torch.cuda.CUDAGraph()
        self.inside = torch.cuda.graph(self.graph, pool=recorder.pool, capture_error_mode="thread_local")

    def __enter__(self) -> Callable[[], None]:
        self.inside.__enter__()
        return self.graph.replay

    def __exit__(self, *error: object) -> None:
        self.inside.__exit__(*error)
        self.recorder.pool = self.graph.pool()


@dataclass
class Program:
    """A step that can be launched."""

    sources: list[tuple[Source, torch.device]]
    fixed: list[Tensor] = field(default_factory=list)
    pieces: list[Callable[[], None]] = field(default_factory=list)
    asked: list[tuple[Tensor, Hear]] = field(default_factory=list)

    def launch(self, readings: Readings) -> None:
        """Write the inputs, make all launches and send all messages; ask for what the step tells."""
        for (source, device), tensor in zip(self.sources, self.fixed):
            tensor.copy_(on_the_way(source(), device), non_blocking=True)
        for piece in self.pieces:
            piece()
        for numbers, hear in self.asked:
            readings.ask(numbers, hear)


class Graphs:
    """The programs of an optimizer."""

    def __init__(self, recorder: Recorder, readings: Readings, world: World):
        self.recorder, self.readings, self.world = recorder, readings, world
        self.programs: OrderedDict[Hashable, Program] = OrderedDict()
        self.launched = self.recorded = 0  # steps
        self.missed = 0  # steps since the last one that was launched

    def run(self, key: Hashable, work: Callable[[], None], inputs: Inputs) -> None:
        """Do the work: by the program of this key, if there is one."""
        program = self.programs.get(key)
        if program is None:
            self._miss()
            inputs.begin()
            work()
            self.programs[key] = Program(list(inputs.seen))
            while len(self.programs) > PROGRAMS:
                self.programs.popitem(last=False)
            return None
        self.programs.move_to_end(key)
        if program.pieces:
            self.launched, self.missed = self.launched + 1, 0
            return program.launch(self.readings)
        self._record(program, work, inputs)
        self.recorded += 1
        return None

    def _miss(self) -> None:
        self.missed += 1
        if self.missed == PATIENCE:
            validation.warn(
                f"graph=True: none of the last {PATIENCE} steps could be launched as a graph, because what is constant "
                "in one changes from step to step (momentum, weight_decay or damping of a param_group by a schedule, "
                "or which layers are used); leave graph out"
            )

    def _record(self, program: Program, work: Callable[[], None], inputs: Inputs) -> None:
        """Record the work piece by piece. Each piece is launched once it is recorded: later ones need its results."""
        program.fixed = [to_device(source(), device).clone() for source, device in program.sources]
        inputs.begin(program.fixed)
        before = self.readings.taken()
        pieces = list[Callable[[], None]]()
        with ExitStack() as recording:

            def message(send: Callable[[], None]) -> None:
                recording.close()
                pieces[-1]()
                send()
                pieces.extend([send, recording.enter_context(self.recorder.record())])

            pieces.append(recording.enter_context(self.recorder.record()))
            self.world.sends = message
            try:
                work()
            finally:
                self.world.sends = None
                inputs.begin()
        pieces[-1]()
        program.pieces = pieces
        program.asked = self.readings.taken()
        for numbers, hear in (*before, *program.asked):
            self.readings.ask(numbers, hear)

    def forget(self) -> None:
        """What programs work on is no longer there."""
        self.programs.clear()
