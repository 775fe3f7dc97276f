"""
How far from its optimum is a linear probe?
===========================================

Audit scikit-learn's ``LogisticRegression``. The audit finds the certified optimum of the same problem and says how far
above it the probe's objective is.
"""

import warnings

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from convexhead.audit import audit

X, y = load_digits(return_X_y=True)
X = X / 16

# %%
# The same probe, stopped after more and more iterations. β follows from ``C``.

warnings.simplefilter("ignore", ConvergenceWarning)
iterations = [5, 10, 20, 40, 80, 160]
audits = [audit(LogisticRegression(C=100, max_iter=steps).fit(X, y), X, y) for steps in iterations]
for steps, found in zip(iterations, audits, strict=True):
    print(f"{steps:>4} iterations: {found.distance[0]:.2%} to {found.distance[1]:.2%} of the objective is too much")

# %%
# Both ends of the interval are proven.

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
axis.loglog(iterations, [found.distance[1] for found in audits], "o-", label="at most")
axis.loglog(iterations, [found.distance[0] for found in audits], "s:", label="at least")
axis.set(xlabel="max_iter", ylabel="distance from the optimum")
axis.legend()
plt.show()
