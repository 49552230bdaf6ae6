"""The quickstart's task: a small readable English corpus from templates, preferences, prompts with a hero, a word tokenizer.

A story is an opening (the prompt) and a completion of two short sentences. Half of the corpus ends kindly, a quarter coldly and a
quarter without any mood, so a model trained on it has all three to choose from. In nine of ten preferences the kinder of two endings of
the same opening is the chosen one: that is all a reward model is told of kindness.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS_STORIES = 6000
PAIRS = 1500
DISAGREEING = 10  # one pair in so many is judged the other way round: people do not all agree
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 200, 50
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

HEROES = {name: ("he", "his") for name in ("Tom", "Ben", "Sam", "Max", "Leo")} | {
    name: ("she", "her") for name in ("Mia", "Lily", "Anna", "Lucy", "Nora")
}
ANIMALS = ("dog", "cat", "duck", "rabbit", "bird", "mouse", "fox", "bear", "frog", "horse")
STATES = ("little", "hungry", "tired", "lost", "wet", "shy")
PLACES = (
    "in the garden",
    "in the forest",
    "by the river",
    "in the park",
    "at the school",
    "on the farm",
    "near the house",
    "at the market",
)
TIMES = ("One morning", "One sunny day", "One cold evening", "After lunch", "In the winter", "On the way home")
THINGS = ("ball", "kite", "boat", "hat", "book", "drum")
FOODS = ("bread", "cake", "soup", "milk", "pie")

OPENINGS = (
    "{time} {name} met a {state} {animal} {place}.",
    "{time} a {state} {animal} came to {name} {place}.",
    "{name} saw a {state} {animal} {place}.",
    "{time} {name} had a new {thing}. A {state} {animal} wanted to see it.",
    "{name} was {place} with a {thing}. A {state} {animal} sat there too.",
)
ENDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kind": (
        (
            "{name} smiled and gave the {animal} some {food}.",
            "{name} was kind and shared {his} {food}.",
            "{He} helped the {animal} and gave it warm {food}.",
            "{name} hugged the {animal} in a gentle way.",
            "{He} shared {his} {thing} with the {animal}.",
            "{name} smiled at the {animal} and said hello.",
            "{He} took the {animal} to a safe place.",
        ),
        (
            "They played together until the evening.",
            "They were good friends and loved the day.",
            "The {animal} was happy and said thank you.",
            "Soon they laughed and were happy together.",
            "The {animal} was glad to have a friend.",
            "Then they all went home.",
            "The {animal} loved {name} very much.",
        ),
    ),
    "plain": (
        (
            "{name} looked at the {animal} and walked on.",
            "{He} sat down under a tree.",
            "{name} counted the clouds for a while.",
            "{He} put {his} {thing} on the table.",
        ),
        (
            "Then it began to rain.",
            "The {animal} went to sleep.",
            "It was late and {he} went home.",
            "The {animal} ate some grass.",
        ),
    ),
    "cold": (
        (
            "{name} shouted at the {animal}.",
            "{He} was angry and broke {his} {thing}.",
            "{name} took all the {food} and ran away.",
            "{He} pushed the {animal} into the mud.",
        ),
        (
            "The {animal} cried all night.",
            "The {animal} was sad and alone.",
            "{name} was mean to the {animal}.",
            "Then {he} was afraid and went home.",
        ),
    ),
}
MOODS = ("kind", "kind", "plain", "cold")


@dataclass(frozen=True)
class ToyTask:
    """Where `write_toy` put things.

    corpus: JSONL with prompt, completion, hero, mood; a story is prompt + completion, as text, without a separator.
    pairs: JSONL with prompt, chosen, rejected.
    prompts, held_out: JSONL with prompt and hero; no prompt stands in both, in the corpus or in the pairs.
    tokenizer: a Hugging Face folder; encoding puts the start token in front, and training has to put the end token behind.
    """

    corpus: Path
    pairs: Path
    prompts: Path
    held_out: Path
    tokenizer: Path


def write_toy(folder: Path, *, seed: int) -> ToyTask:
    """Writes corpus, prompts and tokenizer; the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus_file, pairs_file, prompts_file, held_out_file = (folder / f"{name}.jsonl" for name in ("corpus", "pairs", "prompts", "held_out"))
    task = ToyTask(corpus_file, pairs_file, prompts_file, held_out_file, folder / "tokenizer")
    rng = random.Random(seed)
    corpus = [_story(rng) for _ in range(CORPUS_STORIES)]
    pairs = [_pair(rng) for _ in range(PAIRS)]
    prompts = _new_prompts(rng, {row["prompt"] for row in (*corpus, *pairs)})
    _write_rows(task.corpus, corpus)
    _write_rows(task.pairs, pairs)
    _write_rows(task.prompts, prompts[:TRAIN_PROMPTS])
    _write_rows(task.held_out, prompts[TRAIN_PROMPTS:])
    _train_tokenizer(story["prompt"] + story["completion"] for story in corpus).save_pretrained(task.tokenizer)
    return task


def _story(rng: random.Random) -> dict[str, str]:
    words = _cast(rng)
    mood = rng.choice(MOODS)
    opening = rng.choice(OPENINGS).format(**words)
    return {"prompt": opening, "completion": _ending(rng, mood, words), "hero": words["name"], "mood": mood}


def _pair(rng: random.Random) -> dict[str, str]:
    """Two endings of one opening, mostly with the kinder one chosen."""
    words = _cast(rng)
    better, worse = rng.choice((("kind", "plain"), ("kind", "cold"), ("plain", "cold")))
    if rng.randrange(DISAGREEING) == 0:
        better, worse = worse, better
    opening = rng.choice(OPENINGS).format(**words)
    return {"prompt": opening, "chosen": _ending(rng, better, words), "rejected": _ending(rng, worse, words)}


def _ending(rng: random.Random, mood: str, words: dict[str, str]) -> str:
    acts, closings = ENDINGS[mood]
    return f" {rng.choice(acts)} {rng.choice(closings)}".format(**words)


def _cast(rng: random.Random) -> dict[str, str]:
    name = rng.choice(sorted(HEROES))
    he, his = HEROES[name]
    choices = {"animal": ANIMALS, "state": STATES, "place": PLACES, "time": TIMES, "thing": THINGS, "food": FOODS}
    return {"name": name, "he": he, "He": he.capitalize(), "his": his} | {key: rng.choice(values) for key, values in choices.items()}


def _new_prompts(rng: random.Random, known: set[str]) -> list[dict[str, str]]:
    """Openings that the corpus does not have: what the model does with them it has not learnt by heart."""
    prompts: dict[str, str] = {}
    while len(prompts) < TRAIN_PROMPTS + HELD_OUT_PROMPTS:
        words = _cast(rng)
        opening = rng.choice(OPENINGS).format(**words)
        if opening not in known:
            prompts[opening] = words["name"]
    return [{"prompt": prompt, "hero": hero} for prompt, hero in prompts.items()]


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """One token a word, the space in front of it included: decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z']+| ?[^A-Za-z\s]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[PAD, BOS, EOS, UNK], show_progress=False))
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK)
