"""gpt-oss in the layouts that people download: MXFP4 blocks, plain `[experts, in, out]`, MLX's split projections."""

import math

import torch

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 2,
    "experts_per_token": 3,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 64,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "rms_norm_eps": 1e-5,
    # A prompt longer than these positions meets plain, blended and divided frequencies.
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 64, "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000,
    "sliding_window": 8,
    # Small enough to be reached.
    "swiglu_limit": 2.5,
    "tie_word_embeddings": False,
    "vocab_size": 256,
}

UNEVEN = {
    "experts_per_token": 2,
    "head_dim": 24,
    "hidden_size": 56,
    "intermediate_size": 40,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_local_experts": 5,
    "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 32, "truncate": True},
    "sliding_window": 37,
}


def draw(rng, name, shape):
    normal = lambda mean, std: torch.randn(*shape, generator=rng) * std + mean
    fan_in = 1 / math.sqrt(shape[-1])
    if "norm" in name.rsplit(".", 2)[-2]:
        return normal(1.0, 0.2)
    if name.endswith("sinks"):
        return normal(0.5, 1.0)
    if name.endswith("bias"):
        return normal(0.0, 0.3)
    if name.endswith("embed_tokens.weight"):
        return normal(0.0, 1.0)
    if name.endswith("lm_head.weight"):
        return normal(0.0, 3 * fan_in)
    if name.endswith("router.weight"):
        return normal(0.0, 2 * fan_in)
    if name.endswith("experts.gate_up_proj"):
        return normal(0.0, 3.5 / math.sqrt(shape[1]))
    if name.endswith("experts.down_proj"):
        return normal(0.0, 0.3 / math.sqrt(shape[1]))
    return normal(0.0, fan_in)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(value):
    """[.., in] -> codes [.., in / 32, 32], exponents [.., in / 32], values."""
    groups = value.reshape(*value.shape[:-1], -1, 32)
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6)).clamp(-127, 127)
    scaled = groups / torch.exp2(exponent)
    codes = (scaled[..., None] - E2M1).abs().argmin(-1)
    return codes, (exponent.squeeze(-1) + 127).to(torch.uint8), (E2M1[codes] * torch.exp2(exponent)).reshape(value.shape)


def nibbles(codes):
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def on_disk(state, layout, quantise):
    """Tensors, changes of the configuration, and the parameters they stand for where transformers does not read them."""
    if layout == "fused":
        return {n: t.bfloat16() for n, t in state.items()}, {}, None
    tensors, effective, config = {}, {}, {"quantization_config": {"quant_method": "mxfp4"}}
    for name, value in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            codes, scales, values = mxfp4(value.transpose(1, 2).contiguous())
            effective[name] = values.transpose(1, 2).contiguous()
            if layout == "mxfp4":
                tensors |= {f"{name}_blocks": nibbles(codes), f"{name}_scales": scales}
                continue
            words = nibbles(codes).reshape(*values.shape[:2], -1).contiguous().view(torch.uint32)
            parts = [("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))] if "gate_up" in name else [("down_proj", slice(None))]
            for part, rows in parts:
                module = name.rsplit(".", 1)[0] + f".{part}"
                tensors |= {f"{module}.weight": words[:, rows], f"{module}.scales": scales[:, rows]}
        elif layout == "mlx" and name.endswith("gate_up_proj_bias"):
            module, value = name.rsplit(".", 1)[0], value.bfloat16()
            tensors |= {f"{module}.gate_proj.bias": value[:, ::2], f"{module}.up_proj.bias": value[:, 1::2]}
            effective[name] = value.float()
        elif layout == "mlx" and name.endswith("down_proj_bias"):
            tensors[name.replace("_bias", ".bias")] = value.bfloat16()
            effective[name] = value.bfloat16().float()
        elif layout == "mlx" and value.ndim == 2 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            words, scales, biases, effective[name] = quantise(value.bfloat16(), 8, 32)
            tensors |= {f"{module}.weight": words, f"{module}.scales": scales, f"{module}.biases": biases}
        else:
            tensors[name] = value.bfloat16()
            effective[name] = value.bfloat16().float()
    if layout == "mlx":
        modules = {n.removesuffix(".biases"): {"group_size": 32, "bits": 8} for n in tensors if n.endswith(".biases")}
        config = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"} | {m: v | {"mode": "affine"} for m, v in modules.items()}}
    return tensors, config, effective
