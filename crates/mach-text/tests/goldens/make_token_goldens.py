"""Encodes and decodes with transformers, for tests/tokens.rs.

    python -m pip install transformers
    python crates/mach-text/tests/goldens/make_token_goldens.py            # the built-in model's tokenizer: writes tokens.json
    python crates/mach-text/tests/goldens/make_token_goldens.py DIRECTORY  # any tokenizer: prints the same
"""

import json
import random
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[3] / "models" / "tiny"
TEXTS = [
    "", " ", "Hello, world!", "  leading and trailing  ", "tabs\tand\n\nnewlines \r\n end", "naïve café e\u0301 Ångström", "東京都 こんにちは 안녕하세요", "🙂👩‍👩‍👧‍👦🇳🇴",
    "it's we're I'LL 12345 3.14", "def f(x):\n    return {'a': [x, 1]}  # ok", "<|im_start|>user\nHi<|im_end|>\n", "<think>\nx\n</think>\n<tool_call>", "a<|endoftext|>b<think>c", "<|im_start", "\u0000\u0007\u00a0\u200b\ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ﬁ Ⅳ ½ ﷺ", "مرحبا שלום नमस्ते", "∑∫√ ≤≥ αβγ", "http://x.y/z?a=b&c=%20#d",
]


def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), clean_up_tokenization_spaces=False)
    encoded = [{"text": t, "plain": tokenizer.encode(t, add_special_tokens=False), "with_special": tokenizer.encode(t)} for t in TEXTS]
    rng = random.Random(5)
    size = max(tokenizer.get_vocab().values()) + 1
    sequences = [e["with_special"] for e in encoded] + [[rng.randrange(size + 3) for _ in range(rng.randrange(1, 40))] for _ in range(60)]
    # The first ids are single bytes in most vocabularies: broken UTF-8 of every kind.
    sequences += [[rng.randrange(600) for _ in range(30)] for _ in range(60)]
    decoded = [{"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)} for ids in sequences]
    out = json.dumps({"encoded": encoded, "decoded": decoded}, ensure_ascii=False)
    if directory == TINY:
        (HERE / "tokens.json").write_text(out + "\n")
    else:
        print(out)


if __name__ == "__main__":
    main()
