"""swa and its peers, measured in the same run: `python -m benchmarks [SUBSET ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import kernel_cases, machine, model_cases, render
from benchmarks.harness import Case, Disagreement, Row, SideError, Workers, measure
from benchmarks.setting import Setting

README = Path(__file__).resolve().parent / "README.md"
SUBSETS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "peaks": kernel_cases.peaks,
    "gemm": kernel_cases.gemm,
    "attention": kernel_cases.attention,
    "prefill": model_cases.prefill,
    "sweep": model_cases.sweep,
    "decode": model_cases.decode,
    "load": model_cases.load,
    "threads": model_cases.threads,
}
WITHOUT_PEERS = {"peaks", "load", "threads"}


def main() -> None:
    options = _options()
    subsets = options.subsets or list(SUBSETS)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not set(subsets) <= WITHOUT_PEERS and not machine.installed("torch", "transformers"):
        sys.exit("the peers are torch and transformers, which are missing: pip install '.[test]'")
    if not machine.installed("llama_cpp"):
        console.print("llama.cpp is left out: there is no llama_cpp to import")

    described = machine.describe(options.threads)
    setting = Setting(described["tier"], tuple(described["tiers"]), options.threads, options.quick)
    rows: list[Row] = []
    begun, others = time.monotonic(), machine.Others()
    for subset in subsets:
        try:
            with Workers(options.threads) as workers:  # anew: models of other subsets are freed
                measured = _measure(SUBSETS[subset](setting), workers, options)
        except (Disagreement, SideError) as error:
            sys.exit(f"{subset}: {error}")
        rows += (replace(row, subset=subset) for row in measured)
        console.print(render.terminal(subset, measured))
        disturbed = others.share()
        if options.json:  # after each subset: what is measured is not lost with what follows
            document = {"machine": described, "others": disturbed}
            document |= {"rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(document, indent=2) + "\n")
    minutes = (time.monotonic() - begun) / 60
    repeats = f"{min(row.repeats for row in rows)} to {max(row.repeats for row in rows)}"
    quick = " (`--quick`: small sizes)" if options.quick else ""
    run = f"Medians of {repeats} rounds, taken in turns, in {minutes:.0f} minutes{quick}."
    if disturbed is not None:
        run += f" Other processes took {disturbed:.0%} of the CPUs meanwhile."
    console.print(run)
    if options.readme or (not options.subsets and not options.quick):
        render.insert(options.readme or README, render.markdown(described, rows, run))


def _measure(cases: Iterator[Case], workers: Workers, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for case in cases:
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        rows += measure(case, workers, options.repeats, options.seconds)
    return rows


def _options() -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures swa and its peers in turns, each in a process of its own. All subsets"
        " at full size write their table to benchmarks/README.md.",
    )
    parser.add_argument(
        "subsets",
        nargs="*",
        metavar="SUBSET",
        help=f"of {', '.join(SUBSETS)}; default: all",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds of a case")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="a case begins no other round after this time",
    )
    parser.add_argument("--threads", type=int, default=machine.num_cpus(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the table between FILE's markers"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    options = parser.parse_args()
    unknown = set(options.subsets) - set(SUBSETS)
    if unknown:
        parser.error(f"no subset {', '.join(sorted(unknown))}: there are {', '.join(SUBSETS)}")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return options


if __name__ == "__main__":
    main()
