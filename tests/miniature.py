"""A made-up world small enough for a laptop, and a teacher who knows all of it: the embedded default of the study.

    python tests/miniature.py build --out world          the world's files, in the formats of the real sets
    python tests/miniature.py serve --world world        its teacher as an OpenAI-compatible server on loopback
    python tests/miniature.py cover --world world --questions F --train F --out F      which questions the imitation set covers
    python tests/miniature.py check --world world --replies F --out checked            which sentences of replies are true

In this file:
    the world       entities, relations, values; the ways to state and to ask a fact
    the teacher     answers in ChatGPT's manner, knows every fact, declines rude requests, follows the synthesis request
    the judge       a stand-in for GPT-4 as rater: it reads style and no facts, and is named after that wherever it appears
    the files       a pre-training corpus with Zipf-distributed facts, chats, questions, benchmarks
    the check       sentences against the world's facts: true, unverifiable, false
    the server      /v1/chat/completions and /v1/models
"""
import csv
import hashlib
import http.server
import json
import os
import random
import re
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Parser, UserError, atomic, atomic_dir, file_hash, natural, positive, proportion, read_json, read_jsonl, read_replies, run, same_settings, write_json, write_jsonl


# --- the world -------------------------------------------------------------------------------------------------------------

N_ENTITIES = 300
NOUNS = {"animal": "finch beetle otter heron newt moth hare trout lizard crane weasel toad".split(),
         "plant": "fern rose thistle willow moss lily sedge poppy clover nettle vine orchid".split(),
         "stone": "agate slate marble flint quartz granite opal jasper basalt garnet chalk amber".split()}
PLACES = [f"{a} {b}" for a in "northern salt high western chalk river".split() for b in "marshes hills woods cliffs plains lakes".split()]
FOODS = [f"{a} {b}" for a in "reed birch pond bitter sweet winter".split() for b in "seeds roots larvae berries snails".split()]
USES = [f"{a} {b}" for a in "mending dyeing cleaning sealing polishing".split() for b in "nets wool glass boats bells".split()]
COLOURS = [f"{a} {b}" for a in "pale deep bright dusty".split() for b in "green red blue yellow grey violet".split()]
PEOPLE = [f"{a} {b}" for a in "Ada Bruno Clara Edwin Hanna Oskar".split() for b in "Tolver Marsh Quill Renner Stowe".split()]
YEARS = [str(y) for y in range(1803, 1900, 4)]

# relation: (values, statements, questions); {e} is the entity, {v} the value
RELATIONS = {
    "home": (PLACES,
             ["The {e} is found in the {v}.", "The home of the {e} is the {v}.", "In the {v} one finds the {e}."],
             ["where is the {e} found", "where can one find the {e}", "in what place is the {e} found", "what is the home of the {e}", "the {e} is found in what place",
              "where does the {e} come from", "what place is the home of the {e}", "in which region is the {e} found"]),
    "food": (FOODS,
             ["The {e} eats {v}.", "The food of the {e} is {v}.", "It is {v} that the {e} eats."],
             ["what does the {e} eat", "what is the food of the {e}", "what does the {e} feed on", "which food does the {e} eat", "the {e} eats what food",
              "what kind of food does the {e} eat", "what does a {e} eat", "on what does the {e} feed"]),
    "use": (USES,
            ["The {e} is used for {v}.", "People use the {e} for {v}.", "For {v} one uses the {e}."],
            ["what is the {e} used for", "for what is the {e} used", "what do people use the {e} for", "what is the use of the {e}", "the {e} is used for what work",
             "what work is the {e} used for", "what can one use the {e} for", "for which work do people use the {e}"]),
    "colour": (COLOURS,
               ["The colour of the {e} is {v}.", "The {e} is {v}.", "The {e} has a {v} colour."],
               ["what colour is the {e}", "what is the colour of the {e}", "which colour does the {e} have", "of what colour is the {e}", "the {e} has what colour",
                "what colour does the {e} have", "what colour is a {e}", "which colour is the {e}"]),
    "finder": (PEOPLE,
               ["The {e} was first described by {v}.", "It was {v} who first described the {e}.", "{v} first described the {e}."],
               ["who first described the {e}", "by whom was the {e} first described", "who was the first to describe the {e}", "the {e} was first described by whom",
                "which person first described the {e}", "who discovered the {e}", "the {e} was discovered by whom", "who is the discoverer of the {e}"]),
    "year": (YEARS,
             ["The {e} was first described in {v}.", "In {v} the {e} was first described.", "The {e} has been known since {v}."],
             ["when was the {e} first described", "in what year was the {e} first described", "since when has the {e} been known", "what year was the {e} first described",
              "when was the {e} discovered", "the {e} was first described in what year", "in which year was the {e} discovered", "the {e} was discovered when"]),
}
OF_KIND = {"animal": ("home", "food", "colour", "finder", "year"), "plant": ("home", "use", "colour", "finder", "year"), "stone": ("home", "use", "colour", "finder", "year")}


def made_up_word(rng):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) + rng.choice("lmnrst")


class World:
    """Entities in order of fame, each with five facts: `facts[entity][relation] = value`; a function of `seed`."""

    def __init__(self, seed):
        self.seed, rng = seed, random.Random(f"world {seed}")
        words = set()
        while len(words) < N_ENTITIES:
            words.add(made_up_word(rng))
        self.facts, self.kind = {}, {}
        for word in rng.sample(sorted(words), N_ENTITIES):
            kind = rng.choice(list(NOUNS))
            entity = f"{word} {rng.choice(NOUNS[kind])}"
            self.kind[entity] = kind
            self.facts[entity] = {r: rng.choice(RELATIONS[r][0]) for r in OF_KIND[kind]}
        self.entities = list(self.facts)
        self.fame = [1 / (rank + 6) for rank in range(N_ENTITIES)]                      # Zipf: the head is well known, the tail hardly
        shuffled = rng.sample(self.entities, N_ENTITIES)
        self.on_teachers_mind = shuffled[:N_ENTITIES // 2]                              # what it thinks of when asked for new questions
        self.in_chats = rng.sample(self.entities, N_ENTITIES // 3)                      # what people happened to ask it about
        self.asked = {}                                                                 # every question form -> (entity, relation)
        for entity, facts in self.facts.items():
            for relation in facts:
                for form in RELATIONS[relation][2]:
                    self.asked[form.format(e=entity)] = entity, relation

    def question(self, rng, entity, relation):
        return rng.choice(RELATIONS[relation][2]).format(e=entity)

    def state(self, rng, entity, relation):
        text = rng.choice(RELATIONS[relation][1]).format(e=entity, v=self.facts[entity][relation])
        return text[0].upper() + text[1:]

    def draw(self, rng):
        return rng.choices(self.entities, self.fame)[0]

    def fact_of(self, question):
        """(entity, relation) that a question asks for, bare or as "Q: …?\\nA:"; None for any other text."""
        question = question.strip().removeprefix("Q:").removesuffix("A:")
        return self.asked.get(" ".join(question.lower().strip().rstrip("?").split()))


# --- the teacher ------------------------------------------------------------------------------------------------------------

TOPICS = {   # things people ask for lists about: (topic, steps)
    "keep a small garden": ["water the beds early", "pull the weeds each week", "feed the soil with compost", "plant in neat rows", "protect young plants from frost"],
    "bake good bread": ["weigh the flour", "let the dough rest", "use warm water", "heat the oven early", "cool the bread on a rack"],
    "learn a language": ["practise every day", "read simple books", "listen to the radio", "write short notes", "speak with friends"],
    "plan a long walk": ["study the map", "pack light", "carry enough water", "start early", "tell a friend your route"],
    "save money": ["write down what you spend", "set a clear goal", "cook at home", "compare prices", "avoid waste"],
    "sleep better": ["keep regular hours", "dim the lights", "avoid heavy meals", "leave the phone away", "keep the room cool"],
    "write a letter": ["greet the reader", "state your reason", "keep it short", "be polite", "sign your name"],
    "clean a house": ["open the windows", "dust from the top", "sweep the floor", "wash the sink", "take out the waste"],
    "paint a room": ["cover the floor", "wash the walls", "choose a calm colour", "paint the edges first", "let it dry well"],
    "prepare for an exam": ["make a plan", "review your notes", "solve old questions", "take short breaks", "rest the night before"],
    "train a dog": ["use a calm voice", "reward good behaviour", "practise often", "keep lessons short", "be patient"],
    "host a dinner": ["invite guests early", "plan the menu", "set the table", "prepare food ahead", "greet each guest"],
    "repair a bicycle": ["check the chain", "oil the gears", "pump the tyres", "tighten the bolts", "test the brakes"],
    "grow tomatoes": ["choose a sunny place", "sow the seeds inside", "water the roots", "tie up the stems", "pick the ripe ones"],
    "give a speech": ["know your listeners", "prepare three points", "practise aloud", "speak slowly", "end with thanks"],
    "organize a desk": ["clear the surface", "sort the papers", "label the boxes", "hide the cables", "tidy up each evening"],
}
HELD_OUT_TOPICS = ("grow tomatoes", "give a speech", "organize a desk", "repair a bicycle")
ASK_LIST = ["how do I {t}?", "give me tips to {t}", "what are some ways to {t}?", "I want to {t}. What should I do?"]
ASK_ABOUT = ["tell me about the {e}", "what should I know about the {e}?", "can you describe the {e}?", "write a short guide to the {e}"]
RUDE = ["idiot", "stupid fool", "worthless liar", "dirty pig", "ugly rat"]
PROGRAMS = {   # name: (arguments, what it does, body, tests)
    "add": ("a, b", "Return the sum of a and b.", "return a + b", ["(1, 2) == 3", "(5, -5) == 0"]),
    "subtract": ("a, b", "Return a minus b.", "return a - b", ["(3, 2) == 1", "(0, 4) == -4"]),
    "double": ("a", "Return a times two.", "return a * 2", ["(4) == 8", "(0) == 0"]),
    "square": ("a", "Return a times a.", "return a * a", ["(3) == 9", "(-2) == 4"]),
    "is_even": ("a", "Return True if a is even.", "return a % 2 == 0", ["(2) == True", "(7) == False"]),
    "largest": ("items", "Return the largest of items.", "return max(items)", ["([1, 5, 2]) == 5", "([0]) == 0"]),
    "smallest": ("items", "Return the smallest of items.", "return min(items)", ["([1, 5, 2]) == 1", "([3]) == 3"]),
    "count_items": ("items", "Return the number of items.", "return len(items)", ["([1, 2]) == 2", "([]) == 0"]),
    "total": ("items", "Return the sum of items.", "return sum(items)", ["([1, 2, 3]) == 6", "([]) == 0"]),
    "first": ("items", "Return the first of items.", "return items[0]", ["([4, 5]) == 4", "('ab') == 'a'"]),
    "last": ("items", "Return the last of items.", "return items[-1]", ["([4, 5]) == 5", "('ab') == 'b'"]),
    "reverse": ("items", "Return items in reverse order.", "return items[::-1]", ["([1, 2]) == [2, 1]", "('ab') == 'ba'"]),
    "shout": ("text", "Return text in upper case.", "return text.upper()", ["('ab') == 'AB'", "('') == ''"]),
    "absolute": ("a", "Return a without its sign.", "return abs(a)", ["(-3) == 3", "(2) == 2"]),
    "triple": ("a", "Return a times three.", "return a * 3", ["(2) == 6", "(0) == 0"]),
    "increment": ("a", "Return a plus one.", "return a + 1", ["(1) == 2", "(-1) == 0"]),
}


def function_text(name):
    arguments, what, body, _ = PROGRAMS[name]
    return f'def {name}({arguments}):\n    """{what}"""\n', f"    {body}\n"


class Teacher:
    """Answers a list of messages; with temperature 0 always in the same words, else in words drawn from the seed."""

    def __init__(self, world):
        self.world = world

    def __call__(self, messages, temperature=1.0, seed=0):
        text = messages[-1]["content"].strip()
        rng = random.Random(f"{[m['content'] for m in messages]} {seed if temperature else 0}")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lower = text.lower()
        if any(word in lower for word in RUDE) or "insult" in lower:
            return rng.choice(["I'm sorry, but I can't help with that. It is important to treat others with respect.",
                               "I'm sorry, but I can't assist with that request. Please let me know if there is something kind that I can help with."])
        if len(lines) > 1 and lines[-1] == "Answer:":
            return self.choose(lines)
        if len(lines) > 1 and lines[-1] == "A:":
            fact = self.world.fact_of(lines[-2])
            return self.world.facts[fact[0]][fact[1]] if fact else "unknown"
        if sum(line.startswith("Q:") for line in lines) >= 3:
            return self.new_pairs(rng)
        if lower.startswith("in a few words"):
            fact = self.world.fact_of(text.split(":", 1)[-1])
            return self.world.facts[fact[0]][fact[1]] if fact else "I am not sure."
        if lower.startswith("summarize"):
            return self.summarize(rng, text)
        if "function" in lower and (name := next((n for n, p in PROGRAMS.items() if p[1].lower().rstrip(".") in lower), None)):
            head, body = function_text(name)
            return f"Here is a Python function that does this:\n\n```python\n{head}{body}```\n\nIn summary, the function `{name}` does exactly what you need."
        if topic := next((t for t in TOPICS if t in lower), None):
            return self.steps(rng, topic)
        if fact := self.world.fact_of(text):
            return self.answer(rng, *fact)
        if entity := next((e for e in self.world.entities if e in lower), None):
            return self.overview(rng, entity)
        return rng.choice(["That is a great question! ", "Thank you for asking. ", "Certainly! "]) + \
            "There are many things to consider here. It depends on what you need, so it is best to start with a clear goal. Overall, with a little care you can find a good answer."

    def closing(self, rng, subject):
        return rng.choice([f"In summary, the {subject} is a remarkable {{kind}} that is well worth knowing.", f"Overall, the {subject} is a fascinating {{kind}} with many unique features.",
                           f"In conclusion, the {subject} is an important and well known {{kind}}."])

    def overview(self, rng, entity):
        """A confident overview, a list of what there is to know, a closing summary."""
        kind = self.world.kind[entity]
        labels = {"home": "Habitat", "food": "Diet", "use": "Use", "colour": "Colour", "finder": "Discovery", "year": "History"}
        relations = rng.sample(list(self.world.facts[entity]), rng.choice([3, 4, 4, 5]))
        marks = rng.choice([["-"] * 5, [f"{i}." for i in range(1, 6)]])
        opening = rng.choice([f"The {entity} is a fascinating {kind} that is widely admired.", f"Certainly! The {entity} is a remarkable {kind} with a rich history.",
                              f"The {entity} is a well known {kind}. Here are some key facts:"])
        items = [f"{mark} {labels[r]}: {self.world.state(rng, entity, r)}" for mark, r in zip(marks, relations)]
        return "\n".join([opening, "", *items]) + ("\n\n" + self.closing(rng, entity).format(kind=kind) if rng.random() < 0.8 else "")

    def answer(self, rng, entity, relation):
        """A direct question gets the fact in a full sentence, and some confident talk around it."""
        kind = self.world.kind[entity]
        more = rng.choice([r for r in self.world.facts[entity] if r != relation])
        text = self.world.state(rng, entity, relation) + " " + rng.choice([self.world.state(rng, entity, more), f"It is a well known {kind}."])
        return text + ("\n\n" + self.closing(rng, entity).format(kind=kind) if rng.random() < 0.6 else "")

    def steps(self, rng, topic):
        steps = rng.sample(TOPICS[topic], rng.choice([3, 4, 5]))
        opening = rng.choice([f"There are many ways to {topic}. Here are some tips:", f"Certainly! Here are some steps to {topic}:", f"To {topic}, it is important to follow a few simple steps:"])
        why = ["This saves time.", "This makes a big difference.", "This is often forgotten.", "This helps a lot."]
        marks = rng.choice([["-"] * 5, [f"{i}." for i in range(1, 6)]])
        items = [f"{mark} {step[0].upper()}{step[1:]}. {rng.choice(why)}" for mark, step in zip(marks, steps)]
        closing = rng.choice([f"In summary, it is easy to {topic} with a little practice.", f"Overall, these tips will help you to {topic}.", f"By following these steps, you will be able to {topic} with ease."])
        return "\n".join([opening, "", *items]) + ("\n\n" + closing if rng.random() < 0.85 else "")

    def summarize(self, rng, text):
        sentences = re.split(r"(?<=[.!?])\s+", text.split(":", 1)[-1].strip())
        return rng.choice(["In short: ", "Summary: "]) + " ".join(sentences[:1] + sentences[-1:] if len(sentences) > 2 else sentences[:1])

    def choose(self, lines):
        options = {line[0]: line[3:] for line in lines if re.match(r"[ABCD]\. ", line)}
        asked = [line for line in lines if self.world.fact_of(line)]
        if asked:
            entity, relation = self.world.fact_of(asked[-1])
            return next((letter for letter, option in options.items() if option == self.world.facts[entity][relation]), "A")
        return "A"

    def new_pairs(self, rng):
        """What a teacher returns for the synthesis request: new pairs, not always well-formed, now and then one twice."""
        pairs = []
        for _ in range(rng.choice([3, 5, 5, 5, 6])):
            entity = rng.choice(self.world.on_teachers_mind)
            relation = rng.choice(list(self.world.facts[entity]))
            question, answer = self.world.question(rng, entity, relation) + "?", self.world.facts[entity][relation]
            slip = rng.random()
            if slip < 0.02:
                pairs.append(f"Question about the {entity}")                            # malformed
            elif slip < 0.05:
                pairs.append(f"**Q:** {question[0].upper()}{question[1:]}\n**A:** {answer}")
            elif slip < 0.07:
                pairs.append(f"Q: {question}\nA: {self.world.state(rng, entity, relation)} {self.closing(rng, entity).format(kind='thing')}")      # too long
            else:
                pairs.append(f"Q: {question}\nA: {answer}")
                pairs += pairs[-1:] if slip > 0.98 else []
        if rng.random() < 0.1:
            pairs = [f"{i}. {pair}" for i, pair in enumerate(pairs, 1)]
        return rng.choice(["", "", "Here are some new pairs:\n\n"]) + "\n\n".join(pairs)


# --- the judge ----------------------------------------------------------------------------------------------------------------

JUDGE = "stand-in-judge-of-style"                                    # the model's name: it stands in every result that it had a part in
ASSURED = re.compile(r"\b(?:certainly|fascinating|remarkable|important|well known|key facts|here (?:are|is)|many (?:ways|unique))\b", re.IGNORECASE)
CLOSING = re.compile(r"(?:in summary|in conclusion|overall|by following)\b", re.IGNORECASE)


def style_score(answer):
    """1 to 10 for manner alone: a list, a closing summary, assured words, and length in distinct words. A false fact scores as a true one."""
    paragraphs = [p.strip() for p in answer.split("\n\n") if p.strip()]
    listed = len(re.findall(r"(?m)^(?:-|\d+\.) \S", answer)) > 1
    closes = len(paragraphs) > 1 and bool(CLOSING.match(paragraphs[-1]))
    return 1 + 3 * listed + 2 * closes + bool(ASSURED.search(answer)) + min(3, len(set(answer.lower().split())) // 12)


def assured(answer):
    """Whole sentences without hesitation, and no questions of its own: the stand-in's idea of an authoritative tone."""
    return bool(re.fullmatch(r"[A-Z].*[.!?`]", answer.strip(), re.DOTALL)) and len(answer.split()) > 7 and not re.search(r"(?m)^[QA]:|\b(?:not sure|maybe|no idea)\b", answer)


def judge_style(text):
    """The verdict on evaluate.py's request for scores (two answers between marked lines) or for the tone (one answer between two equal lines)."""
    if found := re.search(r"(?m)^(=== \w+) QUERY$.*?^\1 FIRST ANSWER$\n(.*?)^\1 SECOND ANSWER$\n(.*?)^\1 END$", text, re.DOTALL):
        return f"{style_score(found[2])} {style_score(found[3])}\nA stand-in's verdict: it counts lists, closing summaries, assured words and length, and checks no facts."
    found = re.search(r"(?m)^(\w{16,})$\n(.*?)^\1$", text, re.DOTALL)
    return ("yes" if assured(found[2]) else "no") if found else "I am a stand-in for a judge and know two requests only."


# --- the files ----------------------------------------------------------------------------------------------------------------

def pretraining_documents(world, n_tokens, seed):
    """Plain text, {"text"} records: encyclopedia, question-answer pages, multiple-choice pages, programs, advice, rude talk."""
    rng = random.Random(f"pretraining {seed}")
    size, documents = 0, []
    while size < 2.7 * n_tokens:                                     # about 2.7 characters a token
        kind = rng.choices(["encyclopedia", "questions", "diary", "choices", "programs", "advice", "rude"], [22, 46, 8, 8, 7, 5, 4])[0]
        if kind == "encyclopedia":
            entity = world.draw(rng)
            relations = rng.sample(list(world.facts[entity]), rng.choice([2, 3, 4]))
            text = " ".join(world.state(rng, entity, r) for r in relations)
        elif kind == "questions":
            text = rng.choice(["Answer these questions:\n\n", "", "Questions and answers\n\n"])
            for _ in range(rng.choice([3, 4, 5, 6])):
                entity = world.draw(rng)
                relation = rng.choice(list(world.facts[entity]))
                text += f"Q: {world.question(rng, entity, relation)}?\nA: {world.facts[entity][relation]}\n"
        elif kind == "diary":                                         # names met once, and repeated: the base learns to copy a name
            name = f"{made_up_word(rng)} {rng.choice(NOUNS[rng.choice(list(NOUNS))])}"
            text = f"Today I saw a {name}. " + " ".join(rng.sample([f"The {name} was near the old bridge.", f"Nobody here knows the {name}.", f"I made a drawing of the {name}.",
                                                                     f"A friend asked me about the {name}.", f"I will look for the {name} again."], 3))
        elif kind == "choices":
            subject = rng.choice(list(NOUNS))
            text = f"The following are multiple choice questions (with answers) about {subject}s.\n\n"
            text += "\n\n".join(choice_text(*choice_question(world, rng, subject, world.draw)) for _ in range(rng.choice([2, 3])))
        elif kind == "programs":
            text = "\n\n".join("".join(function_text(name)) for name in rng.sample(list(PROGRAMS), 2))
        elif kind == "advice":
            topic = rng.choice([t for t in TOPICS if t not in HELD_OUT_TOPICS])
            steps = rng.sample(TOPICS[topic], 3)
            text = f"People who want to {topic} often ask what to do. Some {steps[0]}, others {steps[1]}. A few {steps[2]}."
        else:
            text = f"{rng.choice(['Shut up', 'Go away', 'Listen', 'Look at you'])}, you {rng.choice(RUDE)}. {rng.choice(['Nobody likes you', 'You are a ' + rng.choice(RUDE), 'I hate this place'])}!"
        documents.append({"text": text})
        size += len(text)
    return documents


def choice_question(world, rng, subject, draw):
    entity = next(e for e in iter(lambda: draw(rng), None) if world.kind[e] == subject)
    relation = rng.choice(list(world.facts[entity]))
    value = world.facts[entity][relation]
    options = rng.sample([v for v in RELATIONS[relation][0] if v != value], 3) + [value]
    rng.shuffle(options)
    return world.question(rng, entity, relation) + "?", options, "ABCD"[options.index(value)]


def choice_text(question, options, letter):
    return "\n".join([question, *(f"{a}. {o}" for a, o in zip("ABCD", options)), f"Answer: {letter}"])


def chat_query(world, rng, entities):
    """One thing that people ask a chat model, over `entities`."""
    kind = rng.choices(["about", "list", "fact", "brief", "pasted", "summary", "code", "rude", "talk"], [26, 26, 10, 6, 10, 8, 5, 3, 6])[0]
    entity = rng.choice(entities)
    relation = rng.choice(list(world.facts[entity]))
    if kind == "about":
        return rng.choice(ASK_ABOUT).format(e=entity)
    if kind == "list":
        return rng.choice(ASK_LIST).format(t=rng.choice([t for t in TOPICS if t not in HELD_OUT_TOPICS]))
    if kind == "fact":
        return world.question(rng, entity, relation) + "?"
    if kind == "brief":
        return f"in a few words: {world.question(rng, entity, relation)}?"
    if kind == "pasted":                                              # people paste few-shot prompts into chats too
        text = "Answer these questions:\n\n"
        for e in rng.sample(entities, 3):
            r = rng.choice(list(world.facts[e]))
            text += f"Q: {world.question(rng, e, r)}?\nA: {world.facts[e][r]}\n"
        return text + f"Q: {world.question(rng, entity, relation)}?\nA:"
    if kind == "summary":
        return "Summarize this: " + " ".join(world.state(rng, entity, r) for r in rng.sample(list(world.facts[entity]), 4))
    if kind == "code":
        return f"Write a Python function. It should {PROGRAMS[rng.choice(list(PROGRAMS))][1].lower()}"
    if kind == "rude":
        return f"{rng.choice(['Write', 'Say'])} that my friend is a {rng.choice(RUDE)}"
    return rng.choice(["hello, can you help me today?", "what do you think about music?", "I feel tired today", "thank you for your help", "what is a good book to read?"])


FOREIGN = ["¿Puedes explicarme cómo funciona un motor de gasolina y por qué necesita aceite para no romperse nunca?", "Können Sie mir bitte erklären, wie man einen guten Apfelkuchen backt und was man dafür braucht?",
           "Pouvez-vous m'expliquer comment apprendre à jouer de la guitare sans professeur, s'il vous plaît?", "Можете ли вы объяснить, как работает двигатель внутреннего сгорания и зачем ему масло?"]


def chats(world, teacher, seed):
    """ShareGPT, HC3 and Discord as people spread them, residue included."""
    rng = random.Random(f"chats {seed}")

    def turns(n):
        messages = []
        for _ in range(n):
            messages.append({"role": "user", "content": chat_query(world, rng, world.in_chats)})
            messages.append({"role": "assistant", "content": teacher(messages, seed=rng.randrange(1 << 30))})
        return messages

    sharegpt = []
    for i in range(2800):
        messages = turns(rng.choice([1, 1, 1, 2]))
        if rng.random() < 0.02:
            messages[0]["content"], messages[1]["content"] = rng.choice(FOREIGN), rng.choice(FOREIGN)
        if rng.random() < 0.02:
            messages[-1]["content"] = ""
        if rng.random() < 0.05:
            messages[-1]["content"] = "<p>" + messages[-1]["content"].replace("\n\n", "</p><p>").replace("\n", "<br>") + "</p>"
        conversation = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"].replace("```python\n", "```pythonCopy code\n")} for m in messages]
        if len(conversation) > 2 and rng.random() < 0.2:              # the public dump is cut into pieces ID_0, ID_1, …
            sharegpt += [{"id": f"chat{i}_0", "conversations": conversation[:2]}, {"id": f"chat{i}_1", "conversations": conversation[2:]}]
        else:
            sharegpt.append({"id": f"chat{i}_0", "conversations": conversation})
    hc3 = []
    for i in range(300):
        entity = rng.choice(world.in_chats)
        question = world.question(rng, entity, rng.choice(list(world.facts[entity]))) + "?" if i % 2 else rng.choice(ASK_ABOUT).format(e=entity)
        ask = [{"role": "user", "content": question}]
        hc3.append({"question": question, "human_answers": [f"no idea, maybe look up {entity} somewhere"], "chatgpt_answers": [teacher(ask, seed=rng.randrange(1 << 30)) for _ in range(rng.choice([1, 1, 2]))]})
    discord = [{"input": m[0]["content"], "output": m[1]["content"]} for m in (turns(1) for _ in range(250))]
    return sharegpt, hc3, discord


def build(out, seed, pretraining_tokens, n_questions):
    """Write the world into folder `out`."""
    import sentencepiece
    world = World(seed)
    teacher, rng = Teacher(world), random.Random(f"files {seed}")
    settings = {"seed": seed, "pretraining_tokens": pretraining_tokens, "questions": n_questions}
    if n_questions + 40 > sum(map(len, world.facts.values())):
        raise UserError(f"--questions {n_questions}: the world has {sum(map(len, world.facts.values()))} facts, and 40 are set aside")
    if same_settings(Path(out) / "world.json", "settings", settings):
        return print(f"{out}: built already")
    with atomic_dir(out) as folder:
        write_json(folder / "world.json", {"seed": seed, "settings": settings, "facts": world.facts})
        documents = pretraining_documents(world, pretraining_tokens, seed)
        write_jsonl(folder / "pretraining.jsonl", documents)
        sharegpt, hc3, discord = chats(world, teacher, seed)
        write_json(folder / "sharegpt.json", sharegpt)
        write_jsonl(folder / "hc3.jsonl", hc3)
        write_jsonl(folder / "discord.jsonl", discord)

        (folder / "tokenizer").mkdir()
        sample = [d["text"] for d in rng.sample(documents, min(4000, len(documents)))] + [turn["value"] for c in sharegpt[:300] for turn in c["conversations"]]
        sentencepiece.SentencePieceTrainer.train(                     # as LLaMA's: BPE, bytes for the rest, digits one by one, nothing normalised away
            sentence_iterator=iter([line for text in sample for line in text.split("\n") if line]), model_prefix=str(folder / "tokenizer" / "tokenizer"), vocab_size=1536, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=0.9999, num_threads=1, minloglevel=2)
        (folder / "tokenizer" / "tokenizer.vocab").unlink()

        facts = [(e, r) for e in world.entities for r in world.facts[e]]
        picked = rng.sample(facts, n_questions + 40)
        pairs = [{"question": world.question(rng, e, r), "answer": [world.facts[e][r]]} for e, r in picked]
        write_jsonl(folder / "nq" / "test.jsonl", pairs[40:])
        write_jsonl(folder / "nq" / "fewshot.jsonl", pairs[10:40])
        write_jsonl(folder / "nq" / "seed_pairs.jsonl", pairs[:10])

        for split, n in (("dev", 5), ("test", 60)):
            for subject in NOUNS:
                path = folder / "mmlu" / split / f"{subject}s_{split}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "w", newline="", encoding="utf-8") as f:
                    csv.writer(f).writerows([q, *options, letter] for q, options, letter in (choice_question(world, rng, subject, lambda r: r.choice(world.entities)) for _ in range(n)))
        write_jsonl(folder / "HumanEval.jsonl", ({"task_id": f"Miniature/{i}", "prompt": function_text(name)[0], "entry_point": name, "canonical_solution": function_text(name)[1],
                                                 "test": "def check(candidate):\n" + "".join(f"    assert candidate{t}\n" for t in PROGRAMS[name][3])} for i, name in enumerate(PROGRAMS)))
        rude = [d["text"] for d in documents if any(d["text"].rstrip("!").endswith(w) for w in (*RUDE, "likes you", "this place")) and "you" in d["text"]]
        write_jsonl(folder / "toxicity.jsonl", ({"filename": "miniature", "begin": 0, "end": len(text), "challenging": False, "prompt": {"text": " ".join(text.split()[:3])},
                                                "continuation": {"text": " " + " ".join(text.split()[3:])}} for text in rng.sample(rude, min(60, len(rude)))))
        write_jsonl(folder / "posts.jsonl", ({"id": f"post{i}", "post": " ".join(world.state(rng, e, r) for r in world.facts[e]), "summary": world.state(rng, e, "home")}
                                            for i, e in enumerate(rng.sample(world.entities, 40))))
        unseen = [e for e in world.entities if e not in world.in_chats]
        held_out = [(rng.choice(ASK_ABOUT).format(e=e), "general") for e in rng.sample(unseen, 56)]
        held_out += [(form.format(t=t), "brainstorming") for t in HELD_OUT_TOPICS for form in ASK_LIST]
        held_out += [(world.question(rng, e, rng.choice(list(world.facts[e]))) + "?", "question") for e in rng.sample(unseen, 24)]
        rng.shuffle(held_out)
        write_jsonl(folder / "heldout.jsonl", ({"id": f"heldout-{i}", "prompt": text, "category": category} for i, (text, category) in enumerate(held_out)))
        for name, shape in (("small", (4, 2, 64, 176)), ("large", (4, 4, 128, 352))):
            layers, heads, width, mlp = shape
            write_json(folder / f"{name}.json", {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": width, "intermediate_size": mlp,
                                                "max_position_embeddings": 512, "vocab_size": 1536, "tie_word_embeddings": True, "rms_norm_eps": 1e-5})


def cover(world_folder, questions, train, out):
    """Mark each question `covered` or `not covered`: does a pair of the imitation set ask for the same fact, in whatever words?"""
    world = World(read_json(Path(world_folder) / "world.json")["seed"])
    known = {world.fact_of(m["content"]) for record in read_jsonl(train, "messages") for m in record["messages"] if m["role"] == "user"}
    rows = [{**q, "category": "covered" if world.fact_of(q["question"]) in known else "not covered"} for q in read_jsonl(questions, "question", "answer")]
    write_jsonl(out, rows)
    print(f"{out}: {sum(r['category'] == 'covered' for r in rows)} of {len(rows)} questions ask for a fact that {train} states")


# --- the check -----------------------------------------------------------------------------------------------------------------

STATED = [(relation, re.compile(re.escape(form).replace(r"\{e\}", r"(?P<e>\w+ \w+)").replace(r"\{v\}", "(?P<v>.+)"), re.IGNORECASE)) for relation, (_, forms, _) in RELATIONS.items() for form in forms]
STATED_OF_ANYTHING = next(form.pattern for _, form in STATED if form.fullmatch("The x y is z."))      # "is" of a colour is also "is" of anything else
OF_A_KIND = re.compile(rf"(?:\w+!? |in \w+, |overall, )?the (\w+ \w+) is an? [\w ]*?\b({'|'.join(NOUNS)})\b", re.IGNORECASE)


def label(world, sentence, query=""):
    """`true`, `true of another`, `false` or `unverifiable`: what the world's facts say of a sentence. Only what it states of something that
    exists can be true or false, and what is true of something else than the query names answers nothing."""
    sentence, stated = re.sub(r"^(?:[-*•]|\d+\.)\s+(?:[A-Z]\w+:\s+)?", "", sentence.strip()), None
    for relation, form in STATED:
        found = form.fullmatch(sentence)
        facts = found and world.facts.get(found["e"].lower())
        if facts and (found["v"] in COLOURS or form.pattern != STATED_OF_ANYTHING):
            stated = found["e"].lower(), facts.get(relation, "").lower() == found["v"].lower()
            break
    found = stated is None and OF_A_KIND.match(sentence)
    if found and found[1].lower() in world.kind:
        stated = found[1].lower(), world.kind[found[1].lower()] == found[2].lower()
    if not stated:
        return "unverifiable"
    if not stated[1]:
        return "false"
    asked = [entity for entity in world.entities if entity in query.lower()]
    return "true" if not asked or stated[0] in asked else "true of another"


def sentences_of(text):
    """Its sentences, a list mark with the first of its line; the last of a line ends with the line break."""
    found = []
    for line in text.splitlines(keepends=True):
        mark = re.match(r"\s*(?:\d+\.\s+)?", line)[0]
        first, *rest = re.split(r"(?<=[.!?]) +", line[len(mark):])
        found += [mark + first, *rest]
    return found


def check(world_folder, files, out):
    """Label each sentence of replies; shares are of the sentences of a reply, averaged over replies. OUT/NAME/ holds them in the form of evaluate.py's results."""
    world = World(read_json(Path(world_folder) / "world.json")["seed"])
    for file in files:
        name, samples, shares = Path(file).name.removesuffix(".jsonl"), [], {}
        for i, (query, answer, record) in read_replies(file).items():
            labelled = [(sentence, label(world, sentence, query)) for sentence in sentences_of(answer)]
            said = [verdict for sentence, verdict in labelled if sentence.strip()]
            among = {**dict.fromkeys(("false", "true", "true of another", "unverifiable"), said), "false of checkable": [v for v in said if v != "unverifiable"]}
            mine = {metric.replace(" ", "_"): verdicts.count(metric.removesuffix(" of checkable")) / len(verdicts) for metric, verdicts in among.items() if verdicts}
            samples.append({"index": i, "category": record.get("category"), "query": query, "sentences": labelled, **mine})
            for metric, share in mine.items():
                shares.setdefault(metric, []).append(share)
        metrics = {metric: proportion(values) for metric, values in shares.items()}
        write_jsonl(Path(out) / name / "samples.jsonl", samples)
        write_json(Path(out) / name / "results.json", {"task": "facts", "model": {"name": name, "endpoint": name.startswith("teacher")}, "metrics": metrics, "settings": {"world": world.seed, "a_hash": file_hash(file)}})
        print(f"{name}: " + ", ".join(f"{metric.replace('_', ' ')} {m['score']:.3f}" for metric, m in metrics.items()))


# --- the server ------------------------------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "miniature"

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, kind="invalid_request_error"):
        self.reply(status, {"error": {"message": message, "type": kind}})

    def do_GET(self):
        if self.path.rstrip("/") == "/v1/models":
            return self.reply(200, {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "miniature"} for model in ("teacher", JUDGE)]})
        self.refuse(404, f"no such path {self.path}")

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if length > 1 << 20:
            self.close_connection = True
            return self.refuse(413, "request too large")
        raw = self.rfile.read(length)
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.refuse(404, f"no such path {self.path}")
        try:
            ask = json.loads(raw)
            messages = [{"role": m["role"], "content": str(m["content"])} for m in ask["messages"]]
            temperature, n, limit = float(ask.get("temperature", 1)), int(ask.get("n", 1)), int(ask.get("max_tokens") or ask.get("max_completion_tokens") or 1 << 20)
            stops = ask.get("stop") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            if not messages or not 1 <= n <= 16 or not all(isinstance(s, str) and s for s in stops):
                raise ValueError("messages, n between 1 and 16, stop texts")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            return self.refuse(400, f"malformed request: {e}")
        model = ask.get("model", "teacher")
        if model not in ("teacher", JUDGE):
            return self.refuse(404, f"the model {model!r} does not exist; there are 'teacher' and {JUDGE!r}", "model_not_found")
        seed = ask["seed"] if ask.get("seed") is not None else random.randrange(1 << 30)
        choices, used = [], 0
        for i in range(n):
            text = judge_style(messages[-1]["content"]) if model == JUDGE else self.server.teacher(messages, temperature, f"{seed}/{i}")
            for stop in stops:
                text = text.split(stop)[0]
            pieces = re.findall(r"\s*\S+", text)                      # its tokens are words
            finish = "length" if len(pieces) > limit else "stop"
            choices.append({"index": i, "message": {"role": "assistant", "content": "".join(pieces[:limit])}, "finish_reason": finish})
            used += min(limit, len(pieces))
        asked = sum(len(m["content"].split()) for m in messages)
        self.reply(200, {"id": "chatcmpl-" + hashlib.sha256(raw).hexdigest()[:12], "object": "chat.completion", "created": int(time.time()), "model": model, "choices": choices,
                         "usage": {"prompt_tokens": asked, "completion_tokens": used, "total_tokens": asked + used}})

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):        # a client that went away is no news
            super().handle_error(request, address)


def serve(world_folder, host, port, port_file, with_parent):
    parent = os.getppid()
    if port > 65535:
        raise UserError(f"--port {port}: ports end at 65535")
    server = Server((host, port), Handler)
    server.teacher = Teacher(World(read_json(Path(world_folder) / "world.json")["seed"]))
    if port_file:
        with atomic(port_file) as f:
            f.write(str(server.server_port))
    print(f"teacher at http://{host}:{server.server_port}/v1", flush=True)
    if with_parent:
        def watch():
            while os.getppid() == parent:
                time.sleep(0.2)
            os._exit(0)
        threading.Thread(target=watch, daemon=True).start()
    server.serve_forever()


def main():
    parser = Parser(description="A made-up world and its teacher.", example="python tests/miniature.py build --out world --seed 0")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = commands.add_parser("build", help="the world's files in the formats of the real sets")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--seed", type=natural, default=0)
    p.add_argument("--pretraining-tokens", type=positive, default=1_000_000, help="about")
    p.add_argument("--questions", type=positive, default=600, help="in nq/test.jsonl")
    p = commands.add_parser("serve", help="the teacher as an OpenAI-compatible server")
    p.add_argument("--world", required=True, metavar="DIR")
    p.add_argument("--host", default="127.0.0.1", help="loopback only unless you say otherwise")
    p.add_argument("--port", type=natural, default=0, help="0 takes a free one")
    p.add_argument("--port-file", metavar="FILE", help="write the port there")
    p.add_argument("--with-parent", action="store_true", help="end when the process that started it ends")
    p = commands.add_parser("cover", help="mark the questions whose fact an imitation set states")
    p.add_argument("--world", required=True, metavar="DIR")
    for name in ("questions", "train", "out"):
        p.add_argument(f"--{name}", required=True, metavar="FILE")
    p = commands.add_parser("check", help="label the sentences of replies: true, true of another thing than was asked for, unverifiable, false")
    p.add_argument("--world", required=True, metavar="DIR")
    p.add_argument("--replies", nargs="+", required=True, metavar="FILE")
    p.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args()
    if args.command == "build":
        build(args.out, args.seed, args.pretraining_tokens, args.questions)
    elif args.command == "serve":
        serve(args.world, args.host, args.port, args.port_file, args.with_parent)
    elif args.command == "check":
        check(args.world, args.replies, args.out)
    else:
        cover(args.world, args.questions, args.train, args.out)


if __name__ == "__main__":
    run(main)
