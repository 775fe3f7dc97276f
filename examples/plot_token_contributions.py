"""
What each token adds to a logit
===============================

The contributions of the tokens sum to the logit exactly. Nothing is approximated: self-attention with a linear
activation is a sum over tokens as it stands.
"""

import matplotlib.pyplot as plt
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

import convexhead as ch
from convexhead.interpret import token_contributions

images, y = load_digits(return_X_y=True)
patches = sliding_window_view(images.reshape(-1, 8, 8) / 16, (4, 4), axis=(1, 2))
tokens = patches.reshape(len(y), 25, 16)
X = np.concatenate([tokens, np.ones((len(y), 25, 1))], axis=2)
train, shown = slice(0, 1500), [1500, 1501, 1503, 1505, 1510, 1512]
head = ch.ConvexHeadClassifier("self-attention", beta_ratio=0.02, random_state=0).fit(X[train], y[train])

# %%
# Contributions are an array ``(n, s, c)``. Their sum over tokens is what the head puts out.

contributions = token_contributions(head, X[shown]).numpy()
logits = head.decision_function(X[shown])
print("largest difference:", np.abs(contributions.sum(axis=1) - logits).max())

# %%
# Below each image: what its tokens add to the logit of the predicted class. Red for, blue against.

predicted = logits.argmax(axis=1)
figure, axes = plt.subplots(2, len(shown), figsize=(9, 3.4), layout="constrained")
for column, i in enumerate(shown):
    map_ = contributions[column, :, predicted[column]].reshape(5, 5)
    most = np.abs(map_).max()
    axes[0, column].imshow(images[i].reshape(8, 8), cmap="gray_r")
    axes[0, column].set_title(f"true {y[i]}, predicted {head.classes_[predicted[column]]}", fontsize=8)
    axes[1, column].imshow(map_, cmap="RdBu_r", vmin=-most, vmax=most)
for axis in axes.flat:
    axis.set_axis_off()
plt.show()
