#!/usr/bin/env python3
"""A Qwen3.5-MoE checkpoint quantised by MLX's own CPU build, under the names that mlx-lm writes, and the values it stands for.

  quantise_mlx.py MODEL OUT MODE BITS GROUP [--effective FOLDER]

MODE is affine, mxfp4, nvfp4 or mxfp8. Routers and the gates of shared experts get 8 affine bits, an entry of their own, as
mlx-lm gives them. FOLDER gets the same values as a plain f32 checkpoint, for any reader without MLX.
"""

import argparse
import json
import pathlib
import shutil

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from make_goldens import split_experts


def to_torch(a):
    if a.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(a.astype(mx.float32))).bfloat16()
    array = np.array(a)
    return torch.from_numpy(array.view(np.int32)).view(torch.uint32) if array.dtype == np.uint32 else torch.from_numpy(array.copy())


class Quantiser:
    def __init__(self, mode, bits, group):
        self.default = (mode, bits, group)
        self.tensors = {}
        self.entry = {"group_size": group, "bits": bits, "mode": mode}

    def pack(self, module, value):
        """Stores a matrix or stack of them, returns its values in f32."""
        own = ("affine", 8, 64) if module.endswith(("mlp.gate", "shared_expert_gate")) else self.default
        mode, bits, group = own
        if own != self.default:
            self.entry[module] = {"group_size": group, "bits": bits, "mode": mode}
        w = mx.array(value.float().numpy()).astype(mx.bfloat16)
        words, scales, *biases = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        self.tensors |= {f"{module}.weight": to_torch(words), f"{module}.scales": to_torch(scales)}
        self.tensors |= {f"{module}.biases": to_torch(b) for b in biases}
        if mode == "affine":
            return to_torch(mx.dequantize(words, scales.astype(mx.float32), biases[0].astype(mx.float32), group_size=group, bits=bits))
        return to_torch(mx.dequantize(words, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("mode", choices=["affine", "mxfp4", "nvfp4", "mxfp8"])
    parser.add_argument("bits", type=int)
    parser.add_argument("group", type=int)
    parser.add_argument("--effective", type=pathlib.Path)
    args = parser.parse_args()

    q = Quantiser(args.mode, args.bits, args.group)
    effective = {}
    with mx.stream(mx.cpu):
        for name, value in load_file(args.model / "model.safetensors").items():
            # mlx-lm leaves out heads that draft tokens.
            if name.startswith("mtp."):
                continue
            bare = name.removeprefix("model.language_model.").removeprefix("model.")
            mlx = f"language_model.{name}" if name.startswith("lm_head") else f"language_model.model.{bare}"
            if parts := split_experts(name, value):
                head = mlx.split(".experts")[0]
                effective[name] = torch.cat([q.pack(f"{head}.switch_mlp.{p}", stack) for p, stack in parts], 1)
            elif name.endswith("conv1d.weight"):
                q.tensors[mlx] = value.transpose(1, 2).contiguous()
                effective[name] = value.float()
            elif "norm.weight" in name and "linear_attn" not in name:
                q.tensors[mlx] = value.float() + 1
                effective[name] = value.float()
            elif value.ndim == 2:
                effective[name] = q.pack(mlx.removesuffix(".weight"), value)
            else:
                q.tensors[mlx] = value
                effective[name] = value.float()

    config = json.loads((args.model / "config.json").read_text())
    for folder, tensors, entry in ((args.out, q.tensors, q.entry), (args.effective, effective, None)):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for file in args.model.glob("*"):
                if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
                    shutil.copyfile(file, folder / file.name)
            own = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | ({"quantization": entry} if entry else {"dtype": "float32"})
            (folder / "config.json").write_text(json.dumps(own, indent=1) + "\n")
            save_file(tensors, folder / "model.safetensors")


if __name__ == "__main__":
    main()
