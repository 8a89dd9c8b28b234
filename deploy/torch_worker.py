"""A process that holds a float model in transformers, as a peer of its export; see `bench_worker`.

The model is float32, whatever its files hold, with transformers' own defaults but for the threads:
a decoder computes the logits of a prompt's last token only and goes on over its cache, an encoder
computes the hidden states of its texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from deploy.bench_report import DECODE, ENCODE, PREFILL, BenchRun, BenchSettings
from deploy.bench_worker import main


@contextmanager
def open_float_model(directory: Path, settings: BenchSettings) -> Iterator[Callable[[], BenchRun]]:
    """Load a model and give what runs it once.

    Args:
        directory: Float weights as safetensors, and `config.json`.
        settings: What a run is; without new tokens the model is an encoder.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    measure: Callable[[PreTrainedModel, BenchSettings], BenchRun]
    if settings.new_tokens is None:
        model = AutoModel.from_pretrained(directory, add_pooling_layer=False, **options)
        measure = measure_texts
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
        measure = measure_prompt
    with torch.inference_mode():
        yield partial(measure, model.eval(), settings)


def measure_prompt(model: PreTrainedModel, settings: BenchSettings) -> BenchRun:
    """Time one prompt and its continuation over the cache."""
    ids = torch.from_numpy(settings.random_tokens(model.config.vocab_size))
    prompt = settings.prompt_tokens
    started = time.perf_counter()
    found = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    for position in range(prompt, ids.shape[1]):
        found = model(
            input_ids=ids[:, position : position + 1],
            past_key_values=found.past_key_values,
            use_cache=True,
        )
    return {PREFILL: prefilled - started, DECODE: time.perf_counter() - prefilled}


def measure_texts(model: PreTrainedModel, settings: BenchSettings) -> BenchRun:
    """Time one batch of texts."""
    ids = torch.from_numpy(settings.random_tokens(model.config.vocab_size))
    started = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return {ENCODE: time.perf_counter() - started}


if __name__ == "__main__":
    main(open_float_model)
