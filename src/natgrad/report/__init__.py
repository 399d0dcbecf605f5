"""Reads the folders that runs have written and draws one HTML page; knows files, not the library."""

from pathlib import Path


def write(folders: list[Path], out: Path | None = None) -> Path:
    """Write the page of a comparison or of some runs; return where."""
    from natgrad.report import compare_page, page  # here: tables are read without matplotlib, too
    from natgrad.report.compare_read import is_comparison, read_comparison
    from natgrad.report.read import read

    if len(folders) == 1 and is_comparison(folders[0]):
        text = compare_page.page(read_comparison(folders[0]))
    else:
        text = page.page(read(folders))
    out = out or folders[0] / "report.html"
    if not out.parent.is_dir():
        raise ValueError(f"--out {str(out)!r} lies in a folder that does not exist; name another file")
    out.write_text(text, encoding="utf-8")
    return out
