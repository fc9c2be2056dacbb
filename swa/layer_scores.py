"""The scores: what each layer's full attention is worth, with errors, in memory and on disk."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from swa import jsonio
from swa.elimination import Adaptive, Settled, Verdict
from swa.errors import InputError, PolicyError, ScoresError
from swa.files import read_document, write_text
from swa.policy import AttentionPolicy, format_layers
from swa.resampling import (
    F64,
    FEW_FREEDOM,
    MAX_BOOTSTRAP,
    MeanInterval,
    Strata,
    intervals,
    resampled_means,
    standard_errors,
    strata_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "swa.scores/1"
CONFIDENCE = 0.95
SHOWN_LAYERS = 10  # rows of a repr
NOISE_FLOORS = 2.0  # standard deviations: rounding alone goes beyond one time in twenty

Direction = Literal["restore", "ablate"]
LayerValues = tuple["float | None", ...]  # [L], None where a layer has no value
Interval = tuple[float, float]
T = TypeVar("T")


def scored_layers(
    direction: Direction, base: Sequence[int], selectable: Sequence[int]
) -> tuple[int, ...]:
    """The layers a sweep flips: restoring, those not full in the base; ablating, those full."""
    return tuple(layer for layer in selectable if (layer in base) == (direction == "ablate"))


@dataclass(frozen=True, repr=False)
class LayerScores:
    """What full attention in each layer is worth, per example and on average.

    N examples, L layers; NLLs and deltas in nats per answer token, averaged over each example's
    answer first. A layer has no delta (None) if the checkpoint itself made it sliding, or if
    `direction` and `base` leave nothing to flip in it. What follows from the fields (`delta`,
    `standard_error`, `interval`) is not stored but computed.

    Raises:
        ScoresError: values that do not fit together, or are not finite.
    """

    direction: Direction
    base: tuple[int, ...]
    """Full layers of the base run, ascending."""
    policy: AttentionPolicy
    selectable_layers: tuple[int, ...]
    """The layers that can be full or sliding, ascending."""
    num_hidden_layers: int
    model_name: str
    model_fingerprint: str
    dtype: str
    tier: str
    examples_hash: str
    version: str
    """Of the package that scored."""
    tasks: tuple[str, ...]
    """[N]: the task each example belongs to."""
    nll_base: tuple[float, ...]
    """[N]: of the base run."""
    nll_full: tuple[float, ...]
    """[N]: all layers full."""
    nll_swa: tuple[float, ...]
    """[N]: all layers that can slide sliding."""
    delta_per_example: tuple[LayerValues, ...]
    """[N][L]: larger = this layer's full attention matters more."""
    n_bootstrap: int = 2000
    """Resamplings behind `interval`."""
    seed: int = 0
    """Of those resamplings."""
    noise_floor: float | None = None
    """What rounding alone does to `delta`, one standard deviation, where known: see
    `swa.noise.measure_noise_floor`."""
    adaptive: Adaptive | None = None
    """How the sweep ended, where it could stop early: settled layers have no later deltas."""
    notes: tuple[str, ...] = ()
    """What a reader of the scores should know."""
    command: str | None = None
    """The command line that repeats the run, where there was one."""

    def __post_init__(self) -> None:
        n, n_layers = len(self.tasks), self.num_hidden_layers
        _require(self.direction in ("restore", "ablate"), f"unknown direction {self.direction!r}")
        _require(self.policy.layer_types is None, "the policy scored must not have layer_types")
        for name in ("selectable_layers", "base"):
            layers = getattr(self, name)
            _require(
                are_ascending(layers, n_layers),
                f"{name} must be ascending layers of 0..{n_layers - 1}, not {list(layers)}",
            )
        _require(
            set(self.base) <= set(self.selectable_layers),
            f"base {list(self.base)} has layers that are not selectable",
        )
        _require(bool(self.scored_layers), f"the base leaves no layer to {self.direction}")
        _require(n > 0, "there are no examples")
        _require(
            0 < self.n_bootstrap <= MAX_BOOTSTRAP, f"n_bootstrap must be in 1..{MAX_BOOTSTRAP}"
        )
        _require(self.seed >= 0, "seed must be >= 0")
        floor = self.noise_floor
        _require(floor is None or 0 <= floor < math.inf, "noise_floor must be finite and >= 0")
        for name in ("nll_base", "nll_full", "nll_swa", "delta_per_example"):
            length = len(getattr(self, name))
            _require(length == n, f"{name} has {length} examples, tasks has {n}")
        for name in ("nll_base", "nll_full", "nll_swa"):
            _require(all(map(math.isfinite, getattr(self, name))), f"{name} must be finite")
        until = self._examples_of_settled()
        for i, row in enumerate(self.delta_per_example):
            expected = [layer for layer in self.scored_layers if i < until.get(layer, n)]
            _require(
                [layer for layer, value in enumerate(row) if value is not None] == expected
                and len(row) == n_layers,
                f"delta_per_example[{i}] must have {n_layers} layers, with numbers in the layers"
                f" {expected} alone",
            )
            _require(
                all(value is None or math.isfinite(value) for value in row),
                f"delta_per_example[{i}] must be finite",
            )

    def _examples_of_settled(self) -> dict[int, int]:
        """How many examples each settled layer has; checks that they are in order."""
        if self.adaptive is None:
            return {}
        counts = [each.n_examples for each in self.adaptive.settled]
        until = {each.layer: each.n_examples for each in self.adaptive.settled}
        n = len(self.tasks)
        _require(
            until.keys() <= set(self.scored_layers) and len(until) == len(counts),
            "adaptive.settled must be scored layers, each once",
        )
        _require(
            counts == sorted(counts) and all(1 < count <= n for count in counts),
            f"adaptive.settled must be after 2..{n} examples, in order",
        )
        order, work = self.adaptive.examples, (self.adaptive.flops, self.adaptive.flops_offered)
        _require(0 < work[0] <= work[1] < math.inf, "adaptive.flops must be in 0..flops_offered")
        bounds = (self.adaptive.tolerance, self.adaptive.shortfall or 0.0)
        _require(
            0 < self.adaptive.confidence < 1 and all(0 <= bound < math.inf for bound in bounds),
            "adaptive.confidence must be between 0 and 1, tolerance and shortfall finite and >= 0",
        )
        _require(
            len(order) == n == len(set(order))
            and all(0 <= index < self.adaptive.n_offered for index in order),
            f"adaptive.examples must be {n} different ones of those offered",
        )
        return until

    @property
    def scored_layers(self) -> tuple[int, ...]:
        """The layers that have a delta, ascending."""
        return scored_layers(self.direction, self.base, self.selectable_layers)

    @property
    def fixed_layers(self) -> tuple[int, ...]:
        """The layers that are in every selection: full already when others were restored."""
        return self.base if self.direction == "restore" else ()

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """The scored layers by falling `delta`, ties to the lower index.

        Layers that an adaptive sweep found to be in the selection come first, those out of it last.
        """
        means = {layer: mean(self._column(layer)) for layer in self.scored_layers}
        places = dict.fromkeys(self.scored_layers, 1)
        for each in self.adaptive.settled if self.adaptive else ():
            places[each.layer] = 0 if each.verdict == "in" else 2
        return tuple(sorted(means, key=lambda layer: (places[layer], -means[layer])))

    @property
    def noise_band(self) -> float | None:
        """The deltas below which rounding may be all there is: two noise floors, where known."""
        return None if self.noise_floor is None else NOISE_FLOORS * self.noise_floor

    @cached_property
    def below_noise(self) -> tuple[int, ...]:
        """The scored layers whose delta is within the noise band, ascending."""
        band = self.noise_band
        if band is None:
            return ()
        return tuple(
            layer
            for layer, delta in enumerate(self.delta)
            if delta is not None and abs(delta) < band
        )

    @cached_property
    def delta(self) -> LayerValues:
        """[L]: mean over the examples."""
        return self._per_layer(mean)

    @cached_property
    def standard_error(self) -> LayerValues:
        """[L]: of `delta`, over the examples of each task; None where there is only one example."""
        return self._resampled(lambda values, strata: standard_errors(values, strata).tolist())

    @cached_property
    def interval(self) -> tuple[Interval | None, ...]:
        """[L]: (low, high), the 95% bootstrap interval of `delta` (see `swa.resampling`).

        The examples of each task are resampled among themselves. None throughout where there is
        only one example; not to be trusted in the layers `few_examples`. That an adaptive sweep
        settled a layer when its deltas happened to be clear is not allowed for, other than in the
        verdict: then the interval of a layer close to the others covers less.
        """
        return tuple(None if each is None else each[:2] for each in self._intervals)

    @cached_property
    def few_examples(self) -> tuple[int, ...]:
        """The layers whose `interval` is not to be trusted, ascending: resampling knows no others.

        Their standard error has less behind it than that of five examples of one task, which is
        also so of more examples where those of one task alone vary.
        """
        return tuple(
            layer
            for layer, each in enumerate(self._intervals)
            if each is not None and each.freedom < FEW_FREEDOM
        )

    @cached_property
    def _intervals(self) -> tuple[MeanInterval | None, ...]:
        def of(values: F64, strata: Strata) -> list[MeanInterval]:
            means = resampled_means(values, strata, n_bootstrap=self.n_bootstrap, seed=self.seed)
            return intervals(means, values, strata, CONFIDENCE)

        return self._resampled(of)

    def _resampled(self, statistic: Callable[[F64, Strata], Sequence[T]]) -> tuple[T | None, ...]:
        """[L]: of each layer's deltas, [n, columns] with their strata; None for a single one."""
        columns: dict[int, list[int]] = {}
        for layer in self.scored_layers:
            columns.setdefault(len(self._column(layer)), []).append(layer)
        found: dict[int, T] = {}
        for n, layers in columns.items():
            if n > 1:
                values = np.stack([self._column(layer) for layer in layers], axis=1)
                results = statistic(values, strata_of(self.tasks[:n]))
                found |= zip(layers, results, strict=True)
        return tuple(found.get(layer) for layer in range(self.num_hidden_layers))

    @cached_property
    def table(self) -> npt.NDArray[np.float64]:
        """float64 [N, K]: the deltas of the K scored layers; NaN after a layer is settled."""
        whole = np.array(self.delta_per_example, dtype=np.float64)
        return whole[:, list(self.scored_layers)]

    def _column(self, layer: int) -> list[float]:
        """[N]: one scored layer's deltas."""
        return [value for row in self.delta_per_example if (value := row[layer]) is not None]

    def _per_layer(self, statistic: Callable[[list[float]], float | None]) -> LayerValues:
        scored = {layer: statistic(self._column(layer)) for layer in self.scored_layers}
        return tuple(scored.get(layer) for layer in range(self.num_hidden_layers))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.scores/1": the fields, the policy's own, and what follows."""
        policy = self.policy.to_dict()
        return {
            "schema": SCHEMA,
            **{name: policy[name] for name in _POLICY_KEYS},
            **{name: _listed(getattr(self, name)) for name in (*_READERS, *_DERIVED)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerScores:
        """The scores that `to_dict` gave.

        Raises:
            ScoresError: another schema, a missing or unknown key, a value of the wrong kind, values
                that do not fit together, or derived ones that do not follow from the others.
        """
        _require(isinstance(data, Mapping), f"scores are a JSON object, not {type(data).__name__}")
        found = data.get("schema")
        _require(found == SCHEMA, f"the schema of scores is {SCHEMA!r}, not {found!r}")
        keys = {"schema", *_POLICY_KEYS, *_READERS, *_DERIVED}
        missing, unknown = sorted(keys - data.keys()), sorted(map(str, data.keys() - keys))
        _require(not missing, f"scores lack the keys {missing}")
        _require(not unknown, f"scores have the unknown keys {unknown}")
        values: dict[str, Any] = {}
        for name, read in _READERS.items():
            try:
                values[name] = read(data[name])
            except TypeError as error:
                raise ScoresError(f"{name}: {error}") from None
        try:
            policy = AttentionPolicy(**{name: data[name] for name in _POLICY_KEYS})
        except PolicyError as error:
            raise ScoresError(str(error)) from error
        scores = cls(policy=policy, **values)
        for name in _DERIVED:
            _require(
                _close(data[name], _listed(getattr(scores, name))),
                f"{name} does not follow from delta_per_example: it was edited, or is damaged",
            )
        return scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form atomically; equal scores give equal bytes. Raises OSError."""
        write_text(path, jsonio.dumps_document(self.to_dict()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerScores:
        """Read a scores file. Raises OSError, or a ScoresError that names the file."""
        return read_document(path, cls.from_dict)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the deltas with their intervals (needs the extra `plot`: matplotlib)."""
        from swa import plots

        return plots.layer_deltas(self, ax=ax)

    def __repr__(self) -> str:
        n = len(self.tasks)
        ends = f"full {mean(self.nll_full):.4f}, all sliding {mean(self.nll_swa):.4f}"
        if self.base not in ((), self.selectable_layers):
            ends += f", base (full: {format_layers(self.base)}) {mean(self.nll_base):.4f}"
        model = f"{self.model_name} ({self.dtype})"
        layers = f"{len(self.scored_layers)} of {self.num_hidden_layers} layers"
        examples = f"{n} example{'s' * (n != 1)}"
        lines = [
            f"LayerScores: {self.direction}, {layers}, {examples}, {model}",
            f"  {self.policy!r}",
            f"  nll: {ends}",
            "  layer     delta  std. error  95% interval"
            + (" (?: too few examples to be trusted)" if self.few_examples else ""),
            *(f"  {self._row(layer)}" for layer in self.ranking[:SHOWN_LAYERS]),
        ]
        if len(self.ranking) > SHOWN_LAYERS:
            lines.append(f"  ... and {len(self.ranking) - SHOWN_LAYERS} more")
        if (band := self.noise_band) is not None:
            listed = format_layers(self.below_noise) or "none"
            lines.append(f"  within rounding (less than {band:.5f}, marked ~): layers {listed}")
        if self.adaptive is not None:
            lines.append(f"  {self.adaptive}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _row(self, layer: int) -> str:
        mark = "~" if layer in self.below_noise else " "
        row = f"{layer:5d} {mark}{self.delta[layer]:+.5f}"
        error, interval = self.standard_error[layer], self.interval[layer]
        if error is not None and interval is not None:
            row += f"     {error:.5f}  [{interval[0]:+.5f}, {interval[1]:+.5f}]"
            row += " ?" if layer in self.few_examples else ""
        return row


def are_ascending(layers: Sequence[int], n_layers: int) -> bool:
    """Whether these are different layers of 0..n_layers - 1, ascending."""
    return all(a < b for a, b in pairwise((-1, *layers, n_layers)))


def checked_integer(value: object, name: str, minimum: int, maximum: float = math.inf) -> int:
    """`value` as an int. Raises InputError: not an integer, or out of range."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = minimum - 1
    if isinstance(value, bool) or not minimum <= number <= maximum:
        bounds = f">= {minimum}" if maximum == math.inf else f"in {minimum}..{maximum}"
        raise InputError(f"{name} must be an integer {bounds}, not {value!r}")
    return number


def mean(values: Sequence[float]) -> float:
    """Correctly rounded sum, then one division: the same on every machine."""
    return math.fsum(values) / len(values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ScoresError(message)


def _listed(value: Any) -> Any:
    """Tuples as the lists that JSON would give back, records as objects."""
    if isinstance(value, (Adaptive, Settled)):
        return {name: _listed(item) for name, item in vars(value).items()}
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _close(found: Any, expected: Any) -> bool:
    """Equal in shape, and in value up to another machine's rounding."""
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(map(_close, found, expected))
        )
    if isinstance(expected, float):
        return _is_number(found) and math.isclose(
            read_number(found), expected, rel_tol=1e-9, abs_tol=1e-12
        )
    return bool(found == expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _text_or_null(value: Any) -> str | None:
    return None if value is None else _text(value)


def read_integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an integer")
    return value


def read_number(value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # refused, as all that is not finite, with the field's name


def _number_or_null(value: Any) -> float | None:
    return None if value is None else read_number(value)


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_each(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        return tuple(map(read, value))

    return read_each


def _object(value: Any, readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != readers.keys():
        raise TypeError(f"not an object with the keys {list(readers)}")
    return {name: read(value[name]) for name, read in readers.items()}


def _verdict(value: Any) -> Verdict:
    if value not in ("in", "out"):
        raise TypeError(f'{value!r} is not "in" or "out"')
    return "in" if value == "in" else "out"


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _settled(value: Any) -> Settled:
    readers = {"layer": read_integer, "verdict": _verdict, "n_examples": read_integer}
    return Settled(**_object(value, readers))


def _adaptive_or_null(value: Any) -> Adaptive | None:
    return None if value is None else Adaptive(**_object(value, _ADAPTIVE_READERS))


read_layer_values = _each(_number_or_null)

_ADAPTIVE_READERS: dict[str, Callable[[Any], Any]] = {
    "size": read_integer,
    "confidence": read_number,
    "tolerance": read_number,
    "is_decided": _flag,
    "shortfall": _number_or_null,
    "settled": _each(_settled),
    "examples": _each(read_integer),
    "n_offered": read_integer,
    "flops": read_number,
    "flops_offered": read_number,
}
_POLICY_KEYS = ("sliding_window", "num_sink_tokens", "num_tail_tokens", "decode", "consumer")
# How each field is read back from JSON, in the order of the file.
_READERS: dict[str, Callable[[Any], Any]] = {
    "direction": _text,
    "base": _each(read_integer),
    "selectable_layers": _each(read_integer),
    "num_hidden_layers": read_integer,
    "model_name": _text,
    "model_fingerprint": _text,
    "dtype": _text,
    "tier": _text,
    "examples_hash": _text,
    "version": _text,
    "noise_floor": _number_or_null,
    "adaptive": _adaptive_or_null,
    "notes": _each(_text),
    "command": _text_or_null,
    "tasks": _each(_text),
    "n_bootstrap": read_integer,
    "seed": read_integer,
    "nll_base": _each(read_number),
    "nll_full": _each(read_number),
    "nll_swa": _each(read_number),
    "delta_per_example": _each(read_layer_values),
}
_DERIVED = ("delta", "standard_error", "interval")
