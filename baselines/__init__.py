"""The methods that the paper compares with, and later ones: losses, heads, queues, clustering.

Letters as in losses.py: N images, V views of each, D dimensions, T temperature; z is [N, V, D], unit vectors; rows are view-major.
KCL, TSC and SBCL are weighted forms of equation (1) there: anchor i has a contrast set D(i) and weights w_ip of what it is pulled to,

    L = mean_i sum_p w_ip [ log sum_{a in D(i)} exp(s_ia)  -  s_ip ],                                         (2)

and they differ in D and w; BCL averages classes in the denominator, PaCo has a classifier's logits in it. Each is a pure loss, followed by
a Method (common.py), which holds what is kept between steps.
Written from the papers; where paper and published code differ, `variant` names which one is computed.
"""

# ruff: noqa: F401
from baselines.bcl import BCL, bcl_loss
from baselines.kcl import KCL, draw_k_from_queue, draw_k_positives, kcl_loss
from baselines.paco import PaCo, paco_loss
from baselines.sbcl import SBCL, class_spreads, cosine_kmeans, count_subclasses, sbcl_loss
from baselines.shared import MomentumEncoder, Queue
from baselines.supervised import (
    CosineClassifier,
    LearnableScale,
    effective_number_weights,
    ldam_loss,
    ldam_margins,
    logit_adjusted_loss,
    tau_normalized,
)
from baselines.tsc import TSC, is_swap_better, tsc_loss
from datasets.loader import balanced_batches
