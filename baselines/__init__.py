"""The methods that the paper compares with, one file each: the loss, then its Method.

Written from the papers. Where a paper and its published code differ, `variant` names the form.
"""

# ruff: noqa: F401
from baselines.bcl import BCL, bcl_loss
from baselines.kcl import KCL, draw_k_from_queue, draw_k_positives, kcl_loss
from baselines.paco import PaCo, paco_loss
from baselines.sbcl import SBCL, sbcl_loss
from baselines.supervised import (
    CosineClassifier,
    LearnableScale,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    tau_normalized,
)
from baselines.tsc import TSC, tsc_loss
from datasets.loader import balanced_batches
