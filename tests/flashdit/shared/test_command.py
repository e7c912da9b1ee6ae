import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashdit.__main__
import iwin_tasks.__main__
from flashdit.shared.command import (
    Command,
    CommandParser,
    add_device,
    need_extra,
    resolve_device,
    run_command,
    run_script,
)
from flashdit.shared.files import write_atomically

ROOT = Path(__file__).parents[3]


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """Returns the commands of a console entry: one that prints its words, and one with a mistake."""
    (tmp_path / "kitchen_bake.py").write_text(
        "import argparse\n"
        "def main(argv):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('word')\n"
        "    print(parser.parse_args(argv).word)\n"
    )
    (tmp_path / "kitchen_burn.py").write_text("def main(argv):\n    raise ValueError('too\\n   hot')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["before", "of the process"])
    return {"bake": Command("kitchen_bake", "bakes it"), "burn": Command("kitchen_burn", "burns it")}


def test_a_command_gets_the_words_after_its_name(kitchen, capsys):
    run_command("kitchen", kitchen, ["bake", "sponge"])
    assert capsys.readouterr().out == "sponge\n"
    assert "kitchen_burn" not in sys.modules


def test_usage_and_errors_begin_with_entry_and_command(kitchen, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command("kitchen", kitchen, ["bake"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("usage: kitchen bake [-h] word\n")
    with pytest.raises(SystemExit):
        run_command("kitchen", kitchen, ["burn"])
    assert capsys.readouterr().err == "kitchen burn: error: too hot\n"


def test_an_unknown_command_names_the_nearest(kitchen, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command("kitchen", kitchen, ["bak"])
    assert exit_info.value.code == 2
    expected = "kitchen: error: unknown command 'bak'; did you mean 'bake'? (known: bake, burn)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--cfg-scle", "3"], "--cfg-scle 3; did you mean '--cfg-scale'?"),
        (["--cfg-scle=3"], "--cfg-scle=3; did you mean '--cfg-scale'?"),
        (["more", "--seeed"], "more --seeed; did you mean '--seed'?"),
        (["more"], "more"),
        (["--zzz"], "--zzz"),
    ],
)
def test_an_unknown_option_names_the_nearest(capsys, words, hint):
    parser = CommandParser(prog="bake")
    parser.add_argument("--cfg-scale")
    parser.add_argument("--seed")
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(words)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        f"bake: error: unrecognized arguments: {hint} (bake --help lists the options)\n"
    )


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--scale", "two"], "--scale must be a number, got 'two'"),
        (["--seed", "1.5"], "-s/--seed must be a whole number, got '1.5'"),
        (["--seed"], "argument -s/--seed: expected one argument"),
    ],
)
def test_a_wrong_number_is_one_sentence(capsys, words, rule):
    parser = CommandParser(prog="bake")
    parser.add_argument("--scale", type=float)
    parser.add_argument("-s", "--seed", type=int)
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(words)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"bake: error: {rule} (bake --help lists the options)\n"


@pytest.mark.parametrize("entry", [flashdit.__main__, iwin_tasks.__main__], ids=["flashdit", "iwin"])
def test_every_command_names_the_nearest_option(entry, capsys):
    for name, command in entry.COMMANDS.items():
        with pytest.raises(SystemExit):
            run_command("entry", {name: command}, [name, "--help"])
        options = re.findall(r"^  (--[\w-]{4,})", capsys.readouterr().out, re.MULTILINE)
        for option in options[:1]:
            with pytest.raises(SystemExit):
                run_command("entry", {name: command}, [name, f"{option}x"])
            printed = capsys.readouterr().err
            assert f"did you mean '{option}'" in printed or "are required" in printed, name


def test_json_that_nests_too_deeply_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: json.loads("[" * 100_000))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith(
        "a file that was read nests lists or mappings too deeply; FLASHDIT_TRACEBACK=1 shows which\n"
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed(kitchen, capsys, words):
    run_command("kitchen", kitchen, words)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: kitchen COMMAND")
    assert "\n  bake  bakes it\n  burn  burns it\n" in printed


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError("no"), FloatingPointError("no")])
def test_a_users_mistake_is_one_line_and_a_bug_is_a_traceback(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/bake.py"])
    with pytest.raises(SystemExit) as exit_info:
        run_script(fail)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "bake.py: error: no\n"
    monkeypatch.setenv("FLASHDIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_script(fail)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "{} must be a file, and is a folder"),
        ("file/below", "{} must lie in folders, and something above it is a file"),
        ("x" * 300, "a path must be one that its file system takes, {} is too long"),
    ],
)
def test_a_file_that_cannot_be_one_is_told_by_its_rule(tmp_path, capsys, name, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: (tmp_path / name).read_text())
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said.format(tmp_path / name)}\n")


def test_a_killed_reader_of_data_is_one_line(capsys):
    class Fails(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: list(torch.utils.data.DataLoader(Fails(), num_workers=1)))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert "error: a process that reads data is gone (DataLoader worker (pid" in said
    assert said.count("\n") == 1


def test_an_interrupt_is_one_line_and_130_and_of_many_processes_the_first_tells(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["folder/bake.py"])
    for rank, printed in (("0", "\nbake.py: interrupted\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_info:
            run_script(interrupt)
        assert exit_info.value.code == 130
        assert capsys.readouterr().err == printed


def test_a_table_whose_reader_has_read_enough_ends_with_status_0():
    code = (
        "from flashdit.shared.command import open_console, run_script\n"
        "run_script(lambda: [open_console().print('line ' * 20) for _ in range(5000)])"
    )
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize("writer", [torch.save, lambda tensors, path: save_file(tensors, path)])
def test_weights_that_cannot_be_written_are_one_line(writer, no_room, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/bake.py"])
    with no_room(), pytest.raises(SystemExit) as exit_info:
        run_script(
            lambda: write_atomically(
                tmp_path / "weights", lambda path: writer({"a": torch.zeros(9999)}, path)
            )
        )
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"bake.py: error: {tmp_path / 'weights'} could not be written")
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_read_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/bake.py"])
    (tmp_path / "weights").write_bytes(b"half")
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: load_file(tmp_path / "weights"))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("bake.py: error: a file of weights must be readable: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", ""], "got '' after --config"),
        (["--config="], "got '--config='"),
        (["bake", "--class", "cat", "", "hen"], "got '' after cat"),
        ([""], "got ''"),
    ],
)
def test_an_empty_word_is_refused_before_the_command_begins(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/bake.py", *words])
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda: pytest.fail("it began"))
    assert exit_info.value.code == 2
    expected = f"bake.py: error: a word of the command line must not be empty, {said}\n"
    assert capsys.readouterr().err == expected


def test_other_errors_are_not_caught():
    with pytest.raises(RuntimeError):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("of ours")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory: MemoryError; use a smaller batch, model or picture"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 1 GiB"),
            "out of memory: CUDA out of memory; use a smaller batch, model or picture",
        ),
        (None, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4611686018427387904 bytes"),
    ],
)
def test_want_of_memory_is_one_line(error, said, capsys):
    def fail():
        if error is not None:
            raise error
        torch.empty(2**62, dtype=torch.uint8)

    with pytest.raises(SystemExit) as exit_info:
        run_script(fail)
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_a_missing_extra_says_what_to_install(monkeypatch):
    assert need_extra("json", "anything").loads("1") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"requires the extra 'wandb': pip install 'flashdit\[wandb\]' \("):
        need_extra("wandb", "wandb")


def test_no_device_is_given_by_default_and_means_cuda_where_there_is_one(monkeypatch):
    parser = argparse.ArgumentParser()
    add_device(parser)
    assert parser.parse_args([]).device is None
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device(None) == expected


@pytest.mark.parametrize("name", ["cuda:99", "toaster", "cpu:x", "meta"])
def test_a_device_that_the_machine_lacks_is_named(name):
    with pytest.raises(ValueError, match=f"--device must be one of this machine, such as cpu, got {name}"):
        resolve_device(name)


def test_a_device_of_this_machine_is_returned_as_it_is(monkeypatch):
    assert resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="got cuda:2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device_and_takes_no_files_place(tmp_path, closed):
    code = (
        "import os, sys\n"
        "from flashdit.shared.command import run_script\n"
        "from flashdit.shared.progress import progress_bar\n"
        "def main():\n"
        "    with open('file', 'w') as file:\n"
        "        assert file.fileno() > 2\n"
        "        assert list(progress_bar(range(3))) == [0, 1, 2]\n"
        "        print('out'); print('err', file=sys.stderr); os.write(2, b'library')\n"
        "        assert sys.stdin is not None\n"
        "        file.write('whole')\n"
        "run_script(main)\n"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    ran = subprocess.run(["bash", "-c", command], **options)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "file").read_text() == "whole"
    assert (ran.stdout == "out\n") == (closed in ("<&-", "2>&-"))
