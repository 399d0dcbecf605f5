"""What every page promises its reader: dark pictures, no axes without data, tables that scroll, marks explained."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from natgrad_lab.report import compare_curves, compare_plots, plan, run_plots, style, write
from natgrad_lab.report.compare_page import page as compare_page
from natgrad_lab.report.compare_read import comparison_of
from natgrad_lab.report.drawing import MARKS, Picture, Plot, drawn, framed
from natgrad_lab.report.run_page import page as run_page
from natgrad_lab.report.runs import read_runs
from test_report_compare import results
from test_report_runs import lines, titles, write_run

LINES = {
    *style.COLOURS,
    *style.STAGES.values(),
    *plan.STAGES.values(),
    *(colour for colours in compare_plots.COLOURS.values() for colour in colours),
}
CARD = {"light": "#FFFFFF", "dark": style.DARK["#FFFFFF"]}


def luminance(colour):
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", sorted(LINES))
def test_a_line_stands_out_on_a_dark_page(colour):
    assert contrast(style.DARK.get(colour, colour), CARD["dark"]) >= 3


@pytest.mark.parametrize("colour", [style.INK, "#555555"])
def test_words_in_pictures_are_readable_on_both_pages(colour):
    assert contrast(colour, CARD["light"]) >= 4.5
    assert contrast(style.DARK[colour], CARD["dark"]) >= 4.5


def drawings(page):
    """The pictures of a page as text."""
    return [base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]+)", page)]


def test_pictures_and_page_turn_dark_together(tmp_path):
    page = write([write_run(tmp_path / "run")]).read_text()
    assert "@media (prefers-color-scheme: dark)" in page
    for drawing in drawings(page):
        ink = style.INK.lower()
        assert f"--x{ink[1:]}:{style.INK};" in drawing
        assert "@media(prefers-color-scheme:dark){:root{" in drawing
        left = {colour.upper() for colour in re.findall(r": (#[0-9a-fA-F]{6})\b", drawing)}
        assert not left & set(style.DARK)  # whatever has two values is drawn as a variable
        used = set(re.findall(r"var\((--x[0-9a-f]{6})\)", drawing))
        assert used <= set(re.findall(r"(--x[0-9a-f]{6}):", drawing))


class Boxes(HTMLParser):
    """Finds the elements that every table lies in."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tables = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([classes for _, classes in self.open])
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()


def test_tables_scroll_in_boxes_of_their_own(tmp_path):
    pages = [run_page(read_runs([write_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2))]))]
    pages.append(compare_page(comparison_of(results())))
    for page in pages:
        boxes = Boxes(page)
        assert boxes.open == []
        assert len(boxes.tables) > 3
        assert all({"wide", "scroll"} & set(classes) for classes in boxes.tables)
    css = pages[0][: pages[0].index("</style>")]
    for box in ("wide", "scroll"):
        assert re.search(rf"\.{box} {{ overflow-x: auto;", css)


def test_axes_without_data_are_left_out(tmp_path):
    def nothing(axes):
        axes.plot([], [])
        axes.axhline(0.5)

    def unknown(axes):
        axes.plot([1, 2], [float("nan")] * 2)

    for draw in (nothing, unknown):
        assert drawn(Plot("", draw), (3, 2)) is None
        assert framed(Picture([Plot("", draw)]), "heading") == ""
    folder = write_run(tmp_path / "run")
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "evaluation" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    page = write([folder]).read_text()
    assert "Loss by step" in page
    assert "Test accuracy by step" not in page


def test_where_all_have_diverged_nothing_is_drawn():
    some = results()
    for cell in some["cells"]:
        for budget in cell["budgets"]:
            for final in budget["finals"]:
                final |= {"points": [], "losses": [], "diverged": 1, "train_loss": None, "stages": {}}
            budget["tried"] = []
    page = compare_page(comparison_of(some))
    assert len(drawings(page)) == 1  # who never reaches the goal, at every size of batch
    assert "diverged" in page


def test_what_a_step_was_has_its_pictures(tmp_path):
    folder = write_run(tmp_path / "run", count=0)
    more = {"factor": 0.5, "change": 0.01, "bound": 0.02, "ratio": 2.0, "noise_scale": 300.0, "preconditioned": 0.9}
    told = [line | more | {"skipped": int(line["step"] > 5)} for line in lines(9, True) if line["kind"] == "step"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    [log] = read_runs([folder])
    picture = run_plots.numbers([log])
    found = dict(zip(titles(picture), picture.plots))
    for title, values in {
        "Length of the step, %": [[50] * 9],
        "Weights preconditioned, %": [[90] * 9],
        "Change of the outputs": [[0.01] * 9, [0.02] * 9],
        "Curvature, measured over predicted": [[2] * 9],
        "Noise scale of the gradient, samples": [[300] * 9, [10] * 9],
        "Steps skipped so far": [[0] * 5 + [1] * 4],
    }.items():
        assert found[title].note  # says what the number is
        axes = drawn(found[title], (3, 2)).axes[0]
        for line, expected in zip(axes.lines, values, strict=True):
            assert list(line.get_ydata()) == pytest.approx(expected)


def test_everyone_s_best_point_of_tuning_is_seen():
    some = results()
    for one in some["cells"][0]["budgets"]:  # Nesterov's
        for tried in one["tried"]:
            tried["runs"][0]["loss"] = None if tried["values"]["lr"] > 1 else 50.0
    some["cells"][1]["budgets"][0]["tried"] *= 10
    picture = compare_curves.tuning(comparison_of(some), "10")
    axes = drawn(picture.plots[0], (3, 2)).axes[0]
    assert axes.get_ylim()[1] > 50
    assert 50.0 in axes.lines[0].get_ydata()


def test_every_mark_of_a_comparison_is_in_its_legend():
    made = comparison_of(results())
    picture = compare_plots.scaling(made)
    labels = [key.label for key in picture.keys]
    assert labels == ["Nesterov", "SPNGD", "SOAP", "linear scaling", "critical batch", "not reached"]
    assert {key.mark for key in picture.keys} <= {*MARKS, ""}
    drawn_marks = {line.get_marker() for plot in picture.plots for line in drawn(plot, (3, 2)).axes[0].lines}
    assert drawn_marks - {"None", "none"} <= {key.mark for key in picture.keys}


def test_the_critical_batch_of_a_comparison_is_marked_and_told():
    some = results()
    base = some["cells"][0]
    some["cells"] = []
    for samples, reached in ((10, 8), (20, 4), (40, 3)):
        cell = json.loads(json.dumps(base)) | {"batch": samples, "samples": samples}
        for budget in cell["budgets"]:
            for final in budget["finals"]:
                final["points"] = [[reached, 1.0, 0.9, 0.1]]
        some["cells"].append(cell)
    made = comparison_of(some)
    [[(size, seen)]] = compare_plots.critical(made).values()
    assert seen
    assert 20 < size < 40  # 8 and 4 steps are linear scaling, 3 steps are half above it
    page = compare_page(made)
    assert "<th>critical batch, in samples</th>" in page
    bars = [
        line for line in drawn(compare_plots.scaling(made).plots[1], (3, 2)).axes[0].lines if line.get_marker() == "|"
    ]
    assert [list(bar.get_xdata()) for bar in bars] == [[pytest.approx(size)]]
