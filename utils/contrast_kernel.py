"""Equation (1) of common.py for large batches: memory grows with the rows, not with their square.

The sum over positives is sum_p s_ip = z_i . (sum of the group - z_i) / T. The log-sum-exp is taken
over CHUNK rows at a time, and the gradient computes the similarities again.
"""

import torch

from utils.distributed import at_least_float32

CHUNK = 256
UNIT_TOLERANCE = 0.05  # of a squared length; half precision needs 0.02
UNIT_LENGTH = "embeddings need unit length (F.normalize(z, dim=-1))"


def flatten_views(z):
    """[N, V, D] -> [V*N, D], view-major, in float32 or better.

    Raises ValueError unless the rows have unit length; on a GPU the check waits for nothing, and
    a failed one ends the process. Rows of zeros pass: F.normalize leaves them.
    """
    if z.ndim != 3 or z.shape[0] < 1 or z.shape[1] < 2:
        shape = list(z.shape)
        raise ValueError(f"embeddings must be [images, 2 or more views, dimensions], not {shape}")
    rows = at_least_float32(z).transpose(0, 1).flatten(0, 1)
    square = rows.detach().square().sum(1)
    # A row with NaN passes, too: the training loop reports it with its images.
    is_wrong = ((square - 1).abs() > UNIT_TOLERANCE) & (square > 0)
    if rows.is_cuda:
        torch._assert_async(~is_wrong.any(), UNIT_LENGTH)
    elif is_wrong.any():
        raise ValueError(f"{UNIT_LENGTH}, one has {square[is_wrong][0].sqrt():.3g}")
    return rows


def chunked_contrastive_loss(rows, group, temperature, attracted, own_cosine):
    """Equation (1) of rows [V*N, D] with groups int [V*N]; see contrastive_loss in common.py.

    The temperature gets no gradient, and there are no second derivatives.
    """
    # Groups become numbers below V*N without a wait for the GPU, as torch.unique would need.
    group = torch.searchsorted(group.sort().values, group)
    ones = torch.ones_like(rows[:, 0])
    size = torch.zeros_like(ones).index_add(0, group, ones)[group]
    weight = 1 / (size - 1 + attracted)
    anchors = _Contrast.apply(rows, group, weight, temperature)
    return (anchors - weight * attracted * own_cosine / temperature).mean()


class _Contrast(torch.autograd.Function):
    """log sum_{a in A(i)} exp(s_ia) - weight_i sum_{p in P(i)} s_ip of every row i, [V*N].

    s_ij = s_ji, so a chunk of rows is compared only with itself and the rows below it. Rows of s
    are summed for the chunk, columns for the rows below. The gradient has the weight
    softmax_i(j) - weight_i [j in P(i)] from anchor i, and the same of anchor j. Near collapse
    both terms are large and nearly equal, so they are subtracted before the product with the rows.
    """

    @staticmethod
    def forward(ctx, rows, group, weight, temperature):
        log_sum = rows.new_full((len(rows),), -torch.inf)
        for start, end, s in _similarities(rows, temperature):
            log_sum[start:end] = log_sum[start:end].logaddexp(s.logsumexp(1))
            log_sum[end:] = log_sum[end:].logaddexp(s[:, end - start :].logsumexp(0))
        ctx.save_for_backward(rows, group, weight, log_sum)
        ctx.temperature = temperature
        # Thousands of nearly equal rows are summed, hence float64.
        rows64 = rows.double()
        others = torch.zeros_like(rows64).index_add(0, group, rows64)[group] - rows64
        positives = others.mul_(rows64).sum(1) / temperature
        return log_sum - (weight * positives).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("this loss has no second derivative")
        rows, group, weight, log_sum = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        for start, end, s in _similarities(rows, ctx.temperature):
            chunk, below = slice(start, end), slice(start, None)
            positive = (group[chunk, None] == group[below]).fill_diagonal_(False)
            w = (s - log_sum[chunk, None]).exp_().sub_(weight[chunk, None] * positive)
            w = w.mul_(grad[chunk, None])
            w += s.sub_(log_sum[below]).exp_().sub_(weight[below] * positive).mul_(grad[below])
            with torch.autocast(rows.device.type, enabled=False):
                grad_rows[chunk] += w @ rows[below]
                grad_rows[end:] += w[:, end - start :].T @ rows[chunk]
        return grad_rows / ctx.temperature, None, None, None


def _similarities(rows, temperature):
    """Yield (start, end, s): s of the rows from start to end with all rows from start on.

    s is [end - start, V*N - start], with -inf for a row and itself.
    """
    for start in range(0, len(rows), CHUNK):
        end = min(start + CHUNK, len(rows))
        with torch.autocast(rows.device.type, enabled=False):
            s = (rows[start:end] / temperature) @ rows[start:].T
        yield start, end, s.fill_diagonal_(-torch.inf)
