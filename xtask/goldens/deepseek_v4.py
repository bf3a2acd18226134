"""DeepSeek-V4 as published: its names, its types, and weights that make every part of it matter."""

import re

import torch

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "bos_token_id": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 2,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 16,
    "index_n_heads": 8,
    "index_topk": 8,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    # Few positions, so that a short prompt meets plain and interpolated frequencies.
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 64, "type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 16,
    # Small enough to be reached.
    "swiglu_limit": 2.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 256,
}

TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}

# Beginnings of names within a layer; longer ones come first.
LAYER = {
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.": "attn.wq_a.",
    "self_attn.q_b_proj.": "attn.wq_b.",
    "self_attn.q_a_norm.": "attn.q_norm.",
    "self_attn.kv_norm.": "attn.kv_norm.",
    "self_attn.kv_proj.": "attn.wkv.",
    "self_attn.o_a_proj.": "attn.wo_a.",
    "self_attn.o_b_proj.": "attn.wo_b.",
    "self_attn.compressor.indexer.scorer.weights_proj.": "attn.indexer.weights_proj.",
    "self_attn.compressor.indexer.q_b_proj.": "attn.indexer.wq_b.",
    "self_attn.compressor.indexer.kv_proj.": "attn.indexer.compressor.wkv.",
    "self_attn.compressor.indexer.gate_proj.": "attn.indexer.compressor.wgate.",
    "self_attn.compressor.indexer.kv_norm.": "attn.indexer.compressor.norm.",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.kv_proj.": "attn.compressor.wkv.",
    "self_attn.compressor.gate_proj.": "attn.compressor.wgate.",
    "self_attn.compressor.kv_norm.": "attn.compressor.norm.",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.": "ffn.gate.",
    "mlp.shared_experts.gate_proj.": "ffn.shared_experts.w1.",
    "mlp.shared_experts.down_proj.": "ffn.shared_experts.w2.",
    "mlp.shared_experts.up_proj.": "ffn.shared_experts.w3.",
}

F32 = re.compile(r"(hc_|attn_sink$|\.ape$|gate\.bias$)")
FP8 = re.compile(r"(attn\.w(q_a|q_b|kv|o_a|o_b)|indexer\.wq_b|shared_experts\.w\d)\.weight$")

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def draw(name, shape, rng, config):
    """Values of one parameter; `None` for those that are like everybody's."""
    normal = lambda mean, std: torch.randn(*shape, generator=rng) * std + mean
    if name.endswith("tid2eid"):
        experts, k = config["n_routed_experts"], config["num_experts_per_tok"]
        return torch.stack([torch.randperm(experts, generator=rng)[:k] for _ in range(shape[0])])
    if name.endswith("e_score_correction_bias"):
        return normal(0.0, 0.3)
    if name.endswith("sinks"):
        return normal(0.5, 1.0)
    if name.endswith("position_bias") or re.search(r"_hc\.base$|hc_base$", name):
        return normal(0.0, 0.5)
    if re.search(r"_hc\.scale$|hc_scale$", name):
        return normal(0.8, 0.2)
    if "gate_up_proj" in name or name.endswith(("gate_proj.weight", "up_proj.weight")) and "compressor" not in name:
        return normal(0.0, 1.4 * shape[-1] ** -0.5)
    return None


def renamed(name):
    if name in TOP:
        return TOP[name]
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name).groups()
    for ours, theirs in LAYER.items():
        if rest.startswith(ours):
            return f"layers.{layer}.{theirs}{rest[len(ours):]}"
    raise KeyError(name)


def power_of_two(largest, top):
    """The exponent byte of the smallest power of two that brings `largest` within `top`."""
    return (torch.log2(largest.clamp_min(1e-30) / top).ceil().clamp(-126, 127) + 127).to(torch.uint8)


def as_fp4(value):
    """Two 4-bit floats a byte, the first low, with a power of two for every 32."""
    rows = value.float().reshape(*value.shape[:-1], -1, 32)
    scale = power_of_two(rows.abs().amax(-1), 6.0)
    scaled = rows / torch.exp2(scale.float() - 127)[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1).reshape(value.shape)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed.view(torch.int8), scale.view(torch.float8_e8m0fnu)


def as_fp8(value):
    """8-bit floats with a power of two for every block of 128 by 128."""
    rows, cols = value.shape
    pad = torch.nn.functional.pad(value.float(), (0, -cols % 128, 0, -rows % 128))
    blocks = pad.reshape(pad.shape[0] // 128, 128, -1, 128)
    scale = power_of_two(blocks.abs().amax((1, 3)), 448.0)
    scaled = (blocks / torch.exp2(scale.float() - 127)[:, None, :, None]).reshape(pad.shape)[:rows, :cols]
    return scaled.to(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def widen(tensors):
    """The same tensors with their scales multiplied in."""
    out = {}
    for name, value in tensors.items():
        stem = name.removesuffix("weight")
        if name.endswith(".scale"):
            continue
        scale = tensors.get(stem + "scale") if name.endswith(".weight") else None
        if scale is None:
            out[name] = value if value.dtype == torch.int64 else value.float()
            continue
        scale = torch.exp2(scale.view(torch.uint8).float() - 127)
        if value.dtype == torch.int8:
            codes = value.view(torch.uint8).long()
            values = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).flatten(-2)
            out[name] = values * scale.repeat_interleave(32, -1)
        else:
            each = scale.repeat_interleave(128, 0)[: value.shape[0]].repeat_interleave(128, 1)[:, : value.shape[1]]
            out[name] = value.float() * each
    return out


def on_disk(state, config):
    """The f32 parameters of transformers -> published names and types; 8- and 4-bit floats where the config says so."""
    out, inner = {}, config["moe_intermediate_size"]
    small = "quantization_config" in config

    def put(name, value):
        stem = name.removesuffix("weight")
        if name.endswith("tid2eid"):
            out[name] = value.long()
        elif F32.search(name):
            out[name] = value.float()
        elif small and ".experts." in name:
            out[name], out[stem + "scale"] = as_fp4(value)
        elif small and FP8.search(name):
            out[name], out[stem + "scale"] = as_fp8(value)
        else:
            out[name] = value.bfloat16()

    for name, value in state.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            put(renamed(name), value)
            continue
        experts = f"layers.{name.split('.')[2]}.ffn.experts"
        for e, one in enumerate(value):
            if name.endswith("down_proj"):
                put(f"{experts}.{e}.w2.weight", one)
            else:
                put(f"{experts}.{e}.w1.weight", one[:inner])
                put(f"{experts}.{e}.w3.weight", one[inner:])
    return out
