"""
How many directions does a head use?
====================================

The nuclear norm makes few *heads*: the matrix ``Z`` of all heads has a low rank. Within a head the query and key sides
may still use many directions. ``spectra`` tells one from the other.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

import convexhead as ch
from convexhead.interpret import effective_rank, spectra

images, y = load_digits(return_X_y=True)
patches = sliding_window_view(images.reshape(-1, 8, 8) / 16, (4, 4), axis=(1, 2))[:, ::2, ::2]
tokens = patches.reshape(len(y), 9, 16)
X, y = tokens[:1000], y[:1000]

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, ratio in zip(axes, (0.3, 0.1, 0.02), strict=True):
    head = ch.ConvexHeadClassifier("self-attention", beta_ratio=ratio, random_state=0).fit(X, y)
    for name, values in spectra(head).items():
        share = (values / values[0]).numpy()
        axis.semilogy(np.arange(1, len(share) + 1), share, ".-", label=f"{name}: {effective_rank(values):.1f}")
    axis.set(title=f"β/β_max = {ratio}: {head.n_heads_} heads", xlabel="direction", ylim=(1e-3, 1.5), xlim=(0, 30))
    axis.legend(title="effective rank", fontsize=8)
axes[0].set_ylabel("singular value, as a share of the first")
plt.show()
