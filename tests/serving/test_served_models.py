# SPDX-License-Identifier: Apache-2.0
"""Runs become models: shared weights, batches of their own where they must, names, columns, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dyads.cli import main
from dyads.data.tokens import PromptTokenizer
from dyads.errors import ConfigError
from dyads.models.load import load_model
from dyads.runs.folder import RunFolder
from dyads.scoring.decode import Question
from dyads.scoring.evaluate import generate
from dyads.serving.errors import ServingError
from dyads.serving.served_models import Asked, ServedModels, Wish
from dyads.tasks import Example
from dyads.tasks.messages import Message
from dyads.tasks.template import Template
from dyads.training.train import train
from made_runs import save_llama, tiny_recipe, word_tokenizer
from made_servers import served


def test_runs_share_the_weights_of_their_base_model_and_a_batch(made: dict[str, RunFolder]) -> None:
    models = ServedModels(made, slots=2)
    (batch,) = models.batches
    (base,) = models._bases.values()
    theirs = {p.data_ptr() for p in batch.model.parameters()}
    assert {p.data_ptr() for p in base.model.parameters()} <= theirs
    assert len({model.adapter for model in models.models.values()}) == 1 + len(made)


def test_an_adapter_that_cannot_be_mixed_has_a_batch_of_its_own(made: dict[str, RunFolder], tmp_path: Path) -> None:
    base = Path(made["more"].recipe().model.name)
    recipe = tiny_recipe("lora", base, options={"use_dora": True}, train={"steps": 2, "learning_rate": 0.05})
    dora = train(recipe, tmp_path / "dora", evaluate=False)
    prompt = "Words: fox lamp"
    expected = {"dora": generate(dora, [prompt], [None]), "lora": generate(made["lora"], [prompt], [None])}
    with served({"dora": dora, "lora": made["lora"]}) as server:
        assert len(server.models.batches) == 2
        for name, answers in expected.items():
            body = {"model": name, "prompt": prompt}
            answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60).json()
            assert [answer["choices"][0]["text"]] == answers


def test_a_prompt_above_the_limit_of_its_task_is_refused(made: dict[str, RunFolder]) -> None:
    model = ServedModels({"more": made["more"]}, slots=1)["more/first_word"]
    assert model.template is not None
    asked = [Message("user", "fox lamp")]
    whole = model.of_messages(asked, {}, Wish()).question.prompt
    for most in (len(whole), len(whole) - 1):
        limited = replace(model, template=model.template.model_copy(update={"max_prompt_tokens": most}))
        if most == len(whole):
            assert limited.of_messages(asked, {}, Wish()).question.prompt == whole
            continue
        with pytest.raises(
            ServingError, match=f"the prompt has {len(whole)} tokens, and 'more/first_word' reads {most}"
        ):
            limited.of_messages(asked, {}, Wish())


def test_a_conversation_above_the_limit_is_refused_whole(made: dict[str, RunFolder]) -> None:
    model = ServedModels({"more": made["more"]}, slots=1)["more/first_word"]
    chat = replace(model, template=Template(texts=("{input}",), chat=True, conversation=True))
    talk = [Message(role, "fox lamp") for _ in range(3) for role in ("user", "assistant")] + [Message("user", "lamp")]
    whole = chat.of_messages(talk, {}, Wish()).question.prompt
    for most in (len(whole), len(whole) - 1, len(whole) // 2):
        assert chat.template is not None
        limited = replace(chat, template=chat.template.model_copy(update={"max_prompt_tokens": most}))
        if most == len(whole):
            assert limited.of_messages(talk, {}, Wish()).question.prompt == whole
            continue
        with pytest.raises(ServingError, match=f"the prompt has {len(whole)} tokens, and .* reads {most}"):
            limited.of_messages(talk, {}, Wish())


def test_a_chat_template_that_no_run_reads_keeps_none_from_being_served(
    made: dict[str, RunFolder], tmp_path: Path
) -> None:
    base = save_llama(tmp_path / "odd", word_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ raise_exception('no messages') }}"
    tokenizer.save_pretrained(base)
    sections = {"train": {"learning_rate": 0.05}, "evaluate": {"max_new_tokens": 4, "limit": 1}}
    run = train(tiny_recipe("mode", base, **sections), tmp_path / "run", evaluate=False)
    models = ServedModels({"run": run}, slots=1)
    assert models["run/first_word"].of_prompt("fox", Wish()).question.prompt
    assert models["odd"].of_messages([Message("user", "fox")], {}, Wish()).question.prompt


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_an_adapter_that_changes_its_base_model_changes_that_of_no_other(
    options: dict[str, Any], made: dict[str, RunFolder], tmp_path: Path
) -> None:
    recipe = made["lora"].recipe()
    sections = {"train": {"steps": 2, "learning_rate": 0.05}, "options": options}
    other = train(tiny_recipe("lora", Path(recipe.model.name), **sections), tmp_path / "other", evaluate=False)
    models = ServedModels({"other": other, "lora": made["lora"]}, slots=2)
    (base,) = models._bases.values()
    fresh = load_model(recipe.model).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in base.model.state_dict().items())
    assert models["other"].batch is not models["lora"].batch
    prompt = "Words: fox lamp"
    with served({"other": other, "lora": made["lora"]}) as server:
        for name, run in {"other": other, "lora": made["lora"]}.items():
            body = {"model": name, "prompt": prompt}
            answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=60).json()
            assert [answer["choices"][0]["text"]] == generate(run, [prompt], [None])


def test_a_form_with_several_columns_takes_them_beside_an_empty_message(made: dict[str, RunFolder]) -> None:
    models = ServedModels({"more": made["more"]}, slots=1)
    model = models["more/first_word"]
    form = Template(texts=("{premise} / {hypothesis}",), defaults={}, strips_answers=True)
    two = replace(model, template=form)
    columns = {"premise": "fox", "hypothesis": "lamp"}
    asked = two.of_messages([Message("user", "")], columns, Wish())
    assert asked.example.prompt == "fox / lamp"
    for messages, given in (([Message("user", "fox")], {}), ([Message("user", "fox")], columns)):
        with pytest.raises(ServingError, match="have the columns premise, hypothesis: give each in `columns`"):
            two.of_messages(messages, given, Wish())
    with pytest.raises(ServingError, match="unknown column 'premises' – did you mean 'premise'"):
        two.of_messages([Message("user", "")], {"premises": "a", "hypothesis": "b"}, Wish())
    chat = replace(model, template=Template(texts=("{input}",), chat=True, conversation=True))
    talk = [Message("system", "fox"), Message("user", "lamp"), Message("assistant", "tree"), Message("user", "river")]
    assert chat.of_messages(talk, {}, Wish()).example.messages == tuple(talk)
    with pytest.raises(ServingError, match="the last message must be the user's"):
        chat.of_messages(talk[:3], {}, Wish())
    form = replace(model, template=Template(texts=("{input}",), chat=True))
    assert form.of_messages([talk[0], talk[1]], {}, Wish()).example.messages == (talk[0], talk[1])
    for messages in ([talk[0], talk[0], talk[1]], [talk[2], talk[1]]):
        with pytest.raises(ServingError, match="reads one message of the user"):
            form.of_messages(messages, {}, Wish())
    with pytest.raises(ServingError, match="the run keeps no form of task 'first_word'"):
        replace(model, template=None).of_messages(talk, {}, Wish())


def test_two_models_of_one_name_are_refused(made: dict[str, RunFolder]) -> None:
    with pytest.raises(ConfigError, match="two models are called 'tiny-llama': give a run another name, as NAME=RUN"):
        ServedModels({"tiny-llama": made["mode"]}, slots=1)


def test_base_models_in_folders_of_one_name_have_names_of_their_own(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    runs = {}
    for number, dtype in enumerate(("float32", "float32", "float32", "float32", "bfloat16")):
        base = save_llama(tmp_path / str(number) / "tiny-llama", words)
        recipe = tiny_recipe("zero-shot", base, model_={"dtype": dtype})
        runs[f"run{number}"] = RunFolder.create(tmp_path / f"run{number}", recipe)
    bases = [name for name in ServedModels(runs, slots=1).models if name.startswith("tiny-llama")]
    assert bases == ["tiny-llama", "tiny-llama@float32", "tiny-llama@2", "tiny-llama@3", "tiny-llama@bfloat16"]


@pytest.mark.parametrize("more", [-2, 60])
def test_tokens_are_those_that_the_model_has_embeddings_of(
    words: PreTrainedTokenizerFast, tmp_path: Path, more: int
) -> None:
    """A model may have fewer than its tokenizer, or more, to fill its matrices."""
    size = len(words) + more
    base = save_llama(tmp_path / "tiny-llama", words, vocab_size=size)
    run = RunFolder.create(tmp_path / "run", tiny_recipe("zero-shot", base))
    model = ServedModels({"run": run}, slots=1)["tiny-llama"]
    assert model.of_prompt([3, size - 1], Wish()).question.prompt == [3, size - 1]
    with pytest.raises(ServingError, match=f"token {size} is not among the {size} that the model has") as refusal:
        model.of_prompt([3, size], Wish())
    assert refusal.value.param == "prompt"
    last = words.convert_ids_to_tokens(len(words) - 1)
    if more > 0:
        assert model.of_prompt(last, Wish()).question.prompt[-1] == len(words) - 1
        return
    with pytest.raises(ServingError, match="is not among the"):
        model.of_prompt(last, Wish())
    with pytest.raises(ServingError, match="is not among the") as refusal:
        model.of_messages([Message("user", last)], {}, Wish())
    assert refusal.value.param == "messages"


def test_what_a_chat_template_puts_around_answers_is_in_no_part_of_a_stream(made: dict[str, RunFolder]) -> None:
    alphabet = ["</s>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", extra_special_tokens=["<end>"])
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
        "{{ '<answer>\n' + m['content'] + '\n</answer><end>' }}"
        "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prompts = PromptTokenizer(tokenizer, chat_template=template)
    model = replace(ServedModels({"lora": made["lora"]}, slots=1)["lora"], tokenizer=prompts, template=None)
    example = Example("", "-", ("",), messages=(Message("user", "fox"),))
    for answer in ("a</answer>\n</b> é\n", "\n<answer>\n", "", "\n</answe"):
        tokens = prompts.choice(example, answer)
        asked = Asked(Question([3], 99, example=example), example, strip=False)
        text = model.answer_text(asked, ())
        parts = [text.extend(tokens[:n], ended=n == len(tokens)) for n in range(1, len(tokens) + 1)]
        assert "".join(parts) == answer == prompts.answer_text(example, tokens)
        assert len(answer) < 9 or sum(map(bool, parts)) > 5


def test_runs_that_a_server_cannot_answer_for_are_refused_before_a_model_is_loaded(
    made: dict[str, RunFolder],
    run: Callable[..., Path],
    bert: Path,
    t5: Path,
    pairs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*given: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dyads.serving.served_models.load_model", loaded)
    majority = run("majority", {"first_word": [100.0]}, method="majority")
    encoder = RunFolder.create(tmp_path / "encoder", tiny_recipe("mode", bert, tasks=pairs)).path
    seq2seq = RunFolder.create(tmp_path / "seq2seq", tiny_recipe("mode", t5)).path
    for path, message in (
        (majority, "gives the majority answer: it has no model to serve"),
        (encoder, "is an encoder with heads, and a server answers with decoders: use `dyads generate`"),
        (seq2seq, "is an encoder-decoder, and a server answers with decoders"),
    ):
        result = CliRunner().invoke(main, ["serve", str(made["more"].path), str(path), "--port", "0"])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
