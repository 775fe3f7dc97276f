"""Linear heads that others trained: scikit-learn's, cuML's, torch's, and files of weights, as programs to certify."""
