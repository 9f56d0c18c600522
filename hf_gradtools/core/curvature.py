"""Curvature of a low-rank factorisation `ΔW = s·B·A`, seen from its rank space: pure functions on `R x R` factors.

Shape letters: M modules (any batch dimensions), R rank, K kept rank.

For a token with input `x` and output gradient `g`, the rank space sees `a = A x` and `b = s·Bᵀ g` (the gradient that
arrives at `a`). The two factors are their second moments, `activation = E[a aᵀ]` and `gradient = E[b bᵀ]`. K-FAC
(Martens & Grosse 2015, arXiv 1503.05671) for this parametrisation: `∂L/∂A = Σ b xᵀ` has `gradient` as its left Fisher
factor, `∂L/∂B = s Σ g aᵀ` has `activation` as its right one.

Everything is computed in float64 whatever the dtype of the arguments: the factors are small, and their spectra span
many orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


# The seed of GRIT raises the damping by these factors until the factorisation succeeds.
DAMPING_ESCALATION = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# Directions are kept apart from zero by this share of the mean eigenvalue, so that a change of basis can be undone.
SPECTRUM_FLOOR = 1e-10


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """`tr(factor) / R` as `[..., 1, 1]`, the unit of relative damping."""
    mean: Tensor = factor.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean[..., None, None]


def damped(factor: Tensor, damping: float) -> Tensor:
    """`factor / mean eigenvalue + damping · I`, in float64; `(1 + damping) · I` for a factor that is zero.

    The scale of the loss cancels, so one damping fits every module, batch size and loss scale.
    """
    factor = _symmetric(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    mean = mean_eigenvalue(factor)
    scaled = torch.where(mean == 0, identity, factor / mean.abs())
    return scaled + damping * identity


def damped_inverse(factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`damped(factor, damping)⁻¹` by Cholesky, with more damping where a matrix is not positive definite.

    Args:
        factor: `[..., R, R]`, symmetric.
        damping: relative to the mean eigenvalue.

    Returns:
        the inverses `[..., R, R]` in float64, and the damping that each of them took, `[...]`.

    Raises:
        torch.linalg.LinAlgError: a matrix stays indefinite at 300 times the damping, or is not finite.
    """
    flat = factor.reshape(-1, *factor.shape[-2:])
    inverse = torch.empty_like(flat, dtype=torch.float64)
    taken = torch.full((len(flat),), math.nan, dtype=torch.float64, device=factor.device)
    left = torch.arange(len(flat), device=factor.device)
    for times in DAMPING_ESCALATION:
        root, failed = torch.linalg.cholesky_ex(damped(flat[left], damping * times))
        good = (failed == 0) & root.isfinite().all(-1).all(-1)
        inverse[left[good]] = torch.cholesky_inverse(root[good])
        taken[left[good]] = damping * times
        left = left[~good]
        if not len(left):
            return inverse.view(factor.shape), taken.view(factor.shape[:-2])
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"{len(left)} of {len(flat)} factors are not positive definite at damping {damping * times:g}; "
        "raise kfac_damping, or look for non-finite activations"
    )


def inverse_power(factor: Tensor, damping: float, exponent: float) -> Tensor:
    """`damped(factor, damping)^-exponent`, `[..., R, R]` in float64."""
    values, vectors = _eigh(damped(factor, damping))
    powers = values.clamp_min(torch.finfo(values.dtype).tiny) ** -exponent
    return vectors * powers[..., None, :] @ vectors.mT


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[..., R]`, largest first and not negative, and eigenvectors `[..., R, R]` in columns, in float64.

    A factor that is zero has every basis; it gets the identity, which leaves an optimizer working in it alone.

    Raises:
        torch.linalg.LinAlgError: a factor is not finite.
    """
    factor = _symmetric(factor)
    values, vectors = _eigh(factor)
    vectors = vectors.flip(-1)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    vectors = torch.where(mean_eigenvalue(factor) == 0, identity, vectors)
    return values.flip(-1).clamp_min(0), vectors


def balanced_coordinates(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of the rank space in which both factors are the same diagonal matrix.

    Balanced truncation (Moore 1981) of the map `A` then `B` under its Fisher metric: replacing `a` by `P a` costs
    `½ tr(gradient (I-P) activation (I-P)ᵀ)` to second order, and among all `P` of rank K the cheapest keeps the first
    K of these coordinates. The spectrum does not depend on the gauge (`A → R A, B → B R⁻¹`).

    Args:
        activation: `E[a aᵀ]`, `[..., R, R]`.
        gradient: `E[b bᵀ]`, `[..., R, R]`.

    Returns:
        `left` `[..., R, R]`: new coordinates are `left @ a`, so `A' = left @ A`;
        `right` `[..., R, R]`, its inverse: `B' = B @ right`;
        `energies` `[..., R]`, largest first: eigenvalues of `activation @ gradient`; dropping a coordinate costs half.
        Of a factor that is zero the coordinates are those of the other one, and the energies zero.
    """
    activation_root, gradient_root = _root(activation), _root(gradient)
    u, singular, vt = torch.linalg.svd(gradient_root.mT @ activation_root)
    scale = singular.clamp_min(torch.finfo(singular.dtype).tiny).rsqrt()
    left = scale[..., :, None] * (u.mT @ gradient_root.mT)
    right = activation_root @ vt.mT * scale[..., None, :]
    alive = (mean_eigenvalue(activation) > 0) & (mean_eigenvalue(gradient) > 0)
    return left, right, singular.square() * alive[..., 0]


def truncation(method: str, activation: Tensor, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Matrices that cut an adapter to a smaller rank: `A' = left @ A`, `B' = B @ right`.

    Args:
        method: "balanced" loses least under the Fisher metric; "two_sided" projects `A` on the top eigenvectors of
            `activation` and `B` on those of `gradient`, each for itself (GRIT, arXiv 2601.00231, §3.3); "one_sided"
            projects both on those of `activation`.
        activation: `E[a aᵀ]`, `[..., R, R]`.
        gradient: `E[b bᵀ]`, `[..., R, R]`.
        rank: K.

    Returns:
        `left` `[..., K, R]` and `right` `[..., R, K]`, float64.
    """
    if method == "balanced":
        left, right, _ = balanced_coordinates(activation, gradient)
        return left[..., :rank, :], right[..., :rank]
    basis = eigenbasis(activation)[1][..., :rank]
    if method == "one_sided":
        return basis.mT, basis
    other = eigenbasis(gradient)[1][..., :rank]
    return basis.mT, other @ (other.mT @ basis)


def projectors(method: str, activation: Tensor, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same cut as :func:`truncation` in the shapes of old: `A ← left @ A`, `B ← B @ right`, both `[..., R, R]`."""
    if method == "two_sided":
        basis, other = (eigenbasis(factor)[1][..., :rank] for factor in (activation, gradient))
        return basis @ basis.mT, other @ other.mT
    left, right = truncation(method, activation, gradient, rank)
    return right @ left, right @ left


def energies(method: str, activation: Tensor, gradient: Tensor) -> Tensor:
    """The spectrum `[..., R]`, largest first, whose share decides the rank under `method`."""
    if method == "balanced":
        return balanced_coordinates(activation, gradient)[2]
    return eigenbasis(activation)[0]


def rank_for_energy(spectrum: Tensor, threshold: float, least: int) -> Tensor:
    """The smallest K whose first K values hold `threshold` of the sum, and at least `least`; `[...]` of `[..., R]`."""
    cumulative = spectrum.double().cumsum(-1)
    wanted = threshold * cumulative[..., -1:] * (1 - 1e-12)  # rounding must not cost a rank at threshold 1
    return ((cumulative < wanted).sum(-1) + 1).clamp(least, spectrum.shape[-1])


def ranks_for_total_energy(spectra: Sequence[Tensor], sizes: Sequence[int], threshold: float, least: int) -> list[int]:
    """Ranks of several layers that together hold `threshold` of the energy of all, for the fewest parameters.

    Directions are taken where they hold most energy per parameter first. Balanced energies, times the tokens that the
    layer sees, are costs in units of the loss, so those of different layers compare; spectra of one factor do not.

    Args:
        spectra: of each layer `[R]`, largest first, times its tokens.
        sizes: parameters that a direction of each layer has.
        threshold: in (0, 1].
        least: no layer gets fewer, if it has as many.
    """
    energy = torch.cat([spectrum.double() for spectrum in spectra])
    owner = torch.cat([torch.full((len(x),), i) for i, x in enumerate(spectra)])
    place = torch.cat([torch.arange(len(x)) for x in spectra])
    density = energy / torch.tensor(sizes, dtype=torch.float64)[owner]
    density[place < least] = torch.inf  # taken in any case
    order = density.argsort(descending=True, stable=True)
    kept = int(rank_for_energy(energy[order], threshold, int((place < least).sum())))
    ranks: list[int] = torch.bincount(owner[order[:kept]], minlength=len(spectra)).tolist()
    return ranks


def effective_rank(spectrum: Tensor) -> Tensor:
    """`exp` of the entropy of the normalised spectrum (Roy & Vetterli 2007), `[...]` of `[..., R]`."""
    spectrum = spectrum.double().clamp_min(0)
    shares = spectrum / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()


def graft(direction: Tensor, grad: Tensor) -> Tensor:
    """`direction` at the Frobenius norm of `grad`, matrix by matrix: the preconditioner turns, and does not scale."""
    size = torch.linalg.matrix_norm(grad, keepdim=True)
    grafted: Tensor = direction * (size / torch.linalg.matrix_norm(direction, keepdim=True).clamp_min(1e-30))
    return grafted


def _symmetric(factor: Tensor) -> Tensor:
    factor = factor.double()
    return (factor + factor.mT) / 2


def _root(factor: Tensor) -> Tensor:
    """`L` with `L Lᵀ = factor`, its spectrum floored; of a factor that is zero: the identity."""
    values, vectors = eigenbasis(factor)
    mean = values.mean(-1, keepdim=True)
    floored = torch.where(mean > 0, values.clamp_min(SPECTRUM_FLOOR * mean), 1.0)
    return vectors * floored.sqrt()[..., None, :]


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(factor)
    if not values.isfinite().all():  # LAPACK answers NaN with NaN
        reason = "a factor is not finite; look for non-finite activations or gradients"
        raise torch.linalg.LinAlgError(reason)  # type: ignore[attr-defined]
    return values, vectors
