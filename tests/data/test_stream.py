"""Documents as a stream: nothing lost or repeated, shares kept, resumed anywhere to the token."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.data.stream import Batches, Mixture, Sequences, Stage, StreamSource


class Texts:
    """Documents of given lengths; token number n of document d is 1000 d + n."""

    def __init__(self, lengths, fingerprint="texts"):
        self.lengths, self.fingerprint = np.array(lengths), fingerprint

    def read(self, document, start=0, stop=None):
        return 1000 * document + np.arange(self.lengths[document])[start:stop]


def tokens_of(sample):
    return [token for segment in sample.segments for token in segment.tokens.tolist()]


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_token_once_in_sequences_of_one_length(lengths, length, seed, attend_across):
    documents = Texts(lengths)
    reel = Sequences("a", documents, length, seed, attend_across=attend_across)
    for epoch in range(2):
        samples = [reel[epoch * len(reel) + place] for place in range(len(reel))]
        seen = [token for sample in samples for token in tokens_of(sample)]
        assert sorted(seen) == [1000 * d + n for d, size in enumerate(lengths) for n in range(size)]
        sizes = sorted((sample.length for sample in samples), reverse=True)
        assert sizes[:-1] == [length] * (len(reel) - 1)
        assert [reel.size(epoch * len(reel) + place) for place in range(len(reel))] == [s.length for s in samples]
        if attend_across:
            assert all(len(sample.segments) == 1 for sample in samples)


@given(LENGTHS, st.integers(2, 17))
def test_a_segment_is_a_run_of_one_document_and_its_first_token_is_not_predicted(lengths, length):
    reel = Sequences("a", Texts(lengths), length, 0)
    for place in range(len(reel)):
        for segment in reel[place].segments:
            assert (np.diff(segment.tokens) == 1).all()
            assert segment.weights.tolist() == [0.0] + [1.0] * (len(segment.tokens) - 1)


def test_orders_differ_by_epoch_seed_and_name_and_long_documents_are_spread():
    reel, other, named = (Sequences(name, Texts([1000, 10]), 10, seed) for name, seed in ("a0", "a1", "b0"))
    first, second = ([tokens_of(reel[place + shift]) for place in range(101)] for shift in (0, 101))
    assert first != second
    assert first != [tokens_of(other[place]) for place in range(101)]
    assert first != [tokens_of(named[place]) for place in range(101)]
    steps = np.diff([tokens[0] for tokens in first])
    assert (steps != 10).mean() > 0.9


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.integers(0, 30))
def test_batches_grow_evenly_and_are_counted(size, initial, warmup, steps):
    batches = Batches(size, min(initial, size), warmup)
    counted = [batches.of_step(step) for step in range(steps)]
    assert counted == sorted(counted) and all(1 <= n <= size for n in counted)
    assert batches.until(steps) == sum(counted)
    samples = batches.until(steps)
    assert batches.steps_for(samples) == steps
    assert batches.steps_for(samples + 1) == steps + 1
    assert Batches(size).of_step(0) == size


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 300))
def test_each_source_has_its_share_at_any_time(weights, draws):
    """Smooth round robin: no source is ever a whole draw away from its share times the number of sources."""
    names = [f"s{n}" for n in range(len(weights))]
    mixture = Mixture(
        {name: Sequences(name, Texts([10]), 5, 0) for name in names}, dict(zip(names, weights, strict=True)), {}
    )
    given_, cursors = Counter(), dict.fromkeys(names, 0)
    for n in range(1, draws + 1):
        given_[mixture.draw(cursors)] += 1
        for name, weight in zip(names, weights, strict=True):
            assert abs(given_[name] - n * weight / sum(weights)) < len(names)


def test_a_source_that_is_used_up_leaves_its_share_to_the_others_evenly():
    reels = {name: Sequences(name, Texts([40]), 4, 0) for name in "abc"}
    mixture = Mixture(reels, {"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 2})
    cursors = dict.fromkeys("abc", 0)
    drawn = []
    for _ in range(60):
        drawn.append(mixture.draw(cursors))
        cursors[drawn[-1]] += 1
    assert drawn.count("a") == 20
    after = drawn[len(drawn) - drawn[::-1].index("a") :]
    assert [after[n : n + 4].count("c") for n in range(0, len(after) - 3, 4)] == [1] * (len(after) // 4)


def test_sources_with_limits_end():
    reels = {name: Sequences(name, Texts([40]), 4, 0) for name in "ab"}
    mixture, cursors = Mixture(reels, {"a": 0.5, "b": 0.5}, {"a": 1, "b": 0.5}), {"a": 0, "b": 0}
    while name := mixture.draw(cursors):
        cursors[name] += 1
    assert cursors == {"a": 10, "b": 5}


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.floats(0.05, 1), st.integers(1, 9)), min_size=1))
def test_what_is_spent_is_reckoned_to_a_few_draws(sources):
    """Sources of 10 sequences each, all of which end; against drawing them."""
    reels = {name: Sequences(name, Texts([40]), 4, 0) for name in sources}
    mixture = Mixture(
        reels, {name: w for name, (w, _) in sources.items()}, {name: n for name, (_, n) in sources.items()}
    )
    cursors = dict.fromkeys(sources, 0)
    for draws in range(1, 10 * sum(n for _, n in sources.values()) + 1):
        reckoned = mixture.spent(draws, {})
        cursors[mixture.draw(cursors)] += 1
        assert all(abs(reckoned[name] - cursors[name]) < 2 * len(sources) for name in sources)
    assert mixture.spent(10**6, {}) == pytest.approx({name: 10 * n for name, (_, n) in sources.items()})


def stages(steps=(4, 3), lengths=(5, 9)):
    """Two stages with sequences of unlike lengths; of three sources one is in the first alone."""
    made = []
    for number, (count, length) in enumerate(zip(steps, lengths, strict=True)):
        texts = {"a": Texts([37, 5, 11], "A"), "b": Texts([60], "B"), "c": Texts([23, 1], "C")}
        reels = {name: Sequences(name, texts[name], length, 7) for name in ("ab", "abc")[number]}
        weights = {"a": 0.6, "b": 0.3, "c": 0.1}
        made.append(Stage(f"s{number}", Mixture(reels, weights, {}), Batches(4, 1, 2), count))
    return made


def drain(source):
    steps = []
    while samples := source.next_step():
        steps.append([(sample.id, tokens_of(sample)) for sample in samples])
    return steps


@pytest.mark.parametrize("stop_after", range(8))
def test_resumed_anywhere_it_goes_on_to_the_token(stop_after):
    unbroken = StreamSource(stages())
    whole = drain(unbroken)
    assert len(whole) == unbroken.total_steps(None) == 7
    assert [len(step) for step in whole] == [1, 2, 4, 4, 1, 2, 4]
    first, second = StreamSource(stages()), StreamSource(stages())
    head = [[(sample.id, tokens_of(sample)) for sample in first.next_step()] for _ in range(stop_after)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + drain(second) == whole
    assert second.told() == unbroken.told()
    assert second.state_dict() == unbroken.state_dict()


def test_a_source_goes_on_in_the_next_stage_where_its_sequences_are_as_long():
    source = StreamSource(stages(lengths=(5, 5)))
    of_a = [name for step in drain(source) for name, _ in step if name.startswith("a")]
    assert len(set(of_a)) == len(of_a)
    apart = StreamSource(stages(lengths=(5, 9)))
    of_a = [name for step in drain(apart) for name, _ in step if name.startswith("a:0:")]
    assert len(set(of_a)) < len(of_a)


@pytest.mark.parametrize("taught", [(True, True), (True, False), (False, True)])
def test_what_a_teacher_says_comes_with_the_samples_of_the_stages_that_it_teaches(taught):
    """In the order in which the run takes them; the others are as they are without a teacher."""
    whole, made = drain(StreamSource(stages(lengths=(5, 5)))), stages(lengths=(5, 5))
    for stage, is_taught in zip(made, taught, strict=True):
        stage.taught = is_taught
    source = StreamSource(made)
    of_stages = [
        step for steps, is_taught in zip((whole[:4], whole[4:]), taught, strict=True) for step in steps if is_taught
    ]
    asked = [source.samples[place] for place in range(len(source.samples))]
    assert [(one.id, tokens_of(one)) for one in asked] == [sample for step in of_stages for sample in step]
    source.keep([replace(one, id=f"said:{one.id}") for one in asked])
    handed = drain(source)
    said = [[name.startswith("said:") for name, _ in step] for step in handed]
    assert said == [[taught[place >= 4]] * len(step) for place, step in enumerate(whole)]
    assert [[(name.removeprefix("said:"), tokens) for name, tokens in step] for step in handed] == whole


def test_it_tells_the_share_of_the_stage_and_the_epochs_of_each_source():
    source = StreamSource(stages())
    for _ in range(4):
        source.next_step()
    told = source.told()
    assert told["share/a"] + told["share/b"] == pytest.approx(1)
    assert told["share/a"] == pytest.approx(2 / 3, abs=0.1)
    assert told["epoch/b"] == 4 / 12
    alone = Stage("", Mixture({"a": Sequences("a", Texts([20]), 5, 0)}, {"a": 1.0}, {}), Batches(3), 2)
    source = StreamSource([alone])
    source.next_step()
    assert source.told() == {"epoch": 0.75}


def test_another_plan_is_refused_by_name_and_what_is_still_to_come_is_free():
    begun = StreamSource(stages())
    begun.next_step()
    state = begun.state_dict()
    longer, other_later = stages(steps=(6, 3)), stages(lengths=(5, 11))
    StreamSource(longer).load_state_dict(state)
    StreamSource(other_later).load_state_dict(state)
    wrong = stages(lengths=(6, 9))
    wrong[0].batches = Batches(5, 1, 2)
    with pytest.raises(InputError) as error:
        StreamSource(wrong).load_state_dict(state)
    assert [line.partition(": ")[0] for line in error.value.mistakes] == [
        "stages.s0.train.global_batch_size",
        "stages.s0.data.max_length",
    ]
    for _ in range(3):
        begun.next_step()
    with pytest.raises(InputError, match=r"stages\.s0: 2 steps: 4 of them are done"):
        StreamSource(stages(steps=(2, 3))).load_state_dict(begun.state_dict() | {"plan": begun.plan[:1]})
