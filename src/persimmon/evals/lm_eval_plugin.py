"""The engines of this package as a model of EleutherAI's lm-evaluation-harness (lm-eval), named `persimmon`.

    python -m persimmon.evals.lm_eval_plugin run --model persimmon --model_args pretrained=mini --tasks arc_easy

or, in a program, `lm_eval.simple_evaluate(model=PersimmonLM("mini"), ...)`. lm-eval has no discovery of models of other
packages, hence the module of its own; importing it registers the model.

What differs from lm-eval's own `hf` model: a piece that spans the end of the context belongs to the continuation, which
is therefore never empty (lm-eval's issue 1297); a long text is measured in chunks, so that 16,384 positions need no
more memory than 512; everything else is meant to give the same numbers, and tests hold it to that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import LM  # type: ignore[import-untyped,import-not-found,unused-ignore]
from lm_eval.api.registry import register_model  # type: ignore[import-untyped,import-not-found,unused-ignore]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped,import-not-found,unused-ignore]

from persimmon import chat
from persimmon.errors import InputError
from persimmon.evals.language_model import DecoderLanguageModel
from persimmon.evals.loading import load_language_model
from persimmon.evals.tasks.task import Generate, Likelihood, Request, Response, Score

MAX_GENERATED = 256
"""Tokens of a generation whose task does not say, as in lm-eval."""

_PER_CALL = 256
"""Requests answered between two reports of progress."""


@register_model("persimmon")
class PersimmonLM(LM):  # type: ignore[misc]
    """lm-eval's interface over a DecoderLanguageModel."""

    def __init__(
        self,
        pretrained: str | DecoderLanguageModel = "mini",
        *,
        add_bos_token: bool = True,
        seed: int = 0,
        lanes: int | None = None,
        cache_tokens: int = 65_536,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Load `pretrained`, or take a model that is ready.

        Args:
            pretrained: directory, hub id or name, as for `persimmon.load`.
            add_bos_token: open every sequence with end-of-text.
            seed: of sampled generations.
            lanes: sequences side by side.
            cache_tokens: tokens of keys and values at a time.
            batch_size: accepted, as lm-eval passes it, in place of `lanes` when it is a number.
            max_batch_size: accepted and without effect.
            device: as for `persimmon.load`.
            options: the other options of `persimmon.load` (engine, dtype, rotary_precision, ...).
        """
        super().__init__()
        if isinstance(pretrained, DecoderLanguageModel):
            self.model = pretrained
            return
        if isinstance(batch_size, int) or (isinstance(batch_size, str) and batch_size.isdigit()):
            lanes = int(batch_size)
        self.model = load_language_model(
            pretrained,
            bos=add_bos_token,
            lanes=lanes,
            cache_tokens=cache_tokens,
            seed=seed,
            options={**options, "device": device or "auto"},
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each request's (context, continuation)."""
        found = self._respond([Score(*request.args) for request in requests], "loglikelihood", disable_tqdm)
        answers = [(one.log_probability, one.greedy) for one in found if isinstance(one, Likelihood)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the context where it is longer."""
        tokenizer, totals = self.model.tokenizer, []
        for number, request in enumerate(requests, 1):
            (text,) = request.args
            windows = get_rolling_token_windows(
                tokenizer.encode(text), tokenizer.bos_id, max_seq_len=self.model.context, context_len=1
            )
            total = sum(self._window(*make_disjoint_window(window)) for window in windows)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            _say("loglikelihood_rolling", number, len(requests), disable_tqdm)
        return totals

    def _window(self, context: Sequence[int], scored: Sequence[int]) -> float:
        return sum(self.model.token_log_probabilities([*context, *scored])[-len(scored) :])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each request's text up to its first stop string."""
        found = self._respond([_generate(*request.args) for request in requests], "generate_until", disable_tqdm)
        texts = [one[0] for one in found if isinstance(one, list)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _respond(self, requests: Sequence[Request], label: str, quiet: bool) -> list[Response]:
        """Answer in parts of neighbours, the longest first, with a line of progress for each."""
        order = sorted(
            range(len(requests)), key=lambda index: (-len(_prompt(requests[index])), _prompt(requests[index]))
        )
        answers: dict[int, Response] = {}
        for start in range(0, len(order), _PER_CALL):
            part = order[start : start + _PER_CALL]
            answers.update(zip(part, self.model.respond([requests[index] for index in part]), strict=True))
            _say(label, len(answers), len(requests), quiet)
        return [answers[index] for index in range(len(requests))]

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return f"persimmon-{self.model.identity.get('model', '')}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that lm-eval records."""
        return chat.CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as a prompt."""
        return chat.render(chat_history, add_generation_prompt=add_generation_prompt)


def _prompt(request: Request) -> str:
    return request.text if not isinstance(request, Score | Generate) else request.context


def _generate(context: str, settings: dict[str, Any]) -> Generate:
    """lm-eval's generation arguments; those that would change the result and are not offered are refused."""
    settings = dict(settings)
    until = settings.pop("until", [])
    limits = [settings.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    sampled = settings.pop("do_sample", False)
    temperature = float(settings.pop("temperature", 1.0 if sampled else 0.0))
    if settings:
        raise InputError(f"generation arguments that are not supported: {', '.join(sorted(settings))}")
    return Generate(
        context,
        (until,) if isinstance(until, str) else tuple(until),
        next((limit for limit in limits if limit is not None), MAX_GENERATED),
        temperature=temperature if sampled else 0.0,
    )


def _say(label: str, done: int, total: int, quiet: bool) -> None:
    if not quiet:
        print(f"{label}: {done}/{total}", file=sys.stderr)


def main() -> None:
    """lm-eval's command line, with the model registered."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped,import-not-found,unused-ignore]

    command: Callable[[], None] = cli_evaluate
    command()


if __name__ == "__main__":
    main()
