#!/usr/bin/env python3
"""Perplexity of a checkpoint by transformers (f32 on the CPU), and the reference that `mach eval --reference` reads.

  eval_transformers.py MODEL TOKENS.json [--out reference.safetensors] [--chunk 512] [--greedy 32]

TOKENS.json is an array of ids. Perplexity is exp of the mean negative log likelihood of tokens 2 to T.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file

import reference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="writes logits, router_ids, router_weights")
    parser.add_argument("--chunk", type=int, help="tokens per cached pass, where one pass takes too much memory")
    parser.add_argument("--greedy", type=int, default=0, help="also writes this many greedy_tokens")
    args = parser.parse_args()
    ids = torch.tensor(json.loads(args.tokens.read_text()))
    model = reference.load(args.model)
    run = reference.run(model, ids, args.chunk)
    nll = torch.nn.functional.cross_entropy(run.logits[:-1].double(), ids[1:])
    tensors = run.tensors()
    if args.greedy:
        tensors["greedy_tokens"], _, _ = reference.greedy(model, ids, args.greedy)
    if args.out:
        save_file(tensors, args.out)
    span = run.logits.max() - run.logits.min()
    print(json.dumps({"tokens": len(ids), "perplexity": nll.exp().item(), "logit_range": span.item(), "route_gap": run.route_gap}))


if __name__ == "__main__":
    main()
