"""Write a model of a real one's sizes with random weights, a shard a few blocks at a time.

    python benchmarks/scale/make_model.py --shape llama-2-7b --output DIR

What a stage costs depends on the sizes, not on what the weights say. Weights are normal with the
standard deviation 1 / sqrt(inputs), so that activations neither vanish nor overflow; the gains of
norms vary. The tokenizer is one of few words, made from our own calibration text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from deploy.calibration_text import sample_text
from deploy.gguf_files import find_demo_file
from deploy.loading import load_local_tokenizer

SHAPES = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    ),
    "small": LlamaConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
}
"""LLaMA-2-7B, LLaMA-3.2-1B (without the scaling of its rotary embedding), and one that is quick."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_tensors(config: LlamaConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield names and float32 tensors, one at a time."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = config.head_dim or hidden // config.num_attention_heads
    queries, keys = (
        (count or config.num_attention_heads) * head_dim
        for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    block = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)

    def gain() -> Tensor:
        return 1.0 + 0.2 * torch.randn(hidden, generator=generator)

    yield "model.embed_tokens.weight", normal(config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        for name, (rows, columns) in block.items():
            yield f"{base}.{name}.weight", normal(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{base}.{name}.weight", gain()
    yield "model.norm.weight", gain()
    if not config.tie_word_embeddings:
        yield "lm_head.weight", normal(config.vocab_size, hidden)


def write_model(
    config: LlamaConfig, output: Path, dtype: torch.dtype, shard_bytes: int, seed: int
) -> int:
    """Write the model's directory; returns the number of its weights."""
    output.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    held = count = number = 0

    def flush() -> None:
        nonlocal held, number
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, output / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()
        held = 0

    for name, tensor in random_tensors(config, generator):
        count += tensor.numel()
        shard[name] = tensor.to(dtype)
        held += tensor.numel() * dtype.itemsize
        if held >= shard_bytes:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": places}
    (output / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(output)
    demo = find_demo_file()
    tokenizer = load_local_tokenizer(demo.parent, gguf_file=demo.name)
    text = sample_text("calibration.txt")
    tokenizer.train_new_from_iterator([text], vocab_size=4096).save_pretrained(output)
    return count


def main() -> None:
    """Write a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count = write_model(
        SHAPES[arguments.shape],
        arguments.output,
        DTYPES[arguments.dtype],
        int(arguments.shard_gb * 1e9),
        arguments.seed,
    )
    print(f"{arguments.output}: {count:,} weights")


if __name__ == "__main__":
    main()
