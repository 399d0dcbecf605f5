"""Builds the sdist and the wheel, and tests the wheel where nothing of this folder is: python tools/release.py

    1. the tree is clean, and CHANGELOG.md has a section of this version (--trial goes on without)
    2. sdist, and the wheel from the sdist
    3. what is in the wheel: two packages, their files, nothing else
    4. a clean environment with the wheel alone: torch and numpy, no extra; import and a few steps
    5. the same environment with the extra "train": the command, and a run of two steps

Nothing is uploaded. What was built lies in dist/, with its digests.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WANTED = ("natgrad/__init__.py", "natgrad/py.typed", "natgrad_lab/plan/cpu.json", "natgrad_lab/report/page.css")
TOP = r"(natgrad|natgrad_lab|natgrad-[\w.]+\.dist-info)/"

ALONE = """
import importlib.metadata as metadata, pathlib, re, sys
import natgrad, numpy, torch
assert pathlib.Path(sys.prefix) in pathlib.Path(natgrad.__file__).parents, natgrad.__file__
assert natgrad.__version__ == metadata.version("natgrad"), (natgrad.__version__, metadata.version("natgrad"))
said = [r for r in metadata.requires("natgrad")]
needed = sorted(re.match(r"[\\w.-]+", r)[0] for r in said if "extra ==" not in r)
assert needed == ["numpy", "torch"], needed
extras = {re.match(r"[\\w.-]+", r)[0].lower() for r in said if "extra ==" in r} - {"natgrad"}
there = {d.metadata["Name"].lower() for d in metadata.distributions()}
assert not extras & there, sorted(extras & there)
assert not any(name.split(".")[0] == "natgrad_lab" for name in sys.modules)
torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x @ torch.randn(8, 3)).argmax(1)
for kind in (natgrad.SPNGD, natgrad.KFAC, natgrad.SENG, natgrad.NLCG):
    losses, parts = [], (torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    model = torch.nn.Sequential(*parts)
    optimizer = kind(model, lr=0.05)
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(**{"loss": loss} if kind is natgrad.NLCG else {})
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (kind, losses)
    curved = [row.covered for row in optimizer.coverage()]
    assert any(curved) or kind is natgrad.NLCG, optimizer.coverage()
print(f"natgrad {natgrad.__version__} alone, {len(there)} packages: torch {torch.__version__} and numpy")
"""


def refuse(text: str) -> None:
    """End with one line."""
    raise SystemExit(f"release: {text}")


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """Run a command and return what it printed; where it fails, end with that."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=around, capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"{' '.join(map(str, command))[:200]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def environment(folder: Path) -> Path:
    """A fresh virtual environment; returns its python."""
    run(sys.executable, "-m", "venv", folder)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def version() -> str:
    """The version that pyproject.toml says."""
    return re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]


def unready() -> list[str]:
    """Why this tree should not be released."""
    reasons = [f"not committed: {line}" for line in run("git", "status", "--porcelain").splitlines()]
    if not re.search(rf"^## {re.escape(version())}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        reasons.append(f"CHANGELOG.md has no section '## {version()}': rename Unreleased, and begin a new one")
    return reasons


def build(python: Path, out: Path) -> tuple[Path, Path]:
    """The sdist of what is committed or at least tracked, and the wheel from the sdist."""
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", out, ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_files(wheel: Path) -> int:
    """Two packages with their data, and nothing else; returns how many files."""
    names = zipfile.ZipFile(wheel).namelist()
    strange = [name for name in names if not re.match(TOP, name)]
    lacking = [name for name in WANTED if name not in names]
    if strange or lacking:
        refuse(f"{wheel.name}: should not be there: {strange[:5]}; lacks: {lacking}")
    return len(names)


def main() -> None:
    """Build, check, install, use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="go on with a tree that is not ready to be released")
    args = parser.parse_args()
    begun = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {text}", flush=True)

    for reason in unready():
        if not args.trial:
            refuse(f"{reason} (--trial goes on)")
        tell(f"trial: {reason}")
    with tempfile.TemporaryDirectory(prefix="natgrad-release-") as name:
        scratch = Path(name)
        out = scratch / "dist"
        sdist, wheel = build(environment(scratch / "build"), out)
        tell(f"{sdist.name}, {wheel.name}: {check_files(wheel)} files")

        python = environment(scratch / "clean")
        pinned = ("--constraint", ROOT / "constraints.txt")
        torch = (ROOT / "constraints.txt").read_text().split("\n")[1].strip()  # a CPU build where pip has one
        run(python, "-m", "pip", "install", "--quiet", *pinned, torch, wheel)
        tell(run(python, "-c", ALONE, folder=scratch).strip())

        run(python, "-m", "pip", "install", "--quiet", *pinned, f"{wheel}[train]")
        command = python.parent / "natgrad"
        said = run(command, "--version", folder=scratch).strip()
        if version() not in said:
            refuse(f"natgrad --version says {said!r}, pyproject.toml {version()}")
        run(command, "train", "digits_spngd", "--steps", "2", "--out", scratch / "run", folder=scratch)
        if not (scratch / "run" / "summary.json").exists():
            refuse("natgrad train digits_spngd --steps 2 left no summary.json")
        tell(f"{said}: natgrad train digits_spngd made two steps")

        kept = ROOT / "dist"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(out, kept)
    for path in sorted(kept.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}  {path.stat().st_size:,} bytes")
    print("Nothing was uploaded. When this is what should be out: python -m twine upload dist/*")


if __name__ == "__main__":
    main()
