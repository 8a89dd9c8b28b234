"""Compare sentences with an exported encoder: onnxruntime, numpy and tokenizers are all it takes.

python examples/embed.py model "A man is eating food." "Someone eats." "It rains."
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

directory, sentences = Path(sys.argv[1]), sys.argv[2:]
tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
tokenizer.enable_padding()
session = ort.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
texts = tokenizer.encode_batch(sentences)
given = {
    "input_ids": np.array([text.ids for text in texts], np.int64),
    "attention_mask": np.array([text.attention_mask for text in texts], np.int64),
    "token_type_ids": np.array([text.type_ids for text in texts], np.int64),
}
names = {value.name for value in session.get_inputs()}
inputs = {name: array for name, array in given.items() if name in names}
hidden = session.run(["last_hidden_state"], inputs)[0]
mask = given["attention_mask"][..., None]
means = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
units = means / np.linalg.norm(means, axis=1, keepdims=True)
for sentence, similarity in zip(sentences, units @ units[0], strict=True):
    print(f"{similarity:6.3f}  {sentence}")
