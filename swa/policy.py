"""Who attends to what: the attention policy, its JSON form, and the arrays the engine takes."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from swa import jsonio
from swa.errors import PolicyError
from swa.files import write_text

if TYPE_CHECKING:
    from swa.config import ModelConfig

FULL = "full_attention"
SLIDING = "sliding_attention"
SCHEMA = "swa.policy/1"
CONSUMERS = ("vllm", "transformers")
MAX_TOKENS = 2**31 - 1  # far beyond any context, and sums of two stay far inside int64

I64 = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Engine arrays, each int64 [L]: rows below full_from see window and sinks, others all."""

    window: I64
    """Keys a row sees, its own included; 0 = all."""
    sinks: I64
    """Leading keys that every row sees."""
    full_from: I64
    """First row that attends to every key before it."""


class DecodeRows(NamedTuple):
    """Engine arrays for the rows of generated tokens, each int64 [L]; window 0 = all keys."""

    window: I64
    sinks: I64


@dataclass(frozen=True, repr=False)
class AttentionPolicy:
    """How the sliding layers of a hybrid attend, and, once chosen, which layers they are.

    With P prompt tokens, row t < P - num_tail_tokens of a sliding layer attends to the keys
    {j <= t : j > t - sliding_window or j < num_sink_tokens}, at their original RoPE positions.
    Later rows (the tail and the answer) attend to all keys before them, unless `decode` is
    "window": then no row is exempt, and generation evicts the keys that no row will see again.

    Args:
        sliding_window: keys a row sees, its own included: one int >= 1, or one per layer.
        num_sink_tokens: leading tokens that stay visible (>= 0), a union with the window.
        num_tail_tokens: last prompt tokens that attend to everything (>= 0).
        layer_types: "full_attention" or "sliding_attention" per layer (Hugging Face's names);
            None = not chosen yet: every layer that can slide does.
        decode: "full" (as in arXiv 2606.27791: saves prefill work, not memory) or "window".
        consumer: the stock server this policy describes, see `for_consumer`.

    Raises:
        PolicyError: on any value outside of these rules, a tail with windowed decode among them.
    """

    sliding_window: int | tuple[int, ...]
    num_sink_tokens: int = 0
    num_tail_tokens: int = 0
    layer_types: tuple[str, ...] | None = None
    decode: Literal["full", "window"] = "full"
    consumer: str | None = None

    def __post_init__(self) -> None:
        window: object = self.sliding_window
        if isinstance(window, Iterable) and not isinstance(window, (str, bytes)):
            checked: int | tuple[int, ...] = tuple(
                _integer(w, f"sliding_window[{i}]", 1) for i, w in enumerate(window)
            )
            if not checked:
                raise PolicyError("sliding_window is empty: give one int, or one per layer")
        else:
            checked = _integer(window, "sliding_window", 1)
        # The dataclass is frozen for its users; normalising its own fields is the one exception.
        object.__setattr__(self, "sliding_window", checked)
        for name in ("num_sink_tokens", "num_tail_tokens"):
            object.__setattr__(self, name, _integer(getattr(self, name), name, 0))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", _layer_types(self.layer_types))
        if self.decode not in ("full", "window"):
            raise PolicyError(f'decode must be "full" or "window", not {self.decode!r}')
        if self.decode == "window" and self.num_tail_tokens:
            raise PolicyError(
                f"num_tail_tokens={self.num_tail_tokens} cannot be had with windowed decode, which"
                ' exempts no row: set num_tail_tokens=0, or decode="full"'
            )
        if (
            isinstance(checked, tuple)
            and self.layer_types is not None
            and len(checked) != len(self.layer_types)
        ):
            raise PolicyError(
                f"sliding_window has {len(checked)} layers, layer_types {len(self.layer_types)}"
            )
        if self.consumer is not None:
            _check_consumer(self)

    @classmethod
    def for_consumer(
        cls, name: Literal["vllm", "transformers"], *, sliding_window: int | tuple[int, ...]
    ) -> AttentionPolicy:
        """What a stock server can run: no sinks, no tail, windowed decode."""
        return cls(sliding_window=sliding_window, decode="window", consumer=name)

    @property
    def full_attention_layers(self) -> tuple[int, ...] | None:
        """Indices of the layers that keep full attention, ascending; None = not chosen yet."""
        if self.layer_types is None:
            return None
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    def with_full_layers(self, layers: Iterable[int], num_hidden_layers: int) -> AttentionPolicy:
        """The same policy with `layers` full and all others sliding.

        Raises:
            PolicyError: a layer is not in [0, num_hidden_layers), or not an integer.
        """
        chosen = {_layer_index(layer, num_hidden_layers) for layer in layers}
        kinds = tuple(FULL if i in chosen else SLIDING for i in range(num_hidden_layers))
        return replace(self, layer_types=kinds)

    def windows(self, num_hidden_layers: int) -> tuple[int, ...]:
        """The window of every layer, as if all of them slid.

        Raises:
            PolicyError: the policy was written for another number of layers.
        """
        for name, per_layer in (
            ("sliding_window", self.sliding_window),
            ("layer_types", self.layer_types),
        ):
            if isinstance(per_layer, tuple) and len(per_layer) != num_hidden_layers:
                raise PolicyError(
                    f"{name} has {len(per_layer)} layers, the model has {num_hidden_layers}"
                )
        if isinstance(self.sliding_window, tuple):
            return self.sliding_window
        return (self.sliding_window,) * num_hidden_layers

    def rows(
        self, config: ModelConfig, full_layers: Collection[int], prompt_len: int, n_tokens: int
    ) -> Rows:
        """Engine arrays for a run of `n_tokens` tokens, of which the first `prompt_len` are prompt.

        Layers in `full_layers` attend to everything, others slide; layers that the checkpoint made
        sliding keep their own window. `layer_types` is not read: the caller says who is full.

        Raises:
            PolicyError: a policy for another number of layers; a full layer that does not exist,
                or that the checkpoint itself made sliding.
        """
        full_from = max(0, prompt_len - self.num_tail_tokens) if self.decode == "full" else n_tokens
        slides = self._sliding_layers(config, full_layers)
        sliding, native = slides > 0, _native_windows(config)
        return Rows(
            window=slides + native,
            sinks=np.where(sliding, self.num_sink_tokens, 0),
            full_from=np.where(native > 0, n_tokens, np.where(sliding, full_from, 0)),
        )

    def decode_rows(self, config: ModelConfig, full_layers: Collection[int]) -> DecodeRows:
        """Engine arrays for generated tokens; full decode leaves only the native windows.

        Raises:
            PolicyError: as `rows`.
        """
        slides = self._sliding_layers(config, full_layers)
        if self.decode == "full":
            slides = np.zeros_like(slides)
        return DecodeRows(
            window=slides + _native_windows(config),
            sinks=np.where(slides > 0, self.num_sink_tokens, 0),
        )

    def _sliding_layers(self, config: ModelConfig, full_layers: Collection[int]) -> I64:
        """int64 [L]: the policy's window of each layer that slides by it, 0 elsewhere."""
        windows = np.array(self.windows(config.num_hidden_layers), dtype=np.int64)
        native = _native_windows(config)
        for layer in full_layers:
            if native[_layer_index(layer, len(windows))]:
                raise PolicyError(
                    f"layer {layer} cannot get full attention: the checkpoint itself gives it a"
                    f" window of {native[layer]} keys"
                )
        windows[native > 0] = 0
        windows[list(full_layers)] = 0
        return windows

    def carries_signal(self, prompt_len: int, answer_len: int) -> bool:
        """Whether some row that can change the answer's NLL differs from full attention.

        The first row that loses a key is W + S. With full decode only rows t < P - n slide; with
        windowed decode rows up to P + A - 2, the last scored one, count. With windows per layer the
        smallest decides: one sliding layer is enough.
        """
        window = self.sliding_window
        smallest = window if isinstance(window, int) else min(window)
        if self.decode == "full":
            sliding_rows = prompt_len - self.num_tail_tokens
        else:
            sliding_rows = prompt_len + answer_len - 1
        return sliding_rows > smallest + self.num_sink_tokens

    def differs_from(self, other: AttentionPolicy) -> str | None:
        """What differs in how sliding layers attend, for people; None if nothing does.

        `layer_types` (chosen after scoring) and `consumer` (a label) are not compared.
        """
        differences = []
        for name in ("sliding_window", "num_sink_tokens", "num_tail_tokens", "decode"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if _one_window(mine) != _one_window(theirs):
                differences.append(f"{name} {compact(mine)} against {compact(theirs)}")
        return ", ".join(differences) or None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, schema "swa.policy/1"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"schema": SCHEMA} | {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionPolicy:
        """The policy that `to_dict` gave; keys other than `sliding_window` may be left out.

        "selection", where a `Selection` keeps its origin in the same file, is passed over.

        Raises:
            PolicyError: another schema, an unknown key, or a value the class refuses.
        """
        if not isinstance(data, Mapping):
            raise PolicyError(f"a policy is a JSON object, not {type(data).__name__}")
        if data.get("schema") != SCHEMA:
            raise PolicyError(f"policy schema must be {SCHEMA!r}, not {data.get('schema')!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in data.keys() - known - {"schema", "selection"})
        if unknown:
            raise PolicyError(f"unknown policy keys {unknown}: known are {sorted(known)}")
        if "sliding_window" not in data:
            raise PolicyError("the policy has no sliding_window")
        return cls(**{key: data[key] for key in known & data.keys()})

    def to_json(self) -> str:
        """The JSON form as indented text, ending in a newline."""
        return jsonio.dumps_document(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> AttentionPolicy:
        """Read what `to_json` wrote. Raises PolicyError: not JSON, or as `from_dict`."""
        try:
            data = jsonio.loads(text)
        except ValueError as error:
            raise PolicyError(f"the policy is not valid JSON: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to `path`, atomically. Raises OSError."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionPolicy:
        """Read a policy file. Raises OSError, or PolicyError naming the file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (PolicyError, UnicodeDecodeError) as error:
            raise PolicyError(f"{os.fspath(path)}: {error}") from error

    def __repr__(self) -> str:
        parts = [f"sliding_window={compact(self.sliding_window)}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "layer_types":
                full = self.full_attention_layers or ()
                listed = f": {format_layers(full)}" if full else ""
                parts.append(f"layer_types=<{len(full)} of {len(value)} full{listed}>")
            else:
                parts.append(f"{field.name}={value!r}")
        return f"AttentionPolicy({', '.join(parts)})"


def selectable_layers(config: ModelConfig) -> tuple[int, ...]:
    """Layers that a policy decides about: those the checkpoint did not make sliding."""
    windows = config.native_sliding_window
    return tuple(layer for layer, window in enumerate(windows) if window is None)


def format_layers(layers: Iterable[int]) -> str:
    """Ascending layer indices for people: "1, 3, 9-13"."""
    ordered = sorted(set(layers))
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def compact(value: object) -> str:
    """A tuple of windows by runs, "(512 x 3, 256)"; anything else as it is."""
    if not isinstance(value, tuple):
        return repr(value)
    runs = [(window, len(list(run))) for window, run in groupby(value)]
    return f"({', '.join(f'{w} x {n}' if n > 1 else f'{w}' for w, n in runs)})"


def _one_window(value: object) -> object:
    """Equal windows in every layer mean the same as their one int."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _integer(value: object, name: str, minimum: int) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise PolicyError(f"{name} must be an integer, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise PolicyError(f"{name} must be an integer, not {value!r}") from None
    if not minimum <= number <= MAX_TOKENS:
        raise PolicyError(f"{name} must be in {minimum}..{MAX_TOKENS}, not {number}")
    return number


def _layer_index(value: object, num_hidden_layers: int) -> int:
    layer = _integer(value, "a full-attention layer", 0)
    if layer >= num_hidden_layers:
        raise PolicyError(
            f"there is no layer {layer} to keep full: the model has 0..{num_hidden_layers - 1}"
        )
    return layer


def _layer_types(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise PolicyError(f"layer_types must be a list of strings, not {value!r}")
    kinds = tuple(value)
    if not kinds:
        raise PolicyError("layer_types is empty: give one string per layer")
    for i, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in (FULL, SLIDING):
            raise PolicyError(f'layer_types[{i}] must be "{FULL}" or "{SLIDING}", not {kind!r}')
    return kinds


def _check_consumer(policy: AttentionPolicy) -> None:
    if policy.consumer not in CONSUMERS:
        raise PolicyError(f"consumer must be one of {CONSUMERS}, not {policy.consumer!r}")
    if policy.num_sink_tokens or policy.num_tail_tokens or policy.decode != "window":
        raise PolicyError(
            f"stock {policy.consumer} has no sinks, no tail and windowed decode only: use"
            " AttentionPolicy.for_consumer, or leave out consumer"
        )


def _native_windows(config: ModelConfig) -> I64:
    """int64 [L]: the window that the checkpoint itself gives a layer, 0 = none."""
    return np.array([window or 0 for window in config.native_sliding_window], dtype=np.int64)
