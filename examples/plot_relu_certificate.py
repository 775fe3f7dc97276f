"""
A ReLU network with a proof
===========================

A true ReLU network is not convex. Small ones are certified all the same: the bound of duality needs only the largest
reward that any new neuron could have, and that can be bounded. Many Adam runs of the same network end on the bound or
above it, and none below.
"""

import matplotlib.pyplot as plt
import numpy as np

import convexhead as ch
from convexhead.baselines.trained_head import fit_by_adam

rng = np.random.default_rng(1)
X, y = rng.normal(size=(14, 2)), np.arange(14) % 3
head = ch.ConvexHeadClassifier("mlp", activation="relu", beta_ratio=0.1, tol=1e-4, random_state=0).fit(X, y)
optimum = head.certificate_
print(optimum)
print("scope:", optimum.scope, "- by", optimum.bound)

# %%
# Forty runs with 20 neurons each, from 40 starts.

ends = [
    fit_by_adam(head, X, y, n_heads=20, lr=0.05, epochs=150, seed=seed)[0].certificate_.primal for seed in range(40)
]
excess = np.sort(ends) / optimum.dual - 1
print(f"best run {excess[0]:.2%}, median {np.median(excess):.2%}, worst {excess[-1]:.2%} above the bound")

figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
axis.plot(100 * excess, "o", markersize=4, label="runs of Adam, sorted")
axis.axhline(100 * optimum.relative_gap, color="tab:red", label="our network, at most")
axis.axhline(0, color="black", linewidth=1, label="proven bound")
axis.set(xlabel="run", ylabel="above the bound, in %")
axis.legend()
plt.show()
