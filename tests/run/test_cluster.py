"""Several nodes: which cluster is joined, where ranks run, what reaches them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch.distributed as dist
from ray._private.grpc_utils import init_grpc_channel  # with the cluster's token
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import (
    ClusterConfig,
    NodeGroupConfig,
    ReportClusterConfigRequest,
)
from ray.core.generated.autoscaler_pb2_grpc import AutoscalerStateServiceStub

from tests.support.commands import PATIENCE_S, ROOT, wait_until
from tp2d_lib import autotp, fsdp
from tp2d_lib.config import ConfigError
from tp2d_lib.presets import build_config
from tp2d_lib.run import cluster, environment, launch, placement
from tp2d_lib.run.attempts import Failed

pytestmark = pytest.mark.ranks
STEPS = {"max_steps": 2, "log_interval": 1}
SECRET = "hf_not_for_any_log"


@pytest.fixture(scope="module")
def nodes():
    """A head without CPUs or GPUs, where the driver is, and two nodes of 3 CPUs."""
    head = {"num_cpus": 0, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        started.add_node(num_cpus=3)
    started.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        ray.shutdown()
    started.shutdown()


def tells_where(config):
    """Training that first writes down what its rank finds around it."""
    found = {"node": ray.get_runtime_context().get_node_id()}
    found |= {name: os.environ.get(name) for name in ("HF_TOKEN", "NCCL_DEBUG")}
    path = Path(config.storage_path, f"{config.run_name}.{dist.get_rank()}")
    path.write_text(json.dumps(found))
    fsdp.train_func(config)


def found_by_ranks(storage: Path, name: str) -> list[dict]:
    paths = sorted(storage.glob(f"{name}.[0-9]"))
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.faults
def test_tp_groups_are_on_one_node_each(nodes, tmp_path, monkeypatch, capsys):
    """Ray would put three of four ranks on one node; the environment goes with them."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    settings = {"tp_size": 2, "dp_size": 2, "run_name": "placed", **STEPS}
    config = build_config("demo", str(tmp_path), device="cpu", **settings)
    launch.run(tells_where, config, fsdp.check)
    ranks = found_by_ranks(tmp_path, "placed")
    where = [rank["node"] for rank in ranks]
    assert where[0] == where[1] != where[2] == where[3]
    assert {rank["HF_TOKEN"] for rank in ranks} == {SECRET}
    assert {rank["NCCL_DEBUG"] for rank in ranks} == {"WARN"}
    out = capsys.readouterr().out
    assert f"joined the Ray cluster at {nodes.address}: 3 nodes, 0 GPUs" in out
    assert SECRET not in out
    session = Path(nodes.head_node.get_session_dir_path())
    written = [*session.joinpath("logs").rglob("*"), *(tmp_path / "placed").rglob("*")]
    assert not [p for p in written if p.is_file() and SECRET in read(p)]


def read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def test_a_tp_group_over_two_nodes_is_refused(nodes, tmp_path):
    """In the driver if no placement can help; else by the ranks as they run, below."""
    settings = {"tp_size": 4, "dp_size": 1, "run_name": "apart", **STEPS}
    config = build_config("demo", str(tmp_path), device="cpu", **settings)
    with pytest.raises(ConfigError, match=r"tp_size=4 must fit into single nodes 1 ti"):
        launch.run(fsdp.train_func, config, fsdp.check)
    uneven = replace(config, tp_size=2, dp_size=2, num_workers=4)
    placement.check_nodes(uneven)
    with pytest.raises(ConfigError, match="into single nodes 3 times, but they hold"):
        placement.check_nodes(replace(uneven, dp_size=3, num_workers=6))


@pytest.mark.faults
def test_a_tp_group_over_two_nodes_is_noted(nodes, tmp_path, capsys):
    settings = {"tp_size": 4, "dp_size": 1, "run_name": "noted", **STEPS}
    config = build_config("demo", str(tmp_path), device="cpu", **settings)
    noted = replace(config, tp_across_nodes="warn")
    launch.run(fsdp.train_func, noted, fsdp.check)
    said = r"ranks 0, 1, 2, 3 are a TP group on 2 nodes, .*: every layer waits for the"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.faults
def test_ranks_refuse_what_the_driver_could_not_see(nodes, tmp_path, monkeypatch):
    """Should Ray place the ranks otherwise than it was asked to."""
    settings = {"tp_size": 4, "dp_size": 1, "run_name": "elsewhere", **STEPS}
    config = build_config("demo", str(tmp_path), device="cpu", **settings)
    monkeypatch.setattr(placement, "check_nodes", lambda config: None)
    monkeypatch.setattr(placement, "find", lambda config, show: None)
    with pytest.raises(Failed, match=r"ConfigError: tp_size=4 must fit into one nod"):
        launch.run(fsdp.train_func, config, fsdp.check)


def test_the_driver_judges_by_the_clusters_hardware(nodes, tmp_path, capsys):
    """GPUs are declared, which is all that a driver sees of another node's."""
    config = build_config("demo", str(tmp_path), tp_size=2)
    launch.connect()
    assert launch.pick_device(config) == "cpu"
    assert "the cluster has no GPU: training on CPUs" in capsys.readouterr().out
    added = nodes.add_node(num_cpus=2, num_gpus=2)
    wait_until(lambda: ray.cluster_resources().get("GPU") == 2)
    try:
        config = replace(config, device=launch.pick_device(config))
        assert config.device == "cuda"
        assert launch.pick_dtype(config) == "auto"
        placement.check_nodes(config)
        autotp.check(replace(config, dtype="float16"))
        with pytest.raises(ConfigError, match="zero_stage=0 cannot be combined"):
            autotp.check(replace(config, zero_stage=0))
        busy = ray.util.placement_group([{"GPU": 1}])
        assert busy.wait(30)
        said = []
        with pytest.raises(ConfigError, match=r"needs 1 x 2 G"):
            placement.find(config, said.append, seconds=1)
        assert said == ["waiting for 1 x 2 GPUs, each on one node"]
        ray.util.remove_placement_group(busy)
        assert len(placement.find(config, said.append)) == 2
    finally:
        nodes.remove_node(added)


def test_an_old_gpu_makes_all_ranks_compute_in_float32(nodes, tmp_path, capsys):
    """Also where the driver sees none, and others of the cluster have bfloat16."""
    config = build_config("demo", str(tmp_path), tp_size=2)
    old = {"num_gpus": 1, "resources": {"accelerator_type:T4": 1}}
    new = {"num_gpus": 1, "resources": {"accelerator_type:H100": 1}}
    launch.connect()
    added = [nodes.add_node(num_cpus=1, **kind) for kind in (old, new)]
    wait_until(lambda: ray.cluster_resources().get("GPU") == 2)
    try:
        config = replace(config, device=launch.pick_device(config))
        config = replace(config, dtype=launch.pick_dtype(config))
        assert config.dtype == "float32"
        assert "T4 without native bfloat16: float32 thr" in capsys.readouterr().out
        autotp.check(replace(config, zero_stage=0))  # in bfloat16 it is refused
        explicit = replace(config, dtype="bfloat16")
        assert launch.pick_dtype(explicit) == "bfloat16"
    finally:
        for node in added:
            nodes.remove_node(node)


def test_a_node_without_the_package_is_found_by_the_driver(nodes, tmp_path):
    """Others may have called ray.init without sending it."""
    hidden = "import sys; sys.modules['tp2d_lib'] = None"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    launch.connect()
    launch.connect()  # all have it so far
    lacking = nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(ConfigError, match=r"must send tp2d_lib to all nodes, so"):
            launch.connect()
    finally:
        nodes.remove_node(lacking)


def test_auto_waits_for_gpus_that_the_cluster_may_add(nodes, tmp_path, capsys):
    """As its autoscaler reports them; here the test plays it, and adds the node."""
    launch.connect()
    kind = {"name": "gpu", "resources": {"CPU": 2, "GPU": 2}, "max_count": 1}
    report(nodes.address, node_group_configs=[NodeGroupConfig(**kind)])
    try:
        config = build_config("demo", str(tmp_path), tp_size=2)
        assert (cluster.gpus(), placement.gpus_later()) == (0, 2)
        config = replace(config, device=launch.pick_device(config))
        assert config.device == "cuda"
        placement.check_nodes(config)
        with ThreadPoolExecutor() as pool:
            said = []
            found = pool.submit(placement.find, config, said.append)
            wait_until(lambda: said == ["waiting for 1 x 2 GPUs, each on one node"])
            added = nodes.add_node(num_cpus=2, num_gpus=2)
            assert found.result() == 2 * [{placement.NODE: added.node_id}]
        nodes.remove_node(added)
    finally:
        report(nodes.address)


def report(address: str, **limits) -> None:
    """What an autoscaler tells Ray: how far the cluster may grow."""
    stub = AutoscalerStateServiceStub(init_grpc_channel(address))
    config = ClusterConfig(**limits)
    stub.ReportClusterConfig(ReportClusterConfigRequest(cluster_config=config))


def test_a_model_too_large_for_cpus_is_not_trained_there_unasked(tmp_path, demo_paths):
    large = json.loads(Path(demo_paths[0], "config.json").read_text())
    large |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    del large["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(large))
    config = build_config("demo", str(tmp_path), model_name=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"device='auto' must find a GPU to train 7\."
    ):
        placement.check_small(config)


CONNECT = "from tp2d_lib.run import launch; launch.connect(); {}"


def connected(tmp: Path, then: str = "", **variables) -> subprocess.Popen:
    """A process that connects, in an environment that names no cluster."""
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT.format(then)],
        env={**kept, "RAY_TMPDIR": str(tmp), "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp,
    )


def ray_start(tmp: Path, *flags: str) -> subprocess.Popen:
    """A node of a cluster that asks for the token in this folder."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--block", *flags],
        env={**os.environ, "RAY_TMPDIR": str(tmp), "HOME": str(tmp)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_node(node: subprocess.Popen) -> None:
    if node.poll() is None:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.fixture(scope="module")
def head():
    """What ``ray start`` began: its folder, address, token and process."""
    tmp = Path("/tmp", f"tp2d-{os.getpid()}")  # paths of sockets must be short
    token, record = "5" * 64, tmp / "ray" / "ray_current_cluster"
    (tmp / ".ray").mkdir(parents=True)
    (tmp / ".ray" / "auth_token").write_text(token)
    flags = ["--port=0", "--num-cpus=1", "--include-dashboard=false"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):  # the latter set by other tests
            patch.delenv(name, raising=False)
        process = ray_start(tmp, "--head", *flags)
        wait_until(lambda: record.exists() and record.read_text())
        yield SimpleNamespace(
            tmp=tmp, address=record.read_text(), token=token, process=process
        )
    kill_node(process)
    shutil.rmtree(tmp, ignore_errors=True)


@pytest.mark.faults
def test_a_cluster_that_asks_for_a_token_is_joined_with_it(head, tmp_path):
    """From wherever Ray looks for it, by any form of the address; or it is missed."""
    file, stranger = head.tmp / ".ray" / "auth_token", str(tmp_path)
    joined = f"joined the Ray cluster at {head.address}: 1 nodes, 0 GPUs\n"
    named, sent = {"RAY_ADDRESS": head.address}, {"RAY_AUTH_TOKEN": head.token}
    for good in (
        {"HOME": str(head.tmp), "http_proxy": "http://127.0.0.1:1"} | named,
        {"HOME": str(head.tmp), "RAY_ADDRESS": "auto"},
        {"HOME": stranger} | named | sent,
        {"HOME": stranger, "RAY_AUTH_TOKEN_PATH": str(file)} | named,
    ):
        assert connected(head.tmp, **good).communicate()[0].endswith(joined), good
    lacks = "must be joined with the token of that cluster, but"
    none = f"{lacks} RAY_AUTH_TOKEN and ~/.ray/auth_token have none; try RAY_AUTH_TOK"
    for bad, said in (
        ({"HOME": stranger} | named, none),
        ({"HOME": stranger, "RAY_ADDRESS": "auto"}, none),
        ({"HOME": stranger}, none),
        ({"RAY_AUTH_TOKEN": "7" * 64} | named, f"{lacks} RAY_AUTH_TOKEN has another"),
        ({"RAY_AUTH_MODE": "disabled"} | named, f"{lacks} RAY_AUTH_MODE='disabled' se"),
        ({"RAY_ADDRESS": "http://far:8265"}, "a dashboard; try RAY_ADDRESS=far:6379"),
    ):
        out = connected(head.tmp, **{"HOME": str(head.tmp)} | bad).communicate()[0]
        assert said in out.splitlines()[-1], bad
        assert "InvalidAuthToken" not in out  # which Ray says for twenty seconds


@pytest.mark.faults
def test_a_second_node_joins_with_the_token(head):
    both = "from tests.support.commands import wait_until;"
    both += "from tp2d_lib.run import cluster;"
    both += "wait_until(lambda: len(cluster.nodes()) == 2); launch.connect()"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # else `ray start --address` sends none
        node = ray_start(head.tmp, f"--address={head.address}", "--num-cpus=1")
    try:
        own = {"HOME": str(head.tmp), "RAY_ADDRESS": head.address}
        run = connected(head.tmp, f"{both}; print('package on both')", **own)
        assert run.communicate(timeout=PATIENCE_S)[0].endswith("package on both\n")
    finally:
        kill_node(node)


@pytest.mark.faults
def test_only_a_cluster_that_is_named_is_joined(head):
    """Two runs do not join each other; what ``ray start`` began is joined."""
    tmp, home = head.tmp, {"HOME": str(head.tmp)}
    local = {"RAY_ADDRESS": "local"} | home
    first = connected(tmp, "print(flush=True); import time; time.sleep(100)", **local)
    try:
        address = first.stdout.readline().split(" at ")[1].strip()
        assert address != head.address
        joined = connected(tmp, **home).communicate()[0]
        assert joined.startswith(f"joined the Ray cluster at {head.address}: ")
        said = connected(tmp, RAY_ADDRESS="127.0.0.1:1").communicate()[0]
        assert "RAY_ADDRESS='127.0.0.1:1' must be the address of a running" in said
        kill_node(head.process)
        alone = connected(tmp, **home).communicate()[0]
        assert alone.startswith("started a local Ray cluster")
        assert address not in alone
    finally:
        first.kill()
        first.wait()


def test_secrets_are_told_apart(monkeypatch):
    given = {
        "HF_HOME": "/hf",
        "HF_TOKEN": "secret",
        "AWS_REGION": "eu-central-1",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "MLFLOW_TRACKING_URI": "http://user:secret@host",
        "GLOO_SOCKET_IFNAME": "eth1",
        "https_proxy": "http://user:secret@proxy:3128",
        "NO_PROXY": "10.0.0.0/8",
        "REQUESTS_CA_BUNDLE": "/etc/company.pem",
        "CUDA_VISIBLE_DEVICES": "0",
        "PATH": os.environ["PATH"],
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    variables, secrets = environment.to_send()
    both = {**variables, **secrets}
    assert {k for k in given if k not in both} == {"CUDA_VISIBLE_DEVICES", "PATH"}
    assert {v for k, v in secrets.items() if k in given} >= {"secret"}
    assert not [value for value in variables.values() if "secret" in value]


def test_a_folder_too_long_for_rays_sockets_is_told(tmp_path):
    far = tmp_path / ("a" * 100)
    far.mkdir()
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": str(far)}
    command = [sys.executable, "-c", CONNECT.format("")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert f"ConfigError: RAY_TMPDIR={str(far)!r} must be short, because Ray" in last


def test_workers_of_uv_run_have_the_drivers_interpreter():
    """Ray's way starts each by `uv run` in a copy of the folder, and fails there."""
    code = "import tp2d_lib, ray; print(ray._private.ray_constants.{})"
    code = code.format("RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n"
