#!/usr/bin/env python3
"""A Qwen3.5-MoE checkpoint quantised by MLX's own CPU build, under the names that mlx-lm writes, and the values it stands for.

  quantise_mlx.py MODEL OUT MODE BITS GROUP [--effective FOLDER]

MODE is affine, mxfp4, nvfp4 or mxfp8. Routers and the gates of shared experts get 8 affine bits in groups of 64, as
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

from make_goldens import to_mlx


def to_torch(a):
    if a.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(a.astype(mx.float32))).bfloat16()
    array = np.array(a)
    return torch.from_numpy(array.view(np.int32)).view(torch.uint32) if array.dtype == np.uint32 else torch.from_numpy(array.copy())


def quantiser(value, group_size, bits, mode="affine"):
    """What `to_mlx` takes, by MLX."""
    words, scales, *biases = mx.quantize(mx.array(value.float().numpy()).astype(mx.bfloat16), group_size=group_size, bits=bits, mode=mode)
    parts = {"weight": to_torch(words), "scales": to_torch(scales)} | {"biases": to_torch(b) for b in biases}
    if mode == "affine":
        # In f32 instead of the type of the scales.
        wide = [scales.astype(mx.float32), biases[0].astype(mx.float32)]
        return parts, to_torch(mx.dequantize(words, *wide, group_size=group_size, bits=bits))
    return parts, to_torch(mx.dequantize(words, scales, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("mode", choices=["affine", "mxfp4", "nvfp4", "mxfp8"])
    parser.add_argument("bits", type=int)
    parser.add_argument("group", type=int)
    parser.add_argument("--effective", type=pathlib.Path)
    args = parser.parse_args()

    config = json.loads((args.model / "config.json").read_text())
    # mlx-lm leaves out heads that draft tokens.
    state = {name: value for name, value in load_file(args.model / "model.safetensors").items() if not name.startswith("mtp.")}
    general = {"group_size": args.group, "bits": args.bits, "mode": args.mode}
    with mx.stream(mx.cpu):
        packed, entry, effective = to_mlx(state, config, quantiser, general, {"group_size": 64, "bits": 8})
    for folder, tensors, entry in ((args.out, packed, entry), (args.effective, effective, None)):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for file in args.model.glob("*"):
                if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "model.safetensors.index.json"):
                    shutil.copyfile(file, folder / file.name)
            own = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | ({"quantization": entry} if entry else {"dtype": "float32"})
            (folder / "config.json").write_text(json.dumps(own, indent=1) + "\n")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
