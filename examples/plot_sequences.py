"""
Samples of different length
===========================

A sample is a list of any number of tokens. The class here depends on a *relation*: whether two marked tokens agree. The
mean of the tokens says nothing about it. Attention compares tokens, and finds it at every length.
"""

import matplotlib.pyplot as plt
import numpy as np

import convexhead as ch

rng = np.random.default_rng(0)


def made(n):
    """Samples ``(s_i, 4)`` and whether the signs of their two marked tokens agree."""
    samples, y = [], rng.integers(0, 2, size=n)
    for same in y:
        tokens = 0.3 * rng.normal(size=(rng.integers(3, 13), 4))
        sign = rng.choice([-1, 1])
        tokens[0, :2] += [2 * sign, 2]
        tokens[1, :2] += [2 * sign if same else -2 * sign, 2]
        samples.append(rng.permutation(tokens))
    return samples, y


samples, y = made(600)
unseen, truth = made(600)

# %%
# Lists of arrays are what ``fit`` and ``predict`` take.

heads = {
    name: ch.ConvexHeadClassifier(name, beta_ratio=0.05, fit_intercept=True, random_state=0).fit(samples, y)
    for name in ("linear", "self-attention")
}
for name, head in heads.items():
    print(f"{name:<15} {head.score(unseen, truth):.1%}  {head.certificate_}")

# %%
# Accuracy by the length of a sample.

lengths = np.array([len(sample) for sample in unseen])
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, head in heads.items():
    right = head.predict(unseen) == truth
    axis.plot(range(3, 13), [right[lengths == s].mean() for s in range(3, 13)], "o-", label=name)
axis.set(xlabel="tokens of the sample", ylabel="accuracy", ylim=(0.4, 1.02))
axis.legend()
plt.show()
