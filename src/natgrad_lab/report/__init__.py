"""Reads the folders that runs have written and draws one HTML page; knows files, not the library."""

from pathlib import Path


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of a comparison or of some runs, finished or not; return where."""
    out = out or folders[0] / "report.html"
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {str(folder)!r}; natgrad report takes folders that a run has written")
    text = _page(folders)
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r} lies in a folder that does not exist; name another file")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{str(out)!r} cannot be written ({error.strerror}); name another file by --out") from None
    return out


def _page(folders: list[Path]) -> str:
    from natgrad_lab.report import compare_page, run_page  # here: tables are read without matplotlib, too
    from natgrad_lab.report.compare_read import is_comparison, read_comparison
    from natgrad_lab.report.runs import read_runs

    compared = [folder for folder in folders if is_comparison(folder)]
    if compared and len(folders) > 1:
        raise ValueError(f"{str(compared[0])!r} is a comparison, which has a page to itself; name it alone")
    return compare_page.page(read_comparison(folders[0])) if compared else run_page.page(read_runs(folders))
