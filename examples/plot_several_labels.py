"""
Several labels a sample
=======================

Each image here shows two digits, and the labels say which. ``loss="binary-cross-entropy"`` takes an indicator matrix
``(n, c)`` of ones and zeros.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import convexhead as ch

rng = np.random.default_rng(0)
images, digit = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8) / 16
pairs = rng.integers(0, len(digit), size=(1500, 2))
scenes = np.concatenate([images[pairs[:, 0]], images[pairs[:, 1]]], axis=2)
X = scenes.reshape(-1, 4, 2, 8, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 32, 4)
Y = np.zeros((len(X), 10))
for column in digit[pairs].T:
    Y[np.arange(len(X)), column] = 1

# %%
# ``pos_weight`` multiplies the loss of the ones, since most entries are zeros.

head = ch.ConvexHeadClassifier(
    "mlp-mixer", grid=(4, 8), loss="binary-cross-entropy", pos_weight=2.0, fit_intercept=True, beta_ratio=0.02
).fit(X[:1000], Y[:1000])
print(head.certificate_)
probability = head.predict_proba(X[1000:])
precision = average_precision_score(Y[1000:], probability, average=None)
print(f"mean average precision {precision.mean():.3f}")

# %%
# What the head says of some scenes that it has not seen.

figure, axes = plt.subplots(2, 4, figsize=(9, 3.8), layout="constrained")
for column in range(4):
    axes[0, column].imshow(scenes[1000 + column], cmap="gray_r")
    axes[0, column].set_axis_off()
    axes[1, column].bar(range(10), probability[column])
    axes[1, column].set(xticks=range(10), ylim=(0, 1), xlabel="digit")
axes[1, 0].set_ylabel("probability")
plt.show()
