"""
Take the head to PyTorch, and go on from its optimum
====================================================

``to_module()`` gives an ordinary ``torch.nn.Module`` with the same outputs. Gradient steps that start there leave the
optimum: nothing is left to gain on the objective. What can still be trained is what the head stands on.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

import convexhead as ch

images, y = load_digits(return_X_y=True)
tokens = (images / 16).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
X, X_test, y, y_test = tokens[:1000], tokens[1000:], y[:1000], y[1000:]
head = ch.ConvexHeadClassifier("mlp-mixer", beta_ratio=0.03, random_state=0).fit(X, y)
module = head.to_module(dtype=torch.float64)
print(module)
with torch.no_grad():
    outputs = module(torch.as_tensor(X)).numpy()
print("largest difference:", np.abs(outputs - head.decision_function(X)).max())

# %%
# A layer in front of the head, the identity at first, is trained together with it for some steps.

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(4, 4).double(), torch.nn.GELU(), torch.nn.Linear(4, 4).double(), module)
with torch.no_grad():
    for layer in (network[0], network[2]):
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
losses = []
for _ in range(150):
    loss = torch.nn.functional.cross_entropy(network(torch.as_tensor(X)), torch.as_tensor(y))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with torch.no_grad():
    right = network(torch.as_tensor(X_test)).argmax(1).numpy() == y_test
print(f"test accuracy: head {head.score(X_test, y_test):.1%}, with the layer in front {right.mean():.1%}")

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
axis.plot(losses)
axis.set(xlabel="step", ylabel="cross-entropy of layer and head")
plt.show()
