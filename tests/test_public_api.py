"""Every public name: what is listed here is kept, and nothing becomes public by accident."""

from __future__ import annotations

import importlib
import inspect
import re
import sys

import numpy as np
import pytest

import convexhead as ch
from convexhead._renamed import RENAMED

NAMES = {
    "convexhead": {
        "Certificate", "ConvexHeadClassifier", "ConvexHeadClassifierCV", "ConvexHeadError", "ConvexHeadRegressor",
        "ConvexHeadRegressorCV", "FileFormatError", "HubError",
        "InputError", "MissingExtraError", "TokenStore", "__version__", "attach", "beta_max", "certify", "load",
        "regularization_path",
    },
    "convexhead.deploy": {
        "ImageModel", "Recipe", "TokenModel", "attach", "export_run", "finetune", "pull", "push",
    },
    "convexhead.tokens": {
        "Backbone", "BrokenImageError", "ImageSource", "Progress", "Reduction", "SplitView", "StoreWriteError",
        "TokenStore", "export_store", "extract", "import_arrays", "merge_stores", "open_backbone", "open_source",
        "whitened",
    },
    "convexhead.interpret": {
        "ClusterFigures", "Filters", "FittedHead", "choose_n_clusters", "cluster_figures", "cluster_tokens",
        "effective_rank", "fourier_filters", "head_contributions", "head_lift", "mixing_matrix",
        "principal_embedding", "query_maps", "query_strengths",
        "retained_directions", "spectra", "token_contributions", "token_embedding",
    },
    "convexhead.report": {"csv_rows", "markdown_table", "methods", "render", "terminal_table"},
    "convexhead.certificate": {"Certificate", "certify_atoms"},
    "convexhead.dual_norm": {"Decomposition", "DualNorm", "NormOracle", "cone_decomposition"},
    "convexhead.program.heads": {"HEADS", "Head", "make_head"},
    "convexhead.cli": {"app", "main"},
}  # fmt: skip
SETTINGS = {
    "head", "activation", "beta", "beta_ratio", "pool", "grid", "n_gates", "gates", "n_blocks", "outputs",
    "n_queries", "queries", "query_scale", "query_position", "key_dim", "query_norm",
    "fit_intercept", "tol", "max_heads", "max_time", "max_memory", "random_state", "device", "distributed", "solver",
    "verbose", "loss",
}  # fmt: skip
OF_CLASSIFIERS = {"class_weight", "label_smoothing", "pos_weight", "ignore_index"}
RUN = {"self", "X", "y", "sample_weight", "mask", "callback", "checkpoint", "checkpoint_minutes"}
CHOOSING = (SETTINGS - {"beta", "beta_ratio"}) | {
    "beta_ratios", "cv", "scoring", "refit", "beta_ratio_", "beta_ratios_", "scores_",
}  # fmt: skip
PARAMETERS = {
    ch.ConvexHeadClassifier: SETTINGS | OF_CLASSIFIERS,
    ch.ConvexHeadRegressor: SETTINGS,
    ch.ConvexHeadClassifier.fit: RUN,
    ch.ConvexHeadRegressor.fit: RUN,
    ch.ConvexHeadClassifierCV.fit: {"self", "X", "y", "sample_weight", "mask", "groups", "callback", "checkpoint"},
    ch.ConvexHeadRegressorCV.fit: {"self", "X", "y", "sample_weight", "mask", "groups", "callback", "checkpoint"},
    ch.ConvexHeadClassifier.to_module: {"self", "dtype", "raw_tokens"},
    ch.beta_max: {"X", "y", "sample_weight", "loss", "parameters"},
    ch.certify: {
        "weights", "X", "y", "sample_weight", "beta", "head", "activation", "pool", "grid", "gates", "n_blocks",
        "outputs", "queries", "query_norm", "intercept", "loss", "tol", "lower_bound", "device", "random_state",
        "distributed",
    },
    ch.regularization_path: {
        "X", "y", "sample_weight", "beta_ratios", "Cs", "X_val", "y_val", "loss", "patience", "search_tol",
        "callback", "progress", "checkpoint", "checkpoint_minutes", "parameters",
    },
    ch.attach: {"backbone", "model", "dtype"},
    ch.load: {"path"},
}  # fmt: skip
FITTED = {
    "beta_", "beta_max_", "certificate_", "gates_", "grid_", "history_", "intercept_", "mixing_", "model_",
    "n_features_in_", "n_heads_", "n_outputs_", "n_tokens_", "origin_", "queries_", "reduction_", "singular_values_",
    "stop_reason_", "values_",
}  # fmt: skip
CLASSIFIER = {"classes_", "class_names_", "decision_function", "labels_of", "predict_proba"}
METHODS = {
    "as_fitted_on",
    "as_trained_on",
    "fit",
    "from_model",
    "get_params",
    "predict",
    "read",
    "save",
    "score",
    "validation_score",
    "set_params",
    "to_module",
    "to_spec",
}
OLD_MODULES = (
    "activation", "budget", "checkpoint", "clock", "heads", "intercept", "lanes", "losses", "patterns", "problem",
    "ranks", "relu", "samples", "spectral", "stored_tokens", "training",
)  # fmt: skip


@pytest.mark.parametrize("package", NAMES)
def test_exported_names(package):
    module = importlib.import_module(package)
    assert set(module.__all__) == NAMES[package]
    assert len(module.__all__) == len(NAMES[package])
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda function: function.__qualname__)
def test_parameters(function):
    assert set(inspect.signature(function).parameters) == PARAMETERS[function]


@pytest.mark.parametrize(
    ("estimator", "own"),
    [
        (ch.ConvexHeadClassifier("mlp"), SETTINGS | OF_CLASSIFIERS | CLASSIFIER),
        (ch.ConvexHeadRegressor("mlp"), SETTINGS),
        (ch.ConvexHeadClassifierCV("mlp", cv=2), CHOOSING | OF_CLASSIFIERS | CLASSIFIER),
        (ch.ConvexHeadRegressorCV("mlp", cv=2), CHOOSING),
    ],
)
def test_attributes_of_a_fitted_estimator(estimator, own):
    estimator.fit(np.random.default_rng(0).normal(size=(9, 2, 2)), np.arange(9) % 2)
    names = {name for name in dir(estimator) if not name.startswith("_")}
    routing = {name for name in names if re.fullmatch(r"get_metadata_routing|set_\w+_request", name)}
    assert names - routing == own | FITTED | METHODS


@pytest.mark.parametrize("old", OLD_MODULES)
def test_modules_are_found_by_their_old_names(old):
    sys.modules.pop(f"convexhead.{old}", None)
    with pytest.warns(FutureWarning, match=f"convexhead.{old} is now convexhead.{RENAMED[old]}"):
        found = importlib.import_module(f"convexhead.{old}")
    assert found is importlib.import_module(f"convexhead.{RENAMED[old]}")
