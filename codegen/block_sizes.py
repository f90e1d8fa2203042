"""Block sizes of a kernel from the sizes of its space, by a small model of a GPU: registers bound the block, programs should outnumber the multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass, replace

REGISTERS = 1 << 16  # 32-bit ones of a multiprocessor
HELD = 3 * REGISTERS // 4  # numbers of 32 bits that a program may hold: the rest is for addresses, masks and what is under way
A_THREAD = 192  # of the 255 registers of a thread those that may hold numbers of a block
PROGRAMS = 256  # of a reduction in two stages: about two for each multiprocessor
UNIT = 16  # rows and columns that a matrix unit multiplies at least: a compiler refuses fewer in 16 bits


@dataclass(frozen=True)
class Blocks:
    """``x`` rows and ``r`` columns of a block, ``warps`` of a program; ``rows``: of a program that loops over blocks. ``reduced``: along r. ``k``: of a product, what
    one step contracts; ``least``: of x and r."""

    x: int
    r: int
    warps: int
    rows: int = 0
    reduced: bool = False
    k: int = 0
    least: int = 1


def power(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def longest_row(live: int) -> int:
    """Elements of the longest row of which a program can hold ``live`` values each, a power of two."""
    return max(1, power(HELD // live + 1) // 2)


def block_sizes(x: int, r: int, live: int, *, rows: bool, reduced: bool, partial: bool) -> Blocks:
    """``x`` and ``r``: sizes of the two axes; ``live``: values that are held at once, of 32 bits an element.

    A row that is reduced stays in registers where ``live`` of it fit.
    """
    if not rows:
        size = min(1024, max(power(x), 16))
        return Blocks(size, 1, max(1, min(4, size // 128)), _share(x, size) if partial else 0)
    longest = longest_row(live)
    r_block = min(power(r), longest if reduced else 1024)
    if reduced and r_block < r:
        r_block = min(r_block, 2048)
    warps = 16 if r_block > 4096 else max(1, min(8, r_block // 256))
    x_block = 1
    while x_block * r_block < 1024 and x_block < power(x):
        x_block *= 2
    warps = max(warps, min(4, x_block * r_block // 256))
    return Blocks(x_block, r_block, warps, _share(x, x_block) if partial else 0, reduced)


def _share(x: int, block: int) -> int:
    """Rows of a program, whole blocks of them."""
    each = -(-x // PROGRAMS)
    return -(-each // block) * block


def product_sizes(m: int, n: int, k: int, bytes_each: int, live: int = 1) -> Blocks:
    """Of a matrix product [m, k] [k, n]: 128 by 128 where that leaves a program for each multiprocessor, less where it does not; a step of the contraction holds 128 bytes a row.
    ``live``: values of the block that what follows holds at once: half the block for as many warps where a thread has no registers for them."""
    x, r = (128, 128) if bytes_each < 4 else (64, 64) if bytes_each == 4 else (32, 32)
    while max(x, r) > 32 and -(-m // x) * -(-n // r) < PROGRAMS // 2:
        x, r = (x // 2, r) if x >= r else (x, r // 2)
    x, r = max(UNIT, min(x, power(m))), max(UNIT, min(r, power(n)))
    warps = max(1, min(8, x * r // 2048) if bytes_each < 4 else max(2, min(8, x * r // 1024)))  # without matrix units a thread holds whole rows of the operands
    while live * x * r * max(1, bytes_each // 4) > A_THREAD * 32 * warps and max(x, r) > 32:
        x, r = (x, r // 2) if r >= x else (x // 2, r)
    return Blocks(x, r, warps, k=max(UNIT, min(128 // bytes_each, power(k))), least=UNIT)


def attention_sizes(queries: int, keys: int, features: int, bytes_each: int, kernel: str) -> Blocks:
    """Queries (x) and keys (r) of a block, whose features are whole: as many as leave all that a thread holds in registers on sm_80, sm_90 and gfx942 for heads of
    up to 128, where queries see keys up to their own and blocks are whole; masks of a last block, or keys that all see, can cost a few numbers more. Without matrix units
    (float32 on NVIDIA) a thread holds whole rows of the operands: eight warps share a small block."""
    room = -(-features // 128)  # a block has a power of two of them
    if kernel == "attend":
        x, r = (128 // room, 64 // room) if bytes_each < 4 else (64 // room, 32 // room)
    elif bytes_each < 4:
        x, r = 64 // room, 32 // room
    else:
        x, r = (32, 32) if features <= 64 else (16, 16) if kernel == "for_keys" or room > 1 else (32, 16)
    if bytes_each > 4:
        x, r = x // 2, r // 2
    warps = 8 if bytes_each >= 4 or (kernel == "attend" and features > 64 and x * r >= 4096) else 4
    return Blocks(max(UNIT, min(x, power(queries))), max(UNIT, min(r, power(keys))), warps, least=UNIT)


def head_sizes(queries: int, keys: int, features: int, bytes_each: int) -> Blocks | None:
    """Of attention's backward where a program has all keys of a head at once, and goes through all ``queries`` of the heads that share it. None where its registers do not hold them on
    sm_80, sm_90 and gfx942 (8 KiB of keys in 16 bits, of 64 features 64; 4 KiB in 32 and 64; where a bias is of grouped heads, or keys are no power of two, some cost up to 20 bytes a thread), and where queries are so many that programs of their own are sooner done with them."""
    most = (8192 if bytes_each == 2 else 4096) // (bytes_each * power(max(features, 32)))
    if keys > most or most < UNIT or queries > 512:
        return None
    return Blocks(UNIT, max(UNIT, power(keys)), 4 if bytes_each == 2 else 8, least=UNIT)


def chunk_size(elements: int) -> int:
    """Elements of a program that works on one of many tensors: as many as leave four programs a multiprocessor, between 1024 and 65536."""
    return max(1024, min(1 << 16, power(elements // (2 * PROGRAMS))))


def candidates(b: Blocks) -> tuple[Blocks, ...]:
    """What is worth a try on a device: the model's blocks first, then half and twice the rows or the warps. A row that is held whole stays whole."""
    out = [b]
    if b.k:
        shapes = ((2 * b.x, b.r), (b.x, 2 * b.r), (b.x // 2, b.r), (b.x, b.r // 2))
        return (b, *(replace(b, x=x, r=r) for x, r in shapes if b.least <= min(x, r) and max(x, r) <= 256), *(replace(b, warps=w) for w in (b.warps // 2, 2 * b.warps) if 1 <= w <= 8), replace(b, k=2 * b.k))
    for x, warps in ((b.x, 2 * b.warps), (b.x, b.warps // 2), (2 * b.x, b.warps), (b.x // 2, b.warps), (2 * b.x, 2 * b.warps)):
        if x >= b.least and warps and warps <= 16 and not (b.rows and b.rows % x):
            out.append(replace(b, x=x, warps=warps))
    return tuple(out)
