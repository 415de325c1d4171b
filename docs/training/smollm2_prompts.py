"""Questions that the default model answers, so that its drafter learns from answers of the target's own.

    python docs/training/smollm2_prompts.py DATA_FOLDER OUTPUT.jsonl

One conversation a line, in the form ``messages`` that ``data.conversations`` of a drafter recipe reads; the answers in
it are placeholders, which ``data.answers`` replaces by what the target says. Sources: MBPP (CC BY 4.0), GSM8K's
training split (MIT), self-instruct's seed tasks (MIT), Python enhancement proposals (public domain), two novels in the
public domain, signatures and docstrings of Python's own library (PSF licence), and sentences made below. No prompt of
HumanEval, MT-bench or GSM8K's test split is among them.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import lzma
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SEED = 20
MODULES = """abc argparse ast base64 bisect calendar cgitb collections colorsys configparser contextlib copy csv
    datetime decimal difflib dis doctest email enum filecmp fileinput fnmatch fractions ftplib functools
    getopt getpass gettext glob gzip hashlib heapq hmac html http imaplib inspect io ipaddress json
    keyword linecache locale logging mailbox mimetypes nntplib numbers operator optparse os pathlib
    pickletools pkgutil platform plistlib poplib pprint profile pydoc queue random reprlib sched secrets
    shelve shlex shutil smtplib socketserver statistics string stringprep subprocess symtable tarfile
    tempfile textwrap threading timeit token tokenize traceback types typing unittest urllib uuid
    warnings wave weakref xml xmlrpc zipapp zipfile"""
TOPICS = """the water cycle|photosynthesis|a lighthouse keeper|coffee|the French Revolution|black holes
learning to cook|a lost dog|electric cars|the history of writing|a small bakery|remote work|the moon
bees and pollination|chess openings|a rainy day in Paris|public libraries|vaccines|the stock market
an old violin|sleep|climate change|a robot that learns to paint|bicycles in cities|ancient Rome|gravity
tea ceremonies|a mountain village|online privacy|the human heart|earthquakes|friendship|machine learning
a garden in spring|volcanoes|time management|recycling|the invention of the telephone|a night train
healthy breakfasts|DNA|whales|good teachers|the Silk Road|a forgotten letter|solar energy|volunteering
the immune system|a school play|insulin|supply and demand|rainbows|an honest thief|walking in the forest
inflation|magnets|a grandmother's recipe|plastic in the ocean|democracy|the printing press|stars
a haunted house|teamwork|penicillin|rivers|a job interview|fast fashion|the brain|music|a trip to Japan
computer viruses|tides|a market in Marrakesh|patience|the Great Wall|batteries|a talking cat
migration of birds"""
WISHES = (
    "Write a short story about {}.", "Explain {} to a ten-year-old.", "What should everybody know about {}?",
    "Write a poem about {}.", "List five interesting facts about {}.", "Write an engaging blog post about {}.",
    "Write a polite email to a colleague about {}.", "What are the advantages and disadvantages of {}?",
    "Describe {} as if you were there.", "Write a dialogue between two friends about {}.",
    "Give me a title and an outline for a talk about {}.", "How would you teach a lesson about {}?",
    "Answer three common questions about {}.", "Write a product description inspired by {}.",
    "You are a travel guide. Tell your group about {}.", "Argue for and against the importance of {}.",
)  # fmt: skip
FOLLOW_UPS = (
    "Can you make it shorter?", "Why is that so? Explain step by step.", "Give an example.",
    "Rewrite it in simpler words.", "What would you change, and why?", "Summarise your answer in one sentence.",
    "Now write it as a list.",
)  # fmt: skip
SMALL_TALK = (
    "Hello, who are you?", "What can you help me with?", "What is the capital of {}?", "How do I say thank you in {}?",
    "Tell me a joke about {}.", "Recommend three books about {}.", "What is the weather like in {} in winter?",
)  # fmt: skip
PLACES = (
    "Italy", "Norway", "Kenya", "Peru", "Canada", "India", "Egypt", "Spain", "Japan", "Brazil", "Greece", "Poland",
    "Vietnam", "Morocco", "Chile",
)  # fmt: skip


def read_xz(file: Path) -> str:
    """The text in an xz file."""
    return lzma.open(file, "rt", encoding="utf-8").read()


def code_tasks(data: Path) -> Iterator[str]:
    """MBPP's tasks, every other one with its first test."""
    for number, line in enumerate((data / "llm" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()):
        task = json.loads(line)
        test = f"\nYour function should pass this test:\n\n{task['test_list'][0]}" if number % 2 else ""
        yield task["text"].strip() + test


def signatures() -> Iterator[str]:
    """Functions of Python's library whose docstring says what they do, to be completed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = itertools.chain.from_iterable(
        sorted(root.glob(f"{name}.py")) + sorted(root.glob(f"{name}/*.py")) for name in MODULES.split()
    )
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = inspect.cleandoc(ast.get_docstring(node) or "")
            if not 50 <= len(doc) <= 600 or '"""' in doc:
                continue
            head = f"def {node.name}({ast.unparse(node.args)}):"
            body = "\n".join(f"    {line}" if line else "" for line in f'"""{doc}\n"""'.splitlines())
            yield f"Complete the following Python function.\n\n```python\n{head}\n{body}\n```"


def sums(data: Path) -> Iterator[str]:
    """Word problems of GSM8K's training split."""
    for line in read_xz(data / "text" / "gsm8k_train.jsonl.xz").splitlines():
        yield json.loads(line)["question"]


def seeds(data: Path) -> Iterator[str]:
    """The human-written instructions, with their first input."""
    for line in (data / "llm" / "self_instruct_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        given = task["instances"][0]["input"]
        yield f"{task['instruction']}\n\n{given}".strip()[:1500]


def passages(data: Path, draw: random.Random) -> Iterator[str]:
    """Paragraphs of proposals and novels, with something to do to them."""
    wishes = (
        "Summarise the following text in two sentences.\n\n{}", "Explain this text in simple words.\n\n{}",
        "List the main points of this passage.\n\n{}", "What question does this paragraph answer?\n\n{}",
        "Rewrite this paragraph in a friendlier tone.\n\n{}", "Who or what is named in this text, and why?\n\n{}",
    )  # fmt: skip
    texts = [json.loads(line)["text"] for line in read_xz(data / "text" / "python_peps.jsonl.xz").splitlines()]
    texts += [read_xz(data / "text" / name) for name in ("war_and_peace.txt.xz", "ulysses.md.xz")] * 40
    paragraphs = [p.strip() for text in texts for p in text.split("\n\n")]
    paragraphs = sorted({p for p in paragraphs if 250 <= len(p) <= 900 and p[0].isupper()})
    for paragraph in draw.sample(paragraphs, len(paragraphs)):
        yield draw.choice(wishes).format(paragraph)


def wishes(draw: random.Random) -> Iterator[str]:
    """Things people ask for, about topics people have."""
    topics = [topic for line in TOPICS.splitlines() for topic in line.split("|")]
    asked = [wish.format(topic) for topic in topics for wish in WISHES]
    asked += [talk.format(thing) for talk in SMALL_TALK for thing in (PLACES if "{}" in talk else [""])]
    yield from draw.sample(asked, len(asked))


def main(data: Path, output: Path) -> None:
    """Draw from every source, shuffle, add a second question to every fourth conversation."""
    draw = random.Random(SEED)
    sources = [
        (code_tasks(data), 974), (signatures(), 1200), (sums(data), 1500), (seeds(data), 175),
        (passages(data, draw), 900), (wishes(draw), 1251),
    ]  # fmt: skip
    questions = []
    for source, wanted in sources:
        known = sorted(set(source))
        questions += draw.sample(known, min(wanted, len(known)))
    draw.shuffle(questions)
    with output.open("w", encoding="utf-8") as stream:
        for question in questions:
            asked = [question, draw.choice(FOLLOW_UPS)] if draw.random() < 0.25 else [question]
            turns = [turn for text in asked for turn in (("user", text), ("assistant", "-"))]
            said = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"messages": said}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
