"""Deliberate mistakes: each returns the model with one thing done wrong.

They prove that the golden logits can tell right from wrong. A mistake that moves no logit by twenty tolerances would
pass the tests unseen, so the fixture is not written then.
"""

import copy
import sys

import torch
from torch import nn


def reconfigured(model, **changes):
    """The same weights under a changed config."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    other = type(model)._from_config(config, attn_implementation="eager")
    other.load_state_dict(model.state_dict(), strict=False)
    return other.float().eval()


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def blocks(model):
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def rope_theta(model):
    rope = dict(model.config.rope_parameters)
    rope["rope_theta"] *= 1.5
    return reconfigured(model, rope_parameters=rope)


def rope_scaling(model):
    rope = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
    return reconfigured(model, rope_parameters=rope)


def attention_factor(model):
    rope = dict(model.config.rope_parameters)
    rope["attention_factor"] = 1.0
    return reconfigured(model, rope_parameters=rope)


def rope_interleaved(model):
    """Pairs (2i, 2i + 1) instead of (i, i + head_dim / 2): the rows of q and k in the other order."""
    model = copy.deepcopy(model)
    for attention in attentions(model):
        size = attention.head_dim
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
        for projection in (attention.q_proj, attention.k_proj):
            heads = projection.weight.shape[0] // size
            rows = (torch.arange(heads)[:, None] * size + order).flatten()
            projection.weight.data = projection.weight.data[rows]
            if projection.bias is not None:
                projection.bias.data = projection.bias.data[rows]
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
            if norm is not None:
                heads = norm.weight.shape[0] // size
                rows = (torch.arange(heads)[:, None] * size + order).flatten()
                norm.weight.data = norm.weight.data[rows]
    return model


def top_k(model):
    model = copy.deepcopy(model)
    for block in blocks(model):
        block.gate.top_k -= 1
    return model


def gate_up_swapped(model):
    model = copy.deepcopy(model)
    for block in blocks(model):
        gate, up = block.experts.gate_up_proj.data.chunk(2, dim=1)
        block.experts.gate_up_proj.data = torch.cat([up, gate], dim=1)
    return model


def kv_heads_interleaved(model):
    """Query head h reads key head h % kv_heads instead of h / group: the query heads in another order."""
    model = copy.deepcopy(model)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    order = torch.arange(heads).view(heads // kv_heads, kv_heads).T.flatten()
    for attention in attentions(model):
        size = attention.head_dim
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        attention.q_proj.weight.data = attention.q_proj.weight.data[rows]
        if attention.q_proj.bias is not None:
            attention.q_proj.bias.data = attention.q_proj.bias.data[rows]
        norm = getattr(attention, "q_norm", None)
        if norm is not None and norm.weight.shape[0] == rows.shape[0]:
            norm.weight.data = norm.weight.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
    return model


class PlainNorm(nn.Module):
    """RMS norm over the whole width or over each head, whichever the model does not do."""

    def __init__(self, norm, heads, size, per_head):
        super().__init__()
        self.norm, self.heads, self.size, self.per_head = norm, heads, size, per_head

    def forward(self, x):
        shape = x.shape
        x = x.reshape(*shape[:-1], self.heads, self.size) if self.per_head else x.flatten(-2)
        weight = self.norm.weight
        weight = weight.view(self.heads, self.size) if self.per_head else weight.repeat(self.heads)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon) * weight
        return x.reshape(shape)


def qk_norm_removed(model):
    model = copy.deepcopy(model)
    for attention in attentions(model):
        attention.q_norm = attention.k_norm = nn.Identity()
    return model


def other_width(model, per_head):
    model = copy.deepcopy(model)
    config = model.config
    for attention in attentions(model):
        size = attention.head_dim
        attention.q_norm = PlainNorm(attention.q_norm, config.num_attention_heads, size, per_head)
        attention.k_norm = PlainNorm(attention.k_norm, config.num_key_value_heads, size, per_head)
    return model


def qk_norm_full_width(model):
    return other_width(model, per_head=False)


def qk_norm_per_head(model):
    return other_width(model, per_head=True)


def renormalise(model):
    model = copy.deepcopy(model)

    def undo(_module, _inputs, outputs):
        logits, scores, indices = outputs
        return logits, logits.float().softmax(-1).gather(-1, indices), indices

    def redo(_module, _inputs, outputs):
        logits, scores, indices = outputs
        return logits, scores / scores.sum(-1, keepdim=True), indices

    renormalised = getattr(model.config, "norm_topk_prob", True)
    for block in blocks(model):
        block.gate.register_forward_hook(undo if renormalised else redo)
    return model


def qkv_bias(model):
    model = copy.deepcopy(model)
    for attention in attentions(model):
        attention.k_proj.bias.data.zero_()
    return model


def shared_gate(model):
    model = copy.deepcopy(model)
    for block in blocks(model):
        block.shared_expert_gate.register_forward_hook(lambda _module, _inputs, out: torch.full_like(out, 40.0))
    return model


def shared_expert(model):
    model = copy.deepcopy(model)
    for block in blocks(model):
        block.shared_expert.down_proj.weight.data.zero_()
    return model


def window(model):
    return reconfigured(model, sliding_window=4096)


def window_off_by_one(model):
    return reconfigured(model, sliding_window=model.config.sliding_window + 1)


def clip_removed(model):
    return reconfigured(model, clip_qkv=None)


def clip_before_norm(model):
    clip = model.config.clip_qkv
    model = reconfigured(model, clip_qkv=None)
    for attention in attentions(model):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.register_forward_hook(lambda _module, _inputs, out: out.clamp(-clip, clip))
    return model


@torch.no_grad()
def combine_rounding(model, prompts):
    """Not a mistake: logits under the rounding of the integer combine (each expert's contribution rounded to steps of
    about rms / 2048 of an expert's output), to see how far from the tolerance that stays."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def round_to_step(_module, inputs, out):
        weights = inputs[2].float()
        rms = (out.pow(2).mean(-1) / weights.pow(2).sum(-1)).mean().sqrt()
        step = 2.0 ** torch.log2(rms / 2048).round()
        noise = sum(torch.rand(out.shape, generator=generator) - 0.5 for _ in range(weights.shape[-1]))
        return out + noise * step

    for block in blocks(model):
        block.experts.register_forward_hook(round_to_step)
    return model(prompts).logits


@torch.no_grad()
def cache_rounding(model, prompts, dtype):
    """Not a mistake: logits with keys and values rounded to `dtype`, as a cache of that type would hold them."""
    module = sys.modules[type(attentions(model)[0]).__module__]
    plain = module.eager_attention_forward

    def rounded(attention, query, key, value, *args, **kwargs):
        return plain(attention, query, key.to(dtype).float(), value.to(dtype).float(), *args, **kwargs)

    module.eager_attention_forward = rounded
    try:
        return model(prompts).logits
    finally:
        module.eager_attention_forward = plain
