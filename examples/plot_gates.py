"""
A non-linear head that is convex
================================

A gated ReLU decides by fixed gates which side of a token counts. With the gates given, training is a convex program.
More gates make a richer head: here the MLP head on points that no linear head can tell apart.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons
from sklearn.preprocessing import PolynomialFeatures

import convexhead as ch

points, y = make_moons(300, noise=0.15, random_state=0)
lift = PolynomialFeatures(1).fit(points)  # a channel of ones: hyperplanes need not pass through 0
X = lift.transform(points)

# %%
# Each fit is certified for its own gates.

xx, yy = np.meshgrid(np.linspace(-1.6, 2.6, 120), np.linspace(-1.2, 1.7, 100))
grid = lift.transform(np.column_stack([xx.ravel(), yy.ravel()]))
settings = [("linear", None), ("gated-relu", 3), ("gated-relu", 10), ("gated-relu", 40)]
figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
for axis, (activation, n_gates) in zip(axes, settings, strict=True):
    own = {} if n_gates is None else {"n_gates": n_gates}
    head = ch.ConvexHeadClassifier("mlp", activation=activation, beta_ratio=0.002, random_state=0, **own).fit(X, y)
    name = "linear" if n_gates is None else f"{n_gates} gates"
    print(f"{name:<9} {head.score(X, y):.1%}  {head.certificate_}")
    axis.contourf(xx, yy, head.predict_proba(grid)[:, 1].reshape(xx.shape), 20, cmap="RdBu_r", vmin=0, vmax=1)
    axis.scatter(*points.T, c=y, s=4, cmap="RdBu_r", edgecolors="black", linewidths=0.2)
    axis.set_title(name)
    axis.set_axis_off()
plt.show()
