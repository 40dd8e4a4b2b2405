"""Attention behind one door: dense scaled-dot-product attention in one layout. Imports nothing of ours.

B batch · L tokens · N heads · K head width
"""
import torch.nn.functional as F
from einops import rearrange


def attention(q, k, v, metadata=None):
    """Softmax attention, q (B, L, N, K), k and v (B, S, N, K) -> (B, L, N, K); metadata None = dense."""
    q, k, v = (rearrange(x, "B L N K -> B N L K") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B N L K -> B L N K")
