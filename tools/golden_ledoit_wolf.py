"""Golden values of crates/defend-baselines/src/components/gaussian.rs: scikit-learn's Ledoit-Wolf covariance.

python tools/golden_ledoit_wolf.py prints the constants of the test.
"""

import numpy as np
from sklearn.covariance import LedoitWolf

ROWS = np.array([[1, 2, 0], [0, 1, 3], [2, 2, 1], [1, 0, 1], [3, 1, 2], [4, 5, 1], [0, 0, 6]], dtype=np.float64)

print(ROWS.tolist())
print([[float(f"{x:.12f}") for x in row] for row in LedoitWolf().fit(ROWS).covariance_])
