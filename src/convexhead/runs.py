"""What the commands `fit`, `path`, `adam`, `evaluate` and `audit` do, each in one call with the same words.

    from convexhead import runs

    runs.fit("tokens", "run", head="mlp", beta_ratio=0.02)
    runs.evaluate("run", "tokens")

A store is a folder of tokens (`convexhead.tokens`). A run is a folder with a trained head, which `convexhead.load`
reads, and with what a report shows of it (`convexhead.report.evidence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.base import clone

from convexhead.audit import Audit
from convexhead.audit import audit as find_audit
from convexhead.baselines.adam import TrainingResult
from convexhead.baselines.trained_head import fit_by_adam
from convexhead.errors import InputError
from convexhead.estimator_choice import Estimator, check_cross_validated, estimator_for, settings_for
from convexhead.estimators import ConvexHeadClassifier
from convexhead.evaluation import scores_of
from convexhead.interrupts import Answer, interrupts
from convexhead.path import DEFAULT_RATIOS, Row, best, grid_edge, regularization_path
from convexhead.persistence import check_target, load
from convexhead.run_images import grouped, open_split, parts, train_of
from convexhead.run_saving import save_run
from convexhead.runtime import checkpoint as checkpoints
from convexhead.runtime.content import content_hash
from convexhead.runtime.progress import Notify, silent, solver_callback, solver_detail
from convexhead.runtime.ranks import join_ranks
from convexhead.runtime.run_folder import RunFolder
from convexhead.runtime.trackers import tracking
from convexhead.solvers.base import Stop
from convexhead.tokens import TokenStore


def fit(
    store: str | Path,
    out: str | Path,
    *,
    whiten: float = 0.0,
    loss: str | None = None,
    cv: int | None = None,
    groups: str | Path | None = None,
    checkpoint_minutes: float | None = None,
    overwrite: bool = False,
    log: str | Path | None = None,
    notify: Notify = silent,
    command: Sequence[str] = (),
    **parameters: Any,
) -> Estimator:
    """Train a head on the training split of a store and save it as the run ``out``.

    Under torchrun all processes call this with the same arguments and share the images; the first one writes.

    Parameters
    ----------
    store, out : path
        Folders of a token store, and of the run.
    overwrite : bool
        Replace a run that is there. Where a checkpoint is gone on from, it is replaced all the same.
    whiten : float
        ``a`` in [0, 1], how far to whiten the tokens. The metric is fitted on all training images, see
        `convexhead.tokens.whitened`, and the run keeps it in its reduction.
    loss : str or None
        None: the usual one of the store, ``"cross-entropy"`` where its images have one class each or masks,
        ``"binary-cross-entropy"`` where they have several, ``"squared"`` where they have numbers.
    cv : int or None
        Choose β by cross-validation with that many folds, and train on all images at that β. Until the head is
        certified, finished fits of the folds are kept in ``OUT.folds`` (by a single process), and used again.
    groups : path or None
        With ``cv``, a table of images that folds keep together, see `read_groups`.
    checkpoint_minutes : float or None
        Minutes between two checkpoints in ``OUT.checkpoint``. The same call goes on from the last one, which is deleted
        when the head is certified.
    log : str, path or None
        Where rows of the solver go: a file or a service, see `convexhead.runtime.trackers`.
    notify, command : callable, sequence of str
        Told of progress, see `convexhead.runtime.progress`; what a report says was typed to have this run.
    **parameters
        Of `ConvexHeadClassifier` or `ConvexHeadRegressor`.

    Returns
    -------
    ConvexHeadClassifier or ConvexHeadRegressor
        The fitted head, with ``cv`` a `ConvexHeadClassifierCV` or `ConvexHeadRegressorCV`. After Ctrl-C it is the best
        one so far, with the gap that it has.
    """
    out = Path(out)
    folder = out.with_name(f"{out.name}.{'checkpoint' if cv is None else 'folds'}")
    check_target(out, overwrite=overwrite or (checkpoint_minutes is not None and folder.is_dir()))
    ranks = join_ranks()
    notify("reading tokens")
    train = train_of(store, whiten, ranks)
    parameters = settings_for(train, loss, parameters) | {"distributed": ranks.size > 1}
    minutes = {"checkpoint_minutes": checkpoint_minutes}
    saved: dict[str, Any] = {} if checkpoint_minutes is None else {"checkpoint": folder, **minutes}
    if cv is not None:
        check_cross_validated(parameters, saved)
        saved = {"checkpoint": folder} if ranks.size == 1 else {}
    saved |= grouped(train, groups, cv)
    clf = estimator_for(parameters, cv)
    # A first Ctrl-C ends the solver, and never the writing of what it found.
    with interrupts.answer(Answer.FINISH):
        with interrupts.answer(Answer.RAISE):
            notify("preparing")
            with tracking(log if ranks.rank == 0 else None) as tracker:
                clf.fit(train, callback=solver_callback(notify, "training", tracker), **saved)
        if ranks.rank == 0:
            notify("saving")
            chosen = None if cv is None else {"folds": cv, "grouped": groups is not None}
            save_run(clf, out, store, command, selection=chosen)
            if clf.certificate_.converged:
                checkpoints.remove(folder)
                RunFolder(folder).remove()
    return clf


@dataclass
class PathRun:
    """What `path` found.

    Attributes
    ----------
    rows : list of dict
        One for each β that was solved, see `regularization_path`.
    chosen : dict
        The row with the best validation score.
    at_edge : {"low", "high"} or None
        The edge of the grid that the chosen β lies at.
    n_ratios : int
        β in the grid; more than rows if Ctrl-C ended the path.
    n_train, n_held_out : int
        Training images that the heads were trained on, and images that chose β.
    chosen_on : str
        The split that these are of: ``"train"``, or ``"val"``.
    kept : ConvexHeadClassifier or ConvexHeadRegressor
        The head that was saved: the chosen one, or with ``refit`` one of the same β/β_max and gates.
    refitted : bool
        Whether that one was trained on all of them. False where Ctrl-C ended the refit before it was certified.
    """

    rows: list[Row]
    chosen: Row
    at_edge: str | None
    n_ratios: int
    n_train: int
    n_held_out: int
    chosen_on: str
    kept: Estimator
    refitted: bool


def path(
    store: str | Path,
    out: str | Path | None = None,
    *,
    whiten: float = 0.0,
    overwrite: bool = False,
    beta_ratios: Sequence[float] = DEFAULT_RATIOS,
    validation: float | None = None,
    groups: str | Path | None = None,
    loss: str | None = None,
    refit: bool = False,
    checkpoint_minutes: float | None = None,
    random_state: int = 0,
    log: str | Path | None = None,
    notify: Notify = silent,
    command: Sequence[str] = (),
    **parameters: Any,
) -> PathRun:
    """Train a head along a falling grid of β, choose β on images that it was not trained on, save the chosen head.

    Under torchrun all processes call this with the same arguments and share the images; the first one writes.

    Parameters
    ----------
    store, out : path
        Folders of a token store, and of the run that the chosen head is saved as; without ``out`` nothing is saved.
    beta_ratios : sequence of float
        The grid over ``β/β_max``.
    validation : float or None
        Share of the training images that are held out to choose β by. None: the store's val split chooses it, or where
        there is none a fifth of the training images.
    groups : path or None
        As for `fit`. ``validation`` is then a share of the groups.
    refit : bool
        Train the head that is saved on all training images, the held-out ones too, at the chosen β/β_max.
    checkpoint_minutes : float or None
        Minutes between two checkpoints of a fit in ``OUT.checkpoint``, from which the same call goes on.
    random_state : int
        Of the held-out images, gates and random starts.
    log : str, path or None
        Where a row of each solved β goes (see `convexhead.runtime.trackers`).
    loss, whiten, overwrite, notify, command
        As for `fit`. The held-out images count in the metric, as they do in the standardisation; their labels do not.
    **parameters
        Of `ConvexHeadClassifier`.
    """
    if validation is not None and not 0 < validation < 1:
        raise InputError(f"validation must be a share between 0 and 1, got {validation:g}")
    saved = _saved_beside(out, checkpoint_minutes, overwrite)
    ratios, ranks = sorted(set(beta_ratios), reverse=True), join_ranks()
    notify("reading tokens", 0, len(ratios))
    train = train_of(store, whiten, ranks)
    parameters |= {"distributed": ranks.size > 1}
    kept, held = parts(store, train, validation, random_state, groups)
    if refit and held.split != "train":
        raise InputError("the val split chooses β, and all training images are trained on: leave refit out, or give "
                         "validation=0.2 to hold out training images")  # fmt: skip
    with interrupts.answer(Answer.FINISH):
        with interrupts.answer(Answer.RAISE), tracking(log if ranks.rank == 0 else None) as track:
            told = _Told(ratios, notify, track)
            notify("preparing", 0, len(ratios))
            rows = regularization_path(
                kept, beta_ratios=ratios, X_val=held,
                callback=told.solved, progress=told.step, random_state=random_state, **saved,
                **settings_for(train, loss, parameters),
            )  # fmt: skip
        chosen = best(rows)
        edge = grid_edge(ratios, chosen["beta_ratio"])
        again = None
        if refit and not ranks.largest(interrupts.received is not None)[0]:
            again = _refitted(chosen["model"], train, solver_callback(notify, "training on all images"), saved)
        model = again or chosen["model"]
        if out is not None and ranks.rank == 0:
            notify("saving", len(rows), len(ratios))
            selection: dict[str, Any] = {"held_out": len(held), "refit": again is not None}
            selection |= {} if held.split == "train" else {"split": held.split}
            save_run(model, Path(out), store, command, path=rows, at_edge=edge, selection=selection)
            if "checkpoint" in saved and interrupts.received is None:
                checkpoints.remove(saved["checkpoint"])
    return PathRun(rows, chosen, edge, len(ratios), len(kept), len(held), held.split, model, again is not None)


def _saved_beside(out: str | Path | None, minutes: float | None, overwrite: bool) -> dict[str, Any]:
    """The parameters of fits that write checkpoints beside the run ``out``, none where they write none.

    A run that is there is refused, unless it is replaced or gone on with.
    """
    saved: dict[str, Any] = {}
    if minutes is not None:
        if out is None:
            raise InputError("checkpoints are kept beside the run: say where that is, or leave checkpoint out")
        folder = Path(out).with_name(f"{Path(out).name}.checkpoint")
        saved, overwrite = {"checkpoint": folder, "checkpoint_minutes": minutes}, overwrite or folder.is_dir()
    if out is not None:
        check_target(Path(out), overwrite=overwrite)
    return saved


class _Told:
    """What is told of a path as it goes: each step to ``notify``, each β that is solved to ``track``."""

    def __init__(self, ratios: Sequence[float], notify: Notify, track: Callable[[Row], None]) -> None:
        self._ratios, self._notify, self._track, self._done = ratios, notify, track, 0

    def step(self, row: Any) -> None:
        n = len(self._ratios)
        self._notify(f"β/β_max {self._ratios[min(self._done, n - 1)]:g}", self._done, n, solver_detail(row))

    def solved(self, row: Row) -> None:
        self._done += 1
        self._track(row)


def _refitted(
    chosen: Estimator, train: Any, callback: Callable[[Any], None], saved: dict[str, Any]
) -> Estimator | None:
    """The same head trained on ``train``, with its gates or queries; None if Ctrl-C came before its certificate.

    ``saved``: how the path writes checkpoints.
    """
    if "checkpoint" in saved:
        saved = {**saved, "checkpoint": saved["checkpoint"] / "all images"}
    again = clone(chosen).set_params(gates=chosen.gates_, queries=chosen.queries_)
    try:
        with interrupts.answer(Answer.RAISE):
            again.fit(train, callback=callback, **saved)
    except KeyboardInterrupt:
        return None
    return None if again.stop_reason_ == Stop.INTERRUPTED.value else again


def adam(
    store: str | Path,
    out: str | Path,
    *,
    whiten: float = 0.0,
    overwrite: bool = False,
    n_heads: int = 20,
    lr: float = 0.01,
    epochs: int = 60,
    batch_size: int = 256,
    random_state: int = 0,
    notify: Notify = silent,
    command: Sequence[str] = (),
    **parameters: Any,
) -> tuple[ConvexHeadClassifier, TrainingResult]:
    """Train the same head by Adam, as is usual, and save it as the run ``out``; `audit` says how far it stopped.

    Parameters
    ----------
    n_heads : int
        Atoms of the network.
    lr, epochs, batch_size
        Of Adam.
    random_state : int
        Of gates, start and order of the images.
    store, out, whiten, overwrite, notify, command, **parameters
        As for `fit`.
    """
    check_target(Path(out), overwrite=overwrite)
    notify("reading tokens", 0, epochs)
    clf, result = fit_by_adam(
        ConvexHeadClassifier(random_state=random_state, **parameters), train_of(store, whiten), n_heads=n_heads, lr=lr,
        epochs=epochs, batch_size=batch_size, seed=random_state,
        callback=lambda row: notify("Adam's epochs", int(row.epoch), epochs, f"objective {row.objective:.6g}"),
    )  # fmt: skip
    with interrupts.answer(Answer.FINISH):
        notify("saving", epochs, epochs)
        save_run(clf, Path(out), store, command)
    return clf, result


def evaluate(run: str | Path, store: str | Path, *, split: str = "test", images: str | None = None) -> dict[str, Any]:
    """Score a run on a split of a store, whose classes or columns are matched by name: `evaluation.scores_of`.

    Under torchrun all processes call this with the same arguments and share the images, but for images with masks.
    ``images`` says where those are, if they have moved. The result has ``run``, ``split`` and ``images``
    (their number) beside the scores.
    """
    head, view = load(run), open_split(store, split)
    place = images or TokenStore.open(store).manifest.source
    ranks = join_ranks()

    def facts(view: Any) -> dict[str, Any]:
        return {"head": f"sha256:{content_hash(head.model_.atoms.state())}", "images": f"sha256:{view.identity}"}

    with ranks.all_or_none():
        ranks.agree(lambda: view, facts)
        scores = scores_of(head, view, place, ranks)
    return {"run": str(run), "split": split, "images": len(view), **scores}


def audit(
    run: str | Path,
    store: str | Path,
    *,
    beta: float | None = None,
    reference: str | Path | None = None,
    find_optimum: bool = True,
    pool: str = "mean",
    tol: float = 1e-3,
) -> Audit:
    """Bound how far a trained head is from the global optimum on the training split of a store.

    Under torchrun all processes call this with the same arguments and share the images.

    Parameters
    ----------
    run : path
        Folder of a trained head, by whatever training, or a file with the weights of a linear head: ``.npz``,
        ``.safetensors``, ``.pth`` (see `convexhead.audit.certify`). Such a file's classes are matched by name if it
        tells them, else its outputs are those of the store's classes in order.
    store : path
        The store that it was trained on.
    beta : float or None
        ``β``; None: the one that the head was trained at. A file rarely tells it.
    reference : path or None
        A certified run of the same problem, whose lower bound is used too.
    find_optimum : bool
        Find the certified optimum of a linear head where there is no reference and its own proof is above ``tol``.
    pool : str
        Which tokens the head in a file reads.
    tol : float
        Relative gap for ``converged``.
    """
    run, train = Path(run), open_split(store, "train")
    known = None if reference is None else load(reference).certificate_
    if reference is not None and known is None:
        raise InputError(f"{reference} has no certificate: give a run of `convexhead fit`")
    weights: Any = run if run.is_file() else load(run)
    return find_audit(
        weights, train, beta=beta, pool=pool, tol=tol, reference=known, find_optimum=find_optimum,
        distributed=join_ranks().size > 1,
    )  # fmt: skip
