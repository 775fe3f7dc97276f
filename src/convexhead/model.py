"""What was trained: a head with its weights, what its numbers mean, and its certificate."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from convexhead import inputs, model_folder
from convexhead.certificate.certificate import Certificate
from convexhead.errors import FileFormatError, InputError, warn
from convexhead.model_format import described, restored
from convexhead.modules import HeadModule
from convexhead.padding import Padded, with_lengths
from convexhead.program.activations import Activation, make_activation
from convexhead.program.atoms import Atoms
from convexhead.program.blocks import blocks_of
from convexhead.program.heads import Head
from convexhead.program.operator import Operator
from convexhead.runtime.stored_tokens import CHUNK_BYTES, chunk_rows, read_ahead
from convexhead.runtime.surroundings import undisturbed
from convexhead.spec import Spec
from convexhead.tokens.reduce import Reduction
from convexhead.tokens.store.origin import TokenOrigin

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Model:
    """A trained head: ``f_i = P Σ_k mix(X_i, U_k) V_k + b``. Its arrays are not to be changed.

    Attributes
    ----------
    spec : Spec
        The settings that it was trained with.
    head : Head
        How it mixes tokens, with the shape of these.
    gates : Tensor (J, \\*gate_shape) or None
        Of the gated ReLU.
    atoms : Atoms
        Weights, float64 on the CPU, block after block.
    beta, beta_max : float
        The weight of the penalty, and the smallest one at which the optimum is zero.
    certificate : Certificate or None
        How far from the optimum it is, at most; None where nothing was proven.
    history : list of dict
        Rows of `convexhead.solvers.monitor.Progress`.
    stop_reason : str
        Why the training ended, in words.
    optimizer : str or None
        What trained it the usual way, as a `TrainingResult` says it; None of a head that a convex solver trained.
    classes : ndarray (c,) or None
        The label of each output; None of a regressor.
    target_shape : tuple of int
        Of one sample's target, for a regressor.
    feature_names : ndarray (d,) or None
        The columns of a table that it was trained on.
    origin : TokenOrigin or None
        How the tokens of the store that it was trained on were made; None for arrays.
    reduction : Reduction or None
        What those tokens were read through.
    any_length : bool
        Whether it was trained on samples of different numbers of tokens, and takes such.
    """

    spec: Spec
    head: Head
    gates: Float[Tensor, "J ..."] | None
    atoms: Atoms
    beta: float
    beta_max: float
    certificate: Certificate | None
    history: list[dict[str, float]]
    stop_reason: str
    optimizer: str | None = None
    classes: NDArray[Any] | None = None
    target_shape: tuple[int, ...] = ()
    feature_names: NDArray[Any] | None = None
    origin: TokenOrigin | None = None
    reduction: Reduction | None = None
    any_length: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: copies make their views anew, and read-only."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    # -- its parts, as users see them ---------------------------------------------------------------------------------
    @cached_property
    def activation(self) -> Activation:
        """The activation over this head and these gates."""
        return make_activation(self.spec.activation, self.head, self.gates)

    @property
    def queries(self) -> Float[Tensor, "J m"] | None:
        """Of the attentive head; None of the others."""
        return self.head.queries

    @property
    def n_outputs(self) -> int:
        """``c``."""
        return self.atoms.V.shape[2]

    @cached_property
    def coef(self) -> Array | None:
        """``W (d, c)`` of the linear head; None of the others."""
        return None if self.head.learns_mixing else read_only(self.atoms.V[0].numpy())

    @cached_property
    def mixing(self) -> list[Array] | None:
        """``U`` of each block, ``(k, *mixing_shape)``; None of the linear head."""
        return None if self._blocks is None else self._blocks[0]

    @cached_property
    def values(self) -> list[Array] | None:
        """``V`` of each block, ``(k, e, c)``; None of the linear head."""
        return None if self._blocks is None else self._blocks[1]

    @cached_property
    def _blocks(self) -> tuple[list[Array], list[Array]] | None:
        if not self.head.learns_mixing:
            return None
        mixing, values = blocks_of(self.head, self.atoms, self.activation.n_blocks)
        return [read_only(U) for U in mixing], [read_only(V) for V in values]

    @cached_property
    def singular_values(self) -> list[Array]:
        """Of each block's ``Z_j``, falling; of a ReLU ``‖U_k‖‖V_k‖``."""
        if self.coef is not None:
            return [np.asarray(np.linalg.svd(self.coef, compute_uv=False), np.float64)]
        assert self.mixing is not None
        return [np.square(U).reshape(len(U), self.head.mixing_size).sum(1) for U in self.mixing]

    @property
    def class_names(self) -> list[str] | None:
        """The names of ``classes``, of a head that was trained on a store with the store's labels; else None."""
        if self.classes is None or self.origin is None or self.origin.class_names is None:
            return None
        return [self.origin.class_names[int(label)] for label in self.classes]

    # -- using it -----------------------------------------------------------------------------------------------------
    @undisturbed()
    def outputs(self, X: Any, *, device: str | None = None) -> Float[Array, "n r c"]:
        """``f`` of every sample, in float64.

        Parameters
        ----------
        X : array, memmap, tensor or split of a TokenStore, (n, s, d) or (n, d); `Padded`
        device : str or None
            Where to compute; None: where it was trained. What was trained on a GPU may be used where there is none.
        """
        where = inputs.pick_device((device or self.spec.device) if torch.cuda.is_available() else "cpu")
        atoms, parts = self.atoms.to(where, torch.float64), []
        X = with_lengths(self.as_fitted_on(X))
        if self.any_length or isinstance(X, Padded):
            return self._outputs_of_any_length(X, atoms, where)
        for chunk in inputs.token_chunks(X, n_channels=self.head.d, n_tokens=self.head.s):
            operator = Operator(chunk, self.head, self.activation, device=where, reuse=False)
            parts.append(operator.outputs(atoms).cpu().numpy())
        return np.concatenate(parts)

    def _outputs_of_any_length(self, X: Any, atoms: Atoms, where: torch.device) -> Float[Array, "n r c"]:
        if not self.any_length:
            raise InputError(
                f"this head was fitted on samples of {self.head.s} tokens each: fit one on samples of different "
                "numbers of tokens"
            )
        if not isinstance(X, Padded):
            tokens = inputs.as_tokens(X, n_channels=self.head.d)
            X = Padded(tokens, np.ones(tokens.shape[:2], bool))
        head = self.head.of_length(X.tokens.shape[1])
        if X.tokens.shape[2] != self.head.d:
            raise InputError(f"X has {X.tokens.shape[2]} features, but this head was fitted with {self.head.d}")
        activation, parts = make_activation(self.spec.activation, head, self.gates), []
        tokens = X.scaled(head)
        for _, chunk in read_ahead(tokens, chunk_rows(tokens, CHUNK_BYTES["cpu"])):
            parts.append(Operator(chunk, head, activation, device=where, reuse=False).outputs(atoms).cpu().numpy())
        return np.concatenate(parts)

    def as_fitted_on(self, X: Any) -> Any:
        """Tokens as this head takes them: of a split of a store the view that it must read, all else unchanged.

        A head reads another store's tokens as they were stored, through the reduction that it was fitted behind, and
        the labels by the names of its own classes.

        Raises
        ------
        InputError
            The store's tokens are made otherwise than those that the head was fitted on.

        Warns
        -----
        UserWarning
            The head was fitted on arrays, or by an early version: nothing tells how its tokens were made.
        """
        X = inputs.resolve_store(X)
        if not hasattr(X, "read_as"):
            return X
        if self.origin is not None:
            return X.read_as(self.origin)
        known = "this head was fitted on arrays, which do not say how their tokens were made"
        if self.reduction is not None:
            known = "this head was saved by an earlier version, which did not keep how its tokens were made"
            if X.reduction is None or X.reduction.identity != self.reduction.identity:
                raise InputError(
                    f"{known}, and the reduction that it was fitted behind is not that of {X!r}: fit it again"
                )
        warn(f"{known}: that {X!r} holds such tokens is taken on trust, and its classes are matched by number")
        return X

    def as_trained_on(self, X: Any) -> Any:
        """As `as_fitted_on`, and refuses a split of a store that does not hold the images of the training.

        A head that was trained on some images of the split gets a view of those.
        """
        X = inputs.resolve_store(X)
        if self.origin is not None and hasattr(X, "read_to_audit"):
            return X.read_to_audit(self.origin)
        return self.as_fitted_on(X)

    def labels_of(self, X: Any) -> NDArray[Any]:
        """The labels of a split of a store as this head numbers them: what its predictions are compared with.

        Raises
        ------
        InputError
            The head's own labels were not a store's, or it was not trained on a class of this one.
        """
        return np.asarray(self.as_labelled(X).labels)

    def as_labelled(self, X: Any) -> Any:
        """As `as_fitted_on`, for a split of a store whose own labels or targets are wanted.

        Raises
        ------
        InputError
            The head's own were not a store's.
        """
        if self.origin is not None and self.origin.class_names is None:
            raise InputError("this head was fitted with labels of the user's own: pass such labels as y")
        return self.as_fitted_on(X)

    @undisturbed()
    def to_module(self, dtype: torch.dtype = torch.float32, *, raw_tokens: bool = False) -> HeadModule:
        """This head as an ordinary `torch.nn.Module`: tokens ``(b, s, d)`` -> outputs ``(b, c)``.

        Parameters
        ----------
        dtype : torch.dtype
            Of its weights.
        raw_tokens : bool
            Put the reduction of the token store that the head was fitted on in front, so that the module takes the
            backbone's tokens as they were stored.

        Raises
        ------
        InputError
            ``raw_tokens`` for a head that was not fitted on a store with a reduction, or that reads pooled tokens.
        """
        if raw_tokens and self.reduction is None:
            raise InputError("this head was fitted on plain tokens, there is no reduction to put in front of it")
        if raw_tokens and self.origin is not None and self.origin.token_pool is not None:
            h, w = self.origin.token_pool
            raise InputError(
                f"this head reads tokens that are averaged down to a grid of {h} x {w}, which a module does not do: "
                "leave raw_tokens out, and give the module pooled and reduced tokens"
            )
        module = HeadModule.from_atoms(
            self.head,
            self.spec.activation,
            self.gates,
            self.atoms,
            intercept=self.spec.fit_intercept,
            reduction=self.reduction if raw_tokens else None,
            any_length=self.any_length,
            dtype=dtype,
        )
        module.classes = None if self.classes is None else self.classes.tolist()
        module.class_names = self.class_names
        module.origin, module.fitted_behind = self.origin, self.reduction
        return module

    # -- on disk ------------------------------------------------------------------------------------------------------
    @undisturbed()
    def save(self, path: str | Path) -> None:
        """Write the folder ``path``, replacing a model that is there: see `convexhead.model_folder`.

        Raises
        ------
        InputError
            ``path`` is something else than a model folder, or the model holds what JSON cannot (a loss of one's own).
        OSError
            The place cannot be written; what was there is kept.
        """
        model_folder.check_target(Path(path))
        model_folder.write(Path(path), *described(self))

    @classmethod
    @undisturbed()
    def load(cls, path: str | Path) -> Model:
        """Read what `save` wrote.

        Raises
        ------
        FileFormatError
            Not a model folder, of a newer version, truncated, changed after it was saved, or its parts do not belong
            together.
        """
        config, tensors = model_folder.read(Path(path))
        try:
            return cls(**restored(config, tensors))
        except InputError as error:
            raise FileFormatError(f"{path} does not hold a complete model ({error}): save the model again") from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{path} does not hold a complete model ({error!r}): save the model again") from error


def read_only(array: Array) -> Array:
    """The array, read-only: another value would not be what the certificate is for."""
    array.flags.writeable = False
    return array
