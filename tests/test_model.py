"""Model: inputs, NLL, logits, the sweep of one example, patching, memory, threads."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import tiny_checkpoint
from checkpoint_files import BYTE_BOS as BOS
from checkpoint_files import BYTE_EOS as EOS
from checkpoint_files import BYTE_VOCAB as VOCAB

import swa.model
from swa.errors import CheckpointError, InputError, PolicyError, TokenizerError
from swa.examples import Example
from swa.model import Model, load, plan
from swa.policy import FULL, SLIDING, AttentionPolicy

PROMPT = "The needle is hidden here: 4711. " * 3
ANSWER = "It is 4711."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    return tiny_checkpoint(path, dtype="BF16", tokenizer=True, chat_template=True)


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    window = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}
    return tiny_checkpoint(tmp_path_factory.mktemp("native"), "qwen2", overrides=window)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def native(native_folder: Path) -> Model:
    return load(native_folder, dtype="float32", num_threads=1)


def example(n_prompt: int = 60, n_answer: int = 7, seed: int = 0) -> Example:
    ids = np.random.default_rng(seed).integers(0, 256, n_prompt + n_answer).tolist()
    return Example(tuple(ids[:n_prompt]), tuple(ids[n_prompt:]))


def test_nll_is_the_log_softmax_of_the_logits(model: Model) -> None:
    one = example()
    logits = model.logits(one.prompt_ids, one.answer_ids).astype(np.float64)
    assert logits.shape == (67, VOCAB)
    rows = logits[59:66]
    peak = rows.max(axis=1)
    expected = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
    expected -= rows[np.arange(7), list(one.answer_ids)]
    result = model.nll(one.prompt_ids, one.answer_ids)
    np.testing.assert_allclose(result.per_token, expected, atol=1e-4)
    assert (result.is_greedy == (rows.argmax(axis=1) == one.answer_ids)).all()
    assert result.mean == result.per_token.mean()
    assert repr(result).startswith("NllResult(mean=")


def test_greedy_answers_are_greedy(model: Model) -> None:
    prompt = example().prompt_ids
    ids = model.generate(prompt, max_new_tokens=4).ids
    assert model.nll(prompt, ids).is_greedy.all()


def test_text_messages_and_ids_are_the_same_input(model: Model) -> None:
    prompt_ids = (BOS, *model.tokenizer.encode(PROMPT))
    answer_ids = tuple(model.tokenizer.encode(ANSWER))
    expected = model.nll(prompt_ids, answer_ids).per_token
    chat = [{"role": "user", "content": "hi"}]
    for prompt, answer in (
        (PROMPT, ANSWER),
        (list(prompt_ids), np.array(answer_ids)),
        (np.array(prompt_ids, np.int64), ANSWER),
        ("<bos>" + PROMPT, ANSWER),  # no second one
    ):
        assert (model.nll(prompt, answer).per_token == expected).all()
    rendered = (BOS, *model.tokenizer.encode("user: hi\nassistant: "))
    assert (model.nll(chat, ANSWER).per_token == model.nll(rendered, ANSWER).per_token).all()


@pytest.mark.parametrize(
    ("prompt", "answer", "says"),
    [
        ([], [1], "the prompt is empty"),
        ([1], [], "the answer is empty"),
        ([1], "", "the answer is empty"),
        ([1, VOCAB], [1], f"token 1 of the example is {VOCAB}: ids go from 0 to {VOCAB - 1}"),
        ([1], [2, -1], "token 2 of the example is -1"),
        ([1.5], [1], "must be text, chat messages"),
        (5, [1], "must be text, chat messages"),
        (["a"], [1], "must be text, chat messages"),
        ([1], None, "the answer must be text"),
        ([1], [[1]], "the answer must be text"),
        ([1] * 250, [1] * 7, "has 257 tokens, the model 256 positions"),
    ],
)
def test_bad_inputs(model: Model, prompt: Any, answer: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        model.nll(prompt, answer)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, examples: swa.evaluate(model, examples),
        lambda model, examples: swa.score_layers(model, examples, AttentionPolicy(8)),
        lambda model, examples: swa.score_gates(model, examples, AttentionPolicy(8)),
        lambda model, examples: swa.select(model, examples, AttentionPolicy(8), swa.Budget(1)),
        lambda model, examples: swa.examples.self_answered(model, examples, max_new_tokens=9),
    ],
)
def test_all_examples_are_checked_before_any_is_run(model: Model, run: Any) -> None:
    idle = replace(model, engine=SimpleNamespace(tier="portable"))
    with pytest.raises(InputError, match=r"(example|prompt) 1 has 3\d\d tokens"):
        run(idle, [example(), example(300), example()])
    with pytest.raises(InputError, match=f"token 3 of example 1 is {VOCAB}: ids go from 0"):
        run(idle, [example(), Example((1, 2, 3, VOCAB) * 9, (1,))])


def test_positions_are_refused_unless_overridden(model: Model, folder: Path) -> None:
    assert model.nll([1] * 250, [1] * 6).per_token.shape == (6,)
    longer = load(folder, dtype="float32", num_threads=1, max_position_embeddings=300)
    assert longer.nll([1] * 250, [1] * 7).per_token.shape == (7,)
    assert longer.max_position_embeddings == 300
    with pytest.raises(InputError, match="301 tokens, the model 300 positions"):
        longer.logits([1] * 301)


def test_patch_shares_weights_and_leaves_the_model(model: Model) -> None:
    one = example()
    before = model.nll_example(one).per_token
    policy = AttentionPolicy(8, num_sink_tokens=2)
    sliding = model.patch(policy)
    assert sliding.engine is model.engine
    assert sliding.policy == policy.with_full_layers([], 4)
    assert model.policy is None
    some = model.patch(policy, full_attention_layers=[1])
    assert some.policy is not None
    assert some.policy.layer_types == (SLIDING, FULL, SLIDING, SLIDING)
    values = [m.nll_example(one).per_token for m in (model, some, sliding)]
    assert (values[0] == before).all()
    assert (values[1] != before).any()
    assert (values[1] != values[2]).any()
    whole = model.patch(policy, full_attention_layers=range(4))
    assert (whole.nll_example(one).per_token == before).all()


def test_layer_types_and_another_policy_per_call(model: Model) -> None:
    one = example()
    chosen = AttentionPolicy(8, layer_types=(SLIDING, FULL, SLIDING, SLIDING))
    patched = model.patch(chosen)
    assert patched.policy == chosen
    expected = patched.nll_example(one).per_token
    assert (model.nll_example(one, chosen).per_token == expected).all()
    assert (model.nll_example(one, AttentionPolicy(8), [1]).per_token == expected).all()
    replaced = model.patch(chosen, full_attention_layers=[0])
    assert replaced.policy == AttentionPolicy(8).with_full_layers([0], 4)


def test_a_window_beyond_the_prompt_changes_no_bit(model: Model) -> None:
    one = example()
    for decode in ("full", "window"):
        wide = model.patch(AttentionPolicy(67, decode=decode))  # type: ignore[arg-type]
        assert (wide.nll_example(one).per_token == model.nll_example(one).per_token).all()


@pytest.mark.parametrize(
    ("policy", "layers", "says"),
    [
        (AttentionPolicy(8), [4], "there is no layer 4"),
        (AttentionPolicy(8), [-1], "full-attention layer"),
        (AttentionPolicy((8, 8, 8)), None, "has 3 layers, the model has 4"),
        (AttentionPolicy(8, layer_types=(FULL,)), None, "has 1 layers, the model has 4"),
        (AttentionPolicy(8, layer_types=(FULL,)), [1], "has 1 layers, the model has 4"),
        ("policy.json", None, "patch takes a Selection or an AttentionPolicy"),
    ],
)
def test_patches_that_do_not_fit(model: Model, policy: Any, layers: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        model.patch(policy, full_attention_layers=layers)


def test_native_sliding_layers_keep_their_window(native: Model) -> None:
    assert native.selectable_layers == (0, 1)
    with pytest.raises(PolicyError, match="layer 2 cannot get full attention"):
        native.patch(AttentionPolicy(8), full_attention_layers=[2])
    one = example()
    everywhere = native.patch(AttentionPolicy(8), full_attention_layers=[0, 1])
    expected = native.nll_example(one).per_token
    assert (everywhere.nll_example(one).per_token == expected).all()
    # Under windowed decode at the native width, no layer is different from the native ones.
    alike = native.patch(AttentionPolicy(8, decode="window"))
    assert (alike.nll_example(one).per_token != expected).any()
    assert "2 layers keep the checkpoint's own window" in repr(native)


@pytest.mark.parametrize("decode", ["full", "window"])
@pytest.mark.parametrize("to_full", [True, False])
def test_sweep_equals_single_runs_bitwise(native: Model, decode: Any, to_full: bool) -> None:
    one = example()
    policy = AttentionPolicy(8, num_sink_tokens=2, decode=decode)
    base = {1} if to_full else {0, 1}
    flips = [0] if to_full else [0, 1]
    seen: list[tuple[float, float]] = []
    sweep = native.sweep_example(
        one, policy, base, flips, to_full, progress=lambda done, total: seen.append((done, total))
    )
    reference = native.nll_example(one, policy, base)
    assert (sweep.base_nll == reference.per_token).all()
    assert (sweep.base_greedy == reference.is_greedy).all()
    assert sweep.run_nll.shape == (4, 7)
    for layer in range(4):
        if layer not in flips:
            assert np.isnan(sweep.run_nll[layer]).all()
            assert not sweep.run_greedy[layer].any()
            continue
        run = native.nll_example(one, policy, base | {layer} if to_full else base - {layer})
        assert (sweep.run_nll[layer] == run.per_token).all()
        assert (sweep.run_greedy[layer] == run.is_greedy).all()
        assert (sweep.run_nll[layer] != sweep.base_nll).any()
    assert all(0 <= done <= total for done, total in seen)


def test_sweep_refuses_what_would_say_nothing(model: Model, native: Model) -> None:
    policy = AttentionPolicy(8)
    with pytest.raises(InputError, match="layers 1 are full in the base"):
        model.sweep_example(example(), policy, {1}, [0, 1], True)
    with pytest.raises(InputError, match="layers 2, 3 are sliding in the base"):
        model.sweep_example(example(), policy, {0, 1}, [1, 2, 3], False)
    with pytest.raises(PolicyError, match="layer 3 cannot get full attention"):
        native.sweep_example(example(), policy, set(), [3], True)


def test_concurrent_calls_give_the_same_bits(model: Model) -> None:
    examples = [example(40 + i, 5, seed=i) for i in range(4)]
    sliding = model.patch(AttentionPolicy(8))
    models = [model, sliding] * 8
    expected = [m.nll_example(examples[i % 4]).per_token for i, m in enumerate(models)]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(m.nll_example, examples[i % 4]) for i, m in enumerate(models)]
        for run, value in zip(runs, expected, strict=True):
            assert (run.result().per_token == value).all()


def test_memory_is_told_beforehand(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model.engine.weight_bytes
    for kind in ("nll", "sweep", "logits", "decode"):
        needs = [model.memory_required(n, kind) for n in (64, 128, 256)]  # type: ignore[arg-type]
        assert weights < needs[0] <= needs[1] <= needs[2]
    wide, narrow = AttentionPolicy(200), AttentionPolicy(8)
    assert model.memory_required(256, "sweep", wide) > model.memory_required(256, "sweep", narrow)
    need = model.memory_required(67) - weights
    monkeypatch.setattr(swa.model, "available_bytes", lambda: need)
    model.nll_example(example())
    monkeypatch.setattr(swa.model, "available_bytes", lambda: need - 1)
    with pytest.raises(MemoryError, match="no room for nll over 67 tokens: .* shorten the input"):
        model.nll_example(example())
    monkeypatch.setattr(swa.model, "available_bytes", lambda: 1)
    for call in (
        lambda: model.generate([1], max_new_tokens=8),
        lambda: model.logits([1, 2]),
        lambda: model.sweep_example(example(), narrow, set(), [0], True),
    ):
        with pytest.raises(MemoryError, match="shorten the input"):
            call()


def test_a_sweeps_memory_is_that_of_the_flipped_layers(
    model: Model, native: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, mixed = AttentionPolicy(200), AttentionPolicy((8, 200, 200, 200))

    def told(model: Model, policy: AttentionPolicy, flips: Any = None) -> int:
        return model.memory_required(256, "sweep", policy, flips)

    assert told(model, mixed) == told(model, AttentionPolicy(8)) < told(model, wide)
    assert told(model, mixed, [1, 2, 3]) == told(model, wide)
    assert told(model, mixed, [3]) == told(model, wide)
    assert native.selectable_layers == (0, 1)  # the other layers' windows are not the policy's
    assert told(native, AttentionPolicy((200, 200, 8, 8))) == told(native, wide)
    need = told(model, wide) - model.engine.weight_bytes
    monkeypatch.setattr(swa.model, "available_bytes", lambda: need - 1)
    with pytest.raises(MemoryError, match="no room for sweep over 256 tokens"):
        model.sweep_example(example(250, 6), mixed, {0}, [1, 2, 3], True)


def test_weights_that_cannot_fit_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swa.model, "available_bytes", lambda: 1)
    with pytest.raises(MemoryError, match="no room for the weights"):
        load(folder)


def test_repr(folder: Path, model: Model) -> None:
    assert repr(model).startswith(
        "Model tiny-llama (llama, 4 layers)\n  weights    float32, 1 MiB\n"
    )
    assert "  attention  full\n" in repr(model)
    assert "up to 256 tokens" in repr(model)
    patched = model.patch(AttentionPolicy(8), full_attention_layers=[1, 2, 3])
    assert "layer_types=<3 of 4 full: 1-3>" in repr(patched)


def test_lost_mantissa_is_said(native_folder: Path, folder: Path, native: Model) -> None:
    rounded = load(native_folder, num_threads=1)
    assert rounded.precision_note == 'F32 rounded to bfloat16; dtype="float32" keeps the values'
    assert rounded.precision_note in repr(rounded)
    assert native.precision_note is None
    assert load(folder, num_threads=1).precision_note is None  # stored in bfloat16


def test_without_a_tokenizer(folder: Path, tmp_path: Path, model: Model) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare / name)
    numbers = load(bare, dtype="float32", num_threads=1)
    assert not numbers.has_tokenizer
    one = example()
    assert (numbers.nll_example(one).per_token == model.nll_example(one).per_token).all()
    result = numbers.generate(one.prompt_ids, max_new_tokens=3)
    assert result.text == ""
    assert result.ids == model.generate(one.prompt_ids, max_new_tokens=3).ids
    for call in (
        lambda: numbers.tokenizer,
        lambda: numbers.nll("a", [1]),
        lambda: numbers.nll([1], "a"),
        lambda: numbers.generate([1], stop="a"),
        lambda: numbers.generate([1], stream=True),
    ):
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            call()
    for given in (folder, str(folder), model.tokenizer):
        lent = load(bare, dtype="float32", num_threads=1, tokenizer=given)
        assert (lent.nll(PROMPT, ANSWER).per_token == model.nll(PROMPT, ANSWER).per_token).all()


@pytest.mark.parametrize("opening", [load, plan])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "float16"}, "dtype must be"),
        ({"num_threads": -1}, "num_threads must be"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"max_position_embeddings": -5}, "max_position_embeddings must be"),
    ],
)
def test_bad_arguments_of_load(
    folder: Path, opening: Any, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        opening(folder, **arguments)


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, {EOS}),
        ({}, {EOS}),
        ({"eos_token_id": None}, {EOS}),
        ({"eos_token_id": 0}, {EOS, 0}),
        ({"eos_token_id": [3, 5]}, {EOS, 3, 5}),
    ],
)
def test_stop_tokens(
    folder: Path, tmp_path: Path, generation_config: Any, expected: set[int]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if generation_config is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation_config))
    assert load(copy, num_threads=1).stop_ids == expected


@pytest.mark.parametrize("text", ["[", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}'])
def test_a_malformed_generation_config(folder: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(copy, num_threads=1)


def test_the_name_is_the_last_part_of_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load(".", num_threads=1).name == "tiny-llama"
