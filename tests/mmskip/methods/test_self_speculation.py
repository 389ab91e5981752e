"""Self-speculation changes the time that generation takes, and nothing else."""

import contract
import pytest
import torch
from tiny_decoders import HYBRIDS, VOCAB, sharpen, tiny_decoder

import mmskip
from mmskip import LayerPlanConfig, SelfSpeculationConfig
from mmskip.methods.self_speculation import speculation, speculation_of
from mmskip.ops.hf_attention import register_attention
from mmskip.ops.speculative import matching, speculative_sample

FAMILIES = (
    "llama",
    "qwen3_mixed_window",
    "mistral_window",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "olmo2",
    "cohere2",
    "qwen3_moe",
    "gpt_oss",
)
IDS = torch.randint(3, VOCAB, (8, 11), generator=torch.Generator().manual_seed(0))
CALL = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None}


def drafting(name="llama", quiet=None, **config):
    """A model of six blocks whose middle ones do so little that some drafts are right, and some are not."""
    model = tiny_decoder(name, num_hidden_layers=6, **_six(name))
    sharpen(model)
    if quiet is not None:
        with torch.no_grad():
            for block in mmskip.families.find(model).blocks[1:-1]:
                for parameter in block.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(quiet)
    return model, SelfSpeculationConfig(**{"draft_tokens": 4, "stop_below": 0.0, **config})


def _six(name):
    kinds = {
        "qwen3_mixed_window": ["sliding_attention", "full_attention"] * 3,
        "gemma2": ["sliding_attention", "full_attention"] * 3,
        "gpt_oss": ["sliding_attention", "full_attention"] * 3,
    }
    return {"layer_types": kinds[name]} if name in kinds else {}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(name, batch):
    mask = torch.ones_like(IDS)
    mask[1, :4] = mask[2, :2] = 0
    call = {**CALL, "attention_mask": mask[:batch], "do_sample": False}
    drafted = accepted = 0
    for quiet in (0.5, 4.0):  # most drafts are right, most are wrong
        model, config = drafting(name, quiet=quiet)
        expected = model.generate(IDS[:batch], **call)
        mmskip.apply_(model, config)
        assert torch.equal(model.generate(IDS[:batch], **call), expected)
        reported = speculation_of(model)
        drafted, accepted = drafted + reported.drafted, accepted + reported.accepted
    assert 0 < accepted < drafted


QUICK_TREES = ("llama", "qwen3_mixed_window", "gemma3_text", "gpt2", "opt", "gpt_oss")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_TREES else pytest.mark.slow) for n in FAMILIES]
)
def test_draft_trees_give_the_tokens_of_generate(name):
    mask = torch.ones_like(IDS[:4])
    mask[1, :4] = mask[2, :2] = 0
    model, config = drafting(name, quiet=2.0, branches=2, branch_above=0.0)
    for batch in (1, 4) if name == "llama" else (4,):
        call = {**CALL, "attention_mask": mask[:batch], "do_sample": False}
        expected = model.generate(IDS[:batch], **call)
        mmskip.apply_(model, config)
        assert torch.equal(model.generate(IDS[:batch], **call), expected)
        mmskip.remove_(model)


def test_a_tree_accepts_what_a_chain_misses():
    accepted = {}
    for branches in (0, 4):
        model, config = drafting(quiet=3.0, branches=branches, branch_above=0.0)
        mmskip.apply_(model, config)
        model.generate(IDS, do_sample=False, repetition_penalty=1.1, **CALL)
        accepted[branches] = speculation_of(model).accepted / speculation_of(model).steps
    assert accepted[4] > 1.2 * accepted[0]


@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_window", "gpt2"])
def test_early_exit_drafts(name):
    model, config = drafting(name, quiet=0.5, exit_after=2)
    expected = model.generate(IDS, do_sample=False, **CALL)
    mmskip.apply_(model, config)
    assert torch.equal(model.generate(IDS, do_sample=False, **CALL), expected)
    reported = speculation_of(model)
    assert 0 < reported.accepted < reported.drafted and 0.2 < reported.draft_share < 0.5
    assert "attention of blocks [2, 3, 4, 5]" in str(reported)


def test_early_exit_drafts_are_those_of_the_first_blocks():
    model, config = drafting(quiet=0.5, exit_after=3)
    with torch.no_grad():  # the rest of the model does nothing, so that every draft is right
        for block in model.model.layers[3:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    mmskip.apply_(model, config)
    model.generate(IDS, do_sample=False, **CALL)
    assert speculation_of(model).accepted == speculation_of(model).drafted


def test_long_runs_measure_plain_steps_and_say_what_they_find():
    model, config = drafting(quiet=4.0, draft_tokens=1)
    call = {**CALL, "max_new_tokens": 60, "do_sample": False}
    expected = model.generate(IDS[:2], **call)
    mmskip.apply_(model, config)
    assert torch.equal(model.generate(IDS[:2], **call), expected)
    reported = speculation_of(model)
    assert len(reported.plain_s) == 1 and reported.passes >= 32 and reported.measured_speedup > 0
    reported.plain_s[:] = [reported.seconds["verify"] + reported.seconds["draft"]] * 3
    assert "measured" in str(reported) and "SLOWER" not in str(reported).splitlines()[-1]
    reported.plain_s[:] = [1e-9]
    assert "SLOWER" in str(reported).splitlines()[-1]


def test_rows_that_end_early_are_padded_as_generate_pads_them():
    model, config = drafting(quiet=0.5)
    free = model.generate(IDS, do_sample=False, **CALL)
    call = {**CALL, "eos_token_id": [int(free[0, 14]), int(free[3, 19])]}
    expected = model.generate(IDS, do_sample=False, **call)
    assert len({int((row != 0).sum()) for row in expected}) > 1
    with pytest.warns(FutureWarning, match="mmskip.generate is now model.generate"):
        assert torch.equal(mmskip.generate(model, IDS, config, do_sample=False, **call), expected)
    assert not mmskip.applied(model)
    mmskip.apply_(model, config)
    assert torch.equal(model.generate(IDS, do_sample=False, **call), expected)


@pytest.mark.parametrize("extra", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}])
def test_logits_processors_see_what_generate_shows_them(extra):
    model, config = drafting(quiet=0.5)
    call = {**CALL, "do_sample": False, **extra}
    if "min_new_tokens" in extra:
        call["eos_token_id"] = int(model.generate(IDS, do_sample=False, **CALL)[0, 14])
    expected = model.generate(IDS, **call)
    assert torch.equal(mmskip.apply_(model, config).generate(IDS, **call), expected)


def test_stop_rule_and_lengths():
    model, config = drafting(quiet=0.5, stop_below=1.0)
    mmskip.apply_(model, config)
    for length in (1, 2, 7):
        assert model.generate(IDS, do_sample=False, **{**CALL, "max_new_tokens": length}).shape == (8, 11 + length)
    reported = speculation_of(model)
    assert 0 < reported.drafted <= reported.steps  # no token is that sure, so every step ends after one draft


@pytest.mark.parametrize("branches", [0, 2])
def test_sampled_tokens_have_the_distribution_of_the_model(branches):
    """Chi-square test of pairs of sampled tokens against the model's exact probabilities."""
    vocabulary, rows = 7, 2000
    model, config = drafting(quiet=0.5, draft_tokens=2, branches=branches)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight[:vocabulary] * 0.15)
    ids = IDS[:1, :5] % vocabulary
    with torch.no_grad():
        first = model(ids).logits[0, -1].softmax(-1)
        pairs = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
        expected = (first[:, None] * model(pairs).logits[:, -1].softmax(-1)).flatten() * rows
    mmskip.apply_(model, config)
    torch.manual_seed(0)
    call = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids.expand(rows, -1), **call)[:, 5:]
    reported = speculation_of(model)
    assert 0.1 < reported.accepted / reported.drafted < 0.99
    counts = torch.bincount(found[:, 0] * vocabulary + found[:, 1], minlength=vocabulary**2).float()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = vocabulary**2 - 1
    # a chi-square of f degrees has mean f and variance 2 f; 4 deviations reject one seed in some thousands
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_acceptance_of_tokens():
    assert matching([1, 2, 3], [1, 2, 4, 5]) == 2 and matching([1], [1, 9]) == 1 and matching([], [3]) == 0
    torch.manual_seed(0)
    q, p = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    drawn = torch.multinomial(q, 6000, replacement=True).tolist()
    found = torch.bincount(torch.tensor([speculative_sample([d], [q], [p, p])[0] for d in drawn])) / 6000
    torch.testing.assert_close(found, p, atol=0.025, rtol=0)


@pytest.mark.parametrize("search", ["random", "bayes"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_search_finds_better_sets_and_tokens_stay_the_same(search, batch):
    if search == "bayes":
        pytest.importorskip("sklearn", reason="extra `search`")
    model, config = drafting(search=search, window=8, max_trials=25, enough=1.0, bayes_every=5, skip_share=0.5)
    with torch.no_grad():
        for index in (2, 4):  # the start, odd blocks, is wrong: these do nothing
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    call = {**CALL, "max_new_tokens": 70, "do_sample": False}
    expected = model.generate(IDS[:batch], **call)
    mmskip.apply_(model, config)
    assert torch.equal(model.generate(IDS[:batch], **call), expected)
    reported = speculation_of(model)
    assert (
        reported.trials > 10
        and reported.best >= reported.tried[0][1]
        and len(reported.chosen) == 4
        and reported.window is None
    )
    assert "sets tried" in str(reported) and reported.seconds["search"] > 0


def test_a_perfect_draft_is_accepted_whole_and_the_report_counts_it():
    model, config = drafting(skip_attn=(2, 3), skip_mlp=(2, 3))
    with torch.no_grad():
        for index in (2, 3):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    mmskip.apply_(model, config)
    model.generate(IDS[:1], do_sample=False, **{**CALL, "max_new_tokens": 11})
    reported = speculation_of(model)
    with pytest.warns(FutureWarning, match="mmskip.report"):
        assert speculation(model) is reported
    assert mmskip.report(model)["SelfSpeculationConfig"].accepted == 8
    assert reported.accepted == reported.drafted == 8 and reported.steps == 2
    assert "100.0% of 8 drafts accepted" in str(reported) and "SLOWER" not in str(reported)


def test_apply_and_remove_leave_nothing():
    model, config = drafting()
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        before = model(IDS).logits
        mmskip.apply_(model, config)
        assert torch.equal(model(IDS).logits, before)
    mmskip.remove_(model)
    assert [type(m) for m in model.modules()] == classes


REFUSED = {
    "num_beams must be 1": {"num_beams": 2},
    "output_scores is set": {"output_scores": True, "return_dict_in_generate": True},
    "StaticCache with 0 tokens": {"cache_implementation": "static"},
    "use_cache True": {"use_cache": False},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_of_generate_that_are_not_served_are_refused(message):
    model, config = drafting()
    mmskip.apply_(model, config)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, do_sample=False, **CALL, **REFUSED[message])


def test_models_that_do_not_fit_are_refused():
    for name in HYBRIDS:
        with pytest.raises(ValueError, match="could not be rolled back"):
            mmskip.apply_(tiny_decoder(name), SelfSpeculationConfig())
    with pytest.raises(ValueError, match="at least three blocks"):
        mmskip.apply_(tiny_decoder("llama", num_hidden_layers=2), SelfSpeculationConfig())
    with pytest.raises(ValueError, match=r"skip_attn holds \[0, 5\].*blocks to choose from are \[1, 2, 3, 4\]"):
        mmskip.apply_(drafting()[0], SelfSpeculationConfig(skip_attn=(0, 2, 5), skip_mlp=()))
    planned = mmskip.apply_(drafting()[0], LayerPlanConfig(drop=(2,)))
    with pytest.raises(
        ValueError, match=r"LayerPlan.* and SelfSpec.* do not compose on one stack: both claim block\.2"
    ):
        mmskip.apply_(planned, SelfSpeculationConfig())
    with pytest.raises(ValueError, match="go together"):
        SelfSpeculationConfig(skip_attn=(1,))
    with pytest.raises(ValueError, match="draft_tokens is 0"):
        SelfSpeculationConfig(draft_tokens=0)
    with pytest.raises(ValueError, match=r"stop_below is 2.*\[0, 1\]"):
        SelfSpeculationConfig(stop_below=2)
    with pytest.raises(ValueError, match=r"exit_after is 2; expected.*without skip_attn"):
        SelfSpeculationConfig(exit_after=2, search="random")
    with pytest.raises(ValueError, match="this model has 6 blocks"):
        mmskip.apply_(drafting()[0], SelfSpeculationConfig(exit_after=6))
    ragged = mmskip.apply_(drafting()[0], SelfSpeculationConfig(branches=1))
    register_attention()
    ragged.config._attn_implementation = "mmskip_ragged"
    with pytest.raises(ValueError, match="branches=0"):
        ragged.generate(IDS, do_sample=False, **CALL)


def test_an_interrupted_call_leaves_no_keys_and_values_behind():
    model, config = drafting(search="random", window=4, max_trials=1000, patience=1000, enough=1.0)
    held = []

    def stop(ids, scores):
        held.append(speculation_of(model).window is not None)
        if held[-1]:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    mmskip.apply_(model, config)
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS[:1], **{**CALL, "max_new_tokens": 40}, do_sample=False, stopping_criteria=[stop])
    assert held[-1] and speculation_of(model).window is None


CONTRACT = [
    contract.Case(
        base,
        settings,
        settings,
        {"draft_tokens": 0, "stop_below": 1.5, "branches": -1, "search": "best"},
        exact=True,
    )
    for base, settings in (
        (contract.DECODER, SelfSpeculationConfig(skip_attn=(2,), skip_mlp=(2,), draft_tokens=3)),
        (contract.ENCODER_DECODER, SelfSpeculationConfig(exit_after=2, draft_tokens=3)),
    )
]
