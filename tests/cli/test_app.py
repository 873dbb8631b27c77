import importlib.util

from fitprune.cli.main import main


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert main(["app"]) == 1
    assert capsys.readouterr().err == (
        "fitprune: error: the app needs Gradio: pip install 'fitprune[app]', or '.[app]' in a clone\n"
    )


def test_statistics_and_data_exclude_each_other(capsys):
    assert main(["app", "--stats", "s.safetensors", "--data", "digit-scenes/calibration"]) == 2
    assert "--stats s.safetensors and --data: pass one" in capsys.readouterr().err
