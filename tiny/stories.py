"""From folders of children's stories to arrays of tokens, with made-up recall text among them.

Batches take a fixed share from each group, whatever its size: there is far less simple text than
old prose, and a small model writes better for reading the simple text more often.
"""
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

REMEMBER = "Read and remember.\n\n"  # begins every recall document, so that stories stay stories
VOCAB = 4096
ROW = 2049  # a training row: 2048 inputs and, one later, their 2048 targets
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
GROUPS = {
    "modern": "tinystories african_storybook pratham_storyweaver aesop_loc",
    "tales": "fairytaleqa folk_fairy_tales_pg nltk_gutenberg",
    "classics": "classic_books_kids", "novels": "clic_chilit english_novels_easy"}
# The worse copy of a book that is there twice, scholarship about stories, language not to learn.
SKIP = re.compile("smallGPT|Treasury|Stevenson_Treas|Captains_1896|princess.txt|Aladdin|pg17208|"
                  "jemima|bunny|flopsy|mice|rabbit|pg34206|pg22373|chesterton|edgeworth|Ford|Troop")
NOT_STORY = re.compile(r"(chapter|contents|illustrat|story notes|\W?\d)|.*(http|nigger)", re.I)
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"  # Llama 3's, single digits
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
COLOURS = "red blue green yellow black white brown grey pink purple golden silver".split()
OBJECTS = "box bag book key lamp ring boat drum kite clock basket bottle chest coat cup".split()
KINDS = {
    "name": "Lily Tom Ben Mia Anna Sam Max Sara Tim Lucy Jack Sue Bob Amy Kate Peter Jane".split(),
    "place": "barn garden kitchen forest church cave tower stable mill school well cellar".split(),
    "pet": "Rex Spot Bella Daisy Coco Rover Misty Ginger Patch Snowy Teddy Sunny".split(),
    "thing": [f"the {colour} {thing}" for colour in COLOURS for thing in OBJECTS],
    "number": [str(number) for number in range(1000, 10000)],
    "colour": COLOURS}
FACTS = [  # a fact, its question, the kind of its key, the kind of its answer
    ("The code of {} is {}.", "What is the code of {}?", "thing", "number"),
    ("The telephone number of {} is {}.", "What is the telephone number of {}?", "name", "number"),
    ("{} belongs to {}.", "Who owns {}?", "thing", "name"),
    ("{} is hidden in the {}.", "In which place is {} hidden?", "thing", "place"),
    ("{} lives in the {} house.", "What colour is the house of {}?", "name", "colour"),
    ("The dog of {} is called {}.", "What is the dog of {} called?", "name", "pet")]


def recall(rng, filler, n_facts=4, n_questions=1, depth=None):
    """Hide facts among the sentences of a text -> context, [(question, answer), ...].

    The prompt is context + question; an answer begins with a space, as its first token does. All
    facts have one of two forms, so only the key tells them apart. The asked ones stand at `depth`,
    0 for the beginning and 1 for the end, or anywhere; the others always stand anywhere."""
    lines = re.findall(r"[^.!?]+[.!?]+[\"']*\s*", filler)
    forms, facts = rng.sample(FACTS, 2), {}
    while len(facts) < n_facts:
        form = rng.choice(forms)
        facts[form, rng.choice(KINDS[form[2]])] = rng.choice(KINDS[form[3]])
    asked = list(facts)[:n_questions]
    for form, key in reversed(facts):  # the asked facts last, or the others would move them
        fact = form[0].format(key, facts[form, key])
        place = rng.random() if depth is None or (form, key) not in asked else depth
        lines.insert(round(place * len(lines)), fact[0].upper() + fact[1:] + " ")
    questions = [("\n\n" + form[1].format(key), " " + facts[form, key]) for form, key in asked]
    return REMEMBER + "".join(lines).rstrip(), questions


def recall_row(rng, text, tokenizer):
    "One row of recall documents, few long or many short. Tokens of answers have VOCAB added."
    row, n_docs = [], rng.choice((1, 1, 2, 3, 6, 12, 24, 40))
    while len(row) < ROW:  # the last document comes out cut off, or not at all
        n_facts = rng.randint(1, 2 + 14 // n_docs)
        size = max(0, int(3.5 * (ROW / n_docs - 42 * n_facts)))  # of the filler, in characters
        start = text.find("\n\n", rng.randrange(len(text) - size)) + 2  # with a paragraph
        context, questions = recall(rng, text[start : start + size], n_facts, n_facts)
        row += tokenizer.encode(BOS + context).ids
        for question, answer in rng.choices(questions, k=n_facts):  # some twice, some never
            question, answer, stop = (part.ids for part in tokenizer.encode_batch(
                [question, answer, "."]))
            row += question + [VOCAB + token for token in answer] + stop
        row += tokenizer.encode(EOS).ids
    return row[:ROW]


def clean(text):
    "Plain ASCII paragraphs, without notes, captions, headings, italics and hard-wrapped lines."
    text = text.replace("—", "--").translate(str.maketrans("‘’“”–", "''\"\"-", "_*`|"))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"(?s)^(.{50000}.*?)\n(NOTES|APPENDIX|Notes and Ref).*", r"\1", text)
    text = re.sub(r" *(\[[^]]*\]|\{[^}]*\}|\(\d+\))", "", text)
    text = re.sub(r" *-{2,} *| - ", " - ", re.sub(r"\.( ?\.)+", "...", text))
    text = re.sub(r" - (?=[\"']\s)", " -", text)  # cut off in mid-speech
    text = re.sub(r"([^\n]{45}[\w,;])\n+(?=[\w\"'])", r"\1 ", text)  # hard-wrapped lines
    text = re.sub(r"([.!?,-][\"']) (?=[\"'])", r"\1\n", text)  # another one speaks
    lines = [" ".join(line.split()) for line in text.split("\n")]
    is_story = re.compile(r"[^a-z]*[a-z].*[.!?,;:\"')-]$")  # headings do not end like sentences
    return "\n\n".join(line for line in lines if is_story.match(line) and not NOT_STORY.match(line))


def train_tokenizer(texts):
    "A byte-level BPE as Llama 3 has it, but small, and with every digit a token of its own."
    tokenizer, as_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=False)
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=as_bytes.alphabet()))
    return tokenizer


def prepare(folder, out, n_rows=3000):
    "Write tokenizer.json, tokens.npz, train.txt and held-out.txt into `out`."
    rng, out = random.Random(0), Path(out)
    parts = {part: {group: [] for group in GROUPS} for part in ("train", "held")}
    for group, names in GROUPS.items():
        paths = [path for name in names.split() for path in Path(folder, name).glob("*.txt")]
        texts = [path.read_text("utf-8") for path in sorted(paths) if not SKIP.search(path.name)]
        docs = [clean(doc) for text in texts for doc in text.split("<|endoftext|>")]
        docs = [doc for doc in docs if len(doc) > 200]
        rng.shuffle(docs)
        room = 0.015 * sum(map(len, docs))  # whole documents are held out, not windows of them
        for doc in docs:
            part = "held" if len(doc) < room else "train"
            room -= len(doc) * (part == "held")
            parts[part][group].append(doc)
    # All but the novels.
    simple = {part: sum(list(groups.values())[:3], []) for part, groups in parts.items()}
    tokenizer, arrays = train_tokenizer(simple["train"]), {}
    out.mkdir(parents=True, exist_ok=True)
    for part, n, name in (("train", n_rows, "train.txt"), ("held", 64, "held-out.txt")):
        for group, docs in parts[part].items():
            encoded = tokenizer.encode_batch([BOS + doc + EOS for doc in docs])
            arrays[f"{group}.{part}"] = [token for doc in encoded for token in doc.ids]
        filler = "\n\n".join(simple[part])
        arrays[f"recall.{part}"] = np.ravel([recall_row(rng, filler, tokenizer) for _ in range(n)])
        (out / name).write_text("\n\n\n".join(simple[part]))
    # For use, BOS comes by itself.
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(out / "tokenizer.json"))
    np.savez_compressed(out / "tokens.npz", **{k: np.uint16(v) for k, v in arrays.items()})
    print("\n".join(f"{name:15} {len(array):10,} tokens" for name, array in arrays.items()))
