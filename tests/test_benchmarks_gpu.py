"""The command for a GPU, on the CPU: all of it in tiny sizes, and what it does where something fails."""

import gzip
import json
import sys
import time
from pathlib import Path

import pytest
import torch

import natgrad

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
import gpu_contenders
import gpu_learn
import gpu_steps
import gpu_trace
import tables
from gpu_contenders import SGD, SMALL_GPT, SMALL_RESNET, Contender
from gpu_results import Results

from simulated import DEVICE, simulated_gpu

pytestmark = pytest.mark.timeout(900)  # a dry run takes half a minute of one quiet core, and minutes of a busy one
CPU = torch.device("cpu")
NAMES = ["small", "steps: ResNet-18, narrow, 8", "trace", "tests", "steps: transformer, narrow, 4", "training"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The file of a whole dry run, and its exit code. It has more than its time, as the tests' machine may be busy."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return path, gpu.main(["--dry", "--minutes", "40", "--out", str(path)])


def case_of(path, name):
    return next(case for case in json.loads(path.read_text())["cases"] if case["case"] == name)


@pytest.mark.slow
def test_a_dry_run_does_all_and_finds_nothing_wrong(dry):
    path, code = dry
    told = json.loads(path.read_text())
    assert code == 0
    assert [case["case"] for case in told["cases"]] == NAMES
    assert all(case["finished"] and case["checks"] for case in told["cases"])
    assert all(one["passed"] for case in told["cases"] for one in case["checks"])
    assert told["command"] == "python benchmarks/gpu.py --dry"
    assert {"machine", "python", "torch", "natgrad", "commit", "seed"} <= told.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("steps")])
def test_every_contender_is_measured_or_says_why_not(dry, name):
    rows = {row["name"]: row for row in case_of(dry[0], name)["rows"]}
    assert list(rows) == [contender.name for contender in gpu_contenders.contenders(CPU)]
    for contender in gpu_contenders.contenders(CPU):
        row = rows[contender.name]
        assert ("absent" in row) or row["ratio"] > 0
        assert not contender.absent or row["absent"] == contender.absent
        assert contender.absent or contender.optional or row["loss_last"] < row["loss_first"]
    assert rows["AdamW(fused)"]["state_bytes"] == pytest.approx(2 * rows["SGD(fused)"]["state_bytes"], rel=0.05)


@pytest.mark.slow
def test_traces_are_files_that_can_be_read_again(dry):
    rows = case_of(dry[0], "trace")["rows"]
    assert [row["name"] for row in rows] == ["SGD(fused)", "SPNGD, plain", "NLCG, plain", "SPNGD, all stale"]
    for row in rows:
        with gzip.open(dry[0].with_name(row["file"]), "rt") as packed:
            told = gpu_trace.analyse(json.load(packed)["traceEvents"])
        assert told == {name: row[name] for name in (gpu_trace.WHOLE, gpu_trace.INSIDE)}
        assert 0 < told[gpu_trace.INSIDE]["operations"] < told[gpu_trace.WHOLE]["operations"]


@pytest.mark.slow
def test_a_second_start_repeats_nothing(dry, monkeypatch):
    for name in ("figures", "trace", "learn", "small_problem", "reported"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    before = json.loads(dry[0].read_text())
    assert gpu.main(["--dry", "--minutes", "40", "--out", str(dry[0])]) == 0
    assert json.loads(dry[0].read_text()) == before


@pytest.mark.slow
def test_results_become_tables(dry, tmp_path):
    (tmp_path / "gpu.json").write_text(dry[0].read_text())
    page = tables.filled("<!-- table gpu -->\n<!-- end -->\n", tmp_path)
    for words in (
        "checks passed.",
        "| SPNGD, all stale | ",
        "Traces, ResNet-18",
        "Marked tests: 3 passed, 0 failed",
        "| patterns |",
    ):
        assert words in page
    assert "Without SPNGD, plain, CUDA graph" in page
    assert "failed**" not in page


def test_without_results_the_page_says_so(tmp_path):
    page = tables.filled("<!-- table gpu -->\n<!-- end -->\n", tmp_path)
    assert "Not run yet on a GPU: `python benchmarks/gpu.py`" in page


def run_of(tmp_path, seconds=600.0, device=CPU):
    results = Results(tmp_path / "gpu.json", CPU, 0, True)
    return gpu.Run(results, device, time.monotonic() + seconds, gpu_steps.Effort(1, 1, warm=False), dry=True)


def listed(*contenders):
    return lambda device: [SGD, *contenders]


def broken(model):
    raise RuntimeError("nothing to be done\nabout it")


def refusing(model):
    raise ValueError("not this variant")


def test_who_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    after = Contender("after", SGD.build)
    monkeypatch.setattr(
        gpu, "contenders", listed(Contender("bad", broken), Contender("odd", refusing, "", True), after)
    )
    run = run_of(tmp_path)
    gpu.carry_out(run, [gpu.of_steps(SMALL_GPT, 2, 80)], 600)
    case = case_of(run.results.path, "steps: transformer, narrow, 2")
    rows = {row["name"]: row for row in case["rows"]}
    assert rows["bad"]["failed"] == "RuntimeError: nothing to be done"
    assert rows["odd"]["absent"] == "refused: ValueError: not this variant"
    assert rows["after"]["ms"] > 0
    assert case["finished"]
    assert run.results.failed() == ["steps: transformer, narrow, 2: bad runs"]
    assert "CHECK FAILED: bad runs" in capsys.readouterr().out
    assert "- **failed**: steps: transformer, narrow, 2: bad runs" in tables.gpu_results.table(run.results.content)
    monkeypatch.setattr(gpu, "contenders", listed(Contender("bad", SGD.build), after))
    again = run_of(tmp_path)
    gpu.carry_out(again, [gpu.of_steps(SMALL_GPT, 2, 80)], 600)
    assert again.results.failed()
    again.results.forget_failures()
    gpu.carry_out(again, [gpu.of_steps(SMALL_GPT, 2, 80)], 600)
    assert not again.results.failed()


def test_a_stage_that_fails_keeps_no_other_from_running(tmp_path):
    def bad(run, case, deadline):
        raise KeyError("gone")

    run, ran = run_of(tmp_path), []
    good = gpu.Stage("good", 10, lambda run, case, deadline: ran.append(deadline - time.monotonic()))
    gpu.carry_out(run, [gpu.Stage("bad", 10, bad), good], 480)
    assert run.results.failed() == ["bad: bad runs"]
    assert 9 < ran[0] <= 10
    gpu.carry_out(run, [good], 480)
    assert len(ran) == 1


def test_a_device_that_is_lost_ends_the_process_and_is_not_tried_again(tmp_path, monkeypatch):
    run = run_of(tmp_path, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(gpu.DeviceLostError, match="bad"):
        gpu.carry_out(run, [gpu.Stage("bad", 10, lambda *_: broken(None))], 480)
    assert case_of(run.results.path, "bad")["finished"]


def test_what_there_is_no_time_for_is_left_to_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "contenders", listed())
    run = run_of(tmp_path, seconds=-1)
    stage = gpu.of_steps(SMALL_GPT, 2, 80)
    gpu.carry_out(run, [stage], 600)
    assert run.left == [stage.name]
    case = run.results.case(stage.name, **stage.settings)
    stage.work(run, case, run.end)
    assert run.left[1:] == [f"{stage.name}: SGD(fused)"]
    with pytest.raises(gpu_steps.OutOfTimeError):
        gpu_steps.figures(SMALL_GPT, SGD, 2, CPU, run.effort, 0, run.end, run.end)
    assert not case["finished"]


def test_memory_that_does_not_last_means_a_smaller_batch():
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 2:
            raise (
                torch.OutOfMemoryError("CUDA out of memory")
                if size == 8
                else RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
            )
        return {"ms": 1.0}

    assert gpu_steps.smaller(8, attempt, CPU) == {"ms": 1.0, "batch": 2, "too_large": [8, 4]}
    assert tried == [8, 4, 2]
    with pytest.raises(RuntimeError, match="nothing"):
        gpu_steps.smaller(8, broken, CPU)

    def never(size):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gpu_steps.smaller(2, never, CPU)


def block(ms, losses):
    return gpu_steps.Block(ms, ms / 2, ms / 4, ms / 8, [ms, 3 * ms], losses)


def test_a_row_has_medians_of_rounds_with_their_spread():
    pairs = [(block(10.0, []), block(ms, [loss, loss])) for ms, loss in ((20.0, 3.0), (10.0, 2.0), (15.0, 1.0))]
    row = gpu_steps.summary(pairs, [4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    assert (row["rounds"], row["ms"], row["sgd_ms"]) == (3, 15.0, 10.0)
    assert (row["ratio"], row["ratio_quartiles"]) == (1.5, [1.25, 1.75])
    assert (row["host_ms"], row["inside_ms"], row["inside_host_ms"]) == (7.5, 3.75, 1.875)
    assert row["longest_ms"] == 60.0
    assert (row["loss_first"], row["loss_last"], row["finite"]) == (4.0, 1.0, True)
    assert not gpu_steps.summary(pairs, [4.0, float("nan"), 1.0])["finite"]


def test_a_contender_takes_its_steps_on_one_batch_in_bfloat16():
    runner = gpu_steps.Runner(SMALL_RESNET, SGD, 4, CPU, 0)
    seen = []
    handle = runner.model.register_forward_hook(lambda module, args, output: seen.append((args[0], output.dtype)))
    taken = gpu_steps.block(runner, 3)
    handle.remove()
    assert len({id(x) for x, _ in seen}) == 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in seen)
    assert all(dtype == torch.bfloat16 for _, dtype in seen)
    assert len(taken.losses) == len(taken.each) == 3
    assert taken.inside_ms < taken.ms


class Event:
    """A CUDA event whose time is that of the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.clock = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.clock - self.clock)


@pytest.fixture
def gpu_of_numbers(monkeypatch):
    """A simulated GPU with torch's functions for clocks and memory; gives what was called of these."""
    called = []
    known = {"memory_allocated": 1000, "max_memory_allocated": 5000, "get_sync_debug_mode": 0}
    silent = ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode")
    for name, value in {**known, **dict.fromkeys(silent)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: called.append(name) or value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with simulated_gpu():
        yield called


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("SPNGD, plain", SMALL_RESNET),
        ("SENG, all stale", SMALL_GPT),
        ("NLCG, plain", SMALL_GPT),
        ("Muon", SMALL_RESNET),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_paths_of_a_gpu_are_taken_on_a_simulated_one(gpu_of_numbers, network, name):
    contender = next(one for one in gpu_contenders.contenders(DEVICE) if one.name == name)
    end = time.monotonic() + 600
    row = gpu_steps.figures(network, contender, 2, DEVICE, gpu_steps.Effort(1, 1, warm=False), 0, end, end)
    assert row["finite"]
    assert row["ms"] > row["inside_ms"] > 0
    assert (row["built_bytes"], row["peak_bytes"], row["grown_bytes"]) == (0, 4000, 0)
    expected = {"synchronize", "empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "set_sync_debug_mode"}
    assert expected <= set(gpu_of_numbers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*")
def test_training_runs_on_a_simulated_gpu(gpu_of_numbers):
    rows = list(gpu_learn.learn(gpu_learn.Size(8, 32, 16, 64, 1), "", DEVICE, time.monotonic() + 600))
    assert [row["name"] for row in rows] == ["SPNGD", "SGD, Nesterov"]
    assert all(row["finite"] and row["whole_schedule"] and row["steps"] == 2 for row in rows)


@pytest.mark.parametrize("name", gpu.KINDS)
def test_the_small_problem_finds_a_simulated_gpu_right(gpu_of_numbers, name):
    assert gpu.distance(gpu.small_problem(name, DEVICE), gpu.small_problem(name, CPU)) == 0


def test_a_graph_is_held_against_the_same_steps_without(tmp_path, monkeypatch):
    run, plain = run_of(tmp_path), torch.ones(3)
    case = run.results.case("small")
    answers = {"same": plain, "other": plain + 1e-3}
    monkeypatch.setattr(
        gpu, "small_problem", lambda name, device, graph: answers[name] if graph else pytest.fail("graph")
    )
    assert gpu.of_graph(run, case, "same", plain) == 0
    assert gpu.of_graph(run, case, "other", plain) == pytest.approx(1e-3, rel=0.01)
    assert [one["passed"] for one in case["checks"]] == [True, False]
    monkeypatch.setattr(gpu, "small_problem", lambda *_, **__: refusing(None))
    assert gpu.of_graph(run, case, "odd", plain) == "refused: ValueError: not this variant"
    assert len(case["checks"]) == 2


def test_variants_are_taken_up_as_soon_as_they_exist(monkeypatch):
    class Graphed(natgrad.SPNGD):
        def __init__(self, model, lr, *, graph=False, **options):
            super().__init__(model, lr, **options)

    class Budget(natgrad.Every):
        def __init__(self, share, then):
            super().__init__(then.steps)
            asked.append(share)

    def absent(device):
        return {one.name: one.absent for one in gpu_contenders.contenders(torch.device(device))}

    asked = []
    monkeypatch.setattr(natgrad, "SPNGD", Graphed)
    monkeypatch.setattr(natgrad, "Budget", Budget, raising=False)
    assert absent("cuda")["SPNGD, plain, CUDA graph"] == absent("cuda")["SPNGD, all stale, budgeted"] == ""
    assert absent("cpu")["SPNGD, plain, CUDA graph"] == "a CUDA graph needs a GPU"
    budgeted = next(c for c in gpu_contenders.contenders(CPU) if c.name == "SPNGD, all stale, budgeted")
    optimizer = budgeted.build(SMALL_RESNET.made(CPU, 0))
    assert isinstance(optimizer, Graphed)
    assert asked == [gpu_contenders.SHARE]
    assert optimizer.staleness.steps == 1


def test_without_an_argument_a_variant_is_absent(monkeypatch):
    class Bare:
        def __init__(self, model, lr):
            pass

    monkeypatch.setattr(natgrad, "KFAC", Bare)
    monkeypatch.delattr(natgrad, "Budget", raising=False)
    told = {one.name: one.absent for one in gpu_contenders.contenders(torch.device("cuda"))}
    assert told["KFAC, plain, CUDA graph"] == "KFAC of this natgrad takes no graph="
    assert told["KFAC, all stale, budgeted"] == "this natgrad has no Budget"
    assert told["KFAC, plain"] == ""


def event(cat, name, ts, dur, correlation=None):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


EVENTS = [
    event("user_annotation", gpu_trace.WHOLE, 0, 1000),
    event("user_annotation", gpu_trace.INSIDE, 500, 400),
    event("cpu_op", "aten::mm", 10, 20),
    event("cpu_op", "aten::add_", 510, 20),
    event("cuda_runtime", "cudaLaunchKernel", 15, 5, 1),
    event("cuda_driver", "cuLaunchKernelEx", 515, 5, 2),
    event("cuda_runtime", "cudaMemcpyAsync", 600, 5, 3),
    event("cuda_runtime", "cudaStreamSynchronize", 606, 90, 4),
    event("cuda_runtime", "cudaGraphLaunch", 700, 9, 5),
    event("cuda_runtime", "cudaDeviceSynchronize", 1200, 5, 6),
    event("kernel", "gemm", 100, 300, 1),
    event("kernel", "add", 620, 40, 2),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 650, 20, 3),
    event("kernel", "graphed", 750, 100, 5),
    event("kernel", "graphed too", 855, 45, 5),
    event("kernel", "of somebody else", 2000, 50, 9),
    {"ph": "i", "cat": "cpu_op", "name": "no duration", "ts": 20},
]


def test_a_trace_tells_kernels_waits_copies_and_pauses():
    told = gpu_trace.analyse(EVENTS)
    inside = told[gpu_trace.INSIDE]
    assert (inside["operations"], inside["kernels"], inside["launches"], inside["graph_launches"]) == (1, 3, 2, 1)
    assert inside["waits"] == {"cudaStreamSynchronize": 1}
    assert (inside["copies_to_host"], inside["copies_to_device"]) == (1, 0)
    # on the device: 620-670, 750-850, 855-900; the 5 us between the last two are no pause
    assert (inside["device_ms"], inside["busy_ms"], inside["gaps"], inside["gaps_ms"]) == (0.28, 0.195, 1, 0.08)
    assert inside["longest_gaps"] == [{"ms": 0.08, "at_ms": 0.05, "before": "graphed"}]
    whole = told[gpu_trace.WHOLE]
    assert (whole["operations"], whole["kernels"], whole["gaps"], whole["busy_ms"]) == (2, 4, 2, 0.495)


def test_a_report_of_tests_is_read(tmp_path):
    path = tmp_path / "report.xml"
    assert gpu.reported(path)["passed"] == 0
    path.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="no&#10;more"/></testcase>'
        '<testcase name="c"><skipped message="no CUDA device"/></testcase></testsuite></testsuites>'
    )
    told = gpu.reported(path)
    assert (told["passed"], told["failures"], told["skipped"]) == (1, 1, 1)
    assert told["failing"] == ["b: no"]
    assert told["reasons"] == ["no CUDA device"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "torch sees no GPU; --dry"),
        (["--dry", "--minutes", "0"], "--minutes 0"),
        (["--dry", "--data", "nowhere/at/all"], "--data nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_said_before_any_time_is_spent(words, told, capsys, tmp_path):
    if torch.cuda.is_available() and not words:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([*words, "--out", str(tmp_path / "gpu.json")])
    assert told in capsys.readouterr().err


def test_the_stages_fit_into_eight_minutes_and_leave_a_fifth_for_training():
    listed = gpu.stages(dry=False)
    assert sum(stage.most for stage in listed[:-1]) <= 0.8 * 60 * gpu.MINUTES
    assert [stage.name for stage in listed if stage.name.startswith("steps: ResNet-50")] == [
        f"steps: ResNet-50, {size}" for size in (128, 32, 256)
    ]


def test_the_transformer_has_the_size_of_gpt_2():
    with torch.device("meta"):
        model = gpu_contenders.GPT.build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.01)
