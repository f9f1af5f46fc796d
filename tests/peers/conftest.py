"""DeepSpeed looks for its accelerator when it is imported, here and in the processes of tests."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
