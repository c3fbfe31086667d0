"""Our model as lm-eval sees one.

Tokenisation of pairs and the empty context come from lm-eval's `TemplateLM`; truncation, rolling windows, the token put
before an empty context and the handling of stop strings follow lm-eval's Hugging Face backend, so results agree with
it (tests compare them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.sampling import complete
from litrecipe.evaluation.scoring import Request, loglikelihoods
from litrecipe.model.decoder import Decoder

SAMPLING_KEYS = {"do_sample", "temperature", "top_k", "top_p", "until"}
"""What a task may say about sampling, besides the largest number of tokens."""


class LitrecipeLM(TemplateLM):
    """A `Decoder` and a `Tokenizer` behind lm-eval's interface, on one device.

    `batch_tokens` bounds the tokens of a forward pass and, when sampling, those of the cache. `defaults` samples where
    a task says nothing (its `stop` strings are always added). `chatty` shows progress.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 8192,
        defaults: Generate | None = None,
        chatty: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.batch_tokens = batch_tokens
        self.max_length = model.architecture.max_positions
        self.defaults = defaults or Generate()
        self.chatty = chatty

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.text.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: bos where there is one, else eos."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; control tokens written out in the text are recognised, because rendered chats need it.

        BOS is put before a text where the tokenizer's own post-processor does so and the text does not begin with it.
        """
        ids = self.text.encode(string, specials=True)
        bos = self.text.bos_id
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [bos]
        return [bos, *ids] if add_special_tokens and self.text.adds_bos and bos is not None else ids

    # -- log-likelihoods ----------------------------------------------------------------------------------------------

    def _score(self, requests: Sequence[Request], label: str) -> list[tuple[float, bool]]:
        return loglikelihoods(
            self.model,
            requests,
            batch_tokens=self.batch_tokens,
            max_length=self.max_length,
            progress=label if self.chatty else None,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        results = self._score([(context, continuation) for _, context, continuation in requests], "scoring")
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` that predict each token once."""
        windows: list[Request] = []
        owner: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            of_text = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows.extend(make_disjoint_window(window) for window in of_text)
            owner.extend([index] * (len(windows) - len(owner)))
        totals = [0.0] * len(requests)
        for index, (logp, _) in zip(owner, self._score(windows, "scoring windows"), strict=True):
            totals[index] += logp
        return totals

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string (which is cut off), the end token, or the token limit."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        answers = [""] * len(requests)
        for indices in alike.values():
            settings = self._sampling(requests[indices[0]].args[1])
            room = self.max_length - settings.max_new_tokens
            if room <= 0:
                raise InputError(
                    f"tasks: {settings.max_new_tokens} new tokens: the model reads only {self.max_length}: "
                    "lower max_gen_toks in the task's generation_kwargs"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            completions = complete(
                self.model,
                self.text,
                prompts,
                settings,
                batch_tokens=self.batch_tokens,
                progress="generating" if self.chatty else None,
            )
            for index, completion in zip(indices, completions, strict=True):
                answers[index] = completion.text
                self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
        return answers

    def _sampling(self, task: dict[str, Any]) -> Generate:
        """A task's `generation_kwargs` in our words."""
        wanted = normalize_gen_kwargs(task, self.defaults.max_new_tokens)
        max_new_tokens = wanted.pop("max_gen_toks")
        unknown = sorted(set(wanted) - SAMPLING_KEYS)
        if unknown:
            raise InputError(
                *(f"tasks: generation_kwargs.{key}: {wanted[key]}: not supported: remove it" for key in unknown)
            )
        return Generate(
            max_new_tokens=max_new_tokens,
            temperature=float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0,
            top_k=int(wanted.get("top_k", 0)),
            top_p=float(wanted.get("top_p", 1.0)),
            stop=[*handle_stop_sequences(wanted["until"], eos=None), *self.defaults.stop],
            seed=self.defaults.seed,
        )

    # -- chats --------------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the model's own template writes it."""
        return self.text.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, None when none is asked for."""
        return self.text.template.source if chat_template and self.text.has_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers and templates apart in lm-eval's request cache."""
        return self.text.fingerprint
