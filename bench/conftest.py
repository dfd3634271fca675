"""Triton's kernels run under its interpreter where there is no GPU; Triton looks when they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
