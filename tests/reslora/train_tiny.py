"""Train a tiny model in a process of its own: `train_tiny.py OUTPUT CHECKPOINTS [--resume]`.

`--settings` holds training settings as JSON; with `--contrary` validation gets worse all the time;
with `--apart` several processes do not average their gradients. Beside the adapter each process
notes how many parameters it holds at the end.
With `--die N` the process kills itself with SIGKILL while it saves the checkpoint of step N: the
weights are written, the rest is not.

`train_tiny.py --each` takes a JSON list of such argument lists from its input. The libraries are
imported once and every run is a fork of a process that has trained nothing; the exit codes are
printed, minus the signal's number for a run that was killed. `train_tiny.py --in-turn` takes such a
list as its next argument and runs it in one process, which may be one of several.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[2]))

from reslora import trainer
from reslora.adapter import save_adapter
from reslora.attach import attach_adapters, attached_config
from reslora.config import AdapterConfig, Structure
from reslora.settings import TrainSettings
from reslora.sharding import held_parameters
from reslora.train import train_adapter
from reslora.training_data import language_data
from tests.reslora.tiny import build_llama, build_tokenizer, contrary_examples, tiny_examples


def run_each(runs: list[list[str]]) -> list[int]:
    codes = []
    for arguments in runs:
        child = os.fork()
        if not child:
            code = 1
            try:
                main(arguments)
                code = 0
            except BaseException:
                logging.exception("run failed: %s", arguments)
            finally:
                os._exit(code)  # nothing that the parent has open is closed or flushed twice
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def step_apart(self: Trainer, model: Any, *rest: Any) -> torch.Tensor:
    with model.no_sync():
        return Trainer.training_step(self, model, *rest)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--contrary", action="store_true")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--structure", type=Structure, default=Structure.BLOCK)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args(arguments)
    model = build_llama(layers=2)
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    structure = None if options.lora else options.structure
    config = AdapterConfig(rank=2, dropout=options.dropout, structure=structure)
    attached = attach_adapters(model, config, names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if options.die:
        save = trainer.save_adapter

        def save_and_die(*args: object, **kwargs: object) -> None:
            save(*args, **kwargs)  # type: ignore[arg-type]
            if int(Path(str(args[2])).name.rsplit("-", 1)[1]) == options.die:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_adapter = save_and_die
    if options.apart:
        trainer.AdapterTrainer.training_step = step_apart  # type: ignore[method-assign]
    quick = {"max_steps": 7, "batch_size": 3, "max_tokens": 48, "save_every": 2, "eval_every": 2}
    settings = TrainSettings(**{**quick, **options.settings})
    validation = contrary_examples() if options.contrary else None
    report = train_adapter(
        attached,
        language_data(tiny_examples(20), validation, build_tokenizer(chat=True), settings),
        settings,
        options.checkpoints,
        options.resume,
    )
    torch.set_num_threads(threads)
    rank = int(os.environ.get("RANK", "0"))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"held-{rank}").write_text(str(held_parameters(attached)))
    if rank == 0:
        save_adapter(attached, attached_config(attached), options.output)
        (options.output / "report.json").write_text(json.dumps(report.to_dict()))


if __name__ == "__main__":
    if sys.argv[1:] == ["--each"]:
        sys.stdout.write(json.dumps(run_each(json.load(sys.stdin))))
    elif sys.argv[1] == "--in-turn":
        for run in json.loads(sys.argv[2]):
            main(run)
    else:
        main(sys.argv[1:])
