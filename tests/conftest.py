"""Kernels run on the device where there is one, and elsewhere in Triton's interpreter, which must be chosen before the
first import of Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other cores have tests of their own
