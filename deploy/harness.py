"""lm-eval with any of our models, on questions of ours: nothing is downloaded.

Imported only where a multiple choice task runs, since lm-eval is an optional dependency.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from transformers import PreTrainedTokenizerBase

from deploy.choice_tasks import ChoiceTask, Question
from deploy.language_model import AnsweringModel
from deploy.token_scores import ScoredTokens, score_tokens


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval publishes no types
    """What lm-eval asks: log-likelihoods of continuations.

    Args:
        model: Any of our models.
        tokenizer: Its tokenizer.
        progress: Called with the number of scored continuations.
    """

    def __init__(
        self,
        model: AnsweringModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self._model = model
        self.tokenizer = tokenizer
        self._progress = progress
        self._stderr = sys.stderr

    @property
    def eot_token_id(self) -> int:
        """Token that an empty context is replaced by."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in ids if token is not None))

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Return token ids, with the special tokens that the tokenizer puts by itself."""
        return [int(token) for token in self.tokenizer(string, verbose=False)["input_ids"]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        A context that is too long loses its head.
        """
        sequences = []
        for _texts, context, continuation in requests:
            ids = tuple(context + continuation)[-(self._model.context_length + 1) :]
            sequences.append(ScoredTokens(ids, max(1, len(ids) - len(continuation))))
        with redirect_stderr(self._stderr):
            scores = score_tokens(self._model, sequences, self._progress)
        return [(float(score.log_probabilities.sum()), score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refuse: no task of ours asks for it."""
        raise NotImplementedError("perplexity is measured by deploy.text_quality")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Refuse: no task of ours asks for it."""
        raise NotImplementedError("free answers are measured by deploy.exact_match")


def run_harness(
    model: HarnessModel, task: ChoiceTask, questions: Sequence[Question]
) -> dict[str, Any]:
    """Evaluate one task.

    Returns:
        lm-eval's figures of the task: `acc,none`, `acc_stderr,none` and, except for winogrande,
        `acc_norm,none`.
    """
    is_filled = task is ChoiceTask.WINOGRANDE
    rows = [
        {"text": question.text, "choices": list(question.choices), "answer": question.answer}
        for question in questions
    ]
    config = {
        "task": str(task),
        "output_type": "multiple_choice",
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "doc_to_text": _take("answer" if is_filled else "text"),
        "doc_to_choice": _take("choices"),
        "doc_to_target": _take("text" if is_filled else "answer"),
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (("acc",) if is_filled else ("acc", "acc_norm"))
        ],
    }
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # its bars are drawn on stderr whatever one asks for; ours is drawn by the model
        with redirect_stderr(io.StringIO()):
            found = evaluate(
                lm=model,
                task_dict={str(task): ConfigurableTask(config=config)},
                log_samples=False,
            )
    finally:
        logger.setLevel(level)
    figures: dict[str, Any] = found["results"][str(task)]
    return figures


def _take(field: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row[field]
