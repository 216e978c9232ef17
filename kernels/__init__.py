"""Our GPU kernels, in Triton; they import nothing of supermoe, whose `ops` decides when they run.

`permute` sorts rows by expert, `grouped_mm` and `fused_ffn` are the experts, `gating` is the router, `tiles` says in
which block sizes each runs. The mathematics is defined in `supermoe/ops/reference.py`.
"""

import os

# a * b + c in one instruction, as Triton has always done; 3.9 wants to be told, later ones will no longer assume it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
