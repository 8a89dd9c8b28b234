"""Answer a question with an exported model: onnxruntime, numpy and tokenizers are all it takes.

python examples/generate.py artifacts/demo/w8a8/onnx "What is the capital of France?"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

directory, question = Path(sys.argv[1]), sys.argv[2]
settings = json.loads((directory / "genai_config.json").read_text())
if not settings["search"]["past_present_share_buffer"]:
    sys.exit(f"{directory} returns its cache as new arrays (--target qdq); use rolora run")
config = settings["model"]
decoder, room = config["decoder"], min(512, config["context_length"])
tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
# One graph, or one for prompts and one for single tokens; both go on with the same cache.
files = {
    name: phase["filename"] for part in decoder.get("pipeline", []) for name, phase in part.items()
}
sessions = {
    file: ort.InferenceSession(str(directory / file), providers=["CPUExecutionProvider"])
    for file in set(files.values()) or {decoder["filename"]}
}

# The chat format of SmolLM2; a model's own stands in chat_template.jinja.
prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
ids = tokenizer.encode(prompt, add_special_tokens=False).ids
shape = (1, decoder["num_key_value_heads"], room, decoder["head_size"])
inputs = {value.name: value.type for value in next(iter(sessions.values())).get_inputs()}
dtype = np.int8 if inputs["past_key_values.0.key"] == "tensor(int8)" else np.float32
cache = {
    f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    for layer in range(decoder["num_hidden_layers"])
    for part in ("key", "value")
}
ends, step, length = np.atleast_1d(config["eos_token_id"]), np.array([ids]), 0
while length + step.shape[1] < room:
    length += step.shape[1]
    phase = "token" if step.shape[1] == 1 else "prompt"
    session = sessions[files.get(phase) or decoder["filename"]]
    binding = session.io_binding()
    binding.bind_cpu_input("input_ids", step)
    binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
    # Past and present share a buffer: attention appends in place.
    for name, buffer in cache.items():
        binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
        binding.bind_ortvalue_output(f"present.{name}", buffer)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    token = int(binding.get_outputs()[-1].numpy()[0, -1].argmax())
    if token in ends:
        break
    print(tokenizer.decode([token]), end="", flush=True)
    step = np.array([[token]])
print()
