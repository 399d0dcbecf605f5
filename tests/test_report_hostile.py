"""A stranger's folder: its page alone is written, and holds no script; nothing waits, blows up or is executed."""

import base64
import copy
import json
import os
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from natgrad_lab.__main__ import main
from natgrad_lab.report import critical, drawing, files, runs, write
from natgrad_lab.report.compare_page import page as compare_page
from natgrad_lab.report.compare_read import comparison_of, read_comparison
from natgrad_lab.report.compare_table import findings, rows, verdicts
from natgrad_lab.report.markup import Markup, join, tag, text
from natgrad_lab.report.plan import page as plan_page
from natgrad_lab.report.run_page import page as run_page
from natgrad_lab.report.run_plots import KINDS, ROWS, intervals, stages
from natgrad_lab.report.runs import read_run, read_runs
from test_report_compare import results
from test_report_runs import lines, write_run

EVIL = '</td></p></style></svg>--><script>alert(1)</script><img src=x onerror=alert(2)>"\' onload="alert(3)\n$\\frac{'
ELEMENTS = re.compile(
    "html|head|meta|title|style|body|main|header|h[1-4]|p|ul|li|b|br|div|table|thead|tbody|tr|th|td|figure|figcaption|"
    "img|details|summary|pre|svg|path|circle|rect"
)
JUNK = (EVIL, None, -1, 1e300, 10**400, [], {}, True, [EVIL], {EVIL: EVIL}, 0.5)


class Elements(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def check_harmless(page):
    """Only elements that we write, no handler, no address; and the same within pictures."""
    found = Elements(page)
    assert not [tag for tag in found.tags if not ELEMENTS.fullmatch(tag)]
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    addresses = [value for name, value in found.attributes if name in ("src", "href", "action", "srcdoc", "data")]
    assert all(value.startswith("data:image/svg+xml;base64,") for value in addresses)
    for address in addresses:
        svg = ElementTree.fromstring(base64.b64decode(address.split(",", 1)[1]))
        names = {element.tag.split("}")[-1] for element in svg.iter()}
        assert not names & {"script", "foreignObject", "a", "iframe", "text", "animate", "set"}
    assert "Content-Security-Policy" in page
    page.encode()


def tree(folder):
    """Every file below a folder with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_evil(folder, count=5):
    """A run in which every text is an attack, and every number sometimes one."""
    write_run(folder, name=EVIL, count=0, steps=0)
    recipe = {"kind": EVIL, "optimizer": {EVIL: EVIL, "lr": EVIL}, "batch": EVIL, "seed": EVIL}
    machine = {"command": EVIL, EVIL: EVIL, "ranks": [EVIL], "versions": {EVIL: EVIL}, "commit": {EVIL: [EVIL]}}
    start = {"step": EVIL, "host": EVIL, "pid": EVIL, "machine": machine, "changed": {EVIL: EVIL, "steps": EVIL}}
    starts = [start, {**start, "step": 3, "pid": -1}, EVIL, {"machine": EVIL, "changed": EVIL}]
    about = {"name": EVIL, "recipe": recipe, "steps": EVIL, "machine": machine, "starts": starts}
    (folder / "recipe.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text(json.dumps({"status": f'finished" {EVIL}', "resume": EVIL}))
    good = [{**line, "stages": {EVIL: 0.5}, "intervals": {EVIL: 3, "b.A": 1}} for line in lines(count, True)]
    events = [{"kind": EVIL, "step": 2, EVIL: EVIL}, {"kind": "warning", "step": 2, "text": EVIL}]
    events.append({"kind": "warning", "step": 3, "text": [EVIL, {EVIL: EVIL}]})
    told = "".join(json.dumps(line) + "\n" for line in [*good, *events])
    (folder / "metrics.jsonl").write_text(told)
    return folder


def test_text_becomes_html_in_one_place_which_escapes_it():
    assert tag("td", "<b>", class_='a"b') == '<td class="a&quot;b">&lt;b&gt;</td>'
    assert tag("td", tag("b", "&")) == "<td><b>&amp;</b></td>"
    assert join("<", [Markup("<br>"), ">"]) == "&lt;<br>&gt;"
    assert tag("p", "a\x00\x1b[31m\ud800\u202eb") == "<p>a\ufffd\ufffd[31m\ufffd\ufffdb</p>"
    assert len(text("x" * 10**6)) == 2000


def test_a_hostile_runs_texts_stay_texts(tmp_path):
    page = write([write_evil(tmp_path / "a")]).read_text()
    check_harmless(page)
    assert page.count("&lt;script&gt;alert(1)") > 15
    several = [write_evil(tmp_path / EVIL.replace("/", "")[:40]), write_evil(tmp_path / "b"), tmp_path / "a"]
    check_harmless(write(several, tmp_path / "page.html").read_text())


def test_a_hostile_comparisons_texts_stay_texts(tmp_path):
    some = results()
    some["about"] = EVIL
    plan = some["plan"]
    plan["task"]["name"], plan["settings"], plan["spaces"] = EVIL, {EVIL: EVIL}, {EVIL: {EVIL: EVIL}}
    plan["task"]["recipe"] = {"data": {"kind": EVIL, EVIL: EVIL}, "model": {EVIL: [EVIL]}}
    some["machine"] = dict.fromkeys(some["machine"], EVIL) | {"versions": {EVIL: EVIL}}
    for cell in some["cells"]:
        cell["contender"] += EVIL
        cell["batch"] = f"{cell['batch']}{EVIL}"
        for budget in cell["budgets"]:
            budget["values"][EVIL] = EVIL
            budget["at_edge"] = [EVIL, "lr"]
            for final in budget["finals"]:
                final["made_by"] = {"commit": EVIL}
                final["stages"] = {EVIL: 0.5}
    (tmp_path / "results.json").write_text(json.dumps(some))
    row = {"optimizer": EVIL, "batch": 8, "lr": 0.1, "tuning": 5.0, "fresh": []}
    measured = {"target": 0.3, "rows": [row, {**row, "batch": 16, "tuning": 4.0}]}
    (tmp_path / "critical-<script>.json").write_text(json.dumps(measured))
    page = write([tmp_path]).read_text()
    check_harmless(page)
    assert "Critical batch: critical-&lt;script&gt;" in page
    (tmp_path / "results.json").unlink()
    check_harmless(write([tmp_path]).read_text())


def test_a_hostile_plans_texts_stay_texts():
    stages_ = dict.fromkeys(("forward", "backward", "statistics", "factorisation", "preconditioning"), 0.1)
    stages_ |= dict.fromkeys(("update", "messages", "gather"), 0.1)
    kinds = ("stale", "average", "fresh")
    row = {"ranks": 1, "batch": 8, "step": dict.fromkeys(kinds, 0.8), "run": None, "memory": {"state": [1e6]}}
    row |= {"holds": EVIL, "stages": dict.fromkeys(kinds, stages_), "wire": {"average": 1e6}}
    layer = {"layer": EVIL, "shape": EVIL, "curvature": EVIL, "owner": EVIL}
    layer |= dict.fromkeys(("passes", "statistics", "factorisation", "preconditioning"), 0.1)
    plan = {"name": EVIL, "about": EVIL, "parameters": 3, "machine": {"name": EVIL, "sources": {EVIL: EVIL}}}
    plan |= {"optimizers": [{"name": EVIL, "rows": [row, {**row, "ranks": 2}]}], "layers": {"1": [layer]}}
    alone = {"words": EVIL, "seconds": 0.1, "line": EVIL}
    holds = {"stage": EVIL, "waits for": EVIL, "seconds": 0.1, "more": 0.1}
    plan |= {"advice": {"overhead": 0.1, "why": EVIL, "line": EVIL}}
    plan |= {"remedies": {"ranks": 2, "words": [EVIL], "sgd": 0.1, "holds": [holds], "alone": [alone]}}
    check_harmless(plan_page(plan))


def test_nothing_but_the_page_is_written(tmp_path):
    folder, victim = write_evil(tmp_path / "run", count=0), tmp_path / "victim"
    victim.write_text("mine")
    before = tree(tmp_path)
    page = folder / "report.html"
    page.symlink_to(victim)
    with pytest.raises(ValueError, match=r"report.html' is a symbolic link, .*--out"):
        write([folder])
    page.unlink()
    page.symlink_to(tmp_path / "new")  # a link to what is not there yet
    with pytest.raises(ValueError, match="symbolic link"):
        write([folder])
    page.unlink()
    assert tree(tmp_path) == before
    os.link(victim, page)
    write([folder])
    assert victim.read_text() == "mine"
    assert {name for name, content in tree(tmp_path).items() if before.get(name) != content} == {"run/report.html"}
    page.unlink()
    page.mkdir()
    with pytest.raises(ValueError, match=r"report.html' cannot be written \(it is no file\)"):
        write([folder])
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="it is no file"):
            write([folder], tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl", "results.json", "critical.json"])
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path, name, capsys):
    folder = write_run(tmp_path / "run")
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for _ in range(2):
        assert main(["report", str(folder)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert re.search(rf"{name}' is no file", said)
        path.unlink()
        path.symlink_to("/dev/zero")
    assert not (folder / "report.html").exists()


def test_a_pipe_for_a_summary_is_no_summary(tmp_path):
    folder = write_run(tmp_path / "run")
    os.mkfifo(folder / "summary.json")
    assert read_run(folder).summary is None


BROKEN = {
    "deep lists": "[" * 100_000,
    "lists that are as deep as Python can read": "[" * 900 + "]" * 900,
    "deep dictionaries": '{"a":' * 200 + "1" + "}" * 200,
    "a long number": "9" * 10_000,
    "half": '{"name": "x", "rec',
    "no text": "\xff\xfe",
    "empty": "",
    "null": "null",
    "another kind": '{"name": 3, "recipe": []}',
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", ["recipe.json", "results.json", "critical.json"])
def test_a_broken_file_is_named_in_one_line(tmp_path, name, case, capsys):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(BROKEN[case].encode("latin-1"))
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert name in said
    assert len(said) < 500
    assert not (folder / "report.html").exists()


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    folder = write_run(tmp_path / "run")
    for name, size in (("metrics.jsonl", files.LINES_BYTES + 1), ("recipe.json", files.JSON_BYTES + 1)):
        with (folder / name).open("wb") as file:
            file.truncate(size)  # sparse
        with pytest.raises(ValueError, match=rf"{name}' has [\d,]+ bytes, more than"):
            read_run(folder)


def test_lines_that_are_long_or_lie_deep_are_counted_as_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 4096)
    folder = write_run(tmp_path / "run")
    long = json.dumps({"kind": "step", "step": 13, "loss": 1.0, "x": "y" * 20_000})
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(f"{long}\n{'[' * 3000}\n" + '{"kind": "step", "step": 13, "loss": 1.0}\n' + long)
    log = read_run(folder)
    assert (log.broken, log.done) == (3, 13)


def test_of_a_long_file_some_steps_are_kept_and_the_last_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", count=2000, steps=2000)
    size = (folder / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(runs, "KEPT_BYTES", size // 8)
    log = read_run(folder)
    assert log.stride == 9
    assert 2000 / 9 / 2 < len(log.steps) < 2000 / 9 * 2
    assert (log.done, len(log.evaluations)) == (2000, 500)
    assert len({line["step"] % 5 for line in log.steps}) == 5  # no rhythm of its own
    assert "about one of 9 steps is shown" in write([folder]).read_text()


def test_a_file_of_rubbish_is_given_up(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    for name, words in (("MOST_BROKEN", "x\n"), ("MOST_LINES", '{"kind": "event", "step": 1}\n')):
        monkeypatch.setattr(runs, name, 100)
        (folder / "metrics.jsonl").write_text(words * 200)
        with pytest.raises(ValueError, match=r"metrics.jsonl' holds too much that is no step"):
            read_run(folder)
        monkeypatch.undo()
    monkeypatch.setattr(runs, "KEPT_BYTES", 1000)
    (folder / "metrics.jsonl").write_text('{"kind": "event", "step": 1}\n' * 200)
    with pytest.raises(ValueError, match="holds too much"):
        read_run(folder)


def test_values_of_any_kind_in_a_line_are_numbers_or_left_out(tmp_path):
    folder = write_run(tmp_path / "run", count=0)
    good = next(lines(1, True)) | {"factor": 0.5, "change": 0.1, "bound": 0.2, "noise_scale": 3.0, "skipped": 0}
    broken = [{**good, name: junk, "step": 7} for name in good if name not in ("kind", "step") for junk in JUNK]
    broken += [{"kind": "evaluation", "step": 7, name: junk} for name in ("test_accuracy", "elapsed") for junk in JUNK]
    broken += [{**good, "step": junk} for junk in JUNK] + [{**good, "kind": junk} for junk in JUNK]
    broken += [{**good, name: {"a": junk, "b": 1}} for name in ("stages", "traffic", "intervals") for junk in JUNK]
    told = "".join(json.dumps(line) + "\n" for line in [*broken, good, {**good, "step": 2**52}])
    (folder / "metrics.jsonl").write_text(told + '{"kind": "step", "step": 9, "loss": NaN, "lr": -Infinity}\n')
    log = read_run(folder)
    assert log.broken > 10
    check_harmless(write([folder]).read_text())


def test_a_recipe_of_any_kind_is_shown_or_refused_by_name(tmp_path):
    folder = write_run(tmp_path / "run", count=0)
    about = json.loads((folder / "recipe.json").read_text())
    for broken in mutations(about, JUNK[::2]):
        (folder / "recipe.json").write_text(json.dumps(broken))
        try:
            log = read_runs([folder])
        except ValueError as refused:
            assert "recipe.json" in str(refused)  # noqa: PT017
            assert "\n" not in str(refused)  # noqa: PT017
        else:
            check_harmless(run_page(log))


def mutations(value, junk):
    """Copies of a nested value, each with one of its parts replaced, added or missing."""
    for path in paths(value):
        for other in junk:
            changed = copy.deepcopy(value)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = other
            yield changed
        changed = copy.deepcopy(value)
        place = changed
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        yield changed


def paths(value, before=()):
    """Where parts lie; of a list the first."""
    pairs = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*before, key)
        yield from paths(inner, (*before, key))


def test_a_comparison_of_any_kind_is_shown_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "picture", lambda figure, alternative: Markup("<br>"))
    some = results()
    some["cells"] = [some["cells"][0], some["cells"][3]]
    for budget in (budget for cell in some["cells"] for budget in cell["budgets"]):
        budget["finals"] = [{**budget["finals"][0], "points": budget["finals"][0]["points"][-1:]}]
    path = tmp_path / "results.json"
    refused, shown = 0, {}
    for broken in mutations(some, JUNK[::2]):
        path.write_text(json.dumps(broken))
        try:
            made = read_comparison(tmp_path)
        except ValueError as error:
            refused += 1
            assert re.search(r"results\.json' is no", str(error))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            continue
        said = str([findings(made), [[row.cells() for row in rows(made, batch)] for batch in made.batches]])
        assert verdicts(made)
        shown[said] = made
    assert refused > 150
    for made in list(shown.values())[:: len(shown) // 6]:
        check_harmless(compare_page(made))


def test_more_than_a_page_has_room_for_is_refused(tmp_path):
    some = results()
    some["cells"] = [{**some["cells"][0], "batch": n, "samples": n} for n in range(1, 30)]
    with pytest.raises(TypeError, match="29 sizes of batch, where a page has room for 24"):
        comparison_of(some)
    some["cells"] = [{**some["cells"][0], "contender": str(n)} for n in range(100)]
    with pytest.raises(TypeError, match="100 optimizers"):
        comparison_of(some)
    (tmp_path / "results.json").write_text(json.dumps(some))
    with pytest.raises(ValueError, match=r"results.json'.*100 optimizers"):
        write([tmp_path])


def test_very_many_kinds_become_few(tmp_path):
    folder = write_run(tmp_path / "run", count=0)
    told = [{f"k{n}": 1 + n for n in range(place, place + 500)} for place in (0, 400)]
    listed = [{"kind": "step", "step": n, "stages": some, "intervals": some} for n, some in enumerate(told, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    log = read_run(folder)
    keys = [key.label for key in stages([log]).keys]
    assert len(keys) == KINDS
    assert keys[-1] == "others"
    figure = drawing.drawn(intervals(log).plots[0], (5, 5))
    assert len(figure.axes[0].collections[0].get_array()) <= ROWS
    check_harmless(write([folder]).read_text())


WATCHED = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.", "socket.")
SEEN: list | None = None


def _listen(event, arguments):
    if SEEN is not None and (event.startswith(WATCHED) or (event == "open" and _writes(arguments))):
        SEEN.append((event, arguments))


def _writes(arguments):
    path, mode, flags = arguments
    asked = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(asked) and not isinstance(path, int)


def test_nothing_is_executed(tmp_path, monkeypatch):
    """No process, no pickle, no connection; one file is opened for writing, beside the page."""
    global SEEN
    folder = write_evil(tmp_path / "run")
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    (folder / "matplotlibrc").write_text("text.usetex: True\nbackend: module://evil\n")
    monkeypatch.chdir(folder)
    write([folder])  # what is imported and cached at first
    sys.addaudithook(_listen)
    try:
        SEEN = []
        with mpl.rc_context({"text.usetex": True}):
            write([folder])
        seen = SEEN
    finally:
        SEEN = None
    assert [event for event, _ in seen] == ["open"], seen
    assert os.path.dirname(seen[0][1][0]) == str(folder)
    assert not (folder / "hacked").exists()


def test_a_critical_batch_is_where_steps_are_a_fifth_above_linear_scaling():
    points = [(100.0, 100.0), (200.0, 50.0), (400.0, 30.0), (800.0, 28.0)]
    size, seen = critical.critical_batch(points)
    assert seen
    assert size == pytest.approx(400)
    assert critical.critical_batch(points[:2]) == (200.0, False)
    assert critical.critical_batch(points[:1]) is None
    assert [critical.words(one) for one in ((412.0, True), (200.0, False), None)] == ["410", "above 200", "-"]


def test_critical_batches_have_a_page_of_their_own(tmp_path, monkeypatch):
    def row(name, batch, steps, fresh=()):
        return {"optimizer": name, "batch": batch, "lr": 0.1, "tuning": steps, "fresh": list(fresh)}

    told = [row("A", 100, 100.0), row("A", 200, 50.0), row("A", 400, 99.0, [28, 32]), row("B", 100, 7.0, [9.0, None])]
    (tmp_path / "critical.json").write_text(json.dumps({"target": 0.3, "rows": told}))
    [measured] = critical.read_critical(tmp_path)
    assert measured.points == {"A": [(100, 100), (200, 50), (400, 30)], "B": []}
    page = write([tmp_path]).read_text()
    assert "Steps to 30% test accuracy" in page
    assert "<td>A</td><td>400</td>" in page
    assert "<td>B</td><td>-</td>" in page
    monkeypatch.setattr(drawing, "picture", lambda figure, alternative: Markup("<br>"))
    for broken in mutations({"target": 0.3, "rows": told[:1]}, JUNK):
        (tmp_path / "critical.json").write_text(json.dumps(broken))
        try:
            found = critical.read_critical(tmp_path)
        except ValueError as refused:
            assert "critical.json" in str(refused)  # noqa: PT017
        else:
            check_harmless(critical.page(found))
