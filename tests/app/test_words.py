from fitprune.app.words import marked, words_of

PIECES = ["The", " di", "git", " is", "\n", "blue", ".", "</s>"]


def decode(ids):
    return "".join(PIECES[i] for i in ids if PIECES[i] != "</s>")


def test_words_know_their_tokens():
    words = words_of(range(8), decode)
    assert [word.text for word in words] == ["The", "digit", "is", "blue."]
    assert [word.tokens for word in words] == [(0,), (1, 2), (3,), (5, 6)]


def test_an_empty_answer_has_no_word():
    assert words_of([], decode) == []
    assert words_of([7], decode) == []


def test_a_letter_of_several_tokens_belongs_to_its_word():
    texts = ["", "a", "a\ufffd", "a\u00e9", "a\u00e9 b"]  # the second and the third token are one letter
    words = words_of(range(4), lambda ids: texts[len(ids)])
    assert [(word.text, word.tokens) for word in words] == [("a\u00e9", (0, 1, 2)), ("b", (3,))]


def test_words_that_differ_are_marked_on_both_sides():
    first = words_of([0, 1, 2, 3, 4, 5], decode)
    second = words_of([0, 1, 2, 4, 5, 6], decode)
    pruned, dense = marked([first, second])
    assert [(word.text, word.differs) for word in pruned] == [
        ("The", False), ("digit", False), ("is", True), ("blue", True),
    ]  # fmt: skip
    assert [(word.text, word.differs) for word in dense] == [("The", False), ("digit", False), ("blue.", True)]
