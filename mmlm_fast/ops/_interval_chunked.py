"""`interval_attention` in PyTorch, a few queries at a time: float64, and what no kernel takes, on any device."""

import torch
from torch import Tensor

# Scores a step holds, in numbers: 32 MiB in float64, little beside the dense mask of a long sequence.
STEP_SCORES = 2**22


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_last(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _steps(query: Tensor, key: Tensor, lo: Tensor | None, hi: Tensor | None):
    """Rows of queries, the keys they need, and which of these each sees (None: all)."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    rows = max(1, min(q_len, STEP_SCORES // max(1, batch * heads * kv_len)))
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        if lo is None or hi is None:
            yield slice(start, stop), slice(0, kv_len), None
            continue
        low, high = lo[:, start:stop].clamp(min=0), hi[:, start:stop].clamp(max=kv_len)
        first, last = 0, kv_len
        if lo.device.type == "cpu":  # elsewhere looking would wait for the device
            alive = high > low
            first = int(torch.where(alive, low, kv_len).min()) if alive.numel() else kv_len
            last = max(first, int(torch.where(alive, high, 0).max()) if alive.numel() else 0)
        keys = torch.arange(first, last, device=lo.device)
        visible = (keys >= low[..., None]) & (keys < high[..., None])
        yield slice(start, stop), slice(first, last), visible[:, None, None]


def _step_scores(
    query: Tensor, key: Tensor, visible: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hkv, G, rows, keys] with −inf where not visible, and tanh of the capped ones."""
    scores = torch.matmul(query, key.transpose(-1, -2)[:, :, None]).mul_(scale)
    tanh = None
    if softcap:
        tanh = torch.tanh_(scores.div_(softcap))
        scores = tanh * softcap
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
        tanh = None if tanh is None else tanh.masked_fill_(~visible, 0)  # its slope meets weights of 0, and may be NaN
    return scores, tanh


def chunked_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, q_len, _), (kv_heads, _, value_size) = query.shape, value.shape[1:]
    dtype = lse_dtype(query.dtype)
    out = heads_last(batch, heads, q_len, value_size, query)
    largest, total = (query.new_empty(batch, heads, q_len, dtype=dtype) for _ in range(2))
    grouped = (batch, kv_heads, heads // kv_heads)
    sink = None if sinks is None else sinks.to(dtype).view(1, *grouped[1:], 1)
    for rows, keys, visible in _steps(query, key, lo, hi):
        q = query[:, :, rows].unflatten(1, grouped[1:]).to(dtype)
        scores, _ = _step_scores(q, key[:, :, keys].to(dtype), visible, scale, softcap)
        m = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
        if sink is not None:
            m = torch.maximum(m, sink)
        weights = scores.sub_(torch.where(m == -torch.inf, 0, m)[..., None]).exp_()
        t = weights.sum(-1)
        if sink is not None:
            t = t + torch.exp(sink - m)
        weights.div_(torch.where(t == 0, 1, t)[..., None])
        out[:, :, rows] = torch.matmul(weights, value[:, :, None, keys].to(dtype)).flatten(1, 2).to(out.dtype)
        largest[:, :, rows], total[:, :, rows] = m.flatten(1, 2), t.flatten(1, 2)
    return out, largest, total


def chunked_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    out: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    grouped = (kv_heads, heads // kv_heads)
    dtype = total.dtype
    dq = heads_last(batch, heads, q_len, size, query)
    dk = heads_last(batch, kv_heads, kv_len, size, key.new_empty(0, dtype=dtype)).zero_()
    dv = heads_last(batch, kv_heads, kv_len, value_size, value.new_empty(0, dtype=dtype)).zero_()
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    for rows, keys, visible in _steps(query, key, lo, hi):
        q, g = (x[:, :, rows].unflatten(1, grouped).to(dtype) for x in (query, grad))
        k, v = (x[:, :, keys].to(dtype) for x in (key, value))
        m, t, d = (x[:, :, rows].unflatten(1, grouped)[..., None] for x in (largest, total, delta))
        scores, tanh = _step_scores(q, k, visible, scale, softcap)
        weights = scores.sub_(torch.where(m == -torch.inf, 0, m)).exp_().div_(torch.where(t == 0, 1, t))
        dv[:, :, keys] += (weights.transpose(-1, -2) @ g).sum(2)
        dscores = torch.matmul(g, v.transpose(-1, -2)[:, :, None]).sub_(d).mul_(weights)
        if tanh is not None:
            dscores.mul_(1 - tanh * tanh)
        dscores.mul_(scale)
        dq[:, :, rows] = (dscores @ k[:, :, None]).flatten(1, 2).to(dq.dtype)
        dk[:, :, keys] += (dscores.transpose(-1, -2) @ q).sum(2)
    return dq, dk.to(key.dtype), dv.to(value.dtype), delta
