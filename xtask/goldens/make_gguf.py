#!/usr/bin/env python3
"""GGUF goldens.

`blocks`: a file with random blocks of every block type that mach computes with, and what gguf-py (PyPI `gguf`) makes
of them: `T` [3, 512] and `T.f32`.

`models`: checkpoints of the family goldens through llama.cpp's own converter, widened to f32 where they are bf16 and
otherwise as they are: renamed, reordered, norms with their one added. Their outputs are the goldens of the checkpoint.
LLAMA is the source tree of llama.cpp (`pip download --no-binary :all: --no-deps llama-cpp-python` has it in
`vendor/llama.cpp`).

  make_gguf.py blocks --out crates/mach-format/tests/goldens/blocks.gguf
  make_gguf.py models --llama LLAMA --goldens crates/mach-models/tests/goldens
"""

import argparse
import pathlib
import sys

import numpy as np

MODELS = ("qwen3-base", "qwen3_5-base")


def blocks(out):
    import gguf
    from gguf import GGMLQuantizationType as T

    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(out, "none")
    # Where the half-precision scales of a block lie: random bits there would give infinities.
    halves = {T.Q8_0: [0], T.Q4_K: [0, 2], T.Q6_K: [208]}
    for ty, places in halves.items():
        values, size = gguf.GGML_QUANT_SIZES[ty]
        raw = rng.integers(0, 256, (3, 512 // values, size), dtype=np.uint8)
        for at in places:
            scale = rng.uniform(-0.02, 0.02, raw.shape[:2] + (1,)).astype(np.float16)
            raw[:, :, at : at + 2] = scale.view(np.uint8)
        raw = raw.reshape(3, -1)
        writer.add_tensor(ty.name, raw, raw_dtype=ty)
        writer.add_tensor(f"{ty.name}.f32", gguf.quants.dequantize(raw, ty).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def models(llama, goldens):
    sys.path[:0] = [str(llama / "gguf-py"), str(llama)]
    import gguf
    import conversion
    from conversion.base import ModelBase, ModelType

    goldens = pathlib.Path(goldens).resolve()
    for name in MODELS:
        folder = goldens / name
        hparams = ModelBase.load_hparams(folder, False)
        arch = hparams["architectures"][0]
        model_class = conversion.get_model_class(arch)
        # The tiny checkpoints have no tokenizer.
        model_class.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
        model = model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, goldens / f"{name}.gguf", eager=True)
        model.write()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("blocks")
    one.add_argument("--out", type=pathlib.Path, required=True)
    two = commands.add_parser("models")
    two.add_argument("--llama", type=pathlib.Path, required=True)
    two.add_argument("--goldens", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if args.command == "blocks":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        blocks(args.out)
    else:
        models(args.llama, args.goldens)


if __name__ == "__main__":
    main()
