"""The batch triangle: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel ranks.

Two given, the third follows; messages are DeepSpeed's own, which people search for.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseed.config.fields import ConfigError

NONE_GIVEN = "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"


@dataclass(frozen=True)
class Batch:
    """Rows: ``train`` of a step over all ranks, ``micro`` of one forward on one rank, ``accumulation`` forwards a step."""

    train: int
    micro: int
    accumulation: int


def triangle(train: int | None, micro: int | None, accumulation: int | None, ranks: int) -> Batch:
    """Raises ConfigError where the three do not fit, or neither of the first two is given.

    >>> triangle(32, 4, None, ranks=2)
    Batch(train=32, micro=4, accumulation=4)
    >>> triangle(None, 4, None, ranks=2)
    Batch(train=8, micro=4, accumulation=1)
    """
    if train is None and micro is None:
        raise ConfigError(NONE_GIVEN)
    _check_positive(train, micro, accumulation)
    if train is not None and micro is not None:
        accumulation = accumulation if accumulation is not None else train // (micro * ranks)
    elif train is not None:
        accumulation = accumulation if accumulation is not None else 1
        micro = train // (ranks * accumulation)
    elif micro is not None:
        accumulation = accumulation if accumulation is not None else 1
        train = micro * accumulation * ranks
    assert train is not None and micro is not None and accumulation is not None
    _check_positive(train, micro, accumulation)
    if train != micro * accumulation * ranks:
        raise ConfigError(
            "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size "
            f"{train} != {micro} * {accumulation} * {ranks}"
        )
    return Batch(train, micro, accumulation)


def check_without_ranks(train: int | None, micro: int | None, accumulation: int | None) -> None:
    """Raises ConfigError for what is wrong whatever the number of ranks."""
    if train is None and micro is None:
        raise ConfigError(NONE_GIVEN)
    _check_positive(train, micro, accumulation)
    each = (micro or 1) * (accumulation or 1)
    if train is not None and train % each:
        raise ConfigError(
            "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size for any number of ranks: "
            f"{each} does not divide {train}"
        )


def _check_positive(train: int | None, micro: int | None, accumulation: int | None) -> None:
    for name, value in (("Train batch size", train), ("Micro batch size per gpu", micro), ("Gradient accumulation steps", accumulation)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name}: {value} has to be greater than 0")
