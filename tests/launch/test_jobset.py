"""JobSets and workflows: manifests that the published schemas accept, and the settings for the hosts of a slice."""

import pathlib

import kubernetes_validate
import pytest
import yaml
from hera.workflows.models import Workflow
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from alignment_gap.errors import UserError
from alignment_gap.launch import JobSetConfig, submit_jobset
from alignment_gap.launch.jobset import jobset_text, manifest, object_name, workflow, xpk_line
from alignment_gap.launch.slices import slice_of

CONFIG = JobSetConfig(image="registry.example/alignment-gap:1", volume="runs")

LOGS = pathlib.Path("study", "logs")


def assert_within(made, found):
    """Everything in `made` is in `found`, which may also have defaults."""
    if isinstance(made, dict):
        for key, value in made.items():
            assert key in found
            assert_within(value, found[key])
    elif isinstance(made, list):
        assert len(made) == len(found)
        for each, other in zip(made, found, strict=True):
            assert_within(each, other)
    else:
        assert made == found


def check_jobset(made):
    """Checks with JobSet's models, which drop unknown fields, and with Kubernetes' own schema, which refuses them."""
    assert_within(made, JobsetV1alpha2JobSet.from_dict(made).to_dict())
    for replicated in made["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes_validate.validate(job, "1.37", strict=True)


def check_workflow(made):
    found = Workflow.model_validate(made)
    assert yaml.safe_load(found.model_dump_json(exclude_none=True, by_alias=True)) == made
    for template in made["spec"]["templates"][1:]:
        check_jobset(yaml.safe_load(template["resource"]["manifest"]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"topology": "v5p:2x2x4", "slices": 2, "queue": "multislice-queue", "namespace": "team"},
        {"topology": "v6e:2x4", "spot": True, "service_account": "runner", "restarts": 0},
    ],
)
def test_manifests_are_what_the_published_schemas_take(task_of, settings):
    config = JobSetConfig(image="image", volume="runs", **settings)
    tasks = [task_of("data", processes=False), task_of("seed0-sft", "ends", "data"), task_of("seed0-arm-lr0.01")]
    for task in tasks:
        check_jobset(manifest(task, config))
    check_workflow(workflow(tasks, config, "a study"))


def test_the_check_of_schemas_finds_a_wrong_name(task_of):
    made = manifest(task_of("sft"), CONFIG)
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_jobset(made)


@pytest.mark.parametrize(
    ("topology", "accelerator", "kind", "chips", "hosts"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", "v5litepod-1", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", "v5litepod-8", 8, 1),
        ("v5e:16x16", "tpu-v5-lite-podslice", "v5litepod-256", 4, 64),
        ("v6e:4x4", "tpu-v6e-slice", "v6e-16", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", "v5p-8", 4, 1),
        ("v5p:4x4x4", "tpu-v5p-slice", "v5p-128", 4, 16),
        ("v4:2x2x4", "tpu-v4-podslice", "v4-32", 4, 4),
    ],
)
def test_slices_have_their_hosts(topology, accelerator, kind, chips, hosts):
    """By the vendor's tables. Names count cores on v4 and v5p, but chips on v5e and v6e."""
    found = slice_of(topology)
    assert (found.accelerator, found.accelerator_type, found.chips, found.hosts) == (accelerator, kind, chips, hosts)


def test_one_pod_for_each_host_of_each_slice(task_of):
    made = manifest(task_of("sft"), JobSetConfig(image="image", volume="runs", topology="v5e:4x8", slices=3))
    (replicated,) = made["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (3, 8, 8)
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert pod["containers"][0]["command"][0] == "alignment-gap"
    assert pod["containers"][0]["command"][-1] == "--coordinator=auto"


def test_a_command_of_one_process_needs_no_tpu(task_of):
    made = manifest(task_of("data", processes=False), CONFIG)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod and "--coordinator=auto" not in pod["containers"][0]["command"]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "32Gi"}


def test_what_the_user_has_to_mend_is_not_tried_again(task_of):
    """Exit status 2 fails the set. Other failures (evicted, killed, crashed) restart it, up to a limit."""
    spec = manifest(task_of("sft"), CONFIG)["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] == 10


def test_a_workflow_keeps_the_order_of_a_graph(task_of):
    tasks = [task_of("a"), task_of("b"), task_of("c.0", "ends", "a", "b")]
    steps = workflow(tasks, CONFIG, "study")["spec"]["templates"][0]["dag"]["tasks"]
    assert [step.get("depends") for step in steps] == [None, None, "a && b"]
    assert steps[2]["name"] == steps[2]["template"] == object_name("c.0")


def test_another_launch_gets_other_names(task_of):
    """Kubernetes completes the names, within its limit for the pods of 100 slices of 100 hosts."""
    task = task_of("golden" * 20)
    inner = yaml.safe_load(workflow([task], CONFIG, "study")["spec"]["templates"][1]["resource"]["manifest"])
    for metadata in (manifest(task, CONFIG)["metadata"], inner["metadata"]):
        assert "name" not in metadata and metadata["generateName"] == f"{object_name(task.name)}-"
        assert len(f"{metadata['generateName']}abcde-slice-99-99-abcde") <= 63


def test_names_are_kubernetes_own():
    names = [
        "sft",
        "seed0-offline-ipo-beta0.1-lr0.001",
        "seed0-offline-ipo-beta0.1-lr0-001",
        "A" * 90,
        "A" * 91,
        "a_b",
        "",
        "2024-run",
    ]
    made = [object_name(name) for name in names]
    assert made[0] == "sft" and len(set(made)) == len(made)
    # JobSet creates a service with its own name, and the name of a service begins with a letter.
    assert all(len(name) <= 34 and name[0].isalpha() and name.strip("-") == name for name in made)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in made)


def test_xpk_gets_the_same_workload(task_of):
    line = xpk_line(task_of("sft"), JobSetConfig(image="image", volume="runs", slices=2, cluster="pods"))
    assert line.startswith("xpk workload create --cluster=pods --workload=sft --tpu-type=v5litepod-16 --num-slices=2 ")
    assert "--docker-image=image --storage=runs --max-restarts=10 '--command=cd /runs && alignment-gap ends " in line


def test_what_would_be_created_is_printed(task_of):
    one = [*yaml.safe_load_all(jobset_text([task_of("a")], CONFIG, LOGS))]
    assert [made["kind"] for made in one] == ["JobSet"]
    text = jobset_text([task_of("a"), task_of("b", "ends", "a", processes=False)], CONFIG, LOGS)
    assert [made["kind"] for made in yaml.safe_load_all(text)] == ["Workflow"]
    # Only commands that need a slice go to xpk.
    assert text.count("# xpk workload create") == 1
    done = task_of("c")
    done.folder.mkdir(parents=True)
    (done.folder / "done.json").write_text('{"settings": {}}')
    assert jobset_text([done], CONFIG, LOGS) == "all jobs are done"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "v5e:3x5"}, "has 15 chips, but a host has 4: give a multiple of that"),
        ({"topology": "h100:8"}, "topology 'h100:8' is not a TPU slice: give one of v4, v5e"),
        ({"slices": 0}, "slices is 0"),
        ({"memory": "32 GB"}, "memory is '32 GB': write a number with Ki, Mi, Gi or Ti, such as 32Gi"),
        ({"mount": "runs"}, "mount is runs: give a path from the root"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        JobSetConfig(**settings)


def test_what_is_missing_is_one_line(task_of, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"jobset\.image is not set: add --jobset\.image=IMAGE"):
        jobset_text([task_of("a")], JobSetConfig(volume="runs"), LOGS)
    with pytest.raises(UserError, match=r"jobset\.volume is not set"):
        submit_jobset([task_of("a")], JobSetConfig(image="image"), LOGS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no kubectl"):
        submit_jobset([task_of("a")], CONFIG, LOGS)


@pytest.mark.parametrize("refuses", [False, True])
def test_kubectl_gets_the_manifest(task_of, tmp_path, monkeypatch, refuses):
    """A program stands in for kubectl and keeps the manifest that it gets."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    refusal = 'cat > /dev/null; echo "Error: forbidden" >&2; exit 1'
    kubectl.write_text(f"#!/bin/sh\n{refusal if refuses else f'cat > {tmp_path}/given; echo jobset/a created'}\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kubectl.parent}:/usr/bin:/bin")
    said = []
    if refuses:
        with pytest.raises(UserError, match=r"^kubectl refused: Error: forbidden$"):
            submit_jobset([task_of("a")], CONFIG, LOGS, said.append)
        return
    submit_jobset([task_of("a")], CONFIG, LOGS, said.append)
    assert said == ["jobset/a created"]
    assert yaml.safe_load((tmp_path / "given").read_text()) == manifest(task_of("a"), CONFIG)
