"""swa and its peers, measured in the same run: `python -m benchmarks [SUBSET ...]`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, plots, render
from benchmarks import results as files
from benchmarks.results import Results, ResultsError, Run
from benchmarks.run import SUBSETS, Failed, Limits, run
from benchmarks.setting import Setting

HERE = Path(__file__).resolve().parent
README, JSON = HERE / "README.md", HERE / "results.json"


def main() -> None:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.merge:
            results, failure = files.merge(options.merge), ""
        else:
            results, failure = _measured(options)
    except ResultsError as error:
        sys.exit(str(error))
    _show(results, console)
    if failure:
        sys.exit(failure)
    if options.merge and options.json:
        results.save(options.json)
    if options.readme:
        _write(results, options.readme, console)


def _measured(options: Any) -> tuple[Results, str]:
    """What was measured and, if something ended the run before its time, what."""
    subsets = options.subsets or list(SUBSETS)
    if any(SUBSETS[name].needs_peers for name in subsets):
        _require_peers()
    described = machine.describe(options.threads)
    results = Results(described, options.quick)
    if options.resume and options.json.exists():
        found = files.load(options.json)
        files.require_same(found, results, str(options.json), "this run")
        results = found

    begun, others, before = time.monotonic(), machine.Others(), list(results.runs)
    shown = f"--repeats {options.repeats} --minutes {options.minutes:g}"

    def keep(results: Results) -> None:
        minutes = (time.monotonic() - begun) / 60
        results.runs = [*before, Run(shown, minutes, others.share())]
        if options.json:
            results.save(options.json)

    with tempfile.TemporaryDirectory(prefix="swa-benchmarks-") as scratch:
        setting = Setting(
            described["tier"],
            tuple(described["tiers"]),
            options.threads,
            options.quick,
            Path(scratch),
        )
        limits = Limits(options.repeats, 60 * options.minutes, options.only)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: as Ctrl-C
        try:
            run(setting, subsets, limits, results, keep=keep, say=_say)
        except KeyboardInterrupt:
            return results, "ended early; with --json FILE, --resume measures the rest"
        except Failed as error:
            return results, str(error)
    return results, ""


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _require_peers() -> None:
    if not machine.installed("torch", "transformers", "gguf"):
        sys.exit("torch, transformers or gguf is missing: pip install '.[test]'")


def _show(results: Results, console: Console) -> None:
    for subset in results.subsets(list(SUBSETS)):
        console.print(render.terminal(subset, results.rows(subset)))
    for note in render.notes(results):
        console.print(note)


def _write(results: Results, readme: Path, console: Console) -> None:
    """The tables and, where matplotlib is installed, the plots beside them."""
    pictures: list[str] = []
    if machine.installed("matplotlib"):
        drawn = plots.draw(results, readme.parent / "plots")
        pictures = [f"plots/{path.name}" for path in drawn]
    else:
        console.print("no plots: matplotlib is not installed (pip install '.[plot]')")
    render.insert(readme, render.markdown(results, list(SUBSETS), pictures))


def _options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures swa and its peers in turns, each in a process of its own. All subsets"
        " at full size write benchmarks/results.json, the tables of benchmarks/README.md and the"
        " plots beside them.",
    )
    parser.add_argument(
        "subsets",
        nargs="*",
        metavar="SUBSET",
        help=f"of {', '.join(SUBSETS)}; default: all",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the cases whose names, as shown, contain this"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--minutes", type=float, default=20.0, metavar="M", help="of the whole run; default: 20"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds of a case")
    parser.add_argument("--threads", type=int, default=machine.num_cpus(), metavar="N")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep results here, after every case"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure only the cases that --json lacks"
    )
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: show these results"
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write tables between FILE's markers, and plots"
    )
    options = parser.parse_args()
    unknown = set(options.subsets) - set(SUBSETS)
    if unknown:
        parser.error(f"no subset {', '.join(sorted(unknown))}: there are {', '.join(SUBSETS)}")
    if options.repeats < 1 or options.threads < 1 or options.minutes <= 0:
        parser.error("--repeats, --threads and --minutes must be positive")
    if options.merge and (options.subsets or options.only or options.resume or options.quick):
        parser.error("--merge measures nothing: it takes --json and --readme alone")
    if not (options.merge or options.subsets or options.quick or options.only):
        options.json, options.readme = options.json or JSON, options.readme or README
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE")
    return options


if __name__ == "__main__":
    main()
