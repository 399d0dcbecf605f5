"""Recurrent layers step by step: what torch runs in one function, as products of which each is seen.

    LSTM  i, f, g, o = W_i x + b_i + W_h h + b_h;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
    GRU   r, z = sigmoid(W_i x + b_i + W_h h + b_h);  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h = n + z (h - n)
    RNN   h = tanh(W_i x + b_i + W_h h + b_h), or the rectifier

The results are those of torch's functions to rounding. A forward pass that is measured is run in this form, so that the
inputs and outputs of all steps are calls of the layers' weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]  # h, and c of an LSTM
Cell = Callable[[Tensor, State, "Weights"], State]
"""From W_i x + b_i [n, gates], the state before and the weights: the state after."""


class Weights(NamedTuple):
    """Of one layer in one direction; `reduce` maps h to a smaller one."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    reduce: Tensor | None = None


def lstm_cell(x: Tensor, state: State, own: Weights) -> State:
    """Gives h, which a matrix may make smaller, and c."""
    h, c = state
    i, f, g, o = (x + F.linear(h, own.states, own.state_bias)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if own.reduce is None else F.linear(h, own.reduce)), c


def gru_cell(x: Tensor, state: State, own: Weights) -> State:
    """Gives h."""
    (h,) = state
    (r, z, n), (of_r, of_z, of_n) = x.chunk(3, 1), F.linear(h, own.states, own.state_bias).chunk(3, 1)
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return (n + (z + of_z).sigmoid() * (h - n),)


def tanh_cell(x: Tensor, state: State, own: Weights) -> State:
    """Gives h of a plain cell."""
    return ((x + F.linear(state[0], own.states, own.state_bias)).tanh(),)


def relu_cell(x: Tensor, state: State, own: Weights) -> State:
    """Gives h of a plain cell with the rectifier."""
    return ((x + F.linear(state[0], own.states, own.state_bias)).relu(),)


CELLS: dict[str, Cell] = {"lstm": lstm_cell, "gru": gru_cell, "rnn_tanh": tanh_cell, "rnn_relu": relu_cell}
SEQUENCES = {getattr(torch, name): cell for name, cell in CELLS.items() if hasattr(torch, name)}
STEPS = {getattr(torch, f"{name}_cell"): cell for name, cell in CELLS.items() if hasattr(torch, f"{name}_cell")}


def weights_of(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """The weights that a recurrent function was given; none of other functions, or where they were given by name."""
    if kwargs or (func not in SEQUENCES and func not in STEPS):
        return []
    given = args[2:] if func in STEPS else args[3] if packed(args) else args[2]
    return [weight for weight in given if isinstance(weight, Tensor)]


def packed(args: Sequence[Any]) -> bool:
    """Whether a function over sequences was given packed ones: its weights are the fourth argument, else the third."""
    return isinstance(args[3], (list, tuple))


def written_out(func: Any, args: Sequence[Any]) -> Any:
    """What the function gives, computed step by step."""
    if func in STEPS:
        x, before, *own = args
        weights = Weights(*own)
        state = before if isinstance(before, (tuple, list)) else (before,)
        after = STEPS[func](F.linear(x, weights.inputs, weights.input_bias), tuple(state), weights)
        return after if func is torch.lstm_cell else after[0]
    sizes, batch_first = None, False
    if packed(args):  # rows of all steps behind one another, and how many samples each step has
        x, sizes, before, flat, biased, layers, dropout, training, both = args
    else:
        x, before, flat, biased, layers, dropout, training, both, batch_first = args
    before = tuple(before) if isinstance(before, (tuple, list)) else (before,)
    own = grouped(flat, biased, layers * (1 + both))
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(1 + both):
            place = layer * (1 + both) + direction
            state = tuple(part[place] for part in before)
            if sizes is None:
                found, end = through(SEQUENCES[func], x, batch_first, state, own[place], direction)
            else:
                found, end = through_packed(SEQUENCES[func], x, sizes, state, own[place], direction)
            outputs.append(found)
            ends.append(end)
        x = torch.cat(outputs, -1) if both else outputs[0]
        if dropout and training and layer + 1 < layers:
            x = F.dropout(x, dropout, True)
    return (x, *(torch.stack(parts) for parts in zip(*ends)))


def grouped(flat: Sequence[Tensor], biased: bool, count: int) -> list[Weights]:
    """The weights of each of `count` layers and directions: for inputs, for states, their biases, and `reduce`."""
    each, plain = len(flat) // count, 4 if biased else 2
    parts = [list(flat[k * each : (k + 1) * each]) for k in range(count)]
    return [Weights(*p[:2], *(p[2:4] if biased else (None, None)), *p[plain:]) for p in parts]


def through(
    cell: Cell, x: Tensor, batch_first: bool, state: State, own: Weights, backwards: int
) -> tuple[Tensor, State]:
    """All steps of a sequence [steps, n, inputs], or [n, steps, inputs] where the batch is first."""
    time = 1 if batch_first else 0
    mapped = F.linear(x, own.inputs, own.input_bias).unbind(time)
    outputs: list[Tensor] = []
    for step in reversed(mapped) if backwards else mapped:
        state = cell(step, state, own)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, time), state


def through_packed(
    cell: Cell, x: Tensor, sizes: Tensor, state: State, own: Weights, backwards: int
) -> tuple[Tensor, State]:
    """All steps of sequences behind one another, the longest first: a step has the first samples of the one before."""
    mapped = [F.linear(part, own.inputs, own.input_bias) for part in x.split(sizes.tolist())]
    first, outputs, ended = state, list[Tensor](), list[State]()
    if backwards:
        state = tuple(part[:0] for part in first)
    for step in reversed(mapped) if backwards else mapped:
        n, had = len(step), len(state[0])
        if n < had:
            ended.append(tuple(part[n:] for part in state))
            state = tuple(part[:n] for part in state)
        elif n > had:  # from behind, shorter sequences begin later
            state = tuple(torch.cat([part, more[had:n]]) for part, more in zip(state, first))
        state = cell(step, state, own)
        outputs.append(state[0])
    ends = tuple(torch.cat(parts) for parts in zip(*reversed([*ended, state])))
    return torch.cat(outputs[::-1] if backwards else outputs), ends
