"""Orthonormal Hadamard matrices of every order that Sylvester's and Paley's constructions reach.

A Hadamard matrix of order n has entries ±1 and orthogonal rows; divided by √n it is a rotation that
spreads one large channel over all n. Orders are built as Kronecker products of

- Sylvester's matrix of order 2,
- Paley I:  order q + 1     for a prime power q ≡ 3 (mod 4),
- Paley II: order 2 (q + 1) for a prime power q ≡ 1 (mod 4)

(R. E. A. C. Paley, "On orthogonal matrices", 1933). That covers the widths of current language models
whose odd part needs it: 576 = 16·36, 1536 = 128·12, 14336 = 512·28, 18944 = 128·148, 11008 = 32·344.
"""

from __future__ import annotations

from functools import cache
from math import gcd, isqrt, prod, sqrt

import torch
from torch import Tensor

from mxfx.ground.errors import MxfxError

#: Blocks of a lower order spread too little to be worth a transform, unless they are asked for.
LEAST_ORDER = 8
#: Up to this order one product with the whole matrix is no slower than two with factors of it.
DENSE_ORDER = 128


class HadamardError(MxfxError, ValueError):
    """No Hadamard matrix of the asked order can be constructed here."""


def hadamard_factors(order: int) -> tuple[int, ...]:
    """Orders of the Kronecker factors that build `order`, Paley factors first, then twos.

    Of all factorizations the one with the smallest sum is taken: it costs the fewest operations.

    Raises:
        HadamardError: no product of known orders gives `order`; names the nearest orders and the
            largest divisors that work as a block size.
    """
    factors = _factorize(order) if order >= 1 else None
    if factors is None:
        raise HadamardError(_unreachable(order))
    return factors


def has_hadamard(order: int) -> bool:
    """Whether `hadamard_matrix(order)` exists here."""
    return order >= 1 and _factorize(order) is not None


def fitting_order(width: int, wanted: int = 0) -> int | None:
    """The order of Hadamard blocks on an axis: `wanted` if it fits, else the largest that divides it and the axis.

    0 wants the whole axis. None: no order from `LEAST_ORDER` on fits.
    """
    top = gcd(width, wanted)
    least = min(LEAST_ORDER, wanted or LEAST_ORDER)
    return next((d for d in range(top, least - 1, -1) if top % d == 0 and has_hadamard(d)), None)


def orders_near(width: int, wanted: int) -> tuple[int, ...]:
    """The orders that blocks on an axis may take: `wanted` alone if it fits, else all that divide the axis and lie
    between half and twice of it, and the `fitting_order`.

    A transform that is fitted to an axis need not keep within the blocks of a format, as `fitting_order` does.
    Empty: no order fits.
    """
    fitting = fitting_order(width, wanted)
    near = () if not wanted or fitting == wanted else range(-(-wanted // 2), 2 * wanted + 1)
    orders = {d for d in near if width % d == 0 and d >= LEAST_ORDER and has_hadamard(d)}
    return tuple(sorted(orders | ({fitting} if fitting else set())))


def order_words(width: int, wanted: int, *orders: int) -> str:
    """`orders`, with the reason where they are others than was `wanted`."""
    order = " or ".join(map(str, orders))
    if orders == (wanted or width,):
        return order
    reason = f"{wanted} does not divide {width}" if wanted and width % wanted else f"no matrix of {wanted or width}"
    return f"{order} ({reason})"


def hadamard_matrix(order: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal Hadamard matrix `(order, order)`: H Hᵀ = I.

    A power of two gives Sylvester's symmetric matrix in natural order.

    Raises:
        HadamardError: see `hadamard_factors`.
    """
    return (_product(hadamard_factors(order), torch.float64, device) / sqrt(order)).to(dtype)


def kronecker_orders(order: int) -> tuple[int, int]:
    """(a, b) such that the matrix of `order` = a·b is a Kronecker product of one of order a and one of order b.

    Of all such pairs the one of least sum: x H costs `order` multiplications an entry, Aᵀ X B on `(…, a, b)` a + b.
    Up to `DENSE_ORDER` a is 1.

    Raises:
        HadamardError: see `hadamard_factors`.
    """
    left, right = _halves(order)
    return prod(left), prod(right)


def kronecker_signs(
    order: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The ±1 matrices A `(a, a)` and B `(b, b)` of `kronecker_orders`: `hadamard_matrix(order)` is A ⊗ B / √order."""
    left, right = _halves(order)
    return _product(left, dtype, device), _product(right, dtype, device)


def hadamard_transform(x: Tensor, block: int | None = None) -> Tensor:
    """`x @ blockdiag(H, …, H)` along the last axis, H the orthonormal matrix of order `block`.

    Computes in float32 or better and returns the dtype of `x`; see `kronecker_transform`.

    Args:
        x: `(…, n)`.
        block: order of H; must divide n. None takes the whole axis.

    Raises:
        ValueError: `block` does not divide n.
        HadamardError: there is no matrix of that order.
    """
    width = x.shape[-1]
    block = width if block is None else block
    if block < 1 or width % block:
        raise ValueError(
            f"hadamard_transform: block {block} does not divide the last axis of {tuple(x.shape)}; "
            f"blocks that do: {_block_sizes(width)}"
        )
    compute = torch.promote_types(x.dtype, torch.float32)
    return kronecker_transform(x, *kronecker_signs(block, compute, x.device))


def kronecker_transform(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x @ blockdiag(A ⊗ B, …) / √(ab)` along the last axis for ±1 matrices A `(a, a)` and B `(b, b)`.

    The ±1 factors are applied one after the other, each as a matmul in their dtype, and scaled once at the end, so
    that the only rounding is the summation's. Shape and dtype of `x`.
    """
    a, b = left.shape[-1], right.shape[-1]
    # kron(A, B) acts on (…, a, b) as Aᵀ on the rows, then B on the columns.
    y = x.to(right.dtype).unflatten(-1, (-1, a, b)) @ right
    if a > 1:
        y = left.mT @ y
    return (y.flatten(-3) * (1.0 / sqrt(a * b))).to(x.dtype)


def random_signs(
    n: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """`n` random signs ±1, shape `(n,)`; drawn on the CPU, so a seed means the same on every device."""
    bits = torch.randint(0, 2, (n,), generator=generator)
    return (2 * bits - 1).to(dtype=dtype, device=device)


@cache
def _halves(order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`hadamard_factors` cut in two, where the orders of both parts have the least sum; not cut up to `DENSE_ORDER`."""
    factors = hadamard_factors(order)
    last = len(factors) if order > DENSE_ORDER else 0
    cuts = [(factors[:at], factors[at:]) for at in range(last + 1)]
    return min(cuts, key=lambda cut: prod(cut[0]) + prod(cut[1]))


def _product(factors: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """The Kronecker product of ±1 matrices of these orders."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    for factor in factors:
        matrix = torch.kron(matrix, _signs(factor, dtype, device))
    return matrix


def _signs(order: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """The ±1 matrix of order 2 or of a Paley order."""
    rows = [[1, 1], [1, -1]] if order == 2 else _paley(order)
    return torch.tensor(rows, dtype=dtype, device=device)


@cache
def _factorize(order: int) -> tuple[int, ...] | None:
    """The cheapest Kronecker factorization, or None. Paley orders first, twos last."""
    if order == 1:
        return ()
    best: tuple[int, ...] | None = None
    for first in _divisors(order):
        rest = _factorize(order // first) if first > 1 and _is_primitive(first) else None
        if rest is not None and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
    return None if best is None else tuple(sorted(best, key=lambda factor: (factor == 2, factor)))


def _is_primitive(order: int) -> bool:
    if order == 2:
        return True
    return order % 4 == 0 and order & (order - 1) != 0 and _paley_field(order) is not None


def _paley_field(order: int) -> tuple[int, int] | None:
    """The field (p, k) of pᵏ elements behind a Paley matrix of that order; Paley I is preferred."""
    first = _prime_power(order - 1)
    if first is not None and (order - 1) % 4 == 3:
        return first
    q = order // 2 - 1
    second = _prime_power(q)
    return second if second is not None and q % 4 == 1 else None


@cache
def _paley(order: int) -> list[list[int]]:
    """The ±1 rows of the Paley matrix of that order."""
    field = _paley_field(order)
    if field is None:
        raise HadamardError(_unreachable(order))
    q = field[0] ** field[1]
    jacobsthal = _jacobsthal(*field)
    if order == q + 1:
        # Paley I: I + S with S the skew conference matrix.
        top = [[1] * order]
        return top + [[-1] + [jacobsthal[i][j] + (i == j) for j in range(q)] for i in range(q)]
    conference = [[0] + [1] * q] + [[1] + jacobsthal[i] for i in range(q)]
    # Paley II: C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]].
    rows: list[list[int]] = []
    for i, line in enumerate(conference):
        rows.append([value for j, c in enumerate(line) for value in (c + (i == j), c - (i == j))])
        rows.append([value for j, c in enumerate(line) for value in (c - (i == j), -c - (i == j))])
    return rows


def _jacobsthal(p: int, k: int) -> list[list[int]]:
    """χ(a - b) over the field of pᵏ elements; an element is the integer of its base-p digits."""
    q = p**k
    character = _quadratic_character(p, k)
    digits = [[(value // p**i) % p for i in range(k)] for value in range(q)]

    def difference(a: int, b: int) -> int:
        return sum(((x - y) % p) * p**i for i, (x, y) in enumerate(zip(digits[a], digits[b], strict=True)))

    return [[character[difference(a, b)] for b in range(q)] for a in range(q)]


def _quadratic_character(p: int, k: int) -> list[int]:
    """+1 for squares, -1 for non-squares, 0 for zero, indexed by element.

    The first monic polynomial under which x generates all q - 1 units is primitive; xⁱ is then a
    square exactly for even i.
    """
    q = p**k
    for low in range(1, q):
        modulus = [(low // p**i) % p for i in range(k)]
        units = _powers_of_x(p, modulus, q - 1)
        if len(units) == q - 1:
            character = [0] * q
            for i, unit in enumerate(units):
                character[unit] = -1 if i % 2 else 1
            return character
    raise AssertionError(f"a field of {p}^{k} elements has a primitive polynomial")


def _powers_of_x(p: int, modulus: list[int], limit: int) -> list[int]:
    """1, x, x², … modulo xᵏ - Σ modulus[i]·xⁱ, until a power repeats or vanishes."""
    k = len(modulus)
    power = [1] + [0] * (k - 1)
    seen: dict[int, None] = {}
    while len(seen) <= limit:
        value = sum(digit * p**i for i, digit in enumerate(power))
        if value in seen or value == 0:
            break
        seen[value] = None
        carry = power[-1]
        power = [(digit + carry * m) % p for digit, m in zip([0, *power[:-1]], modulus, strict=True)]
    return list(seen)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = pᵏ and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _block_sizes(width: int) -> list[int]:
    """The largest divisors of `width`, at most eight, that have a Hadamard matrix."""
    return [d for d in reversed(_divisors(width)) if has_hadamard(d)][:8] if width >= 1 else []


def _unreachable(order: int) -> str:
    if order < 1:
        return f"a Hadamard matrix needs a positive order, got {order}"
    below = next(n for n in range(order - 1, 0, -1) if has_hadamard(n)) if order > 1 else 1
    above = next(n for n in range(order + 1, 4 * order + 4) if has_hadamard(n))
    return (
        f"no Hadamard matrix of order {order} by Sylvester's or Paley's construction; nearest orders "
        f"{below} and {above}; block sizes that divide {order}: {_block_sizes(order)}"
    )
