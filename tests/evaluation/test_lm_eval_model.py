"""Our lm-eval class beside lm-eval's own Hugging Face backend, on the same weights."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from lm_eval.api.instance import Instance

from litrecipe.config import groups
from litrecipe.config.errors import InputError
from litrecipe.evaluation.lm_eval_model import LitrecipeLM
from litrecipe.evaluation.sampling import complete
from litrecipe.evaluation.session import open_session

GREEDY = groups.Generate(max_new_tokens=4)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    """Contexts that share, repeat, are empty, end in spaces, hold control tokens, or are too long for the model."""
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "a", "guinea", "pig", "cage", "12", "km", "of", "paper", "é", "你好", "🎈"]
    preamble = "Question: how? Answer: yes.\n\n"
    questions = [preamble + "Question: " + " ".join(draw.choices(words, k=5)) + "? Answer:" for _ in range(6)]
    made = [(question, " " + " ".join(draw.choices(words, k=k))) for question in questions for k in (1, 1, 6)]
    made += [(made[0][0], " same beginning " + end) for end in ("one", "two", "three three")]
    made += [("", "no context"), ("", "<|im_start|>begins with the prefix token"), ("spaces after   ", "word")]
    made += [("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello"), ("Q", "x"), ("Q", "x")]
    made += [(" ".join(draw.choices(words, k=200)), " cut on the left"), ("short", " " + "long " * 45)]
    return made


def lm(session, **options) -> LitrecipeLM:
    return LitrecipeLM(session.model, session.tokenizer, **options)


def assert_same_scores(ours, theirs, tolerance: float) -> None:
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=tolerance)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("batch_tokens", [64, 8192])
def test_log_likelihoods_equal_lm_evals_own_backend(tiny, tiny_hf, batch_tokens) -> None:
    wanted = tiny_hf.loglikelihood(requests("loglikelihood", pairs()))
    ours = lm(tiny, batch_tokens=batch_tokens).loglikelihood(requests("loglikelihood", pairs()))
    assert_same_scores(ours, wanted, 1e-3)


def test_greedy_continuations_are_called_greedy(tiny, tiny_hf) -> None:
    """What greedy decoding writes, and the same with its last token changed."""
    model = lm(tiny)
    contexts = [model.tok_encode(context) for context, _ in pairs()[:6]]
    asked = []
    for context, answer in zip(contexts, complete(tiny.model, tiny.tokenizer, contexts, GREEDY), strict=True):
        asked += [((None, None), context, tokens) for tokens in (answer.tokens, [*answer.tokens[:-1], 7])]
    ours = model._loglikelihood_tokens(asked)
    assert_same_scores(ours, tiny_hf._loglikelihood_tokens(asked), 1e-3)
    assert [greedy for _, greedy in ours] == [True, False] * 6


def test_rolling_windows_equal_lm_evals_own_backend(tiny, tiny_hf) -> None:
    texts = [("short text",), ("a longer text of many words " * 60,), ("",), ("<|im_start|>with a control token",)]
    wanted = tiny_hf.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert lm(tiny).loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 8192])
@pytest.mark.parametrize("until", [[], ["e"], ["the", "\n\n", " a"]])
def test_greedy_answers_equal_lm_evals_own_backend(tiny, tiny_hf, until, batch_tokens) -> None:
    contexts = dict.fromkeys(context or "empty" for context, _ in pairs()[::2])
    arguments = [(context, {"until": list(until), "max_gen_toks": 12}) for context in contexts]
    wanted = tiny_hf.generate_until(requests("generate_until", arguments))
    ours = lm(tiny, batch_tokens=batch_tokens).generate_until(requests("generate_until", arguments))
    assert ours == wanted
    assert len(set(ours)) > 5


def test_sampling_wishes_of_a_task(tiny) -> None:
    model = lm(tiny, defaults=groups.Generate(max_new_tokens=99, stop=["END"], seed=3))
    assert model._sampling({"until": "\n"}) == groups.Generate(max_new_tokens=99, stop=["\n", "END"], seed=3)
    sampled = model._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5, "until": []})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (0.7, 0.9, 5)
    assert model._sampling({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    with pytest.raises(InputError, match=r"generation_kwargs\.num_beams: 4"):
        model._sampling({"num_beams": 4})


def test_more_new_tokens_than_the_model_reads_are_refused(tiny) -> None:
    with pytest.raises(InputError, match="256 new tokens: the model reads only 256"):
        lm(tiny).generate_until(requests("generate_until", [("a", {"max_gen_toks": 256})]))


def test_chats_are_rendered_as_transformers_renders_them(tiny, tiny_hf) -> None:
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi <|im_end|>"}]
    model = lm(tiny)
    assert model.apply_chat_template(history) == tiny_hf.apply_chat_template(history)
    assert model.chat_template(True) == tiny_hf.chat_template(True)
    assert model.tok_encode(model.apply_chat_template(history)) == tiny_hf.tok_encode(
        tiny_hf.apply_chat_template(history)
    )


@pytest.mark.real_model
def test_fifty_piqa_rows_on_the_real_model(real_model, shared, tmp_path) -> None:
    """The same GGUF weights, exported to a Hugging Face folder for lm-eval's backend.

    Its softmax runs in fp64: that of fp32 is off by 8e-6 a token, 9e-4 for the longest of these answers.
    """
    from lm_eval.models.huggingface import HFLM

    from litrecipe.checkpoint.hf import save_model
    from litrecipe.checkpoint.source import open_model

    session = open_session(groups.Model(source=str(real_model)), groups.Quantize(), groups.Fabric(accelerator="cpu"))
    save_model(tmp_path, session.model, open_model(str(real_model)).tokenizer_dir)
    with gzip.open(shared / "data/eval/piqa_val.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(50), strict=False)]
    asked = [(f"Question: {row['goal']}\nAnswer:", " " + row[choice]) for row in rows for choice in ("sol1", "sol2")]
    ours = lm(session).loglikelihood(requests("loglikelihood", asked))
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", softmax_dtype="float64", batch_size=8)
    assert_same_scores(ours, theirs.loglikelihood(requests("loglikelihood", asked)), 1e-3)
