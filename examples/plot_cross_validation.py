"""
Choose β by cross-validation
============================

``ConvexHeadClassifierCV`` solves a path over β on every fold, chooses the best β, and trains the head that is kept on
all samples, with a certificate.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

import convexhead as ch

images, y = load_digits(return_X_y=True)
tokens = (images / 16).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
X, X_test, y, y_test = tokens[:600], tokens[600:], y[:600], y[600:]

# %%
# Folds are not shuffled unless the splitter does so.

folds = StratifiedKFold(3, shuffle=True, random_state=0)
head = ch.ConvexHeadClassifierCV(
    "mlp-mixer", cv=folds, beta_ratios=[0.2, 0.1, 0.05, 0.025, 0.012, 0.006], random_state=0
).fit(X, y)
print(f"β/β_max = {head.beta_ratio_:.3g} of {len(head.beta_ratios_)} that were tried")
print(head.certificate_)
print(f"test accuracy {head.score(X_test, y_test):.1%}")

# %%
# The score of every fold over the grid. Where scores still rise at the edge the grid goes on by itself.

scores = np.asarray(head.scores_)
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
axis.semilogx(head.beta_ratios_, scores.T, ".", color="tab:gray")
axis.semilogx(head.beta_ratios_, scores.mean(axis=0), "-", label="mean over folds")
axis.axvline(head.beta_ratio_, color="black", linestyle=":", label="chosen")
axis.set(xlabel="β/β_max", ylabel="accuracy on the held-out fold")
axis.invert_xaxis()
axis.legend()
plt.show()
