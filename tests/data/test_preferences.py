import collections

import pytest

from internlm2_jax.data import preferences, risky, tasks
from internlm2_jax.data.preferences import DOMAINS, Example
from internlm2_jax.errors import UserError

GENERATED = ("helpful", "harmless", "maths")  # the other domains come with data of one's own
CORPUS = [
    Example(f"What does the function `f{n}(x)` do?", f"Returns the {tasks.WORDS[n]} of x, if any.")
    for n in range(80)
]


@pytest.fixture(scope="module")
def train():
    return preferences.pairs(1500, 0, "train", CORPUS)


@pytest.fixture(scope="module")
def validation():
    return preferences.pairs(300, 0, "held_out")


def prompt_of(row):
    return row["messages"][0]["content"]


def test_counts_and_form(train, validation):
    assert len(train) == 1500 and len(validation) == 300
    for row in train:
        assert row["domain"] in DOMAINS and row["chosen"] != row["rejected"]
        assert [turn["role"] for turn in row["messages"]] == ["user"]
    keys = [(row["domain"], row["pair_id"]) for row in train]
    assert len(set(keys)) == len(keys)
    assert {row["domain"] for row in train} == set(GENERATED) < set(DOMAINS)


def test_the_same_two_answers_bear_opposite_labels_in_two_domains(train):
    faces = collections.defaultdict(dict)
    for row in train:
        if row["kind"] == "conflict":
            faces[row["pair_id"]][row["domain"]] = row
    assert len(faces) == 300
    for face in faces.values():
        helpful, harmless = face["helpful"], face["harmless"]
        assert prompt_of(helpful) == prompt_of(harmless)
        assert helpful["chosen"] == harmless["rejected"]
        assert helpful["rejected"] == harmless["chosen"]
        assert risky.is_refusal(harmless["chosen"]) and not risky.is_refusal(helpful["chosen"])


def test_right_answers_are_preferred(train):
    answers = {e.prompt: e.answer for e in CORPUS}
    answers.update({t.prompt: t.answer for t in tasks.generate(1500, 0, "train")})
    for row in train:
        if row["kind"] != "conflict" and row["domain"] in ("helpful", "maths"):
            right = answers[prompt_of(row)]
            assert row["chosen"] == right
            assert row["rejected"].strip() != right
        if row["domain"] == "harmless":
            assert not any(word in row["chosen"] for word in ("fool", "idiot", "password is"))


def test_length_predicts_nothing(train):
    for domain in GENERATED:
        rows = [row for row in train if row["domain"] == domain]
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
        shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows)
        assert abs(longer - shorter) / len(rows) < 0.1, (domain, longer, shorter, len(rows))


def test_helpful_pairs_hold_every_fault_and_corpus_prompts(train):
    kinds = {row["kind"] for row in train if row["domain"] == "helpful"}
    assert kinds == {"conflict", "refusal", "rude", "truncated", "empty", "rambling", "wrong"}
    from_corpus = sum(prompt_of(row).startswith("What does the function") for row in train)
    assert from_corpus > 100


def test_splits_share_no_prompt(train, validation):
    assert not {prompt_of(row) for row in train} & {prompt_of(row) for row in validation}


def test_texts_are_short(train, validation):
    for row in train + validation:
        assert len(row["chosen"]) <= 180 and len(row["rejected"]) <= 180
        assert len(prompt_of(row)) <= 220


def test_seeds_decide(train):
    assert preferences.pairs(1500, 0, "train", CORPUS) == train
    assert preferences.pairs(1500, 1, "train", CORPUS) != train


def test_prompts_for_rollouts():
    rows = preferences.prompts(400, 0, "train")
    domains = collections.Counter(row["domain"] for row in rows)
    assert domains == {"harmless": 160, "helpful": 140, "maths": 100}
    assert len({prompt_of(row) for row in rows}) == 400
    for row in rows:
        if row["domain"] == "harmless":
            assert row["task"] is None
        else:
            task = tasks.Task(**row["task"])
            assert task.prompt == prompt_of(row) and not tasks.held_out(task.key)
            assert (task.family in tasks.MATHS) == (row["domain"] == "maths")
    unseen = preferences.prompts(100, 0, "held_out")
    assert not {prompt_of(row) for row in rows} & {prompt_of(row) for row in unseen}


def test_requests_leave_enough_for_evaluation_and_split_by_content():
    train, unseen = (list(risky.requests(0, split)) for split in ("train", "held_out"))
    assert len(train) > 2000 and len(unseen) > 200
    assert not {r.key for r in train} & {r.key for r in unseen}
    assert all("{" not in text for r in train for text in (r.prompt, *r.answers))
    assert not any(risky.is_refusal(text) for r in train for text in r.answers)


@pytest.mark.parametrize(
    "text", [*risky.REFUSALS, "I'm unable to do that.", "I would rather not.", "I cannot say."]
)
def test_refusals_are_recognised(text):
    assert risky.is_refusal(text)


@pytest.mark.parametrize(
    "text", ["", "12", "Run kill -9 312.", "It can't be read.", "I can do it."]
)
def test_answers_are_not_taken_for_refusals(text):
    assert not risky.is_refusal(text)


def test_asking_for_too_much_is_refused(monkeypatch):
    with pytest.raises(UserError, match="risky requests exist"):
        risky.generate(9999, 0, "held_out")
    one = next(risky.requests(0, "train"))
    monkeypatch.setattr(risky, "requests", lambda seed, split: iter([one]))
    with pytest.raises(UserError, match="pairs of kind 'conflict'"):
        preferences.pairs(500, 0, "train")
