#!/usr/bin/env python3
"""GGUF goldens.

`models`: checkpoints of the family goldens through llama.cpp's own converter, widened to f32 where they are bf16 and
otherwise as they are: renamed, reordered, norms with their one added. Their outputs are the goldens of the checkpoint.
LLAMA is the source tree of llama.cpp (`pip download --no-binary :all: --no-deps llama-cpp-python` has it in
`vendor/llama.cpp`).

  make_gguf.py models --llama LLAMA --goldens crates/mach-models/tests/goldens
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

MODELS = ("qwen3-base", "qwen3_5-base", "gpt_oss-mxfp4", "gemma4-base", "deepseek_v4-fp8fp4")


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
        if arch == "DeepseekV4ForCausalLM":
            # Experts become MXFP4 without loss; so do 8-bit floats with powers of two as bf16, not as the Q8_0 of the converter.
            force = model_class.tensor_force_quant
            exact = lambda t: gguf.GGMLQuantizationType.BF16 if t == gguf.GGMLQuantizationType.Q8_0 else t
            model_class.tensor_force_quant = lambda self, *names: exact(force(self, *names))
        with tempfile.TemporaryDirectory() as copy:
            if arch.startswith("Gemma4"):
                # Embedding rows beyond the vocabulary are cut off: it must be there to be counted.
                folder = shutil.copytree(folder, copy, dirs_exist_ok=True)
                vocab = {str(i): i for i in range(hparams["text_config"]["vocab_size"])}
                (pathlib.Path(copy) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
            model = model_class(pathlib.Path(folder), gguf.LlamaFileType.MOSTLY_BF16, goldens / f"{name}.gguf", eager=True)
            model.write()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("models")
    one.add_argument("--llama", type=pathlib.Path, required=True)
    one.add_argument("--goldens", type=pathlib.Path, required=True)
    args = parser.parse_args()
    models(args.llama, args.goldens)


if __name__ == "__main__":
    main()
