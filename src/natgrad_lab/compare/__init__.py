"""Optimizers at equal budgets, and what a comparison of one's own is written in."""

from natgrad_lab.compare.contenders import CONTENDERS, Contender
from natgrad_lab.compare.space import Choice, LogUniform
from natgrad_lab.compare.tasks import Profile, Task

__all__ = ["CONTENDERS", "Choice", "Contender", "LogUniform", "Profile", "Task"]
