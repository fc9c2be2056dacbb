"""One run: the cases of each subset in its share of the time, kept as soon as they are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import kernel_cases, model_cases, scaling_cases
from benchmarks.harness import Case, Disagreement, SideError, Workers, measure
from benchmarks.results import CaseResult, Results
from benchmarks.setting import Setting


@dataclass(frozen=True)
class Subset:
    cases: Callable[[Setting], Iterator[Case]]
    """In the order of their weight: the last are the first that there is no time for."""
    share: float
    """Of a run's time, beside the others' shares."""
    needs_peers: bool = True


SUBSETS = {
    "peaks": Subset(kernel_cases.peaks, 1, needs_peers=False),
    "agree": Subset(model_cases.agree, 5),
    "gemm": Subset(kernel_cases.gemm, 5),
    "attention": Subset(kernel_cases.attention, 11),
    "prefill": Subset(model_cases.prefill, 15),
    "sweep": Subset(model_cases.sweep, 28),
    "gradient": Subset(model_cases.gradient, 6, needs_peers=False),
    "decode": Subset(model_cases.decode, 4),
    "load": Subset(model_cases.load, 2, needs_peers=False),
    "threads": Subset(scaling_cases.threads, 4, needs_peers=False),
    "depth": Subset(scaling_cases.depth, 2, needs_peers=False),
    "shapes": Subset(scaling_cases.shapes, 11),
}


@dataclass(frozen=True)
class Limits:
    repeats: int
    """Rounds of a case at most."""
    seconds: float
    """Of the whole run: no case begins later."""
    only: str = ""
    """Cases are left out silently whose names do not contain this."""


class Failed(Exception):
    """A case could not be measured; the message says which and why."""


def run(
    setting: Setting,
    subsets: Sequence[str],
    limits: Limits,
    results: Results,
    *,
    keep: Callable[[Results], None],
    say: Callable[[str], None],
) -> None:
    """Measure what `results` lacks of the subsets, into `results`.

    A subset gets its share of the time that is left, and each of its cases its share of that, but
    at least one round; what they leave goes to those after them. Cases that would begin after
    their subset's time are noted as cut. One that fails has no rows, and ends nothing.

    Args:
        keep: told the results after each case.
        say: told which case is begun.

    Raises:
        Failed: at the end, of all cases in which sides disagreed or a process failed.
    """
    failures: list[str] = []
    end = time.monotonic() + limits.seconds
    for i, name in enumerate(subsets):
        shares = [SUBSETS[later].share for later in subsets[i:]]
        begun = time.monotonic()
        seconds = max(0.0, end - begun) * shares[0] / sum(shares)
        with Workers(setting.num_threads) as workers:  # anew: other subsets' models are freed
            cases = [
                case
                for case in SUBSETS[name].cases(setting)
                if limits.only in case.name and not results.has(name, case.name)
            ]
            for j, case in enumerate(cases):
                left = begun + seconds - time.monotonic()
                if left <= 0:
                    results.leave_out(name, case.name)
                    keep(results)
                    continue
                say(f"{name}: {case.name}")
                try:
                    allowed = left * case.share / sum(later.share for later in cases[j:])
                    done = measure(case, workers, limits.repeats, allowed)
                except (Disagreement, SideError) as error:
                    failures.append(f"{name}, {case.name}: {error}")
                    workers.kill()
                    continue
                results.add(CaseResult(name, case.name, done.rows, done.absent))
                keep(results)
    if failures:
        raise Failed("\n".join(failures))
