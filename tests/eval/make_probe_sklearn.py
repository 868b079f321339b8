"""Writes probe_sklearn.json: what scikit-learn's LogisticRegression makes of random points, for test_probe.py.

    pip install scikit-learn; python tests/eval/make_probe_sklearn.py
"""

import json
from pathlib import Path

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression

rng = np.random.default_rng(0)
labels = np.arange(48) % 3
points = (rng.normal(size=(48, 4)) + rng.normal(size=(3, 4))[labels]).round(3)
fitted = {}
for penalty in (1.0, 0.01, 0.0001):
    model = LogisticRegression(C=1 / (len(points) * penalty), tol=1e-10, max_iter=10000).fit(points, labels)
    fitted[str(penalty)] = model.predict_proba(points).round(6).tolist()
made = {"scikit-learn": sklearn.__version__, "points": points.tolist(), "labels": labels.tolist(), "fitted": fitted}
Path(__file__).with_name("probe_sklearn.json").write_text(json.dumps(made) + "\n")
