"""Two processes return what one returns, and a process that fails ends the job with its error."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from steering_vectors import train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer

SCRIPT = """
import sys, torch
from steering_vectors import extract_activations, logistic_aggregator, mean_aggregator, pca_aggregator, train_steering_vector
from steering_vectors import extraction
from steering_vectors.demo import tiny_model, tiny_tokenizer
{setup}
extraction.WINDOW = 5
model, tokenizer = tiny_model("llama"), tiny_tokenizer()
pairs = [(f"{{i}} is fine", f"{{i}} is a sad number") for i in range(11)]
first = lambda pos, neg: pos[0] - neg[1]
{broken}
out = {{}}
for name, aggregator in dict(mean=mean_aggregator(), pca=pca_aggregator(), logistic=logistic_aggregator(), first=first).items():
    vector = train_steering_vector(model, tokenizer, pairs, aggregator=aggregator)
    out[name] = vector.layer_activations
    out[name + " norms"] = vector.provenance.activation_norms
    assert vector.provenance.num_pairs == 11
out["pos"], out["neg"] = extract_activations(model, tokenizer, iter(pairs))
out["few"] = train_steering_vector(model, tokenizer, pairs[:1]).layer_activations
import os
torch.save(out, sys.argv[1] + os.environ.get("RANK", "alone"))
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run(folder: Path, launcher: str | None, setup: str = "", broken: str = "") -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(setup=setup, broken=broken))
    launch = (
        [
            "-m",
            *LAUNCHERS[launcher],
            *(["--master_port", port()] if launcher == "torchrun" else ["--main_process_port", port()]),
        ]
        if launcher
        else []
    )
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *launch, str(script), str(folder / "out-")],
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder, None)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out-alone", weights_only=False)


SETUPS = {
    "torchrun": ("torchrun", ""),
    "torchrun with a group": ("torchrun", 'import torch.distributed as dist; dist.init_process_group("gloo")'),
    "accelerate": ("accelerate", "from accelerate import Accelerator; Accelerator(cpu=True)"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_every_rank_returns_what_one_process_does(
    name: str, alone: dict[str, dict[int, torch.Tensor]], tmp_path: Path
) -> None:
    done = run(tmp_path, *SETUPS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"out-{rank}", weights_only=False) for rank in (0, 1)]
    for key, wanted in alone.items():
        for n, v in wanted.items():
            a, b = ranks[0][key][n], ranks[1][key][n]
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), key
            assert torch.allclose(torch.as_tensor(a), torch.as_tensor(v), atol=2e-3 if key == "logistic" else 1e-4), key


def test_a_failing_rank_ends_the_job_with_its_error(tmp_path: Path) -> None:
    broken = 'if os.environ["RANK"] == "1": model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)'
    done = run(tmp_path, "torchrun", "import os", broken)
    assert done.returncode != 0
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert (
        "Rank 1 of 2 failed, so there is no result. ZeroDivisionError" in done.stderr or "RANK" in done.stderr.upper()
    )


def test_one_process_asks_nobody() -> None:
    assert not torch.distributed.is_initialized()
    train_steering_vector(tiny_model("llama"), tiny_tokenizer(), [("a", "b")])
    assert not torch.distributed.is_initialized()


def test_ranks_with_samples_of_their_own_are_found_out(tmp_path: Path) -> None:
    "Each rank was given its half already, as a distributed sampler would do."
    done = run(tmp_path, "torchrun", broken='import os; pairs = pairs[int(os.environ["RANK"]) :: 2]')
    assert done.returncode and "was given other samples than rank" in done.stderr
