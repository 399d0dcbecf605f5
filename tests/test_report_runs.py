"""The page of training runs: how they are told to be, what is drawn, and folders that are broken, empty or none."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from natgrad_lab.report import write
from natgrad_lab.report.drawing import sheet
from natgrad_lab.report.run_page import HEADINGS, cells
from natgrad_lab.report.run_plots import POINTS, intervals, numbers, progress, shade, stages, traffic
from natgrad_lab.report.runs import differing, read_run, read_runs

MACHINE = {"command": "natgrad train <&>", "commit": None, "ranks": 2, "device": "x", "versions": {"torch": "2.13.0"}}


def lines(count, second_order, loss=None):
    """Lines of so many steps, an evaluation at every fourth."""
    for n in range(1, count + 1):
        line = {
            "kind": "step",
            "step": n,
            "epoch": n / 4,
            "loss": 1 / n if loss is None else loss(n),
            "lr": 0.1,
            "seconds": 0.5,
            "elapsed": 0.5 * n,
            "images_per_second": 200.0,
            "stages": {"network": 0.4, "own": 0.1},
            "memory": 10**9 + n,
        }
        if second_order:
            line |= {"damping": 1e-3, "refreshed": 0.25, "intervals": {"a.A": min(n, 9), "a.G": 1}}
            line["traffic"] = {"gradients": 2_000_000, "statistics": 1_000_000}
        yield line
        if n % 4 == 0:
            accuracy = 0.9 - 1 / n if n < 12 else 0.7
            yield {
                "kind": "evaluation",
                "step": n,
                "epoch": n / 4,
                "elapsed": n,
                "test_accuracy": accuracy,
                "test_loss": 1.0,
            }


def write_run(folder, name="mine", seed=0, count=12, steps=12, second_order=True, start=None, lr=0.1, loss=None):
    folder.mkdir(parents=True)
    recipe = {"kind": "Recipe", "optimizer": {"kind": "Sgd", "lr": lr}, "batch": 10, "seed": seed}
    starts = [{"step": 0, "host": "h", "pid": 1, "machine": MACHINE, **(start or {})}]
    about = {"name": name, "recipe": recipe, "steps": steps, "machine": MACHINE, "starts": starts}
    (folder / "recipe.json").write_text(json.dumps(about))
    told = "".join(json.dumps(line) + "\n" for line in lines(count, second_order, loss))
    (folder / "metrics.jsonl").write_text(told)
    return folder


def here(pid):
    return {"host": socket.gethostname(), "pid": pid}


@pytest.fixture
def gone():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_is_finished_running_killed_or_not_known_to_be(tmp_path, gone):
    done = write_run(tmp_path / "done")
    (done / "summary.json").write_text('{"status": "interrupted"}')
    assert read_run(done).status() == "interrupted after 12 of 12 steps in 0:06"
    running = read_run(write_run(tmp_path / "running", steps=20, start=here(os.getpid())))
    assert running.kind == "running"
    assert running.status().startswith("running: 12 of 20 steps done, about 0:04 of training left, last line ")
    killed = write_run(tmp_path / "killed", start=here(gone))
    os.utime(killed / "metrics.jsonl", (time.time() - 720,) * 2)
    assert read_run(killed).status() == "killed: 12 of 12 steps done, its process is gone, last line 12 minutes ago"
    away = read_run(write_run(tmp_path / "away", start={"host": "far"}))
    assert away.kind == "unknown"
    assert re.match(r"running or killed: 12 .* on another machine \(far\)", away.status())


def test_the_table_has_a_runs_figures(tmp_path):
    told = dict(zip(HEADINGS, cells(read_run(write_run(tmp_path / "run", steps=20)))))
    assert told == {
        "run": "",
        "steps": "12/20",
        "epoch": "3.0",
        "loss": "0.0833",
        "test accuracy, %": "70.00",
        "best (step)": "77.50 (8)",
        "step time": "500 ms",
        "images/s": "200",
        "measured": "25%",
        "sent per step": "3 MB",
        "memory": "1 GB",
        "training time": "0:06",
    }


def test_a_run_that_was_taken_up_tells_of_its_starts_and_its_new_length(tmp_path):
    folder = write_run(tmp_path / "run")
    about = json.loads((folder / "recipe.json").read_text())
    again = {**MACHINE, "command": "natgrad train --resume"}
    about["starts"].append({"step": 8, "host": "h", "pid": 2, "machine": again, "changed": {"steps": 40}})
    (folder / "recipe.json").write_text(json.dumps(about))
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(
            '{"kind": "resumed", "step": 8, "ranks": 2}\n{"kind": "warning", "step": 9, "text": "mind <it>"}\n'
        )
        metrics.write('{"kind": "checkpoint", "step": 10}\n')
    assert read_run(folder).total == 40
    html = write([folder]).read_text()
    for said in (
        "from step 8 on",
        "natgrad train --resume",
        "step 8</th><td>resumed: ranks 2",
        "warning: mind &lt;it&gt;",
    ):
        assert said in html
    assert "last checkpoint: step 10" in html


def test_the_page_of_a_run_needs_no_other_file(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text('{"status": "failed", "resume": "natgrad train mine --resume"}')
    html = write([folder]).read_text()
    assert html.count("data:image/svg+xml;base64,") == 2 + 5 + 3  # progress, numbers; stages, traffic, intervals
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "<script" not in html
    for said in ("natgrad train &lt;&amp;&gt;", "to resume: natgrad train mine --resume", 'class="status failed"'):
        assert said in html


def titles(picture):
    return [plot.title for plot in picture.plots]


def test_several_runs_are_compared_by_step_epoch_and_time(tmp_path):
    logs = read_runs([write_run(tmp_path / "a", lr=0.1), write_run(tmp_path / "b", lr=0.2, count=8)])
    picture = progress(logs)
    figure = sheet(picture)
    assert titles(picture) == [
        f"{what} by {by}" for what in ("Training loss", "Test accuracy") for by in ("step", "epoch", "time")
    ]
    assert [list(line.get_xdata())[-1] for line in figure.axes[0].lines] == [12, 8]
    assert [list(line.get_xdata())[-1] for line in figure.axes[1].lines] == [3.0, 2.0]
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == ["step", "epoch", "seconds of training"]
    assert differing(logs) == ["optimizer.lr"]
    html = write([log.folder for log in logs], tmp_path / "page.html").read_text()
    assert "<th>optimizer.lr</th><td>0.1</td><td>0.2</td>" in html
    assert "mine (a)" in html


def test_runs_that_differ_in_their_seed_share_a_colour(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    logs = read_runs([*folders, write_run(tmp_path / "other", "other")])
    assert [log.label for log in logs] == ["mine, seed 0", "mine, seed 1", "other"]
    assert shade(logs, logs[0]) == shade(logs, logs[1]) != shade(logs, logs[2])
    same = read_runs([folders[0], write_run(tmp_path / "deep" / "0")])
    assert [log.label for log in same] == [f"mine ({tmp_path / '0'})", f"mine ({tmp_path / 'deep' / '0'})"]


def test_runs_of_an_earlier_version_have_the_names_of_today(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("old", "new")]
    for folder, names in zip(folders, (("decay", "samples"), ("ema_decay", "rows_per_dim"))):
        about = json.loads((folder / "recipe.json").read_text())
        about["recipe"]["optimizer"] = {"kind": "KFac", **dict(zip(names, (0.5, 8)))}
        (folder / "recipe.json").write_text(json.dumps(about))
    logs = read_runs(folders)
    assert differing(logs) == []
    assert logs[0].fields["optimizer.ema_decay"] == 0.5


def test_long_runs_become_few_points_and_small_pages(tmp_path):
    log = read_runs([write_run(tmp_path / "long", count=3000)])[0]
    line = sheet(progress([log])).axes[0].lines[0]
    assert len(line.get_xdata()) == POINTS
    assert line.get_ydata()[0] == pytest.approx(sum(1 / n for n in range(1, 11)) / 10)
    assert len(write([log.folder]).read_text()) < 1_500_000


def test_the_share_of_refreshed_statistics_is_a_running_mean(tmp_path):
    folder = write_run(tmp_path / "run", count=40)
    shares = [{"kind": "step", "step": n, "refreshed": float(n % 5 == 1)} for n in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shares))
    drawn = sheet(numbers(read_runs([folder]))).axes[0].lines[0].get_ydata()
    assert drawn[0] == pytest.approx(100)
    assert drawn[1] == pytest.approx(50)
    assert list(drawn[9:]) == pytest.approx([20] * 31)


def test_what_a_plain_optimizer_does_not_tell_is_not_drawn(tmp_path):
    log = read_runs([write_run(tmp_path / "run", second_order=False)])[0]
    assert traffic([log]) is None
    assert intervals(log) is None
    assert titles(numbers([log])) == ["Learning rate", "Memory of rank 0, GB", "Images a second"]
    assert [key.label for key in stages([log]).keys] == ["network", "own"]


def test_lines_that_are_broken_are_counted_and_left_out(tmp_path):
    folder = write_run(tmp_path / "run", loss=lambda n: None if n in (3, 4) else 1.0)
    good = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_bytes(
        good.encode() + b'{"kind": "step", "st\n[1]\n{"step": 1}\n\xff\xfe\n{"kind": "step"'
    )
    log = read_run(folder)
    assert (len(log.steps), len(log.evaluations), log.broken) == (12, 3, 5)
    html = write([folder]).read_text()
    assert "5 unreadable lines" in html
    assert "the loss was no number in 2 steps" in html


def test_lines_of_which_parts_are_missing_are_drawn_as_far_as_they_go(tmp_path):
    folder = write_run(tmp_path / "run")
    bare = [{"kind": "step", "step": 1}, {"kind": "step", "step": 2, "loss": None}, {"kind": "evaluation", "step": 2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert "2/12" in write([folder]).read_text()


@pytest.mark.parametrize("metrics", [None, "", '{"kind'])
def test_a_run_without_a_step_is_shown_as_one(tmp_path, metrics):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    assert "no step done" in write([folder]).read_text()
    assert "0/12" in write([folder, write_run(tmp_path / "other")], tmp_path / "page.html").read_text()


def test_folders_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "results.json").write_text("{}")
    run = write_run(tmp_path / "run")
    for content, name in (('{"na', "half"), ("[]", "list"), ('{"name": "x", "recipe": 3}', "foreign")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(content)
    for folders, says in (
        (["absent"], "absent"),
        (["run", "empty"], "empty.*recipe.json"),
        (["half"], "half.*recipe.json' is no JSON"),
        (["list"], "list.*no readable recipe.json"),
        (["foreign"], "foreign.*no readable recipe.json"),
        (["compared", "run"], "name it alone"),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            write([tmp_path / name for name in folders])
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"cannot be written .*--out"):
        write([run], tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        write([run], tmp_path / "no" / "page.html")
