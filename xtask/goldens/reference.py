"""Running a checkpoint with transformers: f32 arithmetic on the CPU, routes recorded."""

import dataclasses
import json
import logging
import pathlib
import re

import torch
from transformers import (
    AutoConfig,
    DeepseekV4ForCausalLM,
    DynamicCache,
    Gemma4ForConditionalGeneration,
    GptOssForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3MoeForCausalLM,
)

logging.disable(logging.WARNING)
torch.use_deterministic_algorithms(True, warn_only=True)

CLASSES = {
    "deepseek_v4": DeepseekV4ForCausalLM,
    "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "gpt_oss": GptOssForCausalLM,
    "gemma4": Gemma4ForConditionalGeneration,
}


def empty(config):
    """A model with the right parameters and no values worth keeping."""
    fields = dict(config)
    parsed = AutoConfig.for_model(fields.pop("model_type"), **fields)
    parsed._attn_implementation = "eager"
    return CLASSES[config["model_type"]](parsed).float().eval()


def load(folder):
    """A model from files; every tensor must be used but prediction heads, every parameter found."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    model, info = CLASSES[config["model_type"]].from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    missing = [k for k in info["missing_keys"] if "visual." not in k and "vision" not in k]
    unexpected = [k for k in info["unexpected_keys"] if not re.search(r"(^|\.)mtp\.", k)]
    if missing or unexpected or info["mismatched_keys"]:
        raise SystemExit(f"{folder}: missing {missing[:5]}, unexpected {unexpected[:5]}, mismatched {info['mismatched_keys']}")
    return model.float().eval()


@dataclasses.dataclass
class Run:
    """What `mach eval --reference` compares with."""

    input_ids: torch.Tensor
    logits: torch.Tensor
    router_ids: torch.Tensor
    router_weights: torch.Tensor
    # Smallest distance between the last expert that is kept and the first that is not, in router logits.
    route_gap: float

    def tensors(self):
        return {
            "input_ids": self.input_ids.to(torch.int32),
            "logits": self.logits.contiguous(),
            "router_ids": self.router_ids.to(torch.int32).contiguous(),
            "router_weights": self.router_weights.contiguous(),
        }


@torch.no_grad()
def run(model, ids, chunk=None):
    """One forward pass over `ids` [T], in cached chunks where a whole pass would take too much memory."""
    records = {}

    def record(layer):
        def hook(module, _args, out):
            scores, weights, chosen = out
            k = chosen.shape[-1]
            if hasattr(module, "e_score_correction_bias"):
                scores = module.score_fn(scores) + module.e_score_correction_bias
            top = scores.float().topk(min(k + 1, scores.shape[-1])).values
            # Experts that a table gives cannot be others.
            choice = top.shape[-1] > k and not hasattr(module, "tid2eid")
            gap = (top[:, k - 1] - top[:, k]).min().item() if choice else 1.0
            order = weights.argsort(dim=-1, descending=True, stable=True)
            records.setdefault(layer, []).append((chosen.gather(-1, order), weights.float().gather(-1, order), gap))

        return hook

    routers = [m for m in model.modules() if type(m).__name__.endswith(("TopKRouter", "HashRouter", "TextRouter"))]
    hooks = [m.register_forward_hook(record(i)) for i, m in enumerate(routers)]
    index_gaps = []

    def record_index(rate, top_k):
        def hook(_module, _args, scores):
            # Only entries whose last token is there may be chosen; a cached call is part of a whole one.
            for row, s in enumerate(scores[0] if scores.shape[1] > 1 else []):
                top = s[: (row + 1) // rate].float().topk(min(top_k + 1, (row + 1) // rate)).values
                if len(top) > top_k:
                    index_gaps.append((top[top_k - 1] - top[top_k]).item())

        return hook

    indexers = [m for m in model.modules() if type(m).__name__ == "DeepseekV4Indexer"]
    hooks += [m.scorer.register_forward_hook(record_index(m.compress_rate, m.index_topk)) for m in indexers]
    try:
        cache = DynamicCache(config=model.config) if chunk else None
        pieces = ids.split(chunk) if chunk else [ids]
        logits = [model(input_ids=p[None], cache=cache, use_cache=chunk is not None).logits[0].float() for p in pieces]
    finally:
        for hook in hooks:
            hook.remove()
    layers = [records[i] for i in range(len(routers))]
    return Run(
        input_ids=ids,
        logits=torch.cat(logits),
        router_ids=torch.stack([torch.cat([c for c, _, _ in layer]) for layer in layers]),
        router_weights=torch.stack([torch.cat([w for _, w, _ in layer]) for layer in layers]),
        route_gap=min([gap for layer in layers for _, _, gap in layer] + index_gaps),
    )


@torch.no_grad()
def greedy(model, ids, count):
    """Greedy continuation with a cache. Also the smallest lead of a chosen token and the largest difference
    between cached and whole-sequence logits, and routes of the continuation that are near ties count as no lead."""
    cache = DynamicCache(config=model.config)
    row = model(input_ids=ids[None], cache=cache, use_cache=True).logits[0, -1]
    tokens, rows, lead = [], [], float("inf")
    for _ in range(count):
        first, second = row.topk(2).values.tolist()
        lead = min(lead, first - second)
        rows.append(row)
        tokens.append(int(row.argmax()))
        row = model(input_ids=torch.tensor([[tokens[-1]]]), cache=cache, use_cache=True).logits[0, -1]
    whole = run(model, torch.cat([ids, torch.tensor(tokens)]))
    noise = (whole.logits[len(ids) - 1 : -1] - torch.stack(rows)).abs().max().item()
    return torch.tensor(tokens, dtype=torch.int32), lead if whole.route_gap >= 2e-4 else 0.0, noise
