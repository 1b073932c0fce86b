"""The algorithm of the makeMoE article (Sooriyarachchi 2024), written plainly: what we measure ourselves against.

One head after another, one expert after another behind a mask, and AdamW as it comes.
Three things are as in the article though we would do them differently: attention is scaled by the width of the model
and not of the head, noise is added to the scores of the router in evaluation too, and matrices that write into the
residual stream start as large as any other.
"""

import torch
from torch import nn
from torch.nn import functional as F

from makemoe.data import get_batch


class PlainHead(nn.Module):
    "One head of causal attention: x (B, T, C) -> (B, T, D)."

    def __init__(self, n_embd, head_size, block_size, dropout):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("past", torch.ones(block_size, block_size).tril())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        scores = self.query(x) @ self.key(x).transpose(1, 2) * C**-0.5  # a slip: the scale belongs to D, not to C
        weights = scores.masked_fill(self.past[:T, :T] == 0, -torch.inf).softmax(dim=-1)  # (B, T, T)
        return self.dropout(weights) @ self.value(x)


class PlainAttention(nn.Module):
    "Head after head, side by side, and mixed: x (B, T, C) -> (B, T, C)."

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.heads = nn.ModuleList(PlainHead(n_embd, n_embd // n_head, block_size, dropout) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class PlainExpert(nn.Sequential):
    "x (..., C) -> (..., H) -> (..., C)."

    def __init__(self, n_embd, n_hidden, dropout):
        super().__init__(nn.Linear(n_embd, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_embd), nn.Dropout(dropout))


class PlainMoE(nn.Module):
    "Noisy top-k routing, then a loop over the experts, each on the tokens under its mask: x (B, T, C) -> (B, T, C)."

    def __init__(self, n_embd, n_hidden, num_experts, top_k, dropout):
        super().__init__()
        self.score, self.noise = nn.Linear(n_embd, num_experts), nn.Linear(n_embd, num_experts)
        self.experts = nn.ModuleList(PlainExpert(n_embd, n_hidden, dropout) for _ in range(num_experts))
        self.top_k = top_k

    def forward(self, x):
        logits, deviation = self.score(x), F.softplus(self.noise(x))  # (B, T, E)
        noisy = logits + torch.randn_like(logits) * deviation
        values, indices = noisy.topk(self.top_k, dim=-1)  # (B, T, k)
        gates = torch.full_like(noisy, -torch.inf).scatter(-1, indices, values).softmax(dim=-1)  # (B, T, E)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (indices == e).any(dim=-1)  # (B, T)
            if mask.any():
                y[mask] += (gates[mask][:, e, None] * expert(x[mask])).to(y.dtype)
        return y


class PlainBlock(nn.Module):
    "Attention and a mixture, each behind a norm and beside a residual."

    def __init__(self, config):
        super().__init__()
        c = config
        self.norm1, self.norm2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attention = PlainAttention(c.n_embd, c.n_head, c.block_size, c.dropout)
        self.moe = PlainMoE(c.n_embd, c.n_hidden, c.num_experts, c.top_k, c.dropout)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.moe(self.norm2(x))


class PlainModel(nn.Module):
    "ids (B, T) -> logits (B, T, V). Takes its sizes from a `MoEConfig`, `MoEConfig.blog()` being those of the article."

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.position_embedding = nn.Embedding(c.block_size, c.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(c) for _ in range(c.n_layer)))
        self.norm = nn.LayerNorm(c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        return self.lm_head(self.norm(self.blocks(x)))

    def loss(self, ids, targets):
        "Mean cross-entropy, nats per token."
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def plain_step(model, optimizer, ids, batch_size=16, generator=None):
    "One step of training on random windows of the stream `ids`, as in the article; returns the loss."
    x, y = get_batch(ids, batch_size, model.config.block_size, generator)
    device = model.lm_head.weight.device
    loss = model.loss(x.to(device), y.to(device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss
