"""The sandbox, from inside: what a confined process can not do, what it still can, and where a layer is missing."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from models.sandbox import kernel, landlock, numbers, seccomp
from tests.support.confined import Cell

DENIED = "PermissionError"


@pytest.mark.usefixtures("landlock")
class TestFiles:
    def test_what_others_own_is_not_readable(self, cell: Cell, tmp_path: Path) -> None:
        (tmp_path / "other.onnx").write_text("of another user")
        home = Path.home()
        expressions = [
            "open('/etc/hostname').read()",
            "open('/etc/passwd').read()",
            f"open({str(tmp_path / 'other.onnx')!r}).read()",
            f"os.listdir({str(tmp_path)!r})",
            f"os.listdir({str(home)!r})",
            "os.listdir('/')",
            "os.listdir('/proc')",
            f"open('/proc/{os.getpid()}/environ').read()",
        ]
        said = cell.try_all(*expressions)
        assert set(said.values()) == {DENIED}, said

    def test_its_file_is_and_cannot_be_written(self, cell: Cell) -> None:
        read, write, remove = (
            f"open({str(cell.source)!r}).read()",
            f"open({str(cell.source)!r}, 'a')",
            f"os.remove({str(cell.source)!r})",
        )
        said = cell.try_all(read, write, remove)
        assert said == {read: repr("from outside"), write: DENIED, remove: DENIED}

    def test_it_writes_in_its_folder_and_nowhere_else(self, cell: Cell, tmp_path: Path) -> None:
        inside = "open('result', 'w').write('found')"
        outside = [
            f"open({str(tmp_path / 'stray')!r}, 'w')",
            f"os.mkdir({str(tmp_path / 'stray')!r})",
            "open('/tmp/stray', 'w')",
            f"os.rename('result', {str(tmp_path / 'result')!r})",
            f"shutil.rmtree({str(tmp_path)!r})",
        ]
        said = cell.try_all(inside, *outside)
        assert said.pop(inside) == "5"
        assert set(said.values()) <= {DENIED, "OSError"}, said  # a rename across is EXDEV
        assert (cell.folder / "result").read_text() == "found"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "upload.bin"]

    def test_it_makes_no_links_pipes_or_devices(self, cell: Cell) -> None:
        said = cell.try_all(
            "os.symlink('/etc/passwd', 'link')",
            f"os.link({str(cell.source)!r}, 'link')",
            "os.mkfifo('pipe')",
            "os.mknod('device', 0o20666, os.makedev(1, 3))",
        )
        assert set(said.values()) <= {DENIED, "OSError"}, said
        assert list(cell.folder.iterdir()) == []


@pytest.mark.usefixtures("seccomp")
class TestSystemCalls:
    def test_rights_times_and_lengths_of_files_stay(self, cell: Cell) -> None:
        path = repr(str(cell.source))
        said = cell.try_all(
            f"os.chmod({path}, 0o777)",
            f"os.chown({path}, 1, 1)",
            f"os.utime({path})",
            f"os.truncate({path}, 0)",
            f"os.setxattr({path}, 'user.note', b'x')",
        )
        assert set(said.values()) == {DENIED}, said
        assert cell.source.read_text() == "from outside"

    @pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
    def test_there_is_no_network(self, cell: Cell, family: str) -> None:
        said = cell.try_all(
            f"socket.socket(socket.{family}, socket.SOCK_STREAM)",
            f"socket.socket(socket.{family}, socket.SOCK_DGRAM)",
            "socket.socketpair()",
        )
        assert set(said.values()) == {DENIED}, said

    def test_no_process_is_started(self, cell: Cell) -> None:
        said = cell.try_all(
            "os.fork()",
            "os.execv('/bin/true', ['true'])",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "subprocess.run(['true'])",
            "os.system('true')",
        )
        assert said.pop("os.system('true')") != "0"
        assert set(said.values()) == {DENIED}, said

    def test_other_processes_are_left_alone(self, cell: Cell) -> None:
        parent = os.getpid()
        said = cell.try_all(
            f"os.kill({parent}, 0)",
            f"os.kill({parent}, signal.SIGKILL)",
            f"os.killpg({os.getpgid(0)}, 0)",
            "os.kill(-1, 0)",
            f"os.pidfd_open({parent})",
            f"os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
            f"os.sched_setaffinity({parent}, {{0}})",
        )
        assert set(said.values()) == {DENIED}, said

    def test_the_kernel_is_not_reached_for(self, cell: Cell) -> None:
        """Each fails for want of permission, before its arguments are looked at."""
        names = [*seccomp.SYSTEM, "ptrace", "process_vm_readv", "memfd_create", "shmget"]
        here = kernel.machine()
        calls = {name: found for name in names if (found := numbers.find(name, here)) is not None}
        said = cell.run(
            f"""
            from models.sandbox.kernel import syscall
            for name, number in {calls}.items():
                try:
                    said[name] = syscall(number, 0, 0, 0, 0, 0, 0)
                except OSError as error:
                    said[name] = error.errno
            """
        )
        assert {said[name] for name in calls} == {1}, said  # EPERM

    def test_a_call_that_is_not_known_yet_is_no_call(self, cell: Cell) -> None:
        said = cell.run(
            """
            from models.sandbox.kernel import syscall
            try:
                syscall(470)
            except OSError as error:
                said["errno"] = error.errno
            """
        )
        assert said["errno"] == 38  # ENOSYS

    def test_it_can_still_abort(self, cell: Cell) -> None:
        assert cell.start("os.abort()").returncode == -signal.SIGABRT


class TestLimits:
    def test_memory(self, cell: Cell) -> None:
        enough, much = "len(bytearray(2**26))", "len(bytearray(2**29))"
        said = cell.try_all(enough, much, limits="2**28, None, None")
        assert said == {enough: str(2**26), much: "MemoryError"}

    @pytest.mark.usefixtures("seccomp")
    def test_memory_that_is_not_counted_is_not_given(self, cell: Cell) -> None:
        shared = "mmap.mmap(-1, 2**20)"
        assert cell.try_all(shared) == {shared: DENIED}

    def test_what_is_written_to_a_file(self, cell: Cell) -> None:
        write = "open('large', 'wb').write(bytes(2**20))"
        said = cell.try_all(
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)", write, limits="None, 2**16, None"
        )
        assert said[write] in ("65536", "OSError")
        assert (cell.folder / "large").stat().st_size <= 2**16

    def test_processor_time(self, cell: Cell) -> None:
        assert cell.start("while True: pass", limits="None, None, 1").returncode == -signal.SIGXCPU

    @pytest.mark.usefixtures("seccomp")
    def test_they_cannot_be_raised_again(self, cell: Cell) -> None:
        core = "__import__('resource').setrlimit(4, (10**6, 10**6))"
        assert cell.try_all(core)[core] in (DENIED, "ValueError")

    def test_open_files(self, cell: Cell) -> None:
        many = "[open('/dev/null') for _ in range(1000)]"
        assert cell.try_all(many) == {many: "OSError"}


class TestWork:
    def test_threads_and_the_libraries_run(self, cell: Cell) -> None:
        """Imported inside, which reads hundreds of files; threads of torch and of ONNX Runtime included."""
        said = cell.run(
            """
            import threading
            import numpy as np
            import onnx
            import onnxruntime
            import torch
            from onnx import TensorProto, helper

            found = []
            threads = [threading.Thread(target=found.append, args=(i,)) for i in range(8)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            said["threads"] = len(found)

            torch.set_num_threads(4)
            x = torch.ones(400, 400)
            said["torch"] = float((x @ x).sum())

            value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [300, 300])
            graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", [value("x")], [value("y")])
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 3
            options.optimized_model_filepath = "optimized.onnx"
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(model.SerializeToString(), options)
            said["onnxruntime"] = float(session.run(None, {"x": np.ones((300, 300), np.float32)})[0].sum())

            with tempfile.TemporaryDirectory() as folder:
                scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()))
                torch.jit.save(scripted, f"{folder}/net.pt")
                said["jit"] = list(torch.jit.load(f"{folder}/net.pt")(torch.ones(3, 4)).shape)
                program = torch.export.export(torch.nn.Linear(4, 2), (torch.ones(3, 4),))
                torch.export.save(program, f"{folder}/net.pt2")
                said["export"] = list(torch.export.load(f"{folder}/net.pt2").module()(torch.ones(3, 4)).shape)
            """
        )
        assert said["threads"] == 8
        assert said["torch"] == 400.0**3
        assert said["onnxruntime"] == 300.0**3
        assert said["jit"] == said["export"] == [3, 2]
        assert (cell.folder / "optimized.onnx").is_file()

    @pytest.mark.usefixtures("landlock", "seccomp")
    def test_it_says_what_holds_it(self, cell: Cell) -> None:
        said: Any = cell.run("")["confinement"]
        assert said["missing"] == {}
        assert set(said["layers"]) == {"privileges", "landlock", "seccomp", "limits"}
        assert said["layers"]["seccomp"] == "no network"

    @pytest.mark.usefixtures("landlock", "seccomp")
    def test_a_zoo_network_may_be_fetched_but_no_more(self, cell: Cell, tmp_path: Path) -> None:
        (tmp_path / "store.onnx").write_text("of another user")
        allowed = "socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()"
        said = cell.try_all(
            allowed,
            "open('/etc/hosts').close()",
            f"open({str(tmp_path / 'store.onnx')!r}).read()",
            "open('/tmp/stray', 'w')",
            "os.fork()",
            f"os.kill({os.getpid()}, 0)",
            profile="for_zoo",
        )
        assert list(said.values()) == ["None", "None", DENIED, DENIED, DENIED, DENIED]

    def test_a_thread_that_runs_already_would_stay_free(self, cell: Cell) -> None:
        said = cell.run(
            """
            import threading
            stay = threading.Event()
            threading.Thread(target=stay.wait).start()
            said["again"] = tried(lambda: sandbox.confine(profile, sandbox.Limits()))
            stay.set()
            """
        )
        assert said["again"] == "ThreadsRunning"


class TestWithoutTheKernelsHelp:
    """The system calls are answered by the test, as an older kernel would."""

    @pytest.mark.usefixtures("seccomp")
    def test_no_landlock_is_a_warning_and_the_rest_goes_on(self, cell: Cell) -> None:
        said: Any = cell.run(
            """
            said["logged"] = logged
            said["socket"] = tried(lambda: __import__("socket").socket())
            said["passwd"] = tried(lambda: open("/etc/passwd").close())
            """,
            before="""
            import logging
            logged = []
            listener = logging.Handler()
            listener.emit = lambda record: logged.append(record.getMessage())
            logging.getLogger("models.sandbox").addHandler(listener)
            real = syscall

            def syscall(number, *arguments):
                if number == 444:  # landlock_create_ruleset
                    raise OSError(38, "Function not implemented")
                return real(number, *arguments)
            """,
        )
        assert set(said["confinement"]["layers"]) == {"privileges", "seccomp", "limits"}
        assert "no Landlock" in said["confinement"]["missing"]["landlock"]
        assert ["no landlock" in line for line in said["logged"]] == [True]
        assert said["socket"] == DENIED
        assert said["passwd"] == "None"

    @pytest.mark.parametrize(
        ("abi", "size", "rights"),
        [(1, 8, 13), (2, 8, 14), (3, 8, 15), (4, 16, 15), (5, 16, 16), (6, 24, 16), (9, 24, 16)],
    )
    def test_a_kernel_is_asked_only_for_what_it_knows(
        self, abi: int, size: int, rights: int, tmp_path: Path
    ) -> None:
        sizes: list[int] = []
        here = kernel.machine()
        create = numbers.number("landlock_create_ruleset", here)

        def call(number: int, *arguments: Any) -> int:
            if number != create:
                return 0
            if arguments[0] is None:
                return abi
            sizes.append(arguments[1])
            return os.open(os.devnull, os.O_RDONLY)

        assert landlock.restrict(here, call, readable=[tmp_path], writable=[tmp_path / "none"]) == abi
        assert sizes == [size]
        assert landlock.handled(abi) == 2**rights - 1
