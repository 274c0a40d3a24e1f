"""Two processes return what one returns, and a process that fails ends the job with its error."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors import extract_activations, train_steering_vector
from steering_vectors.demo import tiny_model, tiny_tokenizer
from steering_vectors.train import distributed

SCRIPT = """
import sys, torch
from steering_vectors import extract_activations, logistic_aggregator, mean_aggregator, pca_aggregator, train_steering_vector
from steering_vectors.train import extraction
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


def launch(folder: Path, code: str) -> str:
    "What two processes, started by torchrun, print; each runs `code` with `rank`, a tiny model and a few pairs at hand."
    head = """
    import json, logging, os, sys, time, torch
    import torch.distributed as dist
    from steering_vectors import Tokens, extract_activations, pca_aggregator, mean_aggregator, train_steering_vector
    from steering_vectors.train import distributed, extraction
    from steering_vectors.demo import tiny_model, tiny_tokenizer

    rank = int(os.environ["RANK"])
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [(f"{i} is fine", f"{i} is a sad number") for i in range(11)]
    sets = {"positive": [f"{i} is fine" for i in range(11)], "negative": ["bad", "so very bad", "worse"]}
    read = []
    model.model.layers[0].register_forward_hook(lambda *_: read.append(1))
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("steering_vectors").addHandler(handler)
    logging.getLogger("steering_vectors").setLevel(logging.INFO)

    def train(samples, **how):
        return train_steering_vector(model, tokenizer, samples, **how)

    def same(a, b):
        return all(torch.allclose(a.layer_activations[n], v, atol=1e-5) for n, v in b.layer_activations.items())

    def refused(words, kind, call):
        read.clear()
        try:
            call()
        except kind as error:
            assert words in str(error), error
            assert not read, "refused before anything is read"
        else:
            raise AssertionError(f"not refused: {words}")
    """
    script = folder / "work.py"
    script.write_text(textwrap.dedent(head) + textwrap.dedent(code) + "\nprint(f'rank {rank} is done')\n")
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "--master_port", port(), str(script)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 is done" in done.stdout and "rank 1 is done" in done.stdout
    return done.stderr


def test_processes_that_nobody_has_set_up_share_or_stay_alone(tmp_path: Path) -> None:
    launch(tmp_path, """
    # a farm: each process its own vectors, and not equally many
    own = [train(pairs[rank::2], distributed=False) for _ in range(1 + rank)]
    assert own[0].provenance.num_pairs == len(pairs[rank::2]) and not lines[-1].startswith("Samples are shared")
    acts, _ = extract_activations(model, tokenizer, pairs[: 3 + rank], distributed=False)
    assert len(acts[0]) == 3 + rank and not dist.is_initialized()

    # left out, all share, and one line of the log tells it
    lines.clear()
    shared = train(pairs)
    assert sum("Samples are shared out by 2 processes" in line and "distributed=False" in line for line in lines) == 1
    assert same(shared, train(pairs, distributed=False)) and not dist.is_initialized()

    # a farm that forgot to say so is refused before anything is read
    refused("given other samples", ValueError, lambda: train(pairs[rank::2]))
    refused("given other layers", ValueError, lambda: train(pairs, layers=[rank]))
    refused("given other tokens to read", ValueError, lambda: train(pairs, read_token_index=-1 - rank))
    refused("given other aggregator", ValueError, lambda: train(pairs, aggregator=[mean_aggregator(), pca_aggregator()][rank]))
    refused("pass distributed=False", ValueError, lambda: train(pairs, truncation=["left", "right"][rank]))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1 + rank)
    refused("given other weights of the model", ValueError, lambda: train(pairs))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.div_(1 + rank)
    assert same(train(pairs), shared)

    # what may differ from process to process
    assert same(train(pairs, show_progress=rank == 0, batch_size=1 + rank, move_to_cpu=True), shared)
    tools = {"tools": [lambda: None]}
    train(pairs, template=tools)

    # one process alone
    distributed.TIMEOUT, distributed.WARN_AFTER = 1.5, 0.2
    if rank == 0:
        lines.clear()
        refused("for rank 1. Samples are shared out", RuntimeError, lambda: train(pairs))
        assert any("Rank 0 waits for rank 1" in line for line in lines)
    else:
        time.sleep(3)
    distributed.TIMEOUT = 60
    assert same(train(pairs), shared)
    """)  # fmt: skip


def test_a_process_group_is_used_as_it_is(tmp_path: Path) -> None:
    launch(tmp_path, """
    dist.init_process_group("gloo")
    alone = train(pairs, distributed=False)
    if rank == 0:  # as people write it
        assert same(train(pairs, distributed=False), alone)
    for group in (None, dist.group.WORLD):
        assert same(train(pairs, distributed=group), alone)

    mine = [dist.new_group([0]), dist.new_group([1])]
    assert same(train(pairs[: 2 + rank], distributed=mine[rank]), train(pairs[: 2 + rank], distributed=False))
    refused("not in the group", ValueError, lambda: train(pairs, distributed=mine[1 - rank]))
    refused("distributed= takes False", TypeError, lambda: train(pairs, distributed=True))
    refused("distributed= takes False", TypeError, lambda: extract_activations(model, tokenizer, pairs, distributed="gloo"))

    # one process alone waits no longer than its timeout, and both meet again
    distributed.TIMEOUT = 1.0
    if rank == 0:
        refused("distributed=False", RuntimeError, lambda: train(pairs))
    dist.barrier()
    distributed.TIMEOUT = 60
    assert same(train(pairs), alone)

    # sets without pairs, several readings, windows that end unevenly
    extraction.WINDOW = 4
    for how in ({}, {"aggregator": lambda pos, neg: pos.mean(0) - neg[0]}):
        vector = train(sets, **how)
        assert same(vector, train(sets, distributed=False, **how))
        assert (vector.provenance.num_positive, vector.provenance.num_negative) == (11, 3)
    both, one = (extract_activations(model, tokenizer, sets, distributed=d) for d in (None, False))
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for a, b in zip(both, one) for n in a) and len(both[1][0]) == 3
    where = {"before the last": -2, "all": Tokens.all[1:]}
    both, one = (train(pairs, read=where, aggregator=pca_aggregator(), distributed=d) for d in (None, False))
    assert list(both) == ["before the last", "all"] and all(same(both[name], one[name]) for name in one)

    # a model that all processes hold together cannot be shared out
    model.model.layers[0].mlp.up_proj.weight._is_flat_param = True
    refused("spread over the processes", ValueError, lambda: train(pairs, distributed=dist.group.WORLD))
    assert same(train(pairs[: 1 + rank]), train(pairs[: 1 + rank], distributed=False))
    dist.destroy_process_group()
    """)  # fmt: skip


# --- without other processes


def test_a_wait_that_was_broken_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    store.set("call/2", "here")
    with pytest.raises(RuntimeError, match=r"Rank 0 has waited 0 s for ranks 1, 3\. .* distributed=False"):
        distributed.wait_for_members(store, "call", 0, [0, 1, 2, 3], timeout=0.02)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distributed.wait_for_members(store, "call", 0, [0, 1, 2, 3])
    assert not store.check(["call/0"]) and store.check(["call/2"])
    for rank in (1, 3):
        store.set(f"call/{rank}", "here")
    distributed.wait_for_members(store, "call", 0, [0, 1, 2, 3])
    assert store.check(["call/0"])


@pytest.mark.parametrize("wrong", [True, 0, "gloo", [0, 1], -1])
def test_what_is_no_group_is_refused_with_or_without_processes(wrong: Any) -> None:
    for call in (train_steering_vector, extract_activations):
        with pytest.raises(TypeError, match="distributed= takes False"):
            call(tiny_model("llama"), tiny_tokenizer(), [("a", "b")], distributed=wrong)
    train_steering_vector(tiny_model("llama"), tiny_tokenizer(), [("a", "b")], distributed=False)


def test_what_is_compared_is_the_same_in_every_process() -> None:
    "Not where an object lies in memory; but every weight counts."
    assert distributed._digest({"tools": [lambda: None]}) == distributed._digest({"tools": [lambda: None]})
    assert distributed._digest([("a", "b")]) != distributed._digest([("a", "c")])
    model = tiny_model("llama")
    before = distributed.fingerprint(model)
    assert (
        before == distributed.fingerprint(tiny_model("llama")) != distributed.fingerprint(tiny_model("llama", seed=1))
    )
    for p in model.parameters():
        with torch.no_grad():
            p.add_(0.01)
            assert distributed.fingerprint(model) != before
            p.sub_(0.01)
    assert distributed.fingerprint(torch.nn.Linear(3, 3).to(torch.float8_e4m3fn))
    assert not distributed.fingerprint(torch.nn.Linear(3, 3, device="meta"))
