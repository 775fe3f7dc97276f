"""Class labels of many samples stay bytes: everything is as with numbers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import convexhead as ch
from convexhead.program import problem as problem_module
from convexhead.program.losses import BinaryCrossEntropy, CrossEntropy
from convexhead.program.sample_losses import SampleLosses

X, Y = (part[:240] for part in load_digits(return_X_y=True))
TOKENS = X.reshape(-1, 8, 8) / 16


@pytest.mark.parametrize("head", ["linear", "self-attention", "mlp"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_fit_is_the_same(monkeypatch, head, weighted):
    weights = 1.0 + np.arange(len(Y)) % 3 if weighted else None
    settings = {"beta_ratio": 0.2, "tol": 1e-2, "fit_intercept": True, "random_state": 0, "solver": "auto"}
    plain = ch.ConvexHeadClassifier(head, **settings).fit(TOKENS, Y, weights)
    monkeypatch.setattr(problem_module, "MANY_TARGETS", 0)
    again = ch.ConvexHeadClassifier(head, **settings).fit(TOKENS, Y, weights)
    assert again.certificate_ == plain.certificate_
    assert again.score(TOKENS, Y) == plain.score(TOKENS, Y)


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy()])
def test_losses_are_the_same(loss):
    named = torch.arange(20) % 4
    bits = (named.unsqueeze(1) == torch.arange(4)).unsqueeze(1)
    f = torch.randn(20, 1, 4, generator=torch.Generator().manual_seed(0))
    of_bytes, of_numbers = SampleLosses(loss, bits, dtype=torch.float32), SampleLosses(loss, bits.float())
    assert of_bytes.Y.dtype == of_bytes.empty().dtype == torch.float32
    for part in (slice(0, 20), slice(3, 11), torch.tensor([5, 1])):
        for one, other in ((of_bytes, of_numbers), (of_bytes.class_by_class(), of_numbers.class_by_class())):
            torch.testing.assert_close(one.at(part).value(f[part]), other.at(part).value(f[part]), rtol=0, atol=0)
            torch.testing.assert_close(one.at(part).residual(f[part]), other.at(part).residual(f[part]), rtol=0, atol=0)
    exact = of_bytes.to(torch.float64)
    torch.testing.assert_close(exact.value(f.double()), of_numbers.to(torch.float64).value(f.double()), rtol=0, atol=0)
