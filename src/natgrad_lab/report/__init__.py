"""Reads the folders that runs have written and draws one HTML page; knows files, not the library.

A folder may come from a stranger: nothing in it is executed or believed, and nothing but the page is written.
"""

from pathlib import Path

from natgrad_lab.report.files import replace


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of a comparison or of some runs, finished or not; return where."""
    out = out or folders[0] / "report.html"
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}; natgrad report takes folders that a run has written")
    replace(out, _page(folders))
    return out


def _page(folders: list[Path]) -> str:
    from natgrad_lab.report import compare_page, critical, run_page  # here: tables are read without matplotlib, too
    from natgrad_lab.report.compare_read import is_comparison, read_comparison
    from natgrad_lab.report.runs import read_runs

    alone = {folder: critical.read_critical(folder) for folder in folders}
    compared = [folder for folder, measured in alone.items() if is_comparison(folder) or measured]
    if not compared:
        return run_page.page(read_runs(folders))
    if len(folders) > 1:
        raise ValueError(f"{str(compared[0])!r} is a comparison, which has a page to itself; name it alone")
    if not is_comparison(folders[0]):
        return critical.page(alone[folders[0]])
    return compare_page.page(read_comparison(folders[0]), alone[folders[0]])
