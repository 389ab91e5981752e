"""The streaming engine says what the offline forward says, however it is fed."""

import pytest
import torch
from narration_data import LLAMA, TOKENS
from streams import HEAD, MOD, QUESTION, Transcript, engine, tiny_narrator, video
from torch.utils._python_dispatch import TorchDispatchMode

import mmskip
from mmskip.hf.streaming.slot_ledger import bound_entries
from mmskip.models.video_llm.speaking import speaks
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings

THRESHOLD = 0.05  # of these models: they speak at some frames and stay silent at others


def stream(model, videos, push: int = 100, **settings):
    """Return the texts of a stream that is shown `push` frames at a time."""
    running = engine(model, len(videos), threshold=THRESHOLD, **settings)
    said = []
    for start in range(0, max(map(len, videos)), push):
        for number, features in enumerate(videos):
            running.push(features[start : start + push], number)
        said += running.run()
    return [[item for item in said if item.stream == number] for number in range(len(videos))]


def talkative(said, frames: int) -> bool:
    return 2 <= len(said) < frames - 2


@pytest.mark.parametrize("methods", [(), (MOD,)])
@pytest.mark.parametrize("window", [None, 23])
def test_streamed_text_equals_the_offline_forward_at_every_chunk_size(methods, window):
    model = tiny_narrator(methods, seed=4)
    videos = [video(12, seed) for seed in range(2)]
    settings = {"window": window, "sinks": 3 if window else 0}
    alone = [stream(model, [features], **settings)[0] for features in videos]
    for said, features in zip(alone, videos, strict=True):
        assert talkative(said, len(features))
        transcript = Transcript(model, len(features), said)
        transcript.check(model, features, THRESHOLD, window=window, sinks=settings["sinks"])
    for chunk in (1, 2, 5):
        together = stream(model, videos, push=chunk, chunk=chunk, **settings)
        assert [[item[1:] for item in said] for said in together] == [[item[1:] for item in said] for said in alone]


@pytest.mark.parametrize(("methods", "chunk"), [((), 5), ((MOD,), 1), ((MOD,), 5)])
def test_rolling_positions_do_not_depend_on_chunks_nor_on_other_streams(methods, chunk):
    model = tiny_narrator(methods, seed=4)
    videos = [video(28, seed) for seed in range(2)]
    settings = {"window": 23, "sinks": 3, "positions": "rolling", "position_range": 90}
    alone = [stream(model, [features], **settings)[0] for features in videos]
    assert any(alone)
    together = stream(model, videos, push=chunk, chunk=chunk, **settings)
    assert [[item[1:] for item in said] for said in together] == [[item[1:] for item in said] for said in alone]


def test_rolling_streams_equal_the_reference_that_turns_keys_back(monkeypatch):
    model, features = tiny_narrator((MOD,), seed=4), video(32)
    running = engine(model, threshold=THRESHOLD, window=23, sinks=3, positions="rolling", position_range=90, chunk=3)
    bases, begin = [], running.cache.begin

    def remember(layout, lengths, dtype):
        start = running.cache.totals[0]
        announced = begin(layout, lengths, dtype)
        bases[start:] = [running.cache.bases[0]] * lengths[0]
        return announced

    monkeypatch.setattr(running.cache, "begin", remember)
    running.push(features)
    said = running.run()
    assert len(set(bases)) > 3
    transcript = Transcript(model, len(features), said)
    bases += [bases[-1]] * (len(transcript.ids) - len(bases))
    transcript.check(model, features, THRESHOLD, window=23, sinks=3, bases=bases)


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_ten_times_the_context_length_under_a_window_within_the_announced_bytes(methods):
    model = tiny_narrator(methods, seed=4, llm={**LLAMA, "max_position_embeddings": 96})
    running = engine(model, 2, threshold=THRESHOLD, window=20, sinks=2, positions="rolling", chunk=2)
    limit, said, most = running.kv_bound(), 0, 0
    for part in range(40):
        for number in range(2):
            running.push(video(4, part), number)
        said += len(running.run())
        most = max(most, running.cache.reserved_bytes)
    assert min(running.cache.totals) > 10 * 96
    assert said
    assert most <= limit


class Work(TorchDispatchMode):
    """Counts operations and the numbers they give."""

    def __init__(self):
        super().__init__()
        self.done = (0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        self.done = (self.done[0] + 1, self.done[1] + sum(sizes))
        return out


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_a_frame_costs_the_same_however_long_the_stream_under_a_full_window(methods):
    model = tiny_narrator(methods, seed=4)
    model.llm.lm_head.weight.data.zero_()  # it never speaks: all frames are alike
    running = engine(model, threshold=0.0, window=40, sinks=2, position_range=10_000)
    frames, work = video(1), []
    for _ in range(130):
        running.push(frames)
        with Work() as counted:
            running.run()
        work.append(counted.done)
    # room is made every so many frames, so the most and the least of a span are compared
    early, late = (work[start : start + 30] for start in (20, 100))
    assert (min(early), max(early)) == (min(late), max(late))


NOT_AS_CONFIGURED = {
    # keys and values of one head for all, and a compressed pair of another width than the heads'
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 16, "n_layer": 2, "n_head": 2, "multi_query": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "first_k_dense_replace": 2,
    },
}


@pytest.mark.parametrize("name", NOT_AS_CONFIGURED)
def test_the_announced_bytes_are_those_of_the_entries(name):
    """As many entries as announced, of the bytes that the model really stores."""
    model = tiny_narrator(llm=NOT_AS_CONFIGURED[name], seed=4)
    running = engine(model, threshold=0.0, window=20)
    limit = running.kv_bound()
    assert running.cache.totals == [0] and running.frames_seen == [0]
    running.push(video(6))
    running.run()
    assert running.cache.stored_bytes % sum(running.cache.entry_bytes) == 0 < running.cache.stored_bytes
    assert limit == bound_entries(20, 0, TOKENS, running.call_tokens) * sum(running.cache.entry_bytes)


def test_a_stream_beyond_the_range_is_refused_and_its_state_stays():
    model = tiny_narrator((MOD,), llm={**LLAMA, "max_position_embeddings": 40})
    running = engine(model, threshold=0.0)
    running.push(video(20))
    with pytest.raises(ValueError, match=r"the model has 40 positions.*rolling"):
        running.run()
    seen, totals = running.frames_seen, list(running.cache.totals)
    with pytest.raises(ValueError, match="40 positions"):
        running.run()
    assert (running.frames_seen, running.cache.totals) == (seen, totals)


# --- questions and sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [(), (MOD,)])
@pytest.mark.parametrize("chunk", [1, 4])
def test_questions_are_answered_at_their_frame_at_any_time(methods, chunk):
    model, features = tiny_narrator(methods, seed=4), video(12)
    running = engine(model, threshold=THRESHOLD, chunk=chunk)
    long = QUESTION * 15  # of several calls
    running.ask(QUESTION)
    running.push(features[:5])
    assert [running.ask(QUESTION), running.ask(long)] == [1, 2]
    running.push(features[5:])
    said = running.run()
    running.ask(QUESTION)
    said += running.run()
    answers = [(item.question, item.frame) for item in said if item.question is not None]
    assert answers == [(0, -1), (1, 4), (2, 4), (3, 11)]
    assert any(item.question is None for item in said)
    transcript = Transcript(model, len(features), said, [QUESTION, QUESTION, long, QUESTION])
    transcript.check(model, features, THRESHOLD)


def test_an_empty_question_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        engine(tiny_narrator()).ask([])


def test_sampling_follows_seed_stream_and_probabilities():
    model = tiny_narrator((MOD,), seed=4)
    videos = [video(14), video(14)]

    def sampled(**settings):
        said = stream(model, videos, temperature=1.5, **settings)
        return [[item[1:] for item in part] for part in said]

    assert sampled(seed=1) == sampled(seed=1, chunk=3)
    assert sampled(seed=1) != sampled(seed=2)
    assert sampled()[0] != sampled()[1]  # each stream draws for itself
    greedy = [[item[1:] for item in part] for part in stream(model, videos)]
    assert sampled(top_p=1e-6) == greedy != sampled()


# --- speaking and listening -------------------------------------------------------------------------------------------


def test_streams_speak_and_rest_without_touching_each_other():
    """One stream gets its frames late, one has ended: the others go on as if alone."""
    model = tiny_narrator((MOD,), seed=4)
    videos = [video(14, 0), video(6, 1), video(14, 2)]
    alone = [stream(model, [features])[0] for features in videos]
    running = engine(model, 3, threshold=THRESHOLD, chunk=2)
    running.push(videos[0], 0)
    said = running.run()
    running.push(videos[1], 1)
    running.push(videos[2][:7], 2)
    said += running.run()
    running.push(videos[2][7:], 2)
    said += running.run()
    for number, expected in enumerate(alone):
        assert [item[1:] for item in said if item.stream == number] == [item[1:] for item in expected]


def test_a_trace_of_a_stream_counts_its_cache():
    model = tiny_narrator((MOD,), seed=4)
    running = engine(model, 2, threshold=0.0)
    with mmskip.trace(model.llm) as trace:
        for number in range(2):
            running.push(video(6, number), number)
        running.run()
    cost = mmskip.cost(model.llm, trace)
    assert cost.kv_bytes == running.cache.stored_bytes
    assert cost.kv_bytes < cost.dense_kv_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": TOKENS}, f"window is {TOKENS} tokens.*at least {TOKENS + 1}"),
        ({"window": 0}, "window is 0"),
        ({"sinks": 4}, "sinks is 4 without a window"),
        ({"chunk": 0}, "chunk is 0"),
        ({"positions": "relative"}, "relative"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        engine(tiny_narrator(), **settings)


def test_features_of_another_shape_are_refused():
    running = StreamEngine(tiny_narrator(), TOKENS, StreamSettings(), [HEAD])
    with pytest.raises(ValueError, match=rf"expected \[F, {TOKENS}, C\]"):
        running.push(torch.zeros(2, TOKENS + 1, 6))


# --- models that keep more than keys and values ---------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "falcon": {**SMALL, "model_type": "falcon"},  # no family knows it
    "qwen3_5": {
        **SMALL,
        "model_type": "qwen3_5_text",
        "intermediate_size": 32,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_language_model_narrates_one_stream_over_its_own_cache(name):
    model, features = tiny_narrator(llm=OTHERS[name], seed=4), video(8)
    running = engine(model, threshold=THRESHOLD)
    running.push(features)
    said = running.run()
    assert running.cache.stored_bytes > 0
    transcript = Transcript(model, len(features), said)
    with torch.no_grad():
        embeds = model.embed(torch.tensor([transcript.ids]), torch.tensor([transcript.layout]), features)
        logits = model.llm(inputs_embeds=embeds, use_cache=False).logits[0]
    for index, spoke in transcript.decisions:
        assert bool(speaks(logits[index], model.ids.silent, THRESHOLD)) == spoke
    for index, token in transcript.words:
        assert int(logits[index].argmax()) == token
    for settings in ({"chunk": 2}, {"window": 20}, {"streams": 2}):
        with pytest.raises(ValueError, match="as one stream, with chunk=1, without a window"):
            engine(model, **settings)
    with pytest.raises(ValueError, match="cannot be saved"):
        running.state()
