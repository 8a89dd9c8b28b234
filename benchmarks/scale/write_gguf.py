"""Write a random llama model as GGUF and let llama.cpp quantize it, as a peer of `rolora bench`.

    python benchmarks/scale/write_gguf.py --model 1b --llama-cpp PYTHON --types Q8_0 Q4_0

beside the model: `1b.Q8_0.gguf` and `1b.Q4_0.gguf`. llama.cpp's own quantizer chooses the type of
each tensor, as it does for the files that people publish. PYTHON has llama-cpp-python. The
vocabulary is the demo model's, filled up with unused tokens: a bench feeds token ids.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    TokenType,
    get_tensor_name_map,
)
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from deploy.gguf_files import find_demo_file
from deploy.weight_files import find_weight_files

QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
names = [name.encode() for name in sys.argv[1:3]]
sys.exit(llama_cpp.llama_model_quantize(*names, params))
"""
"""Runs in llama.cpp's Python: source, output, file type."""


def write_float16(model: Path, output: Path) -> None:
    """Write the weights as float16, norms as float32, one tensor in memory at a time."""
    config = AutoConfig.from_pretrained(model)
    writer = GGUFWriter(output, "llama", use_temp_file=True)
    _add_sizes(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in find_weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                _add_tensor(writer, names, key, tensors.get_tensor(key), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    fields = GGUFReader(find_demo_file()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()[:size]
    types = fields["tokenizer.ggml.token_type"].contents()[:size]
    unused = range(len(tokens), size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"[unused {number}]" for number in unused)])
    writer.add_token_types([*types, *(TokenType.UNUSED for _ in unused)])
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_tensor(
    writer: GGUFWriter,
    names: TensorNameMap,
    key: str,
    tensor: torch.Tensor,
    config: PreTrainedConfig,
) -> None:
    name = names.get_name(key, try_suffixes=(".weight",))
    if name is None:
        raise ValueError(f"{key}: GGUF has no name for it in a llama model")
    for part, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if part in key:  # its rotary embedding turns neighbours, transformers' the two halves
            rows = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy(), raw_dtype=GGMLQuantizationType.F32)
    else:
        values = tensor.float().numpy().astype(np.float16)
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.F16)


def main() -> None:
    """Read the options and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="what make_model.py wrote")
    parser.add_argument("--llama-cpp", required=True, help="Python that has llama-cpp-python")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0"])
    arguments = parser.parse_args()
    source = arguments.model.with_name(f"{arguments.model.name}.F16.gguf")
    write_float16(arguments.model, source)
    for name in arguments.types:
        output = arguments.model.with_name(f"{arguments.model.name}.{name}.gguf")
        kind = LlamaFileType[f"MOSTLY_{name}"]
        subprocess.run(
            [arguments.llama_cpp, "-c", QUANTIZE, str(source), str(output), str(kind.value)],
            check=True,
        )
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    source.unlink()


if __name__ == "__main__":
    main()
