"""
How many heads does it take?
============================

The number of attention heads is a result and no setting. A path over β shows how it grows as the weight decay falls,
and how much accuracy the further heads buy.
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
X, X_val, y, y_val = tokens[:1200], tokens[1200:], y[:1200], y[1200:]

rows = ch.regularization_path(
    X, y, head="self-attention", beta_ratios=[0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.008], X_val=X_val, y_val=y_val
)
for row in rows:
    print(f"{row['beta_ratio']:<6g} {row['n_heads']:>3} heads  {row['val_score']:.1%}  gap {row['relative_gap']:.1e}")

# %%
# Every point is certified: no head of this kind, of any width, has an objective that is lower by more than the gap.

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
ratios = [row["beta_ratio"] for row in rows]
axis.semilogx(ratios, [row["n_heads"] for row in rows], "o-", color="tab:blue")
axis.set_xlabel("β/β_max")
axis.set_ylabel("heads found", color="tab:blue")
axis.invert_xaxis()
accuracy = axis.twinx()
accuracy.semilogx(ratios, [row["val_score"] for row in rows], "s--", color="tab:red")
accuracy.set_ylabel("accuracy on held-out images", color="tab:red")
plt.show()
