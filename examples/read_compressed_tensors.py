"""Load an exported checkpoint with transformers and compressed-tensors, and measure its perplexity.

    rolora export --format compressed-tensors --checkpoint checkpoint --output model
    python -I examples/read_compressed_tensors.py model text.txt --windows 4

It imports nothing of rolora: `pip install torch transformers compressed-tensors accelerate` is all
that it needs. The windows are those of `rolora evaluate --tasks ppl`, spaced
evenly over the text.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(directory: Path) -> torch.nn.Module:
    """Load the model in float32 and rotate online where config.json asks for it."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    ).eval()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    transform = config["quantization_config"].get("transform_config")
    if transform:
        # transformers ignores this part, and says so only by an "unexpected" tensor.
        apply_transform_config(model, TransformConfig.model_validate(transform))
        with safe_open(directory / "model.safetensors", framework="pt") as tensors:
            (key,) = (key for key in tensors.keys() if key.endswith(".R4_input.weight"))  # noqa: SIM118
            model.get_parameter(key).data.copy_(tensors.get_tensor(key))  # one for all layers
    return model


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Return exp of the mean loss of the next token, over windows int64 [N, T]."""
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(total / len(windows))


def main() -> None:
    """Print the perplexity of a text, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path, help="what rolora export wrote")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a window")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    last = len(ids) - options.tokens
    if last < 0:
        parser.error(f"{options.text} holds only {len(ids)} tokens; ask for shorter windows")
    starts = np.linspace(0, last, options.windows).astype(int)
    windows = torch.stack([ids[start : start + options.tokens] for start in starts])
    empty = tokenizer("")["input_ids"]
    if tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id]:
        windows[:, 0] = tokenizer.bos_token_id
    result = perplexity(load(options.model), windows)
    print(json.dumps({"model": str(options.model), "ppl": result}))


if __name__ == "__main__":
    main()
