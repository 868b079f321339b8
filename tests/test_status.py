"""Exit statuses and the form of errors, over all commands."""

import signal
import subprocess
import sys
import time

import pytest

from granvit import cli, status
from granvit.errors import Failed


@pytest.fixture()
def granvit(monkeypatch, capsys):
    """granvit("train", ...) -> (exit status, stdout, stderr) of the console script."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["granvit", *words])
        monkeypatch.setenv("COLUMNS", "60")
        try:
            code = cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


NAMES = {"data": ("convert", "jsonl"), "eval": (), "train": ()}
"""Words that a command's error is looked for behind."""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_flag_that_there_is_not_is_bad_usage_in_one_form(granvit, name):
    code, out, err = granvit(name, *NAMES.get(name, ()), "--no-such-flag")
    assert code == status.USAGE and out == "", err
    (line,) = [line for line in err.splitlines() if "error:" in line] or [err]
    assert line.startswith(f"granvit {name}") and ": error: " in line and "│" not in err


BAD = {
    "train": ("--config", "/no/such/config.yaml"),
    "plan": ("nosuch",),
    "eval": ("/no/such/model", "--data", "/no/such/data"),
    "predict": ("/no/such/model", "--image", "/no/such/picture.png", "--find", "x"),
    "export": ("/no/such/run", "--output", "{folder}/out"),
    "data": ("filter", "/no/such/data", "--output", "{folder}/out"),
    "annotate": ("/no/such/pictures", "--output", "{folder}/out", "--ocr", "rapidocr"),
    "audit": ("/no/such/data", "--output", "{folder}/out"),
    "demo": ("/no/such/model",),
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_is_not_there_is_bad_input_in_one_line(granvit, name, tmp_path):
    code, _, err = granvit(name, *(word.format(folder=tmp_path) for word in BAD[name]))
    assert code == status.USAGE, err
    (line,) = [line for line in err.splitlines() if "error:" in line] or [err]
    assert line.startswith(f"granvit {name}") and ": error: " in line and not (tmp_path / "out").exists()


def test_config_takes_a_file(granvit):
    for words in (("train", "smoke", "--config"), ("plan", "--config")):
        code, _, err = granvit(*words)
        assert code == status.USAGE
        assert err == f"granvit {words[0]}: error: --config takes the path of a run's config.yaml\n"


def test_a_command_of_data_points_to_its_own_help(granvit):
    _, _, err = granvit("data", "filter", "a", "--output", "b", "--no-such-flag")
    assert "run granvit data filter --help" in err


def test_adapt_names_a_path_where_nothing_is_before_it_makes_data(granvit):
    for words in (("--encoder", "/nosuch", "--llm", "llm-toy"), ("--encoder", "llm-toy", "--llm", "./nosuch")):
        code, _, err = granvit("train", "adapt", *words)
        assert code == status.USAGE
        assert err.startswith("granvit train: error: --") and err.endswith("there is nothing\n")


ERRORS = {
    ValueError("odd"): status.USAGE,
    FileNotFoundError(2, "No such file", "a"): status.USAGE,
    PermissionError(13, "Permission denied", "a"): status.USAGE,
    OSError(28, "No space left on device"): status.FAILED,
    Failed("it can't go on"): status.FAILED,
}


@pytest.mark.parametrize(("error", "code"), ERRORS.items(), ids=repr)
def test_errors_have_a_meaning(error, code, capsys):
    def work():
        raise error

    assert status.run("granvit x", work) == code
    assert capsys.readouterr().err == f"granvit x: error: {error}\n"


def test_what_a_terminal_obeys_is_spelt_in_errors(granvit, tmp_path):
    code, _, err = granvit("audit", f"{tmp_path}/\x1b[31m\nred", "--output", str(tmp_path / "out"))
    assert code == status.USAGE and r"/\x1b[31m" in err and "\n  red" in err and "\x1b" not in err
    code, _, err = granvit("train", "--no\x1b]0;x\a")
    assert code == status.USAGE and r"--no\x1b]0;x\x07" in err and "\x1b" not in err


def test_bad_usage_is_the_same_on_a_terminal(granvit, monkeypatch):
    plain = granvit("train", "--no-such-flag")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # tyro colours its box then
    assert granvit("train", "--no-such-flag") == plain


def test_work_says_its_own_status_and_mistakes_of_ours_are_raised(capsys):
    assert status.run("granvit x", lambda: None) == 0 and status.run("granvit x", lambda: 75) == 75
    with pytest.raises(ZeroDivisionError):
        status.run("granvit x", lambda: 1 / 0)


def test_a_dataset_over_its_fault_budget_is_work_that_failed(tmp_path):
    from granvit.data.faults import FaultBudgetExceeded

    def work():
        raise FaultBudgetExceeded("3 of 4")

    assert status.run("granvit x", work) == status.FAILED


@pytest.mark.parametrize("name", ["train", "plan", "eval", "predict", "export", "data", "demo"])
def test_help_is_said_by_the_script_s_name_at_once(name):
    code = (
        "import sys, resource; sys.argv[1:] = [sys.argv[1], '--help']; from granvit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)\n"
        "assert not {'torch', 'transformers', 'gradio'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: granvit {name}" in done.stdout and "python -m" not in done.stdout
    assert float(done.stdout.split()[-1]) < 2


def test_ctrl_c_in_the_middle_is_one_line(tmp_path):
    (tmp_path / "pictures").mkdir()
    words = ["data", "sample", "--images", "2000", "--output", str(tmp_path / "out")]
    # A shell's job in the background, such as this test may run in, ignores Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from granvit.cli import main; sys.exit(main())"
    run = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("out*")) + list(tmp_path.glob(".out*")) and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == status.INTERRUPTED and said.endswith("granvit data sample: stopped\n"), said
    assert "Traceback" not in said
