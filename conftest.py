"""Every process of the tests, and every one they start, uses one core."""

import os

# torch reads it when it is imported, which is after this file
os.environ.setdefault("OMP_NUM_THREADS", "1")
