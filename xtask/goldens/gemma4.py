"""Gemma 4 with experts, as published and as MLX writes it."""

import math

import torch

CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 605,
    "eos_token_id": [2],
    # Beyond the vocabulary: transformers embeds a placeholder as padding.
    "image_token_id": 600,
    "model_type": "gemma4",
    "text_config": {
        "attention_bias": False,
        "attention_k_eq_v": True,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "enable_moe_block": True,
        "eos_token_id": 2,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 96,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "max_position_embeddings": 1024,
        "model_type": "gemma4_text",
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_experts": 6,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": 256,
        "vocab_size_per_layer_input": 256,
    },
    "tie_word_embeddings": True,
    "video_token_id": 606,
    "vision_config": {
        "head_dim": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 16,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    },
}

def draw(rng, name, shape):
    normal = lambda mean, std: torch.randn(*shape, generator=rng) * std + mean
    fan_in = 1 / math.sqrt(shape[-1]) if shape else 1.0
    if "vision" in name:
        return normal(0.0, 0.02)
    if name.endswith("layer_scalar"):
        return normal(0.8, 0.15)
    if name.endswith("language_model.norm.weight"):
        return normal(4.0, 0.3)
    # Scores have no 1/sqrt(d): the norms set their size.
    if name.endswith("q_norm.weight"):
        return normal(0.35, 0.07)
    if name.endswith(("router.scale", "per_expert_scale")) or "norm" in name.rsplit(".", 2)[-2]:
        return normal(1.0, 0.2)
    if name.endswith("router.proj.weight"):
        return normal(0.0, 2.0)
    return normal(0.0, fan_in)


def on_disk(state, layout, quantise):
    """See gpt_oss.py."""
    if layout == "fused":
        return {n: t.bfloat16() for n, t in state.items()}, {}, None
    tensors, effective, quantization = {}, {}, {"group_size": 32, "bits": 4, "mode": "affine"}

    def pack(module, value):
        bits = 8 if module.endswith("router.proj") else 4
        if bits == 8:
            quantization[module] = {"group_size": 32, "bits": 8}
        words, scales, biases, values = quantise(value.bfloat16(), bits, 32)
        tensors.update({f"{module}.weight": words, f"{module}.scales": scales, f"{module}.biases": biases})
        return values

    for name, value in state.items():
        mlx = name.replace("model.language_model.", "language_model.model.")
        if "vision" in name:
            effective[name] = value
        elif name.endswith("experts.gate_up_proj"):
            inner, base = value.shape[1] // 2, mlx.rsplit(".", 1)[0]
            parts = [("gate_proj", value[:, :inner]), ("up_proj", value[:, inner:])]
            effective[name] = torch.cat([pack(f"{base}.switch_glu.{part}", stack) for part, stack in parts], 1)
        elif name.endswith("experts.down_proj"):
            effective[name] = pack(mlx.rsplit(".", 1)[0] + ".switch_glu.down_proj", value)
        elif value.ndim == 2:
            effective[name] = pack(mlx.removesuffix(".weight"), value)
        else:
            tensors[mlx] = value.bfloat16()
            effective[name] = tensors[mlx].float()
    effective["lm_head.weight"] = effective["model.language_model.embed_tokens.weight"]
    return tensors, {"quantization": quantization}, effective
