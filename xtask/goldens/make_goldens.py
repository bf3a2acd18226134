#!/usr/bin/env python3
"""Tiny random checkpoints of every family with the outputs that transformers computes from them.

Each golden is a folder with the files of a real checkpoint (config, sharded safetensors, index) and a
`golden.safetensors`: input_ids [T], logits [T, V], router_ids and router_weights [MoE layers, T, k] (largest
weight first), greedy_tokens [32]. Numbers come from a model that was loaded back from those files, weights
widened to f32, all arithmetic f32. Seeds are drawn again until no choice of a route or token is a near tie, so
ids must match exactly and logits within float noise.

  make_goldens.py --out crates/mach-models/tests/goldens --tiny models/tiny
"""

import argparse
import copy
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile

os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", USE_HUB_KERNELS="0")

import torch
from safetensors.torch import save_file

import deepseek_v4
import gemma4
import gpt_oss
import reference
from templates import template_cases

GREEDY = 32
# A route or a token is clear when float noise of another order of additions cannot flip it.
ROUTE_GAP, TOKEN_GAP, NOISE = 2e-4, 5e-3, 1e-4
# A continuation that repeats itself would hide a wrong state.
DISTINCT = 12


def merge(base, changes):
    """A deep copy of a nested dictionary with some fields replaced."""
    out = copy.deepcopy(base)
    for key, value in changes.items():
        out[key] = merge(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


# ---------------------------------------------------------------- shapes

QWEN3_5 = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
    "tie_word_embeddings": False,
    "text_config": {
        "attention_bias": False,
        "attn_output_gate": True,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 1024,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 32,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 32,
        "tie_word_embeddings": False,
        "vocab_size": 256,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "model_type": "qwen3_5_moe_vision",
        "num_heads": 2,
        "num_position_embeddings": 4,
        "out_hidden_size": 64,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 256,
}

# name: base config, changes, prompt tokens, experts on disk, element type, MLX (bits, group)
SHAPES = {
    "qwen3_5-base": (QWEN3_5, {}, 70, "fused", torch.bfloat16, None),
    "qwen3_5-uneven": (
        QWEN3_5,
        {
            "text_config": {
                "full_attention_interval": 2,
                "head_dim": 24,
                "hidden_size": 48,
                "layer_types": ["linear_attention", "full_attention"] * 2,
                "linear_conv_kernel_dim": 3,
                "linear_key_head_dim": 20,
                "linear_num_value_heads": 6,
                "linear_value_head_dim": 12,
                "moe_intermediate_size": 24,
                "num_attention_heads": 6,
                "num_experts": 5,
                "num_experts_per_tok": 3,
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"mrope_section": [2, 2, 2], "partial_rotary_factor": 0.5, "rope_theta": 50000},
                "shared_expert_intermediate_size": 40,
            },
            "vision_config": {"out_hidden_size": 48},
        },
        40,
        "each",
        torch.float32,
        None,
    ),
    "qwen3_5-mlx4": (
        QWEN3_5,
        {"text_config": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 6}},
        40,
        "stacked",
        torch.bfloat16,
        (4, 64),
    ),
    "qwen3-base": (QWEN3, {}, 280, "each", torch.bfloat16, None),
    "qwen3-dense-layers": (
        QWEN3,
        {
            "decoder_sparse_step": 2,
            "head_dim": 20,
            "hidden_size": 72,
            "mlp_only_layers": [3],
            "moe_intermediate_size": 40,
            "norm_topk_prob": False,
            "num_attention_heads": 6,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 6,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        },
        40,
        "fused",
        torch.float16,
        None,
    ),
    "deepseek_v4-base": (deepseek_v4.CONFIG, {}, 140, "each", torch.bfloat16, None),
    "deepseek_v4-fp8fp4": (
        deepseek_v4.CONFIG,
        {
            "expert_dtype": "fp4",
            "head_dim": 64,
            "hidden_size": 128,
            "hc_mult": 2,
            "index_head_dim": 32,
            "index_n_heads": 2,
            # Everything is chosen: rounded activations would flip near ties.
            "index_topk": 64,
            "moe_intermediate_size": 64,
            "n_routed_experts": 4,
            "o_lora_rank": 32,
            # More than one block of scales.
            "q_lora_rank": 160,
            "qk_rope_head_dim": 16,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            },
        },
        140,
        "each",
        torch.bfloat16,
        None,
    ),
    "qwen3-mlx8": (QWEN3, {"num_hidden_layers": 2}, 40, "stacked", torch.bfloat16, (8, 32)),
    # The limit that GGUF files imply.
    "gpt_oss-mxfp4": (gpt_oss.CONFIG, {"swiglu_limit": 7.0}, 100, "mxfp4", None, None),
    "gpt_oss-bf16": (gpt_oss.CONFIG, {"num_hidden_layers": 2, "layer_types": gpt_oss.CONFIG["layer_types"][:2]}, 40, "fused", None, None),
    "gpt_oss-uneven": (gpt_oss.CONFIG, gpt_oss.UNEVEN, 80, "fused", None, None),
    "gpt_oss-mlx": (gpt_oss.CONFIG, {}, 40, "mlx", None, None),
    "gemma4-base": (gemma4.CONFIG, {}, 40, "fused", None, None),
    "gemma4-mlx4": (gemma4.CONFIG, {}, 40, "mlx", None, None),
}

# Families whose files and values are made by their own module.
FAMILIES = {"gpt_oss": gpt_oss, "gemma4": gemma4}


# ---------------------------------------------------------------- weights


def generator(seed, name):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw(seed, name, shape, zero_centred, tied=False):
    """Values that keep activations of order one, so that every part of the model matters."""
    rng = generator(seed, name)
    normal = lambda mean, std: torch.randn(*shape, generator=rng) * std + mean
    fan_in = 1 / math.sqrt(shape[-1])
    if name.endswith("A_log"):
        return torch.log(torch.rand(*shape, generator=rng) * 8 + 0.05)
    if name.endswith("dt_bias"):
        return normal(-2.0, 1.0)
    if name.endswith("linear_attn.norm.weight"):
        return normal(1.0, 0.1)
    if "norm" in name.rsplit(".", 2)[-2] and "visual" not in name:
        return normal(0.0 if zero_centred else 1.0, 0.2)
    if name.endswith("conv1d.weight"):
        return normal(0.0, 0.5)
    if name.endswith("embed_tokens.weight"):
        return normal(0.0, 3 * fan_in if tied else 1.0)
    if name.endswith("lm_head.weight"):
        return normal(0.0, 3 * fan_in)
    if name.endswith("mlp.gate.weight"):
        return normal(0.0, 2 * fan_in)
    return normal(0.0, fan_in)


def split_experts(name, value):
    """Stacked transformers parameter -> (projection, [E, out, in]) parts; nothing for other tensors."""
    if name.endswith("experts.gate_up_proj"):
        inner = value.shape[1] // 2
        return [("gate_proj", value[:, :inner]), ("up_proj", value[:, inner:])]
    return [("down_proj", value)] if name.endswith("experts.down_proj") else []


def on_disk(state, experts, dtype):
    """The f32 parameters of transformers -> tensors as published checkpoints name and type them."""
    out = {}
    for name, value in state.items():
        keep_f32 = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
        value = value if keep_f32 else value.to(dtype)
        parts = split_experts(name, value) if experts == "each" else []
        base = name.rsplit(".", 1)[0]
        for projection, stack in parts:
            out.update({f"{base}.{e}.{projection}.weight": one for e, one in enumerate(stack)})
        if not parts:
            out[name] = value
    return out


def quantise(value, bits, group):
    """Affine groups along the input as MLX stores them: u32 words, bf16 scales and biases; and the values."""
    rows = value.float().reshape(*value.shape[:-1], -1, group)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    # Real files have scales of both signs: count from the end that is larger in magnitude.
    flip = high.abs() > low.abs()
    scale = torch.where(flip, low - high, high - low) / (2**bits - 1)
    scale, bias = scale.bfloat16().float(), torch.where(flip, high, low).bfloat16().float()
    q = ((rows - bias) / scale).round().clamp(0, 2**bits - 1)
    per_word = 32 // bits
    shifts = torch.arange(per_word) * bits
    words = (q.long().reshape(*value.shape[:-1], -1, per_word) << shifts).sum(-1)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.uint32)
    drop = lambda t: t.squeeze(-1).bfloat16()
    return signed, drop(scale), drop(bias), (scale * q + bias).reshape(value.shape)


def affine(value, group_size, bits, mode="affine"):
    """A quantiser for `to_mlx`."""
    words, scales, biases, values = quantise(value, bits, group_size)
    return {"weight": words, "scales": scales, "biases": biases}, values


def to_mlx(state, config, quantiser, general, routers):
    """MLX naming and quantisation. Returns tensors, the `quantization` entry, and the effective f32 parameters.

    `quantiser` gives a module's tensors and their values; `general` and `routers` are its arguments, and the entries of the
    configuration: routers and the gates of shared experts have one of their own where it differs."""
    nested = "text_config" in config
    tensors, effective, quantization = {}, {}, dict(general)
    same = {"mode": "affine"} | routers == general

    def pack(module, value):
        own = module.endswith(("mlp.gate", "shared_expert_gate")) and not same
        if own:
            quantization[module] = routers
        parts, values = quantiser(value.bfloat16(), **(routers if own else general))
        tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
        return values

    for name, value in state.items():
        if "visual." in name:
            effective[name] = value
            continue
        mlx = name
        if nested:
            mlx = name.replace("model.language_model.", "language_model.model.") if name.startswith("model.") else f"language_model.{name}"
        parts = split_experts(name, value)
        if parts:
            base = mlx.rsplit(".experts", 1)[0]
            effective[name] = torch.cat([pack(f"{base}.switch_mlp.{p}", stack) for p, stack in parts], 1)
        elif name.endswith("conv1d.weight"):
            tensors[mlx] = value.bfloat16().transpose(1, 2)
            effective[name] = value.bfloat16().float()
        elif nested and "norm.weight" in name and "linear_attn" not in name:
            tensors[mlx] = (value.bfloat16().float() + 1).bfloat16()
            effective[name] = tensors[mlx].float() - 1
        elif value.ndim == 2:
            effective[name] = pack(mlx.removesuffix(".weight"), value)
        else:
            tensors[mlx] = value if name.endswith(("A_log", "linear_attn.norm.weight")) else value.bfloat16()
            effective[name] = tensors[mlx].float()
    return tensors, quantization, effective


# ---------------------------------------------------------------- files


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_checkpoint(folder, config, tensors, shards=2):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False})
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def build(name, seed, folder):
    """Writes one checkpoint and runs it. Returns the outputs and whether all their choices are clear."""
    base, changes, length, experts, dtype, mlx = SHAPES[name]
    config = merge(base, changes)
    torch.manual_seed(seed)
    model = reference.empty(config)
    zero_centred = config["model_type"] == "qwen3_5_moe"
    tied = config["tie_word_embeddings"]
    names = {n: t.shape for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    family = FAMILIES.get(config["model_type"])
    if family:
        state = {n: family.draw(generator(seed, n), n, shape) for n, shape in names.items()}
        tensors, changes, effective = family.on_disk(state, experts, quantise)
        write_checkpoint(folder, config | changes, tensors)
        if effective:
            model.load_state_dict(effective)
        else:
            model = reference.load(folder)
        return finish(config, model, length, seed, folder)
    deepseek = config["model_type"] == "deepseek_v4"
    own = lambda n, shape: deepseek_v4.draw(n, shape, generator(seed, n), config) if deepseek else None
    state = {n: own(n, shape) for n, shape in names.items()}
    state = {n: draw(seed, n, names[n], zero_centred, tied) if value is None else value for n, value in state.items()}
    if deepseek:
        tensors = deepseek_v4.on_disk(state, config)
        tensors["mtp.0.norm.weight"] = torch.ones(8)
        write_checkpoint(folder, config, tensors)
        # transformers reads the values without their scales.
        with tempfile.TemporaryDirectory() as plain:
            fields = {k: v for k, v in config.items() if k not in ("expert_dtype", "quantization_config")}
            write_checkpoint(pathlib.Path(plain) / "model", fields, deepseek_v4.widen(tensors))
            model = reference.load(pathlib.Path(plain) / "model")
    elif mlx:
        bits, group = mlx
        general = {"group_size": group, "bits": bits, "mode": "affine"}
        tensors, quantization, effective = to_mlx(state, config, affine, general, {"group_size": group, "bits": 8})
        write_checkpoint(folder, config | {"quantization": quantization, "quantization_config": quantization}, tensors)
        model.load_state_dict(effective)
    else:
        tensors = on_disk(state, experts, dtype)
        if zero_centred:
            # A prediction head beside the model, which the plain forward pass leaves alone.
            tensors["mtp.fc.weight"] = draw(seed, "mtp.fc.weight", (8, 16), True).to(dtype)
        write_checkpoint(folder, config, tensors)
        model = reference.load(folder)
    return finish(config, model, length, seed, folder)


def finish(config, model, length, seed, folder):
    """Runs a checkpoint and writes what it gives."""
    ids = torch.randint(3, 250, (length,), generator=generator(seed, "prompt"))
    run = reference.run(model, ids)
    tokens, gap, noise = reference.greedy(model, ids, GREEDY)
    save_file(run.tensors() | {"greedy_tokens": tokens}, folder / "golden.safetensors")
    chosen = set(tokens.tolist())
    distinct, eos = len(chosen), config.get("text_config", config)["eos_token_id"]
    clear = run.route_gap >= ROUTE_GAP and gap >= TOKEN_GAP and noise <= NOISE and distinct >= DISTINCT and eos not in chosen
    return clear, f"route gap {run.route_gap:.1e}, token gap {gap:.1e}, noise {noise:.1e}, {distinct} distinct tokens"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=sorted(SHAPES), help="one shape instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", type=pathlib.Path, help="folder with tokenizer and chat template for the template goldens")
    args = parser.parse_args()
    for name in [args.only] if args.only else SHAPES:
        for attempt in range(100):
            clear, text = build(name, args.seed + attempt, args.out / name)
            if clear:
                break
        else:
            raise SystemExit(f"{name}: no seed of 100 has clear choices")
        size = sum(f.stat().st_size for f in (args.out / name).iterdir())
        print(f"{name}: seed {args.seed + attempt}, {text}, {size} bytes", flush=True)
    if args.tiny:
        write_json(args.out / "chat_template.json", template_cases(args.tiny))


if __name__ == "__main__":
    main()
