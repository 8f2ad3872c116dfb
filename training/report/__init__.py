"""Verb `report`: what is known of a run on one page, report/index.html.

Enter at `sections.py`, which decides what is told; `analysis.py` and `attention.py` compute it,
`figures.py` draws it, `page.py` writes it as HTML.
"""

from pathlib import Path

from training import checkpoint
from training.recipe import Recipe
from training.run import Run, RunError, write_bytes, write_text


def report(recipe: Recipe, run: Run) -> Path:
    """Write the page, its figures inside it and beside it. A run that is not finished gets what
    there is, and the page says which verb makes the rest.

    Raises:
        RunError: nothing trained yet, weights of another recipe, or no matplotlib.
    """
    digests = checkpoint.prepared(recipe, run)
    run.demand(run.metrics, "train")
    if run.best.exists():
        checkpoint.load_own(run.best, recipe, digests)
    try:
        from training.report.sections import build
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise RunError(
            "matplotlib is not installed, which only this verb needs; "
            "run 'pip install seq2serve[report]' or 'make setup' first"
        ) from None
    page, pictures = build(recipe, run)
    folder = run.root / "report"
    names = {"index.html"}
    for picture in pictures:
        for theme, content in picture.files.items():
            name = f"{picture.name}.png" if theme == "light" else f"{picture.name}.{theme}.png"
            write_bytes(folder / name, content)
            names.add(name)
    write_text(folder / "index.html", page)
    for stale in folder.glob("*.png"):  # of a report that had more to show
        if stale.name not in names:
            stale.unlink()
    return folder / "index.html"
