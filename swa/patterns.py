"""The usual fixed patterns of full-attention layers."""

from __future__ import annotations

from swa.errors import InputError


def periodic(num_layers: int, size: int, offset: int = 0) -> tuple[int, ...]:
    """Every (num_layers / size)-th layer: floor(i * num_layers / size) + offset, i = 0..size-1.

    Where the period is not an integer, gaps of its floor and its ceiling take turns. There are
    ceil(num_layers / size) offsets, from 0: with each of them all layers are distinct and in range.

    Raises:
        InputError: size is not in 1..num_layers, or there is no such offset.
    """
    _check_size(num_layers, size, 1)
    if not 0 <= offset < -(-num_layers // size):
        raise InputError(
            f"offset must be in 0..{-(-num_layers // size) - 1} for {size} of {num_layers} layers,"
            f" not {offset}"
        )
    return tuple(i * num_layers // size + offset for i in range(size))


def periodic_choices(num_layers: int, size: int) -> tuple[tuple[int, ...], ...]:
    """`periodic` at every offset. Raises InputError: size is not in 1..num_layers."""
    _check_size(num_layers, size, 1)
    return tuple(periodic(num_layers, size, i) for i in range(-(-num_layers // size)))


def first(num_layers: int, size: int) -> tuple[int, ...]:
    """The lowest layers. Raises InputError: size is not in 0..num_layers."""
    _check_size(num_layers, size, 0)
    return tuple(range(size))


def last(num_layers: int, size: int) -> tuple[int, ...]:
    """The highest layers. Raises InputError: size is not in 0..num_layers."""
    _check_size(num_layers, size, 0)
    return tuple(range(num_layers - size, num_layers))


def _check_size(num_layers: int, size: int, smallest: int) -> None:
    if not smallest <= size <= num_layers:
        raise InputError(f"cannot choose {size} of {num_layers} layers")
