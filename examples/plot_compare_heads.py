"""
Every head on the same tokens
=============================

Attention, Mixer, FNO, MLP and the linear head on the digits' patches. If the MLP and the linear head were as good as
the others, mixing tokens would not help on these data. β is fixed here; choose it by cross-validation in earnest.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

import convexhead as ch

images, y = load_digits(return_X_y=True)
patches = sliding_window_view(images.reshape(-1, 8, 8) / 16, (4, 4), axis=(1, 2))[:, ::2, ::2]
tokens = patches.reshape(len(y), 9, 16)
tokens = np.concatenate([tokens, np.ones((len(y), 9, 1))], axis=2)
X, X_test, y, y_test = tokens[:800], tokens[800:], y[:800], y[800:]

cells = [
    ("linear", "linear", 0.002),
    ("mlp", "linear", 0.02),
    ("mlp", "gated-relu", 0.05),
    ("fno", "gated-relu", 0.05),
    ("self-attention", "linear", 0.02),
    ("mlp-mixer", "linear", 0.02),
]
fits = {}
for name, activation, ratio in cells:
    head = ch.ConvexHeadClassifier(name, activation=activation, beta_ratio=ratio, n_gates=8, random_state=0)
    fits[f"{name}, {activation}"] = head.fit(X, y)
for name, fit in fits.items():
    print(f"{name:<24} {fit.score(X_test, y_test):.1%}  certified gap {fit.certificate_.relative_gap:.2%}")

# %%
# The mean of the patches loses where they were. Heads that see positions or relations keep it.

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.barh(list(fits), [fit.score(X_test, y_test) for fit in fits.values()])
axis.set_xlabel("test accuracy")
axis.invert_yaxis()
plt.show()
