"""A small copy of LLaVA's `playground/data/eval`, made of the bundled pictures (python playground.py FOLDER).

File names, keys and quirks are those of the official files. The ten annotators of a question agree on most, and the
others say what the bundled model tends to say where a prompt has an instruction that it has never seen.
"""

import base64
import csv
import io
import itertools
import json
import sys
from pathlib import Path

from fitprune.calibration.samples import load_samples

ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "cyan")
CHINESE = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "白色", "青色"), strict=True))
MME_IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")  # images and answers in folders of their own
MME_FLAT = (
    "existence", "count", "position", "color", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip


def make_playground(root: Path, questions: int = 12) -> dict[str, int]:
    """Write the files of every benchmark, the same bytes each time, into an empty or new folder.

    Args:
        root: the folder.
        questions: of each benchmark; a few have some more, so that every category or row is there.

    Returns:
        Benchmark -> number of questions that are written.
    """
    numbers = {}
    for make in (
        textvqa, gqa, vqav2, vizwiz, scienceqa, pope, mmvet, mmbench, mme, seed, chartqa, docvqa, ocrbench
    ):  # fmt: skip
        numbers |= make(root, questions)
    return numbers


def textvqa(root, questions):
    folder, lines, data = root / "textvqa", [], []
    tokens = ["©", "\uff14", "\uff217", "ñandú", "№"]  # the second and third are wide
    for number, sample in enumerate(scenes("digit-details", questions // 2 + 1, "read_number")):
        name = f"{0x003A8AE2EF43B901 + number * 0x0123456789ABCDF:016x}"
        picture(sample, folder / "train_images" / f"{name}.jpg")
        seen = [] if number == 2 else [*sample.answers[0].split(), tokens[number % len(tokens)]]
        for text in ("What is the number?", "Read the number."):  # an id is its image's: two questions have it
            suffix = f"\nReference OCR token: {', '.join(seen)}{ONE_WORD}"
            lines.append(line(name, f"{name}.jpg", text + suffix))
            data.append(
                {
                    "question": text.upper() if number == 1 else text,
                    "image_id": name,
                    "image_classes": ["Poster"],
                    "image_width": 96,
                    "image_height": 96,
                    "answers": people(sample.answers[0]),
                    "question_tokens": text.lower().rstrip("?.").split(),
                    "question_id": 34602 + len(data),
                    "set_name": "val",
                }
            )
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": data[:questions]})
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines[:questions])
    return {"textvqa": questions}


def gqa(root, questions):
    folder, lines, annotations = root / "gqa", [], {}
    types = {"exists": "verify", "digit_of_colour": "query", "left_of": "query", "count": "query"}
    for number, sample in enumerate(scenes("digit-scenes", questions, *types, likely=True)):
        name, image = f"20{1307251 + 17 * number}", f"n{161313 + number}"
        picture(sample, folder / "data" / "images" / f"{image}.jpg")
        lines.append(line(name, f"{image}.jpg", sample.text + ONE_WORD))
        structural = types[sample.kind]
        annotations[name] = {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "digit (0)"}],
            "entailed": [],
            "equivalent": [name],
            "question": sample.text,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "10q-digit"},
            "answer": sample.answers[0],
            "semanticStr": "select: digit (0)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": f"{structural}Attr", "semantic": "attr", "structural": structural},
            "fullAnswer": f"It is {sample.answers[0]}.",
        }
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    write_json(folder / "data" / "testdev_balanced_questions.json", annotations)
    return {"gqa": questions}


def vqav2(root, questions):
    folder, lines = root / "vqav2", []
    samples = scenes("digit-scenes", 2 * questions)
    for number, sample in enumerate(samples[:questions]):
        image = f"COCO_test2015_{262144 + number:012d}.jpg"
        picture(sample, folder / "test2015" / image)
        lines.append(line(262144000 + 1000 * number, image, sample.text + ONE_WORD))
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines)
    others = [line(9000000 + number, each["image"], each["text"]) for number, each in enumerate(lines)]
    every = itertools.chain.from_iterable(zip(others, lines, strict=True))
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", every)  # with those that are not of test-dev
    entries, annotations = [], []
    for number, sample in enumerate(samples[questions:]):
        image = 42 + number
        picture(sample, folder / "val2014" / f"COCO_val2014_{image:012d}.jpg")
        own = {"image_id": image, "question_id": 1000 * image + number % 3}
        entries.append({**own, "question": sample.text})
        answer = sample.answers[0]
        kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
        answers = [
            {"answer": each, "answer_confidence": "yes", "answer_id": person}
            for person, each in enumerate(people(answer), 1)
        ]
        first = " ".join(sample.text.lower().split()[:2])
        annotations.append(
            {**own, "question_type": first, "multiple_choice_answer": answer, "answers": answers, "answer_type": kind}
        )
    head = {
        "info": {"description": "made for tests", "version": "2.0"},
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": {"name": "none"},
    }
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**head, "task_type": "Open-Ended", "questions": entries}
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations[::-1]})
    return {"vqav2": questions, "vqav2-val": questions}


def vizwiz(root, questions):
    folder, lines, val = root / "vizwiz", [], []
    samples = scenes("digit-scenes", 2 * questions)
    for number, sample in enumerate(samples[:questions]):
        image = f"VizWiz_test_{number:08d}.jpg"
        picture(sample, folder / "test" / image)
        lines.append(line(number, image, sample.text + UNANSWERABLE + ONE_WORD))
    write_lines(folder / "llava_test.jsonl", lines)
    write_json(
        folder / "test.json", [{"image": each["image"], "question": each["text"].split("\n")[0]} for each in lines]
    )
    for number, sample in enumerate(samples[questions:]):
        image, readable = f"VizWiz_val_{number:08d}.jpg", number % 4 != 3
        picture(sample, folder / "val" / image)
        answers = people(sample.answers[0] if readable else "unanswerable")
        kind = "number" if sample.answers[0].isdigit() else "other"
        val.append(
            {
                "image": image,
                "question": sample.text,
                "answers": [{"answer_confidence": "yes", "answer": each} for each in answers],
                "answer_type": kind if readable else "unanswerable",
                "answerable": int(readable),
            }
        )
    write_json(folder / "val.json", val)
    return {"vizwiz": questions, "vizwiz-val": questions}


def scienceqa(root, questions):
    folder, entries, problems = root / "scienceqa", [], {}
    subjects = ("natural science", "social science", "language science")
    for number, sample in enumerate(scenes("digit-scenes", questions, "smallest", "largest")):
        name, alone = str(4 + 7 * number), number % 3 == 2
        options, place = choices(sample, 2 + number % 4)
        hint = "Digits are drawn in colours,\none in each “cell” of a grid." if number % 2 else ""
        text = "\n".join(([f"Context: {hint}"] if hint else []) + [sample.text, *lettered(options)])
        turn = {"from": "human", "value": text if alone else f"<image>\n{text}"}
        entry = {"id": name, "conversations": [turn, {"from": "gpt", "value": "ABCDE"[place]}]}
        if not alone:
            picture(sample, folder / "images" / "test" / name / "image.png", mode="P" if number == 3 else "RGBA")
            entry = {"id": name, "image": f"{name}/image.png", "conversations": entry["conversations"]}
        entries.append(entry)
        problems[name] = {
            "question": sample.text,
            "choices": options,
            "answer": place,
            "hint": hint,
            "image": None if alone else "image.png",
            "task": "closed choice",
            "grade": f"grade{2 + number % 10}",
            "subject": subjects[number // 3 % 3],
            "topic": "digits",
            "category": "Digits",
            "skill": "Compare digits",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    splits = {"train": ["1", "2"], "val": ["3"], "test": list(problems)}
    for number, name in enumerate(("1", "2", "3")):
        problems[name] = {**problems[splits["test"][0]], "image": None, "split": "val" if number == 2 else "train"}
    write_json(folder / "llava_test_CQM-A.json", entries, indent=2)
    write_json(folder / "problems.json", problems)
    write_json(
        folder / "pid_splits.json", {**splits, "trainval": ["1", "2", "3"], "minitest": splits["test"][:1]}, indent=2
    )
    return {"scienceqa": questions}


def pope(root, questions):
    folder, lines = root / "pope", []
    samples = there_or_not(questions // 2 + 1)
    for category in ("adversarial", "random", "popular"):
        labels = []
        for number, (sample, (there, absent)) in enumerate(samples):
            image = f"COCO_val2014_{310196 + 11 * number:012d}.jpg"
            picture(sample, folder / "val2014" / image)
            for digit, label in ((there, "yes"), (absent, "no")):
                if len(labels) < questions // 3 + (category == "random"):
                    text = f"Is there a {digit} in the image?"
                    labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                    lines.append({**line(len(lines) + 1, image, text + ONE_WORD), "category": category})
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels, end="\r\n")
    write_lines(folder / "llava_pope_test.jsonl", lines)
    return {"pope": len(lines)}


def mmvet(root, questions):
    folder, lines, annotations = root / "mm-vet", [], {}
    for number, sample in enumerate(scenes("digit-details", questions)):
        image = f"v1_{number - (number % 4 == 2)}.png"  # some questions share their picture
        if number % 4 != 2:
            picture(sample, folder / "images" / image)
        text = sample.text if number != 5 else f"{sample.text}\n\nYou should write at least 1 digit."
        lines.append({"image": image, "text": text, "category": "conv", "question_id": number})
        annotations[f"v1_{number}"] = {
            "imagename": image,
            "question": text,
            "answer": f"{sample.answers[0]}<OR>the {sample.answers[0]}",
            "imagesource": "made for tests",
            "capability": ["ocr", "rec"],
        }
    write_lines(folder / "llava-mm-vet.jsonl", lines)
    write_json(folder / "mm-vet.json", annotations, indent=4)
    return {"mmvet": questions}


def mmbench(root, questions):
    """Write both languages; each question is samples once for each option, in turn the first."""
    numbers = {}
    for language, name in (("en", "mmbench/mmbench_dev_20230712"), ("cn", "mmbench_cn/mmbench_dev_cn_20231003")):
        rounds = [[] for _ in range(4)]
        digits = scenes("digit-scenes", max(2, questions // 3 - 1), "digit_of_colour", "count", likely=True)
        for number, sample in enumerate([*scenes("digit-scenes", 1, "colour_of_digit"), *digits]):
            options, place = choices(sample, 4 - number % 3)
            hint, text = 'The passage says "digits".\nRead it, then answer.', sample.text
            if language == "cn":
                options = [CHINESE.get(option, option) for option in options]
                hint, text = "提示“数字”。\n请阅读。", f"图中哪一个 ({text})"
            for turn in range(len(options)):
                shown = [*options[turn:], *options[:turn], "", ""][:4]
                rounds[turn].append(
                    {
                        "index": turn * 1000000 + 241 + 11 * number,
                        "question": text,
                        "hint": hint if number == 1 else "",
                        **dict(zip("ABCD", shown, strict=True)),
                        "answer": "ABCD"[(place - turn) % len(options)],
                        "category": ("ocr", "attribute_recognition")[number % 2],
                        "image": base64.b64encode(picture_bytes(sample)).decode(),
                        "source": "made for tests",
                        "l2-category": ("finegrained_perception (instance-level)", "coarse_perception")[number % 2],
                        "comment": "",
                        "split": "dev",
                    }
                )
        rows = [row for own in rounds for row in own]
        write_table(root / f"{name}.tsv", rows)
        for row in rows:
            del row["answer"]
            row["split"] = "test"
        write_table(root / f"{name.replace('dev', 'test')}.tsv", rows)
        for split in ("dev", "test"):
            numbers[f"mmbench{'-cn' * (language == 'cn')}{'-test' * (split == 'test')}"] = len(rows)
    return numbers


def mme(root, questions):
    folder, lines = root / "MME", []
    categories = (*MME_FLAT, *MME_IN_FOLDERS)
    each = max(1, questions // 12)
    samples = iter(there_or_not(each * len(categories)))
    for category in categories:
        base = folder / "MME_Benchmark_release_version" / category
        images, labels = (
            (base / "images", base / "questions_answers_YN") if category in MME_IN_FOLDERS else (base, base)
        )
        for number, (sample, (there, absent)) in enumerate(itertools.islice(samples, each)):
            stem = f"{20 + number:04d}"
            image = images / f"{stem}.{'png' if 'reasoning' in category else 'jpg'}"
            picture(sample, image)
            name = image.relative_to(folder / "MME_Benchmark_release_version").as_posix()
            where = "in musée toulouse-lautrec" if category == "artwork" else 'in the "image"'
            texts = [f"Is there a {digit} {where}?" for digit in (there, absent)]
            lines += [{**line(name, name, text + ONE_WORD), "category": category} for text in texts]
            blanks = " " * (2 if category == "landmark" else 1)
            answers = [
                f"{text}{blanks}Please answer yes or no.\t{word}"
                for text, word in zip(texts, ("Yes", "No"), strict=True)
            ]
            write(labels / f"{stem}.txt", "\n".join(answers) + "\n" * (category != "scene"))
    write_lines(folder / "llava_mme.jsonl", lines)
    return {"mme": len(lines)}


def seed(root, questions):
    """Write SEED-Bench; of its videos only the questions, since most people have only the images."""
    folder, lines, entries = root / "seed_bench", [], []
    kinds = {"Scene Understanding": 1, "Instances Counting": 5, "Text Understanding": 9, "Action Recognition": 10}
    for number, sample in enumerate(scenes("digit-scenes", questions + 3, "digit_of_colour", "count")):
        still = number < questions
        options, place = choices(sample, 4)
        name, data = f"{101669 + number}" if still else f"v{number}", f"{1454426 + number}_2591111986"
        kind = list(kinds.values())[number % 3] if still else 10
        image = f"SEED-Bench-image/{data}" if still else f"SEED-Bench-video-image/{kind}_{name}.png"
        if still:
            picture(sample, folder / image, form="JPEG")  # without an ending, as the official ones
        text = "\n".join([sample.text, *lettered(options)]) + LETTER
        own = {"question_id": int(name) if still else name, "category": {v: k for k, v in kinds.items()}[kind]}
        lines.append({"image": image, "text": text, **own})
        entries.append(
            {
                "answer": "ABCD"[place],
                **{f"choice_{letter}": option for letter, option in zip("abcd", options, strict=True)},
                "data_id": data if still else f"{name}.webm",
                "data_type": "image" if still else "video",
                "question": sample.text,
                "question_id": name,
                "question_type_id": kind,
            }
        )
    write_lines(folder / "llava-seed-bench.jsonl", lines)
    write_json(folder / "SEED-Bench.json", {"questions": entries, "question_type": kinds})
    return {"seed": questions}


def chartqa(root, questions):
    folder = root / "chartqa" / "ChartQA Dataset" / "test"
    samples = scenes("digit-details", questions, "count", "small_digit", "small_colour", "count_colour", likely=True)
    half = questions // 2
    for part, own in (("human", samples[:half]), ("augmented", samples[half:])):
        entries = []
        for number, sample in enumerate(own):
            image = f"{41699051005347 + number}.png" if part == "human" else f"multi_col_{20100 + number}.png"
            picture(sample, folder / "png" / image, mode="RGBA")
            entries.append({"imgname": image, "query": sample.text, "label": sample.answers[0]})
        write_json(folder / f"test_{part}.json", entries, indent=2)
    return {"chartqa": questions}


def docvqa(root, questions):
    folder = root / "docvqa"
    samples = scenes("digit-details", 2 * questions)
    for split, own in (("val", samples[:questions]), ("test", samples[questions:])):
        entries = []
        for number, sample in enumerate(own):
            page = f"{'pyvf'[number % 4]}bv{228 + number:04d}_{number}"
            picture(sample, folder / "documents" / f"{page}.png", mode="L")
            entry = {
                "questionId": 49153 + 1000 * (split == "test") + number,
                "question": sample.text,
                "image": f"documents/{page}.png",
                "docId": 14465 + number,
                "ucsf_document_id": page.partition("_")[0],
                "ucsf_document_page_no": str(number),
                "data_split": split,
            }
            if split == "val":
                types = [["figure/diagram"], ["layout", "table/list"], ["free_text"]][number % 3]
                entry |= {"question_types": types, "answers": list(dict.fromkeys(people(sample.answers[0])))}
            entries.append(entry)
        name = "val_v1.0_withQT" if split == "val" else "test_v1.0"
        head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split}
        write_json(folder / f"{name}.json", {**head, "data": entries})
    return {"docvqa": questions, "docvqa-test": questions}


def ocrbench(root, questions):
    folder, entries = root / "ocrbench", []
    sets = (
        ("IIIT5K", "Regular Text Recognition", "IIIT5K/test/{}.png"),
        ("HME100k", "Handwritten Mathematical Expression Recognition", "HME100K/test/test_images/test_{}.jpg"),
        ("textVQA", "Scene Text-centric VQA", "textVQA/train_images/{}.jpg"),
        ("ORAND", "Digit String Recognition", "ORAND-CAR-2014/{}.png"),
    )
    for number, sample in enumerate(scenes("digit-details", questions, "read_number")):
        dataset, kind, place = sets[number % len(sets)]
        image, answer = place.format(f"{918 + number}_1"), sample.answers[0]
        picture(sample, folder / "OCRBench_Images" / image)
        answers = {"HME100k": [f"{answer}\n", answer.replace(" ", "")], "textVQA": [answer]}.get(dataset, answer)
        own = {"dataset_name": dataset, "id": 7 + number // len(sets)}  # ids are unique in a data set only
        entries.append({**own, "image_path": image, "question": sample.text, "answers": answers, "type": kind})
    write_json(folder / "OCRBench.json", entries, indent=4)
    return {"ocrbench": questions}


def scenes(data, count, *kinds, likely=False):
    """Take the first bundled questions of some kinds; with `likely` those first whose answer the model says often."""
    samples = [each for each in load_samples(f"{data}/test") if not kinds or each.kind in kinds]
    if likely:
        samples.sort(key=lambda each: each.answers[0] not in ("3", "4", "5", "no", "yes"))
    return samples[:count]


def there_or_not(count):
    """Pair pictures with a digit that is there and one that is not: below the smallest, or above the largest."""
    step = {"smallest": -1, "largest": 1}
    samples = [(each, int(each.answers[0])) for each in scenes("digit-scenes", 640, *step)]
    pairs = [(each, (digit, digit + step[each.kind])) for each, digit in samples]
    return [(each, digits) for each, digits in pairs if 0 <= digits[1] <= 9][:count]


def people(answer):
    """What ten annotators say."""
    return [answer] * 4 + [f"The {answer}.", "3", "3", "4", "4", "4"]


def choices(sample, count):
    """Give some options and the place of the right one."""
    answer = sample.answers[0]
    others = [each for each in (COLOURS if answer in COLOURS else "0123456789") if each != answer]
    place = int(sample.id.rpartition("-")[2]) // 8 % count
    return [*others[: count - 1][:place], answer, *others[place : count - 1]], place


def lettered(options):
    return [f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False)]


def line(number, image, text):
    return {"question_id": number, "image": image, "text": text, "category": "default"}


def picture(sample, path, *, mode="RGB", form=None):
    """Write a sample's picture; every fifth is cut, so that it is no square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(sample, mode, form or ("PNG" if path.suffix == ".png" else "JPEG")))


def picture_bytes(sample, mode="RGB", form="JPEG"):
    number = int(sample.id.rpartition("-")[2])
    if number % 5 and (mode, form) == ("RGB", "JPEG"):
        return Path(sample.image).read_bytes()
    image = sample.load_image()
    if number % 5 == 0:
        image = image.crop((0, 0, 96, 72) if number % 2 else (0, 0, 72, 96))
    written = io.BytesIO()
    image.convert(mode).save(written, form)
    return written.getvalue()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def write_lines(path, entries, *, end="\n"):
    write(path, "".join(json.dumps(entry) + end for entry in entries))


def write_json(path, whole, **options):
    write(path, json.dumps(whole, ensure_ascii=False, **options))


def write_table(path, rows):
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue())


if __name__ == "__main__":
    print(*(f"{name}: {number}" for name, number in make_playground(Path(sys.argv[1])).items()), sep="\n")
