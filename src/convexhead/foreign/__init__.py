"""Heads that others trained, as programs to certify: linear heads of scikit-learn, cuML, torch and files; probes."""
