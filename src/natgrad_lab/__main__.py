"""The command line. Whatever a user gets wrong is answered by one line on stderr and exit code 2."""

import inspect
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

USAGE = """natgrad: second-order training with very large mini-batches

  natgrad train RECIPE [--ranks N] [--field value ...]   train; results go to runs/RECIPE
                [--model package.module:function]        any network; RECIPE may be an import path too
  natgrad train --list                                   the recipes
  natgrad compare TASK [--ranks N] [...]                 optimizers at equal budgets, and a report
  natgrad coverage RECIPE                                which curvature each layer has, and its cost
  natgrad plan RECIPE [--machine h100] [--ranks 1,64]    what it will cost on other machines
  natgrad report RUN... [--out FILE]                     one HTML page from run folders
  natgrad --version

Every command answers to --help; so does every recipe."""
EXAMPLE = "digits_spngd"
"""The recipe whose fields and defaults stand for those of all in a command's help."""
WHICH = f"""RECIPE is a name of `natgrad {{command}} --list`, package.module:recipe, or ./file.py:recipe.
Below are the fields and defaults of {EXAMPLE}; `natgrad {{command}} RECIPE --help` shows those of another recipe."""
TRAIN = f"""Train a network. {WHICH.format(command="train")}

Results go to runs/RECIPE, or to --out. A run that was stopped goes on with --resume. --ranks N starts N processes here;
under torchrun each of its processes is a rank. `natgrad report FOLDER` makes a page of the results."""
COVERAGE = f"""Show which curvature each layer has, why, and what it costs. {WHICH.format(command="coverage")}"""
COMPARE = """Tune optimizers with equal budgets, train each on fresh seeds, and write a page. TASK is a name below,
package.module:task or ./file.py:task.
"""

LOST = 75
"""Exit code of a rank that has lost others: a temporary failure (EX_TEMPFAIL), for a scheduler to try again."""

EXTRAS = {
    "tyro": "train",
    "rich": "train",
    "sklearn": "train",
    "datasets": "train",
    "PIL": "train",
    "matplotlib": "report",
    "pytorch_optimizer": "bench",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code. Without arguments it is this process's, which then keeps freed memory."""
    try:
        if arguments is None:
            arguments = sys.argv[1:]
            if arguments and arguments[0] in COMMANDS:
                from natgrad_lab.train.malloc import keep_freed_memory

                keep_freed_memory()
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return refuse(f"{error.name} is not installed; pip install 'natgrad[{extra}]'")
    except ValueError as error:
        if "NATGRAD_DEBUG" in os.environ:
            raise
        return refuse(" ".join(str(error).split()))
    except RuntimeError as error:
        if "NATGRAD_DEBUG" in os.environ or "natgrad.parallel" not in sys.modules:
            raise
        from natgrad.parallel import LostRanksError

        if not isinstance(error, LostRanksError):
            raise
        if error.first:
            print(f"natgrad: {error}", file=sys.stderr)
        return LOST


def dispatch(arguments: list[str]) -> int:
    """Call the command that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"natgrad {version('natgrad')} (torch {version('torch')}, Python {platform.python_version()})")
        return 0
    if arguments[0] not in COMMANDS:
        raise ValueError(f"there is no command {arguments[0]!r}; choose {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]](arguments[1:])


def refuse(text: str) -> int:
    """Say in one line what is wrong, once for all ranks."""
    from natgrad_lab.train.launch import leave_message

    if not leave_message(text) and os.environ.get("RANK", "0") == "0":
        print(f"natgrad: {text}", file=sys.stderr)
    return 2


def train(arguments: list[str]) -> int:
    """Train a recipe, on this process, as a rank of a world, or on ranks started here."""
    if lists(arguments):
        return show_recipes("train")
    from natgrad_lab.recipes import find, title
    from natgrad_lab.train.arguments import Training, parse
    from natgrad_lab.train.launch import spread
    from natgrad_lab.train.run import check, run

    if explains(arguments):
        parse(Training(find(EXAMPLE)()), "natgrad train RECIPE", TRAIN, ["--help"])
    name, *rest = arguments
    maker = find(name)
    values = parse(Training(maker()), f"natgrad train {name}", inspect.getdoc(maker) or "", rest)
    return spread(
        ["train", *arguments],
        values.options.ranks,
        check=lambda: check(title(name), values.recipe, values.options),
        work=lambda world: run(title(name), values.recipe, values.options, world),
        restarts=values.options.max_restarts,
        timeout=values.options.timeout,
        check_every=values.options.check,
    )


def compare(arguments: list[str]) -> int:
    """Tune and train every contender of a task at equal budgets."""
    from natgrad_lab.compare.protocol import Protocol, check
    from natgrad_lab.compare.rounds import run
    from natgrad_lab.compare.tasks import find_task, tasks
    from natgrad_lab.train.arguments import parse
    from natgrad_lab.train.launch import spread

    lines = [f"  {task.name:<15} {task.about} ({', '.join(task.profiles)})" for task in tasks().values()]
    if lists(arguments):
        print("\n".join(["natgrad compare TASK [--profile NAME] [--field value ...]; tasks and profiles:\n", *lines]))
        return 0
    if explains(arguments):
        parse(Protocol(), "natgrad compare TASK", "\n".join([COMPARE, *lines]), ["--help"])
    name, *rest = arguments
    task = find_task(name)
    protocol = parse(Protocol(), f"natgrad compare {name}", task.about, rest)
    task = task.located(protocol.data.path).with_model(protocol.model)
    return spread(
        ["compare", *arguments],
        protocol.ranks,
        check=lambda: check(task, protocol),
        work=lambda world: run(task, protocol, world),
    )


def coverage(arguments: list[str]) -> int:
    """Show layer by layer which curvature a recipe's optimizer uses, and what it costs."""
    if lists(arguments):
        return show_recipes("coverage")
    from natgrad_lab.recipes import find
    from natgrad_lab.train.arguments import parse
    from natgrad_lab.train.coverage import show_coverage

    if explains(arguments):
        parse(find(EXAMPLE)(), "natgrad coverage RECIPE", COVERAGE, ["--help"])
    name, *rest = arguments
    show_coverage(name, parse(find(name)(), f"natgrad coverage {name}", "Layers, curvature, cost.", rest))
    return 0


def plan(arguments: list[str]) -> int:
    """Predict time, messages and memory by ranks; or measure this machine for that."""
    from natgrad_lab.train.launch import check_ranks, in_world, launch

    if "--calibrate" in arguments or any(word.startswith("--calibrate=") for word in arguments):
        from natgrad.parallel import World, join, leave
        from natgrad_lab.plan.command import calibrate, calibration

        path, ranks = calibration(arguments)
        if in_world():
            check_ranks(ranks)
            calibrate(path, join())
            leave()
            return 0
        calibrate(path, World())
        return launch(ranks, ["plan", "--calibrate", str(path)]) if ranks > 1 else 0
    if lists(arguments):
        return show_recipes("plan")
    from natgrad_lab.plan.command import run, show_usage

    if explains(arguments):
        show_usage(EXAMPLE, WHICH.format(command="plan"))
    run(arguments)
    return 0


def report(arguments: list[str]) -> int:
    """Write one HTML page from the folders of runs or of a comparison."""
    from natgrad_lab.report import write
    from natgrad_lab.train.arguments import Reporting, parse

    values = parse(Reporting(), "natgrad report", "One HTML page from run folders.", arguments)
    if not values.runs:
        raise ValueError("no run is named; natgrad report RUN..., where RUN is a folder such as runs/demo")
    print(write([Path(run) for run in values.runs], Path(values.out) if values.out else None))
    return 0


def lists(arguments: list[str]) -> bool:
    """Say whether a command's names are asked for. A name that is missing is a mistake."""
    if not arguments:
        raise ValueError("a name is missing; --list shows the names, --help the usage")
    return arguments[0] == "--list"


def explains(arguments: list[str]) -> bool:
    """Say whether a command's usage is asked for."""
    return arguments[0] in ("-h", "--help")


def show_recipes(command: str) -> int:
    """List all recipes with the first line of their descriptions, those of one file together."""
    from natgrad_lab.recipes import every

    known = every()
    wide = max(len(name) for name in known)
    lines = [f"natgrad {command} RECIPE [--field value ...]; RECIPE may also be ./file.py:recipe"]
    for module in dict.fromkeys(maker.__module__ for maker in known.values()):
        lines += ["", (inspect.getdoc(sys.modules[module]) or module).splitlines()[0]]
        own = sorted((name for name, maker in known.items() if maker.__module__ == module), key=by_size)
        lines += [f"  {name:<{wide}}  {(inspect.getdoc(known[name]) or '').splitlines()[0]}" for name in own]
    print("\n".join(lines))
    return 0


def by_size(name: str) -> str:
    """Return what a name is sorted by, so that batches of 512, 1k and 16k follow each other."""
    return re.sub(r"(\d+)(k?)", lambda found: f"{int(found[1]) * (1024 if found[2] else 1):09d}", name)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "compare": compare,
    "coverage": coverage,
    "plan": plan,
    "report": report,
}


def leave(code: int) -> NoReturn:
    """End the process. A rank ends without Python's clean-up: gloo's threads may be in its way, which aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
