"""
A first fit, and its certificate
================================

Train a self-attention head on the patches of scikit-learn's digits. There is no learning rate, no number of epochs and
no number of attention heads to choose. The fit ends when the certificate says that it is within ``tol`` of the global
optimum.
"""

# %%
# Tokens
# ------
# Each image of 8 x 8 pixels becomes nine patches of 4 x 4 pixels that overlap: an array ``(n, s, d)`` of ``s = 9``
# tokens with ``d = 16`` channels. A further channel of ones lets attention contain the linear head.

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import convexhead as ch

images, y = load_digits(return_X_y=True)
patches = sliding_window_view(images.reshape(-1, 8, 8) / 16, (4, 4), axis=(1, 2))[:, ::2, ::2]
tokens = patches.reshape(len(y), 9, 16)
tokens = np.concatenate([tokens, np.ones((len(y), 9, 1))], axis=2)
X, X_test, y, y_test = train_test_split(tokens, y, stratify=y, random_state=0)

# %%
# Fit
# ---
# ``beta_ratio`` is the weight decay as a share of the weight at which the head would vanish.

head = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.02, tol=1e-4, random_state=0).fit(X, y)
print(head.certificate_)
print(f"{head.n_heads_} attention heads, {head.score(X_test, y_test):.1%} of the test images")

# %%
# What happened on the way
# ------------------------
# The objective falls. The gap is the solver's own estimate of its distance from the optimum; the certificate at the end
# is computed anew.

seconds = [row["seconds"] for row in head.history_]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(seconds, [row["objective"] for row in head.history_], ".-")
left.axhline(head.certificate_.dual, color="black", linewidth=1, linestyle=":", label="certified lower bound")
left.set(xlabel="seconds", ylabel="objective")
left.legend()
right.semilogy(seconds, [max(row["gap"], 1e-12) for row in head.history_], ".-")
right.set(xlabel="seconds", ylabel="gap, as the solver estimates it")
plt.show()
