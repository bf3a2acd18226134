#!/usr/bin/env python3
"""Number formats: packed bytes and the values that an independent dequantiser gives them.

`formats.safetensors`: modules as checkpoints store them, each with `MODULE.expect` in f32, read back by MLX's CPU build
(affine, mxfp4, mxfp8, nvfp4), `transformers` (gpt-oss), compressed-tensors, or torch's own small floats.
`formats.json`: the `config.json` that belongs to them.
`blocks.gguf`: random blocks of every ggml type that mach computes with, `T` [3, 512], and what gguf-py makes of them, `T.f32`.

  make_formats.py --out crates/mach-format/tests/goldens
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

ROWS, COLS = 5, 256


def randn(rng, *shape):
    return torch.from_numpy(rng.normal(0, 0.5, shape).astype(np.float32))


def mlx(rng, out, quantization):
    import mlx.core as mx

    def tensor(a, view=None):
        a = np.array(a.astype(mx.float32)) if a.dtype == mx.bfloat16 else np.array(a)
        t = torch.from_numpy(a.view(view) if view else a.copy())
        return t

    def one(name, bits, group, mode, largest=None):
        w = mx.array(randn(rng, ROWS, COLS).numpy()).astype(mx.bfloat16)
        q, scales, *biases = mx.quantize(w, group_size=group, bits=bits, mode=mode, global_scale=largest)
        out[f"{name}.weight"] = tensor(q).view(torch.uint32)
        quantization[name] = {"bits": bits, "group_size": group, "mode": mode}
        if mode == "affine":
            out[f"{name}.scales"], out[f"{name}.biases"] = (tensor(t).to(torch.bfloat16) for t in (scales, biases[0]))
            scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
            expect = mx.dequantize(q, scales, biases[0], group_size=group, bits=bits)
        else:
            out[f"{name}.scales"] = tensor(scales)
            if largest is not None:
                out[f"{name}.global_scale"] = tensor(largest)
            expect = mx.dequantize(q, scales, group_size=group, bits=bits, mode=mode, global_scale=largest, dtype=mx.float32)
        out[f"{name}.expect"] = tensor(expect)

    with mx.stream(mx.cpu):
        for bits, group in ((2, 64), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 64), (8, 64)):
            one(f"mlx_affine_{bits}_{group}", bits, group, "affine")
        one("mlx_mxfp4", 4, 32, "mxfp4")
        one("mlx_mxfp8", 8, 32, "mxfp8")
        one("mlx_nvfp4", 4, 16, "nvfp4")
        # The largest value of the tensor, that scales are relative to.
        one("mlx_nvfp4_global", 4, 16, "nvfp4", mx.array(3.5))


def fp4_values(packed):
    """Neighbours in a byte, the first low -> numbers of E2M1."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return table[codes.long()]


def published(rng, out):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = lambda *shape, lo=0, hi=256: torch.from_numpy(rng.integers(lo, hi, shape, dtype=np.uint8))
    experts = 2
    blocks, scales = random(experts, ROWS, COLS // 32, 16), random(experts, ROWS, COLS // 32, lo=110, hi=130)
    out |= {"gptoss_blocks": blocks, "gptoss_scales": scales}
    # It gives bf16 (exact: four significant bits at most) with inputs before outputs.
    out["gptoss.expect"] = convert_moe_packed_tensors(blocks, scales).float().transpose(1, 2).contiguous()

    packed, scale = random(ROWS, COLS // 2), random(ROWS, COLS // 32, lo=110, hi=130).view(torch.float8_e8m0fnu)
    out |= {"deepseek_fp4.weight": packed.view(torch.int8), "deepseek_fp4.scale": scale}
    out["deepseek_fp4.expect"] = fp4_values(packed) * scale.float().repeat_interleave(32, 1)

    # NVIDIA's ModelOpt: a scale for every 16 and one for the tensor.
    packed, scale = random(ROWS, COLS // 2), torch.from_numpy(rng.uniform(0.5, 400, (ROWS, COLS // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    out |= {"modelopt.weight": packed, "modelopt.weight_scale": scale, "modelopt.weight_scale_2": torch.tensor(0.0123)}
    out["modelopt.input_scale"] = torch.tensor(1.0)
    out["modelopt.expect"] = fp4_values(packed) * (scale.float() * 0.0123).repeat_interleave(16, 1)

    # By blocks of 128 x 128, the last ones partial: rows and columns.
    def blocks(name, rows, cols, scale, part):
        fp8 = (randn(rng, rows, cols) * 200).to(torch.float8_e4m3fn)
        wide = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        out.update({f"{name}.weight": fp8, f"{name}.{part}": scale, f"{name}.expect": fp8.float() * wide})

    random_scale = lambda *shape: torch.from_numpy(rng.uniform(0.001, 0.01, shape).astype(np.float32))
    blocks("deepseek_fp8", 130, 160, torch.tensor([[120, 118], [119, 122]], dtype=torch.uint8).view(torch.float8_e8m0fnu), "scale")
    blocks("fp8_bfloat16", ROWS, 192, random_scale(1, 2).to(torch.bfloat16), "weight_scale_inv")
    blocks("fp8_float32", ROWS, COLS, random_scale(1, 2), "weight_scale_inv")
    # A fused stack with a scale for every 128 x 128 of each matrix.
    stack = (randn(rng, experts, ROWS, COLS) * 200).to(torch.float8_e4m3fn)
    scale = random_scale(experts, 1, 2)
    out |= {"fp8_stack": stack, "fp8_stack_scale_inv": scale, "fp8_stack.expect": stack.float() * scale.repeat_interleave(128, 2)}
    # compressed-tensors: a scale for each row, or one.
    for name, shape in (("fp8_channel", (ROWS, 1)), ("fp8_tensor", (1,))):
        weight, scale = stack[0], random_scale(*shape).to(torch.bfloat16)
        out |= {f"{name}.weight": weight, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(1)}
        out[f"{name}.expect"] = weight.float() * scale.float()


def compressed(rng, out):
    """compressed-tensors' own packing and unpacking, in f32."""
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    rows = 13  # Zeros of 4 bits fill a word with 8 rows.
    for name, bits, group, dtype in (("ct_4_32", 4, 32, torch.bfloat16), ("ct_4_channel", 4, COLS, torch.float16), ("ct_8_128", 8, 128, torch.bfloat16)):
        half = 1 << (bits - 1)
        q = torch.from_numpy(rng.integers(-half, half, (rows, COLS)).astype(np.int8))
        scale = torch.from_numpy(rng.uniform(0.001, 0.01, (rows, COLS // group)).astype(np.float32)).to(dtype)
        zeros = torch.from_numpy(rng.integers(-half, half, scale.shape).astype(np.int8))
        shape = torch.tensor([rows, COLS])
        for kind in ("", "_zeros"):
            module = name + kind
            packed = pack_to_int32(q, bits)
            out |= {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, f"{module}.weight_shape": shape}
            back = unpack_from_int32(packed, bits, torch.Size([rows, COLS])).float()
            if kind:
                packed = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
                out[f"{module}.weight_zero_point"] = packed
                back -= unpack_from_int32(packed, bits, scale.shape, packed_dim=0).float().repeat_interleave(group, 1)
            out[f"{module}.expect"] = back * scale.float().repeat_interleave(group, 1)

    packed = torch.from_numpy(rng.integers(0, 256, (rows, COLS // 2), dtype=np.uint8))
    scale = torch.from_numpy(rng.uniform(0.5, 400, (rows, COLS // 16)).astype(np.float32)).to(torch.float8_e4m3fn)
    out |= {"ct_nvfp4.weight_packed": packed, "ct_nvfp4.weight_scale": scale, "ct_nvfp4.weight_global_scale": torch.tensor([512.0])}
    out["ct_nvfp4.expect"] = fp4_values(packed) * (scale.float() / 512).repeat_interleave(16, 1)


def write_formats(folder):
    rng = np.random.default_rng(11)
    out, quantization = {}, {"bits": 4, "group_size": 64}
    mlx(rng, out, quantization)
    published(rng, out)
    compressed(rng, out)
    save_file({k: v.contiguous().clone() for k, v in sorted(out.items())}, folder / "formats.safetensors")
    (folder / "formats.json").write_text(json.dumps({"quantization": quantization}, indent=1) + "\n")


# Where the halves of a block lie: random bits there would give infinities.
HALVES = {
    "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "MXFP4": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q5_K": [0, 2], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0],
    "IQ1_S": [0], "IQ1_M": [], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def write_blocks(path):
    import gguf

    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "none")
    for name, places in HALVES.items():
        ty = gguf.GGMLQuantizationType[name]
        values, size = gguf.GGML_QUANT_SIZES[ty]
        raw = rng.integers(0, 256, (3, 512 // values, size), dtype=np.uint8)
        for at in places:
            scale = rng.uniform(-0.02, 0.02, raw.shape[:2] + (1,)).astype(np.float16)
            raw[:, :, at : at + 2] = scale.view(np.uint8)
        if name == "MXFP4":
            raw[:, :, 0] = rng.integers(100, 130, raw.shape[:2])
        if name == "IQ1_M":  # The half is the upper nibbles of four words.
            d = rng.uniform(-0.02, 0.02, raw.shape[:2]).astype(np.float16).view(np.uint16)
            for i in range(4):
                raw[:, :, 49 + 2 * i] = raw[:, :, 49 + 2 * i] & 15 | (d >> (4 * i) & 15).astype(np.uint8) << 4
        raw = raw.reshape(3, -1)
        writer.add_tensor(name, raw, raw_dtype=ty)
        writer.add_tensor(f"{name}.f32", gguf.quants.dequantize(raw, ty).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_formats(out)
    write_blocks(out / "blocks.gguf")


if __name__ == "__main__":
    main()
