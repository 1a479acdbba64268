# SPDX-License-Identifier: Apache-2.0
"""Templates: rows become the prompts of training; unknown and missing columns are refused."""

from __future__ import annotations

import json
import time

import pytest

from dyads.errors import TaskError
from dyads.tasks import families, load
from dyads.tasks.template import Template, escape

CAPITAL = Template(
    texts=("{instruction:strip}\n\n{input}", "{input}"), defaults={"instruction": "Capital?\n"}, ends_line=True
)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"input": "France"}, "Capital?\n\nFrance\n"),
        ({"input": "France\n"}, "Capital?\n\nFrance\n"),
        ({"input": "France", "instruction": " "}, "France\n"),  # a blank column is as good as none
        ({"input": "{France}", "instruction": "{0}"}, "{0}\n\n{France}\n"),  # values are not templates
        ({"input": 3}, "Capital?\n\n3\n"),
        ({"input": ""}, "Capital?\n\n"),
    ],
)
def test_the_first_text_whose_columns_are_filled_is_the_prompt(row, prompt):
    assert CAPITAL.prompt(row) == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"imput": "France"}, "^line 3: unknown column 'imput' – did you mean 'input'?"),
        ({"input": "a", "labels": "x"}, "unknown column 'labels' – known: instruction, input"),
        ({"instruction": "Name it."}, "column 'input' is missing; it has instruction, the task's prompt needs input"),
        ({}, "column 'input' is missing; it has no columns"),
        ({"input": ["a"]}, r"'input' must be text, got \['a'\]; put it in quotes"),
        ({"input": None}, "'input' must be text, got None"),
        ({"input": True}, "'input' must be text, got True"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row, message):
    with pytest.raises(TaskError, match=message):
        CAPITAL.prompt(row, "line 3")


def test_the_forms_of_a_value():
    template = Template(texts=("{a:strip}|{a:sentence}|{a}",), segments=("{b}",), shorter=("{a:strip}",))
    example = template.example({"a": " x ", "b": "y?"})
    assert (example.prompt, example.segments, example.shorter) == ("x|x.| x ", ("y?",), ("x",))
    assert Template(texts=("{a:sentence}",)).prompt({"a": "Why?"}) == "Why?"
    assert Template(texts=(escape("{a} }"),)).prompt({}) == "{a} }"


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{a:>10}", "{a!r:upper}"])
def test_a_text_that_is_no_template_is_refused(text):
    with pytest.raises(TaskError, match=r"template '.*': .*double .* brace"):
        Template(texts=(text,))


def test_the_column_of_a_single_text():
    assert CAPITAL.input_column == "input"
    assert Template(texts=("{a} {b}",)).input_column is None


@pytest.mark.parametrize("family", sorted(families()))
def test_tasks_of_every_family_render_their_own_prompts(family, request):
    try:
        options = request.getfixturevalue(f"{family}_options")
    except pytest.FixtureLookupError:
        options = {}
    for task in load({"family": family, **options}):
        template = Template.model_validate(json.loads(json.dumps(task.template.model_dump())))
        assert template == task.template
        marks = {name: f"<{name}>" for name in template.columns if name != "messages"}
        assert task.prompt_of(marks) == template.example(marks).prompt
        for name in marks:
            assert any(marks[name] in text for text in (task.prompt_of(marks), *template.example(marks).segments))


def test_the_prompts_of_a_task_are_those_of_its_template(sni_options):
    (task,) = load({"family": "sni", "names": ["task001"], "protocol": "official", **sni_options})
    example = task.test[0]
    again = task.template.example({"input": "thing 0"}, id=example.id, references=example.references)
    assert again == example
    (task,) = load({"family": "starter", "names": ["word_after"], "train_per_task": 1})
    line, question, _ = task.train[0].prompt.split("\n")
    row = {"input": line.removeprefix("Words: "), "word": question.removeprefix("Which word comes right after ")[:-1]}
    assert task.prompt_of(row) == task.train[0].prompt


@pytest.mark.parametrize("family", sorted(families()))
def test_prompts_of_every_family_fit_their_form_and_bare_inputs_do_not(family, request):
    try:
        options = request.getfixturevalue(f"{family}_options")
    except pytest.FixtureLookupError:
        options = {}
    for task in load({"family": family, **options}):
        prompts = [text for e in task.train[:20] if len(e.messages) < 2 for text in (e.prompt, *e.shorter)]
        assert all(task.template.fits(prompt) for prompt in prompts)
        if set(task.template.form.split()) - {f"{{{name}}}" for name in task.template.columns}:  # words of its own
            assert not task.template.fits("an input alone\n")


def test_a_form_has_the_columns_that_a_row_must_fill():
    template = Template(
        texts=("{instruction:strip}\n\n{input}", "{input}"), defaults={"instruction": " Add {1}. "}, ends_line=True
    )
    assert template.form == "Add {1}.\n\n{input}\n"
    assert template.fits("Add {1}.\n\n2 + 3\n")
    assert template.fits("Add {1}.\n\ntwo\nlines \n")
    assert not Template(texts=("{instruction}\n\n{input}",), defaults={"instruction": "Add."}).fits("Subtract.\n\n2")
    assert not template.fits("Add {1}.\n\n2 + 3"), "training ended the line"
    assert Template(texts=("a{{b}} {x} c: ",)).fits("a{b} x\ny c:")


def test_a_form_with_many_columns_is_compared_without_backtracking():
    columns = [f"{{c{i}}}" for i in range(60)]
    start = time.process_time()
    assert not Template(texts=("".join(columns) + "!",)).fits("a" * 5000)
    assert Template(texts=(" ".join(columns),)).fits("a " * 5000)
    assert not Template(texts=("a{x}a",)).fits("a"), "the ends do not overlap"
    assert Template(texts=("a{x}b{y}c",)).fits("abxbc")
    assert not Template(texts=("a{x}b{y}bc",)).fits("a bc")
    assert time.process_time() - start < 1
