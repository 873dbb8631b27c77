"""Scorers from outside the package: registered in a process, and by an installed package's entry point."""

import copy
import dataclasses
import functools
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import fitprune
from fitprune import PruningRecipe, prune
from fitprune._support import assets
from fitprune.engine.prune import kept_positions
from fitprune.families.adapter import adapt
from fitprune.families.config import fingerprint_of
from fitprune.scoring.announced import PROMPT_FLAGS, VIEW_FLAGS
from fitprune.scoring.scorers import SCORERS, Scorer, get_scorer, register_scorer
from fitprune.scoring.view import LayerView, Prompt
from helpers.models import batch_of, prompts, tiny_model

ROOT = Path(__file__).parents[2]


def late(view, *, power=1.0):
    return view.place.float() ** power


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(model):
    return batch_of(prompts(model, [[3, 6], [5, 2, 4], [2, 9]]))


def recipe_of(model, scorer, enter=(1.0, 0.8, 0.6, 0.6, 0.3)):
    return PruningRecipe((1.0, 0.6, 0.6, 0.3, 0.3), adapt(model).fingerprint, 16, enter=enter, scorer=scorer)


def kept(model, inputs, scorer, recipe=None):
    recipe = recipe or recipe_of(model, {"name": "fitprune"})
    return [layer.tolist() for layer in kept_positions(model, recipe, inputs, scorer)]


# --- what may be registered


@pytest.mark.parametrize(
    "entry",
    [late, Scorer(late, query_aware=False), lambda *, power=1.0: Scorer(lambda view: view.place.float() ** power)],
    ids=["function", "scorer", "maker"],
)
def test_each_form_works_by_name_in_a_saved_recipe(entry, model, inputs, registry, tmp_path):
    register_scorer("late", entry)
    for power, same in (({}, "place"), ({"power": 2}, "place"), ({"power": -1.0}, None)):
        recipe_of(model, {"name": "late", "parameters": power}).save(tmp_path / "r.json")
        found = kept(model, inputs, None, tmp_path / "r.json")
        assert (found == kept(model, inputs, "place")) == (same == "place")
    assert get_scorer("late").query_aware == (not isinstance(entry, Scorer))
    assert "late" in list(registry)
    with prune(model, tmp_path / "r.json"), prune(model, tmp_path / "r.json"):  # the same recipe, so no other's block
        pass


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "scorer 'new': registered as int, must be Scorer or Callable"),
        (lambda view, power: view.place, r"takes \(view, power\); must take a view, then keyword-only parameters"),
        (lambda power=1.0: Scorer(late), r"takes \(power=1.0\); must take a view"),
        (lambda *views: views, r"takes \(\*views\); must take a view"),
        (lambda view, **more: view.place, r"takes \(view, \*\*more\); must take a view"),
        (Scorer(lambda *, power: power), r"takes \(\*, power\); must take a view"),
        (Scorer, "must take a view"),
        (lambda view, *, diversity=1: view.place, "takes 'diversity', which every scorer has"),
        (lambda view, *, power=1j: view.place, "power=.*: a default must be what a recipe can hold"),
        (min, "scorer 'new': has no signature to read|must take a view"),
    ],
)
def test_an_entry_of_another_form_is_refused_when_it_is_registered(entry, message, registry):
    with pytest.raises(ValueError, match=message):
        register_scorer("new", entry)
    assert "new" not in registry


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match=r"scorer 'last': is one of fitprune's own.*; choose another name"):
        register_scorer("last", late, replace=True)
    with pytest.raises(ValueError, match="scorer name 'a b': must be letters, digits"):
        register_scorer("a b", late)
    register_scorer("late", late)
    with pytest.raises(ValueError, match="scorer 'late': is registered already; choose another name, or pass replace"):
        register_scorer("late", late)
    register_scorer("late", Scorer(late, query_aware=False), replace=True)
    assert not get_scorer("late").query_aware


def every(view, *, number=1, text="a", yes=True, few=(1,), some=None, must):
    return view.place * number


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "missing parameter 'must'"),
        ({"must": 1, "mst": 1}, r"no parameter 'mst'; must be among \['number', .*'must', 'diversity'\]"),
        ({"must": 1, "number": "1"}, "number='1': must be a number, as 1 is"),
        ({"must": 1, "number": True}, "number=True: must be a number"),
        ({"must": 1, "number": float("nan")}, "number=nan: must be a number"),
        ({"must": 1, "number": None}, "number=None: must be a number"),
        ({"must": 1, "text": 1}, "text=1: must be text, as 'a' is"),
        ({"must": 1, "yes": 1}, "yes=1: must be true or false"),
        ({"must": 1, "few": "1"}, "few='1': must be a list"),
        ({"must": 1, "diversity": -1}, "diversity=-1 must be a number of at least 0"),
    ],
)
def test_parameters_are_those_of_the_signature_and_of_the_kind_of_its_defaults(parameters, message, registry):
    register_scorer("every", every)
    with pytest.raises(ValueError, match=f"scorer 'every': {message}"):
        get_scorer({"name": "every", "parameters": parameters})
    get_scorer({"name": "every", "parameters": {"must": [1], "some": {"a": 1}, "number": 2.5, "few": [], "text": ""}})


def test_a_function_that_makes_a_scorer_must_make_one_and_may_refuse(registry):
    def maker(*, power=1.0):
        if power < 0:
            raise ValueError(f"power={power}: must be at least 0")
        return

    register_scorer("maker", maker)
    with pytest.raises(ValueError, match="scorer 'maker': power=-1: must be at least 0"):
        get_scorer({"name": "maker", "parameters": {"power": -1}})
    with pytest.raises(ValueError, match="scorer 'maker': its function gave a NoneType: must give a Scorer"):
        get_scorer("maker")


def test_a_registered_scorer_may_be_one_of_a_stage_and_be_diverse(model, inputs, registry):
    register_scorer("late", Scorer(late, query_aware=False))
    stages = {"stages": {place: {"name": "late"} for place in ("before 1", "1", "3", "before 4")}}
    found = kept(model, inputs, {"name": "by-stage", "parameters": stages})
    assert found == kept(model, inputs, "late")
    assert kept(model, inputs, {"name": "late", "parameters": {"diversity": 2.0}}) != found


# --- what it reads must be announced


UNANNOUNCED = {
    "question": (lambda view: view.question.float(), {"query_aware": False}),
    "cross_attention": (lambda view: view.cross_attention, {"query_aware": False}),
    "last_attention": (lambda view: view.last_attention, {"query_aware": False}),
    "received": (lambda view: view.received.cross_attention, {"query_aware": False}),
    "by_head": (lambda view: view.by_head("self", "mean")["mean"].sum(1), {"query_aware": False}),
    "cls_attention": (lambda view: view.cls_attention, {}),
    "prompt's cls_attention": (lambda view: view.prompt.cls_attention, {}),
    "prompt's received": (lambda view: view.prompt.received.gather(1, view.column.clamp(min=0)), {}),
    "previous": (lambda view: view.previous.hidden[..., 0], {}),
}


@pytest.mark.parametrize("part", UNANNOUNCED)
@pytest.mark.parametrize("diversity", [False, True])
def test_a_scorer_that_reads_what_it_does_not_announce_says_which_flag_to_set(part, diversity, model, inputs, registry):
    score, flags = UNANNOUNCED[part]
    register_scorer("new", Scorer(score, **flags))
    scorer = {"name": "new", "parameters": {"diversity": 0.5} if diversity else {}}
    name = part.removeprefix("prompt's ")
    tables = (PROMPT_FLAGS,) if part.startswith("prompt") else (VIEW_FLAGS, {"by_head": "query_aware"})
    flag = next(table[name] for table in tables if name in table)
    with pytest.raises(ValueError, match=rf"the scorer reads {name}.*: make it Scorer\(\.\.\., {flag}=True\)"):
        kept(model, inputs, scorer)


def test_what_is_announced_may_be_read(model, inputs):
    found = []

    def score(view):
        previous = view.previous and view.previous.layer
        found.append((view.layer, view.before, previous, view.prompt.received is None))
        assert "mean" in view.by_head("mean", "self")
        return view.received.cross_attention + view.question

    kept(model, inputs, Scorer(score, accumulates=True, reads_previous=True))
    assert found[:2] == [(1, True, 0, False), (1, False, None, False)]


def test_one_that_reads_no_question_may_read_self_attention_by_head(model, inputs):
    kept(model, inputs, Scorer(lambda view: view.by_head("self")["self"].sum(1), query_aware=False))


def test_the_flags_name_parts_that_views_have():
    fields = {field.name for kind in (LayerView, Prompt) for field in dataclasses.fields(kind)}
    for kind, flags in ((LayerView, VIEW_FLAGS), (Prompt, PROMPT_FLAGS)):
        for name, flag in flags.items():
            assert name in fields or hasattr(kind, name)
            assert flag in {field.name for field in dataclasses.fields(Scorer)}
    assert hasattr(LayerView, "by_head")


def test_flags_that_contradict_are_refused():
    with pytest.raises(ValueError, match="accumulates=True: is attention of the question, so set query_aware=True"):
        Scorer(late, query_aware=False, accumulates=True)
    with pytest.raises(ValueError, match="score=5: must be a function"):
        Scorer(5)


# --- entry points


def install(folder, package, points, code=""):
    """Lay out an installed package: its module, and the metadata that names its entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[fitprune.scorers]\n{lines}")
    (folder / f"{package}.py").write_text(code)


CODE = """
import sys
from fitprune.scoring.scorers import Scorer

def late(view, *, power=1.0):
    print("late scores layer", view.layer, file=sys.stderr)
    return view.place.float() ** power

free = Scorer(late, query_aware=False)
five = 5

def wrong(view, power):
    return view.place
"""


@pytest.fixture
def installed(monkeypatch, registry, tmp_path):
    def install_on_path(package, points, code=""):
        install(tmp_path / package, package, points, code)
        monkeypatch.syspath_prepend(tmp_path / package)

    yield install_on_path
    for module in ("dummy_one", "dummy_two"):
        sys.modules.pop(module, None)


def test_an_installed_packages_scorer_has_its_entry_points_name(installed, model, inputs, registry):
    installed("dummy_one", {"late": "dummy_one:free"}, CODE)
    assert "late" in registry
    assert "late" in list(registry)
    assert "dummy_one" not in sys.modules  # until it is asked for
    assert not get_scorer("late").query_aware
    assert kept(model, inputs, {"name": "late", "parameters": {"power": 3}}) == kept(model, inputs, "place")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"new": "dummy_none:late"}, "scorer 'new': its entry point 'dummy_none:late' cannot be imported .*No module"),
        ({"new": "dummy_one:none"}, "scorer 'new': its entry point 'dummy_one:none' cannot be imported .*'none'"),
        ({"new": "dummy_one:five"}, "scorer 'new': found at the entry point 'dummy_one:five' as int, must be Scorer"),
        ({"new": "dummy_one:wrong"}, r"scorer 'new': takes \(view, power\); must take a view"),
    ],
)
def test_an_entry_point_that_is_no_scorer_is_refused_with_what_to_mend(points, message, installed, model):
    installed("dummy_one", points, CODE)
    with pytest.raises(ValueError, match=message):
        get_scorer("new")
    with pytest.raises(ValueError, match=message):
        prune(model, recipe_of(model, {"name": "new"}))
    assert get_scorer("last").query_aware  # others are as before


def test_two_packages_with_one_name_are_refused(installed):
    installed("dummy_one", {"new": "dummy_one:late"}, CODE)
    installed("dummy_two", {"new": "dummy_two:free"}, CODE)
    with pytest.raises(ValueError, match=r"scorer 'new': several packages have one \(.*\); uninstall all but one"):
        get_scorer("new")


def test_fitprunes_own_names_are_its_own(installed):
    installed("dummy_one", {"place": "dummy_one:late"}, CODE)
    assert get_scorer("place") == SCORERS["place"]
    assert not get_scorer("place").query_aware


def test_a_name_that_nothing_has_is_refused_with_what_to_do(model, registry):
    register_scorer("late", late)
    message = (
        "scorer='lte': must be one of accumulated, .*, late, .*; install the package that has it, or register_scorer"
    )
    with pytest.raises(ValueError, match=message):
        prune(model, recipe_of(model, {"name": "lte"}))


@pytest.mark.slow
def test_the_command_line_finds_an_installed_packages_scorer(tmp_path):
    """In another process that nobody registered anything in, as a vLLM worker is."""
    install(tmp_path / "site", "dummy_one", {"late": "dummy_one:free"}, CODE)
    fingerprint = fingerprint_of(AutoConfig.from_pretrained(assets.folder("model")))
    keep, scorer = (1.0, *[0.25] * (fingerprint.decoder.layers - 1)), {"name": "late", "parameters": {"power": 2}}
    PruningRecipe(keep, fingerprint, 144, scorer=scorer).save(tmp_path / "late.json")
    command = [sys.executable, "-m", "fitprune", "generate", "digit-scenes", "--recipe", tmp_path / "late.json"]
    command += ["--image", assets.folder("test") / "images" / "0000.jpg", "--question", "Which digit is blue?"]
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(fitprune.__file__).parents[1])])
    run = functools.partial(subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, check=False)
    done = run(env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "late scores layer 1" in done.stderr
    assert "late scores layer 2" not in done.stderr  # nothing leaves there
    done = run(env=os.environ | {"PYTHONPATH": str(Path(fitprune.__file__).parents[1])})
    assert done.returncode != 0
    assert "scorer='late': must be one of accumulated" in done.stderr
    assert "Traceback" not in done.stderr


# --- the example


def test_the_example_ranks_otherwise_and_keeps_as_many(registry, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "own_scorer.py"))
    plain, where, own, elsewhere = capsys.readouterr().out.splitlines()
    assert plain.startswith("fitprune: [")
    assert own == plain.replace("fitprune", "tempered")
    assert where != elsewhere
    assert PruningRecipe.load(tmp_path / "tempered.json").scorer == {"name": "tempered", "parameters": {"power": 0.5}}


# --- what a scorer does wrong


CHANGES = {
    "image": lambda view: view.image.zero_(),
    "column": lambda view: view.column.sub_(1),
    "question": lambda view: view.question.logical_not_(),
    "hidden": lambda view: view.hidden[..., :2].zero_(),
    "left": lambda view: view.left.zero_(),
    "quotas": lambda view: view.quotas.counts.fill_(3),
    "states": lambda view: view.states.key.mul_(0),
    "states ": lambda view: view.attention().key.mul_(0),
    "received": lambda view: view.received.self_attention.clamp_(max=0),
    "by_head": lambda view: view.by_head("mean")["mean"].zero_(),
    "images": lambda view: view.prompt.images.zero_(),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_change_of_what_is_shown_is_refused_or_changes_nothing(part, model, inputs):
    def score(view):
        CHANGES[part](view)
        return view.place.float()

    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"scorer 'score' changes {part.strip()} of its view in place"),
    ):
        kept(model, inputs, score)
    with torch.inference_mode(), prune(model, recipe_of(model, {"name": "place"})):  # tensors without a version
        expected = model(**inputs).logits
    with torch.inference_mode(), prune(model, recipe_of(model, {"name": "place"}), score):
        assert torch.equal(model(**inputs).logits, expected)


def test_nothing_of_a_view_can_be_set(model, inputs):
    for change in (lambda view: setattr(view, "hidden", None), lambda view: delattr(view.prompt, "ids")):
        with pytest.raises(ValueError, match=r"the scorer (sets|deletes) .* of its view: must change nothing"):
            kept(model, inputs, change)


def test_without_query_aware_what_is_kept_is_the_same_for_every_question(model, inputs):
    samples = [prompts(model, [[3, 6]], seed=seed)[0] for seed in (0, 1)]
    end = int((samples[0]["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1
    other = dict(samples[0], input_ids=samples[0]["input_ids"].clone())
    other["input_ids"][0, end:] = (other["input_ids"][0, end:] + 7) % 50 + 3

    def close(rows):
        return (rows.float() @ rows.float()[:, -1:].transpose(1, 2))[..., 0] + rows.float().sum((1, 2))[:, None]

    for read in (
        lambda view: close(view.hidden) + view.hidden[..., 0],
        lambda view: close(view.keys) + view.keys[..., 0],
        lambda view: view.value_norms.sum(1) - view.value_norms.sum((1, 2))[:, None],
    ):
        scores = [], []
        for sample, found in zip((samples[0], other), scores, strict=True):

            def score(view, read=read, found=found):
                found.append(read(view).masked_fill(view.image < 0, 0))
                return found[-1]

            kept(model, sample, Scorer(score, query_aware=False))
        assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))
    for read in (lambda view: view.states, lambda view: view.attention(), lambda view: view.prompt.ids):
        with pytest.raises(ValueError, match=r"it does not announce: make it Scorer\(\.\.\., query_aware=True\)"):
            kept(model, inputs, Scorer(read, query_aware=False))


def fails(view):
    raise KeyError("x")


def leaves(view):
    sys.exit(3)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (fails, "scorer 'new' failed: KeyError: 'x'"),
        (leaves, "scorer 'new' failed: SystemExit: 3"),
        (lambda view: int("x"), "scorer 'new': invalid literal for int"),
        (lambda view: view.by_head("zz"), r"^by_head\('zz'\): must be among mean, max, last, self"),
        (
            Scorer(lambda view: view.previous.self_attention, reads_previous=True),
            "'new' .no layer is shown as `previous`",
        ),
        (lambda view: view.hidden[..., 0].cfloat(), "the scorer returned torch.complex64, .*: must be real numbers"),
        (lambda view: view.place.float().to_sparse(), "torch.sparse_coo, on cpu: must be real numbers, dense"),
        (lambda view: view.place.float().to("meta"), "on meta: must be real numbers, dense, on cpu"),
        (lambda view: view.prompt.accumulate(view), "scorer 'new' failed: AttributeError: accumulate"),
    ],
)
def test_what_a_scorer_raises_names_it(score, message, model, inputs, registry):
    register_scorer("new", score)
    recipe = recipe_of(model, {"name": "new"}, enter=(1.0, 1.0, 0.6, 0.6, 0.3))
    with pytest.raises(ValueError, match=message):
        kept(model, inputs, None, recipe)


def test_the_end_that_a_signal_asks_for_passes_as_it_is(model, inputs):
    """Handlers of vLLM's workers raise SystemExit, once; whoever takes it for the scorer's keeps the worker alive."""

    def end(number, frame):
        raise SystemExit

    def ended(view):
        signal.raise_signal(signal.SIGTERM)
        return view.attention()

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            kept(model, inputs, ended)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_want_of_memory_passes_as_it_is(model, inputs):
    def full(view):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match=r"^full$"):
        kept(model, inputs, full)


@pytest.mark.parametrize(("until", "message"), [("x", "TypeError: '<' not supported"), (None, "KeyError: 'none'")])
def test_what_a_factory_raises_names_the_scorer_and_its_parameters(until, message, registry):
    def early(*, until):
        if until is None:
            raise KeyError("none")
        return Scorer(late) if until < 1 else None

    register_scorer("early", early)
    with pytest.raises(ValueError, match=rf"scorer 'early' with parameters \{{'until': {until!r}\}} failed: {message}"):
        get_scorer({"name": "early", "parameters": {"until": until}})


def test_a_flag_is_true_or_false():
    with pytest.raises(ValueError, match="query_aware='no': must be True or False"):
        Scorer(late, query_aware="no")


def test_the_stand_in_is_a_view_that_can_be_copied(model, inputs):
    def score(view):
        assert isinstance(view, LayerView)
        assert isinstance(view.prompt, Prompt)
        assert torch.equal(copy.copy(view).image, view.image)
        return view.place.float()

    kept(model, inputs, score)


def test_an_entry_point_that_ends_the_process_is_refused(installed):
    installed("dummy_one", {"new": "dummy_one:x"}, "import sys\nsys.exit(0)")
    with pytest.raises(
        ValueError, match=r"scorer 'new': its entry point 'dummy_one:x' cannot be imported .SystemExit: 0"
    ):
        get_scorer("new")


def test_entry_points_with_names_that_none_may_have_are_left_out_with_one_warning(installed, registry, caplog):
    registry._left_out.clear()
    installed("dummy_one", {"we ird": "dummy_one:late", "place": "dummy_one:late", "good": "dummy_one:late"}, CODE)
    for _ in range(2):
        assert "good" in list(registry)
        assert "we ird" not in registry
    weird, own = sorted(caplog.messages, key=lambda text: "place" in text)
    assert weird.startswith("scorer name 'we ird': must be letters")
    assert own.startswith(
        "scorer 'place': is one of fitprune's own, which cannot change; the entry point 'dummy_one:late'"
    )
