"""
A class for every token
=======================

With ``pool=None`` every token has an output and a label of its own: segmentation on the grid of tokens. Tokens of
class -1 do not count.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

import convexhead as ch
from convexhead.dense import class_iou

rng = np.random.default_rng(0)
side, n = 12, 60

# %%
# Made scenes of three classes. A token shows its class weakly; its neighbours have mostly the same one.

fields = gaussian_filter(rng.normal(size=(n, side, side, 3)), (0, 2, 2, 0))
labels = fields.argmax(axis=3)
channels = np.eye(3)[labels] + 0.9 * rng.normal(size=(n, side, side, 3))
neighbours = gaussian_filter(channels, (0, 1.2, 1.2, 0))
X = np.concatenate([channels, neighbours], axis=3).reshape(n, side * side, 6)
y = labels.reshape(n, side * side)
counted = np.where(rng.random(y.shape) < 0.1, -1, y)  # a tenth of the labels is unknown

# %%
# The linear head on each token, and an MLP with a gated ReLU.

figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
axes[0].imshow(X[50, :, :3].reshape(side, side, 3).clip(0, 1))
axes[0].set_title("tokens")
axes[1].imshow(labels[50], cmap="viridis")
axes[1].set_title("truth")
for axis, (name, activation) in zip(axes[2:], [("linear", "linear"), ("mlp", "gated-relu")], strict=True):
    head = ch.ConvexHeadClassifier(
        name, activation=activation, pool=None, ignore_index=-1, beta_ratio=0.01, fit_intercept=True, random_state=0
    ).fit(X[:45], counted[:45])
    found = head.predict(X[45:])
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (y[45:].ravel(), found.ravel()), 1)
    iou = class_iou(confusion).mean()
    print(f"{name:<7} mean IoU {iou:.3f}; {head.certificate_}")
    axis.imshow(found[5].reshape(side, side), cmap="viridis")
    axis.set_title(f"{name}: mean IoU {iou:.2f}")
for axis in axes:
    axis.set_axis_off()
plt.show()
