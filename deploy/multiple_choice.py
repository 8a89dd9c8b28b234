"""Multiple choice as lm-eval scores it: the choice with the greatest log-likelihood is the answer.

    acc        mean [argmax_i log p(choice_i | question) = answer]
    acc_norm   the same with each log-likelihood divided by the choice's length in characters

lm-eval (arXiv:2405.14782) does the scoring and the figures; it is the optional extra `eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deploy.choice_tasks import ChoiceTask, Question
from deploy.errors import ConfigError
from deploy.language_model import AnsweringModel


def require_harness() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"multiple choice tasks need lm-eval, which cannot be imported ({error}): "
            "pip install 'rolora[eval]', from a clone pip install '.[eval]'"
        ) from error


def multiple_choice(
    model: AnsweringModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ChoiceTask,
    questions: Sequence[Question],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Let a model choose.

    Args:
        model: `TorchLanguageModel(name, model)` for a model in memory; or from
            `open_language_model`.
        tokenizer: Its tokenizer.
        task: What the questions were read as.
        questions: From `read_questions`; at least one.
        progress: Called with the number of scored choices.

    Returns:
        `acc`, `acc_norm` (not for winogrande, where all choices are followed by one text),
        `stderr` of acc (None for a single question) and `n`.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    require_harness()
    from deploy.harness import HarnessModel, run_harness

    figures = run_harness(HarnessModel(model, tokenizer, progress), task, questions)
    result = {
        "acc": float(figures["acc,none"]),
        "stderr": figures["acc_stderr,none"] if len(questions) > 1 else None,
        "n": len(questions),
    }
    if "acc_norm,none" in figures:
        result["acc_norm"] = float(figures["acc_norm,none"])
    return result
