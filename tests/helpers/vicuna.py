"""A small tokenizer of Llama's kind, and questions in the form of each benchmark, for the tests of LLaVA's protocol."""

import functools
import itertools

import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BLANK = "\u2581"
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_WORDS = (
    "A chat between a curious user and an artificial intelligence assistant . The gives helpful , detailed and polite "
    "answers to user ' s questions USER : ASSISTANT Answer the question using single word or phrase with option letter "
    "from given choices directly Reference OCR token Is there What is When provided information Unanswerable"
)

ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# Benchmark -> its questions, each with an image but those of "scienceqa-text".
QUESTIONS = {
    "textvqa": [
        f"what is the brand of this camera?\nReference OCR token: {tokens}{ONE_WORD}"
        for tokens in (
            "DAKOTA, DIGITAL, Single-Use, Camera, dakota",
            "",
            "caf\u00e9, 9\u20ac, \u2014, \u4e2d\u6587, \U0001f600",
            "  x ,,\t\u00a0, <b>",
        )
    ],
    "gqa": [f"Is it overcast?{ONE_WORD}", f"Which side of the image is the chair on?{ONE_WORD}"],
    "vqav2": [f"How many people are there?{ONE_WORD}", f"What's the man's name?{ONE_WORD}"],
    "vizwiz": [
        f"{text}\nWhen the provided information is insufficient, respond with 'Unanswerable'.{ONE_WORD}"
        for text in ("What is this? And what color is it?", "Ok. There is another picture I hope it is a better one.")
    ],
    "scienceqa": [
        "What is the name of the colony shown?\nA. Maryland\nB. New Hampshire\nC. Rhode Island\nD. Vermont" + LETTER,
        "Context: The diagrams below show 2 pure samples.\nWhich has the higher temperature?\nA. neither\nB. B"
        + LETTER,
    ],
    "scienceqa-text": [
        "Which figure of speech is used in this text?\nSing, O goddess\u2026\nA. chiasmus\nB. apostrophe" + LETTER,
        "Select the temperature of a desert.\nA. 40\u00b0C\nB. 4\u00b0C" + LETTER,
    ],
    "pope": [f"Is there a snowboard in the image?{ONE_WORD}", f"Is there an orange in the image?{ONE_WORD}"],
    "mme": [f"Is the answer to the arithmetic question in the image 225?{ONE_WORD}"],
    "mmbench": [
        "The passage below describes an experiment.\n\nPeople can use it.\nIdentify the question.\nA. a\nB. b" + LETTER,
        "Which is right?\nA. 1\nB. 2.5\nC. none\nD. \u22123" + LETTER,
    ],
    "mmbench-cn": [
        "\u4ee5\u4e0b\u54ea\u4e2a\u662f\u6b63\u786e\u7684\uff1f\nA. \u6c34\nB. \u706b\n"
        "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002",
    ],
    "mm-vet": ["What is x in the equation?", "Can you explain this meme?", " what?  "],
    "seed": ["How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER],
    "chartqa": [f"What's the value of the lowest bar?{ONE_WORD}"],
    "docvqa": [f"What is the \u2018actual\u2019 value per 1000, during the year 1975?{ONE_WORD}"],
    "ocrbench": ["what is written in the image?"],
}  # fmt: skip


@functools.cache
def _parts():
    """Ids: the three marks, bytes, printable characters, pieces of `_WORDS`; and which pieces merge, in order."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), BLANK, *map(chr, range(33, 127))]
    merges = {(BLANK, BLANK): None}
    for word in _WORDS.split():
        pieces = itertools.accumulate(BLANK + word)
        merges |= dict.fromkeys(zip(pieces, word, strict=False))
        merges |= dict.fromkeys(zip(itertools.accumulate(word), word[1:], strict=False))
    vocabulary += dict.fromkeys("".join(pair) for pair in merges)
    return {piece: number for number, piece in enumerate(vocabulary)}, list(merges)


def tokenizer(*, scheme="first"):
    """Every text begins with a blank piece; with "first", as newer checkpoints have it, none follows an image."""
    vocabulary, merges = _parts()
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(BLANK, scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    inner.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>", "<pad>")])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
