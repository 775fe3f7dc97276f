"""Attentive probes that others trained: read as they compute, and certified for their queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import convexhead as ch
from convexhead.audit import audit
from convexhead.baselines.attentive_probe import AttentiveProbe
from convexhead.errors import InputError

D, C, S = 6, 3, 5


class Efficient(nn.Module):
    """Queries, values split over them, a classifier."""

    def __init__(self, queries=2, bias=True):
        super().__init__()
        self.cls_token, self.v = nn.Parameter(torch.randn(1, queries, D)), nn.Linear(D, D, bias=bias)
        self.linear = nn.Linear(D, C)

    def forward(self, x):
        a = (self.cls_token[0] @ x.mT * D**-0.5).softmax(2)  # (n, M, s)
        v = self.v(x).unflatten(2, (self.cls_token.shape[1], -1))  # (n, s, M, w)
        return self.linear(torch.einsum("nms,nsmw->nmw", a, v).flatten(1))


class Aim(nn.Module):
    """Heads with keys and values of their own, the mean over queries."""

    def __init__(self, queries=2, heads=3, bias=True):
        super().__init__()
        self.num_heads = heads
        self.k, self.v = nn.Linear(D, D, bias=bias), nn.Linear(D, D, bias=bias)
        self.cls_token, self.linear = nn.Parameter(torch.randn(1, queries, D)), nn.Linear(D, C)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (self.query(x), self.k(x), self.v(x)))
        read = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.linear(self.project(read.transpose(1, 2).flatten(2)).mean(1))

    def query(self, x):
        return self.cls_token.expand(len(x), -1, -1)

    def project(self, x):
        return x


class Jepa(nn.Module):
    """One query, projected too, and a projection behind."""

    def __init__(self):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.randn(1, 1, D))
        self.pooler = nn.ModuleDict({"q": nn.Linear(D, D), "kv": nn.Linear(D, 2 * D), "proj": nn.Linear(D, D)})
        self.num_heads, self.linear = 2, nn.Linear(D, C)

    def forward(self, x):
        q = self.pooler["q"](self.query_tokens.expand(len(x), -1, -1))
        parts = [t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, *self.pooler["kv"](x).chunk(2, 2))]
        read = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.linear(self.pooler["proj"](read)[:, 0])


class OfTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.attention = nn.Parameter(torch.randn(1, 1, D)), nn.MultiheadAttention(D, 2, batch_first=True)
        self.classifier = nn.Linear(D, C)

    def forward(self, x):
        return self.classifier(self.attention(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])


def ours():
    probe = AttentiveProbe(D, C, n_queries=3, seed=0)
    nn.init.normal_(probe.classifier.weight)
    return probe


KINDS = {"ours": ours, "efficient": Efficient, "without bias": lambda: Efficient(bias=False), "aim": Aim, "jepa": Jepa,
         "torch": OfTorch}  # fmt: skip


def made(kind, seed=0):
    torch.manual_seed(seed)
    return KINDS[kind]()


def data(n=40, seed=0):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, S, D)), rng.integers(0, C, n)
    y[:C] = np.arange(C)
    return X, y


def objective(module, X, y, beta):
    """Mean cross-entropy and ``β Σ_j ‖Z_j‖_*``; blocks by differences of outputs: what is read is linear in tokens."""
    from convexhead.foreign.read import read_head

    module = module.double()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(module(torch.from_numpy(X)), torch.from_numpy(y))
    probe = read_head(module, X)
    return float(loss) + beta * float(torch.linalg.matrix_norm(probe.V @ probe.W, "nuc").sum())


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_certified_as_modules_and_as_state_dicts(kind):
    X, y = data()
    module, beta = made(kind), 0.01
    certificate = ch.certify(module, X, y, beta=beta)
    assert certificate.scope == "sampled-queries"
    assert certificate.primal == pytest.approx(objective(module, X, y, beta), rel=1e-6)
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    if hasattr(module, "num_heads") or kind == "torch":
        with pytest.raises(InputError, match="how many heads"):
            ch.certify(state, X, y, beta=beta)
        state["num_heads"] = getattr(module, "num_heads", 2)
    assert ch.certify(state, X, y, beta=beta).primal == pytest.approx(certificate.primal, rel=1e-6)


def test_the_distance_is_that_of_the_values_and_a_missing_query_lowers_the_objective():
    X, y = data()
    module = made("efficient").double()
    found = audit(module, X, y, beta=0.01)
    assert found.reference is not None
    assert found.reference.converged
    least, most = found.distance
    assert 0 < least <= most < 1
    # The factored problem of the same queries, from many sides: none below the optimum, and the best is there.
    best = math.inf
    q = module.cls_token[0].detach() * D**-0.5
    tokens, labels = torch.from_numpy(X), torch.from_numpy(y)
    read = (tokens @ q.T).softmax(1).mT @ tokens
    for seed in range(3):
        torch.manual_seed(seed)
        V, W, b = (torch.randn(*shape).double().requires_grad_() for shape in ((2, D, C), (2, C, C), (C,)))
        optimizer = torch.optim.LBFGS([V, W, b], max_iter=800, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure(V=V, W=W, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            f = torch.einsum("njd,jdm,jmc->nc", read, V, W) + b
            loss = nn.functional.cross_entropy(f, labels) + 0.005 * (V.square().sum() + W.square().sum())
            loss.backward()
            return loss

        optimizer.step(closure)
        best = min(best, closure().item())
    assert found.certificate.dual <= best
    assert best == pytest.approx(found.reference.primal, rel=2e-3)
    missing = found.missing
    assert missing is not None
    assert missing.reward > 1.01
    assert float(missing.query.norm()) <= float(q.norm(dim=1).max()) * (1 + 1e-6)
    queries = torch.cat([q, missing.query.unsqueeze(0)])
    more = ch.ConvexHeadClassifier("attentive", queries=queries, query_norm="each", beta=0.01, fit_intercept=True)
    assert more.fit(X, y).certificate_.primal < found.reference.dual


class WithNorm(Efficient):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)


class WithActivation(Efficient):
    def forward(self, x):
        return torch.relu(super().forward(x))


class WithLayers(Efficient):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(C, C)


class Raw(Efficient):
    def forward(self, x):
        return super().forward(x), x


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Aim(heads=2), Aim(heads=3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(WithNorm, "a norm inside"), (WithActivation, "computes something else"), (WithLayers, "further layers"),
     (Raw, "one output tensor"), (TwoLayers, "only one layer reduces"),
     (lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C)), "nor an attentive probe")],
)  # fmt: skip
def test_what_does_not_reduce_is_refused(kind, words):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=words):
        ch.certify(kind(), *data(), beta=0.01)


def test_weights_that_do_not_fit_are_refused():
    X, y = data()
    state = dict(made("efficient").state_dict())
    with pytest.raises(InputError, match="beta must be"):
        ch.certify(state, X, y)
    with pytest.raises(InputError, match="6 channels"):
        ch.certify(state, X[:, :, :4], y, beta=0.01)
    with pytest.raises(InputError, match="go with factors"):
        ch.certify(state, X, y, beta=0.01, queries=np.zeros((1, D)))
    with pytest.raises(InputError, match="do not fit together"):
        ch.certify({**state, "linear.weight": torch.randn(C, 4)}, X, y, beta=0.01)
    with pytest.raises(InputError, match="one tensor of queries"):
        ch.certify({**state, "more.queries": torch.randn(2, D)}, X, y, beta=0.01)
    with pytest.raises(InputError, match="classes"):
        ch.certify(state, X, y % 2, beta=0.01)


def test_training_mode_is_left_as_it_was():
    module = made("efficient").train()
    ch.certify(module, *data(), beta=0.01)
    assert module.training
