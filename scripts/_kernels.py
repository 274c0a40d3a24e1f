"""Kernels for pages, forked from a process that has imported the large libraries once.

Each page still has a process of its own, with nothing in it but imported modules. It starts at once instead of after five
seconds of importing. Elsewhere than on Linux, a kernel starts as it does in Jupyter.
"""

import multiprocessing
import os
import signal
import sys
import threading
from importlib.metadata import EntryPoint
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

# Not matplotlib, which chooses its backend when it is imported.
IMPORTED = ["torch", "transformers", "transformers.models.llama.modeling_llama", "ipykernel.ipkernel", "ipywidgets"]

STARTING = threading.Lock()  # pages are run by several threads


def serve(connection: str, env: dict[str, str], folder: str) -> None:
    "Be the kernel that the connection file describes, in a group of processes of its own."
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    ours = {str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests" / "helpers"), ""}
    sys.path[:] = [place for place in sys.path if place not in ours]
    options = ["-f", connection, "--log-level=40", f"--IPKernelApp.parent_handle={os.getppid()}"]
    IPKernelApp.launch_instance(argv=options)


class Process:
    "What a provisioner asks of a process."

    stdin = stdout = stderr = None

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Forked(LocalProvisioner):
    "Starts a kernel by forking."

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        env, folder = kwargs["env"], str(kwargs["cwd"])
        with mock.patch.dict(os.environ, env):  # the seed of hashes and the number of threads are those of its start
            forkserver.ensure_running()
        process = context.Process(target=serve, args=(cmd[cmd.index("-f") + 1], dict(env), folder))
        main = sys.modules["__main__"]  # what runs here is of no concern to a page, and would be imported there
        with (
            STARTING,
            mock.patch.object(main, "__spec__", None),
            mock.patch.object(main, "__file__", None, create=True),
        ):
            process.start()
        self.process, self.pid, self.pgid, self.cwd = Process(process), process.pid, process.pid, folder
        return self.connection_info


def fork() -> None:
    "From now on, kernels of this process are forked, where that is safe."
    if sys.platform == "linux":
        factory = KernelProvisionerFactory.instance()
        factory.provisioners["forked"] = EntryPoint("forked", "_kernels:Forked", factory.GROUP_NAME)
        factory.default_provisioner_name = "forked"
