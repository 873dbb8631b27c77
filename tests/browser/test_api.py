"""What programs send, and what is refused; several clients at once; who leaves frees the place."""

import concurrent.futures
import ctypes
import gc
import json
import os
import shutil
import time
import urllib.error
import urllib.request

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from fitprune.calibration.samples import load_samples

SAMPLES = load_samples("digit-scenes/test")


@pytest.fixture(scope="module")
def client(app):
    return Client(app.url, verbose=False)


def ask(client, number=0, **changed):
    sample = SAMPLES[number]
    values = {"question": sample.text, "budget": 60, "method": "fitprune", "scorer": "", "tokens": 8, **changed}
    picture = values.pop("picture", handle_file(sample.image))
    return client.predict(picture, *values.values(), api_name="/answer")


def test_an_answer_has_texts_times_costs_and_tokens_by_layer(client):
    answer = ask(client)
    assert answer["dense"]["text"] == SAMPLES[0].answers[0]
    assert answer["pruned"]["seconds_to_first_token"] > 0
    assert answer["enter_layer"][0] == 144
    assert answer["enter_layer"][-1] < 72
    assert answer["cost"]["flops_reduction"] >= 0.6
    assert answer["recipe"]["keep"][-1] < 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": 96}, r"budget=96: must be from 0 to 95, percent of the visual FLOPs"),
        ({"budget": -1}, r"budget=-1: must be from 0 to 95"),
        ({"budget": None}, r"budget=None: must be a finite number"),
        ({"method": "magic"}, r"method .*magic.*: must be one of fitprune, random"),
        ({"method": "recipe: other"}, r"recipe .*other.*: unknown; a recipe is chosen by its name, no file is read"),
        ({"method": "recipe: ../secret"}, r"recipe .*secret.*: unknown; .* Names: mine"),
        ({"method": "recipe: /etc/passwd"}, r"recipe .*passwd.*: unknown"),
        ({"scorer": "../../scorer"}, r"scorer .*scorer.*: must be one of accumulated"),
        ({"tokens": 33}, r"answer tokens=33: must be an integer from 1 to 32"),
        ({"question": " "}, r"question=.*: must be a text that is not empty"),
        ({"question": "a" * 1001}, r"the question has 1,001 characters: must have at most 1,000; shorten it"),
        ({"question": "<image> again?"}, r"contains the image token .*: remove it"),
        ({"picture": None}, r"no picture: upload one"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_value_rule_and_remedy(client, changed, message):
    with pytest.raises(AppError, match=message) as error:
        ask(client, **changed)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "as a file"])
@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "~/.bashrc", "{picture}", "{folder}/secret.png", "{folder}/uploads", "/"],
)
def test_a_path_of_this_machine_is_no_picture(app, path, meta):
    shutil.copy(SAMPLES[0].image, app.folder / "secret.png")
    path = path.format(folder=app.folder, picture=SAMPLES[0].image)
    reply = call(app, [{"path": path, **meta}, "What?", 60, "fitprune", "", 8])
    assert "event: error" in reply
    assert meta or "the picture is no upload, or no longer here: upload it again" in reply


@pytest.mark.parametrize("host", ["127.0.0.1", "example.com"])
def test_no_picture_is_downloaded_for_a_stranger(app, host):
    picture = {"path": f"http://{host}:{app.url.rpartition(':')[2]}/x.png", "meta": {"_type": "gradio.FileData"}}
    assert "this server downloads none: upload the file" in call(app, [picture, "What?", 60, "fitprune", "", 8])


def test_nobody_passes_by_the_queue(app):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(app, "run/answer", {"data": [upload(app, SAMPLES[0].image), "What?", 60, "fitprune", "", 8]})
    assert error.value.code == 404


@pytest.mark.parametrize("question", [["What?"], {"a": 1}, 5])
def test_a_question_is_a_text(app, question):
    picture = upload(app, SAMPLES[0].image)
    assert "must be a text that is not empty" in call(app, [picture, question, 60, "fitprune", "", 8])


def test_the_arguments_have_names(client):
    parameters = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/answer"]["parameters"]
    names = [each["parameter_name"] for each in parameters]
    assert names == ["picture", "question", "budget", "method", "scorer", "tokens"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "{folder}/secret.json", "{folder}/recipes/mine.json"]
)
def test_no_file_but_uploads_can_be_fetched(app, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{app.url}/gradio_api/file={path.format(folder=app.folder)}")
    assert error.value.code in (403, 404)


def test_a_recipe_of_the_operators_folder_is_taken_by_its_name(client):
    assert ask(client, method="recipe: mine")["cost"]["flops_reduction"] >= 0.8


def test_controls_of_the_page_refuse_it_too(app):
    """By the number of a control, which no program should know."""
    config = json.load(urllib.request.urlopen(f"{app.url}/config"))
    run = next(each for each in config["dependencies"] if any(target[1] == "release" for target in each["targets"]))
    assert run["api_visibility"] == "private"
    picture = upload(app, SAMPLES[0].image)
    for budget, method in ((200, "fitprune"), (60, "../secret")):
        body = {"data": [picture, "What?", budget, method, "", 8], "fn_index": run["id"], "session_hash": "stranger"}
        assert 'success": false' in joined(app, body).replace('":false', '": false')


def test_two_hundred_requests_of_eight_clients_are_answered_each_by_its_own_and_memory_stays_flat(app):
    clients = [Client(app.url, verbose=False) for _ in range(8)]
    alone = [ask(clients[0], number)["dense"]["text"] for number in range(25)]

    def some(which, count):
        return {number: ask(clients[which], number % 25, budget=40 + number % 50) for number in range(which, count, 8)}

    used = []
    for count in (24, 200):  # the first fill what is filled once: threads, and what they keep
        began, answers = time.perf_counter(), {}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for part in pool.map(some, range(8), [count] * 8):
                answers |= part
        used.append(memory())
        print(f"{count} requests in {time.perf_counter() - began:.1f} s, memory {used[-1]} MB")
        assert sorted(answers) == list(range(count))
        for number, answer in answers.items():
            assert answer["dense"]["text"] == alone[number % 25]
            assert answer["cost"]["flops_reduction"] == pytest.approx((40 + number % 50) / 100, abs=0.02)
    assert used[1] - used[0] < 25


def test_who_leaves_in_the_middle_frees_the_place(app, slow, monkeypatch):
    """A request whose client goes away while its answer grows does not hold the device."""
    config = json.load(urllib.request.urlopen(f"{app.url}/config"))
    run = next(each for each in config["dependencies"] if any(target[1] == "release" for target in each["targets"]))
    picture = upload(app, SAMPLES[0].image)
    body = {"data": [picture, "What?", 60, "fitprune", "", 8], "fn_index": run["id"], "session_hash": "leaver"}
    post(app, "queue/join", body)
    stream = urllib.request.urlopen(f"{app.url}/gradio_api/queue/data?session_hash=leaver")
    assert slow.wait(10)
    stream.close()
    assert app.served._device.acquire(timeout=8)  # of the 12 seconds that both answers take
    app.served._device.release()
    monkeypatch.undo()
    assert ask(Client(app.url, verbose=False))["dense"]["text"] == SAMPLES[0].answers[0]


def memory():
    """Resident memory of this process, which serves, in MB, without what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open(f"/proc/{os.getpid()}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def post(app, path, body):
    request = urllib.request.Request(
        f"{app.url}/gradio_api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))


def call(app, data):
    """Call /answer without a client's help."""
    event = post(app, "call/answer", {"data": data})["event_id"]
    return urllib.request.urlopen(f"{app.url}/gradio_api/call/answer/{event}").read().decode()


def joined(app, body):
    try:
        post(app, "queue/join", body)
    except urllib.error.HTTPError as error:
        return json.dumps({"success": False, "code": error.code})
    url = f"{app.url}/gradio_api/queue/data?session_hash={body['session_hash']}"
    return urllib.request.urlopen(url).read().decode()


def upload(app, path):
    boundary = "boundary7319"
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + path.read_bytes()
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        f"{app.url}/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    [stored] = json.load(urllib.request.urlopen(request))
    return {"path": stored, "meta": {"_type": "gradio.FileData"}, "orig_name": path.name}
