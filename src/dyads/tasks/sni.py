# SPDX-License-Identifier: Apache-2.0
"""Family `sni`: Super-NaturalInstructions (Wang et al., 2022, arXiv 2204.07705).

It reads a folder in the upstream layout, whole or partial: `tasks/*.json`, `splits/<track>/{train,test}_tasks.txt`; or
the file of one task.

Protocol `mode` (Ning et al., 2025, arXiv 2408.01505): every task is trained on and scored. Per task, 10 % of the
instances are the test split and 90 % the train part. The paper does not give its prompt; ours is the definition and the
instance's input without demonstrations. We differ: 5 % of the train part (at least one) are validation, so that
learning rates are not chosen by test scores; instances with the same prompt are in one split.

Protocol `official` (Tk-Instruct): the first 100 instances are the test split, the prompt is the definition with
`demonstrations` positive examples, source 1024 and target 128 tokens, greedy decoding. Where a prompt is too
long, demonstrations are dropped from the last one on. Tasks of the track's test file are unseen: they have no train
split. We differ for the other tasks: the release trains on all instances, we on those after the first 100, less 5 %
validation.

Empty outputs are removed; an instance without any other is dropped, with a note. Tasks whose output is not English are
scored by ROUGE-L over whitespace-separated words. The official scorer splits the outputs of track `xlingual` with
GPT-2's BPE tokenizer: our scores of that track are not comparable with official ones.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dyads.errors import TaskError
from dyads.tasks.divide import divide, take
from dyads.tasks.family import FamilySpec, Suite, register_family
from dyads.tasks.sni_folder import Checkout, TaskFile, read_task
from dyads.tasks.task import Example, Task
from dyads.tasks.template import Template, escape, sentence

__all__ = ["MODE_CASE_STUDY", "MODE_CASE_STUDY_STAND_INS", "NAMED_SUITES", "STAND_INS", "SNISpec"]

MODE_CASE_STUDY = (
    "task024_cosmosqa_answer_generation",
    "task025_cosmosqa_incorrect_answer_generation",
    "task074_squad1.1_question_generation",
    "task089_swap_words_verification",
    "task114_is_the_given_word_longest",
    "task141_odd-man-out_classification_category",
    "task155_count_nouns_verbs",
    "task192_hotpotqa_sentence_generation",
    "task269_csrg_counterfactual_story_generation",
    "task279_stereoset_classification_stereotype",
    "task291_semeval_2020_task4_commonsense_validation",
    "task622_replace_alphabets_in_a_list_by_their_position_in_english_alphabet",
    "task672_nummersense",
    "task1711_poki_text_generation",
    "task1729_personachat_generate_next",
)
"""The fifteen tasks of the case study of the MoDE paper, in the order of its table 6."""

STAND_INS = {
    "task025_cosmosqa_incorrect_answer_generation": "task454_swag_incorrect_answer_generation",
    "task074_squad1.1_question_generation": "task897_freebase_qa_topic_question_generation",
    "task192_hotpotqa_sentence_generation": "task223_quartz_explanation_generation",
    "task269_csrg_counterfactual_story_generation": "task105_story_cloze-rocstories_sentence_generation",
    "task279_stereoset_classification_stereotype": "task889_goemotions_classification",
    "task1729_personachat_generate_next": "task565_circa_answer_generation",
}
"""Replacements for tasks that a collection may lack: of the same category, or for 269 and 279 of a similar one."""

MODE_CASE_STUDY_STAND_INS = tuple(STAND_INS.get(name, name) for name in MODE_CASE_STUDY)

NAMED_SUITES = {"mode-case-study": MODE_CASE_STUDY, "mode-case-study-stand-ins": MODE_CASE_STUDY_STAND_INS}

VERSION = 1
EVALUATED = 0.10  # test share of a task's instances, protocol mode
VALIDATED = 0.05  # validation share of the remaining instances, both protocols
OFFICIAL_TEST = 100  # test instances, the first of the file
DEMONSTRATIONS = 2
SOURCE_TOKENS, TARGET_TOKENS = 1024, 128
SEQUENCE_TOKENS = 1024  # limit of source and target together, protocol mode


@register_family
class SNISpec(FamilySpec):
    """Super-NaturalInstructions, from a folder in the upstream layout or the file of one task."""

    family: Literal["sni"] = "sni"
    """Super-NaturalInstructions, from a folder in the upstream layout or the file of one task."""
    path: Path
    """The folder that holds `tasks/` and `splits/`."""
    track: Literal["default", "xlingual"] = "default"
    """English tasks, or all languages (scores not comparable with official ones)."""
    split_file: Literal["train", "test"] | None = None
    """The list that holds the tasks. None: any; without `names`, the train list (mode) or both (official)."""
    names: tuple[str, ...] | None = None
    """Tasks in the order of their ids: full names, unambiguous numbers (`task024`), or the name of a suite."""
    protocol: Literal["mode", "official"] = "mode"
    """Every task split 90/10, prompts without demonstrations; or the release's prompts and unseen test tasks."""
    demonstrations: int | None = Field(default=None, ge=0)
    """Positive examples in a prompt of protocol official; None: two, as in the release."""
    max_per_task: int | None = Field(default=None, ge=1)
    """Limit of training instances per task, chosen by the seed; validation and test are not limited."""
    seed: int = 0
    """Seed of splits and `max_per_task`; independent of the training seed: all runs have the same test split."""

    @field_validator("names", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    @field_validator("names")
    @classmethod
    def _some_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and not names:
            raise ValueError("names is an empty list; leave it out to take every task of the lists")
        return names

    @model_validator(mode="after")
    def _demonstrations_are_official(self) -> SNISpec:
        if self.protocol == "mode" and self.demonstrations is not None:
            raise ValueError(
                f"demonstrations: {self.demonstrations} needs protocol: official; protocol mode has no demonstrations"
            )
        return self

    def load(self) -> Suite:
        notes: list[str] = []
        if (file := self.path.expanduser()).is_file():
            if self.names is not None or self.split_file is not None:
                raise TaskError(f"{self.path} is the file of one task: leave `names` and `split_file` out")
            return Suite((self._task(file.stem, file, False, notes),), tuple(notes))
        checkout = Checkout(self.path.expanduser(), self.track)
        listed = {which: checkout.listed(which) for which in ("train", "test")}
        names = (
            self._all_names(checkout, listed, notes) if self.names is None else self._chosen(checkout, listed, notes)
        )
        unseen = set(listed["test"]) if self.protocol == "official" else set()
        tasks = [self._task(name, checkout.files[name], name in unseen, notes) for name in names]
        return Suite(tuple(tasks), tuple(notes))

    def _all_names(self, checkout: Checkout, listed: dict[str, list[str]], notes: list[str]) -> list[str]:
        default = ["train"] if self.protocol == "mode" else ["train", "test"]
        wanted = [self.split_file] if self.split_file else default
        names = []
        for which in wanted:
            found = [name for name in listed[which] if name in checkout.files]
            notes.append(f"found {len(found)} of {len(listed[which])} tasks of {checkout.split_path(which)}")
            names += found
        if not names:
            lists = " or ".join(str(checkout.split_path(which)) for which in wanted)
            raise TaskError(f"none of the tasks of {lists} has a file in {checkout.tasks}")
        return names

    def _chosen(self, checkout: Checkout, listed: dict[str, list[str]], notes: list[str]) -> list[str]:
        given = [n for name in self.names or () for n in NAMED_SUITES.get(name, (name,))]
        if missing := [n for n in given if n in MODE_CASE_STUDY and n not in checkout.files]:
            replaced = ", ".join(n for n in missing if n in STAND_INS) or "none of them"
            raise TaskError(
                f"{len(missing)} of the named tasks are not in {checkout.tasks} ({len(checkout.files)} task files): "
                f"{', '.join(missing)}. Complete the collection, or use `names: mode-case-study-stand-ins`, which "
                f"replaces {replaced}"
            )
        chosen: dict[str, str] = {}
        for name in given:
            full = checkout.full_name(name, NAMED_SUITES)
            if full in chosen:
                raise TaskError(f"`names` has the task {full} twice, as '{chosen[full]}' and '{name}'; name it once")
            chosen[full] = name
            if self.split_file and full not in listed[self.split_file]:
                other = next((w for w, names in listed.items() if full in names), None)
                raise TaskError(
                    f"task '{full}' is in {f'the {other} list' if other else 'no list'} of track '{self.track}', not "
                    f"in that of split_file: {self.split_file}; leave split_file or the name out"
                )
        if "mode-case-study-stand-ins" in (self.names or ()):
            notes.append("stand-ins: " + ", ".join(f"{new} for {old}" for old, new in STAND_INS.items()))
        if unlisted := [n for n in chosen if not any(n in names for names in listed.values())]:
            notes.append(f"outside the {self.track} track's train and test lists: {', '.join(unlisted)}")
        return list(chosen)

    def _task(self, name: str, path: Path, unseen: bool, notes: list[str]) -> Task:
        content = read_task(path)
        examples = self._examples(name, content)
        usable = [e for e in examples if e is not None]
        if not usable:
            what = f"{len(examples)} instances and none has an output" if examples else "no instances"
            raise TaskError(f"{path}: task '{name}' has {what}; leave it out of `names`")
        if dropped := len(examples) - len(usable):
            notes.append(f"{name}: dropped {dropped} of {len(examples)} instances, all their outputs are empty")

        salt = f"sni/{self.seed}/{name}"
        train: tuple[Example, ...] = ()
        validation: tuple[Example, ...] = ()
        if self.protocol == "mode":
            n_test = max(1, round(EVALUATED * len(usable)))
            n_validation = max(1, round(VALIDATED * (len(usable) - n_test)))
            train, test, validation = divide(usable, [n_test, n_validation], salt=salt, task=name)
        else:
            test = tuple(e for e in examples[:OFFICIAL_TEST] if e is not None)
            if not test:
                raise TaskError(
                    f"{path}: none of the first {OFFICIAL_TEST} instances of '{name}' has an output; "
                    f"leave it out of `names`"
                )
            tested = {e.prompt for e in test}
            rest = [e for e in examples[OFFICIAL_TEST:] if e is not None and e.prompt not in tested]
            if not unseen and len({e.prompt for e in rest}) > 1:
                train, validation = divide(rest, [max(1, round(VALIDATED * len(rest)))], salt=salt, task=name)
            elif not unseen:
                notes.append(f"{name}: no train split, {len(rest)} usable instances after the first {OFFICIAL_TEST}")

        english = content.output_language in ([], ["English"])
        metrics = ("rouge_l" if english else "rouge_l_words", "sni_exact_match")
        return Task(
            name=name,
            version=VERSION,
            train=take(train, self.max_per_task, salt=salt),
            validation=validation,
            test=test,
            metric=metrics[0],
            metrics=metrics,
            max_new_tokens=TARGET_TOKENS,
            max_prompt_tokens=SEQUENCE_TOKENS - TARGET_TOKENS if self.protocol == "mode" else SOURCE_TOKENS,
            category=content.categories[0] if content.categories else "",
            description=content.definition[0].strip(),
            template=self._template(content),
        )

    def _template(self, content: TaskFile) -> Template:
        if self.protocol == "mode":
            return mode_template(content.definition[0])
        return official_template(content, self.demonstrations)

    def _examples(self, name: str, content: TaskFile) -> list[Example | None]:
        """The example of every instance, in the order of the file; None for an instance without output."""
        template, examples = self._template(content), list[Example | None]()
        times: Counter[str] = Counter()
        for number, instance in enumerate(content.instances):
            id_ = instance.id or f"{name}-{number}"
            times[id_] += 1
            if times[id_] > 1:  # some files of the release repeat an id
                id_ = f"{id_}#{times[id_]}"
            references = [o.strip() for o in instance.output if o.strip()]
            row = {"input": instance.input}
            examples.append(template.example(row, id=id_, references=references) if references else None)
        return examples


def mode_template(definition: str) -> Template:
    """Definition and input, without demonstrations. The answer follows the final space."""
    return Template(texts=(f"{escape(definition.strip())}\n\nInput: {{input:strip}}\nOutput: ",))


def official_template(content: TaskFile, demonstrations: int | None) -> Template:
    """Tk-Instruct's prompts, with at most `demonstrations` positive examples in the first and one less in each next."""
    most = DEMONSTRATIONS if demonstrations is None else demonstrations
    start = f"Definition: {sentence(content.definition[0].strip())}\n\n"
    shown = [
        f" Positive Example {number} -\n"
        f"{sentence(f'Input: {example.input.strip()}')}\n"
        f"{sentence(f' Output: {example.output.strip()}')}\n\n"
        for number, example in enumerate(content.positive_examples[:most], start=1)
    ]
    end = "Now complete the following example -\nInput: {input:sentence}\nOutput: "
    first, *shorter = (escape(start + "".join(shown[:k])) + end for k in range(len(shown), -1, -1))
    return Template(texts=(first,), shorter=tuple(shorter))
