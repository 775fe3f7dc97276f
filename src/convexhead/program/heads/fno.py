"""Fourier neural operator: tokens are mixed by a circular convolution over the grid, summed over channels.

    mix(X, U) = σ(circ(X) vec(U)),   (circ(X) vec(U))[a] = Σ_t X[(a − t) mod grid] · U[t]        U (s, d),  v (1, c)

The convex program lives on ``Z (s·d, c)``. By the FFT over the grid the convolution is a product at every
frequency ω: ``Â[ω] = X̂[ω] · Û[ω]``, and its adjoint in ``U`` is ``conj(X̂[ω]) Â[ω]``. With mean pooling and a linear
activation every shift has the same mean, so the head sees the mean token alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexhead.program.heads.base import Data, Head


class FNO(Head):
    """``U (s, d)``, ``v (1, c)``; scores ``q = 1``."""

    name = "fno"
    reads_grid = True
    kept_gates = 8  # each takes about the memory of the spectrum
    least_batch = 512  # fewer samples would not repay the transforms of U

    def __init__(self, n_tokens: int, n_channels: int, **options: object) -> None:
        super().__init__(n_tokens, n_channels, **options)  # type: ignore[arg-type]
        self.mixing_shape = (self.s, self.d)
        self.value_rows = 1
        h, w = self.grid
        self.fft_grid = (1, h) if w == 1 else (h, w)  # the real FFT halves the last axis

    def mix_bound(self, norms: Tensor) -> Tensor:
        # Each of the s rows of circ(X) has the norm of X; a mean over them takes back the root.
        return super().mix_bound(norms) * math.sqrt(self.s)

    @property
    def score_width(self) -> int:
        return 1

    def prepare_linear(self, X: Tensor, *, reuse: bool) -> Data:
        if self.pool == "mean":
            return {"queries": self.pool_tokens(X)}
        if self.pool == "cls":
            return {"shifted": self._reverse(X)}
        return self.prepare(X)

    def linear_mix(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        if self.pool == "mean":
            return (data["queries"] @ U.sum(1).T).unsqueeze(-1)
        if self.pool == "cls":
            return (data["shifted"].flatten(1) @ U.flatten(1).T)[:, None, :, None]
        return self.preactivation(data, U, group).transpose(1, 2)

    def linear_mix_adjoint(self, data: Data, T: Tensor, group: Tensor) -> Tensor:
        if self.pool == "mean":
            u = torch.einsum("brk,brd->kd", T.squeeze(-1), data["queries"])
            return u.unsqueeze(1).expand(-1, self.s, -1)
        if self.pool == "cls":
            return (T[:, 0, :, 0].T @ data["shifted"].flatten(1)).view(-1, *self.mixing_shape)
        return self.preactivation_adjoint(data, T.transpose(1, 2), group)

    def prepare(self, X: Tensor) -> Data:
        return {"spectrum": self._fft(X)}

    # An inverse transform of few tokens is faster as a product with its matrix, which takes all atoms and samples.
    def preactivation(self, data: Data, U: Tensor, group: Tensor) -> Tensor:
        product = self._products(data, U)
        A = self._transform(U).T @ product.flatten(1)
        return A.view(self.p, *product.shape[1:]).permute(2, 1, 0).unsqueeze(-1)

    def preactivation_adjoint(self, data: Data, A: Tensor, group: Tensor) -> Tensor:
        b, k = A.shape[:2]
        weighted = self._transform(A) @ A.squeeze(-1).permute(2, 1, 0).reshape(self.p, -1)
        return self._products_adjoint(data, weighted.view(-1, k, b))

    def workspace(self, k: int) -> int:
        return k * self.s

    # Files take no complex numbers, and a CPU has no transform in half precision. With the real transforms
    # c[ω] = Σ_t cos(ω·t) x[t] and s[ω] = Σ_t sin(ω·t) x[t], c + s is Hartley's transform (its own inverse but for 1/s)
    # and that of the convolution is (c + s)_X c_U + (c − s)_X s_U.
    def network_linear_mix(self, X: Tensor, U: Tensor, group: Tensor) -> Tensor:
        if self.pool == "none":
            return self.network_preactivation(X, U, group).transpose(1, 2)
        return super().network_linear_mix(X, U, group)

    def network_preactivation(self, X: Tensor, U: Tensor, group: Tensor) -> Tensor:
        (c, s), (c_U, s_U) = self._cosine_and_sine(X), self._cosine_and_sine(U)
        A = torch.einsum("bfd,kfd->bkf", c + s, c_U) + torch.einsum("bfd,kfd->bkf", c - s, s_U)
        c, s = self._cosine_and_sine(A.unsqueeze(-1))
        return (c + s)[:, :, : self.p] / self.s

    def _cosine_and_sine(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Real transforms over the grid, ``(..., s, d) -> (..., s, d)`` each: first along columns, then along rows."""
        (h, w), d = self.grid, X.shape[-1]
        c, s = (part.to(X) @ X.unflatten(-2, (h, w)).flatten(-2) for part in _waves(h))
        C, S = (part.to(X) for part in _waves(w))
        c, s = c.unflatten(-1, (w, d)), s.unflatten(-1, (w, d))
        return (C @ c - S @ s).flatten(-3, -2), (C @ s + S @ c).flatten(-3, -2)

    # Pooled rows of D ⊙ circ(X), for few gates: φ[t] = Σ_a P_a D_a X[(a − t) mod grid] = Σ_q P_{q+t} D_{q+t} X[q].
    def gated_features(self, data: Data, masks: Tensor) -> Tensor | None:
        b, j = masks.shape[:2]
        if self.r > 1:
            return None
        weights = masks.squeeze(-1) / self.s if self.pool == "mean" else masks.squeeze(-1)
        weights = torch.cat([weights, weights.new_zeros(b, j, self.s - self.p)], dim=2)
        h, w = self.fft_grid
        row, column = (part.flatten() for part in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        sums = (row.unsqueeze(1) + row) % h * w + (column.unsqueeze(1) + column) % w  # q + t mod grid
        X = self._inverse_fft(data["spectrum"])
        return (weights[:, :, sums].flatten(1, 2) @ X).view(b, j, -1)

    # With one pooled output Parseval's sum over frequencies pools: P (D ⊙ circ(X) vec(U)) = Σ_a P_a D_a A_a =
    # (1/s) Σ_ω Re(conj(Ê[ω]) X̂[ω] · Û[ω]) for E = P D. One real product a frequency serves all gates.
    def gate(self, data: Data, masks: Tensor) -> Tensor:
        if self.r > 1:
            return masks
        D = masks.squeeze(-1).transpose(0, 1)  # (j, b, p)
        transform = self._transform(D) / (self.s if self.pool == "mean" else 1)
        return (transform @ D.reshape(-1, self.p).T).view(-1, *D.shape[:2])  # (f·2, j, b)

    def gated_mix(self, data: Data, U: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if self.r > 1:
            return super().gated_mix(data, U, group, gated, which)
        return (self._products(data, U) * gated.index_select(1, which)).sum(0).T[:, None, :, None]

    def gated_mix_adjoint(self, data: Data, T: Tensor, group: Tensor, gated: Tensor, which: Tensor) -> Tensor:
        if self.r > 1:
            return super().gated_mix_adjoint(data, T, group, gated, which)
        return self._products_adjoint(data, gated.index_select(1, which) * T[:, 0, :, 0].T)

    def _products(self, data: Data, U: Tensor) -> Tensor:
        """Real and imaginary parts of ``X̂ Û`` in turn, ``(f·2, k, b)``, weighted for Parseval's sum."""
        conjugate = (self._fft(U) * self._parseval(U).unsqueeze(1)).conj()
        # Inner products of (Re X̂, Im X̂) with (Re Û, −Im Û) and (Im Û, Re Û)
        weights = torch.view_as_real(torch.stack([conjugate, 1j * conjugate]).permute(2, 0, 1, 3))
        product = torch.bmm(weights.reshape(len(weights), 2 * len(U), -1), self._real(data).permute(1, 2, 0))
        return product.view(-1, len(U), len(data["spectrum"]))

    def _products_adjoint(self, data: Data, weighted: Tensor) -> Tensor:
        """Adjoint of `_products` in ``U``, but for Parseval's weights: ``weighted (f·2, k, b)`` was made without."""
        spectrum = self._real(data).transpose(0, 1)  # (f, b, d·2)
        k, b = weighted.shape[1:]
        parts = torch.bmm(weighted.reshape(len(spectrum), -1, b), spectrum).view(len(spectrum), 2, k, self.d, 2)
        parts = torch.view_as_complex(parts).conj()
        return self._inverse_fft((parts[:, 0] + 1j * parts[:, 1]).transpose(0, 1))

    def _transform(self, like: Tensor) -> Tensor:
        """``(f·2, p)``: real and imaginary parts, in turn, of the transform of every token that pooling reads."""
        transform = self._fft(torch.eye(self.s, dtype=like.dtype, device=like.device))[:, : self.p]
        return torch.view_as_real(transform).transpose(1, 2).reshape(-1, self.p)

    def _real(self, data: Data) -> Tensor:
        """``(b, f, d·2)``: real and imaginary parts in turn."""
        return torch.view_as_real(data["spectrum"]).flatten(2)

    def _parseval(self, like: Tensor) -> Tensor:
        """Weights ``(f,)`` that make sums over the half spectrum inner products over tokens."""
        h, w = self.fft_grid
        twice = torch.full((w // 2 + 1,), 2.0 / self.s, dtype=like.dtype, device=like.device)
        twice[0] /= 2  # its own conjugate
        if w % 2 == 0:
            twice[-1] /= 2
        return twice.repeat(h)

    def _reverse(self, X: Tensor) -> Tensor:
        """``X[−t mod grid]`` for every shift ``t``: row 0 of ``circ(X)``."""
        lattice = X.reshape(-1, *self.fft_grid, X.shape[-1])
        return lattice.flip(1, 2).roll((1, 1), (1, 2)).reshape(X.shape)

    def _fft(self, X: Tensor) -> Tensor:
        """Real FFT over the grid: ``(..., s, d) -> (..., f, d)`` complex."""
        lattice = X.reshape(*X.shape[:-2], *self.fft_grid, X.shape[-1])
        return torch.fft.rfft2(lattice, dim=(-3, -2)).flatten(-3, -2)

    def _inverse_fft(self, spectrum: Tensor) -> Tensor:
        lattice = spectrum.reshape(*spectrum.shape[:-2], self.fft_grid[0], -1, spectrum.shape[-1])
        return torch.fft.irfft2(lattice, s=self.fft_grid, dim=(-3, -2)).flatten(-3, -2)


def _waves(n: int) -> tuple[Tensor, Tensor]:
    """``cos(2π ω t / n)`` and ``sin(2π ω t / n)``, both ``(n, n)`` in float64."""
    t = torch.arange(n, dtype=torch.float64)
    angles = torch.outer(t, t).remainder(n) * (2 * math.pi / n)
    return angles.cos(), angles.sin()
