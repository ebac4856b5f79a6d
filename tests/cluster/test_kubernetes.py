"""`--k8s`: what is made is what Kubernetes and JobSet know, and its end is the exit status of the command."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from distui.core.config.settings import load
from distui.core.errors import UserError
from distui.launcher import cli
from distui.launcher.cluster.jobset import manifests, merge, submit_jobset
from distui.launcher.job.request import LaunchRequest

pytest.importorskip("kubernetes", reason="the extra k8s is not installed")
SETTINGS = {
    "cluster.starter": "kubernetes",
    "cluster.k8s_image": "registry/me/train:1",
    "cluster.nodes": "3",
    "cluster.nproc": "8",
    "run.name": "My Run",
}
ENDED_S = 120.0


def made(**more: str) -> list[dict[str, Any]]:
    """Return the Secret and the JobSet of a launch."""
    overrides = {**SETTINGS, **{key.replace("__", "."): value for key, value in more.items()}}
    request = LaunchRequest(["train.py", "--lr", "3e-4"], overrides)
    return manifests(request, load(None, overrides, environ={}), "my-run-1")


@pytest.mark.cluster
def test_the_pods_are_what_kubernetes_knows() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    secret, jobset = made()
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": template["spec"]}
    for one in (secret, job):
        validate.validate(one, "1.31", strict=True)


@pytest.mark.cluster
def test_the_jobset_is_what_its_model_knows() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = made()[1]
    known = models.JobsetV1alpha2JobSet.from_dict(jobset)
    assert known is not None
    # The model takes keys that it does not know, so what comes back must be all that was given.
    assert json.loads(known.to_json()) == jobset


def test_what_gave_way_is_started_again_and_what_failed_counts() -> None:
    jobset = made(cluster__max_restarts="2")[1]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 2
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"operator": "In", "values": [75]}
    assert job["podFailurePolicy"]["rules"][1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_nothing_secret_is_outside_of_the_secret() -> None:
    secret, jobset = made()
    for name in ("token", "key.pem"):
        text = base64.b64decode(secret["data"][name]).decode()
        assert text not in json.dumps(jobset) and secret["data"][name] not in json.dumps(jobset)


def test_a_file_is_put_over_the_pods(tmp_path: Path) -> None:
    more = {
        "nodeSelector": {"gpu": "h200"},
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "containers": [{"name": "train", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
    }
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(more))
    jobset = made(cluster__k8s_pod=str(tmp_path / "pod.yaml"), cluster__k8s_gpus="false")[1]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h200"} and pod["restartPolicy"] == "Never"
    assert [volume["name"] for volume in pod["volumes"]] == ["distui", "shm", "data"]
    (container,) = pod["containers"]
    assert [mount["name"] for mount in container["volumeMounts"]] == ["distui", "shm", "data"]
    assert "limits" not in container.get("resources", {}) and container["image"] == "registry/me/train:1"
    base = {"a": {"b": 1}, "c": [1]}
    merge(base, {"a": {"d": 2}, "c": [2], "e": 3})
    assert base == {"a": {"b": 1, "d": 2}, "c": [1, 2], "e": 3}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"cluster__k8s_image": ""}, "no image is named"),
        ({"cluster__nproc": "auto"}, "--nproc is auto"),
        ({"cluster__k8s_pod": "/nowhere.yaml"}, "cannot be read"),
        ({"batch__global_size": "7"}, "batch.global_size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(more: dict[str, str], what: str) -> None:
    with pytest.raises(UserError) as refused:
        made(**more)
    assert what in refused.value.report()


def test_a_dry_run_prints_all_and_needs_no_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    request = LaunchRequest(["train.py"], SETTINGS, dry_run=True)
    assert submit_jobset(request, load(None, SETTINGS, environ={})) == 0
    secret, jobset = yaml.safe_load_all(capsys.readouterr().out)
    assert (secret["kind"], jobset["kind"]) == ("Secret", "JobSet")
    assert secret["metadata"]["name"] == jobset["metadata"]["name"]


def test_without_a_cluster_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    assert cli.run(["launch", "--k8s", "--k8s-image", "x", "--nproc", "1", "train.py"]) == 2
    assert "there is no Kubernetes cluster to speak to" in capsys.readouterr().err
    assert cli.run(["launch", "--k8s", "--slurm", "train.py"]) == 2
    assert "--slurm and --k8s together" in capsys.readouterr().err


class Cluster:
    """An API server in this process, with one JobSet whose status the test decides."""

    jobsets = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/ml/jobsets"

    def __init__(self, folder: Path) -> None:
        self.status: dict[str, Any] = {}
        self.pods: list[dict[str, Any]] = []
        self.made: list[dict[str, Any]] = []
        self.secrets: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self._file = folder / "kubeconfig"
        app = web.Application()
        app.router.add_post(self.jobsets, self._create)
        app.router.add_get(f"{self.jobsets}/{{name}}", self._get)
        app.router.add_delete(f"{self.jobsets}/{{name}}", self._delete)
        app.router.add_post("/api/v1/namespaces/ml/secrets", self._secret)
        app.router.add_get("/api/v1/namespaces/ml/pods", self._pods)
        self.server = TestServer(app)

    async def _create(self, request: web.Request) -> web.Response:
        self.made.append(await request.json())
        kept = {**self.made[-1], "metadata": {**self.made[-1]["metadata"], "uid": "u1"}}
        return web.json_response(kept, status=201)

    async def _get(self, request: web.Request) -> web.Response:
        assert request.match_info["name"] == self.made[0]["metadata"]["name"]
        return web.json_response({**self.made[0], "status": self.status})

    async def _delete(self, request: web.Request) -> web.Response:
        self.deleted.append(request.match_info["name"])
        return web.json_response({})

    async def _secret(self, request: web.Request) -> web.Response:
        self.secrets.append(await request.json())
        return web.json_response(self.secrets[-1], status=201)

    async def _pods(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "PodList", "items": self.pods})

    def environ(self) -> dict[str, str]:
        """Return an environment whose context leads here."""
        known = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": str(self.server.make_url("/")).rstrip("/")}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "ml"}}],
            "users": [{"name": "me", "user": {"token": "x"}}],
        }
        self._file.write_text(yaml.safe_dump(known))
        return {**os.environ, "KUBECONFIG": str(self._file)}

    def ended(self, state: str, exit_code: int) -> None:
        """Have the JobSet end, the first pod's container with this status."""
        container = {"name": "train", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        container["state"] = {"terminated": {"exitCode": exit_code}}
        pod = {"metadata": {"name": f"{self.made[0]['metadata']['name']}-node-0-0-abcde"}}
        self.pods, self.status = [{**pod, "status": {"containerStatuses": [container]}}], {"terminalState": state}


ENDS = [("Completed", 0, 0), ("Failed", 3, 3), ("Failed", 2, 2), ("", 0, 130)]


@pytest.mark.parametrize(("state", "exit_code", "status"), ENDS)
@pytest.mark.cluster
async def test_the_end_of_the_jobset_is_the_exit_status(
    tmp_path: Path, state: str, exit_code: int, status: int
) -> None:
    cluster = Cluster(tmp_path)
    async with cluster.server:
        words = ["launch", "--k8s", "--k8s-image", "x", "--nodes", "2", "--nproc", "1", "train.py"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "distui", *words, env=cluster.environ(), stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            said = b""
            while b"running" not in said:  # it follows: from here on Ctrl-C deletes
                line = await asyncio.wait_for(process.stderr.readline(), ENDED_S)
                assert line, said.decode()
                said += line
            if state:
                cluster.ended(state, exit_code)
            else:
                process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), ENDED_S) == status
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    (made_once,), (secret,) = cluster.made, cluster.secrets
    assert cluster.deleted == ([] if state else [made_once["metadata"]["name"]])
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "u1"
