"""
Rare classes and weights of samples
===================================

A weight of 2 is the same as a sample that is there twice. ``class_weight="balanced"`` gives every class the same say.
The certificate is for the weighted problem.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import recall_score

import convexhead as ch

images, y = load_digits(return_X_y=True)
tokens = (images / 16).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
X_test, y_test = tokens[900:], y[900:]

# %%
# Of the digits 0 to 4 only every twelfth train image is kept.

keep = np.flatnonzero((y[:900] > 4) | (np.arange(900) % 12 == 0))
X, y = tokens[keep], y[keep]
print("images of each class:", np.bincount(y))

recalls = {}
for weight in (None, "balanced"):
    head = ch.ConvexHeadClassifier("mlp-mixer", class_weight=weight, beta_ratio=0.03).fit(X, y)
    recalls[weight] = recall_score(y_test, head.predict(X_test), average=None)
    print(f"class_weight={weight!s:<8} mean recall {recalls[weight].mean():.1%}; {head.certificate_}")

# %%
# Two copies of a sample, or a weight of 2: the same optimum.

doubled = ch.ConvexHeadClassifier("linear", beta=0.01, tol=1e-6).fit(np.r_[X, X[:50]], np.r_[y, y[:50]])
weighted = ch.ConvexHeadClassifier("linear", beta=0.01, tol=1e-6).fit(X, y, np.r_[np.full(50, 2), np.ones(len(y) - 50)])
print(doubled.certificate_.primal, weighted.certificate_.primal)

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for shift, (weight, recall) in zip((-0.2, 0.2), recalls.items(), strict=True):
    axis.bar(np.arange(10) + shift, recall, width=0.4, label=f"class_weight={weight!r}")
axis.set(xlabel="digit (0 to 4 are rare in training)", ylabel="recall on test images", xticks=range(10), ylim=(0, 1.25))
axis.legend(loc="upper right", ncols=2)
plt.show()
