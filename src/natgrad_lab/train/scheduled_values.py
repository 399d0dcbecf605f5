"""An optimizer's numbers as schedules have them at some point of the run."""

from torch.optim import Optimizer

from natgrad_lab.schedules import Constant, Schedule


class Pace:
    """Sets scheduled numbers of every param_group to their value at the start times a multiplier of progress.

    A number that an optimizer does not have is left out where its schedule is constant; Recipe refuses others.
    """

    def __init__(self, optimizer: Optimizer, **schedules: Schedule) -> None:
        self.optimizer = optimizer
        self.schedules = {name: one for name, one in schedules.items() if not isinstance(one, Constant)}
        self.starts = [{name: group[name] for name in self.schedules} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # torch's name; tied momentum divides by it

    def set(self, progress: float) -> None:
        """Set the numbers for the step that begins at this progress, from 0 to 1."""
        for group, start in zip(self.optimizer.param_groups, self.starts):
            group.update({name: start[name] * schedule(progress) for name, schedule in self.schedules.items()})
