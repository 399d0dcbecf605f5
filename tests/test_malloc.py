"""Freed memory: kept by the command and by workers, left alone where the environment says so."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from natgrad_lab.compare.tasks import DIGITS
from natgrad_lab.compare.workers import _begin
from natgrad_lab.train.malloc import told_otherwise

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
MEGABYTES = 200
COMMAND = """
import sys
from natgrad_lab.__main__ import main
from test_malloc import left_over
sys.argv = ["natgrad", "compare", "--list"]
main()
print(left_over())
"""


def left_over():
    """Megabytes that this process still holds of a block that it has filled and freed."""

    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = held()
    block = bytearray(MEGABYTES * 10**6)
    block[::4096] = b"x" * len(block[::4096])
    assert held() - before > 0.9 * MEGABYTES
    del block
    return held() - before


def after_command(**environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    given = {**inherited, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **environment}
    said = subprocess.run([sys.executable, "-c", COMMAND], env=given, capture_output=True, text=True, check=True)
    return float(said.stdout.split()[-1])


def test_the_command_keeps_what_it_frees_unless_the_environment_says_how_malloc_behaves():
    assert after_command() > 0.9 * MEGABYTES
    assert after_command(MALLOC_TOP_PAD_="131072") < 0.1 * MEGABYTES
    assert after_command(GLIBC_TUNABLES="glibc.malloc.top_pad=131072") < 0.1 * MEGABYTES


def test_a_worker_keeps_what_it_frees(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(DIGITS, "cpu", 1, context.Event())) as pool:
        assert pool.submit(left_over).result() > 0.9 * MEGABYTES


def test_other_variables_do_not_count(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_CONF", "jemalloc's")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=2")
    assert not told_otherwise()
