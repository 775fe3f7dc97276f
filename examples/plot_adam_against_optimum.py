"""
Where Adam ends, and the bound that it cannot pass
==================================================

Train the same attention head by Adam with several learning rates and compare with the certified optimum. No run can end
below the bound, whatever its learning rate, width or seed.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

import convexhead as ch
from convexhead.baselines.trained_head import fit_by_adam

images, y = load_digits(return_X_y=True)
patches = sliding_window_view(images.reshape(-1, 8, 8) / 16, (4, 4), axis=(1, 2))[:, ::2, ::2]
tokens = patches.reshape(len(y), 9, 16)
X, y = np.concatenate([tokens, np.ones((len(y), 9, 1))], axis=2)[:500], y[:500]
head = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.05, random_state=0).fit(X, y)
optimum = head.certificate_

# %%
# Twenty attention heads, 150 epochs, four learning rates. The black line is the certified lower bound. The convex fit
# lies on it, to the width of the line.

figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for lr in (0.001, 0.003, 0.01, 0.03):
    trained, run = fit_by_adam(head, X, y, n_heads=20, lr=lr, epochs=150, batch_size=100)
    excess = trained.certificate_.primal / optimum.dual - 1
    print(f"lr {lr}: {excess:.2%} above the bound")
    axis.semilogy([row.epoch for row in run.history], [row.objective for row in run.history], label=f"Adam, lr={lr}")
axis.axhline(optimum.dual, color="black", linewidth=1, label="certified bound")
axis.set(xlabel="epoch", ylabel="objective")
axis.legend()
plt.show()
