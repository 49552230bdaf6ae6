"""Builds the second reward of the sentiment recipe: a small BERT that tells a cheerful little story from one that is not.

    python configs/recipes/sentiment/build_classifier.py            # writes runs/sentiment/classifier

Its stories are put together here from everyday words and labelled by VADER (package vaderSentiment); its tokenizer is learnt from
those stories and shares nothing with the policy's, so in a run every completion is decoded and tokenised again. It takes seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

HERE = Path(__file__).resolve().parent
OPENINGS = HERE / "openings.jsonl"
OUTPUT = HERE.parents[2] / "runs" / "sentiment" / "classifier"

CHEERFUL = 0.6  # VADER calls a text positive from 0.05 on; here it must be clearly so
LABELS = {0: "other", 1: "cheerful"}
INVENTED = 0.3  # share of sentences with words that do not exist: small models make some up, and they mean nothing
SPELLING = "abcdefghijklmnopqrstuvwxyz0123456789.,!?\"'-:;"
COMMON = 5
POSITIONS = 256
BATCH = 32
LEARNING_RATE = 2e-3


def _words(text: str) -> list[str]:
    """Words, or phrases where the text separates them by bars."""
    return text.split("|" if "|" in text else None)


WORDS = {
    "name": _words(
        "Lily Tim Mia Ben Anna Tom Sara Max Zoe Leo Ella Sam Ruby Lucy Jack Emma Nina Omar Rosa Mom Dad Grandma Spot Daisy Kitty"
    ),
    "who": _words("the girl|the boy|the cat|the dog|the bird|the bear|the rabbit|the man|the king|the fairy|the duck|the frog|they|he|she"),
    "thing": _words("ball box tree flower boat cake kite house hat book car river garden park store toy bed rock cloud drum shoe pond"),
    "look": _words("small big red blue green old quiet tall round wet new slow soft long cold white loud"),
    "feeling": _words(
        "happy glad proud kind cheerful excited friendly safe brave lucky joyful grateful calm sweet lovely funny playful special "
        "good nice sad angry scared hurt lonely upset tired mad mean afraid worried bad lost broken sick bored jealous terrible ugly "
        "nervous cruel"
    ),
    "deed": _words("loved hugged thanked helped enjoyed liked shared hated hurt broke lost ruined stole missed hit dropped"),
    "sound": _words("smiled|laughed|cheered|had fun|danced|sang|cried|screamed|yelled|fought|cried a lot|fell down"),
    "move": _words("walked|sat down|looked up|ran home|waited|jumped|looked inside|went outside|stopped|flew away"),
    "quote": _words(
        "I love you|You are my best friend|Thank you|This is fun|What a nice surprise|I am so happy|Can I play with you|I hate this|"
        "Go away|I am scared|You are mean|That is bad|Help|I am sorry|Look at this|Where is it|Let us go|What is that"
    ),
    "very": ["", "", "very ", "so "],
}
PLAIN = (
    "One day, {who} went to the {thing}.",
    "One day, {name} saw a {look} {thing}.",
    "{Who} {move}.",
    "{Who} saw a {look} {thing}.",
    "{name} had a {look} {thing}.",
    "It was {very}{look}.",
    "{name} lived in a {look} house.",
    "{Who} wanted to see the {thing}.",
    "{Who} went to the {thing} with {name2}.",
)
FELT = (
    "{name} was {very}{feeling}.",
    "{Who} felt {feeling}.",
    "{name} {deed} the {thing}.",
    "{Who} {deed} the {look} {thing}.",
    "{Who} {sound}.",
    "{Who} saw a {feeling} {name}.",
    "{name} and {name2} {sound}.",
    '"{quote}!" said {name}.',
    "{name} was not {feeling}.",
    "{name} had a {feeling} friend.",
    "{Who} loved to play with the {thing}.",
    "{name} liked to play with {name2}.",
    "{Who} did not like to play.",
    "{name} and {name2} were best friends.",
)


@dataclass(frozen=True)
class Size:
    """How much is generated and how often it is read. The classifier's quality grows with both; a test takes less of them."""

    stories: int = 5000
    held_out: int = 1000
    epochs: int = 3


def story(dice: random.Random, openings: Sequence[str]) -> str:
    """An opening of the recipe and one to five sentences, half of which say how somebody feels."""
    return f"{dice.choice(openings)}. " + " ".join(_sentence(dice) for _ in range(dice.randint(1, 5)))


def labelled(count: int, seed: int, openings: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct stories with labels (`LABELS`), as many of one as of the other."""
    dice, analyzer = random.Random(seed), SentimentIntensityAnalyzer()
    wanted = {1: count // 2, 0: count - count // 2}
    found: dict[str, int] = {}
    while any(wanted.values()):
        text = story(dice, openings)
        label = int(analyzer.polarity_scores(text)["compound"] >= CHEERFUL)
        if wanted[label] and text not in found:
            found[text] = label
            wanted[label] -= 1
    return list(found), list(found.values())


def learn_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Lower case, the common words of the texts, letters to spell others, and [CLS] and [SEP] around a text.

    Not a trainer of `tokenizers`: those break ties differently in every process, and then no two builds would be the same model.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    seen = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(word for word, times in seen.items() if times >= COMMON and word not in SPELLING)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SPELLING, *(f"##{letter}" for letter in SPELLING), *words]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=POSITIONS
    )


def new_model(vocabulary: int) -> BertForSequenceClassification:
    """About 0.15 M random weights."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


def train(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], labels: Sequence[int], epochs: int
) -> None:
    """AdamW with a linearly falling rate over shuffled batches."""
    steps = epochs * -(-len(texts) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.05, total_iters=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(texts)).split(BATCH):
            batch = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            model(**batch, labels=torch.tensor([labels[row] for row in rows])).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], labels: Sequence[int]
) -> float:
    """The share of texts whose label the model names."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    return float((model(**batch).logits.argmax(1) == torch.tensor(labels)).float().mean())


def build(output: Path, size: Size, seed: int = 0) -> float:
    """Generates, trains, checks and saves (safetensors and tokenizer); returns the accuracy on stories that were not trained on."""
    torch.manual_seed(seed)
    openings = [json.loads(line)["prompt"] for line in OPENINGS.read_text(encoding="utf-8").splitlines()]
    texts, labels = labelled(size.stories + size.held_out, seed, openings)
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    held_out, trained_on = order[: size.held_out], order[size.held_out :]
    tokenizer = learn_tokenizer([texts[row] for row in trained_on])
    model = new_model(len(tokenizer))
    train(model, tokenizer, [texts[row] for row in trained_on], [labels[row] for row in trained_on], size.epochs)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return accuracy(model, tokenizer, [texts[row] for row in held_out], [labels[row] for row in held_out])


def _sentence(dice: random.Random) -> str:
    chosen = {kind: dice.choice(words) for kind, words in WORDS.items()}
    if dice.random() < INVENTED:
        chosen |= {kind: "".join(dice.choices(SPELLING[:26], k=dice.randint(2, 8))) for kind in ("thing", "look")}
    chosen |= {"name2": dice.choice(WORDS["name"]), "Who": dice.choice([chosen["who"].capitalize(), chosen["name"]])}
    return dice.choice(dice.choice((PLAIN, FELT))).format(**chosen)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the classifier of the sentiment recipe.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: runs/sentiment/classifier)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and the weights do not depend on how many there are
    began, size = time.perf_counter(), Size()
    reached = build(options.output, size, options.seed)
    seconds = time.perf_counter() - began
    print(f"{options.output}: accuracy {reached:.3f} on {size.held_out} held-out stories (chance 0.5), {seconds:.0f} s")


if __name__ == "__main__":
    main()
